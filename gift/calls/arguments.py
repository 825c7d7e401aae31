"""The arguments of a call of an extended module."""

from collections.abc import Mapping
from typing import Any

from gift.extension import Forward, where
from gift.methods import AdaptationError


def in_order(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call in the order of `names`, which are those of a forward."""
    known = [kwargs[name] for name in names if name in kwargs]
    return [*args, *known, *(value for name, value in kwargs.items() if name not in names)]


class Arguments:
    """The arguments of a call of an extended module, by name.

    Args:
        module: the extended module.
        args: those given by position, and
        kwargs: by name.
        extension: the name of the extension, for messages.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], extension: str
    ) -> None:
        names: tuple[str, ...] = module._gift_arguments
        if len(args) > len(names):
            raise AdaptationError(
                f"{where(module, extension)} was called with {len(args)} arguments by position, "
                f"but its forward has names for {list(names)} only"
            )
        self.positional = names[: len(args)]
        self.named = {**dict(zip(self.positional, args, strict=True)), **kwargs}

    def passed_to(self, forward: Forward) -> Any:
        """What `forward` gives for them, each given in the way in which it came."""
        named = dict(self.named)
        return forward(*[named.pop(name) for name in self.positional], **named)
