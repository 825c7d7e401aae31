"""`DeltaBank.rows`: each row of a batch is what it is with its own delta alone, or a refusal."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)
from transformers.pytorch_utils import Conv1D

import gift
from gift import DeltaBank, FineTuningStrategy, GiftWarning
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_layer, mc_path
from gift.strategies import (
    STRATEGIES,
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    DoRAAllFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    NormFineTuningStrategy,
)
from tests.cases.selection import cells
from tests.common import full_state
from tests.test_bank import unnumbered

LOW_RANK = ("LoRA", "RsLoRA", "PiSSA", "OLoRA", "LoRAFA", "VeRA", "LoHa")
ROWS = ["a", "b", None, "a"]


def lora(rank: int = 3) -> FineTuningStrategy:
    return LoRAAllFineTuningStrategy(rank=rank, clip_rank=True)


def lora_on(check: Any, rank: int = 2) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_layer() & check, ma_adapt("lora", rank=rank))])


def filled(bank: DeltaBank, name: str, strategy: FineTuningStrategy, std: float = 0.3) -> None:
    """Add a delta as after some training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        bank.add(name, strategy=strategy)
    before = bank.active
    bank.activate(name)
    with torch.no_grad():
        for parameter in bank.net.parameters():
            parameter += std * torch.randn_like(parameter)
    bank.activate(before)


def bank_of(net: nn.Module, **strategies: FineTuningStrategy) -> DeltaBank:
    bank = DeltaBank(net.eval())
    for name, strategy in (strategies or {"a": lora(), "b": lora(2)}).items():
        filled(bank, name, strategy)
    return bank


def alone(bank: DeltaBank, name: str | None, call: Callable[[Any], Any]) -> Any:
    """What `call` gives while that delta is active."""
    before = bank.active
    bank.activate(name)
    try:
        return call(bank.net)
    finally:
        bank.activate(before)


def check(
    bank: DeltaBank,
    call: Callable[[Any], Tensor],
    rows: list[str | None] = ROWS,
    dim: int = 0,
    tolerance: float = 1e-12,
    layers_dim: int | None = None,
) -> None:
    """Row by row, what `call` gives is what it gives with that delta; no two deltas agree."""
    with torch.no_grad():
        each = {name: alone(bank, name, call) for name in {*rows}}
        with bank.rows(rows, dim=dim if layers_dim is None else layers_dim) as net:
            output = call(net)
    for row, name in enumerate(rows):
        torch.testing.assert_close(
            output.select(dim, row), each[name].select(dim, row), rtol=tolerance, atol=tolerance
        )
    outputs = list(each.values())
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, rtol=1e-2) for other in outputs[i + 1 :])


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "linear_3d": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(4, 4, 9)),
    "conv2d_grouped": (
        lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), lambda: torch.randn(4, 4, 8, 8)
    ),
    "conv2d_circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(4, 4, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 2, 3)), lambda: torch.randn(4, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=0), lambda: tokens(4, 5)),
    "embedding_of_one_id_each": (lambda: nn.Embedding(11, 6), lambda: tokens(4)),
    "conv1d_of_transformers": (lambda: Conv1D(5, 6), lambda: torch.randn(4, 3, 6)),
    "conv1d_of_transformers_2d": (lambda: Conv1D(6, 6), lambda: torch.randn(4, 6)),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), lambda: torch.randn(4, 6)
    ),
}  # fmt: skip


@cells(layer=LAYERS, method=LOW_RANK)
def test_every_low_rank_method_on_every_layer(
    layer: tuple[Callable[[], nn.Module], Callable[[], Tensor]], method: str
) -> None:
    make, inputs = layer
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    strategy = STRATEGIES[f"{method}AllFineTuningStrategy"]
    bank = bank_of(
        nn.Sequential(make()).double(),
        a=strategy(rank=2, clip_rank=True),
        b=strategy(rank=1),
    )
    check(bank, lambda net: net(x))


@pytest.mark.parametrize("rows", [["a"] * 4, [None] * 4, ["b", "a", "b", "a"]], ids=str)
@pytest.mark.parametrize("active", [None, "a", "b"])
def test_which_rows_and_what_is_active_do_not_matter(
    rows: list[str | None], active: str | None
) -> None:
    bank, x = bank_of(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()), None
    x = torch.randn(4, 6).double()
    bank.activate(active)
    check(bank, lambda net: net(x), rows)
    assert bank.active == active


