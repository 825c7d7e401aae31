"""Many deltas on one base."""

from gift.bank.bank import DeltaBank
from gift.bank.combining import Combination

__all__ = ["Combination", "DeltaBank"]
