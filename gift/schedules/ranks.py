"""Ranks that are allocated while training: AdaLoRA's budget over all weights of a network."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.record import fine_tuned_part
from gift.core.undo.undo import completed
from gift.schedules.triplets import FACTORS, Triplets, orthogonality, triplets
from gift.support.interrupts import held_interrupts
from gift.support.sharding import is_sharded

_Averages = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(eq=False, repr=False, kw_only=True)
class RankAllocator:
    r"""Prunes the ranks of AdaLoRA to a budget (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    It drives any training loop by one call per optimizer step. The importance of a triplet, that is
    of a column of `P`, a number of `lambda` and a row of `Q`, is the sum of the means of
    :math:`\bar I \cdot \bar U` over each of the three. :math:`\bar I` is the exponential average of
    the sensitivity :math:`|w \, \partial L / \partial w|`, and :math:`\bar U` that of its distance
    from :math:`\bar I`. Of all triplets in the network, those with the largest importance are kept.
    The others get a `lambda` of zero, from which they may grow again until the next allocation.

    The budget is that of all triplets while warming up, then falls as a cubic to `target_rank`
    times the number of matrices. It is reached `final_steps` before the end. From then on the
    pruned triplets are masked for good, and the mask is saved with the delta.

    Args:
        target_rank: the mean rank of the matrices in the end.
        total_steps: number of optimizer steps of the run; None if `attach` is given it.
        warmup_steps: number of steps before anything is pruned.
        final_steps: number of steps that are trained with the final ranks.
        every: number of steps from one allocation to the next.
        beta1: decay of the average of the sensitivity.
        beta2: decay of the average of its uncertainty.
        penalty: factor of `orthogonality` in the loss.

    Raises:
        ValueError: naming all settings that are out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gift import enable_fine_tuning
        >>> from gift.schedules import RankAllocator
        >>> from gift.strategies import AdaLoRAAllFineTuningStrategy
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        >>> report = enable_fine_tuning(net, AdaLoRAAllFineTuningStrategy(rank=4))
        >>> allocator = RankAllocator(target_rank=2, total_steps=6, final_steps=2)
        >>> allocator.attach(net)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        >>> for _ in range(6):
        ...     x = torch.randn(16, 16)
        ...     loss = (net(x) - x).square().mean() + allocator.orthogonality()
        ...     loss.backward()
        ...     optimizer.step()
        ...     allocator.step()  # between the optimizer's step and zero_grad
        ...     optimizer.zero_grad()
        >>> sum(allocator.ranks.values())
        4
    """

    target_rank: int = 8
    total_steps: int | None = None
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    penalty: float = 0.5

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))
        self._net: nn.Module | None = None
        self._deltas: dict[str, Triplets] = {}
        self._steps: int | None = self.total_steps
        self._step = 0
        self._averages: _Averages = ({}, {})  # of the sensitivity, of its uncertainty

    def _problems(self) -> Iterable[str]:
        least = {
            "target_rank": 0,
            "total_steps": 1,
            "warmup_steps": 0,
            "final_steps": 0,
            "every": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name == "total_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                yield f"{name} is {value!r}, expected an integer of at least {lowest}"
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1:
                yield f"{name} is {value!r}, expected a number between 0 and 1"
        if not _is_number(self.penalty) or self.penalty < 0:
            yield f"penalty is {self.penalty!r}, expected a number of at least 0"

    def attach(self, net: nn.Module, total_steps: int | None = None) -> None:
        """Attach the allocator to a network, before its first step.

        Args:
            net: a network with AdaLoRA, or a module that contains one (compiled, in DDP).
            total_steps: number of optimizer steps of the run, if the allocator was not given it.

        Raises:
            RuntimeError: if the network is not being fine-tuned.
            ValueError: if nothing could be pruned, with what would work; or if the network is
                sharded.
        """
        steps = self.total_steps if total_steps is None else total_steps
        deltas = dict(triplets(fine_tuned_part(net)))
        if problems := list(self._misfits(steps, deltas)):
            raise ValueError(f"{self!r} does not fit: " + "; ".join(problems))
        self._net, self._deltas, self._steps, self._step = net, deltas, steps, 0
        self._averages = ({}, {})

    def _misfits(self, steps: int | None, deltas: Mapping[str, Triplets]) -> Iterator[str]:
        if steps is None:
            yield "total_steps is None: give the number of optimizer steps of the run"
        elif self.warmup_steps >= steps - self.final_steps:
            yield (
                f"of total_steps {steps}, warmup_steps {self.warmup_steps} and final_steps "
                f"{self.final_steps} leave none to prune in"
            )
        if not deltas:
            yield "the network has no weight with AdaLoRA"
            return
        first, last = _budgets(deltas.values(), self.target_rank)
        if last >= first:
            yield (
                f"target_rank {self.target_rank} is not below the mean rank of the "
                f"{sum(d.matrices for d in deltas.values())} matrices, which have {first} triplets "
                "together: there is nothing to prune (a lower target_rank or a higher rank of "
                "AdaLoRA would work)"
            )
        if spread := [name for name, d in deltas.items() if any(map(is_sharded, d.tensors))]:
            yield (
                f"{spread[0]} is spread over processes: ranks are allocated from whole gradients "
                "(DDP works)"
            )

    @property
    def is_attached(self) -> bool:
        """Whether the allocator is attached to a network."""
        return self._net is not None

    @property
    def is_final(self) -> bool:
        """Whether the final ranks are allocated."""
        return self._is_final_at(self._step)

    def _is_final_at(self, step: int) -> bool:
        return self._steps is not None and step >= self._steps - self.final_steps

    @property
    def budget(self) -> int:
        """The number of triplets that the last step may have kept."""
        return self._budget_at(self._step)

    def _budget_at(self, step: int) -> int:
        _, steps = self._checked()
        first, last = _budgets(self._deltas.values(), self.target_rank)
        if step <= self.warmup_steps:
            return first
        if self._is_final_at(step):
            return last
        left = 1 - (step - self.warmup_steps) / (steps - self.final_steps - self.warmup_steps)
        return int((first - last) * left**3 + last)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each delta now, by the names of the weights: its `lambda` other than zero.

        All are zero before the first step.
        """
        self._checked()
        return {name: delta.rank for name, delta in self._deltas.items()}

    def orthogonality(self) -> Tensor:
        """Return `penalty` times `orthogonality` of the network, to be added to the loss."""
        net, _ = self._checked()
        return self.penalty * orthogonality(net)

    def add_gradients(self) -> None:
        """Add the gradients of `orthogonality` to those of the loss, where that is out of reach.

        Call it after the backward pass, before the optimizer's step.
        """
        self._checked()
        if self.penalty == 0:
            return
        factors = [f for d in self._deltas.values() for f in d.factors if f.requires_grad]
        if not factors:
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.orthogonality(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def step(self) -> None:
        """Note the importance of all triplets, and prune if it is time.

        Call it after each step of the optimizer, before `zero_grad`. Gradients that are not finite,
        as those of a skipped float16 step, are left out.

        Raises:
            RuntimeError: if the allocator is not attached, the network was enabled since, or no
                parameter of AdaLoRA has a gradient.
        """
        self._checked()
        if self.is_final:
            self._step += 1
            return
        step = self._step + 1
        final = self._is_final_at(step)
        # The last gradients do not count any more, as in the authors' code.
        noted = self._averages if final and self._averages[0] else self._noted()
        written = []
        if final or (step > self.warmup_steps and step % self.every == 0):
            kept = self._kept(noted, self._budget_at(step))
            written = [(delta, delta.pruned(kept[name])) for name, delta in self._deltas.items()]

        def put() -> None:
            for delta, pruned in written:
                delta.put(pruned, final)
            self._step, self._averages = step, ({}, {}) if final else noted

        with held_interrupts():
            completed(put)

    def _noted(self) -> _Averages:
        """Return the averages of sensitivity and uncertainty with the present gradients."""
        before, distances = self._averages
        sensitivity, uncertainty = {}, {}
        found = False
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                nothing = torch.zeros_like(tensor, dtype=tensor.real.dtype)
                average, distance = before.get(name, nothing), distances.get(name, nothing)
                found |= tensor.grad is not None
                now = nothing if tensor.grad is None else (tensor * tensor.grad).abs()
                finite = torch.isfinite(now).all()
                new = self.beta1 * average + (1 - self.beta1) * now
                gap = self.beta2 * distance + (1 - self.beta2) * (now - new).abs()
                sensitivity[name] = torch.where(finite, new, average)
                uncertainty[name] = torch.where(finite, gap, distance)
        if not found:
            raise RuntimeError(
                "no parameter of AdaLoRA has a gradient: call step() after backward() and the "
                "optimizer's step, before zero_grad()"
            )
        return sensitivity, uncertainty

    def _tensors(self) -> dict[str, Any]:
        """Return what is judged, by the names of weight and parameter."""
        return {
            f"{name}.{key}": tensor
            for name, delta in self._deltas.items()
            for key, tensor in zip(FACTORS, delta.tensors, strict=True)
        }

    def _kept(self, averages: _Averages, budget: int) -> dict[str, Tensor]:
        """Return which triplets of each weight are among the most important ones."""
        scores = {name: _scores(name, averages) for name in self._deltas}
        everything = torch.cat([score.flatten().double().cpu() for score in scores.values()])
        keep = torch.ones_like(everything, dtype=torch.bool)
        keep[everything.argsort(stable=True)[: max(0, len(keep) - budget)]] = False
        parts = keep.split([score.numel() for score in scores.values()])
        return {
            name: part.reshape(score.shape)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, beside the state of the network."""
        self._checked()
        return {
            "settings": self._settings(),
            "weights": list(self._deltas),
            "step": self._step,
            "sensitivity": dict(self._averages[0]),
            "uncertainty": dict(self._averages[1]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken. The network's own state is loaded apart.

        Raises:
            RuntimeError: if the allocator is not attached.
            ValueError: if the state is of another allocator or network; nothing is changed.
        """
        self._checked()
        if difference := self._difference(state):
            raise ValueError(f"the state does not fit, nothing was changed: {difference}")
        own = self._tensors()
        sensitivity, uncertainty = (
            {
                name: value.to(own[name].device, own[name].real.dtype, copy=True)
                for name, value in state[part].items()
            }
            for part in ("sensitivity", "uncertainty")
        )
        self._step, self._averages = int(state["step"]), (sensitivity, uncertainty)

    def _difference(self, state: Any) -> str:
        known = {"settings", "weights", "step", "sensitivity", "uncertainty"}
        if not isinstance(state, Mapping) or set(state) != known:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            return f"expected a mapping with {sorted(known)}, found {found}"
        if dict(state["settings"]) != self._settings():
            return f"it was made with {dict(state['settings'])}, here {self._settings()}"
        if list(state["weights"]) != list(self._deltas):
            return f"its weights are {list(state['weights'])}, here {list(self._deltas)}"
        shapes = {name: tensor.shape for name, tensor in self._tensors().items()}
        for part in ("sensitivity", "uncertainty"):
            there = {name: value.shape for name, value in state[part].items()}
            if there and there != shapes:
                wrong = [n for n in {**there, **shapes} if there.get(n) != shapes.get(n)]
                return f"the {part} of {wrong} has another shape, or is on one side only"
        return ""

    def _settings(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | {"total_steps": self._steps}

    def _checked(self) -> tuple[nn.Module, int]:
        if self._net is None or self._steps is None:
            raise RuntimeError("the allocator is not attached: call allocator.attach(net) first")
        if gone := [name for name, delta in self._deltas.items() if not delta.is_there]:
            raise RuntimeError(
                f"{gone[0]} was released or adapted anew since the allocator was attached: attach "
                "a new one"
            )
        return self._net, self._steps

    def __repr__(self) -> str:
        own = [f for f in fields(self) if getattr(self, f.name) != f.default]
        shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in own)
        return f"{type(self).__name__}({shown})"


def _budgets(deltas: Iterable[Triplets], target: int) -> tuple[int, int]:
    """Return the number of triplets at the start and in the end."""
    given = list(deltas)
    first = sum(delta.tensors[1].numel() for delta in given)
    return first, target * sum(delta.matrices for delta in given)


def _scores(name: str, averages: _Averages) -> Tensor:
    """Return the importance of the triplets of a weight, ``(..., r)``."""
    sensitivity, uncertainty = averages
    left, middle, right = (
        sensitivity[f"{name}.{key}"] * uncertainty[f"{name}.{key}"] for key in FACTORS
    )
    return left.mean(-2) + middle + right.mean(-1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