def test_one_row_and_repeated_rows() -> None:
    """A batch of one is a batch; what beam search makes of rows is known, other sizes are not."""
    bank = bank_of(nn.Sequential(nn.Linear(6, 3)).double())
    x = torch.randn(4, 6).double()
    check(bank, lambda net: net(x[:1]), ["a"])
    with bank.rows(ROWS) as net:
        with pytest.raises(ValueError, match="batch of 8, expected 4"):
            net(torch.cat([x, x]))
        output = net(x.repeat_interleave(2, 0))
    for place, name in enumerate(name for name in ROWS for _ in range(2)):
        expected = alone(bank, name, lambda net: net(x))[place // 2]
        torch.testing.assert_close(output[place], expected, rtol=1e-12, atol=1e-12)


def test_keyword_arguments_and_what_others_hooked_on() -> None:
    """A hook of the user's sees what the layer with its delta gives, and may change it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    net = Net().double()
    net.fc.register_forward_hook(lambda module, args, output: 3 * output)
    net.fc.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"input": kwargs["input"] + 1}), with_kwargs=True
    )
    x = torch.randn(4, 6).double()
    check(bank_of(net), lambda net: net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    bank = bank_of(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype))
    x = torch.randn(4, 6, dtype=dtype)
    check(bank, lambda net: net(x), tolerance={torch.float32: 1e-5}.get(dtype, 3e-2))


def test_autocast() -> None:
    bank, x = bank_of(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))), torch.randn(4, 6)

    def call(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        assert output.dtype == torch.bfloat16
        return output.float()

    check(bank, call, tolerance=3e-2)


# --- whole networks ------------------------------------------------------------------------------


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=32,
    )  # fmt: skip
    return BertForMaskedLM(config)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize("length", [4, 7, 8])
def test_language_models_with_tied_heads(
    make: Callable[[], nn.Module], length: int, double: None
) -> None:
    """Positions are the same for all rows, also where there are as many as rows."""
    bank = bank_of(make().double())
    x = torch.randint(0, 50, (4, length))
    mask = torch.ones_like(x)
    mask[1, -1] = 0
    check(bank, lambda net: net(x).logits)
    check(bank, lambda net: net(attention_mask=mask, input_ids=x).logits)
    if make is not bert:  # positions first, as in `generate` of transformers 4
        positions = torch.arange(length)[None]
        check(bank, lambda net: net(position_ids=positions, input_ids=x).logits)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": True},
        {"use_cache": False},
        {"num_beams": 2},
        {"num_beams": 4},  # as many as there are rows
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_generation(make: Callable[[], Any], options: dict[str, Any], double: None) -> None:
    """Whatever is generated for a row is what its delta alone would generate."""
    if not hasattr(GenerationConfig(), "disable_compile"):  # which 4.48 does not do
        options = {name: value for name, value in options.items() if name != "disable_compile"}
    bank = bank_of(make().double())
    for length in (3, 4):  # one of them is the number of rows
        x = torch.randint(1, 48, (4, length))
        mask = torch.ones_like(x)
        mask[2, 0] = 0

        def call(net: Any, x: Tensor = x, mask: Tensor = mask) -> Tensor:
            return net.generate(
                x, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6,
                **options,
            )  # fmt: skip

        each = {name: alone(bank, name, call) for name in ("a", "b", None)}
        with bank.rows(ROWS) as net:
            output = call(net)
        assert [row.tolist() for row in output] == [
            each[name][i].tolist() for i, name in enumerate(ROWS)
        ]
        assert len({str(value.tolist()) for value in each.values()}) == 3


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2,
        num_classes=5,
    )  # fmt: skip


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 2),
        num_heads=(2, 2), num_classes=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "size"), [(vit, 16), (swin, 32), (resnet18, 32)], ids=["vit", "swin", "resnet"]
)
def test_networks_that_see(make: Callable[[], nn.Module], size: int) -> None:
    """Patches, windows and channels are no rows."""
    bank, x = bank_of(make().double(), a=lora(2), b=lora(1)), torch.randn(4, 3, size, size).double()
    check(bank, lambda net: net(x), tolerance=1e-9)


CALLED = mc_path(glob="*.linear?")  # the attention itself reads the others


def transformer(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_of_the_transformer_encoder_is_not_taken(
    batch_first: bool, padded: bool
) -> None:
    bank = bank_of(transformer(batch_first).double(), a=lora_on(CALLED), b=lora_on(CALLED, 3))
    dim = 0 if batch_first else 1
    x = torch.randn(4, 5, 8).double()
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    x = x if batch_first else x.transpose(0, 1)

    def call(net: nn.Module) -> Tensor:
        output = net(x, src_key_padding_mask=mask if padded else None)
        keep = (~mask if batch_first else ~mask.T)[..., None]
        short = keep[:, : output.shape[1]] if batch_first else keep[: output.shape[0]]
        return output * short

    check(bank, call, dim=dim)


# --- what is silently wrong elsewhere ------------------------------------------------------------


class Positions(nn.Module):
    """Tokens and positions, made in one of the ways in which that is done."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.token = nn.Embedding(11, 6)
        self.position = nn.Embedding(16, 6)
        self.register_buffer("ids", torch.arange(16)[None])

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        n, length = x.shape
        ways: dict[str, Callable[[], Any]] = {
            "flat": lambda: torch.arange(length),
            "one_row": lambda: torch.arange(length)[None],
            "buffer": lambda: self.ids[:, :length],
            "for_each_row": lambda: torch.arange(length).expand(n, length),
            "repeated": lambda: torch.zeros(n, length, dtype=torch.long),
            "from_tokens": lambda: (x != 0).cumsum(1),
            "given": lambda: positions,
            "pairs": lambda: (torch.arange(length)[:, None] - torch.arange(length)).abs(),
            "counted": lambda: x.new_ones(length).cumsum(0),
            "typed": lambda: torch.arange(length).type_as(x),
            "all_zero": lambda: torch.zeros(length, dtype=torch.long),
        }
        found = self.position(ways[self.way]())
        return self.token(x) + (found.sum(0) if self.way == "pairs" else found)


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("way", ["one_row", "buffer", "for_each_row", "repeated", "from_tokens"])
def test_positions_for_each_row_are_right(way: str, length: int) -> None:
    bank, x = bank_of(Positions(way).double()), tokens(4, length)
    check(bank, lambda net: net(x))


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("way", ["flat", "given", "pairs", "all_zero", "counted", "typed"])
def test_positions_that_look_like_rows_are_refused(way: str, length: int) -> None:
    """Their number is a multiple of that of rows, so shapes alone would not tell."""
    bank, x = bank_of(Positions(way).double()), tokens(4, length)
    with (
        pytest.raises(ValueError, match=r"position.weight gets .* not the batch"),
        bank.rows(ROWS) as net,
    ):
        net(x, torch.arange(length))
    with bank.rows(["a"] * 4) as net:  # where rows do not differ, nothing can be mistaken
        output = net(x, torch.arange(length))
    expected = alone(bank, "a", lambda net: net(x, torch.arange(length)))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


class Steps(nn.Module):
    """Features at times that all rows share, as many times as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.layer(x + times[:, None])


def test_a_vector_as_long_as_the_second_axis_is_the_same_for_all_rows() -> None:
    x, times = torch.randn(4, 4, 6, dtype=torch.double), torch.randn(4, dtype=torch.double)
    check(bank_of(Steps().double()), lambda net: net(x, times))


def t5() -> Any:
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("length", [3, 4, 8])
def test_relative_positions_of_t5_are_refused_and_the_rest_is_right(length: int) -> None:
    x, y = torch.randint(1, 50, (4, length)), torch.randint(1, 50, (4, length))
    bank = bank_of(t5().double())
    with (
        pytest.raises(ValueError, match=r"relative_attention_bias.weight gets"),
        bank.rows(ROWS) as net,
    ):
        net(input_ids=x, decoder_input_ids=y)
    with (
        pytest.raises(ValueError, match=r"relative_attention_bias.weight gets"),
        bank.rows(ROWS) as net,
    ):
        net.generate(x, max_new_tokens=2)
    rest = ~mc_path(glob="*relative_attention_bias")
    bank = bank_of(t5().double(), a=lora_on(rest), b=lora_on(rest, 3))
    check(bank, lambda net: net(input_ids=x, decoder_input_ids=y).logits)

    def call(net: Any) -> Tensor:
        return net.generate(x, num_beams=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    each = {name: alone(bank, name, call) for name in ("a", "b", None)}
    with bank.rows(ROWS) as net:  # the encoder gets rows, the decoder beams
        output = call(net)
    assert output.tolist() == [each[name][i].tolist() for i, name in enumerate(ROWS)]


class Turned(nn.Module):
    """The batch is the second axis inside, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.first(x).permute(1, 0, 2))) + 1
        return self.last(x.transpose(0, 1))


