"""Adapt the tensors of a module in place, and release them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import add_lazy_tensor, add_tensor, added_names, has_attribute, remove_tensor
from gift.core.dynamic_class import change_class, joined, plain_class
from gift.core.iterator import named_parts
from gift.core.weights.frozen import present_tensor
from gift.core.weights.making import in_precision_of
from gift.core.weights.record import WeightDelta, present_weight_deltas, weight_deltas
from gift.errors import AdaptationError
from gift.layers.layouts import LayoutOptions
from gift.layers.table import LayerRow, layout_of, row_of
from gift.methods import Method
from gift.quantization import is_quantised, not_yet_quantised, stand_in
from gift.support.sharding import is_sharded
from gift.support.tensors import is_inexact


def adapt_tensor(module: nn.Module, tensor: str, method: Method, options: LayoutOptions) -> None:
    """Adapt one tensor of `module`; the tensor is frozen, its new parameters are trainable.

    Args:
        module: the module that holds the tensor.
        tensor: its name, as in ``module.weight``.
        method: the method that adapts it.
        options: the choice of layouts.

    Raises:
        AdaptationError: if the tensor cannot be adapted; nothing is changed then.
    """
    frozen = present_tensor(module, tensor)
    _check(module, tensor, frozen)
    options = options.settled(method.conv_layouts, method.rows_are_outputs)
    below = weight_deltas(module).get(tensor)
    delta = WeightDelta(method=method, options=options, asked=method, below=below)
    if is_lazy(frozen):
        shape = _lazy_probe(method)
        values = method.nearest(shape).init_parameters(torch.empty(shape, device="meta"))
    else:
        readable = delta.under(module, frozen) if method.reads_weight else stand_in(frozen)
        delta.layout = layout_of(module, tensor, readable.shape, options)
        delta.method = method.nearest(delta.layout.matrix)
        values = delta.initial(readable)
        _check_shape(delta, readable, values)
    delta.names = _free_names(module, tensor, values, below)
    install(module, tensor, delta)
    add = add_lazy_tensor if is_lazy(frozen) else add_tensor
    for key, value in values.items():
        add(module, delta.names[key], value)
    delta.note_source(module, tensor)
    if isinstance(frozen, nn.Parameter):
        frozen.requires_grad = False


def _free_names(
    module: nn.Module, tensor: str, values: Mapping[str, Tensor], below: WeightDelta | None
) -> dict[str, str]:
    """Name the tensors of a delta on `module`: ``lora_A``, ``in_proj_weight_lora_A``.

    A delta on top of another one that uses these names numbers its own: ``lora_A_2``.
    """
    prefix = "" if tensor == "weight" else f"{tensor}_"
    number, names = 1, {key: prefix + key for key in values}
    free = names
    while present := [name for name in free.values() if has_attribute(module, name)]:
        if below is None:
            raise AdaptationError(
                f"it already has attributes {present}, which the delta would hide"
            )
        number += 1
        free = {key: f"{name}_{number}" for key, name in names.items()}
    return free


def install(module: nn.Module, tensor: str, delta: WeightDelta) -> None:
    """Store the record of an adapted tensor and turn its name into a property of `module`."""
    module.__dict__.setdefault("_gift_weights", {})[tensor] = delta
    _read_through_adapters(module)


def uninstall(module: nn.Module, tensor: str) -> None:
    """Undo `install`."""
    del module.__dict__["_gift_weights"][tensor]
    _read_through_adapters(module)


def _read_through_adapters(module: nn.Module) -> None:
    tensors = tuple(sorted((t, a.method_name) for t, a in weight_deltas(module).items()))
    change_class(module, tensors=tensors)


def _check(module: nn.Module, tensor: str, frozen: Any) -> None:
    known = weight_deltas(module).get(tensor)
    if known is not None and not known.of_base:
        raise AdaptationError(
            f"{tensor!r} is already adapted by {known.method}; a tensor can have one method"
        )
    if known is not None and (known.layout is None or is_sharded(frozen)):
        state = "has no shape yet" if known.layout is None else "is spread over processes"
        raise AdaptationError(f"{tensor!r} {state}, so no delta can be put on top of the one there")
    if not isinstance(frozen, Tensor):
        have = [name for name, p in module._parameters.items() if p is not None]
        raise AdaptationError(f"it has no tensor {tensor!r}; it has {have}")
    if before := not_yet_quantised(frozen):
        raise AdaptationError(
            f"{tensor!r} is a {type(frozen).__name__} that is not quantised yet: {before} first"
        )
    if not (is_inexact(frozen) or is_quantised(frozen)):
        raise AdaptationError(
            f"{tensor!r} is {frozen.dtype}, expected a floating-point or complex tensor, or one "
            "that torchao or bitsandbytes has quantised (tensors that others quantised cannot be "
            "read as a matrix: adapt before quantising)"
        )
    if not is_lazy(frozen) and frozen.numel() == 0:
        raise AdaptationError(f"{tensor!r} has no elements, its shape is {tuple(frozen.shape)}")


def _lazy_probe(method: Method) -> tuple[int, int]:
    """A shape that the method's size divides, used only to get the names of its parameters."""
    size = getattr(method, method.size_setting or "", None) or 1
    return 2**16, max(1, 2**16 // size) * size


_checked: set[tuple[type[Method], int, torch.dtype]] = set()


def _check_shape(delta: WeightDelta, frozen: Tensor, values: Mapping[str, Any]) -> None:
    """Check that another author's method keeps shape and dtype, on the first matrix of each kind.

    It computes one effective weight. The meta device would need no values, but torch imports its
    compiler for some functions there, which takes seconds. The tests check the methods of gift.
    """
    assert delta.layout is not None
    if type(delta.method).__module__.startswith("gift."):
        return
    key = (type(delta.method), len(delta.layout.matrix), frozen.dtype)
    if key in _checked:
        return
    if is_sharded(frozen):  # its method says how it is cut, so it has been thought about
        return
    dtype = delta.method.working_dtype(frozen)
    matrix = delta.layout.to_matrix(frozen).to(dtype)
    precise = {name: in_precision_of(value, dtype) for name, value in values.items()}
    with torch.no_grad():
        result = delta.method.effective_weight(matrix, precise)
    if result.shape != matrix.shape or result.dtype != matrix.dtype:
        raise AdaptationError(
            f"{delta.method} makes {tuple(result.shape)} {result.dtype} of a matrix "
            f"{tuple(matrix.shape)} {matrix.dtype}; a method must keep both"
        )
    _checked.add(key)


def adapt_module(
    module: nn.Module, method: Method, options: LayoutOptions, train_bias: bool = False
) -> None:
    """Adapt every weight in `module` that `gift.layers` knows, and freeze all else in it.

    Args:
        module: a layer, or any module with layers inside.
        method: the method that adapts each weight.
        options: the choice of layouts.
        train_bias: also train the biases of the adapted layers.

    Raises:
        AdaptationError: naming each weight that cannot be adapted, or if there is none at all.
    """
    layers = [(path, part, row_of(plain_class(type(part)))) for path, part in named_parts(module)]
    for _, part, _ in layers:
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.requires_grad = False
    weights = [
        (path, part, tensor)
        for path, part, row in layers
        if row is not None
        for tensor in row.names(part, row.weights)
    ]
    if not weights:
        raise AdaptationError(
            f"{type(module).__name__} has no weight of a known layer type; a raw parameter is "
            "adapted by a parameter cap with pa_adapt"
        )
    adapt_tensors((joined(path, t), part, t, method, options) for path, part, t in weights)
    if method.scales_outputs:
        for _, part, row in layers:
            adapt_biases(part, row)
    if train_bias:
        for _, part, row in layers:
            _train_biases(part, row)


def adapt_tensors(
    work: Iterable[tuple[str, nn.Module, str, Method, LayoutOptions]],
) -> None:
    """Adapt several tensors, each given after its name for messages.

    Raises:
        AdaptationError: naming all tensors that cannot be adapted; the others are adapted.
    """
    problems = []
    for name, module, tensor, method, options in work:
        try:
            adapt_tensor(module, tensor, method, options)
        except AdaptationError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise AdaptationError("; ".join(problems))


def adapt_biases(module: nn.Module, row: LayerRow | None) -> None:
    """Let each bias in `module` use the delta of the weights to whose outputs it is added."""
    deltas = present_weight_deltas(module)
    for bias in row.names(module, row.biases) if row is not None else ():
        weights = tuple(w for w in deltas if row is not None and row.bias_of(w) == bias)
        if weights:
            for weight in weights:
                _add_for_bias(module, weight)
            first = deltas[weights[0]]
            delta = WeightDelta(method=first.method, options=first.options, owner=module)
            delta.bias_of, delta.below = weights, weight_deltas(module).get(bias)
            install(module, bias, delta)
            delta.link_to_weights(module, bias)


def _add_for_bias(module: nn.Module, tensor: str) -> None:
    """Add the tensors that the delta of a weight has for the bias that is added to its outputs."""
    delta, frozen = weight_deltas(module)[tensor], present_tensor(module, tensor)
    if is_lazy(frozen):
        probe = torch.empty(_lazy_probe(delta.method), device="meta")
        values = delta.method.nearest(tuple(probe.shape)).init_bias_parameters(probe)
    else:
        values = delta.initial(stand_in(frozen), of_bias=True)
    delta.biased = True
    names = _free_names(module, tensor, values, delta.below)
    for key, value in values.items():
        (add_lazy_tensor if is_lazy(frozen) else add_tensor)(module, names[key], value)
    delta.names |= names


def _train_biases(module: nn.Module, row: LayerRow | None) -> None:
    for name in row.names(module, row.biases) if row is not None else ():
        if (bias := module._parameters.get(name)) is not None:
            bias.requires_grad = True


def release_tensors(module: nn.Module) -> None:
    """Undo `adapt_tensor` for all tensors of `module`."""
    for name in added_names(module):
        remove_tensor(module, name)
    if module.__dict__.pop("_gift_weights", None) is None:
        return
    adapted = type(module)
    change_class(module, tensors=())
    if hasattr(adapted, "restored"):
        adapted.restored(module)
