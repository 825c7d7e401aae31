"""The bank: deltas by name, of which the network wears one."""

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.bank.combining import Combination, combine
from gift.bank.rows import rows_added
from gift.bank.scaling import scale
from gift.detached import Detached
from gift.enable import (
    GiftWarning,
    check_undoable,
    enable_fine_tuning,
    enabling_trained,
    values_of_the_base,
)
from gift.files import load, resolve
from gift.generated import spec_of
from gift.interrupts import held_interrupts, switching
from gift.meanwhile import meanwhile, refuse_meanwhile
from gift.network import NetworkRecord, delta_names, frozen_names, whole_state
from gift.quantised import same_values
from gift.strategies.base import FineTuningStrategy, load_strategy_from_config
from gift.tensors import is_finite
from gift.threads import changing
from gift.transaction import all_or_nothing, completed, transaction


class DeltaBank:
    """Many deltas on one base, of different strategies if need be.

    The network is the base, or wears one of them: then it is a fine-tuned one like any other, which
    can be trained, saved and merged. To switch, the tensors of a delta are put beside the weights
    that they change; what is copied are values of parameters that are trained as they are, and of
    buffers. No base weight is copied or written.

    Args:
        net: the plain base; or a network that is being fine-tuned, to which `add` gives a name.

    Raises:
        RuntimeError: for a network whose base was not kept, or that has lazy layers without shapes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift import DeltaBank
        >>> from gift.strategies import IA3AllFineTuningStrategy, LoRAAllFineTuningStrategy
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> bank = DeltaBank(net)
        >>> bank.add("french", strategy=LoRAAllFineTuningStrategy())
        >>> bank.add("german", strategy=IA3AllFineTuningStrategy())
        >>> bank.activate("french")
        >>> list(net.state_dict())  # which is trained as ever
        ['0.lora_B', '0.lora_A', '2.lora_B', '2.lora_A']
        >>> bank.activate("german")
        >>> bank.names, bank.active
        (['french', 'german'], 'german')
    """

    def __init__(self, net: nn.Module) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
        if spec_of(net).network:
            check_undoable(net)
        tensors = (*nn.Module.named_parameters(net), *net.named_buffers())
        if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
            raise RuntimeError(f"{lazy} have no shape yet: run a batch through the network first")
        self.net: Any = net
        self._deltas: dict[str, Detached | None] = {}  # None for the one that the network wears
        self._active: str | None = None
        self._worn: NetworkRecord | None = None  # by which that one is known again

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they came."""
        return list(self._deltas)

    @property
    def active(self) -> str | None:
        """The name of the delta that the network wears, None while it is the base."""
        return self._active

    @changing
    def add(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        strategy: FineTuningStrategy | None = None,
        check_base: bool = True,
    ) -> None:
        """Take a delta into the bank; the network wears what it wore.

        Args:
            name: under which it is known from now on.
            source: a file of `gift.save`, or a ``state_dict()`` of a fine-tuned network. None takes
                what the network wears without a name, or starts afresh by `strategy`.
            strategy: which a state, or a fresh start, needs; for a state, None means that of the
                active delta.
            check_base: as in `gift.load`.

        Raises:
            ValueError: for a name that is taken, or no delta to take.
            DeltaFileError, RuntimeError: if a file or state does not fit; all that does not is
                named, bank and network are as before.
        """
        self._check_new(name)
        if source is None and strategy is None:
            self._check(may_wear=True)
            if self._active is not None or not spec_of(self.net).network:
                raise ValueError("nothing to add: give a file, a state or a strategy")
            check_undoable(self.net)
            with held_interrupts():
                self._wears(name)
            return
        if isinstance(source, Mapping) and strategy is None:
            strategy = self._present_strategy()
        with self._changing() as change:
            self._take(name, self._made(source, strategy, check_base), change)

    def _made(self, source: Any, strategy: FineTuningStrategy | None, check_base: bool) -> Detached:
        is_file = source is not None and not isinstance(source, Mapping)
        if is_file and strategy is not None:
            raise ValueError("a file has its strategy: give none with it")
        with all_or_nothing(self.net) as change:
            if is_file:
                load(self.net, source, check_base=check_base)
                change.before.written += values_of_the_base(self.net)
                return Detached(self.net)
            assert strategy is not None
            if source is None:
                enable_fine_tuning(self.net, strategy)
                return Detached(self.net)
            with enabling_trained(self.net, strategy):
                self.net.load_state_dict(_without_base(self.net, source))
                return Detached(self.net)

    def _present_strategy(self) -> FineTuningStrategy:
        if not spec_of(self.net).network:
            raise ValueError("a state alone does not say how it was trained: give its strategy")
        config = self.net._gift_network.recipe or resolve(self.net).to_config()
        return load_strategy_from_config(config)

    @changing
    def activate(self, name: str | None) -> None:
        """Let the network wear the delta of that name, or none: the base.

        Raises:
            KeyError: if there is no such delta.
            RuntimeError: if the network wears one that has no name, or is merged or disabled.
        """
        if name is not None:
            self._known(name)
        self._check()
        if name == self._active:
            return
        with transaction(self.net, self):
            self._take_off()
            if name is not None:
                self._put_on(name)

    @changing
    def remove(self, name: str) -> None:
        """Forget a delta; if the network wears it, it is the base then."""
        self._known(name)
        self._check(may_wear=True)
        with transaction(self.net, self):
            if name == self._active:
                self._take_off()
            del self._deltas[name]

    @changing
    def scale(self, name: str, factor: float) -> None:
        """Make a delta `factor` times as strong as it is, exactly.

        What is trained as it is goes as far from the base; new heads, and what extends calls, stay.

        Raises:
            AdaptationError: naming what has a method under which that cannot be told.
        """
        with self._wearing(name):
            scale(self.net, factor)

    @changing
    def combine(
        self, weights: Mapping[str, float], name: str = "combined", rank: int | None = None
    ) -> Combination:
        """A new delta, the sum of others, each times a number: a LoRA under the given name.

        Args:
            weights: from the names of deltas to numbers.
            name: of the new one.
            rank: None concatenates the factors of low-rank deltas, which is exact. A number keeps
                the best approximation of that rank in each layer, also of other methods' deltas.

        Returns:
            The ranks, and the relative error in the Frobenius norm.

        Raises:
            ValueError: for unknown names or numbers that are not finite, or if `rank` is needed.
            AdaptationError: naming what cannot be summed: new heads, extended calls.
        """
        self._check_new(name)
        if not isinstance(weights, Mapping):
            raise TypeError(f"expected numbers by the names of deltas, got {weights!r}")
        for given in weights:
            self._known(given)
        with self._changing() as change:
            made, told = combine(
                self.net, {given: self._deltas[given] for given in weights}, weights, rank
            )
            self._take(name, made, change)
        return told

    @switching
    def rows(self, names: Sequence[str | None], dim: int = 0) -> Iterator[nn.Module]:
        """Within it, each row of a batch is computed with a delta of its own, for inference.

        That is for deltas which are low-rank changes of linear layers, convolutions and embeddings
        (LoRA, rsLoRA, PiSSA, OLoRA, LoRA-FA, VeRA, LoHa), and nothing else. Each of these layers
        must get the batch along axis `dim`; if it gets a multiple of it along the first axis (beam
        search, tokens that were flattened), the parts are taken to follow each other. What the
        network computes is followed, so that a layer whose rows are elsewhere, or that gets the
        same for all rows (positions), is told from one with the batch, and refused.

        What cannot be told, and must not happen: rows that change places in numpy, in a function
        of another library, in a part of a tensor that is written to by itself (`part = x[1:]`,
        `part.copy_(...)`), by a reshape that takes a batch apart and puts it together in another
        order, or by a mask computed from data, which reads them in one order and writes them in
        another. Nor has a row a result of its own if rows are mixed, as by a mean over the batch.

        It is for the thread that opens it; calls by another one are an error.

        Args:
            names: for each row of the batch the name of its delta, or None for the base.
            dim: the axis of the batch in what layers get.

        Raises:
            KeyError: for an unknown name.
            AdaptationError: naming what a delta changes that cannot differ between rows.
            ValueError, RuntimeError: within it, if a layer does not get the batch, or another one
                reads its weight.
        """
        for name in names:
            if name is not None:
                self._known(name)
        with self._base():
            wanted = dict.fromkeys(name for name in names if name is not None)
            deltas = {given: self._deltas[given] for given in wanted}
            with (
                rows_added(self.net, deltas, list(names), dim),
                meanwhile([self.net], "computing rows"),
            ):
                yield self.net

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name is {name!r}, expected some text")
        if name in self._deltas:
            raise ValueError(f"there is a delta {name!r} already: remove it first")

    def _known(self, name: str) -> None:
        if name not in self._deltas:
            close = get_close_matches(str(name), self._deltas, n=3)
            raise KeyError(f"no delta {name!r}; there are {self.names}, closest: {close}")

    def _check(self, may_wear: bool = False) -> None:
        """That the network wears what the bank thinks; `may_wear` also one without a name."""
        refuse_meanwhile(self.net)
        worn = self.net._gift_network if spec_of(self.net).network else None
        if self._active is not None and worn is None:
            del self._deltas[self._active]
            warnings.warn(
                f"{self._active!r} was taken off or merged without the bank, which forgets it (if "
                "it was merged, the others were trained for another base)",
                GiftWarning,
                stacklevel=5,
            )
            self._active = self._worn = None
        if self._active is not None and worn is not self._worn:
            raise RuntimeError(
                f"the network wears another delta than {self._active!r}, without the bank: disable "
                "that first"
            )
        if self._active is None and worn is not None and not may_wear:
            raise RuntimeError("the network wears a delta without a name: add(name) gives it one")

    def _wears(self, name: str) -> None:
        self._deltas[name], self._active, self._worn = None, name, self.net._gift_network

    def _take_off(self) -> None:
        if self._active is not None:
            self._deltas[self._active] = Detached(self.net)
            self._active = self._worn = None

    def _put_on(self, name: str) -> None:
        delta = self._deltas[name]
        assert delta is not None
        delta.attach()
        self._wears(name)

    def _take(self, name: str, delta: Detached, change: transaction) -> None:
        change.before.written += delta.exchanged()
        self._deltas[name] = delta

    def _uncover(self) -> Detached | str | None:
        """Let the network be the base; gives what it wore, which may have no name."""
        if self._active is None and spec_of(self.net).network:
            return Detached(self.net)
        name = self._active
        self._take_off()
        return name

    def _cover(self, worn: Detached | str | None) -> None:
        """Undo `_uncover`."""
        if isinstance(worn, Detached):
            worn.attach()
        elif worn is not None:
            self._put_on(worn)

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Within it the network is the base; then it wears again what it wore."""
        self._check(may_wear=True)
        with transaction(self.net, self):
            worn = self._uncover()

        def put_back() -> None:
            with transaction(self.net, self):
                self._cover(worn)

        try:
            yield
        finally:
            completed(put_back)

    @contextmanager
    def _changing(self) -> Iterator[transaction]:
        """The same for a change of the bank, which is undone where something goes wrong."""
        self._check(may_wear=True)
        with transaction(self.net, self) as change:
            worn = self._uncover()
            yield change
            self._cover(worn)

    @contextmanager
    def _wearing(self, name: str) -> Iterator[None]:
        """Within it the network wears that delta; then again what it wore."""
        self._known(name)
        with transaction(self.net, self):
            before = self._active
            self.activate(name)
            yield
            self.activate(before)


def _without_base(net: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state without frozen tensors, which are those of all deltas.

    Raises:
        RuntimeError: if they have other values there.
    """
    present, frozen = whole_state(net), {*frozen_names(net)}
    others = [name for name in state if name in frozen and not _same(present[name], state[name])]
    if others:
        raise RuntimeError(f"nothing was loaded: of {others}, the base has other values")
    rest = OrderedDict((name, value) for name, value in state.items() if name not in frozen)
    deltas = delta_names(net)
    if wrong := [name for name in rest if name in deltas and not is_finite(rest[name])]:
        raise RuntimeError(f"nothing was loaded: {wrong} have numbers that are not finite")
    if hasattr(state, "_metadata"):
        rest._metadata = state._metadata  # type: ignore[attr-defined]  # torch sets it
    return rest


def _same(here: Tensor, there: Tensor) -> bool:
    return here.shape == there.shape and same_values(here, there.to(here.device))
