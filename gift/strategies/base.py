"""Caps, and the strategy that holds them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import nn

from gift.factories.serializable import describe
from gift.support import yaml_files
from gift.support.atomic_files import write_text
from gift.support.patterns import problem_of_patterns
from gift.support.recipes import bound_arguments, decode, encode, register


class Cap(NamedTuple):
    """Check, action, parameters.

    Args:
        check: called with ``(parent_module, current_name, global_name, class_name,
            current_module)``, in a parameter cap also ``parameter_name, parameter``; returns
            whether the action applies.
        action: called with the same arguments and ``**params``; or a strategy, which is applied to
            what the check matches.
        params: keyword arguments for the action.
    """

    check: Callable[..., bool]
    action: "Callable[..., Any] | FineTuningStrategy"
    params: dict[str, Any]

    def __repr__(self) -> str:
        params = f" with {self.params}" if self.params else ""
        return f"{describe(self.check)} -> {describe(self.action)}{params}"


CapLike = Cap | tuple[Callable[..., bool], Any] | tuple[Callable[..., bool], Any, Mapping[str, Any]]
Types = type | Iterable[type]


class FineTuningStrategy:
    """A list of caps that say which modules and parameters are changed, and how.

    Everything else is frozen. Each module, from the network downwards, is claimed by the first
    module cap whose check matches, together with its submodules. (A cap with an open action,
    as `ma_bottleneck` or `ma_prompt`, wraps the module and claims nothing: later caps are still
    tried on it and on its submodules.) In an unclaimed module, each parameter is claimed by the
    first parameter cap whose check matches. What is claimed stays as the action leaves it: an
    action that does nothing keeps it trainable. See `enable_fine_tuning`.

    Args:
        module_caps: caps for modules, ``(check, action)`` or ``(check, action, params)``.
        para_caps: the same for parameters.
        constraint_type: a type or types, of which the network must be an instance.

    Raises:
        TypeError: if something is not a cap or not a type; the message names all of these.

    Example:
        >>> from torch import nn
        >>> from gift import FineTuningStrategy, enable_fine_tuning
        >>> from gift.factories import ma_adapt, pa_train
        >>> strategy = FineTuningStrategy(
        ...     module_caps=[(lambda parent, name, path, cls, module: cls == "Linear",
        ...                   ma_adapt("lora"), {"rank": 2})],
        ...     para_caps=[(lambda *place: place[5] == "bias", pa_train())],
        ... )
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> report = enable_fine_tuning(net, strategy)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.lora_B', '0.lora_A', '1.bias']
    """

    dry_run = False
    """Whether the strategy only reports, and the network is restored afterwards."""

    init_paras: dict[str, Any]
    """The arguments that the strategy was constructed with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _show_signature(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments of the construction."""
        strategy = super().__new__(cls)
        # Copying and unpickling call this without arguments, and restore `init_paras` afterwards.
        if args or kwargs or not _required(cls):
            strategy.init_paras = bound_arguments(cls, *args, **kwargs)
        return strategy

    def __init__(
        self,
        module_caps: Iterable[CapLike] = (),
        para_caps: Iterable[CapLike] = (),
        constraint_type: Types = (),
    ) -> None:
        problems: list[str] = []
        self.module_caps = _caps("module_caps", module_caps, problems)
        self.para_caps = _caps("para_caps", para_caps, problems)
        self.constraint_type = _types(constraint_type, problems)
        if problems:
            raise TypeError(f"{type(self).__name__}: " + "; ".join(problems))
        if type(self) is FineTuningStrategy:  # caps from a generator are exhausted by now
            own = {"module_caps": list(self.module_caps), "para_caps": list(self.para_caps)}
            self.init_paras |= own

    def register_module_cap(
        self, check: Callable[..., bool], action: Any, params: Mapping[str, Any] | None = None
    ) -> None:
        """Add a module cap after the existing ones, to this strategy only."""
        self._register("module_caps", (check, action, params or {}))

    def register_para_cap(
        self, check: Callable[..., bool], action: Any, params: Mapping[str, Any] | None = None
    ) -> None:
        """Add a parameter cap after the existing ones, to this strategy only."""
        self._register("para_caps", (check, action, params or {}))

    @property
    def caps(self) -> list[Cap]:
        """Return all caps, those for modules first."""
        return [*self.module_caps, *self.para_caps]

    @property
    def cap_texts(self) -> list[str]:
        """Return a text for each cap: ``module cap 0: mc_type(Linear) -> ma_adapt('lora')``."""
        kinds = {"module": self.module_caps, "parameter": self.para_caps}
        return [f"{k} cap {i}: {cap}" for k, caps in kinds.items() for i, cap in enumerate(caps)]

    def _register(self, kind: str, cap: CapLike) -> None:
        problems: list[str] = []
        caps = _caps(kind, [cap], problems)
        if problems:
            raise TypeError(f"{type(self).__name__}: " + "; ".join(problems))
        getattr(self, kind).extend(caps)
        extra = self.init_paras.setdefault("registered", {"module_caps": [], "para_caps": []})
        extra[kind].extend(caps)

    @property
    def recipe(self) -> tuple[str, dict[str, Any]]:
        """Return the name and arguments by which a file can refer to the strategy."""
        if "registered" in self.init_paras:
            raise ValueError(
                f"{type(self).__name__} has caps that were registered later; give all caps to the "
                "constructor, or merge strategies, to save them"
            )
        return type(self).__name__, self.init_paras

    def to_config(self) -> dict[str, Any]:
        """Return the strategy as plain data, for `load_strategy_from_config`.

        Raises:
            ValueError: naming everything that a file cannot hold, such as a lambda.
        """
        return encode(self)

    def save_init_paras(self, path: str | Path) -> None:
        """Write the strategy's name and arguments as YAML.

        Raises:
            ValueError: naming everything that a file cannot hold, such as a lambda. Nothing is
                written then.
            ImportError: if PyYAML is not installed.
        """
        write_text(path, yaml_files.dump(self.to_config()))

    def __repr__(self) -> str:
        known = inspect.signature(type(self)).parameters
        shown = [describe(item) for item in self.init_paras.get("*", [])]
        shown += [
            f"{name}={describe(value)}"
            for name, value in self.init_paras.items()
            if name != "*" and not (name in known and _is_default(value, known[name].default))
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def _is_default(value: Any, default: Any) -> bool:
    """Return whether a value is the default, without ``==``, which is ambiguous for tensors.

    Nested strategies are compared by identity, without their descriptions: each level would
    describe everything inside it twice.
    """
    if isinstance(default, tuple):
        default = list(default)  # as arguments are stored
    if isinstance(value, list) and isinstance(default, list):
        pairs = zip(value, default, strict=False)
        return len(value) == len(default) and all(_is_default(*pair) for pair in pairs)
    if isinstance(value, FineTuningStrategy | nn.Module) or callable(value):
        return value is default
    return value is default or (type(value) is type(default) and repr(value) == repr(default))


def _show_signature(cls: type) -> None:
    """Make `inspect` report the signature of ``__init__`` instead of that of ``__new__``."""
    if "__signature__" in vars(cls):
        return
    own = inspect.signature(cls.__init__)  # type: ignore[misc]
    cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]


_show_signature(FineTuningStrategy)


def _required(cls: type) -> bool:
    parameters = inspect.signature(cls).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in kinds for p in parameters)


def _types(given: Any, problems: list[str]) -> tuple[type, ...]:
    types = tuple(given) if isinstance(given, list | tuple | set) else (given,)
    problems += [
        f"constraint_type contains {t!r}, which is not a type"
        for t in types
        if not isinstance(t, type)
    ]
    return types


def _caps(kind: str, caps: Any, problems: list[str]) -> list[Cap]:
    made: list[Cap] = []
    if isinstance(caps, str | Mapping) or not isinstance(caps, Iterable):
        problems.append(f"{kind} is {caps!r}, expected a list of (check, action[, params])")
        return made
    for index, cap in enumerate(caps):
        parts = tuple(cap) if isinstance(cap, tuple | list) else ()
        params = parts[2] if len(parts) == 3 else {}
        if len(parts) not in (2, 3):
            problems.append(f"{kind}[{index}] is {cap!r}, expected (check, action[, params])")
        elif not callable(parts[0]):
            problems.append(f"{kind}[{index}]: the check is {parts[0]!r}, expected a callable")
        elif wrong := _wrong_action(parts[1]):
            problems.append(f"{kind}[{index}]: the action is {wrong}")
        elif not isinstance(params, Mapping):
            problems.append(f"{kind}[{index}]: params is {params!r}, expected a dict")
        else:
            made.append(Cap(parts[0], parts[1], dict(params)))
    return made


def _wrong_action(action: Any) -> str:
    if isinstance(action, FineTuningStrategy):
        looks = f"{action!r}, which only prints: wrap the whole strategy in it"
        return looks if action.dry_run else ""
    if isinstance(action, type) and issubclass(action, FineTuningStrategy):
        return f"the class {action.__name__}, expected an instance of it, with parentheses"
    if isinstance(action, nn.Module):
        return f"a module, {type(action).__name__}; ma_replace puts one in the place of another"
    return "" if callable(action) else f"{action!r}, expected a callable or a strategy"


def register_strategy(cls: type[FineTuningStrategy]) -> type[FineTuningStrategy]:
    """Class decorator: let files refer to this strategy by name."""
    return register(cls)


register_strategy(FineTuningStrategy)


def load_strategy_from_config(config: str | Path | Mapping[str, Any]) -> FineTuningStrategy:
    """Return the strategy that a file or mapping describes.

    A file can only name registered strategies, checks and actions, with plain values: loading runs
    no code from the file. Regular expressions that may take long to match are refused.

    Args:
        config: a YAML file written by `FineTuningStrategy.save_init_paras`, or its content.

    Raises:
        ValueError: if it is not such a description, or names something that is not registered.
        FileNotFoundError: if the file does not exist.
    """
    if isinstance(config, Mapping):
        data: Any = dict(config)
    else:
        try:
            data, _ = yaml_files.load(yaml_files.read_text(Path(config)))
        except yaml_files.YamlError as error:
            raise ValueError(f"{config} is not plain YAML: {error}") from error
    if not isinstance(data, dict) or set(data) != {"name", "init_paras"}:
        keys = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"expected a mapping with 'name' and 'init_paras', found {keys}")
    strategy = decode(data)
    if problem := problem_of_patterns(_expressions(data)):
        raise ValueError(problem)
    if not isinstance(strategy, FineTuningStrategy):
        raise ValueError(f"{data['name']!r} is a {type(strategy).__name__}, expected a strategy")
    return strategy


def _expressions(data: Any) -> Iterator[str]:
    """Yield the regular expressions in the plain data of a strategy."""
    if isinstance(data, Mapping):
        given = data.get("regex") or ()
        yield from [given] if isinstance(given, str) else given
        data = data.values()
    elif not isinstance(data, list):
        return
    for value in data:
        yield from _expressions(value)
