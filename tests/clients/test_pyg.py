"""PyTorch Geometric: graph networks, whose layers are a `Linear` of its own and raw parameters."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.factories import pa_adapt, pc_path
from gift.strategies import LoRAAllFineTuningStrategy
from tests.clients._properties import Client

pyg = pytest.importorskip("torch_geometric")
from torch_geometric.data import Data  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import (  # noqa: E402
    GAT,
    GCN,
    GIN,
    GraphSAGE,
    global_mean_pool,
    to_hetero,
)

NODES = 24
EDGES = torch.stack([torch.arange(NODES).repeat(2), (torch.arange(2 * NODES) * 7 + 1) % NODES])
X = torch.randn(NODES, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(NODES) % 4


def network(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(8, 16, 2, 4)


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(X, EDGES)


def train(net: nn.Module, steps: int = 12) -> list[float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(X, EDGES), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


WEIGHTS = FineTuningStrategy(para_caps=[(pc_path(glob="*.weight"), pa_adapt("lora", rank=2))])
"""The layers are a `Linear` of PyG's own, which gift reaches by their parameters."""


@pytest.mark.parametrize("kind", [GCN, GAT, GraphSAGE, GIN])
def test_training_and_saving(kind: Any, tmp_path: Path) -> None:
    net = network(kind)
    client = Client(net, lambda: output(net))
    client.enable(WEIGHTS)
    losses = train(net)

    def reload() -> Tensor:
        torch.save(net.state_dict(), tmp_path / "deltas.pt")
        fresh = network(kind)
        enable_fine_tuning(fresh, WEIGHTS)
        fresh.load_state_dict(torch.load(tmp_path / "deltas.pt"))
        return output(fresh)

    client.check(losses, reload, exact=True)


@pytest.mark.parametrize("kind", [GCN, GAT, GraphSAGE, GIN])
def test_a_strategy_for_all_layers_says_whose_linear_it_is(kind: Any) -> None:
    """And the cap that it names takes all of their weights."""
    net = network(kind)
    with pytest.raises(ValueError, match=r"own class torch_geometric\S+Linear is not") as refused:
        enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    named = re.search(r"pc_path\(glob=\[(.*?)\]\)", str(refused.value))
    assert named is not None
    globs = [glob.strip("'") for glob in named[1].split(", ")]
    cap = (pc_path(glob=globs), pa_adapt("lora", rank=2))
    report = enable_fine_tuning(net, FineTuningStrategy(para_caps=[cap]))
    weights = {name for name, _ in net.named_parameters() if name.endswith(".weight")}
    assert {claim.name for claim in report.claims} == weights


class OfGraphs(nn.Module):
    """One label for each graph of a batch, whose sizes its layers learn from the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = GCN(-1, 16, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, data: Any) -> Tensor:
        found = self.nodes(data.x, data.edge_index)
        return self.head(global_mean_pool(found, data.batch))


def test_batches_of_graphs_and_lazy_layers() -> None:
    graphs = [Data(X[: 8 + i], EDGES[:, (8 + i > EDGES).all(0)], y=i % 2) for i in range(12)]
    loader = DataLoader(graphs, batch_size=12)
    (batch,) = loader
    lazy, known = OfGraphs(), OfGraphs()
    torch.manual_seed(0)
    known(batch)
    client = Client(known, lambda: known.eval()(batch))
    client.enable(WEIGHTS)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)  # the head is small
        enable_fine_tuning(lazy, WEIGHTS)  # before any sizes are known
    lazy(batch)
    for net in (lazy, known):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch), batch.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    assert [n for n, p in lazy.named_parameters() if p.requires_grad] == client.deltas

    def reload() -> Tensor:
        fresh = OfGraphs()
        fresh(batch)
        fresh.load_state_dict({n: p for n, p in known.named_parameters() if n not in client.deltas})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)
            enable_fine_tuning(fresh, WEIGHTS)
        fresh.load_state_dict(known.state_dict())
        with torch.no_grad():  # small layers with gradients are computed in another order
            return fresh.eval()(batch)

    client.check(losses, reload, exact=True)


def test_graphs_of_several_kinds() -> None:
    """`to_hetero` makes a graph module with a copy of each layer for each kind of edge."""
    kinds = [("a", "to", "b"), ("b", "to", "a")]
    torch.manual_seed(0)
    net = to_hetero(network(GraphSAGE), (["a", "b"], kinds))
    nodes = {"a": X, "b": X[:10]}
    edges = dict.fromkeys(kinds, torch.arange(10).repeat(2, 1))
    client = Client(net, lambda: torch.cat([*net(nodes, edges).values()]))
    client.enable(WEIGHTS)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(nodes, edges)["a"], Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # What only "b" of the last layer needs has no part in the loss.
    client.check(losses, None, still=["convs.1.a__to__b.*"])
