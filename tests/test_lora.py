"""What LoRA's options mean, each against a computation of its own."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.layers.table import dotted
from gift.methods import METHODS, LoRA
from gift.strategies import LoRAAllFineTuningStrategy

# Of layers this small, a delta is easily larger than the weight.
pytestmark = pytest.mark.filterwarnings("ignore::gift.GiftWarning")


def adapted(net: nn.Module, **settings: object) -> nn.Module:
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt("lora", **settings))]))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return net


def test_out_as_h_layout_sees_a_convolution_as_outputs_by_all_else() -> None:
    base = nn.Conv2d(4, 6, (3, 2), groups=2).double()
    net = adapted(copy.deepcopy(base), rank=2, conv_layout="out_as_h")
    b, a = net.lora_B.detach(), net.lora_A.detach()
    assert (b.shape, a.shape) == ((2, 3, 2), (2, 2, 2 * 3 * 2))
    expected = base.weight.detach().clone()
    for o in range(6):
        for i, y, x in np.ndindex(2, 3, 2):
            column = (i * 3 + y) * 2 + x
            expected[o, i, y, x] += b[o // 3, o % 3] @ a[o // 3, :, column]
    torch.testing.assert_close(net.weight, expected, rtol=0, atol=1e-14)


def test_split_qkv_gives_query_key_and_value_a_delta_of_their_own() -> None:
    base = nn.MultiheadAttention(8, 2).double()
    net = adapted(copy.deepcopy(base), rank=2, split_qkv=True)
    b, a = net.in_proj_weight_lora_B, net.in_proj_weight_lora_A
    assert (b.shape, a.shape) == ((3, 8, 2), (3, 2, 8))
    parts = [w + b[n] @ a[n] for n, w in enumerate(base.in_proj_weight.chunk(3))]
    torch.testing.assert_close(net.in_proj_weight, torch.cat(parts), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"),
    [(None, False, 1.0), (8, False, 2.0), (8, True, 4.0), (-2.0, False, -0.5), (0, False, 0.0)],
)
def test_scaling_is_alpha_by_rank_or_by_its_root(
    alpha: float | None, rslora: bool, scaling: float
) -> None:  # fmt: skip
    base = nn.Linear(8, 6).double()
    net = adapted(copy.deepcopy(base), rank=4, lora_alpha=alpha, use_rslora=rslora)
    expected = base.weight + scaling * net.lora_B @ net.lora_A
    torch.testing.assert_close(net.weight, expected, rtol=0, atol=1e-14)


def test_a_is_drawn_like_the_weight_of_a_linear_layer_and_b_is_zero() -> None:
    """Kaiming-uniform with a = sqrt(5) on (rank, columns), for each group of a batch as well."""
    for shape in ((300, 100), (5, 300, 100)):
        torch.manual_seed(3)
        values = LoRA(rank=50).init_parameters(torch.zeros(shape))
        assert not values["lora_B"].any()
        torch.manual_seed(3)
        draws = torch.empty(math.prod(shape[:-2]) * 50, 100)
        nn.init.kaiming_uniform_(draws, a=math.sqrt(5))
        assert torch.equal(values["lora_A"].reshape(-1, 100), draws)


class Recorder(torch.overrides.TorchFunctionMode):
    """Keeps the masks that dropout draws."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func is F.dropout:
            self.masks.append(torch.where(args[0] != 0, result / args[0], 0).detach())
        return result


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 5)),
    ],
    ids=["linear", "conv2d", "conv1d_grouped"],
)
def test_dropout_drops_inputs_of_the_delta_alone(base: nn.Module, shape: tuple[int, ...]) -> None:
    """``W x + s B A dropout(x)``: the base sees the whole input."""
    base = copy.deepcopy(base).double()
    net = adapted(copy.deepcopy(base), rank=2, lora_dropout=0.4)
    x = torch.randn(shape, dtype=torch.float64)
    with Recorder() as recorder:
        output = net.train()(x)
    (mask,) = recorder.masks
    kept = mask[mask != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.6))
    assert 0 < len(kept) < mask.numel()
    delta = copy.deepcopy(base)
    delta.weight.data = net.eval().weight.detach() - base.weight.detach()
    delta.bias = None
    torch.testing.assert_close(output, base(x) + delta(x * mask), rtol=0, atol=1e-12)
    with Recorder() as recorder:
        net.eval()(x)
    assert not recorder.masks


@pytest.mark.parametrize(
    ("base", "axis"), [(nn.LSTM(6, 4), 1), (nn.Embedding(9, 5), 0)], ids=["lstm", "embedding"]
)
def test_dropout_of_layers_that_read_their_weight_drops_input_features(
    base: nn.Module, axis: int
) -> None:
    net = adapted(copy.deepcopy(base), rank=2, lora_dropout=0.5)
    name = "weight_ih_l0" if isinstance(net, nn.LSTM) else "weight"
    delta = getattr(net.eval(), name) - getattr(base, name)
    dropped = getattr(net.train(), name) - getattr(base, name)
    ratio = (dropped / delta).detach()
    expected = ratio.select(1 - axis, 0)
    assert set(expected.round().tolist()) == {0.0, 2.0}
    shape = [-1, 1] if axis == 0 else [1, -1]
    torch.testing.assert_close(ratio, expected.view(shape).expand_as(ratio), atol=1e-3, rtol=0)


