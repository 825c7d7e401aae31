"""Fast paths of transposed, grouped and depthwise convolutions, against the formula written out.

The reference is torch's own convolution with ``W + s B A``, put together here group by group, and
differentiated by plain autograd.
"""

# ruff: noqa: B023 - functions are called in the turn of the loop that makes them

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from gift.kernels import depthwise, recomputed
from gift.kernels.conv_layers import is_usual
from gift.kernels.cost_model import FORMS, Plan
from gift.kernels.depthwise import gradient_of_filters
from gift.kernels.geometry import Geometry
from gift.kernels.low_rank_conv import LowRankConv
from gift.utils.info import forms, kept_inputs
from tests.common import derivatives
from tests.test_fast_conv import (
    CHOICES,
    CONVOLVE,
    LAYOUTS,
    adapted,
    channels_last,
    cuts_of,
    delta_of,
    step,
    trained,
    wrong,
)
from tests.test_recomputed import not_on_old

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

SPREAD = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# groups, channels out, channels in, sizes, kernel, stride, padding, dilation, output padding
Case = tuple[int, int, int, tuple[int, ...], Any, Any, Any, Any, Any]
GROUPED: list[Case] = [
    (2, 4, 6, (9,), (3,), (1,), (1,), (1,), ()),
    (2, 4, 6, (9,), (4,), (2,), (1,), (2,), ()),
    (3, 6, 3, (7,), (1,), (2,), (0,), (1,), ()),
    (2, 6, 4, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), ()),
    (2, 6, 4, (6, 7), (3, 2), (2, 1), (1, 0), (1, 2), ()),
    (2, 6, 4, (6, 7), (1, 1), (1, 1), (0, 0), (1, 1), ()),
    (2, 6, 4, (6, 7), (1, 1), (2, 2), (1, 1), (1, 1), ()),
    (4, 4, 4, (6, 5), (4, 4), (1, 1), (2, 2), (1, 1), ()),
    (4, 8, 4, (6, 5), (5, 3), (2, 2), (2, 1), (1, 1), ()),
    (2, 4, 4, (3, 4, 4), (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1), ()),
]
SPREADING: list[Case] = [
    (1, 5, 4, (7,), (3,), (2,), (1,), (1,), (1,)),
    (1, 5, 4, (7,), (1,), (1,), (0,), (1,), ()),
    (2, 4, 6, (5,), (4,), (3,), (0,), (2,), (2,)),
    (1, 5, 4, (4, 5), (2, 2), (2, 2), (0, 0), (1, 1), ()),
    (1, 3, 4, (4, 5), (4, 4), (2, 2), (1, 1), (1, 1), ()),
    (1, 3, 4, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), ()),
    (1, 3, 4, (4, 5), (3, 2), (2, 1), (1, 0), (1, 2), (1, 0)),
    (1, 3, 4, (4, 5), (1, 1), (2, 2), (0, 0), (1, 1), (1, 1)),
    (1, 3, 4, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), ()),
    (1, 3, 4, (4, 5), (3, 3), (1, 1), (1, 1), (2, 2), (1, 1)),  # as large as the stride
    (2, 6, 4, (4, 5), (3, 3), (2, 2), (1, 1), (1, 1), (1, 0)),
    (3, 3, 3, (4, 5), (4, 4), (2, 2), (1, 1), (1, 1), ()),
    (2, 4, 2, (4, 5), (4, 4), (2, 2), (1, 1), (1, 1), ()),
    (1, 3, 2, (3, 2, 3), (2, 2, 3), (2, 1, 2), (0, 1, 0), (1, 1, 1), (1, 0, 0)),
    (2, 4, 2, (3, 2, 3), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), ()),
]
CASES = [*((case, False) for case in GROUPED), *((case, True) for case in SPREADING)]


