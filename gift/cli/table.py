"""``gift table``."""

import sys
from typing import Annotated

import typer

from gift.cli.options import ARCHITECTURE, SET, TASK, strategy_of
from gift.cli.plain import say


def table(
    network: ARCHITECTURE,
    strategy: Annotated[
        str | None,
        typer.Argument(
            metavar="[STRATEGY]",
            help="a strategy, or a YAML file of one; none compares all methods",
        ),
    ] = None,
    changes: SET = None,
    task: TASK = None,
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
