"""Inputs that are computed again in the backward pass: gradients, what is kept, who is left out.

The reference is the same network with ``recompute_inputs=False``, which keeps its inputs.
"""

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gift import FineTuningStrategy, enable_fine_tuning
from gift.core.delta import named_deltas
from gift.factories import ma_adapt, mc_any, mc_layer
from gift.kernels import recomputed
from gift.kernels.recomputed import AS_IT_IS, Ways, keep
from gift.kernels.ways import RULES
from gift.methods import METHODS
from gift.private.torch import autograd
from gift.utils.info import kept_inputs
from tests.cases.methods import METHODS as CASES
from tests.cases.methods import MethodCase
from tests.cases.selection import cells
from tests.common import derivatives, weighted

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9) and autograd.hides_hooks()
not_on_old = pytest.mark.skipif(
    OLD, reason="torch 2.6 does not tell of hooks, so that inputs are kept"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
    not_on_old,
]

WIDTH = 16


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers are not worth it otherwise."""
    monkeypatch.setattr(recomputed, "FEW", 0)
    monkeypatch.setattr(recomputed, "WORK", 0)


def adapted(net: nn.Module, method: str = "lora", recompute: bool = True, **settings: Any) -> Any:
    """A copy with deltas that are not zero."""
    net = copy.deepcopy(net)
    torch.manual_seed(0)
    check = mc_any() if not list(net.children()) else mc_layer("linear") | mc_layer("conv")
    strategy = FineTuningStrategy([(check, ma_adapt(method, **settings))])
    enable_fine_tuning(net, strategy, recompute_inputs=recompute)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=chance).to(parameter)
    return net


def layer(dtype: torch.dtype = torch.float64, recompute: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, 8, dtype=dtype)
    return adapted(base, recompute=recompute, rank=2, **settings)


def hidden(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor with a graph that nobody knows the way through."""
    torch.manual_seed(1)
    leaf = torch.randn(*(shape or (6, 5, WIDTH)), dtype=dtype, requires_grad=True)
    return leaf.cumsum(0)


def gradients(net: nn.Module, before: Callable[[Tensor], Tensor], h: Tensor) -> list[Tensor]:
    """The output, and the gradients of what is trained and of `h`."""
    torch.manual_seed(2)  # dropout
    y = net(before(h))
    wanted = [h, *net.parameters()]
    return [y.detach(), *torch.autograd.grad(weighted(y), wanted)]


def is_recomputed(x: Tensor, ways: Ways | None = None) -> bool:
    """By a layer that has met no way, or these."""
    return keep(x, 1, ways or Ways())[0] is not AS_IT_IS


def like(h: Tensor, *shape: int, positive: bool = False) -> Tensor:
    torch.manual_seed(4)
    made = torch.randn(shape or h.shape[-1:], dtype=h.dtype)
    return made.abs() + 0.5 if positive else made


def rms_norm(h: Tensor) -> Tensor:
    """As networks of transformers write it."""
    wide = h.to(torch.float32) if h.dtype.itemsize < 4 else h
    return like(h) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def attention(h: Tensor) -> Tensor:
    q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)


def written_out(h: Tensor) -> Tensor:
    q = h.unflatten(-1, (2, -1)).transpose(1, 2)
    return ((q @ q.mT).softmax(-1) @ q).transpose(1, 2).reshape(h.shape)


def other_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype is torch.float32 else torch.float32


def gelu(h: Tensor) -> Tensor:
    return F.gelu(h)


