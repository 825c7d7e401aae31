"""LoRAs that are extracted from networks which were fine-tuned whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

import gift
from gift.quantization import dequantised
from tests.common import all_bits


class Small(nn.Module):
    """A tied embedding, a convolution, norms with and without statistics, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.down = nn.Linear(32, 24)
        self.still = nn.Linear(24, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.still(self.down(self.norm(self.conv(self.embed(tokens).mT)).mT)))


TOKENS = torch.arange(40).reshape(4, 10)


def pair() -> tuple[Small, Small]:
    torch.manual_seed(0)
    base = Small()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "still" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned(TOKENS)  # moves the statistics
    return base.eval(), tuned.eval()


def test_a_full_rank_gives_the_tuned_network(tmp_path: Path) -> None:
    base, tuned = pair()
    plain = copy.deepcopy(base)
    bits = all_bits(base)
    gift.extract(base, tuned, rank=100)
    torch.testing.assert_close(base(TOKENS), tuned(TOKENS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(base.norm.running_mean, tuned.norm.running_mean)
    assert base.head.weight is not None
    assert torch.equal(base.head.weight, base.embed.weight)
    assert not hasattr(base.still, "lora_A")
    gift.save(base, tmp_path / "delta.safetensors")
    gift.load(plain, tmp_path / "delta.safetensors")
    assert torch.equal(plain(TOKENS), base(TOKENS))
    gift.disable_fine_tuning(base)
    assert all_bits(base) == bits


def test_values_alone_may_differ() -> None:
    base, tuned = pair()
    tuned.load_state_dict(base.state_dict() | {"down.bias": base.down.bias + 1})
    gift.extract(base, tuned, rank=2)
    assert torch.equal(base(TOKENS), tuned(TOKENS))
    assert [name for name, _ in base.named_parameters() if "lora" in name] == []


@pytest.mark.parametrize("rank", [1, 4])
def test_each_weight_gets_its_best_approximation(rank: int) -> None:
    base, tuned = pair()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    report = gift.extract(base, tuned.state_dict(), rank=rank)
    assert report.ranks == dict.fromkeys(("embed.weight", "conv.weight", "down.weight"), rank)
    for name, after in (("embed.weight", base.embed.weight), ("down.weight", base.down.weight)):
        change = (tuned.get_parameter(name) - before[name]).double()
        sigma = torch.linalg.svdvals(change)  # Eckart and Young
        error = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt()
        assert report.errors[name] == pytest.approx(error.item(), rel=1e-4)
        left = tuned.get_parameter(name).double() - after.double()
        assert float(left.norm() / change.norm()) == pytest.approx(error.item(), rel=1e-4)
    # A convolution as LoRA reads it: rows are outputs and kernel rows, columns inputs and kernel
    # columns. In one dimension these are the outputs, and inputs times the kernel.
    change = (tuned.conv.weight - before["conv.weight"]).double().reshape(32, -1)
    sigma = torch.linalg.svdvals(change)
    error = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt()
    assert report.errors["conv.weight"] == pytest.approx(error.item(), rel=1e-4)
    assert torch.equal(base.down.bias, tuned.down.bias)
    assert "conv.weight" in str(report)


def test_the_rank_for_an_error() -> None:
    base, tuned = pair()
    before = base.down.weight.detach().double()
    report = gift.extract(base, tuned, error=0.5)
    sigma = torch.linalg.svdvals(tuned.down.weight.detach().double() - before)
    lost = [float(sigma[r:].norm() / sigma.norm()) for r in range(len(sigma))]
    assert report.ranks["down.weight"] == next(r for r, one in enumerate(lost) if one <= 0.5)
    assert max(report.errors.values()) <= 0.5 + 1e-6


def test_a_low_rank_change_is_found_whole_also_by_the_randomised_method() -> None:
    for iterations in (None, 4):
        base = nn.Linear(48, 32)
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.weight += torch.randn(32, 2) @ torch.randn(2, 48)
        report = gift.extract(base, tuned, rank=8, iterations=iterations)
        assert report.ranks == {"weight": 2}
        assert report.error < 1e-5
        torch.testing.assert_close(base.weight, tuned.weight, rtol=1e-4, atol=1e-4)


def test_sixteen_bits() -> None:
    base = nn.Linear(48, 32).bfloat16()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight += torch.randn(32, 1).bfloat16() @ torch.randn(1, 48).bfloat16()
    gift.extract(base, tuned, rank=10)
    assert (base.weight - tuned.weight).abs().max() <= 2**-6  # rounding of values up to 4
    assert base.lora_A.dtype == torch.float32


def test_a_quantised_base_and_the_original_give_the_start_of_loftq() -> None:
    """As PEFT decomposes what quantisation loses."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    original = nn.Linear(64, 32, bias=False)
    base = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    base.load_state_dict(original.state_dict())
    base = base.to("cpu")
    lossy = dequantised(base.weight, base).float()
    assert not torch.equal(lossy, original.weight)
    gift.extract(base, original, rank=4)
    theirs = _low_rank_decomposition((original.weight - lossy).detach(), 4)
    torch.testing.assert_close(base.lora_B @ base.lora_A, theirs["L"] @ theirs["R"])


def test_refusals_leave_the_base_as_it_was() -> None:
    base, tuned = pair()
    bits = all_bits(base)
    state = tuned.state_dict()
    with torch.no_grad():
        state["down.bias"] = state["down.bias"] * float("nan")
    state["conv.weight"] = torch.zeros(2, 2)
    del state["norm.weight"]
    state["more"] = torch.zeros(1)
    with pytest.raises(gift.AdaptationError) as caught:
        gift.extract(base, state, rank=2)
    text = str(caught.value)
    for part in ("more", "lacks norm.weight", "conv.weight is (2, 2)", "down.bias has numbers"):
        assert part in text
    with pytest.raises(gift.AdaptationError, match="equal"):
        gift.extract(base, base, rank=2)
    for wrong in ({}, {"rank": 0}, {"error": 1.5}, {"rank": 1, "error": 0.1}):
        with pytest.raises(ValueError, match=r"rank|error"):
            gift.extract(base, tuned, **wrong)
    assert all_bits(base) == bits
    gift.extract(base, tuned, rank=2)
    with pytest.raises(RuntimeError, match="plain base"):
        gift.extract(base, tuned, rank=2)
