"""LoRA against PEFT, on the same tensors: the same outputs, gradients and merged weights.

Only where PEFT is right: plain padding, no groups, no dilation, layers that are called.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import Check, ma_adapt, mc_name, mc_path
from tests.common import trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

RANK = 3
Factors = dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def factors(layer: Any) -> Factors:
    """The names of gift's factors: PEFT's parameter for each, and how gift's looks from it.

    A convolution of PEFT has A ``(r, i, kh, kw)`` and B ``(o, r, 1, 1)``; its embedding has A ``(r,
    entries)`` and B ``(dimension, r)``, where the rows of gift's matrix are the entries.
    """
    if isinstance(layer.get_base_layer(), nn.Embedding):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        return {"lora_B": (a, torch.t), "lora_A": (b, torch.t)}
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {name: (p, lambda t: t.flatten(1)) for name, p in (("lora_B", b), ("lora_A", a))}


class Pair:
    """A base, fine-tuned by gift and by PEFT, with the same random factors."""

    def __init__(
        self, base: nn.Module, check: Check, targets: str | list[str], transposed: bool = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.base, self.ours, other = base, copy.deepcopy(base), copy.deepcopy(base)
        action = ma_adapt("lora", rank=RANK, conv_layout="out_as_h", **settings)
        enable_fine_tuning(self.ours, FineTuningStrategy([(check, action)]))
        config = {"r": RANK, "lora_alpha": RANK, "target_modules": targets} | settings
        self.theirs = get_peft_model(other, LoraConfig(fan_in_fan_out=transposed, **config))
        model = self.theirs.base_model.model
        self.layers = {
            path: (self.ours.get_submodule(path), factors(layer))
            for path, layer in model.named_modules() if hasattr(layer, "get_base_layer")
        }  # fmt: skip
        names = {f"{path}.{name}" for path in self.layers for name in ("lora_B", "lora_A")}
        assert set(trainable(self.ours)) == names, "both adapt the same layers"
        with torch.no_grad():
            for layer, theirs in self.layers.values():
                for name, (parameter, change) in theirs.items():
                    getattr(layer, name).copy_(change(parameter.normal_(std=0.2)))

    def assert_equal(self, call: Callable[[nn.Module], Tensor]) -> None:
        outputs = []
        for net in (self.ours, self.theirs):
            torch.manual_seed(3)  # for dropout, which both draw in the order of the layers
            outputs.append(call(net))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        assert (outputs[0] - call(self.base)).abs().max() > 1e-6
        for path, (layer, theirs) in self.layers.items():
            for name, (parameter, change) in theirs.items():
                mine, other = getattr(layer, name).grad, change(parameter.grad)
                assert other.abs().max() > 0, f"{path}.{name} has no gradient to compare"
                torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)

    def assert_equal_merged(self) -> None:
        self.ours.eval()  # in training mode, whoever reads a weight sees its dropout
        merged = self.theirs.merge_and_unload()
        for path, (layer, _) in self.layers.items():
            torch.testing.assert_close(layer.weight, merged.get_submodule(path).weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 6), (4, 8)),
    "Linear, no bias": (lambda: nn.Linear(8, 6, bias=False), (2, 3, 8)),
    "Conv1D of transformers": (lambda: Conv1D(6, 8), (2, 3, 8)),
    "Conv1D of transformers, square": (lambda: Conv1D(8, 8), (2, 3, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "Conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "Conv2d, strided": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1)), (2, 4, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(10, 6), ()),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha is the rank": {},
    "alpha 7": {"lora_alpha": 7},
    "alpha 0.5": {"lora_alpha": 0.5},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, alpha 7": {"lora_alpha": 7, "use_rslora": True},
    "dropout": {"lora_dropout": 0.4},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    base = nn.Sequential(make())
    if isinstance(base[0], nn.Embedding) and "lora_dropout" in settings:
        settings = {}  # PEFT has none there
    if settings.get("use_rslora"):  # None means the rank in gift, 8 in PEFT
        settings = {"lora_alpha": RANK} | settings
    pair = Pair(base, mc_name("0"), ["0"], isinstance(base[0], Conv1D), **settings)
    x = torch.randn(shape) if shape else torch.tensor([[1, 2, 2], [9, 0, 1]])
    pair.assert_equal(lambda net: net(x))
    pair.assert_equal_merged()


BERT_TARGETS = {
    "attention": ["query", "value"],
    "every linear": ["query", "key", "value", "dense", "classifier"],
    "embeddings too": ["word_embeddings", "position_embeddings", "query", "dense"],
}


@pytest.mark.parametrize("targets", BERT_TARGETS.values(), ids=BERT_TARGETS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_bert(targets: list[str], dropout: float) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=5,
    )  # fmt: skip
    if dropout and "word_embeddings" in targets:
        targets = targets[2:]  # PEFT has no dropout on embeddings
    base = BertForSequenceClassification(config).double().train(dropout > 0)
    pair = Pair(base, mc_name(*targets), targets, lora_dropout=dropout, lora_alpha=5)
    batch = {
        "input_ids": torch.randint(0, 50, (3, 9)),
        "attention_mask": torch.arange(9) < torch.tensor([[9], [4], [6]]),
    }
    pair.assert_equal(lambda net: net.train(dropout > 0)(**batch).logits)
    if not dropout:
        pair.assert_equal_merged()


def test_a_gpt2() -> None:
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = GPT2Model(config).double().eval()
    check = mc_path(regex=r"h\.\d\.(attn|mlp)\.c_.*")
    pair = Pair(base, check, ["c_attn", "c_proj", "c_fc"], transposed=True, lora_alpha=6)
    tokens = torch.randint(0, 40, (2, 9))
    pair.assert_equal(lambda net: net(input_ids=tokens).last_hidden_state)
    pair.assert_equal_merged()
