"""The training loop of one rank. Knows nothing of Spark: it runs wherever a process group is up."""

import contextlib
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from sparkdl.barrier.watchdog import ProgressClock
from sparkdl.batch import Batch
from sparkdl.best import Best, monitor_mode
from sparkdl.callbacks import Callbacks, RunView
from sparkdl.checkpoint import Saver
from sparkdl.config import TrainConfig, config_values
from sparkdl.epoch_sums import EpochSums, Meter
from sparkdl.errors import ConfigError
from sparkdl.evaluation import evaluate, refresh_batch_norm
from sparkdl.history import History
from sparkdl.io.exchange import all_gather_rows
from sparkdl.io.plan import ShardPlan, plan_deal
from sparkdl.learning_rate import LearningRateSearch, search_learning_rate
from sparkdl.objective import Objective
from sparkdl.parallel import Place, Strategy
from sparkdl.serialization import load_state, state_of

if TYPE_CHECKING:
    from sparkdl.metrics import Metrics

__all__ = ["EpochData", "Trainer"]

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
_REPORT_SECONDS = 0.25
NO_CALLBACKS = Callbacks()
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
        strategy: Holds module and optimization.
        objective: The loss as sum and denominator.
        config: How to train.
        device: Where the module is.
        has_validation: True where any rank has validation rows.
        metrics: Measured on the validation rows besides the loss.
        logged: Names of what a training step returns besides the loss.
        validated: Names of what it returns of validation rows; None for the same.
        callbacks: The user's code.
        report: Called with progress a few times per second, on the rank that leads the first replica.
        clock: Told where the loop is.
        saver: Writes checkpoints; None writes none.

    Attributes:
        seconds: What this rank's time went into, by name, since it started or was started again.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        config: TrainConfig,
        *,
        device: torch.device,
        has_validation: bool = False,
        metrics: "Metrics | None" = None,
        logged: Sequence[str] = (),
        validated: Sequence[str] | None = None,
        callbacks: Callbacks = NO_CALLBACKS,
        report: Report | None = None,
        clock: ProgressClock | None = None,
        saver: Saver | None = None,
    ) -> None:
        self._strategy = strategy
        self._place: Place = strategy.replicas(dist.get_world_size()).place_of(dist.get_rank())
        self._objective = objective
        self._config = config
        self._device = device
        self._has_validation = has_validation
        self._metrics = metrics
        self._logged = tuple(logged)
        self._validated = self._logged if validated is None else tuple(validated)
        self._callbacks = callbacks
        self._report = report if report and self._place.leads and not self._place.dp_rank else _say_nothing
        self._clock = clock or ProgressClock()
        self._saver = saver
        self._monitor = config.monitor or ("validation_loss" if has_validation else "loss")
        self._best = Best(monitor_mode(self._monitor, config.monitor_mode), config.early_stopping_min_delta)
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._gathered: tuple[int, nn.Module] | None = None
        self._done = 0  # optimizer steps
        self._history = History()
        self._sums = EpochSums.zero(device, self._logged)
        self.seconds = dict.fromkeys(("data", "compute", "synchronisation", "validation", "checkpoint"), 0.0)

    def fit(self, data: EpochData) -> History:
        """Train for all epochs, or those that are left after `load_state_dict`; early stopping may leave some out.

        A rank that was told to stop ends it with `sparkdl.checkpoint.Preempted`, once the state is saved.

        Returns:
            One record per epoch, equal on all ranks but for the seconds: epoch (from 1), step (optimizer steps so far),
            rows (read by all ranks), loss (mean over the rows of the epoch, as they were met), learning_rate (of its
            last step), seconds, rows_per_second, data_wait, compute and synchronisation (shares of the time,
            means over ranks), shard_rows_min, shard_rows_max and skew (the largest shard by the mean); what a training
            step returned besides the loss; where they may be, skipped_steps (whose gradients were not finite); with
            checkpoints, checkpoint (seconds that saving held up the loop); and with validation rows, validation_loss,
            validation_seconds and validation_<metric>.

        Raises:
            FloatingPointError: The loss is no longer a number, and such steps are not to be skipped.
            CallbackError: A callback raised.
            ConfigError: There is no entry of the history that is called like 'monitor'.
        """
        plan = data.plan
        first, step = data.position
        self._done = first * plan.num_steps + step
        try:
            self._call("on_fit_start", plan)
            for epoch in range(first, self._config.max_epochs):
                if self._best.is_over(epoch, self._config.early_stopping_patience):
                    break
                due = self._train_epoch(data, epoch, step)
                whole, step, sums = step == 0, 0, self._sums
                self._sums = EpochSums.zero(self._device, self._logged)
                record = self._record(plan, epoch, sums)
                if self._has_validation:
                    record |= self._validate(data)
                    self._call("on_validation_end", plan, {name: record[name] for name in record if _validates(name)})
                over = self._judge(record)
                self._history.append(record)
                self._report({**record, "event": "epoch"})
                self._call("on_epoch_end", plan)
                if due or (self._saver is not None and over):
                    self._save(data)
                if over:
                    break
                if self._config.balance_shards and whole:
                    self._balance(data, sums)
            self._finish(data)
            self._call("on_fit_end", plan)
        except Exception as error:
            self._tell_callbacks(error, plan)
            raise
        return self._history

    def _train_epoch(self, data: EpochData, epoch: int, first: int) -> bool:
        """The steps of an epoch from ``first`` on; counts in ``self._sums``.

        Returns:
            True where a checkpoint is due at the end of the epoch.
        """
        plan, config, strategy, clock, saver, sums = (
            data.plan, self._config, self._strategy, self._clock, self._saver, self._sums,
        )  # fmt: skip
        place, skips = self._place, config.non_finite == "skip"
        generators = _generators(self._device)
        strategy.module.train()
        self._gathered = None
        began, busy = time.perf_counter(), strategy.busy_seconds - sums.busy
        meter, due = Meter(sums), False
        losses: list[tuple[int, torch.Tensor]] = []
        with data.open_epoch(epoch) as batches:
            for step in range(first, plan.num_steps):
                clock.at("data", self._done)
                asked = time.perf_counter()
                batch = next(batches).to(self._device)
                sums.waited += time.perf_counter() - asked

                clock.at("compute", self._done)
                seed = _step_seed(config.seed, epoch, step, -1 if place.dp_rank is None else place.dp_rank)
                for generator in generators:
                    generator.manual_seed(seed)
                meets = strategy.meets(self._done + 1)
                own, everyone = self._denominators(batch, plan.batch_rows(step), met=meets)
                agrees = meets or step + 1 == plan.num_steps or (saver is not None and saver.is_due(self._done + 1))
                if saver is not None and agrees:
                    saver.ask(self._done + 1)
                stepped = time.perf_counter()
                result = strategy.train_step(batch, everyone)
                now = time.perf_counter()
                sums.stepped += now - stepped
                sums.busy = strategy.busy_seconds - busy
                if place.leads:
                    sums.add(result, own, batch.rows)
                self._done += 1

                if not skips:
                    # That of the step before, which a GPU has done by now; the rank whose rows they are is the first.
                    self._check_finite(losses, data, epoch)
                    losses += [(step, result.loss)] if place.leads else []
                if now - meter.at > _REPORT_SECONDS:
                    self._report(self._progress(epoch, step, meter.read(now, sums)))
                if self._callbacks:
                    self._call("on_step_end", plan, sums=sums)
                if saver is not None and agrees:
                    due = saver.agreed()
                    if due and step + 1 < plan.num_steps:  # the last one waits for the epoch's record
                        sums.seconds += now - began
                        began = now
                        self._check_finite(losses, data, epoch)
                        self._save(data)
        self._check_finite(losses, data, epoch)
        sums.seconds += time.perf_counter() - began
        return due

    # ---- after an epoch ----------------------------------------------------------------------------------------------
    def _record(self, plan: ShardPlan, epoch: int, sums: EpochSums) -> dict[str, Any]:
        """What history says of an epoch; the same on all ranks, except for the seconds."""
        shard_rows, asked = plan.shard_rows, time.perf_counter()
        total = self._sums_over_ranks(sums)
        seconds = sums.seconds + time.perf_counter() - asked  # ranks that did not meet before are waited for here
        optimization = self._strategy.optimization
        optimization.average_epoch(epoch)
        record = {
            "epoch": epoch + 1,
            "step": self._done,
            "rows": int(total["rows"]),
            "loss": _mean(total["loss"], total["denominator"], total["counted"]),
            **{name: total[f"logged.{name}"] / (total["counted"] or math.nan) for name in self._logged},
            "learning_rate": optimization.learning_rate,
            "seconds": seconds,
            "rows_per_second": total["rows"] / seconds,
            "data_wait": total["waited"] / total["seconds"],
            "compute": total["busy"] / total["seconds"],
            "synchronisation": (total["stepped"] - total["busy"]) / total["seconds"],
            "shard_rows_min": min(shard_rows),
            "shard_rows_max": max(shard_rows),
            "skew": max(shard_rows) * len(shard_rows) / (sum(shard_rows) or 1),
        }
        self.seconds["data"] += sums.waited
        self.seconds["compute"] += sums.busy
        self.seconds["synchronisation"] += sums.stepped - sums.busy
        if optimization.counts_skipped:
            record["skipped_steps"] = optimization.skipped - sum(one["skipped_steps"] for one in self._history)
        if self._saver is not None:
            record["checkpoint"] = self._saver.take_stalled_seconds()
            self.seconds["checkpoint"] += record["checkpoint"]
        return record

    def _validate(self, data: EpochData) -> dict[str, float]:
        """Loss and metrics of the validation rows of all ranks, as entries of the history."""
        began = time.perf_counter()
        strategy = self._strategy
        with data.open_validation(strategy.micro_batch_size or self._config.batch_size) as batches:
            found = evaluate(
                self.gather(),
                self._objective,
                batches,
                metrics=self._metrics,
                logged=self._validated,
                over_ranks=self._over_ranks,
                device=self._device,
                autocast=strategy.optimization.autocast,
                on_batch=lambda: self._clock.at("validation", self._done),
            )
        seconds = time.perf_counter() - began
        self.seconds["validation"] += seconds
        return {**{f"validation_{name}": value for name, value in found.items()}, "validation_seconds": seconds}

    def _judge(self, record: dict[str, Any]) -> bool:
        """Bring schedules forward by the epoch's record, and keep the weights of the best one.

        Returns:
            True where this was the last epoch; equal on all ranks.
        """
        config, epoch = self._config, record["epoch"]
        watched = config.early_stopping_patience is not None or config.restore_best
        if watched and self._monitor not in record:
            names = ", ".join(name for name, value in record.items() if isinstance(value, float))
            raise ConfigError(f"monitor={self._monitor!r} is no entry of the history. Use one of {names}.")
        if self._monitor in record:
            # Times are each rank's own; what is decided by them has to be one rank's.
            told = torch.tensor(float(record[self._monitor]), dtype=torch.float64, device=self._device)
            dist.broadcast(told, 0)
            best = self._best.after(float(told), epoch)
            if best is not self._best and config.restore_best:
                state = state_of(self.gather())
                self._best_weights = {name: value.detach().cpu().clone() for name, value in state.items()}
            self._best = best
            record = {**record, self._monitor: float(told)}
        self._strategy.optimization.end_epoch(record, self._monitor)
        return epoch == config.max_epochs or self._best.is_over(epoch, config.early_stopping_patience)

    def _finish(self, data: EpochData) -> None:
        """Give the module that `gather` returns the weights that the fit is for."""
        if self._best_weights is not None:
            load_state(self.gather(), self._best_weights)
        elif self._config.averaging == "swa" and self._strategy.optimization.averaged is not None:
            with data.open_epoch(self._config.max_epochs) as batches:
                refresh_batch_norm(
                    self.gather(),
                    self._objective,
                    batches,
                    device=self._device,
                    on_batch=lambda: self._clock.at("validation", self._done),
                )

    # ---- what is told ------------------------------------------------------------------------------------------------
    def _progress(self, epoch: int, step: int, rates: Mapping[str, float]) -> dict[str, Any]:
        return {
            "event": "step",
            "epoch": epoch + 1,
            "step": step + 1,
            "global_step": self._done,
            "loss": self._sums.mean_loss,
            "learning_rate": self._strategy.optimization.learning_rate,
            **rates,
            "rows_per_second": rates["rows_per_second"] * self._place.dp_size,
        }

    def _view(self, plan: ShardPlan, sums: EpochSums | None) -> RunView:
        loss = sums.mean_loss if sums is not None else self._history[-1]["loss"] if self._history else math.nan
        return RunView(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            epoch=min(max(0, self._done - 1) // plan.num_steps + 1, self._config.max_epochs),
            num_epochs=self._config.max_epochs,
            step=self._done,
            steps_per_epoch=plan.num_steps,
            learning_rate=self._strategy.optimization.learning_rate,
            loss=loss,
            history=tuple(self._history),
            module=self._strategy.module,
        )

    def _call(self, name: str, plan: ShardPlan, *arguments: Any, sums: EpochSums | None = None) -> None:
        if self._callbacks:
            self._callbacks.call(name, self._view(plan, sums), *arguments)

    def _tell_callbacks(self, error: Exception, plan: ShardPlan) -> None:
        try:
            self._call("on_exception", plan, error)
        except Exception as another:
            logger.warning("%s", another)

    def _check_finite(self, losses: list[tuple[int, torch.Tensor]], data: EpochData, epoch: int) -> None:
        """Look at the losses of some steps, and forget them.

        Raises:
            FloatingPointError: One is no number.
        """
        for step, loss in losses:
            if not math.isfinite(value := float(loss)):
                begin, end = data.plan.bounds(step, step + 1)
                rows = [
                    f"rows {begin[shard]} to {end[shard] - 1} of shard {shard}"
                    for shard in data.dealt
                    if end[shard] > begin[shard]
                ]
                raise FloatingPointError(
                    f"The loss is {value} in step {epoch * data.plan.num_steps + step + 1} (epoch {epoch + 1}, step "
                    f"{step + 1}), on rank {dist.get_rank()}, which had {' and '.join(rows)}, in the order of that "
                    "epoch. Use a smaller learning rate, clip gradients (gradientClipNorm), look for inputs and labels "
                    "of extreme size, or leave such steps out (nonFinite='skip')."
                )
        losses.clear()

    def gather(self) -> nn.Module:
        """The whole module with the weights that the fit is for: the best, the averaged or the last ones; a collective.

        Between two steps it is always the same module.
        """
        averaged = self._strategy.optimization.averaged
        if averaged is not None:
            return averaged
        if self._gathered is None or self._gathered[0] != self._done:
            self._gathered = self._done, self._strategy.gather()
        return self._gathered[1]

    @property
    def history(self) -> History:
        """The records of the epochs that are done."""
        return self._history

    @property
    def best_epoch(self) -> int:
        """The epoch with the best value of 'monitor', from 1; 0 where there is none yet."""
        return self._best.epoch

    # ---- another kind of run -----------------------------------------------------------------------------------------
    def search_learning_rate(self, data: EpochData, start: float, end: float, num_steps: int) -> LearningRateSearch:
        """Take steps with rising learning rates instead of training; see `sparkdl.learning_rate`.

        Raises:
            ConfigError: There are no such rates.
        """
        groups = [group for one in self._strategy.optimization.optimizers for group in one.param_groups]
        shares = [group["lr"] / groups[0]["lr"] for group in groups]
        steps = self._endlessly(data)

        def train_step(number: int, rate: float) -> float:
            for group, share in zip(groups, shares, strict=True):
                group["lr"] = rate * share
            batch, batch_rows = next(steps)
            own, everyone = self._denominators(batch, batch_rows)
            result = self._strategy.train_step(batch, everyone)
            self._done += 1
            loss, denominator = self._over_ranks(float(result.loss) if self._place.leads else 0.0, own)
            return loss / (denominator or 1.0)

        with contextlib.closing(steps):
            self._strategy.module.train()
            return search_learning_rate(train_step, start=start, end=end, num_steps=num_steps)

    def _endlessly(self, data: EpochData) -> Generator[tuple[Batch, int], None, None]:
        """The batches of one epoch after another, each with the rows of its step."""
        for epoch in itertools.count():
            with data.open_epoch(epoch) as batches:
                for step, batch in enumerate(batches):
                    self._clock.at("compute", self._done)
                    yield batch.to(self._device), data.plan.batch_rows(step)

    # ---- state -------------------------------------------------------------------------------------------------------
    def _save(self, data: EpochData) -> None:
        """Save what the run needs to go on; every rank calls it after the same step."""
        assert self._saver is not None
        sums = self._sums_over_ranks(self._sums)
        self._clock.at("checkpoint", self._done)
        state = {
            "strategy": {"name": self._strategy.name, **self._strategy.state_dict()},
            "reader": data.state_dict(),
            "history": list(self._history),
            "sums": sums,
            "best": {"value": self._best.value, "epoch": self._best.epoch, "weights": self._best_weights},
        }
        facts = {
            "world_size": dist.get_world_size(),
            "strategy": str(self._strategy),
            "config": config_values(self._config),
        }
        try:
            self._saver.save(self._done, state, facts)
        finally:
            self._call("on_checkpoint", data.plan)

    def load_state_dict(self, data: EpochData, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written, on as many ranks as there are now.

        Raises:
            ConfigError: The checkpoint belongs to other data, or to another strategy.
        """
        written_by = state["strategy"]["name"]
        if written_by != self._strategy.name:
            raise ConfigError(
                f"strategy={self._strategy.name!r} cannot go on from this checkpoint: strategy={written_by!r} wrote "
                "it, and keeps another state. Use the same strategy, or begin anew in another directory."
            )
        data.load_state_dict(state["reader"])
        self._strategy.load_state_dict(state["strategy"])
        self._history = History(state["history"])
        self._sums.load(state["sums"], first=dist.get_rank() == 0, ranks=state["sums"]["ranks"])
        best = state["best"]
        self._best = replace(self._best, value=best["value"], epoch=best["epoch"])
        self._best_weights = None if best["weights"] is None else dict(best["weights"])

    def _balance(self, data: EpochData, sums: EpochSums) -> None:
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

    def _denominators(self, batch: Batch, batch_rows: int, *, met: bool = True) -> tuple[float, float]:
        """What this rank's rows add to the divisor of the loss, and the divisor over all ranks, if they meet."""
        own = self._objective.batch_denominator(batch) if self._place.leads else 0.0
        if batch.weight is None and self._objective.counts_rows:
            return own, float(batch_rows)
        if not met:
            return own, own * batch_rows / batch.rows if batch.rows else float(batch_rows)
        everyone = self._over_ranks(own)[0]
        self._clock.at("compute", self._done)
        return own, everyone

    def _sums_over_ranks(self, sums: EpochSums) -> dict[str, float]:
        values = sums.values()
        total = dict(zip(values, self._over_ranks(*values.values()), strict=True))
        return {**total, "ranks": dist.get_world_size()}

    def _over_ranks(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._clock.at("reduce", self._done)
        dist.all_reduce(summed)
        return tuple(summed.tolist())


def _say_nothing(event: dict[str, Any]) -> None:
    """To nobody."""


def _mean(loss: float, denominator: float, rows: float) -> float:
    """The mean loss; a loss that is a sum has no denominator, and no rows have no loss."""
    return loss / (denominator or 1.0) if rows else math.nan


def _validates(name: str) -> bool:
    return name.startswith("validation_") and name != "validation_seconds"


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators that random layers draw from.

    Not torch.manual_seed: it formats the call stack for every kind of device that this process does not use, in 0.25 ms
    per step.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def _step_seed(seed: int, *counters: int) -> int:
    """Seed of the random layers in one step, from counters alone, so that a resumed run draws the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr((seed, counters)).encode(), digest_size=8).digest())
