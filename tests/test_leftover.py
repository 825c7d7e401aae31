"""Strategies for all layers take the experts of a mixture, and tell what else they leave out."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import resnet18

from gift import (
    FineTuningStrategy,
    GiftWarning,
    enable_fine_tuning,
    load_strategy_from_config,
    merge_strategies,
    plan_fine_tuning,
)
from gift import factories as f
from gift.core.raw_parameters import is_experts, raw_weights
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
from tests.common import assert_same_training, enabled

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=3)),
    "qwen3": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=3, moe_intermediate_size=16, decoder_sparse_step=1, head_dim=8)),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**GROUPED, num_local_experts=3, head_dim=8)),
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **GROUPED, num_local_experts=3, intermediate_size_mlp=48, head_dim=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, DoRAAllFineTuningStrategy])
def test_experts_are_taken(strategy: Any, name: str) -> None:
    net = MIXTURES[name]()
    report = enable_fine_tuning(net, strategy(rank=2))
    experts = {c.name.rpartition(".")[2] for c in report.claims if ".experts." in c.name}
    assert experts == {"gate_up_proj", "down_proj"}
    for part, module in net.named_modules():
        if part.endswith(".experts"):
            assert module.down_proj_lora_A.shape[:2] == (3, 2), "factors for each expert"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.up_bias = nn.Parameter(torch.randn(3, 6))
        self.pos_embed = nn.Parameter(torch.randn(3, 4, 6))
        self.cls_token = nn.Parameter(torch.randn(1, 4, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bi,eoi->eo", x, self.up) + self.up_bias
        return self.last(x[:, None] + self.pos_embed + self.cls_token)


def test_experts_train_and_tables_stay_out() -> None:
    base = Experts().double()
    net = enabled(copy.deepcopy(base), LoRAAllFineTuningStrategy(rank=2))
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "up_lora_B", "up_lora_A", "last.lora_B", "last.lora_A"]  # fmt: skip
    assert_same_training(net, base, lambda m: m(torch.ones(2, 5).double()))


def test_networks_without_experts_are_as_they_were() -> None:
    report = plan_fine_tuning(resnet18(), LoRAAllFineTuningStrategy())
    assert report.trainable_after == 75_063
    assert report.unmatched == []
    assert "experts" not in str(report)
    vit = transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "vocab_size": 1}))
    report = plan_fine_tuning(vit, LoRAAllFineTuningStrategy(rank=2))
    assert {claim.class_name for claim in report.claims} <= {"Linear", "Conv2d"}
    assert report.leftover == ""


def test_a_file_from_before_there_were_experts_leaves_them_out() -> None:
    now = LoRAAllFineTuningStrategy(rank=2).to_config()
    assert now["init_paras"]["experts"] is True
    old = copy.deepcopy(now)
    del old["init_paras"]["experts"]
    by_hand = {"name": "LoRAAllFineTuningStrategy", "init_paras": {"rank": 2}}
    adapted = []
    for config in (now, old, by_hand):
        report = plan_fine_tuning(MIXTURES["mixtral"](), load_strategy_from_config(config))
        adapted.append(any(".experts." in claim.name for claim in report.claims))
    assert adapted == [True, False, True]


def warnings_of(net: nn.Module, strategy: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enable_fine_tuning(net, strategy)
    texts = [str(w.message) for w in caught if issubclass(w.category, GiftWarning)]
    return [text for text in texts if "raw parameters" in text]


def cap_in(text: str) -> Any:
    """The cap that a message has, as somebody would copy it."""
    (code,) = re.findall(r"\(pc_path\(.*?\)\)", text)
    return eval(code, vars(f))


def test_what_is_left_out_is_reported_with_the_cap_that_takes_it() -> None:
    make, strategy = MIXTURES["mixtral"], LoRAAllFineTuningStrategy(rank=2, experts=False)
    (text,) = warnings_of(make(), strategy)
    net = make()
    raw = sum(p.numel() for n, p in net.named_parameters() if ".mlp." in n)
    share = raw / sum(p.numel() for p in net.parameters())
    assert f"{share:.0%} of the base" in text
    assert "experts.down_proj" in text
    assert warnings_of(net, merge_strategies([strategy], para_caps=[cap_in(text)])) == []
    assert net.model.layers[0].mlp.experts.down_proj_lora_A.shape == (3, 2, 48)
    assert warnings_of(make(), LoRALinearFineTuningStrategy(rank=2)) == [], (
        "who asks for some layers"
    )


def test_a_report_names_what_stays_frozen_as_no_cap_took_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), *(nn.LayerNorm(4) for _ in range(4)))
    report = enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    assert (
        "frozen, as no cap matched them: 8 parameters (1.weight, 1.bias, 2.weight, 2.bias, "
        "3.weight, 3.bias, ...)" in str(report)
    )
    few = enable_fine_tuning(nn.Sequential(nn.Linear(4, 4)), LoRAAllFineTuningStrategy(rank=1))
    assert "as no cap matched" not in str(few)


def test_spectral_weights_are_reported_and_adapted() -> None:
    models = pytest.importorskip("neuralop.models")

    def make() -> Any:
        return models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8,
                          n_layers=2)  # fmt: skip

    (text,) = warnings_of(make(), LoRAAllFineTuningStrategy(rank=1))
    assert "convs.0.weight.tensor" in text
    base = make()
    net = copy.deepcopy(base)
    strategy = merge_strategies([LoRAAllFineTuningStrategy(rank=1)], para_caps=[cap_in(text)])
    assert warnings_of(net, strategy) == []
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(net(x), base(x))
    net(x).square().sum().backward()
    spectral = {n: p for n, p in net.named_parameters() if "tensor_lora_B" in n}
    assert len(spectral) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in spectral.values())


class Linear(nn.Module):
    """A library's own, as PyTorch Geometric has one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_class_that_is_only_named_like_a_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"test_leftover\.Linear is not torch's nn\.Linear") as no:
        enable_fine_tuning(nn.Sequential(Linear(), nn.ReLU()), LoRAAllFineTuningStrategy(rank=2))
    lone = nn.Sequential(Linear(), nn.ReLU())
    enable_fine_tuning(lone, FineTuningStrategy(para_caps=[cap_in(str(no.value))]))
    assert lone[0].lora_A.shape == (2, 8)
    net = nn.Sequential(Linear(), nn.Linear(8, 8))
    strategy = LoRAAllFineTuningStrategy(rank=2)
    (text,) = warnings_of(net, strategy)
    assert "test_leftover.Linear is not torch's nn.Linear" in text
    twin = nn.Sequential(Linear(), nn.Linear(8, 8))
    assert warnings_of(twin, merge_strategies([strategy], para_caps=[cap_in(text)])) == []
    assert twin[0].lora_A.shape == (2, 8)


def test_numbers_that_are_no_weight_are_left_out() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.arange(12).view(3, 4), requires_grad=False)
            self.matrix = nn.Parameter(torch.randn(3, 4))

    assert [name for name, _ in raw_weights(Table())] == ["matrix"]


class Stacked(nn.Module):
    """A parameter of three axes under neutral names."""

    def __init__(self, **numbers: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 8, 6))
        vars(self).update(numbers)


NUMBERS = [({"num_experts": 4}, True), ({"num_experts": 8}, False), ({"heads": 4}, False)]


@pytest.mark.parametrize(("numbers", "expected"), NUMBERS, ids=str)
def test_the_number_of_experts_says_that_a_parameter_stacks_them(
    numbers: dict[str, int], expected: bool
) -> None:
    net = Stacked(**numbers)
    assert is_experts(net, "kernel", net.kernel) is expected
