"""LightningModules and Hugging Face modules as Params of the Estimators: how they are called, and with what.

Neither library is imported here. Whoever has such a module has imported its library, also on executors. The functions
that become Params are saved by their names, which therefore stay.
"""

import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sparkdl.errors import ConfigError
from sparkdl.schedule import Schedule

__all__ = ["hugging_face", "lightning"]

logger = logging.getLogger(__name__)

# The history has prefixes of its own.
_PREFIX = re.compile(r"^(train|training|val|valid|validation)[_/](?=.)")
_NUMBERS = ("batch_idx", "dataloader_idx")
_NOT_GIVEN = ("optimizer_idx", "hiddens", "dataloader_iter")
_HOOKS = (
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "configure_model",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "setup",
    "teardown",
    "transfer_batch_to_device",
)
_SCHEDULER_KEYS = {"scheduler", "name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict"}
_FORMS = (
    "Return an optimizer, a list of them, two lists (optimizers, schedulers), a dict with 'optimizer' and "
    "'lr_scheduler', or a list of such dicts."
)


# ---- Lightning -------------------------------------------------------------------------------------------------------
def lightning(module: nn.Module, *, batch: Literal["tuple", "dict"] = "tuple") -> dict[str, Any]:
    """What trains a LightningModule: ``TorchEstimator(**lightning(module), inputCols=["x"], labelCols=["y"])``.

    Args:
        module: An instance of ``lightning.pytorch.LightningModule`` or ``pytorch_lightning.LightningModule``.
        batch: What its steps are called with: 'tuple' for the tensors in the order of the columns, inputs before
            labels, where one column alone is its tensor; 'dict' for tensors by column name.

    Returns:
        The Params module, trainingStep, configure and, where `predict_step` is overridden, predictionStep.

    Raises:
        ConfigError: It is none, or it is trained in a way that takes Lightning's own Trainer.
    """
    base, name = _base_of(module), type(module).__name__
    if base is None:
        raise ConfigError(
            f"{name} is no LightningModule, neither of lightning.pytorch nor of pytorch_lightning. Give an instance of "
            "one; any other module is trained with module=, loss= or trainingStep=."
        )
    if batch not in ("tuple", "dict"):
        raise ConfigError(f"batch={batch!r} is not known. Use 'tuple' or 'dict'.")
    if not getattr(module, "automatic_optimization", True):
        raise ConfigError(
            f"{name} sets automatic_optimization = False and takes its optimizer steps itself, which only Lightning's "
            "Trainer lets it do. Return the loss from training_step instead."
        )
    for method in ("training_step", "configure_optimizers"):
        if not _overrides(module, method):
            raise ConfigError(f"{name} has no {method} of its own, and cannot be trained without. Write one.")
    for method in ("training_step", "validation_step"):
        for argument in inspect.signature(getattr(module, method)).parameters:
            if argument in _NOT_GIVEN:
                raise ConfigError(
                    f"{method} of {name} takes {argument!r}, which is not known here. Let it take (batch, batch_idx)."
                )
    left_out = [hook for hook in dir(base) if hook.startswith("on_") or hook in _HOOKS]
    left_out = [hook for hook in left_out if _overrides(module, hook)]
    if left_out:
        logger.warning(
            "%s overrides %s. Only Lightning's Trainer calls that; it is left out.", name, ", ".join(left_out)
        )
    by_name = batch == "dict"
    params = {
        "module": module,
        "trainingStep": lightning_step_by_name if by_name else lightning_step,
        "configure": lightning_optimizers,
    }
    if _overrides(module, "predict_step"):
        params["predictionStep"] = lightning_prediction_by_name if by_name else lightning_prediction
    return params


def lightning_step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The trainingStep of a LightningModule whose steps take the tensors in order; see `lightning`.

    Raises:
        ConfigError: There is no loss, or something was logged that cannot be collected.
    """
    return _step(module, _in_order(batch))


def lightning_step_by_name(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The trainingStep of a LightningModule whose steps take a dict; see `lightning`.

    Raises:
        ConfigError: As for `lightning_step`.
    """
    return _step(module, batch)


