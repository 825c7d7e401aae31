"""Methods x layers x properties: the centre of the proofs (tables in `tests/cases`).

A part of the cells runs, in which all pairs are: see `tests.cases.selection`.
"""

import copy
import dataclasses
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from gift import FineTuningStrategy, GiftWarning, disable_fine_tuning, enable_fine_tuning
from gift.core.state_settings import is_settings
from gift.core.weights.record import weight_deltas
from gift.factories import ma_adapt
from gift.methods import METHODS as KNOWN
from tests.cases.layers import ANY_LAYER, LAYERS, LayerCase
from tests.cases.methods import METHODS, MethodCase
from tests.cases.selection import selected
from tests.common import full_state

CELLS, IMPOSSIBLE = [], []
PLACED: list[tuple[int, int, Any]] = []
for (i, (method_name, method)), (j, (layer_name, layer)) in itertools.product(
    enumerate(METHODS.items()), enumerate(LAYERS.items())
):
    differs = layer.differs | method.differs.get(layer_name, {})
    layer = dataclasses.replace(layer, differs=differs)
    cell = pytest.param(method, layer, id=f"{method_name}-{layer_name}")
    reason = method.impossible.get(layer_name)
    if reason is None:
        CELLS.append(cell)
        PLACED.append((i, j, cell))
    else:
        IMPOSSIBLE.append(pytest.param(method, layer, reason, id=cell.id))

PROPERTIES: dict[str, set[str]] = {}
"""The names of the cells in which each property is tested."""


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    """Test a property of every method on every layer type, in the cells that are selected."""
    cells = selected(PLACED, len(PROPERTIES))
    PROPERTIES[test.__name__] = {cell.id for cell in cells}
    return pytest.mark.parametrize(("method", "layer"), cells)(test)


def enabled(method: MethodCase, layer: LayerCase, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer, adapted by the method; tiny layers have deltas larger than their weight."""
    net = layer.make().to(dtype)
    adapt(net, method, layer)
    return net


def adapt(net: nn.Module, method: MethodCase, layer: LayerCase) -> None:
    caps: dict[str, Any] = {"module_caps": [(ANY_LAYER, ma_adapt)]}
    caps = {
        kind: [(check, action(method.method, **method.settings)) for check, action in pairs]
        for kind, pairs in (layer.caps or caps).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, FineTuningStrategy(**caps))


def twin(net: nn.Module, layer: LayerCase) -> nn.Module:
    """A plain layer of the same dtype, mode and values."""
    other = layer.make().to(next(net.parameters()).dtype)
    other.load_state_dict(net.state_dict())
    return other.train(net.training)


def randomise(net: nn.Module) -> None:
    """As after training: no parameter of the delta is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)


def owner_of(net: nn.Module, weight: str) -> tuple[nn.Module, str]:
    path, _, tensor = weight.rpartition(".")
    return net.get_submodule(path), tensor


def frozen_tensors(net: nn.Module, method: MethodCase, layer: LayerCase) -> dict[str, Tensor]:
    """The tensors that will be adapted, as a plain network reads them."""
    names = [*layer.weights, *(layer.all_biases(net) if method.adapts_bias else ())]
    return {name: getattr(*owner_of(net, name)).detach().clone() for name in names}