def stored_mask(h: Tensor) -> Tensor:
    return torch.native_dropout(F.gelu(h), 0.4, True)[0]


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "layer norm": (lambda h: F.layer_norm(h, h.shape[-1:], like(h), like(h)), "NativeLayerNorm"),
    "layer norm without bias": (
        lambda h: F.layer_norm(h, h.shape[-1:], like(h)),
        "NativeLayerNorm",
    ),
    "layer norm without weight": (lambda h: F.layer_norm(h, h.shape[-1:]), "NativeLayerNorm"),
    "layer norm of two axes": (lambda h: F.layer_norm(h, h.shape[-2:]), "NativeLayerNorm"),
    "layer norm, large eps": (lambda h: F.layer_norm(h, h.shape[-1:], eps=0.5), "NativeLayerNorm"),
    "gelu": (gelu, "Gelu"),
    "gelu by tanh": (lambda h: F.gelu(h, approximate="tanh"), "Gelu"),
    "silu": (F.silu, "Silu"),
    "mish": (F.mish, "Mish"),
    "hardswish": (F.hardswish, "Hardswish"),
    "hardsigmoid": (F.hardsigmoid, "Hardsigmoid"),
    "leaky relu": (lambda h: F.leaky_relu(h, 0.3), "LeakyRelu"),
    "relu6": (F.relu6, "Hardtanh"),
    "elu": (lambda h: F.elu(h, 0.7), "Elu"),
    "selu": (F.selu, "Elu"),
    "softplus": (lambda h: F.softplus(h, 2.0), "Softplus"),
    "glu": (lambda h: F.glu(torch.cat([h, h.flip(0)], -1)), "Glu"),
    "gate": (lambda h: F.silu(h) * h.flip(0), "Mul"),
    "gate of one number": (lambda h: F.gelu(h) * h[..., :1].sigmoid(), "Mul"),
    "rms norm": (rms_norm, "Mul"),
    "rms norm of torch": (lambda h: F.rms_norm(h, h.shape[-1:], like(h)), "Mul"),
    "rms norm with a trained weight": (lambda h: like(h).requires_grad_() * F.gelu(h), "Mul"),
    "times a number": (lambda h: 2.5 * F.gelu(h), "Mul"),
    "by a number": (lambda h: F.gelu(h) / 3, "Div"),
    "quotient": (lambda h: F.gelu(h) / (1 + h.flip(0).square()), "Div"),
    "power": (lambda h: h.pow(3), "Pow"),
    "negative": (lambda h: -F.gelu(h), "Neg"),
    "sum": (lambda h: torch.add(F.gelu(h), h.sin().tanh(), alpha=3), "Add"),
    "difference": (lambda h: torch.sub(F.gelu(h), h.sin().tanh(), alpha=3), "Sub"),
    "attention, written out": (written_out, "Bmm"),
    "dropout": (lambda h: F.dropout(F.gelu(h), 0.3), "Mul"),
    "dropout with a mask": (stored_mask, "NativeDropout"),
    "exponential and its kin": (
        lambda h: h.exp() * h.square().sqrt() * h.square().add(1).rsqrt() / h.cosh().reciprocal(),
        "Exp",
    ),
    "softmax, transposed": (lambda h: -h.softmax(-1), "Softmax"),
    "relu times sigmoid": (lambda h: h.relu() * h.sigmoid(), "Mul"),
    "relu, minus": (lambda h: -h.relu(), "Relu"),
    "reciprocal": (lambda h: -h.square().add(1).reciprocal(), "Reciprocal"),
    "root": (lambda h: -h.square().add(1).sqrt(), "Sqrt"),
    "rsqrt": (lambda h: -h.square().add(1).rsqrt(), "Rsqrt"),
    "sigmoid": (lambda h: -h.sigmoid(), "Sigmoid"),
    "tanh": (lambda h: -h.tanh(), "Tanh"),
    "side by side": (lambda h: torch.cat([gelu(h)[..., :6], h.sin().tanh()[..., 6:]], -1), "Cat"),
    "padded by nothing": (lambda h: F.pad(gelu(h), (0, 0, 0, 0)), "ConstantPadNd"),
    "rolled": (lambda h: gelu(h).roll((1, -2), (0, 1)), "Roll"),
    "cast": (lambda h: -F.gelu(h.to(other_dtype(h))).to(h.dtype), "ToCopy"),
    "copy": (lambda h: gelu(h).transpose(0, 1).contiguous(), "Clone"),
    "alias": (lambda h: torch.ops.aten.alias(gelu(h)), "Alias"),
    "transposed": (lambda h: gelu(h).transpose(-3, -2), "Transpose"),
    "transposed matrix": (lambda h: gelu(h.flatten(0, 1).t().contiguous()).t(), "T"),
    "permuted": (lambda h: gelu(h).permute(1, 0, 2), "Permute"),
    "one of an axis": (lambda h: gelu(h).select(1, -1), "Select"),
    "a part": (lambda h: gelu(h)[1:, ::2], "Slice"),
    "the last": (lambda h: gelu(h)[:, -2:], "Slice"),
    "split": (lambda h: gelu(torch.cat([h, h.flip(0)], -1)).split(WIDTH, -1)[1], "Split"),
    "split by sizes": (lambda h: gelu(h).split([2, 3, 1], 0)[1], "SplitWithSizes"),
    "chunk": (lambda h: gelu(h).chunk(3)[2], "Split"),
    "unbind": (lambda h: gelu(h).unbind(1)[3], "Unbind"),
    "expanded": (lambda h: gelu(h)[:, :1].expand(-1, 4, -1), "Expand"),
    "view": (lambda h: gelu(h).view(3, 10, -1), "View"),
    "matrix product's view": (
        lambda h: torch.ops.aten._unsafe_view(gelu(h), (30, WIDTH)),
        "UnsafeView",
    ),
    "reshape": (lambda h: gelu(h).transpose(0, 1).reshape(3, 10, -1), "UnsafeView"),
    "one more axis": (lambda h: gelu(h).unsqueeze(1), "Unsqueeze"),
    "one axis less": (lambda h: gelu(h[:1]).squeeze(), "Squeeze"),
    "this axis less": (lambda h: gelu(h[:1]).squeeze(0), "Squeeze"),
    "these axes less": (lambda h: gelu(h[:1, :1]).squeeze((0, 1)), "Squeeze"),
    "largest of windows": (
        lambda h: -F.max_pool2d(torch.cat([h, h.cos()], -1)[None], (1, 2)),
        "MaxPool2DWithIndices",
    ),
    "windows of an image": (
        lambda h: (
            F.layer_norm(h, h.shape[-1:], like(h), like(h))
            .roll((1, 2), (0, 1))
            .view(2, 3, 5, WIDTH)
            .transpose(1, 2)
            .reshape(10, 3, WIDTH)
        ),
        "NativeLayerNorm",
    ),
}
ELSEWHERE = {
    "ScaledDotProductFlashAttentionForCpuBackward0": "keeps the memory of its output",
    "ScaledDotProductFlashAttentionBackward0": "a GPU",
    "ScaledDotProductEfficientAttentionBackward0": "a GPU",
    "ScaledDotProductCudnnAttentionBackward0": "a GPU",
    "FusedRmsNormBackward0": "a GPU",
    "ReshapeAliasBackward0": "another backend",
}


