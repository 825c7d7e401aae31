"""What a method is: a function of a frozen matrix and of a few trained parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError
from gift.fast.choice import Form
from gift.methods.settings import Configured, at_least_32_bits, flag, whole

METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Method(Configured):
    """Base of all methods: a frozen matrix ``W`` becomes an effective one.

    A subclass is a frozen dataclass whose fields are its settings (see `gift.methods.settings`).
    It sees every weight as a matrix ``(rows, columns)`` or as a batch ``(groups, rows, columns)``;
    layers are unknown to it.

    Args:
        dtype: of the new parameters, or its name; None means the weight's, but at least float32.

    Raises:
        ValueError: for settings out of range; all of them are named.
    """

    name: ClassVar[str]
    """The name under which the method is chosen: ``ma_adapt(name)``."""

    title: ClassVar[str]
    """Its name in the names of strategies: ``<title>LinearFineTuningStrategy``."""

    forwards: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Fast paths, from the dotted name of a stock layer's ``forward`` to one of the same signature.
    Each must agree with the materialised weight in value and gradient."""

    dropout: ClassVar[float] = 0.0
    """Probability for `drop`; a method with such a setting has a property of this name."""

    conv_layouts: ClassVar[tuple[Literal["balanced", "out_as_h"], ...]] = ("balanced", "out_as_h")
    """The layouts of convolutions that the method allows, its default first."""

    form: ClassVar[Form | None] = None
    """How fast paths compute; None chooses by shapes. A setting, where there is one."""

    rows_are_outputs: ClassVar[bool] = False
    """Whether rows must be output features also of embeddings, where they are tokens otherwise."""

    scales_outputs: ClassVar[bool] = False
    """Whether the method acts on a layer's outputs, so that its bias takes part."""

    reads_weight: ClassVar[bool] = False
    """Whether the initial parameters depend on the values of the weight."""

    derives: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that say something of the frozen matrix itself, as its norms do. Where
    another matrix takes its place for a call, they are made by `derived` for that one."""

    shows_matrix: ClassVar[bool] = False
    """Whether the shapes of the parameters differ wherever those of two matrices do, so that a
    saved delta need not tell how the weight was read."""

    low_rank_is_cheap: ClassVar[bool] = True
    """Whether gradients are cheaper through the factors of `low_rank` than through the matrix."""

    size_setting: ClassVar[str | None] = None
    """The setting, an integer, that decides how many parameters are added. A method with a setting
    ``clip_<size_setting>`` settles in `fit` by `settled` what becomes of a matrix that cannot have
    the size."""

    def fit(self, shape: tuple[int, ...]) -> Self:
        """The method with settings for a matrix of that shape; see also `nearest`.

        Raises:
            AdaptationError: if no such matrix can be adapted with these settings.
        """
        return self

    @property
    def size(self) -> int | None:
        """The value of `size_setting`; None where there is none."""
        return None if self.size_setting is None else getattr(self, self.size_setting)

    @property
    def clips(self) -> bool | None:
        """Whether a matrix that cannot have the size gets the nearest one; None: with a warning,
        as long as some matrix has the size.
        """
        return getattr(self, f"clip_{self.size_setting}", True)

    def exact(self) -> Self:
        """The method that refuses a matrix which cannot have its size."""
        clip = f"clip_{self.size_setting}"
        return with_settings(self, **{clip: False}) if hasattr(self, clip) else self

    def nearest(self, shape: tuple[int, ...]) -> Self:
        """As `fit`, but for a matrix of many: one that cannot have the size is refused where
        `clips` is False alone.
        """
        if self.clips is not None or self.size is None:
            return self.fit(shape)
        clip = f"clip_{self.size_setting}"
        return with_settings(with_settings(self, **{clip: True}).fit(shape), **{clip: None})

    def settled(self, possible: int, refusal: str) -> Self:
        """The method with the size that a matrix can have.

        Args:
            possible: the nearest to the one asked for.
            refusal: what is wrong with the one asked for, where it is another.

        Raises:
            AdaptationError: if another size was asked for, and is not to be clipped.
        """
        assert self.size_setting is not None
        if not self.clips and self.size not in (None, possible):
            raise AdaptationError(refusal)
        return with_settings(self, **{self.size_setting: possible})

    def init(self, matrix: Tensor) -> dict[str, Tensor]:
        """New tensors for a frozen matrix, in the order in which they are listed.

        A tensor becomes a trained parameter, an ``nn.Buffer`` is left as it is: it is saved with
        the delta if it is persistent, and made anew from the matrix if it is not. The matrix may be
        on the meta device.
        """
        raise NotImplementedError

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters that `derives` names, anew for that matrix."""
        return {}

    def weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The effective matrix, of the shape and dtype of `matrix`, from what `init` gave."""
        raise NotImplementedError

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """The parameters with dropout on the input features, for a training step in which the
        layer reads its weight itself; `input_axis` is the matrix axis of the input features.
        """
        return parameters

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Factors whose product is the delta, whatever the matrix is; None where there are none."""
        return None

    def scaled_low_rank(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float] | None:
        """The same and a number before it, for a product that needs no copy of a factor."""
        factors = self.low_rank(parameters)
        return None if factors is None else (*factors, 1)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Parameters, of these names and shapes, whose delta is `number` times that of these.

        Raises:
            AdaptationError: if there are none.
        """
        raise AdaptationError(f"no parameters of {self.name} give a multiple of a delta")

    def working_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype in which the effective weight is computed, which loses nothing of either."""
        return torch.promote_types(at_least_32_bits(weight.dtype), self.delta_dtype(weight))