def test_train_bias_trains_the_biases_of_adapted_layers_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LSTM(4, 4), nn.MultiheadAttention(8, 2)
    )
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(train_bias=True))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    biases = {name for name in trained if "lora_" not in name}
    assert biases == {
        "0.bias",
        "2.bias_ih_l0",
        "2.bias_hh_l0",
        "3.in_proj_bias",
        "3.out_proj.bias",
    }


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_the_dtype_of_the_delta_can_be_chosen(dtype: torch.dtype | str) -> None:
    net = nn.Linear(8, 8)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(dtype=dtype))
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float64
    assert {p.dtype for p in net.parameters()} == {expected}
    assert net(torch.randn(2, 8)).dtype == torch.float32
    assert net.weight.dtype == torch.float32


def test_complex_weights_are_adapted() -> None:
    base = nn.Linear(6, 5, dtype=torch.complex64)
    net = copy.deepcopy(base)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    x = torch.randn(3, 6, dtype=torch.complex64)
    assert torch.equal(net(x), base(x))
    net(x).abs().sum().backward()
    assert net.lora_B.grad.is_complex()


def test_a_rank_fits_each_weight_and_is_refused_where_none_can_have_it() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(2, 9))

    small = net()
    enable_fine_tuning(small, LoRAAllFineTuningStrategy())
    assert [layer.lora_A.shape[0] for layer in small] == [3, 2, 2]
    clipped = net()
    enable_fine_tuning(clipped, LoRAAllFineTuningStrategy(rank=8, clip_rank=True))
    assert [layer.lora_A.shape[0] for layer in clipped] == [8, 2, 2]
    given = net()
    with pytest.warns(GiftWarning, match=r"1.weight \(rank 2\), 2.weight \(rank 2\)") as caught:
        report = enable_fine_tuning(given, LoRAAllFineTuningStrategy(rank=8))
    (text,) = [str(w.message) for w in caught if "cannot have" in str(w.message)]
    assert "0.weight" not in text
    assert [layer.lora_A.shape[0] for layer in given] == [8, 2, 2]
    assert report.clipped == {"1.weight": ("rank", 2), "2.weight": ("rank", 2)}
    assert "1.weight (rank 2)" in str(report)
    for refused in ({"rank": 8, "clip_rank": False}, {"rank": 17}):
        with pytest.raises(
            ValueError, match=r"(?s)1 \(Linear\).*above 2.*2 x 16.*\n.*2 \(Linear\)"
        ):
            enable_fine_tuning(net(), LoRAAllFineTuningStrategy(**refused))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both"])
def test_attention_masks_are_those_of_the_base(training: bool, packed: bool, mask: str) -> None:
    """Also on the fast path, which runs in evaluation without gradients."""
    dims = {} if packed else {"kdim": 8, "vdim": 6}
    base = nn.MultiheadAttention(8, 2, batch_first=True, **dims).train(training)
    net = adapted(copy.deepcopy(base), rank=2)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if getattr(base, name) is not None:
            getattr(base, name).data = getattr(net, name).detach()
    base.out_proj.weight.data = net.out_proj.weight.detach()
    query = torch.randn(2, 5, 8)
    value = query if packed else torch.randn(2, 5, 6)
    options = {}
    if mask in ("causal", "both"):
        options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(5)
    if mask in ("padding", "both"):
        options["key_padding_mask"] = torch.tensor([[0.0] * 5, [0.0] * 3 + [-math.inf] * 2])
    for context in (torch.enable_grad(), torch.no_grad()):
        for need_weights in (True, False):
            with context:
                got = net(query, query, value, need_weights=need_weights, **options)
                expected = base(query, query, value, need_weights=need_weights, **options)
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)


def test_padding_row_of_an_embedding_stays_zero_while_training() -> None:
    net = nn.Embedding(10, 6, padding_idx=0)
    enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(5):
        net(torch.randint(0, 10, (4, 7))).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not net.weight[0].any()
    assert net.weight[1:].std() > 0


FAST = [
    nn.Linear(6, 5),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3),
    nn.Conv3d(2, 3, 2),
]


@pytest.mark.parametrize("layer", FAST, ids=lambda layer: type(layer).__name__)
def test_fast_paths_agree_with_the_materialised_weight(layer: nn.Module) -> None:
    """The same layer as a subclass takes the general way; values and gradients agree."""
    assert dotted(type(layer).forward) in METHODS["lora"].forwards
    layer = copy.deepcopy(layer).double()
    general = copy.deepcopy(layer)

    stock = type(layer)
    general.__class__ = type("Own", (stock,), {"forward": stock_forward(stock)})
    fast = adapted(layer, rank=2)
    general = adapted(general, rank=2)
    assert type(fast).forward is not stock.forward
    assert "forward" not in vars(type(general))
    general.load_state_dict(fast.state_dict())
    shapes = {nn.Linear: (2, 3, 6), nn.Conv1d: (2, 4, 7), nn.Conv2d: (2, 4, 7, 7)}
    x = torch.randn(shapes.get(stock, (2, 2, 5, 5, 5)), dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(value) for net, value in zip((fast, general), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for output in outputs:
        output.sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-12)
    for name in ("lora_A", "lora_B"):
        grads = [getattr(net, name).grad for net in (fast, general)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def stock_forward(cls: type) -> object:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return cls.forward(self, input)  # type: ignore[attr-defined]

    return forward