@pytest.mark.parametrize("length", [4, 8])
def test_a_batch_whose_axis_was_moved_is_found(length: int) -> None:
    x = torch.randn(4, length, 6).double()
    check(bank_of(Turned().double()), lambda net: net(x))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [3, 8])
def test_layers_that_get_the_batch_second_of_a_network_that_gets_it_first(
    length: int, dim: int
) -> None:
    config = XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=20)
    bank, x = bank_of(XLNetModel(config).double()), torch.randint(3, 50, (4, length))
    check(bank, lambda net: net(x)[0], tolerance=1e-9, layers_dim=dim)


class Tied(nn.Module):
    """Reads the embedding's weight itself, as nanoGPT's early heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.token(x), self.token.weight)


class Direct(nn.Module):
    """Calls a layer's forward past its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc.forward(self.fc(x))


@pytest.mark.parametrize(
    ("net", "x", "path"),
    [(Tied(), tokens(4, 3), "token"), (Direct(), torch.randn(4, 6), "fc")],
    ids=["tied", "direct"],
)
def test_who_reads_an_adapted_weight_past_its_layer_is_refused(
    net: nn.Module, x: Tensor, path: str
) -> None:
    """The layer is named, so that it can be left out of the deltas."""
    bank = bank_of(copy.deepcopy(net))
    text = f"reads {path}.weight itself.*Leave this layer out"
    with pytest.raises(RuntimeError, match=text), bank.rows(ROWS) as inside:
        inside(x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 3, 2), torch.randn(4, 6, 6)),  # channels are first
        (nn.Linear(4, 3), torch.randn(4)),
    ],
    ids=["conv2d", "linear"],
)
def test_what_has_no_batch_at_all_is_refused(layer: nn.Module, x: Tensor) -> None:
    bank = bank_of(nn.Sequential(copy.deepcopy(layer)))
    with pytest.raises(ValueError, match="not the batch"), bank.rows(ROWS) as net:
        net(x)