def added(net: nn.Module, weight: str, known: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
    """What the method added for that weight: copies in float64, trained ones as leaves.

    What several weights share is one leaf, if they are given the same `known`.
    """
    module, tensor = owner_of(net, weight)
    copies: dict[str, Tensor] = {}
    for key, name in weight_deltas(module)[tensor].names.items():
        value = getattr(module, name)
        if known is not None and id(value) in known:
            copies[key] = known[id(value)]
            continue
        copies[key] = value.detach().clone()
        if value.is_floating_point():
            copies[key] = copies[key].double().requires_grad_(value.requires_grad)
        if known is not None:
            known[id(value)] = copies[key]
    return copies


def of_group(
    tensors: dict[str, Tensor], group: int, groups: int, whole: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The part for one group of a weight: where there are several, they are the first axis.

    What weights share, and random tensors for it, are the same for all groups.
    """
    return {k: v[group] if groups > 1 and k not in whole else v for k, v in tensors.items()}


def expected_weights(
    method: MethodCase,
    layer: LayerCase,
    net: nn.Module,
    frozen: dict[str, Tensor],
    parameters: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The effective tensors by the paper's formula and the layout's definition, in float64."""
    expected = {}
    view = layer.view(method.view)
    matrices: dict[str, list[Tensor]] = {}
    for name in layer.weights:
        weight = frozen[name].double()
        module, _ = owner_of(net, name)
        places = view(np.arange(weight.numel()).reshape(weight.shape), module)
        result = weight.flatten()
        for group, place in enumerate(places):
            mine = of_group(parameters[name], group, len(places), method.whole)
            where = torch.tensor(place)
            matrices.setdefault(name, []).append(weight.flatten()[where])
            made = method.formula(weight.flatten()[where], mine)
            result = result.index_put((where.flatten(),), made.flatten())
        expected[name] = result.reshape(weight.shape)
    for name, weights in layer.all_biases(net).items() if method.adapts_bias else ():
        outputs = [
            (of_group(parameters[weight], group, groups), matrices[weight][group])
            for weight in weights
            for groups in [getattr(owner_of(net, weight)[0], "groups", 1)]
            for group in range(groups)
        ]
        parts = frozen[name].double()[:, None].chunk(len(outputs))
        made = [method.of_bias(part, *own) for part, own in zip(parts, outputs, strict=True)]
        expected[name] = torch.cat(made)[:, 0]
    return expected


def plain_with(layer: LayerCase, state: dict[str, Tensor], weights: dict[str, Any]) -> nn.Module:
    """A plain double-precision layer whose forward reads the given weights."""
    plain = layer.make().double()
    plain.load_state_dict(state)
    for name, value in weights.items():
        module, tensor = owner_of(plain, name)
        if nn.utils.parametrize.is_parametrized(module, tensor):
            nn.utils.parametrize.remove_parametrizations(module, tensor)
        elif f"{tensor}_g" in module._parameters:
            nn.utils.remove_weight_norm(module)
        module._parameters.pop(tensor, None)
        setattr(module, tensor, value)
        module.sparse = False  # where it is a table: the formula takes dense gradients
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return plain


def run(net: nn.Module, layer: LayerCase, inputs: tuple[Any, ...]) -> Tensor:
    return layer.output(net(*inputs))


def loss(output: Tensor) -> Tensor:
    """Squares, weighed: their plain sum would not see that an output is rotated."""
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype)
    return weights @ output.square().flatten()


def as_dtype(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, PackedSequence):
            return value._replace(data=value.data.to(dtype))
        return tuple(cast(item) for item in value)

    return cast(tuple(inputs))


@everywhere
def test_output_is_bit_identical_right_after_enabling(
    method: MethodCase, layer: LayerCase
) -> None:  # fmt: skip
    net, inputs = layer.make().eval(), layer.inputs()
    before = run(net, layer, inputs).detach().clone()
    adapt(net, method, layer)
    assert torch.equal(run(net, layer, inputs), before)
    assert sorted(name for name, _ in adapted_tensors(net)) == sorted(
        frozen_tensors(net, method, layer)
    )


def adapted_tensors(net: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{path}.{tensor}".lstrip("."), module)
        for path, module in net.named_modules()
        for tensor in weight_deltas(module)
    ]


@everywhere
def test_value_and_gradient_are_those_of_the_formula(method: MethodCase, layer: LayerCase) -> None:
    """Train, eval and a plain layer with the formula's weights agree; so do the gradients."""
    net = layer.make().double().eval()
    state = copy.deepcopy(net.state_dict())
    inputs = as_dtype(layer.inputs(), torch.float64)
    run(net, layer, inputs)  # a weight that is computed by a hook is there from now on
    frozen = frozen_tensors(net, method, layer)
    adapt(net, method, layer)
    randomise(net)
    known: dict[int, Tensor] = {}
    parameters = {name: added(net, name, known) for name in layer.weights}
    expected = expected_weights(method, layer, net, frozen, parameters)
    for name, value in expected.items():
        got = getattr(*owner_of(net, name)).detach()
        torch.testing.assert_close(got, value.detach(), rtol=0, atol=1e-11)

    reference = run(plain_with(layer, state, expected).eval(), layer, inputs)
    loss(reference).backward()
    for mode in (False, True):
        if mode and "train" in layer.differs:
            continue
        net.train(mode)
        net.zero_grad()
        output = run(net, layer, inputs)
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-9)
        loss(output).backward()
        check_gradients(net, parameters)