def names_of(x: Tensor) -> set[str]:
    """The names of the nodes that lead to a tensor."""
    found, nodes = set(), [x.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is not None:
            found.add(node.name())
            nodes += [parent for parent, _ in node.next_functions]
    return found


def test_every_rule_is_tried() -> None:
    met = set[str]().union(*(names_of(before(hidden())) for before, _ in WAYS.values()))
    assert set(RULES) - met == set(ELSEWHERE)


@cells(2, way=WAYS, dtype=[torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_with_the_input_kept(
    way: tuple[Callable[[Tensor], Tensor], str], dtype: torch.dtype
) -> None:
    before, name = way
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    h = hidden(dtype=dtype)
    torch.manual_seed(2)
    x = before(h)
    assert any(found.startswith(f"{name}Backward") for found in names_of(x))
    assert is_recomputed(x)
    for form in ("side", "merged", "whole"):
        ours, theirs = (
            gradients(layer(dtype, recompute, form=form), before, h) for recompute in (True, False)
        )
        assert torch.equal(ours[0], theirs[0]), "the output"
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(
                one, other, rtol=0, atol=tolerance * float(1 + other.abs().max())
            )


def size(y: Tensor, *but: nn.Module) -> int:
    """Bytes that the graph of `y` keeps beside the parameters of these modules."""
    return autograd.bytes_kept_by(
        y.grad_fn,
        (t for net in but for t in (*dict(net.named_parameters()).values(), *net.buffers())),
    )


@pytest.mark.parametrize("before", [*(way for way, _ in WAYS.values()), attention, F.relu])
def test_nothing_is_kept_beside_what_the_network_keeps(before: Callable[[Tensor], Tensor]) -> None:
    """But one number, which stands for the place of the input in the graph, and small weights."""
    h, net = hidden(), layer(form="merged")
    frozen = nn.Linear(WIDTH, 8, dtype=h.dtype).requires_grad_(False)
    bound, ours = (size(one(before(h)), one) for one in (frozen, net))
    assert bound <= ours <= bound + 8 * (1 + 2 * WIDTH)


def test_without_recomputation_the_input_is_kept() -> None:
    h = hidden()
    sizes = [
        size(net(F.gelu(h)), net)
        for net in (layer(form="merged"), layer(recompute=False, form="merged"))
    ]
    assert sizes[1] - sizes[0] == h.numel() * 8 - 8


# What must be left as it was, or be right


def same(
    before: Callable[[Tensor], Tensor], h: Tensor, run: Callable[..., Any] = gradients
) -> None:
    ours, theirs = (run(layer(recompute=on), before, h) for on in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf": lambda h: h.detach().clone().requires_grad_(),
    "no graph": lambda h: h.detach(),
    "an operation that is not known": torch.erf,
    "a mean and a sum with what no node keeps": lambda h: F.gelu(h) + like(h),
    "more than one step back": lambda h: F.gelu(h).cumsum(0).transpose(0, 1),
    "written in place": lambda h: F.gelu(h).mul_(2),
    "written in place, a part": lambda h: F.gelu(h).index_fill_(0, torch.tensor(1), 0.5),
    "a part of what is written": lambda h: F.gelu(h).mul_(2)[:3],
    "padded": lambda h: F.pad(gelu(h), (0, 0, 1, 2)),
    "padded by something": lambda h: F.pad(gelu(h), (0, 0, 1, 2), value=1.0),
    "an activation in place": lambda h: F.silu(h * 1, inplace=True),
    "relu in place": lambda h: F.relu(h * 1, inplace=True),
    "dropout in place": lambda h: F.dropout(F.gelu(h), 0.3, inplace=True),
}


def unseen(write: Callable[[Tensor], Any], again: bool = False) -> Callable[[Tensor], Tensor]:
    """A way in which something is written that autograd does not see."""

    def before(h: Tensor) -> Tensor:
        x = F.gelu(h)
        with torch.no_grad():
            write(x)
        return x.float().to(x.dtype) if again else x

    return before


STRANGE |= {
    "written without a graph": unseen(lambda x: x.clamp_(0.1)),
    "written without a graph, as data": unseen(lambda x: x.data.clamp_(0.1)),
    "the same before a cast": unseen(lambda x: x.clamp_(0.1), again=True),
    "data before a cast": unseen(lambda x: x.data.clamp_(0.1), again=True),
    "a part without a graph": unseen(lambda x: x[:, 1].zero_()),
}


@pytest.mark.parametrize("before", STRANGE.values(), ids=STRANGE)
def test_where_the_way_does_not_lead_to_it_the_input_is_kept(
    before: Callable[[Tensor], Tensor],
) -> None:
    h = hidden()
    assert not is_recomputed(before(h))

    def run(net: nn.Module, before: Callable[[Tensor], Tensor], h: Tensor) -> Any:
        torch.manual_seed(2)
        return torch.autograd.grad(weighted(net(before(h))), list(net.parameters()))

    same(before, h, run)


def test_a_way_that_once_led_elsewhere_is_not_gone_again() -> None:
    h, ways = hidden(), Ways()
    x = F.gelu(h).double()
    with torch.no_grad():
        x.data.add_(1)
    assert not is_recomputed(x, ways)
    assert not is_recomputed(F.gelu(h), ways)
    assert is_recomputed(F.gelu(h)), "another layer"


def test_what_has_no_values_proves_nothing() -> None:
    h = hidden()
    for number in (0, torch.inf, torch.nan):
        assert not is_recomputed(F.gelu(h * number))
    assert is_recomputed(F.gelu(h))


@pytest.mark.parametrize("before", [WAYS["layer norm"][0], gelu, WAYS["softplus"][0]])
def test_writing_to_what_is_kept_is_an_error(before: Callable[[Tensor], Tensor]) -> None:
    h, net = hidden(), layer()
    y = net(before(h))
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [net.lora_A])


@pytest.mark.parametrize("affine", [nn.LayerNorm, nn.RMSNorm])
def test_weights_of_norms_may_be_written_or_freed(affine: Callable[..., Any]) -> None:
    """FSDP frees them until the backward pass of their own module."""
    h, norm = hidden(30, WIDTH), affine(WIDTH, dtype=torch.float64).requires_grad_(False)
    x = norm(h)
    assert is_recomputed(x)
    ours, theirs = layer(), layer(recompute=False)
    y = [net(x) for net in (ours, theirs)]
    with torch.no_grad():
        norm.weight.add_(1)
    norm.weight.untyped_storage().resize_(0)
    found = [
        torch.autograd.grad(weighted(y[i]), list(net.parameters()))
        for i, net in enumerate((ours, theirs))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [nn.LayerNorm, nn.RMSNorm])
def test_weights_that_were_freed_already_are_not_read(affine: Callable[..., Any]) -> None:
    """As FSDP does at the end of the module that has the norm."""
    h, norm = hidden(30, WIDTH), affine(WIDTH, dtype=torch.float64).requires_grad_(False)
    x = norm(h)
    norm.weight.untyped_storage().resize_(0)
    assert not is_recomputed(x)


def test_large_weights_are_no_way() -> None:
    h = hidden()
    assert not is_recomputed(nn.Parameter(like(h, *h.shape), requires_grad=False) * F.gelu(h))
    assert is_recomputed(like(h, *h.shape) * F.gelu(h)), "a mask"


def test_what_was_written_before_the_layer_is_not_used() -> None:
    h, net = hidden(), layer()
    x = F.gelu(h)
    with torch.no_grad():
        h.add_(1)  # the gradient of the activation is lost, those of the factors are not
    assert not is_recomputed(x)
    expected = layer(recompute=False)
    found = [
        torch.autograd.grad(weighted(one(x)), list(one.parameters())) for one in (net, expected)
    ]
    assert all(map(torch.equal, *found))


def scaled_unseen(h: Tensor) -> Tensor:
    x = F.gelu(h)
    x.data.mul_(3)  # autograd does not see it
    return x


def test_each_layer_tries_a_way_itself() -> None:
    """Another layer has met the same nodes, and they led to its input."""
    h, usual = hidden(), layer()
    for _ in range(9):
        gradients(usual, F.gelu, h)
    ours, theirs = (gradients(layer(recompute=on), scaled_unseen, h) for on in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_graph_that_was_freed_is_not_used() -> None:
    h = hidden()
    x = F.gelu(h)
    x.sum().backward()
    assert not is_recomputed(x)


def test_the_graph_can_be_used_again() -> None:
    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        x = before(h)
        y, wanted = weighted(net(x)) + weighted(net(x * 1)), [h, *net.parameters()]
        several = [torch.autograd.grad(y, wanted, retain_graph=True) for _ in range(3)]
        return itertools.chain(*several)

    same(rms_norm, hidden(), run)


@pytest.mark.parametrize("before", [WAYS["layer norm"][0], rms_norm, gelu, attention])
def test_gradients_can_be_differentiated(before: Callable[[Tensor], Tensor]) -> None:
    """Also by the input itself, which the recomputed one stands for."""

    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        x = before(h)
        x.register_hook(lambda g: 2 * g)
        factors = list(net.parameters())
        first = torch.autograd.grad(weighted(net(x)), [x, *factors], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(penalty, [x, h, *factors])]

    same(before, hidden(), run)


def test_numerical_gradients_of_both_orders() -> None:
    net = layer()
    h = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def call(h: Tensor) -> Tensor:
        made: Tensor = net(F.gelu(h))
        return made

    assert torch.autograd.gradcheck(call, (h,))
    assert torch.autograd.gradgradcheck(call, (h,))


def test_hooks_on_the_input_run_once_with_its_whole_gradient() -> None:
    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        x, seen = before(h), []
        x.register_hook(lambda g: seen.append(g) or 3 * g)
        x.retain_grad()
        (weighted(net(x)) + x.sum()).backward()
        assert len(seen) == 1
        return [*seen, x.grad, *(p.grad for p in net.parameters())]

    same(rms_norm, hidden(), run)


def test_hooks_that_pack_tensors_see_nothing_of_the_input() -> None:
    """As those that count what is kept; what they gave is unpacked in the backward pass alone."""
    h, net = hidden(), layer()
    expected = torch.autograd.grad(weighted(net(F.gelu(h))), [h, *net.parameters()])
    seen: list[Any] = []
    back: list[Any] = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: back.append(t) or t):
        x = F.gelu(h)
        assert is_recomputed(x)
        y = net(x)
    assert not back
    assert all(t.data_ptr() != x.data_ptr() for t in seen)
    assert any(t.data_ptr() == h.data_ptr() for t in seen)
    found = torch.autograd.grad(weighted(y), [h, *net.parameters()])
    assert back
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda t: [t], lambda packed: packed[0]),
        (lambda t: t.half(), lambda packed: packed.double()),
        (lambda t: 2 * t, lambda packed: packed / 2),
        (lambda t: t.flatten(), lambda packed: packed.view(-1, WIDTH)),
    ],
)
def test_hooks_that_pack_something_else_get_the_input(pack: Any, unpack: Any) -> None:
    """Nothing is unpacked to look at it."""
    seen: list[Any] = []
    back: list[Any] = []
    h = hidden(7, WIDTH)
    with saved_tensors_hooks(
        lambda t: seen.append(t) or pack(t), lambda t: back.append(t) or unpack(t)
    ):
        x = F.gelu(h)
        assert not is_recomputed(x)
        layer()(x)
    assert not back
    assert any(t.data_ptr() == x.data_ptr() for t in seen)


