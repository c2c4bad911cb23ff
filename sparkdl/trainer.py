"""The training loop of one rank. Knows nothing of Spark: it runs wherever a process group is up."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.io.exchange import all_gather_rows
from sparkdl.io.plan import ShardPlan, plan_deal
from sparkdl.objective import Objective
from sparkdl.parallel import Strategy

__all__ = ["EpochData", "Trainer"]

logger = logging.getLogger(__name__)

History = list[dict[str, Any]]
Report = Callable[[dict[str, Any]], None]
_REPORT_SECONDS = 0.25
_WORTH_MOVING = 0.9  # shards move only where the slowest rank is expected to need at most this part of its time


class EpochData(Protocol):
    """What the loop asks of the data; `sparkdl.io.batches.RankData` is one."""

    @property
    def plan(self) -> ShardPlan:
        """The steps of an epoch."""
        ...

    @property
    def dealt(self) -> Sequence[int]:
        """The shards that this rank reads."""
        ...

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step of the batch that comes next."""
        ...

    def deal(self, shards: Sequence[int]) -> None:
        """Read these shards from the next epoch on."""
        ...

    def open_epoch(self, epoch: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """This rank's slice of the steps of an epoch that are left."""
        ...

    def open_validation(self, rows: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """This rank's validation rows, in batches."""
        ...


class Trainer:
    """Trains a prepared `Strategy` on the batches of this rank.

    Args:
        strategy: Holds module and optimizer.
        objective: The loss as sum and denominator.
        config: How to train.
        device: Where the module is.
        has_validation: True where any rank has validation rows.
        report: Called with progress a few times per second.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        config: TrainConfig,
        *,
        device: torch.device,
        has_validation: bool = False,
        report: Report = lambda event: None,
    ) -> None:
        self._strategy = strategy
        self._objective = objective
        self._config = config
        self._device = device
        self._has_validation = has_validation
        self._report = report

    def fit(self, data: EpochData) -> History:
        """Train for all epochs.

        Returns:
            One record per epoch, equal on all ranks: epoch (from 1), step (optimizer steps so far), rows (read by all
            ranks), loss (mean over the rows of the epoch, as they were met), seconds, rows_per_second, data_wait (share
            of the time that the loop waited for data, mean over ranks), shard_rows_min, shard_rows_max and skew (the
            largest shard by the mean) and, with validation rows, validation_loss.
        """
        history: History = []
        shard_rows = data.plan.shard_rows
        first, step = data.position
        for epoch in range(first, self._config.max_epochs):
            started = time.perf_counter()
            sums = self._train_epoch(data, epoch, step)
            step = 0
            seconds = time.perf_counter() - started
            loss, denominator, waited, rows = self._over_ranks(sums.loss, sums.denominator, sums.waited, sums.rows)
            record = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * data.plan.num_steps,
                "rows": int(rows),
                "loss": loss / (denominator or 1.0),
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "data_wait": waited / dist.get_world_size() / seconds,
                "shard_rows_min": min(shard_rows),
                "shard_rows_max": max(shard_rows),
                "skew": max(shard_rows) * len(shard_rows) / (sum(shard_rows) or 1),
            }
            if self._has_validation:
                record["validation_loss"] = self._validate(data)
            history.append(record)
            self._report({**record, "event": "epoch"})
            if self._config.balance_shards:
                self._balance(data, sums)
        return history

    def _train_epoch(self, data: EpochData, epoch: int, first: int) -> "_Sums":
        """The steps of an epoch from ``first`` on."""
        plan, config, strategy = data.plan, self._config, self._strategy
        rank = dist.get_rank()
        strategy.module.train()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        denominator_sum = waited = 0.0
        rows = 0
        busy = strategy.busy_seconds
        shown = time.perf_counter()
        with data.open_epoch(epoch) as batches:
            for step in range(first, plan.num_steps):
                asked = time.perf_counter()
                batch = next(batches).to(self._device)
                waited += time.perf_counter() - asked

                torch.manual_seed(_step_seed(config.seed, epoch, step, rank))
                own, everyone = self._denominators(batch, plan.batch_rows(step))
                total += strategy.train_step(batch, everyone, config.micro_batch_size)
                denominator_sum += own
                rows += batch.rows

                now = time.perf_counter()
                if now - shown > _REPORT_SECONDS:
                    shown = now
                    loss = float(total) / (denominator_sum or 1.0)
                    self._report({"event": "step", "epoch": epoch + 1, "step": step + 1, "loss": loss})
        busy = strategy.busy_seconds - busy
        return _Sums(float(total), denominator_sum, rows, waited, busy)

    def _balance(self, data: EpochData, sums: "_Sums") -> None:
        """Deal the shards anew where ranks differ in speed; every rank comes to the same result."""
        own = torch.tensor([[sums.busy + sums.waited, sums.rows]], dtype=torch.float64)
        seconds, rows = all_gather_rows({"ranks": own})["ranks"].T.tolist()
        mean = sum(seconds) / (sum(rows) or 1)
        pace = [spent / read if read else mean for spent, read in zip(seconds, rows, strict=True)]
        dealt = plan_deal(pace, data.plan.shard_rows)
        expected = max(
            speed * sum(data.plan.shard_rows[shard] for shard in own) for speed, own in zip(pace, dealt, strict=True)
        )
        if expected < _WORTH_MOVING * max(seconds):
            data.deal(dealt[dist.get_rank()])
            if dist.get_rank() == 0:
                logger.info("shards dealt anew: %s per rank", " ".join(str(len(own)) for own in dealt))

    def _denominators(self, batch: Batch, batch_rows: int) -> tuple[float, float]:
        """What this rank's rows add to the divisor of the loss, and the divisor over all ranks."""
        if batch.weight is None and self._objective.counts_rows:
            return float(batch.rows), float(batch_rows)
        own = self._objective.denominator(batch.labels, batch.weight)
        return own, self._over_ranks(own)[0]

    def _validate(self, data: EpochData) -> float:
        """Mean loss over the validation rows of all ranks."""
        module: nn.Module = self._strategy.module.eval()
        loss = denominator = 0.0
        rows = self._config.micro_batch_size or self._config.batch_size
        with torch.inference_mode(), data.open_validation(rows) as batches:
            for batch in batches:
                moved = batch.to(self._device)
                loss += float(self._objective(module(*moved.inputs), moved.labels, moved.weight))
                denominator += self._objective.denominator(batch.labels, batch.weight)
        loss, denominator = self._over_ranks(loss, denominator)
        return loss / (denominator or 1.0)

    def _over_ranks(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return tuple(summed.tolist())


@dataclass(frozen=True, slots=True)
class _Sums:
    """What one rank counted in an epoch.

    Attributes:
        loss: Sum of its losses.
        denominator: What they are divided by.
        rows: Rows that it trained on.
        waited: Seconds that its loop waited for data.
        busy: Seconds that it computed, without waiting for other ranks.
    """

    loss: float
    denominator: float
    rows: int
    waited: float
    busy: float


def _step_seed(seed: int, *counters: int) -> int:
    """Seed of the random layers in one step, from counters alone, so that a resumed run draws the same numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0])
