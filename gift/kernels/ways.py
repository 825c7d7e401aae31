"""Ways from tensors that nodes of an autograd graph keep to what was computed from them.

Each node of the table `RULES` has a rule: which tensors of it, or of the nodes above it, give its
output again. Names and meanings of what nodes keep are private to torch: `gift.kernels.recomputed`
compares what a way gives with the real tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.private.torch.autograd import Unknown, argument, kept_by, output_of

Compute = Callable[[Sequence[Tensor]], Tensor]
"""Makes a tensor from the saved ones."""

LONGEST = 24  # nodes and tensors on a way
SMALL = 16  # a copy of a weight has at most this part of the elements of the input


class Way:
    """The way from tensors that nodes keep to an output of another node.

    Args:
        size: number of elements of that output.

    Attributes:
        leaves: what nodes keep.
        places: addresses of their memory.
        steps: how long it takes, in operations on each element.
        form: nodes, arguments and tensors, in the order in which they were visited.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.leaves: list[Tensor] = []
        self.places: list[int] = []
        self.steps = 0
        self.form: list[Any] = []

    def to(self, node: Any, number: int) -> Compute:
        """Return what computes an output of a node."""
        rule = None if node is None else RULES.get(node.name())
        if rule is None or len(self.form) > LONGEST:
            raise Unknown
        self.form.append((node.name(), number))
        return rule(self, node, number)

    def kept(self, node: Any, name: str) -> Compute | None:
        """Return what gives a tensor that a node keeps; None if it keeps none."""
        tensor = kept_by(node, name)
        self.form.append((name, None if tensor is None else (tensor.dtype, tensor.dim())))
        if tensor is None:
            return None
        place = len(self.leaves)
        self.leaves.append(self._held(tensor, name))
        self.places.append(tensor.data_ptr())
        return lambda leaves: leaves[place]

    def _held(self, tensor: Tensor, name: str) -> Tensor:
        """Return what to save of a tensor that a node keeps.

        FSDP and others free the weights of a module until its own backward pass, and the module
        that made an input may be another one than that which needs it. So small weights are copied,
        and a way that needs a large one is not used.
        """
        given = tensor.detach()
        if tensor.grad_fn is not None or name.startswith("result"):
            return given
        if tensor.numel() * SMALL <= self.size:
            return given.clone()
        if isinstance(tensor, nn.Parameter):
            raise Unknown
        return given

    def tensor(self, node: Any, name: str) -> Compute:
        """Return what gives a tensor that a node must keep."""
        found = self.kept(node, name)
        if found is None:
            raise Unknown
        return found

    def operand(self, node: Any, index: int, name: str) -> Compute:
        """Return what gives an operand of a node: it is kept, or is the output of a node above."""
        return self.kept(node, name) or self.input(node, index)

    def input(self, node: Any, index: int = 0) -> Compute:
        """Return what computes an input of a node."""
        return self.to(*node.next_functions[index])

    def argument(self, node: Any, name: str) -> Any:
        """Return an argument of the operation that made a node."""
        value = argument(node, name)
        self.form.append((name, value))
        return value


Rule = Callable[[Way, Any, int], Compute]


def _result(name: str = "result") -> Rule:
    """Rule for a node that keeps its output."""

    def rule(way: Way, node: Any, number: int) -> Compute:
        return way.tensor(node, _only(number, name))

    return rule


def _only(number: int, given: Any) -> Any:
    """Return what was given for the first output of a node: the others are something else."""
    if number:
        raise Unknown
    return given


def _of(function: Callable[..., Tensor], *operands: str, steps: int = 1, **arguments: str) -> Rule:
    """Rule for an operation of tensors that its node keeps, or that are computed themselves.

    Args:
        function: the operation.
        operands: names of its tensors, in order.
        steps: how long it takes.
        arguments: names that the function has for its arguments, and those that the node has.
    """

    def rule(way: Way, node: Any, number: int) -> Compute:
        way.steps += _only(number, steps)
        tensors = [way.operand(node, index, name) for index, name in enumerate(operands)]
        given = {key: way.argument(node, name) for key, name in arguments.items()}
        return lambda leaves: function(*(tensor(leaves) for tensor in tensors), **given)

    return rule


def _moved(function: Callable[..., Tensor], *arguments: str, steps: int = 0) -> Rule:
    """Rule for an operation of one tensor that its node does not keep: a view, for example."""

    def rule(way: Way, node: Any, number: int) -> Compute:
        way.steps += _only(number, steps)
        given = [way.argument(node, name) for name in arguments]
        tensor = way.input(node)
        return lambda leaves: function(tensor(leaves), *given)

    return rule