def test_what_other_hooks_packed_is_not_used() -> None:
    back: list[Any] = []
    with saved_tensors_hooks(lambda t: t, lambda t: back.append(t) or t):
        x = F.gelu(hidden())
    assert not is_recomputed(x)
    y = F.gelu(hidden())
    with saved_tensors_hooks(lambda t: t, lambda t: back.append(t) or t):
        assert not is_recomputed(y)
    assert not back


def test_writes_to_what_hooks_packed_are_an_error() -> None:
    """Although autograd does not check it."""
    net = layer()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        h = hidden() * 1
        y = net(F.gelu(h))
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(y).backward()


def test_memory_moved_elsewhere_by_hooks() -> None:
    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        with save_on_cpu():
            return gradients(net, before, h)

    same(rms_norm, hidden(), run)


@pytest.mark.parametrize("kind", [rms_norm, gelu, WAYS["layer norm"][0], attention])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_the_network_twice(reentrant: bool, kind: Any) -> None:
    """Not more often, wherever the border is."""
    calls = []

    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        def whole(h: Tensor) -> Tensor:
            calls.append(1)
            return net(before(h))

        def first(h: Tensor) -> Tensor:
            calls.append(1)
            return before(h)

        one = checkpoint(whole, h, use_reentrant=reentrant)
        other = net(checkpoint(first, h, use_reentrant=reentrant))
        (weighted(one) + weighted(other)).backward()
        return [p.grad for p in net.parameters()]

    same(kind, hidden(), run)
    assert len(calls) == 8


