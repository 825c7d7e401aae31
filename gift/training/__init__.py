"""The training loop, its metrics and its reports. Examples come from `gift.data`."""

from gift.errors import TrainingError
from gift.training.callbacks import Callback
from gift.training.evaluation import evaluate
from gift.training.loop import finetune
from gift.training.lr_finder import LearningRates, find_lr
from gift.training.metrics import METRICS
from gift.training.predicting import predict
from gift.training.predictions import (
    Detected,
    Embedded,
    Labels,
    Number,
    Prediction,
    Segmented,
    Written,
)
from gift.training.result import Result
from gift.training.settings import Settings

__all__ = [
    "METRICS",
    "Callback",
    "Detected",
    "Embedded",
    "Labels",
    "LearningRates",
    "Number",
    "Prediction",
    "Result",
    "Segmented",
    "Settings",
    "TrainingError",
    "Written",
    "evaluate",
    "find_lr",
    "finetune",
    "predict",
]