def geometry_of(case: Case, transposed: bool) -> Geometry:
    groups, outputs, inputs, _, kernel, stride, padding, dilation, more = case
    shape = (outputs, inputs // groups, *kernel)
    return Geometry(shape, stride, padding, dilation, groups, transposed, more)


def tensors_of(
    case: Case, transposed: bool, cuts: int, rank: int = 2, batch: int = 2
) -> list[Tensor]:
    """Input, weight, bias and factors, in double precision."""
    groups, outputs, inputs, sizes, kernel, *_ = case
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    columns = inputs // groups * torch.Size(kernel).numel() // cuts
    several = () if groups == 1 else (groups,)
    shapes: list[Any] = [(batch, inputs, *sizes), (*shape, *kernel), (outputs,)]
    shapes += [(*several, outputs // groups * cuts, rank), (*several, rank, columns)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def whole_delta(weight: Tensor, left: Tensor, right: Tensor, groups: int, turned: bool) -> Tensor:
    """What the factors of all groups change, as the layer holds its weight."""
    if left.dim() == 2:
        left, right = left[None], right[None]
    parts = []
    for own, b, a in zip(weight.chunk(groups), left, right, strict=True):
        shape = own.transpose(0, 1).shape if turned else own.shape
        part = delta_of(shape, b, a)
        parts.append(part.transpose(0, 1) if turned else part)
    return torch.cat(parts)


def by_formula(
    case: Case, transposed: bool, tensors: list[Tensor], dropped: Tensor | None = None
) -> Tensor:
    x, weight, bias, left, right = tensors
    groups, *_, stride, padding, dilation, more = case
    delta = whole_delta(weight, left, right, groups, transposed)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if transposed:
            apply = SPREAD[x.dim() - 3]
            return apply(x, weight, bias, stride, padding, more or 0, groups, dilation)
        return CONVOLVE[x.dim() - 3](x, weight, bias, stride, padding, dilation, groups)

    if dropped is None:
        return convolve(x, weight + delta, bias)
    return convolve(x, weight, bias) + convolve(dropped, delta, None)


def plans(geometry: Geometry) -> Iterator[Plan]:
    """All that are valid."""
    for form in FORMS:
        for as_product in (False, True):
            if geometry.pointwise <= as_product <= (geometry.pointwise or geometry.shifts):
                yield Plan(form, as_product)


def all_cases() -> Iterator[tuple[Case, bool, int, Geometry]]:
    for case, transposed in CASES:
        for cuts in {cuts_of(case[4], layout) for layout in LAYOUTS}:
            yield case, transposed, cuts, geometry_of(case, transposed)


MEMORY = {"contiguous": lambda x: x, "channels_last": channels_last}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("batch", [2, 1])
def test_every_geometry_in_every_plan(memory: str, batch: int) -> None:
    failures = []
    for case, transposed, cuts, geometry in all_cases():
        given = tensors_of(case, transposed, cuts, batch=batch)
        given[:2] = [MEMORY[memory](tensor) for tensor in given[:2]]
        leaves = [tensor.requires_grad_() for tensor in given if tensor is not given[1]]
        expected = derivatives(lambda: by_formula(case, transposed, given), leaves)
        for chosen in plans(geometry):
            call = lambda: LowRankConv.apply(*given, 1, None, geometry, chosen)  # noqa: E731
            if problems := wrong(step(call, leaves), expected[:5], 1e-12):
                failures.append(f"{case} {transposed} {cuts} {chosen}: {problems}")
            if problems := wrong(derivatives(call, leaves), expected, 1e-11):
                failures.append(f"{case} {transposed} {cuts} {chosen}, second: {problems}")
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:20])


def test_positions_are_those_of_the_output() -> None:
    for case, transposed in CASES:
        x, weight, bias, *_ = tensors_of(case, transposed, 1)
        geometry = geometry_of(case, transposed)
        y = geometry.apply(x, weight, bias)
        assert geometry.positions(case[3]) == y.shape[2:], case


def test_what_the_delta_sees_may_be_another_input() -> None:
    failures = []
    for case, transposed, cuts, geometry in all_cases():
        given = tensors_of(case, transposed, cuts)
        dropped = torch.randn_like(given[0])
        wanted = [tensor.requires_grad_() for tensor in (given[0], dropped, *given[3:])]
        halved = [*given[:3], given[3] * 0.5, given[4]]
        expected = step(lambda: by_formula(case, transposed, halved, dropped), wanted)
        for chosen in plans(geometry):
            if chosen.form == "side":
                call = lambda: LowRankConv.apply(*given, 0.5, dropped, geometry, chosen)  # noqa: E731
                if problems := wrong(step(call, wanted), expected, 1e-12):
                    failures.append(f"{case} {transposed} {cuts} {chosen}: {problems}")
    assert not failures, "\n".join(failures[:20])


def test_any_tensor_may_be_frozen() -> None:
    failures = []
    for case, transposed, cuts, geometry in all_cases():
        given = tensors_of(case, transposed, cuts)
        for frozen in range(4):
            leaves = [tensor for tensor in given if tensor is not given[1]]
            for number, tensor in enumerate(leaves):
                tensor.requires_grad_(number != frozen)
            wanted = [tensor for tensor in leaves if tensor.requires_grad]
            expected = step(lambda: by_formula(case, transposed, given), wanted)
            for chosen in plans(geometry):
                call = lambda: LowRankConv.apply(*given, 1, None, geometry, chosen)  # noqa: E731
                if problems := wrong(step(call, wanted), expected, 1e-12):
                    failures.append(f"{case} {transposed} {cuts} {chosen} {frozen}: {problems}")
    assert not failures, "\n".join(failures[:20])


# --- layers --------------------------------------------------------------------------------------

LAYERS: list[tuple[int, bool, dict[str, Any]]] = [
    (1, True, {"kernel_size": 4, "stride": 2, "padding": 1}),
    (2, True, {"kernel_size": 2, "stride": 2}),
    (2, True, {"kernel_size": 3, "stride": (2, 1), "output_padding": (1, 0), "bias": False}),
    (2, True, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2}),
    (2, True, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4}),
    (3, True, {"kernel_size": 2, "stride": 2}),
    (1, False, {"kernel_size": 4, "groups": 2, "padding": "same"}),
    (2, False, {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "circular"}),
    (2, False, {"kernel_size": 7, "groups": 4, "padding": 3}),
    (2, False, {"kernel_size": 5, "groups": 4, "stride": 2, "padding_mode": "reflect"}),
    (3, False, {"kernel_size": 2, "groups": 2}),
]
SIZES = {1: (11,), 2: (8, 9), 3: (4, 5, 4)}


