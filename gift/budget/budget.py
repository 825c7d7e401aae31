"""Parse budgets, and compare costs with them."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from gift.engine.dry_run import Cost

_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """A number of parameters or of bytes."""

    limit: int
    in_bytes: bool = False

    @staticmethod
    def of(given: Any, total: int) -> "Budget":
        """Parse a user's budget for a network of `total` parameters.

        Raises:
            ValueError, TypeError: if it is not a budget.
        """
        wrong = ValueError(
            f"the budget is {given!r}, expected a positive number of parameters (100_000, '100k', "
            "'1.5M'), a share of them ('1%', or a number below 1), or a size ('2MB')"
        )
        if isinstance(given, bool) or not isinstance(given, Real | str):
            raise TypeError(str(wrong))
        if isinstance(given, str):
            found = re.fullmatch(r"([\d_]+(?:\.\d+)?|\.\d+)\s*(%|[a-z]*)", given.strip().lower())
            if found is None or found[1].strip("_") == "":
                raise wrong
            amount, unit = Decimal(found[1].replace("_", "")), found[2]
        elif isinstance(given, Integral):
            amount, unit = Decimal(int(given)), ""
        elif math.isfinite(given) and (float(given) < 1 or float(given).is_integer()):
            amount, unit = Decimal(str(float(given))), "" if float(given) >= 1 else "share"
        else:
            raise wrong
        shares = {"share": Decimal(total), "%": Decimal(total) / 100}
        factors: dict[str, Any] = _PARAMETERS | _BYTES | shares
        if unit not in factors or amount <= 0:
            raise wrong
        return Budget(int(amount * factors[unit]), unit in _BYTES)

    def allows(self, cost: Cost) -> bool:
        """Return whether the cost is within the budget."""
        return (cost.bytes if self.in_bytes else cost.parameters) <= self.limit

    def in_words(self, cost: Cost) -> str:
        """Format the cost as a text that is itself a budget."""
        return f"{cost.bytes / 1e6:.6f}MB" if self.in_bytes else f"{cost.parameters:_}"
