"""Enable, plan and disable fine-tuning."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.core.delta import named_deltas
from gift.core.dynamic_class import spec_of
from gift.core.holders import memory_conflicts, refuse_held_elsewhere
from gift.core.io_spec import drop_empty_io_spec, renew_io_spec
from gift.core.movers import offloaded
from gift.core.network import install_record, remove_record
from gift.core.record import NetworkRecord, record_of
from gift.core.report import Report
from gift.core.stack import freeze_deltas, freeze_tensors_of_base
from gift.core.trained import trained_of_the_base
from gift.core.undo.frames import Below
from gift.core.undo.snapshot import Snapshot, all_or_nothing, transaction
from gift.core.undo.temporary_state import refuse_meanwhile
from gift.core.undo.undo import tensor_of
from gift.core.undo.undoable import check_undoable
from gift.core.unfreeze import unfreezable_problems
from gift.core.weights.sharing import shares
from gift.engine.claims import sizes_of
from gift.engine.leftover import describe_leftover, hints_for_strangers
from gift.engine.walk import Walk, closest_names
from gift.errors import AdaptationError, GiftWarning, some
from gift.strategies.base import Cap, FineTuningStrategy
from gift.support.sharding import agree, is_fully_sharded, is_sharded
from gift.support.threads import changing


def enable_fine_tuning(
    module: nn.Module,
    strategy: FineTuningStrategy,
    replace_parameter_function: bool = True,
    trainable_state_dict: bool = True,
    keep_base: bool = True,
    recompute_inputs: bool = True,
    stack: bool = False,
) -> Report:
    """Fine-tune `module` by a strategy: its caps decide what is trained, everything else is frozen.

    The network is changed in place and stays the same object, with all base names unchanged.
    Afterwards, ``module.parameters()`` gives the trained parameters only, and
    ``module.state_dict()`` gives these and the persistent buffers. If anything goes wrong, the
    network is left as it was.

    Args:
        module: the network.
        strategy: what to do with it.
        replace_parameter_function: let ``parameters()`` give the trained parameters only;
            `gift.utils.network_tool.trainable_parameters` gives them in any case.
        trainable_state_dict: let ``state_dict()`` give trained parameters and buffers only.
        keep_base: keep a copy of what training changes in place (base parameters that are trained,
            and buffers), so that `disable_fine_tuning` can restore the base.
        recompute_inputs: let adapted layers compute their inputs again in the backward pass, where
            that takes little time and autograd keeps what it needs; False keeps the inputs, which
            takes more memory. See `gift.kernels.recomputed`.
        stack: for a network that is being fine-tuned already: keep its delta, frozen, as part of
            the base, and train the new one on top of it. ``state_dict()``, `gift.save` and
            `disable_fine_tuning` are then about the new one alone, and disabling gives back the
            network with the first delta. A parameter name that is taken gets a number
            (``lora_A_2``).

    Returns:
        What the strategy did; it prints as a table.

    Raises:
        TypeError: if `module` is not a module, `strategy` is not a strategy, or the strategy is for
            another type of network.
        ValueError: if no cap matches anything, or weights cannot be adapted as requested; all of
            them are named.
        RuntimeError: if the network is already being fine-tuned without `stack`, or is not with it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.strategies.lora import LoRAAllFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = enable_fine_tuning(net, LoRAAllFineTuningStrategy())
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> list(net.state_dict())
        ['0.lora_B', '0.lora_A', '2.lora_B', '2.lora_A']
    """
    _refuse(module, strategy, stack)
    with all_or_nothing(module) as change:
        snapshot = change.before
        below = Below(module) if stack else None
        if stack:
            freeze_deltas(module)
        report, named = _apply(module, strategy, snapshot)
        if strategy.dry_run:
            snapshot.rollback()
            return report
        undo = snapshot.commit(keep_base, below)
        drop_empty_io_spec(module)
        record = NetworkRecord(
            chosen={name for name, p in named.items() if p.requires_grad},
            report=report,
            undo=undo,
            keeps_base=keep_base,
            only_trainable_parameters=replace_parameter_function,
            only_trainable_state=trainable_state_dict,
            recipe=_recipe(strategy),
            shares=shares(module),
            below=remove_record(module) if stack else None,
        )
        install_record(module, record)
        _warn(report, strategy, module)  # it raises where warnings are errors
        for _, _, delta in () if recompute_inputs else named_deltas(module):
            delta.recompute_inputs = False
        for parameter in named.values():
            parameter.grad = None  # else an optimizer applies it to a frozen tensor
    return report


@contextmanager
def enabling_trained(
    module: nn.Module, strategy: FineTuningStrategy, **options: Any
) -> Iterator[Report]:
    """Enable a strategy that was trained before; its values are loaded inside the context.

    If anything fails in the context, the network is restored. Warnings about the strategy are
    suppressed, because they were issued when it was enabled first.
    """
    with all_or_nothing(module) as change:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)
            report = enable_fine_tuning(module, strategy, **options)
        change.before.written += values_of_the_base(module)
        yield report


def values_of_the_base(module: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors that a trained state is about to overwrite, and their values in the base."""
    record = record_of(module)
    if record.keeps_base:
        return [(tensor_of(m, name), value) for m, name, value in record.undo.values]
    written = [p for _, p in trained_of_the_base(module)] + [*module.buffers()]
    return [(tensor, tensor.detach().clone()) for tensor in written if not is_lazy(tensor)]


