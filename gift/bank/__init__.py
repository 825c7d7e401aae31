"""Many deltas on one base network. `gift.core` implements a single delta."""

from gift.bank.bank import DeltaBank
from gift.bank.combining import Combination
from gift.bank.extracting import extract

__all__ = ["Combination", "DeltaBank", "extract"]