def check_gradients(net: nn.Module, parameters: dict[str, dict[str, Tensor]]) -> None:
    """Each trained parameter has the gradient that autograd gives its copy in the formula."""
    for weight, leaves in parameters.items():
        module, tensor = owner_of(net, weight)
        for key, leaf in leaves.items():
            parameter = getattr(module, weight_deltas(module)[tensor].names[key])
            assert parameter.requires_grad == leaf.requires_grad
            if leaf.requires_grad:
                scale = 1 + leaf.grad.abs().max().item()
                torch.testing.assert_close(parameter.grad, leaf.grad, rtol=0, atol=1e-9 * scale)


@everywhere
def test_gradients_reach_every_delta_and_nothing_frozen(
    method: MethodCase, layer: LayerCase
) -> None:  # fmt: skip
    net = layer.make()
    with torch.no_grad():
        for parameter in net.parameters():
            if not is_lazy(parameter) and not parameter.any():
                parameter.normal_()  # a bias of zeros gives its factors no gradient
    adapt(net, method, layer)
    randomise(net)
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    loss(run(net, layer, layer.inputs())).backward()
    added = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert added
    padding = method.method == "trainable_tokens" and getattr(net, "padding_idx", None) == 0
    for name, parameter in added.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or padding or "gradients" in layer.differs, name
    assert padding or any(parameter.grad.any() for parameter in added.values())
    assert all(p.grad is None for n, p in net.named_parameters() if n in frozen)
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in net.named_parameters() if n in frozen)


@everywhere
def test_parameter_count_is_that_of_the_paper(method: MethodCase, layer: LayerCase) -> None:
    net = layer.make()
    run(net, layer, layer.inputs())
    biased = {name for weights in layer.all_biases(net).values() for name in weights}

    def count(name: str, rows: int, columns: int) -> int:
        more = method.bias_count(rows, columns) if method.bias_count and name in biased else 0
        return method.count(rows, columns) + more

    shapes = [
        (name, *matrix.shape)
        for name in layer.weights
        for module, tensor in [owner_of(net, name)]
        for matrix in layer.view(method.view)(getattr(module, tensor).detach().numpy(), module)
    ]
    shared = {key: size for _, *shape in shapes for key, size in method.shared(*shape).items()}
    adapt(net, method, layer)
    expected = sum(count(*each) for each in shapes) + sum(shared.values())
    assert sum(p.numel() for p in net.parameters()) == expected


@everywhere
def test_a_saved_delta_gives_a_fresh_network_the_same_output(
    method: MethodCase, layer: LayerCase
) -> None:
    fresh = layer.make()
    net = twin(fresh, layer)
    adapt(net, method, layer)
    randomise(net)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    named = net.named_parameters(remove_duplicate=False)  # what weights share has several names
    trained = {n for n, p in named if p.requires_grad}
    persistent = {n for n, _ in net.named_buffers()} & set(nn.Module.state_dict(net))
    # Settings that no shape shows are entries of a state; tests/test_state_settings.py has them.
    assert {name for name in state if not is_settings(name)} == trained | persistent
    adapt(fresh, method, layer)
    fresh.load_state_dict(state)
    inputs = layer.inputs()
    assert torch.equal(run(fresh.eval(), layer, inputs), run(net.eval(), layer, inputs))