def layer_of(axes: int, transposed: bool, options: dict[str, Any], dtype: Any = None) -> Any:
    kinds = TRANSPOSED if transposed else PLAIN
    return kinds[axes - 1](4, 8, dtype=dtype or torch.float64, **options)


def with_weight(base: Any, net: Any, x: Tensor, *args: Any) -> Tensor:
    """The plain layer with the effective weight."""
    frozen, method = net._parameters["weight"], net._gift_weights["weight"].method
    turned = isinstance(base, TRANSPOSED)
    delta = whole_delta(frozen, net.lora_B, net.lora_A, base.groups, turned)
    given = {"weight": frozen + method.scaling * delta}
    if base.bias is not None:
        given["bias"] = net.bias
    return functional_call(base, given, (x, *args))


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_in_every_form(form: Any, layout: str) -> None:
    failures = []
    for axes, transposed, options in LAYERS:
        base = layer_of(axes, transposed, options)
        net = adapted(base, rank=2, clip_rank=True, lora_alpha=3.0, conv_layout=layout, form=form)
        for batch in ((2,), (1,), (), (0,)):
            if batch == (0,) and options.get("padding_mode"):
                continue  # torch pads no empty batch
            x = torch.randn(*batch, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)
            wanted = [x, *trained(net)]
            expected = step(lambda: with_weight(base, net, x), wanted)
            if problems := wrong(step(lambda: net(x), wanted), expected, 1e-12):
                failures.append(f"{options} {batch}: {problems}")
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("given", [(16, 15), (2, 8, 16, 16), (15, 16)], ids=str)
def test_the_size_of_an_output_that_is_asked_for(given: tuple[int, ...]) -> None:
    base = layer_of(2, True, {"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    for form in CHOICES:
        net = adapted(base, rank=2, form=form)
        wanted = [x, *trained(net)]
        found = step(lambda: net(x, output_size=given), wanted)
        assert not wrong(found, step(lambda: with_weight(base, net, x, given), wanted), 1e-12)
        assert found[0].shape[-2:] == given[-2:]
        with pytest.raises(ValueError, match="valid sizes range from"):
            net(x, output_size=(18, 18))


def test_float32_and_the_gradient_as_a_convolution() -> None:
    """Of filters of more than 3 x 3, that is the path that layers take."""
    failures = []
    for (axes, transposed, options), layout in itertools.product(LAYERS, LAYOUTS):
        base = layer_of(axes, transposed, options, torch.float32)
        net = adapted(base, rank=2, clip_rank=True, conv_layout=layout, std=0.1)
        x = torch.randn(3, 4, *SIZES[axes], requires_grad=True)
        wanted = [x, *trained(net)]
        expected = step(lambda: with_weight(base, net, x), wanted)
        if problems := wrong(step(lambda: net(x), wanted), expected, 2e-5):
            failures.append(f"{options} {layout}: {problems}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(layout: str) -> None:
    """With the same mask, the output and gradients of the formula; none in eval."""
    for (axes, transposed, options), form in itertools.product(LAYERS, CHOICES):
        base = layer_of(axes, transposed, options)
        settings = {"conv_layout": layout, "form": form, "lora_dropout": 0.4, "rank": 2}
        net = adapted(base, clip_rank=True, **settings)
        frozen, turned = net._parameters["weight"], isinstance(base, TRANSPOSED)
        x = torch.randn(2, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)

        def plainly(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
            none = torch.zeros(base.out_channels, dtype=x.dtype) if bias is None else bias
            given = {"weight": weight} | ({} if base.bias is None else {"bias": none})
            return functional_call(base, given, (x,))

        def formula() -> Tensor:
            change = whole_delta(frozen, net.lora_B, net.lora_A, base.groups, turned)
            return plainly(x, frozen, net.bias) + plainly(F.dropout(x, 0.4), change, None)

        results = []
        for call in (lambda: net(x), formula):
            torch.manual_seed(5)
            results.append(step(call, [x, net.lora_B, net.lora_A]))
        assert not wrong(*results, 1e-11), (options, form)
        net.eval()
        torch.testing.assert_close(net(x), with_weight(base, net, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_autocast_and_16_bits(layer: Any, dropout: float) -> None:
    axes, transposed, options = layer
    base = layer_of(axes, transposed, options, torch.float32)
    net = adapted(base, rank=2, clip_rank=True, lora_dropout=dropout, std=0.1).eval()
    x = torch.randn(3, 4, *SIZES[axes])
    exact = with_weight(base, net, x)
    expected = torch.autograd.grad(exact.sum(), trained(net))
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = net(x), base(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.02 * exact.norm()
    for one, other in zip(
        torch.autograd.grad(found.float().sum(), trained(net)), expected, strict=True
    ):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.05 * other.norm()
    half = net.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_checkpoints_transforms_and_compilers(layer: Any) -> None:
    axes, transposed, options = layer
    base = layer_of(axes, transposed, options)
    net, x = adapted(base, rank=2, clip_rank=True), torch.randn(2, 4, *SIZES[axes]).double()
    own = {name: p for name, p in net.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(with_weight(base, net, x).square().sum(), own.values())
    again = checkpoint(net, x, use_reentrant=False).square().sum()
    assert not wrong(torch.autograd.grad(again, own.values()), expected, 1e-11)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(own, x)
    assert not wrong(found.values(), expected, 1e-11)
    each = vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x)
    assert not wrong([g.sum(0) for g in each.values()], expected, 1e-11)
    _, moved = torch.func.jvp(lambda x: net(x), (x,), (torch.ones_like(x),))
    of_formula = torch.func.jvp(lambda x: with_weight(base, net, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(moved, of_formula[1], rtol=1e-11, atol=1e-11)
    y = net(x)
    batch = torch.randn(3, *y.shape, dtype=y.dtype)
    rows = torch.autograd.grad(y, own.values(), batch, is_grads_batched=True, retain_graph=True)
    for number, g in enumerate(batch):
        one = torch.autograd.grad(y, own.values(), g, retain_graph=True)
        assert not wrong([row[number] for row in rows], one, 1e-11)


def test_compiled_in_one_graph() -> None:
    for axes, transposed, options in LAYERS:
        if options.get("padding_mode"):
            continue
        torch._dynamo.reset()
        base = layer_of(axes, transposed, options)
        net, x = adapted(base, rank=2, clip_rank=True), torch.randn(2, 4, *SIZES[axes]).double()
        expected = torch.autograd.grad(with_weight(base, net, x).square().sum(), trained(net))
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
        found = torch.autograd.grad(y.square().sum(), trained(net))
        assert not wrong(found, expected, 1e-11), options


# --- layers that go the general way --------------------------------------------------------------


class Longer(nn.ConvTranspose2d):
    """Chooses another output padding."""

    def _output_padding(self, *args: Any, **kwargs: Any) -> list[int]:
        super()._output_padding(*args, **kwargs)
        return [1, 1]


class Doubling(nn.ConvTranspose2d):
    """Does more than to convolve."""

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return 2 * super().forward(input, output_size) + self.weight.sum()


class Quiet(nn.ConvTranspose2d):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("cls", [Longer, Doubling, Quiet])
def test_subclasses(cls: type[nn.ConvTranspose2d], form: Any) -> None:
    base = cls(4, 8, 3, stride=2, dtype=torch.float64)
    net = adapted(base, rank=2, form=form)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *trained(net)]
    expected = step(lambda: with_weight(base, net, x), wanted)
    assert not wrong(step(lambda: net(x), wanted), expected, 1e-12)


def test_what_a_plain_layer_refuses_is_refused() -> None:
    base = layer_of(2, True, {"kernel_size": 3})
    net = adapted(base)
    for shape, dtype in [
        ((2, 4, 6, 6), torch.float32),
        ((2, 3, 6, 6), torch.float64),
        ((6, 6), torch.float64),
    ]:
        x = torch.randn(shape, dtype=dtype)
        with pytest.raises(RuntimeError) as plain:
            base(x)
        with pytest.raises(RuntimeError) as found:
            net(x)
        assert str(found.value).partition("\n")[0] == str(plain.value).partition("\n")[0]


def test_an_effective_weight_in_its_turn() -> None:
    """Methods without a fast path of their own: both orders, and inputs that are computed again."""
    failures = []
    for (axes, transposed, options), method in itertools.product(LAYERS, ("fourierft", "shira")):
        base = layer_of(axes, transposed, options)
        net = adapted(base, method, std=0.0)
        with torch.no_grad():
            for parameter in trained(net):
                parameter += 0.3 * torch.randn_like(parameter)
        assert is_usual(net)
        x = torch.randn(2, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)
        wanted = [x, *trained(net)]
        delta = net._gift_weights["weight"]

        def formula() -> Tensor:
            weight = delta.weight(net, net._parameters["weight"])
            given = {"weight": weight} | ({} if base.bias is None else {"bias": net.bias})
            return functional_call(base, given, (x,))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recomputed, "FEW", 0)
            y = net(x)
            assert options.get("padding_mode") or "EffectiveConv" in y.grad_fn.name()
            found = derivatives(lambda: net(x), wanted)
        if problems := wrong(found, derivatives(formula, wanted), 1e-11):
            failures.append(f"{method} {options}: {problems}")
    assert not failures, "\n".join(failures)


# --- what is chosen, and what is kept ------------------------------------------------------------


@not_on_old
@pytest.mark.parametrize("layer", [
    nn.ConvTranspose2d(8, 32, 2, stride=2), nn.Conv2d(8, 32, 3, groups=2),
    nn.Conv2d(8, 8, 9, groups=8),
], ids=str)  # fmt: skip
def test_inputs_are_computed_again(layer: nn.Module) -> None:
    net = adapted(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), layer), rank=1)
    images = torch.randn(4, 3, 32, 32)
    assert kept_inputs(net, images)["2"] == "Gelu"


def test_forms_follow_the_width_of_groups() -> None:
    """A delta as large as its weight goes through the weight, a small one beside it."""
    net = nn.Sequential(
        nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
        nn.Conv2d(64, 64, 3, groups=32),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 256, 5, groups=2),
    )
    net = adapted(net, rank=1)
    chosen = forms(net, torch.randn(4, 64, 16, 16))
    assert chosen["0"] != "whole"
    assert chosen["1"] == chosen["2"] == "whole"
    assert chosen["3"] != "whole"


# --- the gradient of depthwise filters -----------------------------------------------------------


def test_gradient_of_filters() -> None:
    """Exactly, for all strides, dilations, paddings, multiples of channels."""
    failures = []
    for axes, kernel, stride, padding, dilation, more in itertools.product(
        (1, 2), (1, 3, 4, 7), (1, 2, 3), (0, 1, 3, 5), (1, 2), (1, 2)
    ):
        sizes = (9, 11)[:axes]
        weight = torch.randn(3 * more, 1, *[kernel] * axes, dtype=torch.float64).requires_grad_()
        if any(n + 2 * padding < dilation * (kernel - 1) + 1 for n in sizes):
            continue
        x = torch.randn(2, 3, *sizes, dtype=torch.float64)
        y = CONVOLVE[axes - 1](x, weight, None, stride, padding, dilation, 3)
        g = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, weight, g)
        settings = [(value,) * axes for value in (kernel, padding, stride, dilation)]
        if problems := wrong([gradient_of_filters(g, x, *settings)], [expected], 1e-12):
            failures.append(f"{axes} {settings} {more}: {problems}")
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize("transposed", [False, True])
def test_large_depthwise_filters_take_that_gradient(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 32 bits and without a graph; not where a multiple of channels has none of its own."""
    taken: list[bool] = []

    def noted(*args: Any) -> bool:
        taken.append(is_quicker(*args))
        return taken[-1]

    is_quicker = depthwise.is_quicker
    monkeypatch.setattr("gift.kernels.geometry.is_quicker", noted)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    for kernel, dtype, expected in (
        (7, torch.float32, True), (3, torch.float32, False), (7, torch.float64, False),
    ):  # fmt: skip
        base = kind(4, 4, kernel, groups=4, padding=kernel // 2, dtype=dtype)
        net = adapted(base, rank=1)
        x = torch.randn(2, 4, 9, 9, dtype=dtype)
        taken.clear()
        found = step(lambda: net(x), trained(net))
        assert taken == [expected], (kernel, dtype)
        assert not wrong(found, step(lambda: with_weight(base, net, x), trained(net)), 2e-5)
