"""Many deltas on one base network. What a single delta is belongs to `gift.core`."""

from gift.bank.bank import DeltaBank
from gift.bank.combining import Combination

__all__ = ["Combination", "DeltaBank"]