def lightning_prediction(module: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The predictionStep of a LightningModule whose steps take the tensors in order; see `lightning`."""
    return _call(module.predict_step, _in_order(batch))


def lightning_prediction_by_name(module: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The predictionStep of a LightningModule whose steps take a dict; see `lightning`."""
    return _call(module.predict_step, batch)


def lightning_optimizers(module: nn.Module) -> tuple[list[Optimizer], list[Schedule]]:
    """What `configure_optimizers` of a LightningModule returns, in any of Lightning's forms.

    Raises:
        ConfigError: It failed, returned something else, or asks for what only Lightning's Trainer does.
    """
    name = type(module).__name__
    try:
        made = module.configure_optimizers()  # type: ignore[operator]
    except Exception as error:
        raise ConfigError(
            f"configure_optimizers of {name} failed: {type(error).__name__}: {error} (There is no Trainer here: "
            "numbers of steps and epochs have to come from the module itself.)"
        ) from error
    optimizers, configs = _parts_of(made, name)
    return optimizers, [_schedule(config, name) for config in configs]


def _base_of(module: Any) -> type | None:
    """The LightningModule class that a module is derived from, if any."""
    for home in ("lightning.pytorch", "pytorch_lightning"):
        base = getattr(sys.modules.get(home), "LightningModule", None)
        if base is not None and isinstance(module, base):
            found: type = base
            return found
    return None


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method) is not getattr(_base_of(module), method)


