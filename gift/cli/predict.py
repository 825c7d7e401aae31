"""``gift predict``."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gift.cli.options import DELTA, DEVICE, JSON, NETWORK, RUN, opened
from gift.cli.plain import say


def predict(
    run: RUN,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUTS...", help="files of images or sounds, or texts")
    ],
    top: Annotated[
        int | None,
        typer.Option(
            help="number of classes to show, default 1; or of objects, default all", min=1
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="lowest score of objects, default 0; or probability of classes, if there may be "
            "several, default 0.5",
            min=0,
            max=1,
        ),
    ] = None,
    drawings: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="write images with boxes, or masks and images with masks, into a folder",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="largest number of tokens that a language model writes", min=1)
    ] = 128,
    as_json: JSON = False,
    delta: DELTA = None,
    network: NETWORK = None,
    device: DEVICE = None,
) -> None:
    """Predict images, sounds or texts with the network of a run."""
    from gift.training.drawings import write_drawings

    found = opened(run, network).predict(
        inputs, top, delta, device, threshold=threshold, max_new_tokens=max_new_tokens
    )
    if drawings is not None:
        write_drawings(found, drawings)
    if as_json:
        say(json.dumps([_plain(one) for one in found], ensure_ascii=False, indent=1))
    else:
        say("\n".join(map(str, found)))


def _plain(value: Any) -> Any:
    """Convert to plain data: predictions become dictionaries, tensors become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
