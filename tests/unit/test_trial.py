"""The first forward and backward of a module, alone: what is wrong with it, or with a user's step, is found here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective, TrainingStep
from sparkdl.trial import materialise, try_module

COLUMNS = Columns(
    (Column("x", "input_0", "vector", "float32"),), (Column("y", "label_0", "scalar", "int64", flat=True),)
)
SAMPLE = {"input_0": torch.randn(2, 3), "label_0": torch.tensor([0, 1])}


def step_of(result: Callable[[Tensor, Tensor], Any]) -> TrainingStep:
    return TrainingStep(lambda module, batch: result(module(batch["x"]), batch["y"]), COLUMNS)


def entropy(output: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, label)


def test_what_a_step_returns_is_known_before_training() -> None:
    trial = try_module(
        nn.Linear(3, 2), step_of(lambda o, y: {"loss": entropy(o, y), "size": o.norm()}), SAMPLE, COLUMNS
    )
    assert (trial.logged, trial.unused, trial.outputs) == (("size",), False, 0)
    shown = TrainingStep(lambda module, batch: module(batch["x"]).sum(1), COLUMNS, binary=True, shows_output=True)
    assert try_module(nn.Linear(3, 1), shown, SAMPLE, COLUMNS).outputs == 2


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda o, y: {"loss": entropy(o, y), "epoch": 3},
            "returned 'epoch' beside the loss, but the history has such",
        ),
        (lambda o, y: {"loss": entropy(o, y), "validation_f1": 0.5}, "returned 'validation_f1' beside the loss"),
        (lambda o, y: {"accuracy": entropy(o, y)}, "returned a dict of 'accuracy', without 'loss'"),
        (lambda o, y: None, "The trainingStep returned a NoneType as 'loss'. Return tensors"),
        (lambda o, y: 0.5, "The trainingStep returned a float as 'loss'"),
        (lambda o, y: o[:1, 0], r"The trainingStep returned shape \(1,\) for 2 rows"),
        (
            lambda o, y: {"loss": entropy(o, y), "odd": o[0]},
            r"The trainingStep's 'odd' returned shape \(5,\) for 2 rows",
        ),
        (
            lambda o, y: o @ o,
            r"failed on its first rows, with the batch {'x': of shape \(2, 3\), float32, 'y': of shape",
        ),
    ],
)
def test_a_step_that_returns_no_loss_is_an_error_that_says_what_came(result: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        try_module(nn.Linear(3, 5), step_of(result), SAMPLE, COLUMNS)


def test_weights_need_a_loss_per_row() -> None:
    columns = Columns(COLUMNS.inputs, COLUMNS.labels, Column("w", "weight", "scalar", "float32", flat=True))
    sample = {**SAMPLE, "weight": torch.tensor([1.0, 3.0])}
    mean = TrainingStep(lambda module, batch: entropy(module(batch["x"]), batch["y"]), columns)
    with pytest.raises(ConfigError, match="weightCol is set, but the trainingStep returned one number for 2 rows"):
        try_module(nn.Linear(3, 2), mean, sample, columns)


def test_a_prediction_step_says_what_the_output_is() -> None:
    objective = Objective(
        nn.CrossEntropyLoss(), binary=True, prediction_step=lambda module, batch: module(batch["x"]), input_names=["x"]
    )
    assert try_module(nn.Linear(3, 4), objective, SAMPLE, COLUMNS).outputs == 4
    broken = Objective(nn.MSELoss(), prediction_step=lambda module, batch: module(batch["z"]), input_names=["x"])
    with pytest.raises(
        ConfigError, match=r"with 1 inputs in the predictionStep of shape \(2, 3\) float32.*KeyError: 'z'"
    ):
        try_module(nn.Linear(3, 4), broken, SAMPLE, COLUMNS)


def test_lazy_modules_get_their_shapes_without_rows() -> None:
    module = nn.LazyLinear(2)
    materialise(module, Objective(nn.MSELoss()), [("float32", (7,))])
    assert module.weight.shape == (2, 7)
