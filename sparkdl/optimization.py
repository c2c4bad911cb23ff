"""Everything between gradients and new weights: what every way to train in parallel does alike, once they are reduced.

Mixed precision, clipping, steps that are left out, the optimizers with their learning rates, and the average of the
weights. One `Optimization` belongs to one rank; its state is part of the run's checkpoints.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparkdl.config import TrainConfig
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.schedule import Horizon, LearningRates, SchedulerRecipe, scaled_rate_factor
from sparkdl.serialization import load_state, state_of

__all__ = ["BuildOptimization", "Optimization", "optimization_builder"]

_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class Optimization:
    """Turns reduced gradients into new weights.

    Args:
        module: The module; its parameters that require a gradient are trained.
        recipe: How to make the optimizers.
        scheduler: How to make their schedules; None where the recipe brings them, or there are none.
        config: How to train.
        steps_per_epoch: Optimizer steps of an epoch.

    Raises:
        ConfigError: The recipe does not suit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: OptimizerRecipe,
        scheduler: SchedulerRecipe | None,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
    ) -> None:
        self._module = module
        self._config = config
        self._parameters = [value for value in module.parameters() if value.requires_grad]
        self._smallest = min(self._parameters, key=torch.Tensor.numel)
        self._device = self._smallest.device
        factor = scaled_rate_factor(config.batch_size, config.base_batch_size, config.learning_rate_scaling)
        self.optimizers, schedules = recipe.build(module, rate_scale=factor, interval=config.scheduler_interval)
        horizon = Horizon(steps_per_epoch, config.max_epochs, config.warmup_steps)
        if schedules is None:
            schedules = [scheduler.build(one, horizon) for one in self.optimizers] if scheduler is not None else []
        self._rates = LearningRates(self.optimizers, schedules, config.warmup_steps)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.precision == "16")
        self._average = _average_of(module, config)
        self._averages_from = (config.averaging_start - 1) * steps_per_epoch
        self._buffers: list[Tensor] = []
        self._skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        self._learning_rate: float | None = None
        self.steps = 0

    # ---- one step ----------------------------------------------------------------------------------------------------
    def begin_step(self) -> None:
        """Forget the gradients of the last step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self._config.non_finite == "skip":  # a step that is left out must leave no trace in BatchNorm's statistics
            self._buffers = [value.clone() for value in self._module.buffers()]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In which forward and loss are computed."""
        dtype = _AUTOCAST.get(self._config.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=dtype)

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient of a loss, shape (), to the gradients."""
        factor = torch.tensor(scale, dtype=loss.dtype, device=loss.device)
        if self._config.non_finite == "skip":
            # The gradient of a loss that is no number may be one. Through that of the smallest parameter, all ranks see
            # that the step is to be left out; where a rank holds a part of it alone, through those of all parameters.
            if _is_sharded(self._smallest):
                factor = factor + loss.detach() * 0
            else:
                loss = loss + self._smallest.sum() * (loss.detach() * 0)
        if self._scaler.is_enabled():
            self._scaler.scale(loss * factor).backward()
        else:
            loss.backward(factor)

    def step(self) -> bool:
        """Bring the weights forward by the gradients, which are those of the global batch and equal on all ranks.

        Returns:
            False where the step was left out, because its gradient is not finite and nonFinite='skip'.
        """
        config = self._config
        if self._scaler.is_enabled():
            for optimizer in self.optimizers:
                self._scaler.unscale_(optimizer)
        taken = self._counts_as_step()
        if taken:
            self.update()
        else:
            with torch.no_grad():
                for value, before in zip(self._module.buffers(), self._buffers, strict=True):
                    value.copy_(before)
        if self._scaler.is_enabled():
            self._scaler.update()
        self.advance()
        if taken and config.averaging == "ema" and self._average is not None and self.steps > self._averages_from:
            self._average.update_parameters(self._module)
        return taken

    def update(self, rate_factor: float = 1.0) -> None:
        """Bring the weights forward by the gradients that are there, without counting it as a step.

        Args:
            rate_factor: What the learning rates are multiplied by this once.
        """
        if self._config.gradient_clip_value is not None:
            clip_grad_value_(self._parameters, self._config.gradient_clip_value)
        with self._rates.warmed(self.steps, rate_factor):
            for optimizer in self.optimizers:
                self._scaler.step(optimizer)

    def deferred_update(self) -> Callable[[], None]:
        """The update of this step as a function, for strategies that bring parts of the weights forward later.

        Each call changes the parameters whose gradients are there then, with the rates of the step in which this was
        called, whatever they are by then.
        """
        with self._rates.warmed(self.steps):
            then = [[_options_of(group) for group in optimizer.param_groups] for optimizer in self.optimizers]

        def update() -> None:
            if self._config.gradient_clip_value is not None:
                clip_grad_value_(self._parameters, self._config.gradient_clip_value)
            for optimizer, options in zip(self.optimizers, then, strict=True):
                now = [_options_of(group) for group in optimizer.param_groups]
                for group, own in zip(optimizer.param_groups, options, strict=True):
                    group.update(own)
                optimizer.step()
                for group, own in zip(optimizer.param_groups, now, strict=True):
                    group.update(own)

        return update

    def advance(self) -> None:
        """Count a step, and bring forward what goes by steps."""
        self._learning_rate = self._rates.current(self.steps)[0]
        self.steps += 1
        self._rates.after_step(self.steps)

    def _counts_as_step(self) -> bool:
        """Clip the gradients by their norm; False where the step is to be left out."""
        config = self._config
        skips = config.non_finite == "skip"
        if config.gradient_clip_norm is None and not skips and not self._scaler.is_enabled():
            return True
        norm: Any = get_total_norm([value.grad for value in self._parameters if value.grad is not None])
        if _is_sharded(norm):
            norm = norm.full_tensor()
        if config.gradient_clip_norm is not None:
            clip_grads_with_norm_(self._parameters, config.gradient_clip_norm, norm)
        bad = ~torch.isfinite(norm)
        if skips or self._scaler.is_enabled():
            self._skipped += bad
        return not (skips and bool(bad))

    def end_epoch(self, record: Mapping[str, Any], monitor: str | None) -> None:
        """Bring forward what goes by epochs.

        Args:
            record: The epoch's history record.
            monitor: The entry that schedules of a metric look at.

        Raises:
            ConfigError: A schedule looks at an entry that the record lacks.
        """
        self._rates.after_epoch(record, monitor)

    def average_epoch(self, epoch: int) -> None:
        """Take the weights at the end of an epoch into the average, for averaging='swa'.

        Args:
            epoch: From 0.
        """
        if self._config.averaging == "swa" and self._average is not None and epoch + 1 >= self._config.averaging_start:
            self._average.update_parameters(self._module)

    # ---- what came of it ---------------------------------------------------------------------------------------------
    @property
    def learning_rate(self) -> float:
        """Of the last step, before the first of the next; that of the first group of the first optimizer."""
        return self._rates.current(self.steps)[0] if self._learning_rate is None else self._learning_rate

    @property
    def skipped(self) -> int:
        """Steps that were left out so far, since their gradients were not finite."""
        return int(self._skipped)

    @property
    def counts_skipped(self) -> bool:
        """True where steps may be left out."""
        return self._config.non_finite == "skip" or self._scaler.is_enabled()

    @property
    def averaged(self) -> nn.Module | None:
        """The module with averaged weights; None where nothing has been averaged yet."""
        if self._average is None or not int(self._average.n_averaged):
            return None
        module: nn.Module = self._average.module
        return module

    # ---- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides the module's state; not copied."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rates": self._rates.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None
            if self._average is None
            else {"module": state_of(self._average.module), "count": int(self._average.n_averaged)},
            "skipped": int(self._skipped),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(dict(saved))
        self._rates.load_state_dict(state["rates"])
        self._scaler.load_state_dict(dict(state["scaler"]))
        if self._average is not None:
            load_state(self._average.module, state["average"]["module"])
            self._average.n_averaged.fill_(state["average"]["count"])
        self._skipped.fill_(state["skipped"])
        self.steps = state["steps"]


BuildOptimization = Callable[[nn.Module], Optimization]
"""How a strategy gets its `Optimization`, once the module's parameters are what they stay."""


def optimization_builder(
    recipe: OptimizerRecipe, scheduler: SchedulerRecipe | None, config: TrainConfig, *, steps_per_epoch: int
) -> BuildOptimization:
    """An `Optimization` but for its module."""

    def build(module: nn.Module) -> Optimization:
        return Optimization(module, recipe, scheduler, config, steps_per_epoch=steps_per_epoch)

    return build


def _is_sharded(value: Tensor) -> bool:
    """True for a `torch.distributed.tensor.DTensor`, which is not imported for those who need none."""
    return hasattr(value, "full_tensor")


def _average_of(module: nn.Module, config: TrainConfig) -> AveragedModel | None:
    if config.averaging == "none":
        return None
    # Buffers are averaged as well: BatchNorm's statistics have to be those of the averaged weights, or close to them.
    decay = get_ema_multi_avg_fn(config.averaging_decay) if config.averaging == "ema" else None
    average = AveragedModel(module, multi_avg_fn=decay, use_buffers=True)
    average.module.eval()
    return average


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
