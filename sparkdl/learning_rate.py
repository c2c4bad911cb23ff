"""The learning rate range test: a few steps with rising rates, and what the loss says of them.

L. N. Smith, Cyclical Learning Rates for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186, section 3.3,
with geometric instead of equal steps between the rates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparkdl.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LearningRateSearch", "plan_rates", "search_learning_rate"]

_WINDOW = 0.1  # part of all steps that the smoothed loss is a mean over
_DIVERGED = 4.0  # times the best smoothed loss


def plan_rates(start: float, end: float, steps: int) -> list[float]:
    """Learning rates from ``start`` to ``end``, each the same multiple of the one before.

    Raises:
        ConfigError: There are no such rates.
    """
    if not 0 < start < end < math.inf:
        raise ConfigError(f"start={start} and end={end} are no range of learning rates. Use 0 < start < end.")
    if steps < 2:
        raise ConfigError(f"numSteps={steps} has no steps between start and end. Use 2 or more; 100 is usual.")
    return [*(start * (end / start) ** (step / (steps - 1)) for step in range(steps - 1)), end]


@dataclass(frozen=True, slots=True)
class LearningRateSearch:
    """The losses that rising learning rates led to.

    Attributes:
        learning_rates: Rates of the steps that were taken and had a finite loss, rising geometrically.
        losses: Mean loss over the global batch of each step, before its update.
        smoothed: Exponential moving average of the losses over a tenth of the steps, without the bias of its beginning.
        lag: Steps by which the average is behind the losses.
        stopped: True where the loss diverged before the last rate.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    lag: int
    stopped: bool

    @property
    def suggestion(self) -> float | None:
        """The learning rate at which the smoothed loss falls steepest, before its smallest value.

        That is the smallest slope of the smoothed loss over the logarithm of the rate, by central differences, once the
        average has settled, and the rate of the step that it is behind by its lag. A rate for training that keeps it;
        the highest rate of a schedule that rises and falls (OneCycleLR) may be some times as large.

        None where the smoothed loss never falls: all rates were too large, or too small for as few steps.
        """
        best = int(np.argmin(self.smoothed)) if self.smoothed else 0
        if best < 1:
            return None
        slopes = np.gradient(self.smoothed[: best + 1], np.log(self.learning_rates[: best + 1]))
        first = self.lag + 1 if best > self.lag else 1
        steepest = first + int(np.argmin(slopes[first:]))
        return self.learning_rates[max(0, steepest - self.lag)] if slopes[steepest] < 0 else None

    def plot(self) -> "Figure":
        """The losses over the rates, with the suggestion, as a figure of its own (matplotlib's pyplot is not used).

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("plot() draws with matplotlib, which is missing. Run: pip install matplotlib") from error
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning rate range test")
        axes.plot(self.learning_rates, self.losses, color="tab:blue", alpha=0.35, label="loss of the step")
        # Where it belongs, not where it was known.
        smoothed = self.smoothed[self.lag :]
        axes.plot(self.learning_rates[: len(smoothed)], smoothed, color="tab:blue", label="smoothed")
        suggestion = self.suggestion
        if suggestion is not None:
            place = min(self.learning_rates.index(suggestion) + self.lag, len(self.smoothed) - 1)
            axes.axvline(suggestion, color="tab:red", linestyle=":", linewidth=1)
            axes.plot([suggestion], [self.smoothed[place]], "o", color="tab:red", label=f"suggestion: {suggestion:.2g}")
        if self.smoothed:  # what diverged must not flatten the rest
            best = int(np.argmin(self.smoothed))
            low, high = min(self.losses[: best + 1]), max(self.smoothed[: best + 1])
            margin = (high - low) or abs(high) or 1.0
            axes.set_ylim(low - 0.1 * margin, high + 0.3 * margin)
        axes.legend(loc="lower left")
        return figure


def search_learning_rate(
    train_step: Callable[[int, float], float], *, start: float = 1e-7, end: float = 10.0, num_steps: int = 100
) -> LearningRateSearch:
    """Take steps with rising learning rates until the loss diverges.

    The weights are of no use afterwards. Ranks that are given the same losses stop after the same step.

    Args:
        train_step: Takes one step, given its number from 0 and its learning rate; returns the mean loss over the global
            batch, the same on all ranks.
        start: The first learning rate.
        end: The last one.
        num_steps: Steps at most. It ends before where the smoothed loss exceeds four times its smallest value so far
            (for a loss below 0: the smallest plus three times its size), or a loss is not finite.

    Raises:
        ConfigError: There are no such rates.
    """
    rates = plan_rates(start, end, num_steps)
    window = max(1.0, _WINDOW * num_steps)
    kept = 1 - 1 / window
    losses: list[float] = []
    smoothed: list[float] = []
    average, best, stopped = 0.0, math.inf, False
    for step, rate in enumerate(rates):
        loss = train_step(step, rate)
        if not math.isfinite(loss):
            stopped = True
            break
        average = kept * average + (1 - kept) * loss
        losses.append(loss)
        smoothed.append(average / (1 - kept ** (step + 1)))
        best = min(best, smoothed[-1])
        if smoothed[-1] > best + (_DIVERGED - 1) * abs(best):
            stopped = True
            break
    taken = tuple(rates[: len(losses)])
    return LearningRateSearch(taken, tuple(losses), tuple(smoothed), lag=round(window) - 1, stopped=stopped)