def plan_fine_tuning(module: nn.Module, strategy: FineTuningStrategy) -> Report:
    """Return the report that `enable_fine_tuning` would give, without changing the network.

    Args:
        module: the network.
        strategy: what would be done to it.

    Raises:
        TypeError, ValueError, RuntimeError: as `enable_fine_tuning`.

    Example:
        >>> from torch import nn
        >>> from gift import plan_fine_tuning
        >>> from gift.strategies.lora import LoRAAllFineTuningStrategy
        >>> net = nn.Linear(64, 10)
        >>> plan_fine_tuning(net, LoRAAllFineTuningStrategy()).trainable_after
        222
    """
    _refuse(module, strategy)
    devices = {p.device.index for p in nn.Module.parameters(module) if p.is_cuda}
    generators = torch.random.fork_rng(sorted(d for d in devices if d is not None))
    with generators, all_or_nothing(module) as change:
        report, _ = _apply(module, strategy, change.before)
        change.before.rollback()
    return report


@changing
def disable_fine_tuning(module: nn.Module) -> nn.Module:
    """Restore the base network bit for bit: classes, names, values, ``requires_grad``, modes.

    The deltas are discarded, and so are the values of what was trained in place.

    Args:
        module: a network that `enable_fine_tuning` was called with, or a copy of one.

    Returns:
        `module`, for convenience.

    Raises:
        RuntimeError: if it is not being fine-tuned, or the values of the base were not kept.
    """
    check_undoable(module)
    with transaction(module) as change:
        undo = remove_record(module).undo
        undo.put_structure(module)
        values = undo.present_values()
        change.finish(lambda: undo.put_values(values))
    return module


def _refuse(module: nn.Module, strategy: FineTuningStrategy, stack: bool = False) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to fine-tune, got {type(module).__name__}")
    if not isinstance(strategy, FineTuningStrategy):
        hint = " (an instance of it, with parentheses)" if isinstance(strategy, type) else ""
        raise TypeError(f"expected a FineTuningStrategy{hint}, got {strategy!r}")
    refuse_meanwhile(module, "merged", "computing rows")
    refuse_meanwhile(module, itself=False)  # the context would restore that part at its end
    if is_fully_sharded(module) and any(map(is_sharded, nn.Module.parameters(module))):
        sharded = [name for name, p in nn.Module.named_parameters(module) if is_sharded(p)]
        raise ValueError(
            f"{len(sharded)} parameters are already sharded, the first is {sharded[0]!r}: enable "
            "fine-tuning before sharding"
        )
    if found := offloaded(module):
        raise ValueError(
            f"the weights of {found}: their hooks fetch each tensor by its name and do not know "
            "deltas. Load the network without offloading to fine-tune it"
        )
    if stack:
        check_undoable(module, needs_base=False)
    for path, part in module.named_modules():
        if any(spec_of(part)) and not stack:
            raise RuntimeError(
                f"{path or 'the network'} is already being fine-tuned: call disable_fine_tuning "
                "for the base, or gift.merge to keep what was trained; stack=True keeps what was "
                "trained as it is, frozen, and trains another delta on top of it; to train by two "
                "strategies, merge them and enable once"
            )
        if type(part).__name__ in _WRAPPERS or isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{path or 'the network'} is a {type(part).__name__}: enable fine-tuning on the "
                "network inside first, then wrap, compile or script it"
            )
    refuse_held_elsewhere(module)


def _recipe(strategy: FineTuningStrategy) -> dict[str, Any] | None:
    try:
        return strategy.to_config()
    except ValueError:  # lambdas: a file cannot name them
        return None


_WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
)