class Within(nn.Module):
    """Does something to the batch before a layer, and something else after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.before(x)))


ORDER = torch.tensor([2, 0, 3, 1])
ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": lambda x: x[1],
    "first_of_all": lambda x: next(iter(x)),
    "unbound": lambda x: x.unbind()[1],
    "shuffled": lambda x: x[ORDER],
    "selected": lambda x: x.index_select(0, ORDER),
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.parametrize("before", ELSEWHERE.values(), ids=ELSEWHERE)
def test_rows_that_are_elsewhere_are_refused(before: Callable[[Tensor], Tensor]) -> None:
    """All of these have axes of lengths that could be the batch's."""
    bank, x = bank_of(Within(before, lambda y: y)), torch.randn(4, 4, 6)
    with pytest.raises(ValueError, match="not the batch"), bank.rows(ROWS) as net:
        net(x)


STILL: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flattened": (lambda x: x.reshape(-1, 6), lambda y: y.reshape(4, 4, 6)),
    "a_place": (lambda x: x[:, 2], lambda y: y),
    "last": (lambda x: x[:, -1:], lambda y: y),
    "a_place_for_each": (lambda x: x[torch.arange(4), ORDER], lambda y: y),
    "there_and_back": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), lambda y: y),
    "from_the_second_axis": (lambda x: x.transpose(0, 1)[0], lambda y: y),
    "unbound": (lambda x: x.transpose(0, 1).unbind()[2], lambda y: y),
    "of_each_place": (lambda x: next(iter(x.permute(1, 0, 2))), lambda y: y),
    "heads": (lambda x: x.view(4, 4, 3, 2).permute(2, 0, 1, 3).repeat(1, 1, 1, 3)[0], lambda y: y),
    "more_tokens": (lambda x: torch.cat([x, x], 1), lambda y: y),
    "windows": (lambda x: x.view(4, 2, 2, 6).flatten(0, 1), lambda y: y.view(4, 4, 6)),
    "new_axis": (lambda x: x[None], lambda y: y[0]),
    "unsqueezed": (lambda x: x.unsqueeze(0), lambda y: y.squeeze(0)),
    "twice": (lambda x: torch.cat([x, x]), lambda y: y.chunk(2)[1]),
    "repeated": (lambda x: x.repeat(2, 1, 1), lambda y: y.view(2, 4, 4, 6).mean(0)),
    "stacked": (lambda x: torch.stack([x, x, x, x]), lambda y: y[2]),
    "masked": (lambda x: x[torch.tensor([True, True, True, True])], lambda y: y),
    "transposed": (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "flattened_after": (
        lambda x: x.transpose(0, 1).reshape(-1, 6),
        lambda y: y.view(4, 4, 6).transpose(0, 1),
    ),
    "zeros_for_each": (lambda x: torch.zeros(4, 6).double() + 1, lambda y: y),
}


