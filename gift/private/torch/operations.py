"""Operations: a matrix product by oneDNN, and what an operation is about to write to."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gift.private.torch.containers import tree_leaves
from gift.private.torch.parts import part

PARTS = ("torch.utils._python_dispatch.TorchDispatchMode",)


def has_onednn() -> bool:
    """Whether torch was built with oneDNN and can multiply two matrices with it (`by_onednn`)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by oneDNN if torch has it; autograd and tracers do not see the operation.

    torch passes ``a @ b`` to MKL, and the flags of ``torch.backends`` do not change that.
    """
    if not has_onednn():
        return a @ b
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return product


_Dispatching: Any = part("torch.utils._python_dispatch.TorchDispatchMode") or object


class BeforeWrites(_Dispatching):
    """A context that calls `before_write` for each tensor that is about to be written.

    The schema of an operation says what it writes to, and modes that see operations are documented,
    but both have private names. Without them, all watched tensors count as written.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's default disables Dynamo inside a mode, which imports Dynamo: two seconds in the
        # first `gift.load` of a process. Nothing is compiled here.
        return False

    def watched(self) -> Iterable[Tensor]:
        """The tensors to watch."""
        raise NotImplementedError

    def before_write(self, tensor: Tensor) -> None:
        """Called with a tensor that still has its old value."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        if _Dispatching is not object:
            return super().__enter__()
        for tensor in self.watched():
            self.before_write(tensor)
        return self

    def __exit__(self, *error: Any) -> Any:
        return super().__exit__(*error) if _Dispatching is not object else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Report what `func` is about to write, then run it."""
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        self.before_write(leaf)
        return func(*args, **kwargs)
