"""Check whether fine-tuning can be removed from a network."""

from torch import nn

from gift.core.delta import added_names, held
from gift.core.dynamic_class import joined, spec_of
from gift.core.movers import refuse_offloaded
from gift.core.record import record_of
from gift.core.trained import named_trainable
from gift.core.undo.temporary_state import refuse_meanwhile


def check_undoable(module: nn.Module, needs_base: bool = True) -> None:
    """Check that the deltas can be removed and, if `needs_base`, that the base can be restored.

    Raises:
        TypeError: if `module` is not a module.
        RuntimeError: if the network is not being fine-tuned, if the base was not kept, or if
            something has changed the network since.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if not spec_of(module).network:
        refuse_meanwhile(module)
        inside = [name for name, part in module.named_modules() if spec_of(part).network]
        hint = f"; inside it, {inside} are" if inside else ""
        raise RuntimeError(f"this {type(module).__name__} is not being fine-tuned{hint}")
    if "_gift_spec" not in vars(type(module)):
        raise RuntimeError(
            f"the class of this {type(module).__name__} was changed since (by fully_shard?): "
            "fine-tuning can no longer be disabled; load its state into a fresh network"
        )
    gone = [
        joined(path, name)
        for path, part in module.named_modules()
        for name in added_names(part)
        if name not in held(part, name)
    ]
    if gone:
        raise RuntimeError(
            f"{gone} were pruned or parametrised since: undo that first (prune.remove, "
            "remove_parametrizations)"
        )
    changed = [
        path
        for path, part in module.named_modules()
        if any(spec_of(part)) and "_gift_spec" not in vars(type(part))
    ]
    if changed:
        raise RuntimeError(
            f"the class of {changed} was changed since (a tensor was parametrised?): undo that "
            "first (remove_parametrizations with leave_parametrized=False)"
        )
    refuse_offloaded(module)
    record = record_of(module)
    if not needs_base:
        return
    if not record.keeps_base:
        raise RuntimeError("the base was not kept: enable_fine_tuning had keep_base=False")
    late = [n for n, _ in named_trainable(module) if n not in record.chosen]
    if late:
        raise RuntimeError(
            f"{late} were unfrozen after enable_fine_tuning, which kept no copy of them: load the "
            "base again"
        )
