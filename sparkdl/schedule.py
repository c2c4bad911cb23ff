"""Learning rates over the steps: schedulers by name or by function, warm-up, and scaling with the batch."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from sparkdl.config import Interval, RateScaling
from sparkdl.errors import ConfigError

__all__ = [
    "Horizon",
    "LearningRates",
    "Schedule",
    "SchedulerRecipe",
    "scaled_rate_factor",
    "scheduler_names",
    "warmup_factor",
]

# They are made of other schedulers, which no name describes.
_COMPOSED = (LRScheduler, lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
_CLASSES: tuple[type[LRScheduler], ...] = tuple(
    found for found in (getattr(lr_scheduler, name) for name in lr_scheduler.__all__) if found not in _COMPOSED
)
# A whole name goes before another one that only lacks "LR".
_NAMED: dict[str, type[LRScheduler]] = {
    **{found.__name__.lower().removesuffix("lr"): found for found in _CLASSES},
    **{found.__name__.lower(): found for found in _CLASSES},
}
# Arguments that say how many times a scheduler steps in all.
_LENGTHS: dict[type[LRScheduler], str] = {
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.PolynomialLR: "total_iters",
    OneCycleLR: "total_steps",
}


def scheduler_names() -> list[str]:
    """Names that `SchedulerRecipe` knows: the classes of `torch.optim.lr_scheduler` that stand on their own."""
    return sorted(found.__name__ for found in _CLASSES)


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def warmup_factor(step: int, warmup_steps: int) -> float:
    """What the learning rate of a step is multiplied by.

    It rises linearly from ``1 / warmup_steps`` in the first step to 1 in the last step of the warm-up (gradual warm-up:
    Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.2), and stays 1.

    Args:
        step: Optimizer steps before this one.
        warmup_steps: Steps of the warm-up; 0 for none.
    """
    return (step + 1) / warmup_steps if step + 1 < warmup_steps else 1.0


def scaled_rate_factor(batch_size: int, base_batch_size: int, scaling: RateScaling) -> float:
    """What a learning rate found with one size of the global batch is multiplied by for another.

    Args:
        batch_size: Rows of a global batch.
        base_batch_size: Rows of a global batch for which the rate was chosen.
        scaling: 'linear' multiplies by the ratio of the two, so that k steps with small batches and one with a batch
            k times as large go equally far (Goyal et al. 2017, https://arxiv.org/abs/1706.02677; for SGD). 'sqrt'
            multiplies by its square root, which keeps the variance of the update (Krizhevsky 2014,
            https://arxiv.org/abs/1404.5997; Hoffer et al. 2017, https://arxiv.org/abs/1705.08741; Malladi et al. 2022,
            https://arxiv.org/abs/2205.10287, derive it for Adam). 'none' gives 1.
    """
    ratio = batch_size / base_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]


@dataclass(frozen=True, slots=True)
class Horizon:
    """How long a fit is.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch.
        epochs: Epochs of the fit.
        warmup_steps: Steps in which schedulers of steps wait.
    """

    steps_per_epoch: int
    epochs: int
    warmup_steps: int = 0

    def length(self, interval: Interval) -> int:
        """Positions of a scheduler over the fit, at least 1: epochs, or the steps after the warm-up."""
        return self.epochs if interval == "epoch" else max(1, self.steps_per_epoch * self.epochs - self.warmup_steps)


# ---- what is scheduled -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler, and when it steps.

    Attributes:
        scheduler: A scheduler of `torch.optim.lr_scheduler`, or of a class derived from `LRScheduler`.
        interval: Whether it steps after optimizer steps ('step') or after epochs ('epoch'). `ReduceLROnPlateau` always
            steps after epochs.
        monitor: For `ReduceLROnPlateau`, the entry of the history that it looks at; None takes the run's.

    Raises:
        ConfigError: The scheduler is none, or the interval is unknown.
    """

    scheduler: LRScheduler
    interval: Interval = "epoch"
    monitor: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scheduler, LRScheduler):
            raise ConfigError(
                f"A schedule needs a scheduler of torch.optim.lr_scheduler, but got {self.scheduler!r}. Derive your "
                "own from torch.optim.lr_scheduler.LRScheduler."
            )
        if self.interval not in ("step", "epoch"):
            raise ConfigError(f"interval={self.interval!r} is not known. Use 'step' or 'epoch'.")


@dataclass(frozen=True, slots=True)
class SchedulerRecipe:
    """How to make the scheduler once the optimizer is there.

    Attributes:
        scheduler: A class of `torch.optim.lr_scheduler` by name, in any case and with or without the "LR" at its end;
            or a function from an optimizer to a scheduler or a `Schedule`.
        params: Arguments, for a name. The length (T_max, total_steps, total_iters) is that of the fit where it is left
            out, and OneCycleLR's max_lr is the learning rate of the optimizer.
        interval: After what the scheduler steps.
        mode: Whether what ReduceLROnPlateau looks at is better when it is smaller ('min') or larger ('max'), unless
            ``params`` says so.

    Raises:
        ConfigError: An unknown name or argument, or arguments for a function.
    """

    scheduler: str | Callable[[Optimizer], LRScheduler | Schedule]
    params: Mapping[str, Any] = field(default_factory=dict)
    interval: Interval = "epoch"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.scheduler, str):
            if not callable(self.scheduler):
                raise ConfigError(f"scheduler={self.scheduler!r} is neither a name nor a function of the optimizer.")
            if self.params:
                raise ConfigError(
                    "schedulerParams cannot reach a scheduler that is a function. Set them inside the function: "
                    "scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)."
                )
            return
        if self.scheduler.lower() not in _NAMED:
            raise ConfigError(
                f"scheduler={self.scheduler!r} is unknown. Use one of {', '.join(scheduler_names())}, or a function "
                "from an optimizer to a scheduler."
            )
        # One group for every value of an argument that has one per group.
        per_group = [value for name, value in self.params.items() if name != "milestones"]
        groups = max([len(value) for value in per_group if isinstance(value, list | tuple)] or [1])
        weights = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
        self._named(self.scheduler, torch.optim.SGD(weights, lr=0.1, momentum=0.9), Horizon(1000, 1000))

    def build(self, optimizer: Optimizer, horizon: Horizon) -> Schedule:
        """The scheduler of this optimizer.

        Raises:
            ConfigError: The arguments do not suit the optimizer, a function returned something else, or the scheduler
                ends before the fit does.
        """
        if isinstance(self.scheduler, str):
            schedule = Schedule(self._named(self.scheduler, optimizer, horizon), self.interval)
        else:
            made = self.scheduler(optimizer)
            if not isinstance(made, LRScheduler | Schedule):
                raise ConfigError(
                    f"The function given as scheduler returned {made!r}, neither a scheduler of "
                    "torch.optim.lr_scheduler nor a sparkdl.schedule.Schedule."
                )
            schedule = made if isinstance(made, Schedule) else Schedule(made, self.interval)
        length = horizon.length(schedule.interval)
        if isinstance(schedule.scheduler, OneCycleLR) and schedule.scheduler.total_steps < length:
            raise ConfigError(
                f"OneCycleLR ends after {schedule.scheduler.total_steps} {schedule.interval}s, but the fit has "
                f"{length} to schedule. Leave total_steps out, or make it as many."
            )
        return schedule

    def _named(self, name: str, optimizer: Optimizer, horizon: Horizon) -> LRScheduler:
        kind, arguments = _NAMED[name.lower()], dict(self.params)
        if kind in _LENGTHS and not arguments.keys() & {_LENGTHS[kind], "epochs", "steps_per_epoch"}:
            arguments[_LENGTHS[kind]] = horizon.length(self.interval)
        if kind is OneCycleLR:
            arguments.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        if kind is ReduceLROnPlateau:
            arguments.setdefault("mode", self.mode)
        try:
            return kind(optimizer, **arguments)
        except Exception as error:
            raise ConfigError(
                f"schedulerParams={dict(self.params)!r} do not suit scheduler={name!r} with the optimizer "
                f"{type(optimizer).__name__}: {error}"
            ) from error


