"""What one rank counts in an epoch, and what of it goes into checkpoints."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparkdl.parallel import StepResult

__all__ = ["EpochSums", "Meter"]


@dataclass(slots=True)
class EpochSums:
    """Sums over the steps of an epoch so far, of this rank's rows.

    Attributes:
        loss: Of its losses, shape (), float64.
        logged: Of what a training step returned besides, by name, likewise.
        denominator: What the losses are divided by.
        rows: Rows that it trained on.
        counted: Rows whose step was taken.
        waited: Seconds that its loop waited for data.
        busy: Seconds that it computed, without waiting for other ranks.
        stepped: Seconds of its steps, waiting for others included.
        seconds: Seconds of the epoch.
        skipped: Steps that were left out.
    """

    loss: torch.Tensor
    logged: dict[str, torch.Tensor] = field(default_factory=dict)
    denominator: float = 0.0
    rows: int = 0
    counted: int = 0
    waited: float = 0.0
    busy: float = 0.0
    stepped: float = 0.0
    seconds: float = 0.0
    skipped: int = 0

    @classmethod
    def zero(cls, device: torch.device, logged: Sequence[str]) -> "EpochSums":
        """Nothing yet."""
        zeros = torch.zeros(1 + len(logged), dtype=torch.float64, device=device)
        return cls(zeros[0], dict(zip(logged, zeros[1:], strict=True)))

    def add(self, result: StepResult, denominator: float, rows: int) -> None:
        """Count one step; the losses of one that was left out may be no numbers."""
        self.rows += rows
        if not result.taken:
            self.skipped += 1
            return
        self.loss += result.loss
        for name, value in result.logged.items():
            self.logged[name] += value
        self.denominator += denominator
        self.counted += rows

    @property
    def mean_loss(self) -> float:
        """Of this rank's rows; NaN before the first."""
        return float(self.loss) / self.denominator if self.denominator else math.nan

    def values(self) -> dict[str, float]:
        """All of it as numbers, in an order that is equal on all ranks."""
        return {
            "loss": float(self.loss),
            "denominator": self.denominator,
            "rows": self.rows,
            "counted": self.counted,
            "waited": self.waited,
            "busy": self.busy,
            "stepped": self.stepped,
            "seconds": self.seconds,
            "skipped": self.skipped,
            **{f"logged.{name}": float(value) for name, value in self.logged.items()},
        }

    def load(self, sums: Mapping[str, Any], *, first: bool, ranks: int) -> None:
        """Go on from sums over all ranks.

        Args:
            sums: Of `values`.
            first: True on the one rank that goes on with what is counted once.
            ranks: How many there were.
        """
        self.seconds, self.skipped = sums["seconds"] / ranks, int(sums["skipped"]) // ranks
        if first:
            self.loss.fill_(sums["loss"])
            for name, value in self.logged.items():
                value.fill_(sums[f"logged.{name}"])
            self.denominator, self.rows, self.counted = sums["denominator"], int(sums["rows"]), int(sums["counted"])
            self.waited, self.busy, self.stepped = sums["waited"], sums["busy"], sums["stepped"]


class Meter:
    """Rates since they were read last.

    Args:
        sums: Counted on while this looks at them.

    Attributes:
        at: When they were read, by `time.perf_counter`.
    """

    def __init__(self, sums: EpochSums) -> None:
        self.at = time.perf_counter()
        self._before = self._counts(sums)

    def read(self, now: float, sums: EpochSums) -> dict[str, float]:
        """Rows per second, and the shares of the time that went into waiting for data and for other ranks."""
        seconds, self.at = now - self.at, now
        counts = self._counts(sums)
        rows, waited, synchronised = (new - old for new, old in zip(counts, self._before, strict=True))
        self._before = counts
        return {
            "rows_per_second": rows / seconds,
            "data_wait": waited / seconds,
            "synchronisation": synchronised / seconds,
        }

    @staticmethod
    def _counts(sums: EpochSums) -> tuple[float, ...]:
        return sums.rows, sums.waited, sums.stepped - sums.busy