def test_transforms_and_modes_are_left_to_autograd() -> None:
    h = hidden()
    x = F.gelu(h)
    with FlopCounterMode(display=False):
        assert not is_recomputed(x)
    assert not torch.func.vmap(lambda _: torch.tensor(is_recomputed(x)))(torch.ones(2)).any()
    assert is_recomputed(x)


def test_a_batch_of_gradients() -> None:
    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        x = before(h)
        y = net(x) + net(2 * x)
        many = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad(y, [h, *net.parameters()], many, is_grads_batched=True)

    same(rms_norm, hidden(), run)


def test_backward_in_other_threads_and_at_once() -> None:
    h, net = hidden(), layer()
    x = rms_norm(h)
    y = weighted(net(x)) + weighted(net(x))
    expected = torch.autograd.grad(y, [h, net.lora_A], retain_graph=True)
    found: list[Any] = []

    def run() -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(y, [h, net.lora_A], retain_graph=True))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(a, b) for some in found for a, b in zip(some, expected, strict=True))


def test_layers_with_one_input_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if each of them casts it; and the value is gone after the backward pass."""
    made: list[Tensor] = []
    take = recomputed._Shared.take

    def counted(shared: Any, leaves: Any) -> Tensor:
        compute = shared.compute
        shared.compute = lambda leaves: (made.append(compute(leaves)), made[-1])[1]
        try:
            return take(shared, leaves)
        finally:
            shared.compute = compute

    monkeypatch.setattr(recomputed._Shared, "take", counted)
    nets = [layer(torch.float32) for _ in range(3)]
    for autocasts in (False, True):
        made.clear()
        h = hidden(dtype=torch.float32)
        with torch.autocast("cpu", enabled=autocasts):
            x = F.layer_norm(h, h.shape[-1:])
            y = sum(weighted(net(x).float()) for net in nets)
        y.backward()
        assert len(made) == 1
        assert recomputed._HERE.held() is None or recomputed._HERE.held().computed is None


def test_a_backward_pass_under_another_autocast() -> None:
    def run(net: nn.Module, before: Any, h: Tensor) -> Any:
        with torch.autocast("cpu"):
            y = weighted(net(before(h)).double())
        with torch.autocast("cpu", torch.float16):
            return torch.autograd.grad(y, [h, *net.parameters()])

    h = hidden(dtype=torch.float32)
    ours, theirs = (run(layer(torch.float32, on), gelu, h) for on in (True, False))
    assert all(map(torch.equal, ours, theirs))


def test_without_hooks_nothing_is_packed() -> None:
    """Where this fails inputs are kept, which takes memory."""
    assert not autograd.hides_hooks()


@pytest.mark.parametrize("gone", ["_top_hooks", "_tells_hooks"])
def test_without_knowing_of_hooks_inputs_are_kept(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, gone, None)
    assert not is_recomputed(F.gelu(hidden()))


class Hollow:
    """A node without private parts."""

    def name(self) -> str:
        return "GeluBackward0"


@pytest.mark.parametrize(
    "ask",
    [
        lambda node: autograd.kept_by(node, "self"),
        lambda node: autograd.argument(node, "approximate"),
        lambda node: autograd.output_of(node, 0),
        autograd.number_of,
    ],
)
def test_what_a_node_does_not_tell_is_unknown(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(autograd.Unknown):
        ask(Hollow())
    ask(F.gelu(hidden()).grad_fn)


def test_a_rule_for_another_meaning_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a version of torch kept something else under a known name."""
    monkeypatch.setitem(RULES, "GeluBackward0", RULES["SiluBackward0"])
    h = hidden()
    assert not is_recomputed(F.gelu(h))
    same(gelu, h)


