"""Checking whether a saved state fits a schedule and its network."""

from collections.abc import Mapping
from typing import Any


def describe_difference(state: Any, own: Mapping[str, Any]) -> str:
    """Describe the first difference between a saved state and a schedule; empty if they match.

    Args:
        state: saved state.
        own: state of the schedule that it is to be loaded into.
    """
    if not isinstance(state, Mapping) or set(state) != set(own):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return f"expected a mapping with {sorted(own)}, found {found}"
    if state["schedule"] != own["schedule"]:
        return f"it is of {_call(state['schedule'])}, this is {_call(own['schedule'])}"
    if list(state["head"]) != own["head"]:
        return f"its head is {list(state['head'])}, here it is {own['head']}"
    there, here = state["blocks"], own["blocks"]
    if list(there) != list(here):
        missing = [name for name in there if name not in here]
        more = [name for name in here if name not in there]
        return f"it has blocks {missing} that are not here, and lacks {more}"
    for name, waiting in there.items():
        if list(waiting) != here[name]:
            return f"in {name} {list(waiting)} waited, here {here[name]}"
    known = {name for names in here.values() for name in names}
    unknown = [n for g in state["groups"] for n in g["names"] if n not in known]
    unknown += [name for name in state["trained"] if name not in here]
    return f"it has {unknown}, which do not wait here" if unknown else ""


def _call(config: Any) -> str:
    if not isinstance(config, Mapping) or set(config) != {"name", "init_paras"}:
        return repr(config)
    arguments = ", ".join(f"{key}={value!r}" for key, value in config["init_paras"].items())
    return f"{config['name']}({arguments})"