@everywhere
def test_copies_are_independent(method: MethodCase, layer: LayerCase) -> None:
    net = enabled(method, layer).eval()
    randomise(net)
    inputs = layer.inputs()
    before = run(net, layer, inputs).detach().clone()
    copies = [copy.deepcopy(net)]
    if "pickle" not in layer.differs:
        copies.append(pickle.loads(pickle.dumps(net)))
    for other in copies:
        assert torch.equal(run(other, layer, inputs), before)
        randomise(other)
        assert not torch.allclose(run(other, layer, inputs), before)
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in net.parameters())
    assert torch.equal(run(net, layer, inputs), before)


@everywhere
def test_disabling_gives_the_base_back_bit_for_bit(method: MethodCase, layer: LayerCase) -> None:
    net, inputs = layer.make().eval(), layer.inputs()
    output = run(net, layer, inputs).detach().clone()
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    state = copy.deepcopy(net.state_dict())
    classes = [type(module) for module in net.modules()]
    attributes = [set(vars(module)) for module in net.modules()]
    adapt(net, method, layer)
    randomise(net)
    run(net.train(), layer, inputs).sum().backward()
    for other in (copy.deepcopy(net), net):
        disable_fine_tuning(other)
        assert [type(module) for module in other.modules()] == classes
        assert [set(vars(module)) for module in other.modules()] == attributes
        assert {n: p.requires_grad for n, p in other.named_parameters()} == flags
        assert list(other.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
        assert torch.equal(run(other.eval(), layer, inputs), output)


@everywhere
def test_bfloat16_base_with_float32_deltas(method: MethodCase, layer: LayerCase) -> None:
    """The base keeps its dtype, the delta is float32, and the output is the formula's, rounded."""
    net = layer.make().to(torch.bfloat16).eval()
    inputs = as_dtype(layer.inputs(), torch.bfloat16)
    if "bfloat16" in layer.differs:
        with pytest.raises(RuntimeError):
            run(net, layer, inputs)
        return
    run(net, layer, inputs)  # a weight that is computed by a hook has its dtype from now on
    plain = run(twin(net, layer), layer, inputs).detach()
    frozen = frozen_tensors(net, method, layer)
    adapt(net, method, layer)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.equal(run(net, layer, inputs), plain)
    randomise(net)
    output = run(net, layer, inputs)
    assert output.dtype == plain.dtype
    parameters = {name: added(net, name) for name in layer.weights}
    for name, value in expected_weights(method, layer, net, frozen, parameters).items():
        got = getattr(*owner_of(net, name))
        assert got.dtype == frozen[name].dtype
        nearest = value.detach().to(got.dtype)
        torch.testing.assert_close(got.detach(), nearest, rtol=2**-7, atol=1e-6)
    loss(output.float()).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())


