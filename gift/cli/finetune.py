"""``gift finetune``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gift.cli.options import ALLOW_IMPORT, CLASSES, NETWORK, SET, is_code, listed, own_network
from gift.cli.plain import complain, say


def finetune(
    job: Annotated[
        Path,
        typer.Argument(
            metavar="JOB|FOLDER|TABLE",
            help="a job file, see gift init; or a folder with a folder of images for each class; "
            "or a table (.csv, .tsv) of texts or images and labels",
        ),
    ],
    changes: SET = None,
    network: NETWORK = None,
    classes: CLASSES = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="start over instead of resuming")
    ] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="resume although the examples changed")
    ] = False,
    allow_import: ALLOW_IMPORT = False,
) -> None:
    """Run a job, or resume it if it was stopped; without a job file, run one that fits the data."""
    from gift.jobs import run_job
    from gift.jobs.networks import CODE
    from gift.jobs.runs import JOB

    settled = read_or_guess(job, changes or [], network, classes)
    folder = Path(settled.folder)
    own = own_network(network if is_code(network) else None, settled, folder, allow_import)
    code = network if is_code(network) else None
    if own is not None and code is None:
        code = (folder / CODE).read_text(encoding="utf-8").strip()
    try:
        result = run_job(settled, own, restart, accept_changed_data, code)
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # else the run has said where its checkpoint is
            complain("stopped; the same command resumes from the last checkpoint, if there is one")
        raise typer.Exit(130) from None
    say(f"{result}\n\nAll files are in {folder}, the job is {folder / JOB}")


def read_or_guess(
    place: Path, changes: list[str], network: str | None, classes: str | None = None
) -> Any:
    """Return the job in a file, or the one that fits a folder or table.

    Args:
        place: a job file, a folder, or a table.
        changes: see `gift.jobs.read_job`.
        network: name of a network in the place of that of the job.
        classes: names of the classes, separated by commas.
    """
    from gift.jobs import guess_job, read_job

    changes = list(changes)
    if network is not None:
        chosen = "null" if is_code(network) else f"{{name: {network!r}}}"
        changes.append(f"network={chosen}")
    if classes is not None:
        changes.append(f"data.options.classes={listed(classes)}")
    if place.suffix.lower() in (".yaml", ".yml") or not place.exists():
        return read_job(place, changes)
    job = guess_job(place, network, changes)
    named = "your own network" if job.network is None else job.network.name
    valid = f"{job.data.valid_share or 0:.0%} of them"
    if isinstance(job.data.valid, dict):
        valid = ", ".join(map(str, job.data.valid.values()))  # a guessed place is one path
    complain(
        f"no job file: {job.data.kind} from {place} for {named}, validated on {valid}; --set "
        "changes what is not as it should be"
    )
    return job