def test_small_inputs_and_dear_ways_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = F.mish(hidden())
    monkeypatch.setattr(recomputed, "FEW", x.numel())
    assert keep(x, 1000, Ways())[0] is AS_IT_IS
    monkeypatch.setattr(recomputed, "FEW", x.numel() - 1)
    monkeypatch.setattr(recomputed, "WORK", 30)
    assert keep(x, 1000, Ways())[0] is not AS_IT_IS
    assert keep(x, 100, Ways())[0] is AS_IT_IS, "a layer with few outputs"
    assert keep(F.relu6(x), 100, Ways())[0] is not AS_IT_IS
    monkeypatch.setattr(recomputed, "FEW", 0)
    first = F.relu6(x)[:, 0] * 1
    assert keep(first, 100, Ways())[0] is AS_IT_IS, "a small part of what would be computed"


def test_the_setting_keeps_inputs_in_all_layers() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Conv1d(5, 4, 1))
    for on in (True, False):
        deltas = [delta for _, _, delta in named_deltas(adapted(net, recompute=on))]
        assert [delta.recompute_inputs for delta in deltas] == [on, on]
        again = copy.deepcopy(adapted(net, recompute=on))
        assert all(delta.recompute_inputs is on for _, _, delta in named_deltas(again))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (4, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), (4, 6, 7, 7)),
    "2d, stride": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (4, 6, 7, 7)),
    "2d, pointwise": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 7, 7)),
}


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.4}], ids=["", "dropout"])
@pytest.mark.parametrize("form", [None, "side", "merged", "whole"])
def test_convolutions(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    settings: dict[str, Any],
    form: Any,
) -> None:
    torch.manual_seed(0)
    base = make().double()
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    assert_convolved_alike(base, hidden(*shape), settings, form)
    assert_convolved_alike(base, hidden(*shape).contiguous(memory_format=layout), settings, form)


