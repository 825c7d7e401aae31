"""Train several deltas on one base, switch between them, add them, and mix them in one batch.

    python many_deltas.py --tasks 3 --steps 200

The base learns nothing: each task is a rotation of its inputs that a delta of its own learns.
"""

import argparse

import torch
from torch import nn

from gift import DeltaBank
from gift.strategies import LoRALinearFineTuningStrategy


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, args) -> float:
    """Train the active delta, and return its loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    for _ in range(args.steps):
        loss = nn.functional.mse_loss(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Run the example."""
    args = parse_args()
    torch.manual_seed(args.seed)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    inputs = torch.randn(256, 32)
    names = [f"task {number}" for number in range(args.tasks)]
    targets = {name: inputs @ torch.linalg.qr(torch.randn(32, 32))[0] for name in names}

    bank = DeltaBank(net)
    for name in names:
        bank.add(name, strategy=LoRALinearFineTuningStrategy(rank=args.rank))
        bank.activate(name)
        before = nn.functional.mse_loss(net(inputs), targets[name]).item()
        after = train(net, inputs, targets[name], args)
        print(f"{name}: loss {before:.3f} -> {after:.3f}")

    with torch.no_grad():
        for name in names:  # switching costs the copy of a delta
            bank.activate(name)
            print(f"{name} again: loss {nn.functional.mse_loss(net(inputs), targets[name]):.3f}")

        bank.activate(None)
        rows = [names[number % len(names)] for number in range(len(inputs))]
        expected = torch.stack([targets[name][row] for row, name in enumerate(rows)])
        with bank.rows(rows):  # each row of one batch by its own delta
            print(f"all in one batch: loss {nn.functional.mse_loss(net(inputs), expected):.3f}")

    print(bank.combine({name: 1 / len(names) for name in names}, name="mean"))


if __name__ == "__main__":
    main()
