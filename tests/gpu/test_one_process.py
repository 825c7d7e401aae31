"""NCCL with one process: DDP, FSDP2 and tensor parallelism train as the plain network does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import gift
from tests.gpu.on_device import adapted


@pytest.fixture
def mesh(device: torch.device, tmp_path: Path) -> Iterator[Any]:
    backend = {"cuda": "nccl", "cpu": "gloo"}[device.type]
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "meeting"), 1),
                            rank=0, world_size=1)  # fmt: skip
    yield init_device_mesh(device.type, (1,))
    dist.destroy_process_group()


def blocks(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(device)


def train(net: nn.Module, device: torch.device) -> Tensor:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        output = net(batch)
        output.square().mean().backward()
        optimizer.step()
    return output.detach()


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "parallel"])
def test_training_is_that_of_the_plain_network(
    kind: str, device: torch.device, mesh: Any, tmp_path: Path
) -> None:
    if kind == "fsdp" and device.type == "cpu" and torch.__version__.startswith("2.6"):
        pytest.skip("FSDP2 of torch 2.6 trains no network on CPUs")
    base, other = blocks(device), blocks(device)
    if kind == "parallel":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(base, mesh, plan)
    torch.manual_seed(2)
    net = adapted(base)
    torch.manual_seed(2)
    plain = adapted(other)
    wrapped: nn.Module = net
    if kind == "ddp":
        wrapped = DistributedDataParallel(net)
    if kind == "fsdp":
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh)
    expected = train(plain, device)
    assert_close(train(wrapped, device), expected, rtol=1e-4, atol=1e-5)
    gift.save(net, tmp_path / "delta")
    fresh = blocks(device)
    gift.load(fresh, tmp_path / "delta")
    state = {name: value.cpu() for name, value in plain.state_dict().items()}
    found = {name: value.cpu() for name, value in fresh.state_dict().items()}
    assert_close(found, state, rtol=1e-4, atol=1e-5)