# ---- the rates of a run ----------------------------------------------------------------------------------------------
class LearningRates:
    """Everything that changes the learning rates of a run, and with them the momentum where a scheduler does.

    The rates are functions of steps, epochs and the history alone. They lie in the optimizers' groups, and are part of
    the optimizers' state; `state_dict` is that of the schedulers.

    Args:
        optimizers: The optimizers of the run.
        schedules: What changes their rates; several may share an optimizer, and step in this order.
        warmup_steps: Steps of the warm-up, in which schedules of steps wait.

    Raises:
        ConfigError: A scheduler belongs to an optimizer that is not among them.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], schedules: Sequence[Schedule] = (), warmup_steps: int = 0
    ) -> None:
        for schedule in schedules:
            if not any(_optimizer_of(schedule) is optimizer for optimizer in optimizers):
                raise ConfigError(
                    f"The scheduler {type(schedule.scheduler).__name__} belongs to an optimizer "
                    f"({type(_optimizer_of(schedule)).__name__}) that is not one of the run's. Make it from an "
                    "optimizer that is returned as well."
                )
        self._optimizers = list(optimizers)
        self._schedules = list(schedules)
        self._warmup_steps = warmup_steps

    @contextlib.contextmanager
    def warmed(self, step: int, rate_factor: float = 1.0) -> Iterator[None]:
        """While the optimizers take this step: their rates times the factor of the warm-up.

        Args:
            step: Optimizer steps before this one.
            rate_factor: What the rates are multiplied by besides.
        """
        factor = warmup_factor(step, self._warmup_steps) * rate_factor
        if factor == 1.0:
            yield
            return
        groups = self._groups()
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def after_step(self, step: int) -> None:
        """Let schedules of steps go on, once the warm-up is over; also after a step that changed no weights.

        The first step after the warm-up is the first of the schedule.

        Args:
            step: Optimizer steps so far, the one that was just taken included.
        """
        if step <= self._warmup_steps:
            return
        for schedule in self._schedules:
            if schedule.interval == "step" and not isinstance(schedule.scheduler, ReduceLROnPlateau):
                _advance(schedule)

    def after_epoch(self, record: Mapping[str, float], monitor: str | None = None) -> None:
        """Let schedules of epochs go on.

        Args:
            record: The history's record of the epoch.
            monitor: The entry that `ReduceLROnPlateau` looks at, unless its schedule names one. None: validation_loss
                where there is one, else loss.

        Raises:
            ConfigError: The record has no such entry.
        """
        for schedule in self._schedules:
            if isinstance(schedule.scheduler, ReduceLROnPlateau):
                name = schedule.monitor or monitor or ("validation_loss" if "validation_loss" in record else "loss")
                if name not in record:
                    raise ConfigError(
                        f"ReduceLROnPlateau looks at {name!r}, but the history of an epoch has only "
                        f"{', '.join(sorted(record))}. Set monitor to one of these, or ask for the metric."
                    )
                _advance(schedule, record[name])
            elif schedule.interval == "epoch":
                _advance(schedule)

    def current(self, step: int) -> list[float]:
        """The rates that a step uses, warm-up included: one per group, optimizer by optimizer. Not inside of `warmed`.

        Args:
            step: Optimizer steps before this one.
        """
        factor = warmup_factor(step, self._warmup_steps)
        return [float(group["lr"]) * factor for group in self._groups()]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedulers are, as `sparkdl.checkpoint.flatten_state` takes it; not copied."""
        states = [(schedule.scheduler, schedule.scheduler.state_dict()) for schedule in self._schedules]
        return {"schedules": [{"scheduler": type(owner).__name__, "state": state} for owner, state in states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, beside the optimizers' own states, in any order.

        Raises:
            ConfigError: It is the state of other schedulers.
        """
        saved = [entry["scheduler"] for entry in state["schedules"]]
        own = [type(schedule.scheduler).__name__ for schedule in self._schedules]
        if saved != own:
            raise ConfigError(
                f"The checkpoint has the schedulers {saved}, this run has {own}. Go on with the settings that it was "
                "written with, or begin anew with another checkpointDir."
            )
        for schedule, entry in zip(self._schedules, state["schedules"], strict=True):
            scheduler = schedule.scheduler
            scheduler.load_state_dict(_with_counters(entry["state"], scheduler.state_dict()))

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups if "lr" in group]


def _optimizer_of(schedule: Schedule) -> Optimizer:
    return schedule.scheduler.optimizer


def _advance(schedule: Schedule, *arguments: Any) -> None:
    # Torch warns where no optimizer step came first, which is so where the first step was left out as not finite.
    _optimizer_of(schedule)._opt_called = True  # type: ignore[attr-defined]
    schedule.scheduler.step(*arguments)


def _with_counters(saved: Any, own: Any) -> Any:
    """A copy of a saved state with `Counter` where the scheduler has one: checkpoints know dicts alone."""
    if isinstance(saved, dict):
        named = own if isinstance(own, dict) else {}
        values = {key: _with_counters(value, named.get(key)) for key, value in saved.items()}
        return Counter(values) if isinstance(own, Counter) else values
    if isinstance(saved, list):
        listed = own[: len(saved)] if isinstance(own, list | tuple) else ()
        return [_with_counters(value, other) for value, other in zip_longest(saved, listed)]
    return saved
