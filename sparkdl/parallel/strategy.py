"""The questions that are asked of a way to train in parallel: by the driver, by whoever deals rows, and by the loop.

A strategy is an object whose constructor stores its options. The driver asks which ranks make a replica and whether the
module suits it, then it travels to the ranks, where `Strategy.prepare` sets it to work.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.replicas import Replicas

__all__ = ["Setting", "StepResult", "Strategy"]


class StepResult(NamedTuple):
    """What one step says of this rank's rows; of no account where the rank does not lead its replica."""

    loss: Tensor
    """Sum of their losses, detached, shape ()."""

    logged: dict[str, Tensor]
    """By name, the sums of what else a training step returned."""

    taken: bool
    """False where the step was left out."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a strategy finds where it goes to work, beside the process group.

    Attributes:
        example: Some of this rank's rows, with all columns; none where it has none.
        find_unused_parameters: True where some parameters have no part in the output.
        hosts: Host of every rank.
        on_computed: Called in every step when this rank has computed its part, and begins to wait for the others.
        resumes: `str` of the strategy that wrote the checkpoint that will be loaded; None where none will be.
    """

    example: Batch
    find_unused_parameters: bool
    hosts: Sequence[str] = ()
    on_computed: Callable[[], None] = lambda: None
    resumes: str | None = None


class Strategy(Protocol):
    """Holds the module and its `Optimization`, and takes steps with the other ranks."""

    @property
    def name(self) -> str:
        """What it is called in `strategy=`, and in checkpoints."""
        ...

    # ---- before the ranks are there: on the driver, and again on every rank ------------------------------------------
    def replicas(self, world_size: int) -> Replicas:
        """Which ranks train one replica of the module together, and read the same rows.

        Raises:
            ConfigError: As many ranks cannot be arranged in that way.
        """
        ...

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """Refuse what cannot work, before the first job; changes nothing.

        Raises:
            ConfigError: The module or a setting does not suit the strategy.
        """
        ...

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Take over a module that is on its device; the process group is up.

        Args:
            module: The module; rank 0's weights are everyone's.
            objective: The loss as sum and denominator.
            build: Makes the optimization, once the parameters are what they stay.
            config: How to train.
            setting: What else there is.
        """
        ...

    def meets(self, step: int) -> bool:
        """Whether ranks wait for each other in this step, so that they can agree on more; equal on all ranks.

        Args:
            step: Optimizer steps of the run when it is done, from 1.
        """
        ...

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """One optimizer step on this rank's rows of the global batch.

        Args:
            batch: This rank's rows; may be none.
            denominator: What the sum of all ranks' losses is divided by; 0 divides by nothing. In a step in which the
                ranks do not meet it is exact where the loss counts rows, else made up from this rank's rows.
        """
        ...

    @property
    def module(self) -> nn.Module:
        """What this rank trains: the module, or its part of it."""
        ...

    @property
    def optimization(self) -> Optimization:
        """What turns gradients into weights."""
        ...

    def gather(self) -> nn.Module:
        """The whole module as a plain one with the weights of all ranks; a collective.

        It may be the one that is trained: nobody changes it, apart from `eval` and `train`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as `sparkdl.checkpoint.flatten_state` takes it; a collective.

        That of rank 0 is what is saved. Not copied: it may be the tensors that are trained.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what rank 0's `state_dict` returned, on every rank; after `prepare`.

        Raises:
            ConfigError: It cannot go on from there with as many ranks.
        """
        ...

    def close(self) -> None:
        """Let go of process groups; called before the rank leaves them."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that this rank has computed so far, without those in which it waited for others."""
        ...

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of one forward of this rank at most; fewer than asked for where its memory did not hold more."""
        ...
