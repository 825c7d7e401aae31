"""The base class of methods: functions of a frozen matrix and a few trained parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from gift.errors import AdaptationError, closest
from gift.kernels.cost_model import Form
from gift.methods.settings import Configured, at_least_32_bits, flag, number, whole

METHODS: dict[str, type["Method"]] = {}
"""The registered methods, by name."""


@dataclass(frozen=True)
class Method(Configured):
    """Base class of all methods, which turn a frozen matrix ``W`` into an effective one.

    A subclass is a frozen dataclass whose fields are its settings (see `gift.methods.settings`). It
    sees every weight as a matrix ``(rows, columns)`` or as a batch ``(groups, rows, columns)``, and
    knows nothing of layers.

    Args:
        dtype: dtype of the new parameters, or its name; None means the weight's, but at least
            float32.

    Raises:
        ValueError: if settings are out of range; the message names all of them.
    """

    name: ClassVar[str]
    """The name that selects the method: ``ma_adapt(name)``."""

    strategy_prefix: ClassVar[str]
    """The prefix of the method's strategy names: ``<prefix>LinearFineTuningStrategy``."""

    forwards: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Fast paths, by the dotted name of the stock layer's ``forward`` that each one replaces.

    A fast path has the signature of that ``forward``, and must agree with the materialised weight
    in value and gradient.
    """

    dropout: ClassVar[float] = 0.0
    """Dropout probability for `drop`; a method with such a setting overrides it by a property."""

    conv_layouts: ClassVar[tuple[Literal["balanced", "out_as_h"], ...]] = ("balanced", "out_as_h")
    """The convolution layouts that the method allows; the first is the default."""

    form: ClassVar[Form | None] = None
    """How fast paths compute; None chooses by shapes. Some methods have a setting of this name."""

    rows_are_outputs: ClassVar[bool] = False
    """Whether rows must be output features for embeddings too, where rows are otherwise tokens."""

    scales_outputs: ClassVar[bool] = False
    """Whether the method acts on a layer's outputs, so that its bias is adapted too."""

    bias_reads_weight: ClassVar[bool] = False
    """Whether the effective bias depends on the frozen matrix, see `effective_bias`."""

    reads_weight: ClassVar[bool] = False
    """Whether the initial parameters depend on the values of the weight."""

    derives: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that are computed from the frozen matrix, such as its norms.

    If another matrix replaces it for one call, `derived` computes them for that matrix.
    """

    shows_matrix: ClassVar[bool] = False
    """Whether parameter shapes determine the shape of the matrix.

    A saved delta then need not record the layout in which the weight was read.
    """

    replaced_rows: ClassVar[Sequence[int]] = ()
    """Rows whose frozen values do not matter, since the delta has values in their place.

    A file of the delta does not ask for the same values there.
    """

    low_rank_is_cheap: ClassVar[bool] = True
    """Whether gradients are cheaper through the factors of `low_rank` than through the matrix."""

    shared: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that all matrices of a network share, as far as their shapes agree.

    They are one parameter, which each module holds under its own name, as torch has tied weights.
    They have no axis of groups.
    """

    @property
    def shares_with(self) -> tuple[Any, ...]:
        """Values that must be equal for two matrices to have one shared parameter.

        Its initial value depends on them.
        """
        return ()

    is_part: ClassVar[bool] = False
    """Whether the matrices that have one shared parameter are parts of one whole.

    Then `placed` settles which part each is, once all of them are known. A single one is the whole.
    """

    def share(self, shape: tuple[int, ...]) -> int:
        """Return how many entries of the whole belong to a matrix of that shape."""
        raise NotImplementedError

    def placed(self, first: int, total: int) -> Self:
        """Return the method for a matrix whose entries start at `first`, of `total` ones.

        Only what `init_parameters` gives as a buffer that is not persistent may depend on these.
        """
        raise NotImplementedError

    split_axes: ClassVar[Mapping[str, tuple[int | None, int | None]]] = {}
    """For each parameter, which axis lies along the matrix's rows and which along its columns.

    None stands for no axis. A part of the matrix's rows, or columns, then needs the parts of these
    parameters, and all of the others. Tensor parallelism relies on that, and refuses a method with
    a parameter that is missing here.
    """

    split_by: ClassVar[tuple[Literal["rows", "columns"], ...]] = ("rows", "columns")
    """Which parts of the effective matrix are functions of the same part of the frozen one."""

    size_setting: ClassVar[str | None] = None
    """The integer setting that determines the number of added parameters.

    If a method has a setting ``clip_<size_setting>``, its `fit` calls `settled` to handle a matrix
    that cannot have the size.
    """

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its settings fitted to a matrix of that shape.

        See also `nearest`.

        Raises:
            AdaptationError: if no such matrix can be adapted with these settings.
        """
        return self

    @property
    def size(self) -> int | None:
        """The value of `size_setting`; None if there is no such setting."""
        return None if self.size_setting is None else getattr(self, self.size_setting)

    @property
    def clips(self) -> bool | None:
        """Whether a matrix that cannot have the size gets the nearest size instead of an error.

        None means yes, with a warning, provided that some matrix has the size.
        """
        return getattr(self, f"clip_{self.size_setting}", True)

    def exact(self) -> Self:
        """Return the method that rejects a matrix which cannot have its size."""
        clip = f"clip_{self.size_setting}"
        return with_settings(self, **{clip: False}) if hasattr(self, clip) else self

    def nearest(self, shape: tuple[int, ...]) -> Self:
        """Fit the method to one matrix of many.

        Like `fit`, but a matrix that cannot have the size is an error only if `clips` is False.
        """
        if self.clips is not None or self.size is None:
            return self.fit(shape)
        clip = f"clip_{self.size_setting}"
        fitted: Self = with_settings(with_settings(self, **{clip: True}).fit(shape), **{clip: None})
        return fitted

    def settled(self, possible: int, refusal: str) -> Self:
        """Return the method with a size that the matrix can have.

        Args:
            possible: the possible size nearest to the requested one.
            refusal: the error message, if that is not the requested size.

        Raises:
            AdaptationError: if another size was requested and must not be clipped.
        """
        assert self.size_setting is not None
        if not self.clips and self.size not in (None, possible):
            raise AdaptationError(refusal)
        settled: Self = with_settings(self, **{self.size_setting: possible})
        return settled

    def init_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the new tensors for a frozen matrix, in the order in which they are listed.

        A tensor becomes a trained parameter. An ``nn.Buffer`` stays a buffer: it is saved with the
        delta if it is persistent, and recomputed from the matrix if it is not. The matrix may be on
        the meta device.
        """
        raise NotImplementedError

    def derived(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parameters that `derives` names, recomputed for that matrix."""
        return {}

    def effective_weight(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the effective matrix, in shape and dtype of `matrix`, given the parameters."""
        raise NotImplementedError

    def init_bias_parameters(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return further tensors for a matrix to whose outputs a bias is added.

        Only for methods with `scales_outputs`, where such a bias is adapted too. They belong to the
        delta of the matrix, whose `effective_weight` gets them as well.
        """
        return {}

    def effective_bias(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the effective bias, given the parameters of the matrix that it belongs to.

        Args:
            bias: ``(rows, 1)`` or ``(groups, rows, 1)``; of several matrices one below the other.
            parameters: those of the matrix, or numbered as `of_each_weight` takes them. If
                `bias_reads_weight`, ``frozen`` is the frozen matrix.
        """
        return self.effective_weight(bias, parameters)

    def drop(self, parameters: dict[str, Tensor], input_axis: int) -> dict[str, Tensor]:
        """Drop input features in a training step of a layer that reads its weight itself.

        Args:
            parameters: the parameters of the delta.
            input_axis: the matrix axis of the input features.
        """
        return parameters

    def low_rank(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return factors whose product is the delta of any matrix; None if there are none."""
        return None

    def scaled_low_rank(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float] | None:
        """Return the factors and a scale of their product, which needs no scaled copy."""
        factors = self.low_rank(parameters)
        return None if factors is None else (*factors, 1)

    def multiplied(self, parameters: Mapping[str, Tensor], number: float) -> dict[str, Tensor]:
        """Return parameters of the same names and shapes whose delta is `number` times as large.

        Raises:
            AdaptationError: if no such parameters exist.
        """
        raise AdaptationError(f"no parameters of {self.name} give a multiple of a delta")

    def working_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype for computing the effective weight, exact for weight and delta."""
        return torch.promote_types(at_least_32_bits(weight.dtype), self.delta_dtype(weight))


@dataclass(frozen=True)
class RankedMethod(Method):
    """Base class of methods with a rank.

    Args:
        rank: rank of the update. None means `default_rank`, or less for a smaller matrix.
        clip_rank: whether a matrix that cannot have the rank gets its largest one. None means yes,
            with a warning that names the matrix, unless no matrix can have the rank, which is an
            error. False makes every such matrix an error. True clips without a warning.
        dtype: dtype of the new parameters, or its name; None means the weight's, but at least
            float32.
    """

    default_rank: ClassVar[int] = 3
    size_setting: ClassVar[str | None] = "rank"

    rank: int | None = whole(None)
    clip_rank: bool | None = flag(None, enters_weight=False, kw_only=True)

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """Return the largest rank that a matrix ``(..., rows, columns)`` can have."""
        return min(shape[-2:])

    def fit(self, shape: tuple[int, ...]) -> Self:
        """Return the method with its rank settled for a matrix ``(..., rows, columns)``."""
        largest = self.largest_rank(shape)
        rank = self.default_rank if self.rank is None else self.rank
        rows, columns = shape[-2:]
        return self.settled(
            min(rank, largest),
            f"rank {rank} is above {largest}, the largest that a matrix of {rows} x {columns} can "
            "have (a smaller rank, or clip_rank=True, would work)",
        )


def of_each_weight(parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the parameters of each weight, for a bias that belongs to one or several.

    Those of several weights are numbered: ``name.0``, ``name.1``, ...
    """
    each: dict[str, dict[str, Tensor]] = {}
    for key, value in parameters.items():
        name, _, number = key.partition(".")
        each.setdefault(number, {})[name] = value
    return list(each.values())


@dataclass(frozen=True)
class ScaledMethod(RankedMethod):
    r"""Base class of methods whose update is multiplied by ``alpha / r``.

    Args:
        rank: `r`, as in `RankedMethod`.
        alpha: :math:`\alpha`; None means `r`, so that the scaling is 1.
        clip_rank: as in `RankedMethod`.
        dtype: as in `RankedMethod`.
    """

    alpha: float | None = number(None)

    @property
    def scaling(self) -> float:
        """The factor that multiplies the update."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank or self.default_rank)

    @property
    def compat_settings(self) -> dict[str, Any]:
        """The settings that enter the weight, with alpha replaced by the scaling."""
        rest = {key: value for key, value in super().compat_settings.items() if key != "alpha"}
        return rest | {"scaling": self.scaling}


@lru_cache(maxsize=512)
def with_settings(method: Any, **settings: Any) -> Any:
    """Return the method with other settings, cached so that weights share one object."""
    return replace(method, **settings)


WHEN_REGISTERED: list[Callable[[type[Method]], None]] = []
"""Callbacks that receive each method registered after them."""


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator that registers a method under its name."""
    known = METHODS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"method name {cls.name!r} is taken by {known.__qualname__}")
    METHODS[cls.name] = cls
    for then in WHEN_REGISTERED:
        then(cls)
    return cls


def method_of(name: str | Method, settings: Mapping[str, Any]) -> Method:
    """Return the method of that name with these settings.

    Raises:
        ValueError: if the name or a setting is unknown.
    """
    if isinstance(name, Method):
        if settings:
            raise ValueError(f"{name!r} has its settings already, got {dict(settings)} as well")
        return name
    if name not in METHODS:
        close = closest(name, METHODS)
        raise ValueError(f"unknown method {name!r}; known: {sorted(METHODS)}, closest: {close}")
    cls = METHODS[name]
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        known = list(cls.__dataclass_fields__)
        raise ValueError(f"{name} has no setting {unknown}; it has {known}")
    return cls(**settings)
