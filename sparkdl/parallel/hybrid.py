"""Several ways at once: pipelines or cut layers inside groups of ranks, data parallelism between the groups."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.dense import DenseParallel
from sparkdl.parallel.pipeline import Pipeline
from sparkdl.parallel.replicas import Replicas, check_degrees
from sparkdl.parallel.strategy import Setting, StepResult, Strategy
from sparkdl.parallel.tensor import TensorParallel

__all__ = ["Hybrid"]


@dataclass
class Hybrid:
    """Groups of consecutive ranks hold one module between them, and are data parallel to each other.

    With ``dense`` it is the other mixture: layers with many parameters are cut across all ranks and compute the rows of
    all of them, and the other layers are data parallel (Krizhevsky, arXiv 1404.5997). Each rank then reads own rows.

    Attributes:
        inner: What is done inside a group: a `Pipeline` or a `TensorParallel`. None: a pipeline of two stages. Where
            it does not say how many ranks it takes, ``data_parallel`` does.
        data_parallel: Groups. None: as many as the ranks allow.
        dense: Instead of both, a plan as of `TensorParallel` for the layers that are cut across all ranks, such as
            ``{"classifier.1": "colwise", "classifier.4": "rowwise"}``.
    """

    name: ClassVar[str] = "hybrid"

    inner: Pipeline | TensorParallel | None = None
    data_parallel: int | None = None
    dense: Mapping[str, str] | None = None

    def _arranged(self, world_size: int) -> Strategy:
        """What does the work on as many ranks.

        Raises:
            ConfigError: The degrees do not make as many, or the options do not go together.
        """
        if self.dense is not None:
            if self.inner is not None or self.data_parallel is not None:
                raise ConfigError(
                    "strategy='hybrid': dense cuts layers across all ranks, so that inner and data_parallel have no "
                    "effect. Use either dense, or the other two."
                )
            return DenseParallel(plan=self.dense)
        inner: Any = Pipeline(stages=2) if self.inner is None else self.inner
        if isinstance(inner, Pipeline):
            what, size = "pipeline ranks", inner.ranks
        elif isinstance(inner, TensorParallel):
            what, size = "tensor ranks", inner.size
        else:
            raise ConfigError(
                f"strategy='hybrid': inner={inner!r} does not share out a module inside a group. Use a Pipeline or a "
                "TensorParallel."
            )
        if size is None:
            size = max(1, world_size // max(1, self.data_parallel or 1))
        groups = max(1, world_size // max(1, size)) if self.data_parallel is None else self.data_parallel
        check_degrees(self.name, world_size, {"data_parallel": groups, what: size})
        sized = {"stages": size * inner.stages_per_rank} if isinstance(inner, Pipeline) else {"size": size}
        arranged: Strategy = replace(inner, **sized)
        return arranged

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        return self._arranged(world_size).replicas(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        self._arranged(config.num_train_workers).check(module, config)

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """See `Pipeline.prepare` and `TensorParallel.prepare`."""
        self._working = self._arranged(dist.get_world_size())
        self._working.prepare(module, objective, build, config, setting)

    def meets(self, step: int) -> bool:
        """In every step."""
        return self._working.meets(step)

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        return self._working.train_step(batch, denominator)

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._working.module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._working.optimization

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        return self._working.gather()

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        return self._working.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`."""
        self._working.load_state_dict(state)

    def close(self) -> None:
        """See `Strategy.close`."""
        self._working.close()

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._working.busy_seconds

    @property
    def micro_batch_size(self) -> int | None:
        """See `Strategy.micro_batch_size`."""
        return self._working.micro_batch_size
