"""The fast path of convolutions with a low-rank delta, against the formula written out.

The reference is the plain layer, called with ``W + s B A``: the product is put together here, piece
by piece, and plain autograd differentiates it.
"""

# ruff: noqa: B023 - functions are called in the turn of the loop that makes them

import copy
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.kernels import conv_as_gemm
from gift.kernels.cost_model import FORMS, Plan
from gift.kernels.geometry import Geometry
from gift.kernels.low_rank_conv import LowRankConv
from tests.common import bytes_kept, per_example_gradients, weighted

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.as_large,
]

LAYOUTS = ("balanced", "out_as_h")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
CHOICES = (*FORMS, None)
NAMES = ("x", "lora_B", "lora_A")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

layouts = pytest.mark.parametrize("layout", LAYOUTS)
forms = pytest.mark.parametrize("form", FORMS)


def cuts_of(kernel: tuple[int, ...], layout: str) -> int:
    """Rows of the matrix for each output."""
    return kernel[0] if layout == "balanced" and len(kernel) > 1 else 1


def delta_of(shape: Any, left: Tensor, right: Tensor) -> Tensor:
    """``left right`` as a weight: the rows of an output are the pieces of its filter, in order."""
    cuts = len(left) // shape[0]
    pieces = [left[cut::cuts] @ right for cut in range(cuts)]
    return torch.cat(pieces, 1).reshape(shape)


def adapted(base: nn.Module, method: str = "lora", std: float = 0.3, **settings: Any) -> Any:
    """A copy of `base` with a delta on all of it, as after some training."""
    net = copy.deepcopy(base)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method, **settings))]))
    with torch.no_grad():
        for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
            if "lora_" in name:
                tensor += std * torch.randn_like(tensor)
    return net


def call_with_delta(base: nn.Module, net: Any, x: Tensor, factors: Any = None) -> Tensor:
    """The plain layer with the effective weight; biases are those of `net`."""
    left, right = factors or (net.lora_B, net.lora_A)
    frozen = net._parameters["weight"]
    weight = frozen + net._gift_weights["weight"].method.scaling * delta_of(
        frozen.shape, left, right
    )
    given = {"weight": weight} | ({} if net.bias is None else {"bias": net.bias})
    return functional_call(base, given, (x,))


def wrong(found: Iterable[Any], expected: Iterable[Any], tolerance: float) -> list[str]:
    """What differs, in a few words, relative to the largest element."""
    problems = []
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one is None or other is None:
            if one is not other:
                problems.append(f"{i}: {one if other is None else other} against none")
        elif one.shape != other.shape or one.dtype != other.dtype:
            problems.append(f"{i}: {one.shape} {one.dtype} against {other.shape} {other.dtype}")
        elif one.numel() and not (off := (one - other).abs().max()) <= tolerance * (
            1 + other.abs().max()
        ):
            problems.append(f"{i}: off by {off:.1e} of {other.abs().max():.1e}")
    return problems


def step(call: Callable[[], Tensor], wanted: list[Tensor]) -> list[Any]:
    """The output, and gradients."""
    y = call()
    return [y.detach(), *torch.autograd.grad(weighted(y), wanted, allow_unused=True)]


def compare(base: nn.Module, net: Any, x: Tensor, tolerance: float | None = None) -> list[str]:
    """What differs between `net` and the formula, in the output and all gradients."""
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    found = step(lambda: net(x), wanted)
    expected = step(lambda: call_with_delta(base, net, x), wanted)
    return wrong(found, expected, tolerance or TOLERANCE[x.dtype])


# --- geometries, at the level of the function ----------------------------------------------------

