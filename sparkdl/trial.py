"""The first forward and backward of a module, alone on a few rows: what can be wrong with it is found here."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparkdl.batch import Batch
from sparkdl.config import Columns
from sparkdl.errors import ConfigError
from sparkdl.history import RESERVED
from sparkdl.objective import Objective, TrainingStep

__all__ = ["Trial", "has_lazy_parts", "leave_no_trace", "materialise", "try_module"]


@dataclass(frozen=True, slots=True)
class Trial:
    """What one forward and backward of a few rows showed.

    Attributes:
        unused: True where some parameters had no part in the output.
        outputs: Values per row of the output; a classifier's one logit counts as two classes, several outputs as 0.
        logged: Names of what a training step returned besides the loss.
        validated: Names of what it returned besides the loss where no gradient was wanted, as in validation.
    """

    unused: bool
    outputs: int
    logged: tuple[str, ...]
    validated: tuple[str, ...]


def try_module(
    module: nn.Module,
    objective: Objective,
    sample: Mapping[str, torch.Tensor],
    columns: Columns,
    *,
    validates: bool = False,
) -> Trial:
    """One forward and backward of two rows, before any other rank depends on this one.

    Lazy modules get their shapes; nothing else of the module changes.

    Args:
        module: The module.
        objective: The loss, and how the module is called.
        sample: Some rows, by field.
        columns: What the fields are.
        validates: True where there are validation rows: a training step may do and return something else for them.

    Raises:
        ConfigError: The module cannot take the inputs, or its output does not fit the loss.
    """
    inputs = tuple(sample[column.field] for column in columns.inputs)
    targets = tuple(sample[column.field] for column in columns.labels)
    batch = Batch(inputs, targets, sample[columns.weight.field] if columns.weight is not None else None)
    if has_lazy_parts(module):
        _forward(module.eval(), objective, inputs)
        module.train()
    trial = copy.deepcopy(module).eval()
    width = 0
    if isinstance(objective, TrainingStep):
        loss, logged = objective.try_step(trial, batch)
        _check_names(logged)
        outputs = _forward(trial, objective, inputs) if objective.shows_output else None
        _check_output(objective, outputs)
    else:
        outputs = _forward(trial, objective, inputs)
        _check_output(objective, outputs)
        loss, logged = objective.try_on(outputs, batch.labels, batch.weight), {}
    if isinstance(outputs, torch.Tensor):
        width = outputs.shape[1:].numel()
        width = 2 if objective.binary and width == 1 else width
    loss.backward()
    unused = any(value.grad is None for value in trial.parameters() if value.requires_grad)
    validated: tuple[str, ...] = ()
    if validates and isinstance(objective, TrainingStep):
        with torch.inference_mode():
            validated = tuple(objective.try_step(trial, batch)[1])
        _check_names(validated)
    return Trial(unused, width, tuple(logged), validated)


def _check_output(objective: Objective, outputs: Any) -> None:
    if objective.binary and (not isinstance(outputs, torch.Tensor) or outputs.ndim > 2):
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ConfigError(
            f"A classifier's module must return one score per class, shape (rows, classes), or one logit per row; this "
            f"one returned {found}. Use TorchEstimator for other outputs."
        )


def _check_names(logged: Iterable[str]) -> None:
    for name in logged:
        if name in RESERVED or name.startswith("validation_"):
            raise ConfigError(
                f"The trainingStep returned {name!r} beside the loss, but the history has such an entry of its own. "
                "Use another name."
            )


def _forward(module: nn.Module, objective: Objective, inputs: tuple[torch.Tensor, ...]) -> Any:
    try:
        return objective.predict(module, inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in inputs)
        how = "positional inputs" if objective.prediction_step is None else "inputs in the predictionStep"
        raise ConfigError(
            f"The module failed on its first forward, with {len(inputs)} {how} of shape {shapes} "
            f"(rows first): {type(error).__name__}: {error}"
        ) from error


def leave_no_trace(module: nn.Module, objective: Objective, example: Batch) -> None:
    """One forward and backward that changes neither the module nor what random layers draw next."""
    buffers = [value.clone() for value in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        objective.compute(module, example)[0].backward()
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for value, before in zip(module.buffers(), buffers, strict=True):
            value.copy_(before)


def has_lazy_parts(module: nn.Module) -> bool:
    """True where some part of a module waits for its first input to learn its shapes."""
    return any(isinstance(part, LazyModuleMixin) for part in module.modules())


def materialise(module: nn.Module, objective: Objective, inputs: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Give lazy modules their shapes where there is no row to show them.

    Args:
        module: The module.
        objective: Knows how it is called.
        inputs: Name of the dtype and shape of one row of each input.
    """
    zeros = tuple(torch.zeros((2, *shape), dtype=getattr(torch, dtype)) for dtype, shape in inputs)
    with torch.no_grad():
        _forward(module.eval(), objective, zeros)
