"""The classic schedules of transfer learning."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gift.schedules.base import Schedule
from gift.schedules.config import register_schedule


@register_schedule
@dataclass(eq=False, repr=False)
class NoFreeze(Schedule):
    """Train all blocks from epoch 0.

    Args:
        lr_ratio: as in `Schedule`, like all other arguments.

    Example:
        >>> from torch import nn
        >>> from gift.schedules import NoFreeze
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> schedule = NoFreeze()
        >>> report = schedule.attach(net)
        >>> schedule.step(0)
        ['0']
    """

    @property
    def milestones(self) -> tuple[int, ...]:
        """The first epoch."""
        return (0,)

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """Return all blocks."""
        return blocks


@register_schedule
@dataclass(eq=False, repr=False)
class Freeze(Schedule):
    """Train the head only.

    Args:
        head: as in `Schedule`, like all other arguments.

    Example:
        >>> from torch import nn
        >>> from gift.schedules import Freeze
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> schedule = Freeze()
        >>> report = schedule.attach(net)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']
    """

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """Return no blocks."""
        return ()


@register_schedule
@dataclass(eq=False, repr=False)
class FreezeUnfreeze(Schedule):
    """Train the head only, then all blocks from one epoch on.

    Args:
        unfreeze_epoch: epoch from which all blocks are trained, from 0.
        head: as in `Schedule`, like all other arguments.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from torch import nn
        >>> from gift.schedules import FreezeUnfreeze
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> schedule = FreezeUnfreeze(unfreeze_epoch=2)
        >>> print(schedule.attach(net))
        Sequential by FreezeUnfreeze(unfreeze_epoch=2)
        block    class      waits    trained from the start  unfrozen
        -------  -------  -------  ------------------------  ----------
        0        Linear        20                         0  epoch 2
        2        Linear         0                        10  head
    """

    unfreeze_epoch: int = 5

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the settings."""
        yield from super().problems()
        if not _is_epoch(self.unfreeze_epoch):
            yield f"unfreeze_epoch is {self.unfreeze_epoch!r}, expected an integer from 0"

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epoch at which all blocks are unfrozen."""
        return (self.unfreeze_epoch,)

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """Return all blocks, from that epoch on."""
        return blocks if epoch >= self.unfreeze_epoch else ()


@register_schedule
@dataclass(eq=False, repr=False)
class UnfreezeMilestones(Schedule):
    """Train the head only, then unfreeze the last blocks step by step at milestones.

    Args:
        unfreeze_milestones: increasing epochs. At each milestone but the last, the next
            `num_layers` blocks are unfrozen, from the last block down; at the last one, all
            remaining blocks.
        num_layers: number of blocks to unfreeze at a time. Blocks with nothing to unfreeze do not
            count.
        head: as in `Schedule`, like all other arguments.

    Raises:
        ValueError: if settings are out of range.

    Example:
        >>> from torch import nn
        >>> from gift.schedules import UnfreezeMilestones
        >>> net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        >>> schedule = UnfreezeMilestones(unfreeze_milestones=(3, 8), num_layers=2)
        >>> report = schedule.attach(net)
        >>> {epoch: new for epoch in range(10) if (new := schedule.step(epoch))}
        {3: ['2', '3'], 8: ['0', '1']}
    """

    unfreeze_milestones: tuple[int, ...] = (3, 8)
    num_layers: int = 2

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the settings."""
        yield from super().problems()
        epochs = self.unfreeze_milestones
        fits = isinstance(epochs, list | tuple) and len(epochs) and all(map(_is_epoch, epochs))
        if not fits or sorted({*epochs}) != list(epochs):
            yield f"unfreeze_milestones is {epochs!r}, expected rising epochs from 0"
        if not _is_epoch(self.num_layers) or self.num_layers < 1:
            yield f"num_layers is {self.num_layers!r}, expected an integer of at least 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unfreeze_milestones = tuple(self.unfreeze_milestones)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The milestones."""
        return self.unfreeze_milestones

    def due(self, epoch: int, blocks: Sequence[str]) -> Iterable[str]:
        """Return the last blocks, or all."""
        passed = sum(epoch >= milestone for milestone in self.unfreeze_milestones)
        if passed == len(self.unfreeze_milestones):
            return blocks
        return blocks[-passed * self.num_layers :] if passed else ()


def _is_epoch(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