# channels out, channels in, sizes, kernel, stride, padding, dilation
Case = tuple[int, int, tuple[int, ...], Any, Any, Any, Any]
GEOMETRIES: list[Case] = [
    (5, 4, (9,), (3,), (1,), (1,), (1,)),
    (5, 4, (9,), (1,), (1,), (0,), (1,)),
    (5, 4, (9,), (1,), (2,), (0,), (1,)),
    (3, 2, (7,), (4,), (1,), (5,), (1,)),
    (3, 5, (11,), (7,), (3,), (3,), (1,)),
    (4, 3, (12,), (2,), (1,), (0,), (2,)),
    (5, 4, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, 4, (6, 7), (3, 3), (1, 1), (0, 0), (1, 1)),
    (5, 4, (6, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    (5, 4, (6, 7), (3, 3), (2, 1), (1, 0), (1, 1)),
    (5, 4, (6, 7), (3, 3), (1, 1), (4, 5), (1, 1)),
    (5, 4, (6, 7), (3, 3), (1, 1), (1, 4), (1, 1)),
    (5, 4, (8, 7), (3, 3), (1, 1), (2, 2), (2, 2)),
    (5, 4, (8, 7), (3, 3), (1, 1), (1, 0), (1, 2)),
    (5, 4, (8, 9), (3, 3), (2, 2), (2, 2), (2, 2)),
    (5, 4, (6, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 4, (6, 7), (1, 1), (1, 1), (1, 2), (1, 1)),
    (5, 4, (6, 7), (1, 1), (2, 2), (0, 0), (1, 1)),
    (5, 4, (6, 7), (1, 1), (2, 1), (0, 0), (1, 1)),
    (5, 4, (6, 7), (1, 1), (2, 2), (1, 1), (1, 1)),
    (3, 4, (6, 7), (2, 2), (1, 1), (0, 0), (1, 1)),
    (3, 4, (6, 7), (2, 2), (2, 2), (0, 0), (1, 1)),
    (3, 4, (6, 7), (4, 4), (1, 1), (2, 2), (1, 1)),
    (4, 5, (6, 7), (4, 2), (1, 1), (1, 1), (1, 1)),
    (4, 5, (6, 7), (3, 1), (1, 1), (1, 0), (1, 1)),
    (4, 5, (6, 7), (1, 3), (1, 1), (0, 1), (1, 1)),
    (4, 5, (6, 7), (3, 1), (2, 3), (0, 0), (1, 1)),
    (3, 3, (9, 8), (7, 7), (1, 1), (3, 3), (1, 1)),
    (3, 3, (9, 8), (7, 7), (2, 2), (3, 3), (1, 1)),
    (3, 1, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 1, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
    (3, 4, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 4, (1, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 2, (4, 5, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    (3, 4, (4, 5, 4), (3, 2, 1), (1, 1, 1), (0, 1, 2), (1, 1, 1)),
    (3, 4, (5, 4, 3), (3, 3, 3), (2, 1, 2), (1, 0, 1), (1, 1, 1)),
    (3, 4, (5, 5, 6), (2, 3, 2), (1, 1, 1), (1, 2, 0), (2, 1, 2)),
    (3, 4, (3, 3, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    (3, 4, (3, 4, 5), (1, 1, 1), (2, 1, 2), (0, 0, 0), (1, 1, 1)),
]


def tensors_of(case: Case, cuts: int, rank: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Input, weight, bias and factors."""
    outputs, inputs, sizes, kernel, *_ = case
    shape = (outputs, inputs, *kernel)
    columns = inputs * torch.Size(kernel).numel() // cuts
    shapes = [(batch, inputs, *sizes), shape, (outputs,), (outputs * cuts, rank), (rank, columns)]
    x, weight, bias, left, right = (torch.randn(s, dtype=dtype) for s in shapes)
    return [x, weight, bias, left, right]


def geometry_of(case: Case) -> Geometry:
    outputs, inputs, _, kernel, *rest = case
    return Geometry((outputs, inputs, *kernel), *rest)


def convolved(case: Case, tensors: list[Tensor], dropped: Tensor | None = None) -> Tensor:
    """By the formula."""
    x, weight, bias, left, right = tensors
    *_, stride, padding, dilation = case
    conv = CONVOLVE[x.dim() - 3]
    delta, rest = delta_of(weight.shape, left, right), (stride, padding, dilation)
    if dropped is None:
        return conv(x, weight + delta, bias, *rest)
    return conv(x, weight, bias, *rest) + conv(dropped, delta, None, *rest)


def plans(geometry: Geometry) -> Iterator[Plan]:
    """All that are valid."""
    for form in FORMS:
        for as_product in (False, True):
            if geometry.pointwise <= as_product <= (geometry.pointwise or geometry.stride_one):
                yield Plan(form, as_product)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers with the channels innermost, for any number of axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def sweep(dtype: torch.dtype, memories: Iterable[tuple[str, str]], batch: int = 2) -> list[str]:
    """Every geometry, layout and plan, with the memory formats of `x` and `W`."""
    failures = []
    for case, layout in itertools.product(GEOMETRIES, LAYOUTS):
        cuts = cuts_of(case[3], layout)
        if cuts == 1 and layout == "balanced":  # nothing is cut: the other layout
            continue
        given = tensors_of(case, cuts, 2, batch, torch.float64)
        leaves = [tensor.requires_grad_() for tensor in given if tensor is not given[1]]
        expected = step(lambda: convolved(case, given), leaves)
        geometry = geometry_of(case)
        for (of_x, of_w), plan in itertools.product(memories, plans(geometry)):
            x, weight, *rest = (tensor.detach().to(dtype) for tensor in given)
            x, weight = MEMORY[of_x](x), MEMORY[of_w](weight)
            own = [tensor.requires_grad_() for tensor in (x, *rest)]
            found = step(lambda: LowRankConv.apply(x, weight, *rest, 1, None, geometry, plan), own)
            same = [tensor.to(dtype) for tensor in expected]
            if problems := wrong(found, same, TOLERANCE[dtype]):
                failures.append(f"{case} {layout} {plan} x {of_x} W {of_w}: {problems}")
    return failures


FORMATS = [("contiguous",) * 2, ("channels_last",) * 2]


@pytest.mark.parametrize(("dtype", "memories", "batch"), [
    pytest.param(torch.float64, FORMATS, 2, id="float64"),
    pytest.param(torch.float64, [*zip(MEMORY, reversed(MEMORY), strict=True)], 2, id="mixed"),
    pytest.param(torch.float64, FORMATS, 1, id="batch of one"),
    pytest.param(torch.float32, FORMATS[:1], 2, id="float32"),
])  # fmt: skip
def test_every_geometry_in_every_plan(dtype: torch.dtype, memories: Any, batch: int) -> None:
    failures = sweep(dtype, memories, batch)
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:20])


def test_every_geometry_as_if_images_were_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifted images are added one after the other then, not in one operation."""
    monkeypatch.setattr(conv_as_gemm, "FEW", 0)
    failures = sweep(torch.float64, FORMATS[:1])
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:20])


SMALL: list[Case] = [GEOMETRIES[i] for i in (0, 6, 8, 15, 17, 23, 35)]


def small_cases() -> Iterator[tuple[Case, int, Geometry, Plan]]:
    """A few geometries in each layout and plan."""
    for case in SMALL:
        for cuts in {cuts_of(case[3], layout) for layout in LAYOUTS}:
            for plan in plans(geometry_of(case)):
                yield case, cuts, geometry_of(case), plan


def test_any_tensor_may_be_frozen() -> None:
    """Trained or not, in any combination: the gradients that are asked for are right."""
    failures = []
    for case, cuts, geometry, plan in small_cases():
        given = tensors_of(case, cuts, 2, 2, torch.float64)
        for trained in itertools.product((True, False), repeat=4):
            wanted = [
                tensor.requires_grad_(train)
                for tensor, train in zip([*given[:1], *given[2:]], trained, strict=True)
            ]
            if not any(trained):
                continue
            wanted = [tensor for tensor in wanted if tensor.requires_grad]
            found = step(lambda: LowRankConv.apply(*given, 1, None, geometry, plan), wanted)
            expected = step(lambda: convolved(case, given), wanted)
            if problems := wrong(found, expected, 1e-12):
                failures.append(f"{case} {cuts} {plan} {trained}: {problems}")
    assert not failures, "\n".join(failures[:20])


def test_what_the_delta_sees_may_be_another_input() -> None:
    """As under dropout; each of the two inputs may be the one that needs a gradient."""
    failures = []
    for case, cuts, geometry, plan in small_cases():
        if plan.form != "side":
            continue
        given = tensors_of(case, cuts, 2, 2, torch.float64)
        for trained in itertools.product((True, False), repeat=4):
            dropped = torch.randn_like(given[0])
            tensors = [given[0], dropped, *given[3:]]
            for tensor, train in zip(tensors, trained, strict=True):
                tensor.requires_grad_(train)
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            if not wanted:
                continue
            found = step(lambda: LowRankConv.apply(*given, 1, dropped, geometry, plan), wanted)
            expected = step(lambda: convolved(case, given, dropped), wanted)
            if problems := wrong(found, expected, 1e-12):
                failures.append(f"{case} {cuts} {plan} {trained}: {problems}")
    assert not failures, "\n".join(failures[:20])


def test_every_rank() -> None:
    """From one to the largest, where the layout cuts through channels, and where it does not."""
    failures = []
    for inputs, layout in itertools.product((4, 6), LAYOUTS):
        case = (3, inputs, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1))
        cuts = cuts_of(case[3], layout)
        for rank in range(1, min(3 * cuts, inputs * 9 // cuts) + 1):
            given = tensors_of(case, cuts, rank, 2, torch.float64)
            wanted = [tensor.requires_grad_() for tensor in given if tensor is not given[1]]
            expected = step(lambda: convolved(case, given), wanted)
            for plan in plans(geometry_of(case)):
                call = lambda: LowRankConv.apply(*given, 1, None, geometry_of(case), plan)  # noqa: E731
                if problems := wrong(step(call, wanted), expected, 1e-12):
                    failures.append(f"{inputs} {layout} {rank} {plan}: {problems}")
    assert not failures, "\n".join(failures[:20])


GRADCHECKED: list[Case] = [
    (2, 2, (4,), (2,), (1,), (1,), (1,)),
    (2, 3, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    (2, 3, (3, 3), (2, 2), (2, 2), (1, 1), (1, 1)),
    (2, 3, (3, 3), (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, 3, (3, 2), (1, 1), (1, 1), (0, 0), (1, 1)),
]


def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    for case, layout in itertools.product(GRADCHECKED, LAYOUTS):
        given = tensors_of(case, cuts_of(case[3], layout), 2, 2, torch.float64)
        x, weight, *rest = given
        own = [tensor.requires_grad_() for tensor in (x, *rest)]
        for plan in plans(geometry_of(case)):

            def call(x: Tensor, *rest: Tensor) -> Tensor:
                return LowRankConv.apply(x, weight, *rest, 1, None, geometry_of(case), plan)

            assert torch.autograd.gradcheck(call, own, fast_mode=True), (case, plan)
            assert torch.autograd.gradgradcheck(call, own, fast_mode=True), (case, plan)


def test_second_derivatives_are_those_of_the_formula() -> None:
    """Exactly, and for whichever tensors are trained."""
    failures = []
    for case, cuts, geometry, plan in small_cases():
        given = tensors_of(case, cuts, 2, 2, torch.float64)
        for trained in itertools.product((True, False), repeat=3):
            tensors = [given[0], *given[3:]]
            for tensor, train in zip(tensors, trained, strict=True):
                tensor.requires_grad_(train)
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            if not wanted:
                continue

            def penalty(call: Callable[[], Tensor]) -> list[Any]:
                first = torch.autograd.grad(weighted(call()), wanted, create_graph=True)
                return [*torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

            found = penalty(lambda: LowRankConv.apply(*given, 1, None, geometry, plan))
            expected = penalty(lambda: convolved(case, given))
            if problems := wrong(found, expected, 1e-11):
                failures.append(f"{case} {cuts} {plan} {trained}: {problems}")
    assert not failures, "\n".join(failures[:20])


# --- layers --------------------------------------------------------------------------------------

ZEROS: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3, "padding": 1}),
    (1, {"kernel_size": 4, "padding": "same"}),
    (1, {"kernel_size": 2, "dilation": 2, "padding": "same"}),
    (1, {"kernel_size": 3, "stride": 2, "padding": "valid"}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, {"kernel_size": 3, "stride": (2, 1), "padding": (0, 4)}),
    (2, {"kernel_size": 1}),
    (2, {"kernel_size": 1, "stride": 2}),
    (2, {"kernel_size": 1, "padding": "same"}),
    (2, {"kernel_size": 2, "padding": "same"}),
    (2, {"kernel_size": (4, 3), "padding": "same"}),
    (2, {"kernel_size": (3, 4), "dilation": (1, 2), "padding": "same"}),
    (2, {"kernel_size": (3, 1), "padding": "valid"}),
    (2, {"kernel_size": 7, "stride": 2, "padding": 3}),
    (3, {"kernel_size": (3, 2, 1), "padding": "same"}),
    (3, {"kernel_size": 3, "padding": 1, "stride": (1, 2, 1)}),
]
OTHERWISE: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3, "padding": 2}),
    (1, {"kernel_size": 4, "padding": "same"}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": (4, 3), "padding": "same"}),
    (2, {"kernel_size": 3, "stride": (2, 1), "padding": (2, 0), "dilation": 2}),
    (2, {"kernel_size": 3, "padding": "valid"}),
    (2, {"kernel_size": 1, "padding": 2}),
    (3, {"kernel_size": (2, 3, 1), "padding": (1, 1, 0)}),
]
LAYERS = [
    *ZEROS,
    *((axes, {**options, "padding_mode": mode}) for axes, options in OTHERWISE
      for mode in ("reflect", "replicate", "circular")),
]  # fmt: skip
SIZES = {1: (11,), 2: (8, 9), 3: (5, 6, 5)}


def layer_of(axes: int, inputs: int = 4, outputs: int = 5, **options: Any) -> Any:
    return CONVS[axes - 1](inputs, outputs, dtype=torch.float64, **options)


@layouts
@pytest.mark.parametrize("form", CHOICES)
def test_every_layer_in_every_form(form: Any, layout: str) -> None:
    """Paddings that the function knows nothing of; with and without a batch; one and no example."""
    failures = []
    for axes, options in LAYERS:
        base = layer_of(axes, **options)
        net = adapted(base, rank=2, lora_alpha=3.0, conv_layout=layout, form=form)
        for batch in ((2,), (1,), (), (0,)):
            if batch == (0,) and options.get("padding_mode", "zeros") != "zeros":
                continue  # torch pads no empty batch
            x = torch.randn(*batch, 4, *SIZES[axes], dtype=torch.float64)
            if problems := compare(base, net, x):
                failures.append(f"{axes} {options} {batch}: {problems}")
    assert not failures, "\n".join(failures[:20])


def test_every_layer_in_float32() -> None:
    failures = []
    for (axes, options), form in itertools.product(LAYERS, FORMS):
        base = layer_of(axes, **options).float()
        net = adapted(base, rank=2, form=form)
        if problems := compare(base, net, torch.randn(2, 4, *SIZES[axes])):
            failures.append(f"{axes} {options} {form}: {problems}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_biases(bias: str) -> None:
    for form, layout in itertools.product(CHOICES, LAYOUTS):
        base = layer_of(2, kernel_size=3, bias=bias != "none")
        options = {"conv_layout": layout, "form": form, "train_bias": bias == "trained"}
        net = adapted(base, rank=2, **options)
        assert bias == "none" or net.bias.requires_grad == (bias == "trained")
        assert not compare(base, net, torch.randn(2, 4, 6, 6, dtype=torch.float64)), (form, layout)


def test_memory_formats_of_layers() -> None:
    """The output lies in memory as that of the plain layer."""
    failures = []
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    for of_x, of_w, form in itertools.product(MEMORY, ("contiguous", "channels_last"), FORMS):
        base = layer_of(2, kernel_size=3, padding=1)
        base.weight.data = MEMORY[of_w](base.weight.data)
        net, seen = adapted(base, form=form), MEMORY[of_x](x)
        problems = compare(base, net, seen)
        if net(seen).stride() != base(seen).stride():
            problems += [f"strides {net(seen).stride()}, of the plain layer {base(seen).stride()}"]
        if problems:
            failures.append(f"x {of_x} W {of_w} {form}: {problems}")
    assert not failures, "\n".join(failures)


@layouts
def test_a_gradient_that_is_expanded_or_channels_last(layout: str) -> None:
    """What comes from a sum, or from the layer behind, lies in memory as it likes."""
    base = layer_of(2, kernel_size=3, padding=1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        net = adapted(base, rank=2, conv_layout=layout, form=form)
        wanted = [x, net.lora_B, net.lora_A]
        like = net(x).detach()
        gradients = [torch.ones((), dtype=x.dtype).expand_as(like), channels_last(like), like.mT]
        for g in gradients:
            found = torch.autograd.grad(net(x), wanted, g)
            expected = torch.autograd.grad(call_with_delta(base, net, x), wanted, g)
            assert not wrong(found, expected, 1e-12), (form, g.stride())


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_fa", "pissa", "olora"])
@forms
def test_methods_of_the_family(method: str, form: str) -> None:
    """Each by its own formula; the anchored ones subtract where they started."""
    for layout in LAYOUTS:
        base = layer_of(2, kernel_size=3, padding=1)
        settings = {"rank": 4, "lora_alpha": 6.0, "conv_layout": layout, "form": form}
        net = adapted(base, method, **settings)
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
        weight = base.weight.detach()
        scale = 6.0 / (2 if method == "rslora" else 4)

        def formula() -> Tensor:
            change = delta_of(weight.shape, net.lora_B, net.lora_A)
            if method in ("pissa", "olora"):
                start = getattr(net, f"{method}_B0"), getattr(net, f"{method}_A0")
                change = change - delta_of(weight.shape, *start)
            return F.conv2d(x, weight + scale * change, base.bias, padding=1)

        wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
        found, expected = step(lambda: net(x), wanted), step(formula, wanted)
        assert not wrong(found, expected, 1e-11), layout


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "pissa"])
@layouts
def test_dropout(layout: str, method: str) -> None:
    """With that mask the formula's output and gradients; none in eval."""
    for (axes, options), form in itertools.product([*ZEROS[::3], *LAYERS[-3:]], CHOICES):
        base = layer_of(axes, **options)
        settings = {"conv_layout": layout, "form": form, "lora_dropout": 0.4, "rank": 2}
        net = adapted(base, method, **settings)
        frozen, bias = net._parameters["weight"], net.bias
        x = torch.randn(2, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)

        def plainly(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
            none = torch.zeros(len(weight), dtype=x.dtype) if bias is None else bias
            return functional_call(base, {"weight": weight, "bias": none}, (x,))

        def formula() -> Tensor:
            change = delta_of(frozen.shape, net.lora_B, net.lora_A)
            y = plainly(x, frozen, bias) + plainly(F.dropout(x, 0.4), change, None)
            if method == "pissa":
                y = y - plainly(x, delta_of(frozen.shape, net.pissa_B0, net.pissa_A0), None)
            return y

        results = []
        for call in (lambda: net(x), formula):
            torch.manual_seed(5)
            results.append(step(call, [x, net.lora_B, net.lora_A]))
        assert not wrong(*results, 1e-11), (axes, options, form)
        assert not torch.equal(net(x), net(x)), "another mask each time"
        net.eval()
        torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)
        if method == "lora":
            assert not compare(base, net, x)


# --- layers that go the general way --------------------------------------------------------------


class Standardised(nn.Conv2d):
    """Convolves with another weight than its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, weight, bias)


class Doubling(nn.Conv2d):
    """Does more than to convolve."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) + self.weight.sum()


class Quiet(nn.Conv2d):
    """A subclass that changes nothing."""


def patched(base: nn.Module) -> nn.Module:
    """As the recipes for tileable images patch an instance: one axis around, one not."""

    def conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        padded = F.pad(F.pad(input, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    base._conv_forward = types.MethodType(conv_forward, base)  # type: ignore[assignment]
    return base


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("cls", [Standardised, Doubling, Quiet])
def test_subclasses(cls: type[nn.Conv2d], form: Any) -> None:
    base = cls(4, 5, 3, padding=1, dtype=torch.float64)
    net = adapted(base, rank=2, form=form)
    assert not compare(base, net, torch.randn(2, 4, 6, 6, dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_instance_whose_convolution_was_replaced(moment: str) -> None:
    base = layer_of(2, kernel_size=3, padding=1)
    if moment == "before":
        patched(base)
    net = adapted(base, rank=2, form="merged")
    for module in (base, net):  # a copy of a bound method is bound to what it was copied from
        patched(module)
    assert not compare(base, net, torch.randn(2, 4, 6, 6, dtype=torch.float64))


CHANGES: dict[str, dict[str, Any]] = {
    "integers": {"stride": 1, "padding": 2, "dilation": 2},
    "one for all axes": {"padding": (2,), "dilation": (2,)},
    "lists": {"stride": [1, 2], "padding": [2, 1], "dilation": [2, 1]},
    "mode": {"padding_mode": "circular"},
    "dilation": {"dilation": (2, 2)},
}


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_attributes_that_were_changed_after_construction(
    change: dict[str, Any], padding: Any
) -> None:
    """As recipes for dilated ResNets do; torch's functions take them in all these ways."""
    if padding == "same":
        change = {key: value for key, value in change.items() if key not in ("padding", "stride")}
    base = layer_of(2, kernel_size=3, padding=padding)
    net = adapted(base, rank=2)
    for module in (base, net):
        vars(module).update(change)
    assert not compare(base, net, torch.randn(2, 4, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 4}], ids=str)
def test_groups(options: dict[str, Any]) -> None:
    base = nn.Conv2d(4, 8, 3, dtype=torch.float64, **options)
    for layout in LAYOUTS:
        net = adapted(base, rank=1, conv_layout=layout)
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        wanted = [net.lora_B, net.lora_A]

        def formula() -> Tensor:
            pairs = zip(base.weight.chunk(base.groups), net.lora_B, net.lora_A, strict=True)
            weight = torch.cat([w.detach() + delta_of(w.shape, b, a) for w, b, a in pairs])
            return F.conv2d(x, weight, base.bias, groups=base.groups)

        found = step(lambda: net(x), wanted)
        assert not wrong(found, step(formula, wanted), 1e-12), layout


def test_complex_weights() -> None:
    base = nn.Conv2d(4, 5, 3, dtype=torch.complex128)
    net = adapted(base, rank=2, form="side")
    x = torch.randn(2, 4, 6, 6, dtype=torch.complex128)

    def formula() -> Tensor:
        weight = base.weight.detach() + delta_of(base.weight.shape, net.lora_B, net.lora_A)
        return F.conv2d(x, weight, base.bias)

    def gradients(call: Callable[[], Tensor]) -> list[Tensor]:
        y = call()
        return [y, *torch.autograd.grad(y.abs().square().sum(), [net.lora_B, net.lora_A])]

    torch.testing.assert_close(gradients(lambda: net(x)), gradients(formula), rtol=1e-11, atol=0)


def test_what_a_plain_layer_refuses_is_refused() -> None:
    """With torch's own words: another dtype, another number of channels or axes."""
    base = layer_of(2, kernel_size=3)
    net = adapted(base)
    for shape, dtype in [
        ((2, 4, 6, 6), torch.float32),
        ((2, 3, 6, 6), torch.float64),
        ((6, 6), torch.float64),
        ((2, 4, 2, 2), torch.float64),
    ]:
        x = torch.randn(shape, dtype=dtype)
        with pytest.raises(RuntimeError) as plain:
            base(x)
        with pytest.raises(RuntimeError) as found:
            net(x)
        assert str(found.value).partition("\n")[0] == str(plain.value).partition("\n")[0]


# --- features of torch ---------------------------------------------------------------------------


class Small(nn.Sequential):
    """Convolutions of several kinds, one behind the other."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, dtype=dtype),
            nn.Tanh(),
            nn.Conv2d(6, 8, 1, stride=2, bias=False, dtype=dtype),
            nn.Tanh(),
            nn.Conv2d(8, 4, (2, 3), padding="same", dtype=dtype),
            nn.Flatten(),
            nn.Linear(64, 5, dtype=dtype),
        )


def image(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


def materialised(base: nn.Module, net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain network with weights that are functions of the deltas of `net`."""
    named, given = dict(net.named_parameters()), {}
    for name, p in base.named_parameters():
        stem = name.removesuffix("weight")
        given[name] = p.detach()
        if f"{stem}lora_B" in named:
            factors = named[f"{stem}lora_B"], named[f"{stem}lora_A"]
            given[name] = given[name] + delta_of(p.shape, *factors)
    return lambda x: functional_call(base, given, (x,))


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def pair(form: Any = None, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    base = Small(dtype)
    return base, adapted(base, rank=2, form=form, **settings)


def assert_same_step(call: Any, other: Any, x: Tensor, net: nn.Module, tolerance: float) -> None:
    results = [step(lambda: f(x), trained(net)) for f in (call, other)]
    assert not wrong(*results, tolerance)


@pytest.mark.parametrize("form", CHOICES)
def test_gradients_of_gradients_through_a_network(form: Any) -> None:
    base, net = pair(form)
    x, results = image().requires_grad_(), []
    for call in (net, materialised(base, net)):
        (first,) = torch.autograd.grad(weighted(call(x)), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *trained(net)]))
    assert not wrong(*results, 1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", CHOICES)
def test_checkpointing(form: Any, reentrant: bool) -> None:
    base, net = pair(form)
    x = image().requires_grad_()
    weighted(checkpoint(net, x, use_reentrant=reentrant)).backward()
    found = [x.grad, *(p.grad for p in trained(net))]
    _, *expected = step(lambda: materialised(base, net)(x), [x, *trained(net)])
    assert not wrong(found, expected, 1e-12)


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(form: Any, dropout: float) -> None:
    """The plain layer's dtype, gradients in that of the parameters, all close to float32."""
    base, net = pair(form, torch.float32, lora_dropout=dropout)
    net.eval()
    x = image(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = net(x), base(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    exact = materialised(base, net)(x)
    assert (found - exact).norm() < 0.02 * exact.norm()
    for parameter, *gradients in zip(
        trained(net),
        *(torch.autograd.grad(y.float().sum(), trained(net)) for y in (found, exact)),
        strict=True,
    ):
        ours, expected = gradients
        assert ours.dtype == parameter.dtype == torch.float32
        assert (ours - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("form", CHOICES)
def test_autocast_leaves_float64_alone(form: Any) -> None:
    base, net = pair(form)
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = net(x), base(x)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("form", CHOICES)
@layouts
def test_a_small_delta_is_not_rounded_away_in_bfloat16(layout: str, form: Any) -> None:
    """A thousandth of the weight is below what bfloat16 tells apart, but not in the output."""
    base = nn.Conv2d(64, 64, 3, bias=False)
    base.weight.data = base.weight.data.sign() * (0.52 + torch.rand_like(base.weight))
    base = base.to(torch.bfloat16)
    net = adapted(base, rank=1, conv_layout=layout, form=form)
    assert net.lora_A.dtype == torch.float32
    with torch.no_grad():
        net.lora_A.copy_(net.lora_A.sign())
        net.lora_B.fill_(1e-3)
    weight = base.weight.detach()
    change = delta_of(weight.shape, net.lora_B.double(), net.lora_A.double()).detach()
    merged = weight + change.to(torch.bfloat16)
    assert torch.equal(merged, weight), "all of it would be lost"
    x = change[:1].sign().to(torch.bfloat16)  # to which the delta answers most
    difference, exact = (net(x) - base(x)).double(), F.conv2d(x.double(), change)
    left = (difference * exact).sum() / exact.square().sum()
    assert 0.9 < left < 1.1, left


@pytest.mark.parametrize("form", CHOICES)
def test_per_example_gradients_and_ensembles(form: Any) -> None:
    base, net = pair(form)
    x = image(3)
    call, own = per_example_gradients(net)
    found = call(own, x)
    for index, one in enumerate(x):
        _, *expected = step(lambda: materialised(base, net)(one[None]), [*own.values()])
        assert not wrong([g[index] for g in found.values()], expected, 1e-12)

    nets = [net, adapted(base, rank=2, form=form), adapted(base, rank=2, form=form)]
    stacked, buffers = stack_module_state(nets)
    together = vmap(lambda p, b: functional_call(net, (p, b), (x,)))(stacked, buffers)
    expected = [materialised(base, one)(x) for one in nets]
    assert not wrong(together, expected, 1e-12)


@layouts
@pytest.mark.parametrize("form", CHOICES)
def test_gradients_of_a_batch_of_gradients(form: Any, layout: str) -> None:
    """`is_grads_batched` runs the backward pass itself under vmap."""
    for axes, options in LAYERS:
        base = layer_of(axes, **options)
        net = adapted(base, rank=2, form=form, conv_layout=layout, train_bias=True)
        x = torch.randn(2, 4, *SIZES[axes], dtype=torch.float64, requires_grad=True)
        y = net(x)
        wanted, directions = [x, *trained(net)], torch.randn(3, *y.shape, dtype=y.dtype)
        found = torch.autograd.grad(y, wanted, directions, True, is_grads_batched=True)
        for index, direction in enumerate(directions):
            expected = torch.autograd.grad(y, wanted, direction, True)
            assert not wrong([g[index] for g in found], expected, 1e-12), (axes, options)


@pytest.mark.parametrize("form", ["side", None])
def test_compile(form: Any, dynamo: None) -> None:
    """In one graph, whatever the size of the batch and its memory format."""
    base, net = pair(form)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        for memory in (lambda x: x, channels_last)[: 1 + (batch == 5)]:
            x = memory(image(batch))
            assert_same_step(compiled, materialised(base, net), x, net, 1e-12)


def test_compile_is_not_repeated_for_other_sizes(dynamo: None) -> None:
    """What is chosen depends on sizes, but does not make a graph of each."""
    net, graphs = pair()[1], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    for batch in range(2, 40):
        torch.testing.assert_close(compiled(image(batch)).shape, torch.Size([batch, 5]))
    assert len(graphs) <= 3


@pytest.mark.parametrize(("form", "strict"), [("side", True), ("merged", False), (None, True)])
def test_export(form: Any, strict: bool) -> None:
    base, net = pair(form)
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(
        net.eval(), (image(4),), dynamic_shapes=sizes, strict=strict
    ).module()
    x = image(7)
    torch.testing.assert_close(exported(x), materialised(base, net)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", CHOICES)
def test_training_after_inference(form: Any) -> None:
    base, net = pair(form)
    x = image()
    with torch.inference_mode():
        seen = net(x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), seen, rtol=1e-12, atol=1e-12)
    assert_same_step(net, materialised(base, net), x, net, 1e-12)
    assert not wrong([seen], [materialised(base, net)(x)], 1e-12)


@pytest.mark.parametrize("form", CHOICES)
def test_a_weight_that_is_trained_under_its_delta(form: Any) -> None:
    base, x = layer_of(2, kernel_size=3, padding=1), image(2).repeat(1, 2, 1, 1)[:, :4]
    net = adapted(base, rank=2, form=form)
    frozen = net._parameters["weight"]
    frozen.requires_grad = True
    assert not compare(base, net, x)
    wanted = [frozen]
    found = step(lambda: net(x), wanted)
    expected = step(lambda: call_with_delta(base, net, x), wanted)
    assert found[1].abs().max() > 0
    assert not wrong(found, expected, 1e-12)


@pytest.mark.parametrize("form", CHOICES)
def test_a_factor_that_changed_before_backward_is_an_error(form: Any) -> None:
    """As in torch itself: no gradient of what is no longer there."""
    net = pair(form)[1]
    y = net(image())
    with torch.no_grad():
        net[0].lora_A += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_lora_fa_on_convolutions_trains_and_gives_second_derivatives() -> None:
    for form in CHOICES:
        base = layer_of(2, kernel_size=3)
        net, x = adapted(base, "lora_fa", rank=2, form=form), image(2).repeat(1, 2, 1, 1)
        x = x[:, :4].requires_grad_()
        results = []
        for call in (net, lambda x: call_with_delta(base, net, x)):
            first = torch.autograd.grad(weighted(call(x)), [x, net.lora_B], create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            results.append([*first, *torch.autograd.grad(penalty, [x, net.lora_B])])
        assert not wrong(*results, 1e-11), form


# --- what is kept and made -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("rank", [1, 3, 8])
@layouts
def test_bytes_kept_are_those_of_the_frozen_network(layout: str, rank: int, block: Any) -> None:
    """Which trains one bias of its first layer; at most 2 % more."""
    base, x = ResNet(block, [1, 1, 1, 1], num_classes=10), torch.randn(2, 3, 128, 128)
    bound = copy.deepcopy(base).requires_grad_(False)
    bound.bn1.bias.requires_grad = True
    net = adapted(base, rank=rank, conv_layout=layout, clip_rank=True)
    assert 0 < bytes_kept(net, x) <= 1.02 * bytes_kept(bound, x)


class Shapes(TorchDispatchMode):
    """Records the sizes of all that operations make, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args)
                 if isinstance(t, Tensor)}  # fmt: skip
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append((op, tensor.untyped_storage().nbytes() // tensor.itemsize))
        return result


@layouts
@pytest.mark.parametrize("form", ["side", None])
def test_nothing_of_a_full_weights_size_is_made_in_a_late_layer(form: Any, layout: str) -> None:
    base, x = nn.Conv2d(256, 256, 3, padding=1, bias=False), torch.randn(1, 256, 4, 4)
    net = adapted(base, rank=2, conv_layout=layout, form=form)
    x.requires_grad_()
    with Shapes() as shapes:
        net(x).sum().backward()
    assert x.grad is not None
    assert {op for op, _ in shapes.made}, "nothing was recorded"
    large = [(op, size) for op, size in shapes.made if size >= base.weight.numel()]
    assert not large


def test_the_other_forms_do_make_one() -> None:
    """So that the test above can tell."""
    base, x = nn.Conv2d(256, 256, 3, padding=1, bias=False), torch.randn(1, 256, 4, 4)
    for form in ("merged", "whole"):
        net = adapted(base, rank=2, form=form)
        with Shapes() as shapes:
            net(x).sum().backward()
        assert any(size == base.weight.numel() for _, size in shapes.made)


def test_settings_refuse_other_forms() -> None:
    with pytest.raises(ValueError, match=r"form is 'both', expected 'merged' or 'side' or"):
        ma_adapt("lora", form="both")


def test_the_form_of_a_setting_is_the_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of them changes what a saved delta means."""
    seen: list[str] = []
    apply = LowRankConv.apply
    monkeypatch.setattr(
        LowRankConv, "apply", lambda *args: (seen.append(args[-2].form), apply(*args))[1]
    )
    base = layer_of(2, kernel_size=3)
    nets = [adapted(base, rank=2, form=form) for form in FORMS]
    for net in nets:
        net(torch.randn(2, 4, 6, 6, dtype=torch.float64))
        net.load_state_dict(nets[0].state_dict())
    assert seen == list(FORMS)
