"""The questions that the training loop asks of a way to train in parallel."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization

__all__ = ["StepResult", "Strategy"]


class StepResult(NamedTuple):
    """What one step says of this rank's rows."""

    loss: Tensor
    """Sum of their losses, detached, shape ()."""

    logged: dict[str, Tensor]
    """By name, the sums of what else a training step returned."""

    taken: bool
    """False where the step was left out, on all ranks."""


class Strategy(Protocol):
    """Holds the module and its `Optimization`, and takes steps with the other ranks."""

    def prepare(
        self,
        module: nn.Module,
        objective: Objective,
        build: BuildOptimization,
        config: TrainConfig,
        *,
        find_unused_parameters: bool,
        example: Batch,
    ) -> None:
        """Take over a module that is on its device; the process group is up.

        Args:
            module: The module; rank 0's weights are everyone's.
            objective: The loss as sum and denominator.
            build: Makes the optimization, once the parameters are what they stay.
            config: How to train.
            find_unused_parameters: True where some parameters have no part in the output.
            example: Some of this rank's rows; none where it has none.
        """
        ...

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """One optimizer step on this rank's rows of the global batch.

        Args:
            batch: This rank's rows; may be none.
            denominator: What the sum of all ranks' losses is divided by; 0 divides by nothing.
        """
        ...

    @property
    def optimization(self) -> Optimization:
        """What turns gradients into weights."""
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

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of one forward of this rank at most; fewer than asked for where its memory did not hold more."""
        ...