def _apply(
    module: nn.Module, strategy: FineTuningStrategy, snapshot: Snapshot
) -> tuple[Report, dict[str, nn.Parameter]]:
    """Apply the caps and freeze the rest; returns the report and all parameters by all names."""
    parameters: list[Any] = [kept.tensor for _, _, kept in snapshot.parameters]
    total, trainable = sizes_of(parameters)
    report = Report(
        network=type(module).__name__,
        strategy=repr(strategy),
        caps=strategy.cap_texts,
        optional={n for n, c in enumerate(strategy.caps) if getattr(c.check, "optional", False)},
        total_before=total,
        trainable_before=trainable,
    )
    renew_io_spec(module)
    walk = Walk(module, strategy, guard=lambda: snapshot.values)
    freeze_tensors_of_base(module)
    if walk.problems:
        raise AdaptationError(
            f"{type(strategy).__name__} cannot be applied, the network is unchanged",
            walk.problems,
        )
    report.claims = walk.claims
    report.clipped = walk.clipped
    if not walk.claims:
        raise ValueError(_nothing_matched(module, strategy, report))
    own = {id(parameter) for parameter in parameters}
    report.leftover = describe_leftover(module, strategy, walk.kept, own, total)
    named = dict(module.named_parameters(remove_duplicate=False))
    _agree(module, snapshot)
    frozen = {id(p): p for p in parameters if id(p) not in walk.kept}
    for parameter in frozen.values():
        parameter.requires_grad = False
    if wrong := unfreezable_problems(module, [p for p in parameters if p.requires_grad]):
        raise AdaptationError(
            f"{type(strategy).__name__} cannot be applied, the network is unchanged, as it trains "
            "what must stay frozen",
            wrong,
        )
    if wrong := memory_conflicts(module, snapshot):
        raise AdaptationError(
            f"{type(strategy).__name__} cannot be applied, the network is unchanged:\n  "
            + "\n  ".join(wrong)
        )
    # Tied parameters are listed under their first name.
    report.frozen = [name for name, p in named.items() if frozen.pop(id(p), None) is not None]
    report.total_after, report.trainable_after = sizes_of(named.values())
    return report, named


def _agree(module: nn.Module, before: Snapshot) -> None:
    """Give all processes of tensor parallelism the same new tensors: each has drawn its own."""
    known: list[Any] = [kept.tensor for _, _, kept in (*before.parameters, *before.buffers)]
    mesh = next((tensor.device_mesh for tensor in known if is_sharded(tensor)), None)
    if mesh is not None:
        present = (*nn.Module.parameters(module), *module.buffers())
        old = {id(tensor) for tensor in known}
        agree((t for t in present if id(t) not in old and not is_sharded(t)), mesh)


def _nothing_matched(module: nn.Module, strategy: FineTuningStrategy, report: Report) -> str:
    if not report.caps:
        return (
            f"{type(strategy).__name__} has no caps: nothing would be trained (use "
            "FreezeStrategy() if that is intended)"
        )
    lines = [f"no cap of {type(strategy).__name__} matched anything in {type(module).__name__}:"]
    lines += [
        text + _hint(cap, module) for text, cap in zip(report.caps, strategy.caps, strict=True)
    ]
    classes = sorted({type(part).__name__ for part in module.modules()})
    lines += hints_for_strangers(module, strategy)
    lines.append(f"the network has modules of these classes: {classes}")
    return "\n  ".join(lines)


def _hint(cap: Cap, module: nn.Module) -> str:
    """The closest names in the network to those that a cap looks for, as text."""
    names = closest_names(cap.check, module)
    return f"; closest names: {names}" if names else ""


def _warn(report: Report, strategy: FineTuningStrategy, module: nn.Module) -> None:
    caps = dict(zip(report.caps, strategy.caps, strict=True))
    for text in report.unmatched:
        hint = _hint(caps[text], module)
        warnings.warn(f"{text} took nothing{hint}", GiftWarning, stacklevel=3)
    if report.leftover:
        warnings.warn(report.leftover, GiftWarning, stacklevel=3)
    if report.clipped:
        settings = dict.fromkeys(f"clip_{setting}" for setting, _ in report.clipped.values())
        warnings.warn(
            "these cannot have the requested size, and got one that they can have: "
            f"{some(report.clipped_texts, limit=20)} ({' or '.join(settings)}=True accepts this "
            "without a warning, False refuses it)",
            GiftWarning,
            stacklevel=3,
        )
    # Clipped weights were reported above.
    if names := [name for name in report.larger_than_weight if name not in report.clipped]:
        shown = some(names)
        warnings.warn(
            f"the delta has more parameters than the weight that it changes in: {shown} (train "
            "such layers fully, or choose a smaller rank)",
            GiftWarning,
            stacklevel=3,
        )
