"""What engines with a queue of their own have in common."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gift.jobs.models import Job
from gift.many.engines.base import Listed, State, reason_in

_FRESH = 2.0  # seconds for which an answer of a scheduler is used again


class Scheduler:
    """An engine that queues runs, and whose answers say their states.

    Args:
        options: options of the engine by name.
        network: ``import:package.module:function``, for jobs that name no network.
    """

    name: str
    title: str
    """Its name in texts."""

    slots = None
    patience = 120.0
    """Seconds in which a cancelled run must end, with its checkpoint."""

    def __init__(
        self, options: Mapping[str, Any] | None = None, network: str | None = None
    ) -> None:
        self.options = dict(options or {})
        self.network = network
        self._heard: tuple[float, list[Listed]] = (-math.inf, [])

    def problems(self, jobs: Sequence[Job]) -> list[str]:
        """Return what would keep jobs from running; empty if nothing is known."""
        raise NotImplementedError

    def ask(self) -> list[Listed]:
        """Return what the scheduler says of this user's runs, oldest first."""
        raise NotImplementedError

    def queue(self, folders: Sequence[Path]) -> list[str]:
        """Queue runs, and return what the scheduler calls them."""
        raise NotImplementedError

    def cancel(self, handle: str) -> None:
        """Tell the scheduler to cancel a run."""
        raise NotImplementedError

    def start(self, folder: Path) -> str:
        """Queue the run in a folder, unless it is queued or running already."""
        return self.start_all([folder])[0]

    def start_all(self, folders: Sequence[Path]) -> list[str]:
        """Queue several runs, but none that is queued or running already."""
        self.forget()
        numbers = {one.folder: one.id for one in self.listed() if not one.state.is_over}
        new = [folder for folder in folders if folder not in numbers]
        numbers |= dict(zip(new, self.queue(new), strict=True))
        self.forget()
        return [numbers[folder] for folder in folders]

    def listed(self) -> list[Listed]:
        """Return what the scheduler knows of this user's runs, or said a moment ago."""
        at, listed = self._heard
        if time.monotonic() - at >= _FRESH:
            listed = self.ask()
            self._heard = (time.monotonic(), listed)
        return listed

    def forget(self) -> None:
        """Forget what the scheduler said."""
        self._heard = (-math.inf, [])

    def state(self, handle: str) -> State:
        """Return the state of a run; unknown if the scheduler does not know it."""
        one = self._one(handle)
        return State.UNKNOWN if one is None else one.state

    def stop(self, handle: str) -> None:
        """Cancel a run and wait until it has ended."""
        self.cancel(handle)
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            self.forget()
            if self.state(handle).is_over:
                return
            time.sleep(1)

    def reason(self, handle: str) -> str:
        """Return why a run failed, as far as this is known."""
        one = self._one(handle)
        if one is None:
            return f"{self.title} does not know it"
        return reason_in(one.folder, one.note) if one.folder is not None else one.note

    def _one(self, handle: str) -> Listed | None:
        for _ in range(2):
            if found := next((one for one in self.listed() if one.id == handle), None):
                return found
            self.forget()  # it may have been queued since
        return None


def unmet(needs: Mapping[str, Callable[[Any], bool]], nodes: Sequence[Any]) -> str:
    """Return which resources no node has, for a message; empty if one node has them all.

    Args:
        needs: whether a node has a resource, by the text for the resource.
        nodes: the nodes.
    """
    missing = [what for what, has in needs.items() if not any(map(has, nodes))]
    if missing:
        return f"resources: no node has {' and '.join(missing)}"
    together = any(all(has(node) for has in needs.values()) for node in nodes)
    return "" if together else f"resources: no node has all of {', '.join(needs)}"
