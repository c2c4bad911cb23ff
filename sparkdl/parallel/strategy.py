"""The questions that the training loop asks of a way to train in parallel."""

from typing import Protocol

from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.objective import Objective
from sparkdl.optimizer import OptimizerRecipe

__all__ = ["Strategy"]


class Strategy(Protocol):
    """Holds the module and its optimizer, and takes steps with the other ranks."""

    def prepare(
        self, module: nn.Module, objective: Objective, optimizer: OptimizerRecipe, *, find_unused_parameters: bool
    ) -> None:
        """Take over a module that is on its device and equal on all ranks; the process group is up."""
        ...

    def train_step(self, batch: Batch, denominator: float, micro_batch_size: int | None) -> Tensor:
        """One optimizer step on this rank's rows of the global batch.

        Args:
            batch: This rank's rows; may be none.
            denominator: What the sum of all ranks' losses is divided by; 0 divides by nothing.
            micro_batch_size: Rows of one forward at most.

        Returns:
            Sum of this rank's losses, detached, shape ().
        """
        ...

    def close(self) -> None:
        """Let go of the process group; called before the rank leaves it."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that this rank has computed so far, without those in which it waited for others."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module with its current weights."""
        ...
