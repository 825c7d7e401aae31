"""``gift predict``."""

from pathlib import Path
from typing import Annotated

import typer

from gift.cli.options import ALLOW_IMPORT, DELTA, DEVICE, JSON, NETWORK, RUN, opened
from gift.cli.plain import say


def predict(
    run: RUN,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...",
            help='files, folders, patterns ("*.jpg"), texts, or tables (.csv, .tsv) whose columns '
            "are called as in the job",
        ),
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
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write into a .csv or .json file")
    ] = None,
    delta: DELTA = None,
    network: NETWORK = None,
    allow_import: ALLOW_IMPORT = False,
    device: DEVICE = None,
) -> None:
    """Predict images, sounds or texts with the network of a run."""
    from gift.jobs import JobError
    from gift.jobs.inputs import FORMATS, inputs_of
    from gift.support.atomic_files import write_text
    from gift.training.drawings import write_drawings

    if out is not None and out.suffix.lower() not in FORMATS:
        raise JobError(f"{out} cannot hold predictions", ["expected a .csv or a .json file"])
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv", param_hint="--csv")
    its = opened(run, network, allow_import)
    found = its.predict(
        inputs_of(its, inputs), top, delta, device,
        threshold=threshold, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    if drawings is not None:
        write_drawings(found, drawings)
    if out is not None:
        write_text(out, FORMATS[out.suffix.lower()](found))
        say(f"{out} has {len(found):,} predictions")
    elif as_json or as_csv:
        say(FORMATS[".json" if as_json else ".csv"](found).rstrip("\n"))
    else:
        say("\n".join(map(str, found)))