@pytest.mark.parametrize(("before", "after"), STILL.values(), ids=STILL)
def test_rows_that_are_still_there_are_right(before: Any, after: Any) -> None:
    bank, x = bank_of(Within(before, after).double()), torch.randn(4, 4, 6).double()
    check(bank, lambda net: net(x))


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.f = nn.Linear(4, 4), nn.Linear(4, 4), f

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.first(x)))


def put(y: Tensor, index: Any, value: Any) -> Tensor:
    y = y.clone()
    y[index] = value
    return y


def assigned(into: Tensor, y: Tensor) -> Tensor:
    return into.copy_(y)


TURN = torch.tensor([2, 0, 1])
TURNED = torch.eye(3).double()[TURN]
PLACES = TURN[:, None].expand(3, 4)
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda y: torch.roll(y, 1, 0),
    "roll_method": lambda y: y.roll(1, 0),
    "roll_named": lambda y: torch.roll(y, shifts=1, dims=0),
    "roll_two": lambda y: torch.roll(y, (1, 1), (1, 0)),
    "roll_flat": lambda y: torch.roll(y, 4),
    "roll_from_last": lambda y: torch.roll(y, 1, -2),
    "fftshift": lambda y: torch.fft.fftshift(y),
    "flip": lambda y: torch.flip(y, [1, 0]),
    "flip_varargs": lambda y: y.flip(1, 0),
    "flipud": torch.flipud,
    "rot90": lambda y: torch.rot90(y, 2),
    "topk": lambda y: y.topk(3, 0)[0],
    "topk_named": lambda y: torch.topk(y, k=3, dim=0).values,
    "sort": lambda y: y.sort(0).values,
    "msort": torch.msort,
    "cumsum": lambda y: y.cumsum(0),
    "cumsum_in_place": lambda y: y.clone().cumsum_(0),
    "cumprod": lambda y: torch.cumprod(y, dim=0),
    "softmax": lambda y: y.softmax(0),
    "take_along_dim": lambda y: torch.take_along_dim(y, PLACES, 0),
    "take_along_dim_flat": lambda y: torch.take_along_dim(y, torch.arange(12).flip(0)).view(3, 4),
    "take": lambda y: y.take(torch.arange(12).flip(0).view(3, 4)),
    "gather": lambda y: y.gather(0, PLACES),
    "index_copy": lambda y: y.index_copy(0, TURN, y),
    "index_copy_in_place": lambda y: torch.zeros_like(y).index_copy_(0, TURN, y),
    "index_add": lambda y: torch.zeros_like(y).index_add(0, TURN, y),
    "index_add_named": lambda y: torch.zeros_like(y).index_add(dim=0, source=y, index=TURN),
    "index_of_data": lambda y: y.index_copy(0, y[:, 0].argsort(), y),
    "index_put": lambda y: y.index_put((TURN,), y),
    "scatter": lambda y: y.scatter(0, PLACES, y),
    "scatter_add": lambda y: torch.zeros_like(y).scatter_add_(0, PLACES, y),
    "set_by_list": lambda y: put(y, [2, 1, 0], y),
    "set_by_tensor": lambda y: put(y, TURN, y),
    "set_by_pairs": lambda y: put(y, (TURN, slice(None)), y),
    "set_shifted": lambda y: put(y, slice(1, None), y[:-1]),
    "set_one": lambda y: put(y, 0, y[1]),
    "copied_into": lambda y: assigned(y.clone(), y.flip(0)),
    "matmul": lambda y: TURNED @ y,
    "mm": lambda y: torch.mm(TURNED, y),
    "bmm": lambda y: torch.bmm(TURNED[None], y[None])[0],
    "addmm": lambda y: torch.addmm(torch.zeros(4).double(), TURNED, y),
    "linear": lambda y: F.linear(TURNED, y.T),
    "made_of_others": lambda y: TURN[:, None].eq(torch.arange(3)).double() @ y,
    "tensordot": lambda y: torch.tensordot(TURNED, y, 1),
    "einsum": lambda y: torch.einsum("ij,jk->ik", TURNED, y),
    "einsum_dots": lambda y: torch.einsum("ij,j...->i...", TURNED, y),
    "einsum_implicit": lambda y: torch.einsum("ij,jk", TURNED, y),
    "pad": lambda y: F.pad(y, (0, 0, 1, -1)),
    "split": lambda y: torch.cat(y.split(1)[::-1]),
    "expanded": lambda y: y.unsqueeze(0).expand(3, 3, 4)[:, 0],
    "broadcast": lambda y: (y + torch.zeros(3, 3, 4).double())[:, 1],
    "mean": lambda y: y[:, None].expand(3, 3, 4).mean(0),
    "reshaped": lambda y: y.reshape(2, 6).reshape(3, 4),
    "tokens_of_one": lambda y: y.repeat(1, 3).view(9, 4)[:3],
    "chunk_of_tokens": lambda y: y.repeat(1, 3).view(9, 4).chunk(3)[1],
}  # fmt: skip
KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "of_a_table": lambda y: torch.arange(24).double().view(2, 3, 4)[:, (y[:, 0] > 9).long()][0] + y,
    "roll": lambda y: torch.roll(y, 1, 1),
    "flip": lambda y: y.flip(-1),
    "fliplr": torch.fliplr,
    "sort": lambda y: y.sort().values,
    "topk": lambda y: y.topk(4)[0],
    "cumsum": lambda y: y.cumsum(1),
    "split": lambda y: torch.cat(y.split(1, 1)[::-1], 1),
    "whole": lambda y: put(y, slice(0, 3), 2 * y),
    "in_order": lambda y: y.index_copy(0, torch.arange(3), 2 * y),
    "filled": lambda y: put(y, y < 0, 0.0),
    "a_place_each": lambda y: put(y, (torch.arange(3), TURN), 1.0),
    "scatter": lambda y: torch.zeros_like(y).scatter_(1, PLACES.contiguous(), y),
    "matmul": lambda y: y @ torch.ones(4, 4).double().tril(),
    "heads": lambda y: (torch.ones(2, 2).double().tril() @ y.view(3, 2, 2)).flatten(1),
    "einsum": lambda y: torch.einsum("bi,ji->bj", y, torch.ones(4, 4).double().tril()),
    "einsum_there_and_back": lambda y: torch.einsum("b...->...b", y).T,
    "unsqueezed": lambda y: y.unsqueeze(0).squeeze(0),
    "mean": lambda y: y.expand(5, 3, 4).mean(0),
    "broadcast": lambda y: (y + torch.zeros(2, 3, 4).double())[1],
    "normalised": lambda y: F.normalize(y) / y.norm(dim=1, keepdim=True),
    "scaled": lambda y: torch.where(torch.ones(()).double() * 2 > 1, y, -y),
}  # fmt: skip


