"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

RUN = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run", show_default=False)]
NETWORK = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="NAME",
        help="in the place of the network that the job names; import:package.module:function "
        "calls your own code",
    ),
]
ARCHITECTURE = Annotated[
    str,
    typer.Argument(
        metavar="NETWORK",
        help="torchvision:resnet18, timm:..., transformers:..., import:package.module:function",
    ),
]
TASK = Annotated[str | None, typer.Option(help="classification, language or detection")]
DELTA = Annotated[
    str | None, typer.Option("--delta", metavar="best|last|FILE", help="which delta is taken")
]
DEVICE = Annotated[str | None, typer.Option("--device", help="of torch; default: that of the job")]
CLASSES = Annotated[
    str | None,
    typer.Option("--classes", metavar="A,B,...", help="names of the classes, in this order"),
]
JSON = Annotated[bool, typer.Option("--json", help="print JSON")]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="change a setting; as often as needed"),
]
ON = Annotated[str, typer.Option("--on", metavar="ray|slurm", help="which cluster")]
ON_OR_HERE = Annotated[
    str | None, typer.Option("--on", metavar="ray|slurm", help="a cluster, else this machine")
]
ADDRESS = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="of a cluster of Ray, such as http://host:8265; else one on this machine, which is "
        "started if there is none",
    ),
]
SBATCH = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="NAME=VALUE", help="options of sbatch: partition=long"),
]
SUBMITTED = Annotated[
    str, typer.Argument(metavar="ID|RUN", help="what gift submit printed, or the folder of the run")
]


def sbatch_options(texts: list[str] | None) -> dict[str, str]:
    """Return the options of ``sbatch`` by name."""
    parts = [text.partition("=") for text in texts or ()]
    if wrong := [name for name, equals, _ in parts if not equals]:
        raise typer.BadParameter(f"{wrong[0]!r} is not NAME=VALUE", param_hint="--sbatch")
    return {name.lstrip("-").replace("-", "_"): value for name, _, value in parts}


def chosen_engine(
    on: str,
    sbatch: list[str] | None = None,
    address: str | None = None,
    network: str | None = None,
) -> Any:
    """Return the engine that the options name.

    Args:
        on: "ray" or "slurm".
        sbatch: options of ``sbatch``, for Slurm.
        address: address of a cluster, for Ray.
        network: see `NETWORK`.
    """
    from gift.many.submissions import engine_of

    if address is not None and on != "ray":
        raise typer.BadParameter("it is for --on ray", param_hint="--address")
    if sbatch and on != "slurm":
        raise typer.BadParameter("it is for --on slurm", param_hint="--sbatch")
    options: dict[str, str] = sbatch_options(sbatch)
    if address is not None:
        options["address"] = address
    return engine_of(on, options=options, network=network)


ALLOW_IMPORT = Annotated[
    bool,
    typer.Option(
        "--allow-import",
        help="run the code that makes the network of this run, import:..., which the run remembers",
    ),
]


def is_code(name: str | None) -> bool:
    """Whether the name of a network is that of a function to import."""
    return name is not None and name.startswith("import:")


def own_network(
    name: str | None, job: Any, folder: Path | None = None, allow_import: bool = False
) -> Any:
    """Load the network named on the command line, where code is allowed; None if none is named.

    Args:
        name: name of the network; None is that of the run in `folder`, if it is own code.
        job: job that it is for.
        folder: folder of a run.
        allow_import: whether code that the run remembers may be run.
    """
    from gift.jobs.networks import named_network, remembered_code

    if name is None and job.network is None and folder is not None:
        name = remembered_code(folder, allow_import)
    if name is None:
        return None
    return named_network(name, "default", job.data.task, job.training.seed or 0, allow_import=True)


def opened(folder: Path, network: str | None, allow_import: bool = False) -> Any:
    """Open the run in a folder."""
    from gift.jobs import Run

    run = Run(folder)
    run.base = own_network(network, run.job, run.folder, allow_import)
    return run


def listed(names: str | None) -> list[str] | None:
    """Return the names in a text, separated by commas; None for None."""
    return None if names is None else [name.strip() for name in names.split(",")]


def strategy_of(name: str, changes: list[str]) -> Any:
    """Return the strategy of that name or in that file, with changed arguments."""
    from gift.jobs.models import Strategy
    from gift.jobs.reading import changed, checked, read_yaml

    data: Any = {"name": name, "init_paras": {}}
    if name.endswith((".yaml", ".yml")):
        data, _ = read_yaml(Path(name))
    changed(data, [f"init_paras.{change}" for change in changes])
    return checked(Strategy, data, name).made()
