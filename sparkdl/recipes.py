"""What the Params say of loss, optimizers, schedules and metrics, as what the ranks are given."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from sparkdl.best import monitor_mode
from sparkdl.config import Columns, TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective, TrainingStep, build_loss
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.params import TrainParams
from sparkdl.schedule import SchedulerRecipe

if TYPE_CHECKING:
    from sparkdl.metrics import Kind

__all__ = ["RecipeParams", "check_goes_without_validation"]


class RecipeParams(TrainParams):
    """The Params of training, checked and turned into recipes; nothing here looks at rows."""

    _kind: "ClassVar[Kind]" = "any"

    def _checked_loss(self) -> Callable[..., Any] | None:
        """The loss; None where a training step computes its own."""
        step, name = self._value("trainingStep"), type(self).__name__
        for param in ("trainingStep", "predictionStep"):
            if self._value(param) is not None and not callable(self._value(param)):
                raise ConfigError(f"{param}={self._value(param)!r} is not a function. Give one of (module, batch).")
        if step is not None:
            if self.isSet("loss") and self._value("loss") is not None:
                raise ConfigError(
                    f"loss={self._value('loss')!r} and trainingStep are both set. Set one: a trainingStep computes its "
                    "own loss."
                )
            return None
        if self._value("loss") is None:
            raise ConfigError(
                f"{name} needs a loss: a name, a torch loss module or a function; or a trainingStep, which computes "
                "its own."
            )
        loss = build_loss(self._value("loss"))
        self._check_loss(loss)
        return loss

    def _check_loss(self, loss: Callable[..., Any]) -> None:
        """Refuse losses that make no sense for this kind of estimator."""

    def _objective(self, loss: Callable[..., Any] | None, columns: Columns, *, shows_output: bool) -> Objective:
        binary, step = self._kind == "class", self._value("predictionStep")
        if loss is None:
            return TrainingStep(
                self._value("trainingStep"), columns, binary=binary, prediction_step=step, shows_output=shows_output
            )
        return Objective(
            loss, binary=binary, prediction_step=step, input_names=[column.name for column in columns.inputs]
        )

    def _optimizer_recipe(self) -> OptimizerRecipe:
        configure = self._value("configure")
        if configure is not None and self.isSet("optimizer"):
            raise ConfigError(
                f"optimizer={self._value('optimizer')!r} and configure are both set. Set one: configure makes its own "
                "optimizers."
            )
        return OptimizerRecipe(
            self._value("optimizer"),
            self._value("learningRate"),
            self._value("optimizerParams") or {},
            weight_decay=self._value("weightDecay"),
            parameter_groups=self._value("parameterGroups") or {},
            configure=configure,
        )

    def _scheduler_recipe(self, config: TrainConfig) -> SchedulerRecipe | None:
        scheduler, params = self._value("scheduler"), self._value("schedulerParams") or {}
        if scheduler is None:
            if params:
                raise ConfigError(f"schedulerParams={params!r} are set, but there is no scheduler. Name one.")
            return None
        if self._value("configure") is not None:
            raise ConfigError("scheduler and configure are both set. Return the scheduler from configure as well.")
        watched = config.monitor or "validation_loss"
        return SchedulerRecipe(
            scheduler, params, config.scheduler_interval, mode=monitor_mode(watched, config.monitor_mode)
        )

    def _known_mode(self, config: TrainConfig) -> TrainConfig:
        """The config, with the mode of a monitored metric where the metric itself knows it."""
        metrics, name = self._value("metrics"), (config.monitor or "").removeprefix("validation_")
        if not metrics or config.monitor_mode != "auto":
            return config
        from sparkdl.metrics import check_metrics, higher_is_better

        check_metrics(metrics, self._kind)
        higher = higher_is_better(metrics).get(name)
        return config if higher is None else dataclasses.replace(config, monitor_mode="max" if higher else "min")


def check_goes_without_validation(config: TrainConfig, metrics: Any) -> None:
    """Refuse what only validation rows can give, where there are none."""
    monitors = config.monitor is not None and config.monitor.startswith("validation_")
    if metrics or monitors:
        asked = f"metrics={metrics!r}" if metrics else f"monitor={config.monitor!r}"
        raise ConfigError(
            f"{asked} needs validation rows, but none are held out. Set validationIndicatorCol, validationFraction or "
            "validationDataset."
        )
