"""``gift predict``."""

import json
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from gift.cli.options import DELTA, DEVICE, JSON, NETWORK, RUN, opened
from gift.cli.plain import say


def predict(
    run: RUN,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUTS...", help="files of images, or texts")
    ],
    top: Annotated[int, typer.Option(help="number of classes to show", min=1)] = 1,
    as_json: JSON = False,
    delta: DELTA = None,
    network: NETWORK = None,
    device: DEVICE = None,
) -> None:
    """Predict images or texts with the network of a run."""
    found = opened(run, network).predict(inputs, top, delta, device)
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
