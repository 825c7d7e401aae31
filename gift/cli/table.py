"""``gift table``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gift.cli.options import SET
from gift.cli.plain import say


def table(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="torchvision:resnet18, timm:..., transformers:..., import:package.module:function",
        ),
    ],
    strategy: Annotated[
        str | None,
        typer.Argument(
            metavar="[STRATEGY]",
            help="a strategy, or a YAML file of one; none compares all methods",
        ),
    ] = None,
    changes: SET = None,
    task: Annotated[str | None, typer.Option(help="classification, language or detection")] = None,
) -> None:
    """Show what a strategy would train in a network, or what each method would cost."""
    from gift.jobs import JobError
    from gift.jobs.networks import named_network
    from gift.utils import info

    if strategy is None and changes:
        raise JobError("--set changes a strategy", ["name one"])
    made = None if strategy is None else strategy_of(strategy, changes or [])
    net = named_network(network, None, task, allow_import=True).net
    if made is None:
        say(info.table_methods(net))
        return
    from gift.engine.enable import enable_fine_tuning

    enable_fine_tuning(net, made)
    if sys.stdout.isatty():  # tables are for files and pipes as well
        say(f"{info.tree(net)}\n")
    say(f"{info.table_info(info.collect_trainable_parameters(net)[0])}\n\n{info.summary(net)}")


def strategy_of(name: str, changes: list[str]) -> Any:
    """Return the strategy of that name or in that file, with changed arguments."""
    from gift.jobs.models import Strategy
    from gift.jobs.reading import changed, checked, read_yaml

    data: Any = {"name": name, "init_paras": {}}
    if name.endswith((".yaml", ".yml")):
        data, _ = read_yaml(Path(name))
    changed(data, [f"init_paras.{change}" for change in changes])
    return checked(Strategy, data, name).made()