def _unpadded(way: Way, node: Any, number: int) -> Compute:
    """Rule for padding of size zero: the value that is padded with is not known."""
    if any(way.argument(node, _only(number, "pad"))):
        raise Unknown
    return way.input(node)


def _shaped(function: Callable[[Tensor, Any], Tensor]) -> Rule:
    """Rule for a view whose shape is given."""

    def rule(way: Way, node: Any, number: int) -> Compute:
        shape, tensor = output_of(node, _only(number, 0))[0], way.input(node)
        return lambda leaves: function(tensor(leaves), shape)

    return rule


def _part(function: Callable[..., Sequence[Tensor]], *arguments: str) -> Rule:
    """Rule for an operation with several outputs, all of them views."""

    def rule(way: Way, node: Any, number: int) -> Compute:
        given = [way.argument(node, name) for name in arguments]
        tensor = way.input(node)
        return lambda leaves: function(tensor(leaves), *given)[number]

    return rule


def _cast(way: Way, node: Any, number: int) -> Compute:
    """Rule for a cast; a copy to another device is not one."""
    _, dtype, device = output_of(node, _only(number, 0))
    tensor, way.steps = way.input(node), way.steps + 1

    def compute(leaves: Sequence[Tensor]) -> Tensor:
        value = tensor(leaves)
        return value.to(dtype) if value.device == device else value

    return compute


def _sum(sign: int) -> Rule:
    """Rule for sums and differences."""

    def rule(way: Way, node: Any, number: int) -> Compute:
        alpha = way.argument(node, _only(number, "alpha"))
        one, other, way.steps = way.input(node, 0), way.input(node, 1), way.steps + 1
        return lambda leaves: torch.add(one(leaves), other(leaves), alpha=sign * alpha)

    return rule


def _joined(way: Way, node: Any, number: int) -> Compute:
    """Rule for concatenated tensors."""
    axis = way.argument(node, _only(number, "dim"))
    parts = [way.input(node, index) for index in range(len(node.next_functions))]
    way.steps += 1
    return lambda leaves: torch.cat([part(leaves) for part in parts], axis)


def _batched_product(way: Way, node: Any, number: int) -> Compute:
    """Rule for products of small matrices, as in attention without a fused kernel."""
    one, other = (way.operand(node, index, name) for index, name in enumerate(("self", "mat2")))
    inner = way.leaves[-1].shape[-2] if way.leaves else 0
    way.steps += _only(number, 1) + inner // 8
    return lambda leaves: torch.bmm(one(leaves), other(leaves))


def _dropout(way: Way, node: Any, number: int) -> Compute:
    """Rule for dropout whose node keeps the mask."""
    mask, share = way.tensor(node, _only(number, "result1")), way.argument(node, "p")
    tensor, way.steps = way.input(node), way.steps + 2
    if not 0 <= share < 1:
        raise Unknown
    return lambda leaves: (tensor(leaves) * mask(leaves)).mul_(1 / (1 - share))


def _layer_norm(way: Way, node: Any, number: int) -> Compute:
    """Rule for a layer norm, which keeps its input, and the mean and scale of each row."""
    x, mean, scale = (way.tensor(node, name) for name in ("input", "result1", "result2"))
    weight, bias = way.kept(node, "weight"), way.kept(node, "bias")
    axes = tuple(range(-len(way.argument(node, "normalized_shape")), 0))
    dtype = output_of(node, _only(number, 0))[1]
    way.steps += 3

    def compute(leaves: Sequence[Tensor]) -> Tensor:
        given, centre, factor = x(leaves), mean(leaves), scale(leaves)
        if centre.dtype.itemsize < 4:
            given = given.float()
            centre, factor = _statistics(given, axes, factor)
        value = (given - centre).mul_(factor)
        if weight is not None:
            value.mul_(weight(leaves))
        if bias is not None:
            value.add_(bias(leaves))
        return value.to(dtype)

    return compute


