"""The training loop of one rank. Knows nothing of Spark: it runs wherever a process group is up."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sparkdl.barrier.watchdog import ProgressClock
from sparkdl.batch import Batch
from sparkdl.checkpoint import Saver
from sparkdl.config import TrainConfig, config_values
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

    def state_dict(self) -> dict[str, Any]:
        """Where in the data this rank is; equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
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
        clock: Told where the loop is.
        saver: Writes checkpoints; None writes none.
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
        clock: ProgressClock | None = None,
        saver: Saver | None = None,
    ) -> None:
        self._strategy = strategy
        self._objective = objective
        self._config = config
        self._device = device
        self._has_validation = has_validation
        self._report = report
        self._clock = clock or ProgressClock()
        self._saver = saver
        self._done = 0  # optimizer steps
        self._history: History = []
        self._sums = _Sums(torch.zeros((), dtype=torch.float64, device=device))

    def fit(self, data: EpochData) -> History:
        """Train for all epochs, or those that are left after `load_state_dict`.

        A rank that was told to stop ends it with `sparkdl.checkpoint.Preempted`, once the state is saved.

        Returns:
            One record per epoch, equal on all ranks: epoch (from 1), step (optimizer steps so far), rows (read by all
            ranks), loss (mean over the rows of the epoch, as they were met), seconds, rows_per_second, data_wait (share
            of the time that the loop waited for data, mean over ranks), shard_rows_min, shard_rows_max and skew (the
            largest shard by the mean); with checkpoints, checkpoint (seconds that saving held up the loop); and with
            validation rows, validation_loss.

        Raises:
            FloatingPointError: The loss is no longer a number.
        """
        plan = data.plan
        first, step = data.position
        self._done = first * plan.num_steps + step
        for epoch in range(first, self._config.max_epochs):
            due = self._train_epoch(data, epoch, step)
            whole, step, sums = step == 0, 0, self._sums
            self._sums = _Sums(torch.zeros_like(sums.loss))
            record = self._record(plan, epoch, sums)
            if self._has_validation:
                record["validation_loss"] = self._validate(data)
            self._history.append(record)
            self._report({**record, "event": "epoch"})
            if due or (self._saver is not None and epoch + 1 == self._config.max_epochs):
                self._save(data)
            if self._config.balance_shards and whole:
                self._balance(data, sums)
        return self._history

    def _train_epoch(self, data: EpochData, epoch: int, first: int) -> bool:
        """The steps of an epoch from ``first`` on; counts in ``self._sums``.

        Returns:
            True where a checkpoint is due at the end of the epoch.
        """
        plan, config, strategy, clock, saver, sums = (
            data.plan, self._config, self._strategy, self._clock, self._saver, self._sums,
        )  # fmt: skip
        rank = dist.get_rank()
        # Not torch.manual_seed: it formats the call stack for every kind of device that this process does not use, in
        # 0.25 ms per step.
        generators = [torch.default_generator]
        if self._device.type == "cuda":
            generators.append(torch.cuda.default_generators[sums.loss.device.index])
        strategy.module.train()
        began, busy = time.perf_counter(), strategy.busy_seconds
        shown, due = began, False
        with data.open_epoch(epoch) as batches:
            for step in range(first, plan.num_steps):
                clock.at("data", self._done)
                asked = time.perf_counter()
                batch = next(batches).to(self._device)
                sums.waited += time.perf_counter() - asked

                clock.at("compute", self._done)
                seed = _step_seed(config.seed, epoch, step, rank)
                for generator in generators:
                    generator.manual_seed(seed)
                own, everyone = self._denominators(batch, plan.batch_rows(step))
                if saver is not None:
                    saver.ask(self._done + 1)
                sums.loss += strategy.train_step(batch, everyone, config.micro_batch_size)
                self._done += 1
                sums.denominator += own
                sums.rows += batch.rows

                now = time.perf_counter()
                if now - shown > _REPORT_SECONDS:
                    shown = now
                    loss = self._checked_loss(float(sums.loss), sums.denominator)
                    self._report({"event": "step", "epoch": epoch + 1, "step": step + 1, "loss": loss})
                if saver is not None:
                    due = saver.agreed()
                    if due and step + 1 < plan.num_steps:  # the last one waits for the epoch's record
                        sums.seconds += now - began
                        began = now
                        self._save(data)
        sums.seconds += time.perf_counter() - began
        sums.busy = strategy.busy_seconds - busy
        return due

    def _record(self, plan: ShardPlan, epoch: int, sums: "_Sums") -> dict[str, Any]:
        """What history says of an epoch; the same on all ranks, except for the seconds."""
        shard_rows, seconds = plan.shard_rows, sums.seconds
        loss, denominator, waited, rows = self._over_ranks(float(sums.loss), sums.denominator, sums.waited, sums.rows)
        record = {
            "epoch": epoch + 1,
            "step": self._done,
            "rows": int(rows),
            "loss": self._checked_loss(loss, denominator),
            "seconds": seconds,
            "rows_per_second": rows / seconds,
            "data_wait": waited / dist.get_world_size() / seconds,
            "shard_rows_min": min(shard_rows),
            "shard_rows_max": max(shard_rows),
            "skew": max(shard_rows) * len(shard_rows) / (sum(shard_rows) or 1),
        }
        if self._saver is not None:
            record["checkpoint"] = self._saver.take_stalled_seconds()
        return record

    def _checked_loss(self, loss: float, denominator: float) -> float:
        """The mean loss.

        Raises:
            FloatingPointError: It is no number.
        """
        mean = loss / (denominator or 1.0)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"The loss is {mean} after step {self._done}: the weights are of no use any more. Use a smaller "
                "learning rate, clip gradients, or look for inputs and labels of extreme size."
            )
        return mean

    # ---- state -------------------------------------------------------------------------------------------------------
    def _save(self, data: EpochData) -> None:
        """Save what the run needs to go on; every rank calls it after the same step."""
        assert self._saver is not None
        sums = self._sums
        loss, denominator, waited, rows, seconds = self._over_ranks(
            float(sums.loss), sums.denominator, sums.waited, sums.rows, sums.seconds
        )
        self._checked_loss(loss, denominator)  # what is of no use is not saved
        self._clock.at("checkpoint", self._done)
        state = {
            "strategy": self._strategy.state_dict(),
            "reader": data.state_dict(),
            "history": self._history,
            "sums": {
                "loss": loss,
                "denominator": denominator,
                "waited": waited,
                "rows": int(rows),
                "seconds": seconds / dist.get_world_size(),
            },
        }
        facts = {"world_size": dist.get_world_size(), "config": config_values(self._config)}
        self._saver.save(self._done, state, facts)

    def load_state_dict(self, data: EpochData, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written, on as many ranks as there are now.

        Raises:
            ConfigError: The checkpoint belongs to other data.
        """
        data.load_state_dict(state["reader"])
        self._strategy.load_state_dict(state["strategy"])
        self._history = list(state["history"])
        sums = state["sums"]
        self._sums.seconds = sums["seconds"]
        if dist.get_rank() == 0:  # they are sums over all ranks
            self._sums.loss.fill_(sums["loss"])
            self._sums.denominator, self._sums.waited, self._sums.rows = (
                sums["denominator"], sums["waited"], sums["rows"],
            )  # fmt: skip

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
        everyone = self._over_ranks(own)[0]
        self._clock.at("compute", self._done)
        return own, everyone

    def _validate(self, data: EpochData) -> float:
        """Mean loss over the validation rows of all ranks."""
        module: nn.Module = self._strategy.module.eval()
        loss = denominator = 0.0
        rows = self._config.micro_batch_size or self._config.batch_size
        with torch.inference_mode(), data.open_validation(rows) as batches:
            for batch in batches:
                self._clock.at("validation", self._done)
                moved = batch.to(self._device)
                loss += float(self._objective(module(*moved.inputs), moved.labels, moved.weight))
                denominator += self._objective.denominator(batch.labels, batch.weight)
        loss, denominator = self._over_ranks(loss, denominator)
        return loss / (denominator or 1.0)

    def _over_ranks(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._clock.at("reduce", self._done)
        dist.all_reduce(summed)
        return tuple(summed.tolist())


@dataclass(slots=True)
class _Sums:
    """What one rank has counted in an epoch so far.

    Attributes:
        loss: Sum of its losses, shape (), float64.
        denominator: What they are divided by.
        rows: Rows that it trained on.
        waited: Seconds that its loop waited for data.
        busy: Seconds that it computed, without waiting for other ranks.
        seconds: Seconds of the epoch.
    """

    loss: torch.Tensor
    denominator: float = 0.0
    rows: int = 0
    waited: float = 0.0
    busy: float = 0.0
    seconds: float = 0.0


def _step_seed(seed: int, *counters: int) -> int:
    """Seed of the random layers in one step, from counters alone, so that a resumed run draws the same numbers."""
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0])
