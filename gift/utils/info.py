"""Rows, tables and summaries of what is trainable in a network."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.nn.parameter import is_lazy

from gift.budget import suggest
from gift.core.dynamic_class import plain_class, spec_of
from gift.core.frozen_norms import kept_modes
from gift.core.record import record_of
from gift.core.trained import named_trainable
from gift.core.weights.record import present_weight_deltas
from gift.engine.claims import size_of
from gift.engine.dry_run import cost_of, on_meta, rehearsed
from gift.errors import AdaptationError
from gift.kernels.cost_model import Form
from gift.kernels.operands import WATCHING
from gift.kernels.recomputed import WATCHING as KEPT
from gift.kernels.recomputed import Kept
from gift.methods import METHODS, method_of
from gift.strategies import (
    STRATEGIES,
    BitFitFineTuningStrategy,
    BottleneckFineTuningStrategy,
    FineTuningStrategy,
    FullFineTuningStrategy,
    LoReFTFineTuningStrategy,
    NormFineTuningStrategy,
    PrefixFineTuningStrategy,
    PromptFineTuningStrategy,
    PTuningFineTuningStrategy,
    VisualPromptFineTuningStrategy,
)
from gift.support.trees import Node, Shown, as_html, as_text, condensed

ROW_HEADER = ("index", "name", "shape", "count")
"""Titles of the columns that `collect_trainable_parameters` gives."""


def collect_trainable_parameters(net: nn.Module) -> tuple[list[list[Any]], int]:
    """Return the trainable parameters of any network, fine-tuned or not.

    Returns:
        Rows of ``[index, name, shape, count]`` in the order of the network, and the total count. A
        lazy parameter has no shape and counts as zero.

    Example:
        >>> from torch import nn
        >>> from gift.utils.info import collect_trainable_parameters
        >>> collect_trainable_parameters(nn.Linear(3, 2))
        ([[0, 'weight', [2, 3], 6], [1, 'bias', [2], 2]], 8)
    """
    rows: list[list[Any]] = []
    for index, (name, parameter) in enumerate(named_trainable(net)):
        shape = None if is_lazy(parameter) else list(parameter.shape)
        rows.append([index, name, shape, size_of([parameter])])
    return rows, sum(row[3] for row in rows)


def table_info(rows: Sequence[Sequence[Any]], header: Sequence[str] = ROW_HEADER) -> str:
    """Format rows as a table.

    Args:
        rows: rows as from `collect_trainable_parameters`.
        header: one title for each column.

    Example:
        >>> from gift.utils.info import table_info
        >>> print(table_info([[0, "fc.bias", [2], 2]], header=["index", "name", "shape", "count"]))
          index  name     shape      count
        -------  -------  -------  -------
              0  fc.bias  [2]            2
    """
    return tabulate([[_plain(v) for v in row] for row in rows], headers=list(header))


def _plain(value: Any) -> Any:
    return str(list(value)) if isinstance(value, list | tuple) else value


def tree(net: nn.Module, colours: bool | None = None) -> str:
    """Return a network as a tree: what is trained, adapted and frozen, and by which cap.

    Equal layers in a row stand for each other, and what is frozen as a whole is one line. A
    notebook shows it with branches to open and close.

    Args:
        net: the network, fine-tuned or not.
        colours: whether to use the colours of terminals; None does so if standard output is one
            and rich is installed.

    Example:
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoRALinearFineTuningStrategy
        >>> from gift.utils.info import tree
        >>> net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.LayerNorm(8))
        >>> report = enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1))
        >>> print(tree(net, colours=False))
        Sequential
        ├── [0-2] 3 x Linear: lora(rank=1) on weight, 16 trained, cap 0 (adapted)
        └── 3 LayerNorm: 16 parameters (frozen)
    """
    nodes = _nodes(net)
    return Shown(as_text(condensed(nodes), colours), lambda: as_html(nodes))


def _nodes(net: nn.Module) -> Node:
    """Return the tree of the modules that have parameters."""
    root = record_of(net).report.nodes() if spec_of(net).network else Node(type(net).__name__)
    trained = {id(p) for _, p in named_trainable(net)}
    for path, module in net.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own or root.at(path).text or _is_claimed(root, path):
            continue
        node = root.at(path)
        count = sum(id(p) in trained for p in own)
        node.text = f"{plain_class(type(module)).__name__}: {size_of(own):,} parameters"
        node.state = "trained" if count == len(own) else "" if count else "frozen"
        node.children = [child for child in node.children if child.name not in module._parameters]
    for path, module in net.named_modules():
        outer = root.find(path)
        if path and outer is not None and not outer.text:
            outer.text = plain_class(type(module)).__name__
    root.settle()
    return root


def _is_claimed(root: Node, path: str) -> bool:
    """Whether a module lies in one that a cap claimed."""
    node = root
    for name in path.split(".") if path else ():
        if node.text:
            return True
        node = next((child for child in node.children if child.name == name), Node(""))
    return False


def summary(net: nn.Module) -> str:
    """Return trainable and total parameters and their ratio; for each cap, if fine-tuned.

    A notebook shows the network as a tree below it, see `tree`.
    """
    return Shown(_summary(net), lambda: f"<pre>{escape(_summary(net))}</pre>{as_html(_nodes(net))}")


def _summary(net: nn.Module) -> str:
    if spec_of(net).network:
        return record_of(net).report.summary()
    total, (_, trainable) = size_of(net.parameters()), collect_trainable_parameters(net)
    share = trainable / total if total else 0
    return (
        f"{type(net).__name__}: {trainable:,} of {total:,} parameters are trainable ({share:.3%})"
    )


class MethodRow(NamedTuple):
    """The cost of one method on a network.

    Args:
        name: name of the method, or or one of `WITHOUT_METHOD`.
        parameters: number of trained parameters. This and all other numbers are None if the method
            cannot be applied.
        share: their share of the network's parameters.
        megabytes: size of the state (trained parameters and buffers), in millions of bytes.
        tensors: number of the network's tensors that are adapted, or trained themselves.
        larger: number of deltas with more parameters than the weight that they change.
        note: the sizes that a budget allows, or why the method cannot be applied.
    """

    name: str
    parameters: int | None = None
    share: float | None = None
    megabytes: float | None = None
    tensors: int | None = None
    larger: int | None = None
    note: str = ""


# Methods that wrap modules, or train a network's own parameters.
WITHOUT_METHOD: dict[str, type[FineTuningStrategy]] = {
    "bottleneck": BottleneckFineTuningStrategy,
    "loreft": LoReFTFineTuningStrategy,
    "prompt": PromptFineTuningStrategy,
    "p_tuning": PTuningFineTuningStrategy,
    "prefix": PrefixFineTuningStrategy,
    "visual_prompt": VisualPromptFineTuningStrategy,
    "bitfit": BitFitFineTuningStrategy,
    "norm": NormFineTuningStrategy,
    "full": FullFineTuningStrategy,
}
"""Strategies that are named beside methods: they wrap modules, or train what is there."""


def forms(net: nn.Module, *inputs: Any) -> dict[str, Form]:
    """Return how a training step computes each layer with a low-rank delta, for these inputs.

    The form depends on shapes: see `gift.kernels.cost_model`. The network is run once, in
    evaluation mode, so that its statistics do not change. With dropout on the delta's inputs, a
    training step uses the form ``"side"`` instead.

    Args:
        net: an enabled network.
        *inputs: inputs of its forward pass.

    Returns:
        The form by the path of the layer. Layers that are not listed compute with their effective
        weight.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoRAConvFineTuningStrategy
        >>> from gift.utils.info import forms
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 512, 3, stride=16))
        >>> report = enable_fine_tuning(net, LoRAConvFineTuningStrategy(rank=3))
        >>> forms(net, torch.randn(2, 3, 64, 64))
        {'0': 'whole', '2': 'side'}
    """
    found: dict[str, Form] = {}
    _watch(net, inputs, found.__setitem__)
    return found


def kept_inputs(net: nn.Module, *inputs: Any) -> dict[str, str]:
    """Return what each layer with a low-rank delta keeps of its input for the backward pass.

    The network is run once, in evaluation mode, so that its statistics do not change. See
    `gift.kernels.recomputed`.

    Args:
        net: an enabled network.
        *inputs: inputs of its forward pass.

    Returns:
        By the path of the layer ``"input"`` if it keeps its input; otherwise the operation that
        made the input, which is computed again from what autograd keeps of that operation. A layer
        that needs no input is not listed, nor is one that computes with its effective weight.

    Example:
        A small output of an activation is not worth it:

        >>> import torch
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies import LoRALinearFineTuningStrategy
        >>> from gift.utils.info import kept_inputs
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=3))
        >>> [kept_inputs(net, torch.randn(rows, 64)) for rows in (256, 4)]
        [{'0': 'input', '2': 'Gelu'}, {'0': 'input', '2': 'input'}]
    """
    found: dict[str, str] = {}
    running: list[str] = []

    def kept(how: Kept) -> None:
        if running:  # the first one is of the layer's own input
            found[running.pop()] = how.source

    def layer(name: str, form: Form) -> None:
        running[:] = [name]

    KEPT.append(kept)
    try:
        _watch(net, inputs, layer)
    finally:
        KEPT.remove(kept)
    return found


def _watch(net: nn.Module, inputs: Sequence[Any], note: Callable[[str, Form], None]) -> None:
    """Run a network, and note the path and form of each layer with a low-rank delta."""
    names = {module: name for name, module in net.named_modules()}

    def seen(layer: nn.Module, form: Form) -> None:
        if layer in names:  # another thread may run another network
            note(names[layer], form)

    WATCHING.append(seen)
    try:
        with kept_modes(net), torch.enable_grad():
            net.eval()
            net(*inputs)
    finally:
        WATCHING.remove(seen)


def compare_methods(
    net: nn.Module, methods: Iterable[str] | None = None, budget: int | float | str | None = None
) -> list[MethodRow]:
    """Return what each method would cost on a network, as the rows of `table_methods`."""
    names = [*METHODS, *WITHOUT_METHOD] if methods is None else list(methods)
    strategies = {name: _strategy_for(name) for name in names}
    twin = on_meta(net)
    rows = [_method_row(twin, name, made, budget) for name, made in strategies.items()]
    return sorted(rows, key=lambda row: (row.parameters is None, row.parameters))


def table_methods(
    net: nn.Module, methods: Iterable[str] | None = None, budget: int | float | str | None = None
) -> str:
    """Return a table of what each method would cost on a network, fewest parameters first.

    The network is not changed, and its values are neither read nor copied: everything is counted on
    a copy on the meta device.

    Args:
        net: the network.
        methods: names of methods, each of which is applied to all layers that gift knows, with its
            default settings; also ``bottleneck``, ``loreft``, ``prompt``, ``p_tuning``,
            ``prefix`` and ``visual_prompt``, which wrap modules, and ``bitfit``, ``norm`` and
            ``full``, which train the biases, the norm layers, or everything. None means all of
            them.
        budget: for methods with a rank, or another size setting, choose the largest value that this
            budget allows; see `gift.suggest`.

    Raises:
        ValueError: if a method is unknown.

    Example:
        >>> from torch import nn
        >>> from gift.utils.info import table_methods
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10, bias=False))
        >>> print(table_methods(net, ["lora", "svdiff", "bitfit", "full"]))
        method      parameters     share    MB    tensors    deltas > weight  note
        --------  ------------  --------  ----  ---------  -----------------  ------
        svdiff              74    1.502%  0.00          2                  0
        bitfit             128    2.597%  0.00          2                  0
        lora               606   12.297%  0.00          2                  0
        full             4,928  100.000%  0.02          5                  0
    """
    rows = [
        (row.name, f"{row.parameters:,}", f"{row.share:.3%}", f"{row.megabytes:.2f}",
         row.tensors, row.larger, row.note)
        if row.parameters is not None else (row.name, *"-----", row.note)
        for row in compare_methods(net, methods, budget)
    ]  # fmt: skip
    header = ["method", "parameters", "share", "MB", "tensors", "deltas > weight", "note"]
    right = ("left", *["right"] * 5, "left")
    return tabulate(rows, headers=header, disable_numparse=True, colalign=right if rows else None)


def _strategy_for(name: str) -> FineTuningStrategy:
    if name in WITHOUT_METHOD:
        return WITHOUT_METHOD[name]()
    return STRATEGIES[f"{method_of(name, {}).strategy_prefix}AllFineTuningStrategy"]()


def _method_row(net: nn.Module, name: str, strategy: FineTuningStrategy, budget: Any) -> MethodRow:
    note, own = "", {id(p) for p in nn.Module.parameters(net)}
    try:
        if budget is not None and name in METHODS and method_of(name, {}).size_setting is not None:
            suggestion = suggest(net, budget, strategy)
            strategy, ranks = suggestion.strategy, suggestion.ranks.values()
            setting = method_of(name, {}).size_setting
            note = f"{setting} {min(ranks)}" + (f" to {max(ranks)}" if len({*ranks}) > 1 else "")
        with rehearsed(net, strategy) as report:
            cost, total = cost_of(net), report.total_before
            larger = len(report.larger_than_weight)
            deltas = [a for module in net.modules() for a in present_weight_deltas(module).values()]
            tensors = sum(delta.owner is None for delta in deltas)
            tensors += sum(id(p) in own for _, p in named_trainable(net))
    except ValueError as error:
        return MethodRow(name, note=_reason(error))
    share = cost.parameters / total if total else 0.0
    return MethodRow(name, cost.parameters, share, cost.bytes / 1e6, tensors, larger, note)


def _reason(error: ValueError) -> str:
    """Return the first problem that an error lists line by line, or its message."""
    first, *listed = str(error).splitlines()
    if not isinstance(error, AdaptationError) or not listed:
        return first.rstrip(":")
    return listed[0].strip() + (f" (and {len(listed) - 1} more)" if len(listed) > 1 else "")
