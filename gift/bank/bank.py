"""The bank: named deltas on one network, of which at most one is active."""

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift.bank.combining import Combination, combine
from gift.bank.padding import padded
from gift.bank.rows import rows_added
from gift.bank.scaling import scale
from gift.core.dynamic_class import spec_of
from gift.core.record import NetworkRecord, record_of
from gift.core.state import whole_state
from gift.core.trained import delta_names, frozen_names
from gift.core.undo.snapshot import all_or_nothing, transaction
from gift.core.undo.temporary_state import meanwhile, refuse_meanwhile
from gift.core.undo.undo import completed
from gift.core.undo.undoable import check_undoable
from gift.core.undo.unload import UnloadedDelta
from gift.engine.enable import enable_fine_tuning, enabling_trained, values_of_the_base
from gift.errors import GiftWarning, closest, some
from gift.files import load, resolve
from gift.quantization import same_values
from gift.strategies.base import FineTuningStrategy, load_strategy_from_config
from gift.support.interrupts import held_interrupts, switching
from gift.support.sharding import is_sharded
from gift.support.tensors import is_finite
from gift.support.threads import changing


class DeltaBank:
    """Many deltas on one base network, possibly of different strategies.

    The network is either the plain base, or has one delta active. Then it is an ordinary fine-tuned
    network, which can be trained, saved and merged. Switching registers the tensors of a delta
    beside the weights that they change. It copies only the values of buffers and of the network's
    own trained parameters. Frozen base weights are neither copied nor written.

    Args:
        net: the plain base, or a network that is being fine-tuned, whose delta `add` names.

    Raises:
        RuntimeError: if the network's base was not kept, or if it has lazy layers without shapes.

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
        >>> list(net.state_dict())  # which is trained as usual
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
            if record_of(net).below is not None:
                raise RuntimeError(
                    "a bank changes deltas of a plain base, and this network has a delta on top of "
                    "another: disable the upper one, or merge both"
                )
        tensors = (*nn.Module.named_parameters(net), *net.named_buffers())
        if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
            raise RuntimeError(f"{lazy} have no shape yet: run a batch through the network first")
        if spread := [name for name, tensor in tensors if is_sharded(tensor)]:
            raise RuntimeError(f"{some(spread)} are spread over processes: load one delta instead")
        self.net: Any = net
        self._deltas: dict[str, UnloadedDelta | None] = {}  # None for the active delta
        self._active: str | None = None
        self._record: NetworkRecord | None = None  # identifies the active delta

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they were added."""
        return list(self._deltas)

    @property
    def active(self) -> str | None:
        """The name of the active delta; None while the network is the base."""
        return self._active

    @changing
    def add(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
        strategy: FineTuningStrategy | None = None,
        check_base: bool = True,
    ) -> None:
        """Add a delta to the bank, without changing which one is active.

        Args:
            name: name of the delta from now on.
            source: a file of `gift.save`, or a ``state_dict()`` of a fine-tuned network. None takes
                the network's unnamed active delta, or starts a new one by `strategy`.
            strategy: the strategy of a state or a new delta. For a state, None means that of the
                active delta.
            check_base: as in `gift.load`.

        Raises:
            ValueError: if the name exists already, or there is no delta to add.
            DeltaFileError, RuntimeError: if a file or state does not fit. The message names
                everything that does not fit. Bank and network are unchanged.
        """
        self._check_new(name)
        if source is None and strategy is None:
            self._check(may_have_delta=True)
            if self._active is not None or not spec_of(self.net).network:
                raise ValueError("nothing to add: give a file, a state or a strategy")
            check_undoable(self.net)
            with held_interrupts():
                self._mark_active(name)
            return
        if isinstance(source, Mapping) and strategy is None:
            strategy = self._present_strategy()
        with self._changing() as change:
            self._take(name, self._made(source, strategy, check_base), change)

    def _made(
        self, source: Any, strategy: FineTuningStrategy | None, check_base: bool
    ) -> UnloadedDelta:
        is_file = source is not None and not isinstance(source, Mapping)
        if is_file and strategy is not None:
            raise ValueError("a file has its strategy: give none with it")
        with all_or_nothing(self.net) as change:
            if is_file:
                load(self.net, source, check_base=check_base)
                change.before.written += values_of_the_base(self.net)
                return UnloadedDelta(self.net)
            assert strategy is not None
            if source is None:
                enable_fine_tuning(self.net, strategy)
                return UnloadedDelta(self.net)
            with enabling_trained(self.net, strategy):
                self.net.load_state_dict(_without_base(self.net, source))
                return UnloadedDelta(self.net)

    def _present_strategy(self) -> FineTuningStrategy:
        if not spec_of(self.net).network:
            raise ValueError("a state alone does not say how it was trained: give its strategy")
        config = record_of(self.net).recipe or resolve(self.net).to_config()
        return load_strategy_from_config(config)

    @changing
    def activate(self, name: str | None) -> None:
        """Activate the delta of that name, or none for the base.

        Raises:
            KeyError: if there is no such delta.
            RuntimeError: if the active delta has no name, or is merged or disabled.
        """
        if name is not None:
            self._known(name)
        self._check()
        if name == self._active:
            return
        with transaction(self.net, self):
            self._unload()
            if name is not None:
                self._load(name)

    @changing
    def remove(self, name: str) -> None:
        """Remove a delta; if it is active, the network becomes the base."""
        self._known(name)
        self._check(may_have_delta=True)
        with transaction(self.net, self):
            if name == self._active:
                self._unload()
            del self._deltas[name]

    @changing
    def scale(self, name: str, factor: float) -> None:
        """Multiply a delta by `factor`, exactly.

        For trained parameters of the network, the difference from the base is multiplied. New heads
        and wrapped forwards are not scaled.

        Raises:
            AdaptationError: naming everything with a method that cannot be scaled.
        """
        with self._with_active(name):
            scale(self.net, factor)

    @changing
    def combine(
        self, weights: Mapping[str, float], name: str = "combined", rank: int | None = None
    ) -> Combination:
        """Add a weighted sum of deltas as a new delta, a LoRA under the given name.

        Args:
            weights: maps names of deltas to their factors.
            name: name of the new delta.
            rank: None concatenates the factors of low-rank deltas, which is exact. A number keeps
                the best approximation of that rank in each layer, and works for deltas of all
                methods.

        Returns:
            The ranks, and the relative error in the Frobenius norm.

        Raises:
            ValueError: if names are unknown, factors are not finite, or `rank` is needed.
            AdaptationError: naming everything that cannot be summed: new heads, wrapped forwards.
        """
        self._check_new(name)
        if not isinstance(weights, Mapping):
            raise TypeError(f"expected numbers by the names of deltas, got {weights!r}")
        for given in weights:
            self._known(given)
        with self._changing() as change:
            made, combination = combine(
                self.net, {given: self._deltas[given] for given in weights}, weights, rank
            )
            self._take(name, made, change)
        return combination

    @changing
    def pad(self, rank: int | None = None) -> None:
        """Give all deltas one form, so that switching never compiles a network again.

        `torch.compile` compiles again where shapes, scalings or adapted layers differ. Afterwards
        each delta is a LoRA of the largest rank that a weight has in any of them, on all weights
        that any of them changes, with a scaling of 1. What a delta lacks is filled with zeros, so
        its outputs do not change. It can be trained, and the zeros stay zero; its parameters are
        new, so make the optimizer afterwards. For a delta that is added later, call `pad` again,
        with the same rank.

        Args:
            rank: rank of all changes, up to what a weight can have; None means the largest one of
                each weight.

        Raises:
            AdaptationError: naming everything that is not a low-rank change of a weight, has a
                larger rank, or reads a weight as another matrix than other deltas do.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from gift import DeltaBank
            >>> from gift.strategies import LoRAAllFineTuningStrategy
            >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            >>> bank = DeltaBank(net)
            >>> bank.add("small", strategy=LoRAAllFineTuningStrategy(rank=2))
            >>> bank.add("large", strategy=LoRAAllFineTuningStrategy(rank=8, lora_alpha=16))
            >>> bank.pad()
            >>> bank.activate("small")
            >>> net[0].lora_A.shape
            torch.Size([8, 64])
        """
        with self._changing() as change:
            inactive = {name: delta for name, delta in self._deltas.items() if delta is not None}
            for name, delta in padded(self.net, inactive, rank).items():
                self._take(name, delta, change)

    @switching
    def rows(self, names: Sequence[str | None], dim: int = 0) -> Iterator[nn.Module]:
        """Context manager that computes each row of a batch with its own delta, for inference.

        The deltas must be low-rank changes of linear layers, convolutions and embeddings only
        (LoRA, rsLoRA, PiSSA, OLoRA, LoRA-FA, VeRA, LoHa). The first tensor that the network gets is
        the batch. If its length is a multiple of the number of rows (beam search), the entries of
        one row are consecutive. Other inputs of the same length have the rows too; all others are
        the same for all rows, as parameters, buffers, and tensors made from constants are.

        Each function of torch is tracked from there on: which entries along which axis belong to
        which row. A function keeps rows apart if `gift/bank/kinds.py` has a rule for it: what torch
        tags as pointwise, what moves or joins axes or picks entries, and what sums over, sorts or
        normalises other axes than that of the rows. After any other function the rows are lost, as
        after one that mixes them (a mean over the batch, batch normalisation in training). A layer
        of a delta rejects a tensor whose rows are lost, or that is the same for all rows and has no
        axis for them. So does the end of the network, if it returns nothing but lost rows or rows
        in another order. If some of several results have their rows, a warning says that others do
        not; a loss, which has no axes, is not reported.

        What torch does not show is not known to keep rows apart: `torch.vmap`, TorchScript,
        extensions, numpy. Code compiled by `torch.compile` runs as it is written. What cannot be
        detected is a decision: control flow or integers that depend on other rows (`if mask.any()`,
        `int(x.argmax())`).

        Only the thread that enters the context may call the network. Calls by another thread are an
        error.

        Args:
            names: name of the delta of each row of the batch; None means the base.
            dim: axis of the batch in the inputs of the network. If an input has another length
                there, the first axis is tried.

        Raises:
            KeyError: if a name is unknown.
            AdaptationError: naming every change of a delta that cannot differ between rows.
            ValueError, RuntimeError: in the context, if a layer does not get the batch, the network
                does not return it, values of rows leave torch, or another layer reads a weight.
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
            close = closest(name, self._deltas)
            raise KeyError(f"no delta {name!r}; there are {self.names}, closest: {close}")

    def _check(self, may_have_delta: bool = False) -> None:
        """Check that the network's state is the bank's.

        Args:
            may_have_delta: whether an active delta without a name is allowed.
        """
        refuse_meanwhile(self.net)
        active = record_of(self.net) if spec_of(self.net).network else None
        if self._active is not None and active is None:
            del self._deltas[self._active]
            warnings.warn(
                f"{self._active!r} was disabled or merged without the bank, which forgets it (if "
                "it was merged, the others were trained for another base)",
                GiftWarning,
                stacklevel=5,
            )
            self._active = self._record = None
        if self._active is not None and active is not self._record:
            raise RuntimeError(
                f"the network has another active delta than {self._active!r}, without the bank: "
                "disable it first"
            )
        if self._active is None and active is not None and not may_have_delta:
            raise RuntimeError("the network has a delta without a name: add(name) gives it one")

    def _mark_active(self, name: str) -> None:
        self._deltas[name], self._active, self._record = None, name, record_of(self.net)

    def _unload(self) -> None:
        if self._active is not None:
            self._deltas[self._active] = UnloadedDelta(self.net)
            self._active = self._record = None

    def _load(self, name: str) -> None:
        delta = self._deltas[name]
        assert delta is not None
        delta.attach()
        self._mark_active(name)

    def _take(self, name: str, delta: UnloadedDelta, change: transaction) -> None:
        change.before.written += delta.exchanged()
        self._deltas[name] = delta

    def _unload_active(self) -> UnloadedDelta | str | None:
        """Turn the network into the base, and return its active delta or the name of it."""
        if self._active is None and spec_of(self.net).network:
            return UnloadedDelta(self.net)
        name = self._active
        self._unload()
        return name

    def _restore(self, active: UnloadedDelta | str | None) -> None:
        """Undo `_unload_active`."""
        if isinstance(active, UnloadedDelta):
            active.attach()
        elif active is not None:
            self._load(active)

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Context manager in which the network is the base; the active delta is restored after."""
        self._check(may_have_delta=True)
        with transaction(self.net, self):
            active = self._unload_active()

        def put_back() -> None:
            with transaction(self.net, self):
                self._restore(active)

        try:
            yield
        finally:
            completed(put_back)

    @contextmanager
    def _changing(self) -> Iterator[transaction]:
        """The same for a change of the bank, which is rolled back on errors."""
        self._check(may_have_delta=True)
        with transaction(self.net, self) as change:
            active = self._unload_active()
            yield change
            self._restore(active)

    @contextmanager
    def _with_active(self, name: str) -> Iterator[None]:
        """Context manager in which that delta is active; the former one is restored after."""
        self._known(name)
        with transaction(self.net, self):
            before = self._active
            self.activate(name)
            yield
            self.activate(before)


def _without_base(net: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state without frozen tensors, which all deltas share.

    Raises:
        RuntimeError: if the state has other values of frozen tensors.
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