@pytest.mark.parametrize("f", MIXING.values(), ids=MIXING)
def test_what_moves_or_mixes_rows_between_layers_is_refused(f: Callable[[Tensor], Tensor]) -> None:
    bank = bank_of(Between(f).double())
    with pytest.raises(ValueError, match="not the batch"), bank.rows(["a", "b", None]) as net:
        net(torch.randn(3, 4).double())


@pytest.mark.parametrize("f", KEEPING.values(), ids=KEEPING)
def test_what_moves_other_axes_between_layers_is_right(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4).double()
    check(bank_of(Between(f).double()), lambda net: net(x), ["a", "b", None])


@pytest.mark.parametrize("length", [4, 5])
def test_experts_that_get_gathered_tokens_stay_beside_rows(length: int) -> None:
    """Deltas of the attention of a mixture of experts are right, in all layers."""
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
        experts_implementation="eager",
    )  # fmt: skip
    attention, x = mc_path(glob="*_proj"), tokens(4, length)
    bank = bank_of(
        MixtralForCausalLM(config).double(), a=lora_on(attention), b=lora_on(attention, 3)
    )
    check(bank, lambda net: net(x).logits, tolerance=1e-9)


# --- refusals ------------------------------------------------------------------------------------


def attention_net() -> nn.Module:
    return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})


