"""``gift suggest``."""

from typing import Annotated

import typer

from gift.cli.options import SET
from gift.cli.plain import say
from gift.cli.table import strategy_of


def suggest(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="torchvision:resnet18, timm:..., transformers:..., import:package.module:function",
        ),
    ],
    strategy: Annotated[
        str, typer.Argument(metavar="[STRATEGY]", help="a strategy, or a YAML file of one")
    ] = "LoRAAllFineTuningStrategy",
    budget: Annotated[
        str,
        typer.Option(help="trained parameters (100k), a share of them (1%), or megabytes (2MB)"),
    ] = "1%",
    changes: SET = None,
    task: Annotated[str | None, typer.Option(help="classification, language or detection")] = None,
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
