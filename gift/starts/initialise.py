"""Set the start of the LoRAs of a network from data."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.delta import put_values
from gift.core.dynamic_class import plain_class
from gift.core.record import fine_tuned_part
from gift.core.undo.snapshot import transaction
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.core.weights.frozen import present_tensor
from gift.core.weights.record import WeightDelta
from gift.errors import AdaptationError, GiftWarning, closest, refuse, some
from gift.layers.table import dotted, forwards_of
from gift.methods.settings import is_number
from gift.starts.collecting import Gradients, Inputs
from gift.starts.formulas import STARTS, Factors, Layer, Start
from gift.starts.places import REFUSED, Initialised, Places, places_of
from gift.support.tensors import wide

_LINEAR = frozenset(forwards_of("linear", "packed linear", "transposed linear"))


def initialise(
    net: nn.Module,
    batches: Iterable[Any],
    start: str = "eva",
    loss: Callable[[Any], Tensor] | None = None,
    call: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Initialised:
    r"""Set the start of LoRAs from data, before training; the network computes what it did before.

    ============ ===================================================================================
    ``eva``      `A` is the principal components of a layer's inputs around their mean, `B` stays
                 zero (Paischer et al. 2024, https://arxiv.org/abs/2410.07170). For LoRA, rsLoRA,
                 LoRA-FA and DoRA. `gift.starts.allocate`, called before enabling, moves ranks
                 between layers as the paper does.
    ``corda``    :math:`U_r S_r V_r^\top = W_0 C`, with the second moment `C` of the inputs:
                 :math:`B_0 = U \sqrt{S / s}`, :math:`A_0 = \sqrt{S / s} V^\top C^{-1}` (Yang et al.
                 2024, https://arxiv.org/abs/2406.05223), `s` the scaling. The largest singular
                 values adapt to a task; ``keep_knowledge=True`` takes the smallest ones, with
                 batches of what must be kept. For ``guided``.
    ``lora_ga``  :math:`A_0 = c V_{1..r}^\top`, :math:`B_0 = c U_{r+1..2r}` of the gradient of the
                 weight, with :math:`c = d_{out}^{1/4} / \sqrt{\gamma}` and ``gamma=16`` (Wang et
                 al. 2024, https://arxiv.org/abs/2407.05000). Needs `loss`. For ``guided``.
    ============ ===================================================================================

    The values are those of the delta, so a saved delta needs no data when it is loaded. Linear
    layers are initialised; all others keep their start, and the result names them.

    While data are read, memory grows by 8 bytes for each element of ``(in, in)`` of each layer, or
    of ``(out, in)`` for ``lora_ga``. Each layer then takes the time of one decomposition in double
    precision: for 4096 inputs about a minute on a processor, seconds on an accelerator.

    Args:
        net: a network that is being fine-tuned, or a bigger module around one. It is called in the
            mode in which it is: ``eval()`` omits dropout.
        batches: what the network gets, as a loader gives it. A dictionary is passed as keywords,
            and positions that its ``attention_mask`` hides are left out; a tuple or list by
            position.
        start: one of the above.
        loss: the loss of a batch with the network, for ``lora_ga``. It may call `net`.
        call: calls the network with a batch, if it is not called as described.
        settings: of the start.

    Returns:
        What was done for each weight.

    Raises:
        RuntimeError: if nothing in `net` is being fine-tuned.
        ValueError: for an unknown start or setting, or if there are no batches.
        AdaptationError: naming all layers for which the start cannot be made, or if there is none
            for which it can. The network is unchanged then.

    Example:
        >>> import gift, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = gift.enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy())
        >>> loader = torch.randn(8, 32, 64)
        >>> list(gift.initialise(net, loader).shares)
        ['0.weight', '2.weight']
    """
    network = fine_tuned_part(net)
    refuse_meanwhile(network)
    chosen = _start(start, settings, loss)
    settings = chosen.settings | settings
    places, left = places_of(network, lambda module, delta: _fits(chosen, module, delta))
    if not places:
        raise AdaptationError(
            f"{start} initialises linear layers that are adapted by {' or '.join(chosen.methods)}; "
            f"the adapted weights are {some(left)}"
        )
    layers = {path: module for path, (module, _) in places.items()}
    seen: Inputs | Gradients
    if chosen.reads == "gradients":
        assert loss is not None
        seen = Gradients(layers)
        count = seen.run(loss, batches)
    else:
        seen = Inputs(layers, normalised=start == "corda")
        count = seen.run(call or (lambda batch: called(net, batch)), batches)
        if start == "eva":
            seen.found = seen.centred()
    if not count:
        raise ValueError("there are no batches: give a list or a loader, not an exhausted iterator")
    missed = [path for path in places if path not in seen.found]
    problems: list[str] = []
    values: dict[str, dict[str, Tensor]] = {}
    shares: dict[str, float] = {}
    with torch.no_grad():
        for path, (total, calls) in seen.found.items():
            module, delta = places[path]
            mean = total / (count if chosen.reads == "gradients" else calls)
            try:
                made = _factors(chosen, module, delta, mean, settings)
            except (AdaptationError, torch.linalg.LinAlgError) as error:
                problems.append(f"{path}: {error}")
                continue
            values[path], shares[path] = _values(delta, made), made.share
    refuse(AdaptationError, REFUSED, problems)
    _write(network, places, values)
    if missed:
        warnings.warn(
            f"no batch reached {some(missed)}, which keep their start", GiftWarning, stacklevel=2
        )
    return Initialised(start, count, shares, [*left, *missed])


def _start(name: str, settings: Mapping[str, Any], loss: Any) -> Start:
    if name not in STARTS:
        raise ValueError(f"unknown start {name!r}; known: {sorted(STARTS)}, closest: "
                         f"{closest(str(name), STARTS)}")  # fmt: skip
    start = STARTS[name]
    if unknown := sorted(settings.keys() - start.settings.keys()):
        raise ValueError(f"{name} has no setting {unknown}; it has {list(start.settings)}")
    gamma = settings.get("gamma", 1.0)
    if not (is_number(gamma) and gamma > 0):
        raise ValueError(f"gamma is {gamma!r}, expected a finite number above zero")
    if (start.reads == "gradients") != (loss is not None):
        need = "needs the loss of a batch" if loss is None else "computes no gradients"
        raise ValueError(f"{name} {need}: loss={'...' if loss is None else None}")
    return start


def _fits(start: Start, module: nn.Module, delta: WeightDelta) -> bool:
    """Whether a start can initialise the delta of a layer's weight."""
    return is_linear(module) and delta.method.name in start.methods and not delta.mesh_axes


def is_linear(module: nn.Module) -> bool:
    """Whether a start can set a layer of this class."""
    return dotted(plain_class(type(module)).forward) in _LINEAR


def called(net: nn.Module, batch: Any) -> Any:
    """Call a network with a batch as a loader gives it."""
    if isinstance(batch, Mapping):
        return net(**batch)
    return net(*batch) if isinstance(batch, list | tuple) else net(batch)


def _factors(
    start: Start, module: nn.Module, delta: WeightDelta, data: Tensor, settings: dict[str, Any]
) -> Factors:
    if not bool(torch.isfinite(data).all()):
        raise AdaptationError(f"its {start.reads} are not finite")
    frozen = delta.under(module, present_tensor(module, "weight").detach())
    assert delta.layout is not None
    weight = wide(delta.layout.to_matrix(frozen))
    method: Any = delta.method
    return start.factors(Layer(data, weight, method.rank, method.scaling, settings))


def _values(delta: WeightDelta, made: Factors) -> dict[str, Tensor]:
    """Return the values of a delta's tensors, by their names on the module."""
    values = {"lora_A": made.right}
    if made.left is not None:
        values |= {"lora_B": made.left}
        prefix = delta.method.name
        values |= {f"{prefix}_B0": made.left, f"{prefix}_A0": made.right}
    return {delta.names[key]: value for key, value in values.items()}


def _write(network: nn.Module, places: Places, values: dict[str, dict[str, Tensor]]) -> None:
    written = []
    for path, own in values.items():
        module, _ = places[path]
        written += [{**module._parameters, **module._buffers}[name] for name in own]
    with transaction(network, writes=[tensor for tensor in written if tensor is not None]):
        for path, own in values.items():
            put_values(places[path][0], own)