def assert_convolved_alike(base: nn.Module, h: Tensor, settings: dict[str, Any], form: Any) -> None:
    assert is_recomputed(F.silu(h))
    ours, theirs = (
        gradients(adapted(base, recompute=on, rank=2, form=form, **settings), F.silu, h)
        for on in (True, False)
    )
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str) -> None:
    """On linear layers and convolutions, with dropout where there is some."""
    torch.manual_seed(0)
    for base, h in (
        (nn.Linear(WIDTH, 8).double(), hidden()),
        (nn.Conv2d(6, 4, 3, padding=1).double(), hidden(2, 6, 5, 5)),
    ):
        ours, theirs = (
            gradients(adapted(base, method, recompute=on).train(), rms_norm, h)
            for on in (True, False)
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# Rows of a linear layer that are trained have outputs of their own, made from the whole input.
@pytest.mark.parametrize("case", [
    case for case in CASES.values()
    if case.method not in ("dora", "ia3", "boft", "road", "trainable_tokens")
    or case.settings.get("feedforward")
], ids=lambda case: f"{case.method} {case.settings}")  # fmt: skip
def test_no_method_keeps_inputs_or_weights(case: MethodCase) -> None:
    """With any of its settings; those left out change outputs, and keep these."""
    base = nn.Linear(256, 32)
    h = hidden(1000, 256).float().detach().requires_grad_()
    net = adapted(base, case.method, **case.settings)
    ours = size(net(F.gelu(h)), net)
    frozen = size(base.requires_grad_(False)(F.gelu(h)), base)
    assert ours <= frozen + h.nbytes / 3, "what is of the size of the delta alone"


@pytest.mark.parametrize(("base", "h"), [
    (nn.Linear(WIDTH, 8).double(), hidden()),
    (nn.Conv2d(6, 4, 1).double(), hidden(2, 6, 5, 5)),
])  # fmt: skip
def test_scaled_inputs_and_their_derivatives(base: Any, h: Tensor) -> None:
    net = adapted(base, "ia3", feedforward=True)
    factor = net.ia3_l.reshape(-1, *[1] * (base.weight.dim() - 2))

    wanted = [h, net.ia3_l]
    plain = copy.deepcopy(base).requires_grad_(False)
    found = derivatives(lambda: net(F.gelu(h)), wanted)
    expected = derivatives(lambda: plain(F.gelu(h) * factor), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dora", "ia3"])
@pytest.mark.parametrize("overwritten", [False, True])
def test_scaled_outputs_are_kept_without_the_input(method: str, overwritten: bool) -> None:
    """Which is computed again if the next operation has overwritten the output."""
    base = nn.Linear(WIDTH, 8).double()
    h = hidden()

    def run(net: nn.Module) -> tuple[int, list[Tensor]]:
        y = net(F.gelu(h))
        y = y.mul_(2) if overwritten else y * 1
        return size(y, net), list(torch.autograd.grad(weighted(y), [h, *net.parameters()]))

    ours, theirs = (run(adapted(base, method, recompute=on)) for on in (True, False))
    assert theirs[0] - ours[0] >= h.numel() * 8 - 32
    assert all(map(torch.equal, ours[1], theirs[1]))


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_scaled_outputs_can_be_differentiated_twice(method: str) -> None:
    def run(net: nn.Module) -> Any:
        h = hidden(4, WIDTH)
        x = F.gelu(h)
        wanted = [x, *net.parameters()]
        first = torch.autograd.grad(weighted(net(x)), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [h, *wanted])

    base = nn.Linear(WIDTH, 8).double()
    ours, theirs = (run(adapted(base, method, recompute=on)) for on in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_users_can_see_what_layers_keep() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.q, self.k, self.conv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.conv(F.gelu(self.q(x)[:, :5] + self.k(x[:, :5])))

    x = torch.randn(8, 6, 8)
    expected = {"first": "input", "q": "NativeLayerNorm", "k": "Slice", "conv": "Gelu"}
    for method in ("lora", "dora"):
        net = adapted(Block(), method, rank=2)
        assert kept_inputs(net, x) == expected
        assert net.training
    net = adapted(Block(), recompute=False, rank=2)
    assert kept_inputs(net, x) == dict.fromkeys(expected, "input")
    assert not recomputed.WATCHING