@everywhere
def test_autocast_gives_the_dtype_of_the_plain_layer(method: MethodCase, layer: LayerCase) -> None:
    net, inputs = layer.make().eval(), layer.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(net, layer, inputs).detach()
    adapt(net, method, layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(net, layer, inputs)
    assert output.dtype == plain.dtype
    randomise(net)
    exact = run(net, layer, inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(net, layer, inputs)
    scale = exact.abs().max().item() + 1
    torch.testing.assert_close(output.float(), exact.float(), rtol=0, atol=0.05 * scale)
    output.float().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@everywhere
def test_a_delta_that_is_no_number_shows(method: MethodCase, layer: LayerCase) -> None:
    net = enabled(method, layer).eval()
    inputs = layer.inputs()
    for parameter in net.parameters():
        randomise(net)
        assert run(net, layer, inputs).isfinite().all()
        with torch.no_grad():
            parameter.fill_(torch.nan)
        assert run(net, layer, inputs).isnan().any()


def write_into(output: Tensor) -> None:
    """What others write into outputs, as ``nn.ReLU(inplace=True)`` does."""
    output.add_(1)
    output[..., 0].zero_()
    output.relu_()


def shapes_of(inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The inputs, the same without their first axis, and with one more."""
    if not all(isinstance(value, Tensor) for value in inputs):
        return [inputs]
    return [inputs, tuple(value[0] for value in inputs), tuple(value[None] for value in inputs)]


def is_taken(layer: LayerCase, inputs: tuple[Any, ...]) -> bool:
    """Whether the plain layer takes such inputs and lets its output be written into."""
    try:
        output = run(layer.make().double(), layer, inputs)
        write_into(output)
        output.sum().backward()
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


@everywhere
def test_outputs_may_be_written_into(method: MethodCase, layer: LayerCase) -> None:
    """Value and gradients are those of the same writes into a copy."""
    net = enabled(method, layer, torch.float64)
    randomise(net)
    tried = 0
    for inputs in shapes_of(as_dtype(layer.inputs(), torch.float64)):
        for mode in (True, False) if is_taken(layer, inputs) else ():
            net.train(mode and "train" not in layer.differs)
            got = []
            for copies in (True, False):
                output = run(net, layer, inputs)
                output = output.clone() if copies else output
                write_into(output)
                weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype)
                gradients = torch.autograd.grad(
                    weights @ output.flatten(), list(net.parameters()), allow_unused=True
                )
                got.append((output.detach(), *(g for g in gradients if g is not None)))
            torch.testing.assert_close(got[1], got[0], rtol=1e-10, atol=1e-10)
            tried += 1
    assert bool(tried) != ("written" in layer.differs)


@everywhere
def test_inputs_that_are_written_into_later_never_give_wrong_gradients(
    method: MethodCase, layer: LayerCase
) -> None:
    """Where the gradient needs what was there, autograd says so, as for a layer that is trained."""
    net = enabled(method, layer, torch.float64)
    randomise(net)
    inputs = as_dtype(layer.inputs(), torch.float64)
    if not all(isinstance(value, Tensor) for value in inputs):
        return
    written = [value.clone() for value in inputs]
    expected = torch.autograd.grad(run(net, layer, inputs).sum(), list(net.parameters()))
    output = run(net, layer, tuple(written))
    for value in written:
        value.zero_()
    try:
        found = torch.autograd.grad(output.sum(), list(net.parameters()))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "layer", "reason"), IMPOSSIBLE)
def test_what_is_impossible_says_why_and_changes_nothing(
    method: MethodCase, layer: LayerCase, reason: str
) -> None:
    # A size that fits some weights of a layer is clipped for the others, unless that is refused.
    clips = [f"clip_{name}" for name in ("rank", "block_size", "n_frequency")]
    own = {f.name for f in dataclasses.fields(KNOWN[method.method])}
    settings = method.settings | {name: False for name in clips if name in own}
    method = dataclasses.replace(method, settings=settings)
    net = layer.make()
    before = full_state(net)
    with pytest.raises(ValueError, match=reason):
        adapt(net, method, layer)
    assert full_state(net) == before


def test_every_pair_of_the_matrix_is_tested() -> None:
    """Of a method and a layer type, a method and a property, a layer type and a property."""
    possible = {cell.id for cell in CELLS}
    assert set().union(*PROPERTIES.values()) == possible
    for name, tested in PROPERTIES.items():
        for side, known in ((0, METHODS), (1, LAYERS)):
            wanted = {cell.split("-")[side] for cell in possible}
            missing = wanted - {cell.split("-")[side] for cell in tested}
            assert not missing, f"{name} is never tested for {missing & set(known)}"