@dataclass(frozen=True)
class RankedMethod(Method):
    """Base of methods with a rank.

    Args:
        rank: of the update. None means `default_rank`, or less where a matrix is smaller.
        clip_rank: whether a matrix that cannot have the rank gets its largest one. None means yes,
            with a warning that names it, unless no matrix can have the rank: that is refused. False
            refuses every such matrix; True asks for no warning.
        dtype: of the new parameters, or its name; None means the weight's, but at least float32.
    """

    default_rank: ClassVar[int] = 3
    size_setting: ClassVar[str | None] = "rank"

    rank: int | None = whole(None)
    clip_rank: bool | None = flag(None, enters_weight=False, kw_only=True)

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """The largest rank that a matrix ``(..., rows, columns)`` can have."""
        return min(shape[-2:])

    def fit(self, shape: tuple[int, ...]) -> Self:
        """The method with its rank settled for a matrix ``(..., rows, columns)``."""
        largest = self.largest_rank(shape)
        rank = self.default_rank if self.rank is None else self.rank
        rows, columns = shape[-2:]
        return self.settled(
            min(rank, largest),
            f"rank {rank} is above {largest}, the largest that a matrix of {rows} x {columns} can "
            "have (a smaller rank, or clip_rank=True, would work)",
        )


@lru_cache(maxsize=512)
def with_settings(method: Any, **settings: Any) -> Any:
    """The method with other settings: one object for all weights that have them."""
    return replace(method, **settings)


WHEN_REGISTERED: list[Callable[[type[Method]], None]] = []
"""Called with each method that is registered from then on."""


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name."""
    known = METHODS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"method name {cls.name!r} is taken by {known.__qualname__}")
    METHODS[cls.name] = cls
    for then in WHEN_REGISTERED:
        then(cls)
    return cls


def method_of(name: str | Method, settings: Mapping[str, Any]) -> Method:
    """The method of that name with these settings.

    Raises:
        ValueError: for an unknown name or setting.
    """
    if isinstance(name, Method):
        if settings:
            raise ValueError(f"{name!r} has its settings already, got {dict(settings)} as well")
        return name
    if name not in METHODS:
        close = get_close_matches(str(name), METHODS, n=3)
        raise ValueError(f"unknown method {name!r}; known: {sorted(METHODS)}, closest: {close}")
    cls = METHODS[name]
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        known = list(cls.__dataclass_fields__)
        raise ValueError(f"{name} has no setting {unknown}; it has {known}")
    return cls(**settings)


def dotted(function: Callable[..., Any]) -> str:
    """The dotted name of a function, as in the keys of `Method.forwards`."""
    return f"{function.__module__}.{function.__qualname__}"
