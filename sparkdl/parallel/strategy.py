"""The questions that the training loop asks of a way to train in parallel."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.objective import Objective
from sparkdl.optimizer import OptimizerRecipe

__all__ = ["Strategy"]


class Strategy(Protocol):
    """Holds the module and its optimizer, and takes steps with the other ranks."""

    def prepare(
        self,
        module: nn.Module,
        objective: Objective,
        optimizer: OptimizerRecipe,
        *,
        find_unused_parameters: bool,
        example: Batch,
    ) -> None:
        """Take over a module that is on its device; the process group is up.

        Args:
            module: The module; rank 0's weights are everyone's.
            objective: The loss as sum and denominator.
            optimizer: How to make the optimizer.
            find_unused_parameters: True where some parameters have no part in the output.
            example: Some of this rank's rows; none where it has none.
        """
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

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as `sparkdl.checkpoint.flatten_state` takes it; not copied."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; after `prepare`."""
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
