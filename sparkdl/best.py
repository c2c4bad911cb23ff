"""Which epoch was the best, and whether to go on: pure functions of what the history says."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparkdl.config import MonitorMode

__all__ = ["Best", "monitor_mode"]

_SMALLER = ("loss", "error", "mae", "mse", "rmse", "mape", "perplexity", "hamming")


def monitor_mode(name: str, mode: MonitorMode) -> Literal["min", "max"]:
    """Whether an entry of the history is better when it is smaller or larger.

    >>> monitor_mode("validation_rmse", "auto"), monitor_mode("validation_accuracy", "auto")
    ('min', 'max')
    """
    if mode != "auto":
        return mode
    return "min" if name.endswith(_SMALLER) else "max"


@dataclass(frozen=True, slots=True)
class Best:
    """The best value so far of an entry of the history.

    Attributes:
        mode: Whether smaller or larger is better.
        min_delta: By how much a value has to be better to count.
        value: The best; None before the first number.
        epoch: Its epoch, from 1; 0 before the first.
    """

    mode: Literal["min", "max"]
    min_delta: float = 0.0
    value: float | None = None
    epoch: int = 0

    def after(self, value: Any, epoch: int) -> "Best":
        """The best after another epoch; what is no number is never better."""
        return replace(self, value=float(value), epoch=epoch) if self._is_better(float(value)) else self

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.value is None:
            return True
        gain = self.value - value if self.mode == "min" else value - self.value
        return gain > self.min_delta

    def is_over(self, epoch: int, patience: int | None) -> bool:
        """True where the last ``patience`` epochs, up to ``epoch``, were no better."""
        return patience is not None and epoch - self.epoch >= patience