REFUSED: dict[str, tuple[Callable[[], nn.Module], FineTuningStrategy, list[str]]] = {
    "attention": (attention_net, lora(), ["attn.in_proj_weight", "attn.out_proj.weight"]),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 6)), lora(), ["0.weight_ih_l0", "0.weight_hh_l0"]),
    "dora": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        DoRAAllFineTuningStrategy(rank=2),
        ["0.weight", "1.weight"],
    ),
    "head": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), HeadReplacementStrategy(2), ["1"]
    ),
    "biases": (lambda: nn.Sequential(nn.Linear(4, 4)), BitFitFineTuningStrategy(), ["0.bias"]),
    "norms": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        NormFineTuningStrategy(),
        ["1.weight", "1.bias"],
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 2)), lora(), ["0.weight"]),
    "largest_norm": (lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1)), lora(), ["0.weight"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "strategy", "names"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_differ_between_rows_is_named(
    make: Callable[[], nn.Module], strategy: FineTuningStrategy, names: list[str]
) -> None:
    bank = DeltaBank(make())
    filled(bank, "a", strategy)
    bank.activate("a")
    before = full_state(bank.net)
    with pytest.raises(AdaptationError) as error, bank.rows(["a", None]):
        pass
    assert all(re.search(rf"a: {re.escape(name)}\b", str(error.value)) for name in names)
    assert unnumbered(full_state(bank.net)) == unnumbered(before)


def test_statistics_that_moved_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    bank = DeltaBank(net)
    filled(bank, "a", lora())
    with bank.rows(["a", None]):
        pass
    bank.activate("a")
    net.train()(torch.randn(5, 4))
    with pytest.raises(AdaptationError, match=r"1.running_mean"), bank.rows(["a", None]):
        pass


def test_bottlenecks_are_refused() -> None:
    bank = DeltaBank(bert())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        bank.add("a", strategy=BottleneckFineTuningStrategy())
    with pytest.raises(AdaptationError, match="is wrapped by"), bank.rows(["a"]):
        pass


def test_wrong_numbers_and_names() -> None:
    bank = bank_of(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(KeyError, match="'a', 'b'"), bank.rows(["a", "c"]):
        pass
    with pytest.raises(ValueError, match="no rows"), bank.rows([]):
        pass
    for rows in (["a", "b"], ["a", "a"]):
        with pytest.raises(ValueError, match="batch of 3, expected 2"), bank.rows(rows) as net:
            net(torch.randn(3, 4))


def test_layers_that_are_never_called_are_reported() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    bank = bank_of(Net())
    with pytest.warns(GiftWarning, match=r"\['unused.weight'\] were never"):  # noqa: SIM117
        with bank.rows(["a", "b"]) as net:
            net(torch.randn(2, 4))
    with bank.rows(["a", "b"]):
        pass  # nothing at all was called


def test_afterwards_the_network_is_what_it_was_whatever_happened_inside() -> None:
    bank = bank_of(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net = bank.net
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    before = full_state(net)
    with pytest.raises(ZeroDivisionError), bank.rows(["a", "b"]):
        net(torch.randn(2, 4)).sum() + 1 / 0
    assert full_state(net) == before
    with pytest.raises(ValueError, match="expected 2"), bank.rows(["a", "b"]):
        net(torch.randn(3, 4))
    assert full_state(net) == before
    torch.testing.assert_close(net(torch.ones(2, 4)), net(torch.ones(2, 4)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "act",
    [
        lambda bank: bank.activate("b"),
        lambda bank: bank.add("c", strategy=lora()),
        lambda bank: bank.remove("a"),
        lambda bank: bank.scale("a", 2.0),
        lambda bank: bank.combine({"a": 1.0}),
        lambda bank: bank.rows(["a"]).__enter__(),
    ],
    ids=["activate", "add", "remove", "scale", "combine", "rows"],
)
def test_the_bank_stands_still_meanwhile(act: Callable[[DeltaBank], Any]) -> None:
    bank = bank_of(nn.Sequential(nn.Linear(4, 4)))
    bank.activate("a")
    with bank.rows(["a", "b"]), pytest.raises(RuntimeError, match="computing rows"):
        act(bank)
    assert (bank.names, bank.active) == (["a", "b"], "a")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_a_copy_made_inside_is_the_base_for_ever(copied: Callable[[Any], Any]) -> None:
    """The copy adds no deltas and refuses no batch, inside and afterwards."""
    bank, x = bank_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()), torch.randn(5, 4)
    x = x.double()
    expected = alone(bank, None, lambda net: net(x))
    with bank.rows(["a", "a", "b"]) as net:
        copies = [copied(net[0]), copied(net[1])]
        inside = copies[1](copies[0](x))
        rows = net(x[:3])
    for output in (inside, copies[1](copies[0](x))):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for i, name in enumerate(["a", "a", "b"]):  # and the network is what it was
        torch.testing.assert_close(rows[i], alone(bank, name, lambda net: net(x[:3]))[i])


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_named() -> None:
    bank = bank_of(nn.Sequential(Doubled(4, 4)))
    text = rf"{re.escape(__name__)}\.Doubled, whose forward is its own"
    with pytest.raises(AdaptationError, match=text), bank.rows(["a", "b"]):
        pass


class RowByRow(nn.Module):
    """Calls its layers once for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        each = [self.second(torch.tanh(self.first(one))).relu() for one in x]
        return self.last(torch.stack(each))


def test_layers_that_get_one_row_at_a_time() -> None:
    bank, x = bank_of(RowByRow().double()), torch.randn(4, 7, 6).double()
    check(bank, lambda net: net(x))


class Reads(nn.Module):
    """Takes values of a weight out of torch."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.fc, self.read = nn.Linear(6, 6), read

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.read(self.fc.weight)


READS: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda weight: weight.tolist()[0][0],
    "numpy": lambda weight: weight.detach().numpy()[0, 0],
    "number": lambda weight: weight[0, 0].item(),
    "float": lambda weight: float(weight.norm()),
}


@pytest.mark.parametrize("rows", [ROWS, ["a"] * 4], ids=["each", "one"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_who_takes_values_of_an_adapted_weight_out_of_torch_is_refused(
    read: Any, rows: list[str | None]
) -> None:
    """They would be those of the base, without a word."""
    bank = bank_of(Reads(read))
    with (
        pytest.raises(RuntimeError, match=r"Reads reads fc\.weight itself"),
        bank.rows(rows) as net,
    ):
        net(torch.randn(4, 6))


class AddsPositions(nn.Module):
    """Makes positions once for all rows, and adds them in a way of its own."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.to_position, self.add = nn.Linear(6, 6), nn.Linear(2, 6), add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.fc(x), self.to_position(torch.ones(1, 5, 2).to(x)))


def test_an_error_behind_a_layer_that_was_repeated_names_the_layer() -> None:
    x = torch.randn(4, 5, 6).double()
    check(bank_of(AddsPositions(torch.add).double()), lambda net: net(x))
    bank = bank_of(AddsPositions(lambda y, p: y + p.reshape(5, 6)).double())
    with pytest.raises(RuntimeError, match="shape") as caught, bank.rows(ROWS) as net:
        net(x)
    assert "['to_position.weight'] got one input for all rows" in caught.value.__notes__[0]
    bank = bank_of(RowByRow())
    with pytest.raises(RuntimeError, match="shape") as caught, bank.rows(ROWS) as net:
        net(torch.randn(4, 7, 5))
    assert not hasattr(caught.value, "__notes__")


def test_exporting_the_network_inside_is_refused() -> None:
    bank, x = bank_of(nn.Sequential(nn.Linear(6, 6))), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="compiled, where rows cannot differ"), bank.rows(ROWS):
        torch.export.export(bank.net, (x,), strict=False)


class Zeros(nn.Module):
    """Makes its own batch, as generation from noise does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, scale: Tensor) -> Tensor:
        return self.fc(torch.ones(4, 6).to(scale) * scale)


def test_a_network_without_a_batch_among_its_inputs() -> None:
    """What it makes from constants has the rows along `dim` where it has an entry for each."""
    scale = torch.tensor(0.5).double()
    check(bank_of(Zeros().double()), lambda net: net(scale))


class InTwoOrders(nn.Module):
    """Calls a layer with the batch, and with the batch in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        shuffled = self.fc(x[ORDER])
        return self.fc(x).sin() + shuffled[ORDER.argsort()]


def test_a_layer_that_gets_the_batch_in_two_orders() -> None:
    bank, x = bank_of(InTwoOrders().double()), torch.randn(4, 3, 6).double()
    check(bank, lambda net: net(x) + net(x).cos())


def test_rows_of_the_base_beside_a_delta_that_has_no_name() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    base = net(x)
    gift.enable_fine_tuning(net, lora(1))
    with torch.no_grad():
        net[0].lora_B.normal_()
    tuned = net(x)
    with torch.no_grad(), DeltaBank(net).rows([None, None]) as inside:
        torch.testing.assert_close(inside(x), base, rtol=0, atol=0)
    assert not torch.allclose(tuned, base)
    torch.testing.assert_close(net(x), tuned, rtol=0, atol=0)
