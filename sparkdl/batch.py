"""The one type that the reader hands to the training loop."""

import itertools
from dataclasses import dataclass

import torch

__all__ = ["Batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows that one rank feeds one step (its slice of the global batch).

    Attributes:
        inputs: One tensor per input column, each of shape (rows, ...); none on a rank that needs labels alone.
        labels: One tensor per label column, each of shape (rows,) or (rows, targets); none where inputs are all.
        weight: Row weights of shape (rows,), or None where every row counts once.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    weight: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows; 0 where this rank has none in the step."""
        return len(self._first)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._first.device

    @property
    def _first(self) -> torch.Tensor:
        return (self.inputs or self.labels)[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``; itself where it is there already."""
        if self._first.device == device:
            return self
        return Batch(
            tuple(tensor.to(device, non_blocking=True) for tensor in self.inputs),
            tuple(tensor.to(device, non_blocking=True) for tensor in self.labels),
            None if self.weight is None else self.weight.to(device, non_blocking=True),
        )

    def split(self, rows: int | None) -> list["Batch"]:
        """Micro-batches of at most ``rows`` rows, in order and as even as can be; an empty batch stays one."""
        return self.cut(1 if rows is None else max(1, -(-self.rows // rows)))

    def cut(self, pieces: int) -> list["Batch"]:
        """The rows in ``pieces`` parts, in order and as even as can be; some are empty where there are fewer rows."""
        if pieces == 1:
            return [self]
        bounds = [piece * self.rows // pieces for piece in range(pieces + 1)]
        return [self.part(start, stop) for start, stop in itertools.pairwise(bounds)]

    def part(self, start: int, stop: int) -> "Batch":
        """Rows ``start`` to ``stop``."""
        return Batch(
            tuple(tensor[start:stop] for tensor in self.inputs),
            tuple(tensor[start:stop] for tensor in self.labels),
            None if self.weight is None else self.weight[start:stop],
        )