def _in_order(batch: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    values = tuple(batch.values())
    return values[0] if len(values) == 1 else values


def _call(step: Any, batch: Any) -> Any:
    """Call a step with as many arguments as it takes: the numbers of batch and loader are not known, and 0."""
    parameters = list(inspect.signature(step).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return step(batch, 0)
    named = [parameter for parameter in parameters[1:] if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    asked = [one.name for one in named if one.name in _NUMBERS or one.default is one.empty]
    return step(batch, **dict.fromkeys(asked, 0))


def _step(module: nn.Module, batch: Any) -> dict[str, Any]:
    """Loss and logged numbers; where no gradient is wanted, those of the validation step, if there is one."""
    validates = not torch.is_grad_enabled() and _overrides(module, "validation_step")
    name = "validation_step" if validates else "training_step"
    with _collected(module) as logged:
        found = _call(getattr(module, name), batch)
    returned, logged_loss = found if isinstance(found, Mapping) else {}, logged.pop("loss", None)
    if "loss" in returned:
        loss = returned["loss"]
    elif validates and logged_loss is not None:
        # A validation step may return what it likes, predictions for example; a loss that it logs is one.
        loss = torch.as_tensor(logged_loss)
    else:
        loss = found
    if not isinstance(loss, Tensor):
        hint = ", or log it as 'val_loss'" if validates else ""
        raise ConfigError(
            f"{name} of {type(module).__name__} returned {_shown(found)}, and so no loss. Return the loss, or a dict "
            f"with 'loss'{hint}."
        )
    numbers = {key: value for key, value in returned.items() if key != "loss" and _is_number(value)}
    return {"loss": loss, **numbers, **logged}


@contextlib.contextmanager
def _collected(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the module gives to `log` and `log_dict` meanwhile, by the names of the history."""
    values: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, reduce_fx: Any = "mean", **__: Any) -> None:
        if reduce_fx not in ("mean", torch.mean):
            raise ConfigError(
                f"self.log({name!r}) asks for reduce_fx={reduce_fx!r}, but what is logged is averaged over the rows. "
                "Leave reduce_fx out."
            )
        if isinstance(value, Tensor) and value.numel() == 1:
            values[_history_name(name)] = value.detach().reshape(())
        elif _is_number(value):
            values[_history_name(name)] = float(value)
        else:
            raise ConfigError(
                f"self.log({name!r}) got {_shown(value)}, but only single numbers are collected. For a torchmetrics "
                "object, log the number that it returns, or give it as metrics= to the Estimator."
            )

    # An attribute of this very instance goes before the class's method, and log_dict calls it for each entry.
    module.__dict__["log"] = log
    try:
        yield values
    finally:
        del module.__dict__["log"]


def _history_name(name: str) -> str:
    return _PREFIX.sub("", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0)


def _parts_of(made: Any, name: str) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """The optimizers, and what is known of each scheduler as Lightning's dict of it."""
    entries = [made] if isinstance(made, Mapping) else made
    optimizers: Any
    if isinstance(entries, list | tuple) and entries and all(isinstance(entry, Mapping) for entry in entries):
        for entry in entries:
            _check_frequency(entry, name)
        optimizers = [entry.get("optimizer") for entry in entries]
        given = [entry for entry in entries if entry.get("lr_scheduler") is not None]
        configs = [{"monitor": entry.get("monitor"), **_config(entry["lr_scheduler"])} for entry in given]
    else:
        pair = isinstance(made, list | tuple) and len(made) == 2 and isinstance(made[0], list | tuple)
        optimizers, schedulers = map(_listed, made if pair else (made, []))
        configs = [_config(scheduler) for scheduler in schedulers]
    if not optimizers or not all(isinstance(one, Optimizer) for one in optimizers):
        raise ConfigError(f"configure_optimizers of {name} returned {_shown(made)}. {_FORMS}")
    return optimizers, configs


def _config(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}


def _schedule(config: Mapping[str, Any], name: str) -> Schedule:
    unknown = config.keys() - _SCHEDULER_KEYS
    if unknown:
        raise ConfigError(
            f"configure_optimizers of {name} gives a scheduler {', '.join(map(repr, sorted(unknown)))}, which "
            f"Lightning does not know. Use some of {', '.join(sorted(_SCHEDULER_KEYS))}."
        )
    _check_frequency(config, name)
    scheduler, interval, monitor = config.get("scheduler"), config.get("interval", "epoch"), config.get("monitor")
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    if config.get("reduce_on_plateau", plateau) != plateau or (plateau and interval != "epoch"):
        raise ConfigError(
            f"configure_optimizers of {name} gives {_shown(scheduler)} with {dict(config)!r}. Only ReduceLROnPlateau "
            "steps by a metric, and it does so after epochs."
        )
    return Schedule(scheduler, interval, None if monitor is None else _entry_of(monitor))  # type: ignore[arg-type]


def _check_frequency(config: Mapping[str, Any], name: str) -> None:
    if config.get("frequency", 1) != 1:
        raise ConfigError(
            f"configure_optimizers of {name} asks for frequency={config['frequency']}, but everything steps every "
            "time. Leave it out, and give the scheduler longer periods."
        )


def _entry_of(monitor: str) -> str:
    """The entry of the history that is logged under this name: val_loss is validation_loss."""
    prefix = _PREFIX.match(monitor)
    return ("validation_" if prefix and prefix[1].startswith("val") else "") + _history_name(monitor)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- Hugging Face ----------------------------------------------------------------------------------------------------
def hugging_face(module: nn.Module | Callable[[], nn.Module]) -> dict[str, Any]:
    """What trains a module in the style of Hugging Face's transformers: ``module(**batch).loss``.

    The columns are called like the arguments of the module's forward:
    ``TorchClassifier(**hugging_face(module), inputCols=["input_ids", "attention_mask"], labelCol="labels")``.

    Args:
        module: The module, or a function that returns one.

    Returns:
        The Params module, trainingStep and predictionStep.
    """
    return {"module": module, "trainingStep": hugging_face_step, "predictionStep": hugging_face_prediction}


def hugging_face_step(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The trainingStep of `hugging_face`: the loss that the module computes of its labels.

    Raises:
        ConfigError: It computes none.
    """
    loss = getattr(module(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"{type(module).__name__} returned no loss for the columns {', '.join(batch)}. Let labelCol be the "
            "argument of its forward that it compares with, mostly 'labels', and use a module that has a loss."
        )
    return loss


def hugging_face_prediction(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The predictionStep of `hugging_face`: the logits, or else the first tensor that the module returns.

    Raises:
        ConfigError: It returns no tensor.
    """
    found = module(**batch)
    logits = getattr(found, "logits", None)
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else [found]
    for value in [logits, *values]:
        if isinstance(value, Tensor):
            return value
    raise ConfigError(
        f"{type(module).__name__} returned {_shown(found)}, in which there is no tensor to predict with. Give a "
        "predictionStep of your own."
    )


def _shown(value: Any) -> str:
    """A value by its type."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {', '.join(map(_shown, value)) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
