"""The arguments of a call of a wrapped module."""

from collections.abc import Mapping
from typing import Any

from gift.core.forwards import Forward, where
from gift.errors import AdaptationError


def in_order(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of a call in the order of `names`, the parameters of a forward."""
    known = [kwargs[name] for name in names if name in kwargs]
    return [*args, *known, *(value for name, value in kwargs.items() if name not in names)]


class Arguments:
    """The arguments of a call of a wrapped module, by name.

    Args:
        module: the wrapped module.
        args: the positional arguments.
        kwargs: the keyword arguments.
        wrapper: the name of the method that wraps it, for messages.

    Attributes:
        first: the name of the first argument that the module takes; "" if none has a name.
        named: the arguments by name, which a wrapper may change.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], wrapper: str
    ) -> None:
        names: tuple[str, ...] = module._gift_arguments
        if len(args) > len(names):
            raise AdaptationError(
                f"{where(module, wrapper)} was called with {len(args)} arguments by position, "
                f"but its forward has names for {list(names)} only"
            )
        self.first = names[0] if names else ""
        self.positional = names[: len(args)]
        self.named = {**dict(zip(self.positional, args, strict=True)), **kwargs}

    def passed_to(self, forward: Forward) -> Any:
        """Call `forward` with the arguments, each passed by position or keyword as it was given."""
        named = dict(self.named)
        return forward(*[named.pop(name) for name in self.positional], **named)