def _statistics(x: Tensor, axes: tuple[int, ...], rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and scale in 32 bits, where the node keeps them in 16 bits.

    Epsilon is known only from the rounded scale; it counts only where it changes that.
    """
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    scale, rounded = variance.rsqrt(), rounded.float()
    return mean, torch.where((rounded / scale - 1).abs() < 2**-7, scale, rounded)


def _rms_norm(way: Way, node: Any, number: int) -> Compute:
    """Rule for an RMS norm in one operation, which keeps its input and the scale of each row."""
    x, scale = way.tensor(node, _only(number, "input")), way.tensor(node, "result1")
    weight, dtype = way.kept(node, "weight"), output_of(node, 0)[1]
    way.steps += 2

    def compute(leaves: Sequence[Tensor]) -> Tensor:
        value = x(leaves) * scale(leaves)
        return (value if weight is None else value * weight(leaves)).to(dtype)

    return compute


def _largest(way: Way, node: Any, number: int) -> Compute:
    """Rule for the largest of each window, whose places are kept."""
    x, places = way.tensor(node, _only(number, "self")), way.tensor(node, "result1")
    way.steps += 2

    def compute(leaves: Sequence[Tensor]) -> Tensor:
        found = places(leaves)
        return x(leaves).flatten(-2).gather(-1, found.flatten(-2)).view(found.shape)

    return compute


CAST = "ToCopyBackward0"

RULES: dict[str, Rule] = {
    # norms
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    # activations
    "GeluBackward0": _of(F.gelu, "self", approximate="approximate", steps=2),
    "SiluBackward0": _of(F.silu, "self", steps=2),
    "MishBackward0": _of(F.mish, "self", steps=4),
    "HardswishBackward0": _of(F.hardswish, "self"),
    "HardsigmoidBackward0": _of(F.hardsigmoid, "self"),
    "LeakyReluBackward0": _of(F.leaky_relu, "self", negative_slope="negative_slope"),
    "HardtanhBackward0": _of(F.hardtanh, "self", min_val="min_val", max_val="max_val"),
    "EluBackward0": _of(
        torch.ops.aten.elu,
        "self",
        alpha="alpha",
        scale="scale",
        input_scale="input_scale",
        steps=2,
    ),
    "SoftplusBackward0": _of(F.softplus, "self", beta="beta", threshold="threshold", steps=4),
    "GluBackward0": _of(F.glu, "self", dim="dim", steps=2),
    # operations that keep their outputs
    **dict.fromkeys(
        (
            "ReluBackward0",
            "SigmoidBackward0",
            "TanhBackward0",
            "ExpBackward0",
            "SqrtBackward0",
            "RsqrtBackward0",
            "ReciprocalBackward0",
            "SoftmaxBackward0",
        ),
        _result(),
    ),
    **dict.fromkeys(
        (
            "ScaledDotProductFlashAttentionForCpuBackward0",
            "ScaledDotProductFlashAttentionBackward0",
            "ScaledDotProductEfficientAttentionBackward0",
            "ScaledDotProductCudnnAttentionBackward0",
        ),
        _result("output"),
    ),
    # arithmetic
    "MulBackward0": _of(torch.mul, "self", "other"),
    "DivBackward0": _of(torch.div, "self", "other"),
    "PowBackward0": _of(torch.pow, "self", exponent="exponent", steps=2),
    "NegBackward0": _moved(torch.neg, steps=1),
    "AddBackward0": _sum(1),
    "SubBackward0": _sum(-1),
    "BmmBackward0": _batched_product,
    "NativeDropoutBackward0": _dropout,
    "MaxPool2DWithIndicesBackward0": _largest,
    # copies and views
    CAST: _cast,
    "CloneBackward0": _moved(lambda x: x, steps=1),
    "AliasBackward0": _moved(lambda x: x),
    "CatBackward0": _joined,
    "ConstantPadNdBackward0": _unpadded,
    "RollBackward0": _moved(torch.roll, "shifts", "dims", steps=1),
    "TransposeBackward0": _moved(torch.transpose, "dim0", "dim1"),
    "TBackward0": _moved(torch.t),
    "PermuteBackward0": _moved(torch.permute, "dims"),
    "SelectBackward0": _moved(torch.select, "dim", "index"),
    "SliceBackward0": _moved(torch.ops.aten.slice, "dim", "start", "end", "step"),
    "SplitBackward0": _part(torch.split, "split_size", "dim"),
    "SplitWithSizesBackward0": _part(torch.split_with_sizes, "split_sizes", "dim"),
    "UnbindBackward0": _part(torch.unbind, "dim"),
    "ExpandBackward0": _shaped(Tensor.expand),
    **dict.fromkeys(
        (
            "ViewBackward0",
            "UnsafeViewBackward0",
            "ReshapeAliasBackward0",
            "UnsqueezeBackward0",
            "SqueezeBackward0",
            "SqueezeBackward1",
            "SqueezeBackward2",
        ),
        _shaped(Tensor.reshape),
    ),
}
"""What is known of the nodes of autograd, by their names."""
