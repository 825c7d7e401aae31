"""``gift suggest``."""

from typing import Annotated

import typer

from gift.cli.options import ARCHITECTURE, SET, TASK, strategy_of
from gift.cli.plain import say


def suggest(
    network: ARCHITECTURE,
    strategy: Annotated[
        str, typer.Argument(metavar="[STRATEGY]", help="a strategy, or a YAML file of one")
    ] = "LoRAAllFineTuningStrategy",
    budget: Annotated[
        str,
        typer.Option(help="trained parameters (100k), a share of them (1%), or megabytes (2MB)"),
    ] = "1%",
    changes: SET = None,
    task: TASK = None,
    everything: Annotated[bool, typer.Option("--all", help="list every layer")] = False,
) -> None:
    """Suggest the largest rank of each layer of a network that a budget allows."""
    from gift.budget import suggest as suggested
    from gift.jobs.networks import named_network

    made = strategy_of(strategy, changes or [])
    net = named_network(network, None, task, allow_import=True).net
    found = suggested(net, int(budget) if budget.isdecimal() else budget, made)
    head = f"{found.parameters:,} trained parameters, {found.megabytes:.3f} MB"
    say(f"{head}\n{found.details()}" if everything else str(found))
