"""The strategy that measures before it chooses."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.candidates import Candidate, candidates_for
from sparkdl.parallel.cost import Estimate, rank_strategies, table
from sparkdl.parallel.probe import measure
from sparkdl.parallel.replicas import Replicas
from sparkdl.parallel.strategy import Setting, StepResult, Strategy

__all__ = ["Auto"]

logger = logging.getLogger(__name__)


@dataclass
class Auto:
    """Measures module and ranks where they are to train, and goes on as the strategy that promises the shortest steps.

    The rows are dealt before ranks meet, one replica to a rank. So it picks one of the strategies that take them like
    that; those that share replicas among ranks, and parameter servers, are in the table with what they would cost.
    Rank 0 logs the table. A run that is started again goes on as what it was.

    Attributes:
        exact: Choose among strategies that give the result of one process on whole batches. False: among all, those
            that compress gradients or meet less often included, by the seconds of a step.
        budget_seconds: How long to measure at most; usually it takes a tenth of it.
    """

    _NAME: ClassVar[str] = "auto"

    exact: bool = True
    budget_seconds: float = 60.0

    def __post_init__(self) -> None:
        self._chosen: Strategy | None = None
        self._candidate: Candidate | None = None

    @property
    def name(self) -> str:
        """Once it has chosen, the name of what it chose."""
        return self._NAME if self._chosen is None else self._chosen.name

    def __str__(self) -> str:
        return self._NAME if self._candidate is None else str(self._candidate)

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        return Replicas.of_size(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        if not self.budget_seconds > 0:
            raise ConfigError(
                f"strategy='auto': budget_seconds={self.budget_seconds:g} leaves no time to measure. Use a number "
                "above 0."
            )

    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Measure, choose, and prepare what was chosen."""
        ranks = dist.get_world_size()
        measured = measure(
            module,
            objective,
            build,
            setting.example,
            hosts=setting.hosts,
            rows=max(1, config.batch_size // ranks),
            budget_seconds=self.budget_seconds,
        )
        estimates = rank_strategies(
            measured.module,
            measured.cluster,
            config.batch_size,
            micro_batch_size=config.micro_batch_size,
            exact=self.exact,
        )
        if setting.resumes is None:
            self._candidate, reason = _choose(estimates, module, config, ranks, exact=self.exact)
        else:
            known = {str(one): one for one in candidates_for(measured.module, measured.cluster)}
            self._candidate, reason = known.get(setting.resumes, Candidate()), "the run that goes on was trained so"
        if dist.get_rank() == 0:
            logger.info("strategy='auto' chose %s: %s\n%s", self._candidate, reason, table(estimates))
        self._chosen = self._candidate.build()
        self._chosen.prepare(module, objective, build, config, setting)

    @property
    def _strategy(self) -> Strategy:
        assert self._chosen is not None
        return self._chosen

    # ---- what was chosen does the rest -------------------------------------------------------------------------------
    def meets(self, step: int) -> bool:
        """See `Strategy.meets`."""
        return self._strategy.meets(step)

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        return self._strategy.train_step(batch, denominator)

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._strategy.module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._strategy.optimization

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        return self._strategy.gather()

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        return self._strategy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`."""
        self._strategy.load_state_dict(state)

    def close(self) -> None:
        """See `Strategy.close`."""
        self._strategy.close()

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._strategy.busy_seconds

    @property
    def micro_batch_size(self) -> int | None:
        """See `Strategy.micro_batch_size`."""
        return self._strategy.micro_batch_size


def _choose(
    estimates: list[Estimate], module: nn.Module, config: TrainConfig, ranks: int, *, exact: bool
) -> tuple[Candidate, str]:
    """The first that can be taken, and why; the same on all ranks, which have the same estimates."""
    for one in estimates:
        if not one.feasible or (exact and not one.candidate.exact):
            continue
        strategy = one.candidate.build()
        try:
            if not strategy.replicas(ranks).are_ranks(ranks):
                continue
            strategy.check(module, config)
        except ConfigError:
            continue
        return one.candidate, (
            f"{one.seconds_per_step * 1e3:,.1f} ms per step are expected, {one.compute_seconds * 1e3:,.1f} ms of it to "
            "compute"
        )
    return Candidate(), "nothing else can be taken here, and what is in its way is in the table"
