"""Optimizers by name or by function: what is made, and what is refused before anything starts."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pyspark import cloudpickle
from torch import nn

from sparkdl.errors import ConfigError
from sparkdl.optimizer import OptimizerRecipe, optimizer_names


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.25, momentum=0.5)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_name_makes_an_optimizer_that_steps(name: str) -> None:
    made = OptimizerRecipe(name, learning_rate=0.1).build(values := parameters())
    assert type(made).__name__.lower() == name
    assert made.param_groups[0]["lr"] == 0.1
    for _ in range(3):
        made.zero_grad()
        sum(((value - 3) ** 2).sum() for value in values).backward()  # type: ignore[union-attr]
        made.step()
    assert not torch.equal(values[0].detach(), torch.ones(3, 2))


def test_the_names_are_those_of_torch_without_what_cannot_work_here() -> None:
    names = optimizer_names()
    assert {"adam", "adamw", "sgd", "rmsprop", "adagrad"} <= set(names)
    assert not {"lbfgs", "sparseadam", "muon", "optimizer"} & set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW"])
def test_names_may_be_written_as_torch_writes_its_classes(name: str) -> None:
    assert type(OptimizerRecipe(name).build(parameters())) is torch.optim.AdamW


def test_the_learning_rate_of_a_name_is_a_thousandth_unless_given() -> None:
    assert OptimizerRecipe("sgd").build(parameters()).param_groups[0]["lr"] == 1e-3
    assert OptimizerRecipe("sgd", 0.5).build(parameters()).param_groups[0]["lr"] == 0.5


def test_further_arguments_reach_the_optimizer() -> None:
    group = OptimizerRecipe("sgd", 0.5, {"momentum": 0.9, "nesterov": True}).build(parameters()).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, True)
    group = OptimizerRecipe("adamw", None, {"weight_decay": 0.3, "fused": False}).build(parameters()).param_groups[0]
    assert (group["weight_decay"], group["fused"]) == (0.3, False)


@pytest.mark.parametrize("make", [sgd, lambda params: torch.optim.SGD(params, lr=0.25), torch.optim.SGD])
def test_a_function_of_the_parameters_makes_the_optimizer(make: Any) -> None:
    made = OptimizerRecipe(make).build(values := parameters())
    assert isinstance(made, torch.optim.SGD)
    assert [id(value) for value in made.param_groups[0]["params"]] == [id(value) for value in values]


@pytest.mark.parametrize("recipe", [OptimizerRecipe("adamw", 0.1, {"eps": 1e-6}), OptimizerRecipe(sgd)])
def test_a_recipe_travels(recipe: OptimizerRecipe) -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(recipe))
    before, after = (found.build(parameters()).param_groups[0] for found in (recipe, copy))
    assert {name: value for name, value in before.items() if name != "params"} == {
        name: value for name, value in after.items() if name != "params"
    }


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lbfgs", "muon", "sparseadam", "optimizer", "adamm", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"optimizer='{name}' is (not known|unknown)\. Use one of .*adamw, .*sgd, or a function"
    ):
        OptimizerRecipe(name)


@pytest.mark.parametrize("optimizer", [3, None, ["sgd"], torch.optim.SGD([nn.Parameter(torch.ones(1))])], ids=str)
def test_what_is_neither_a_name_nor_a_function_is_refused(optimizer: Any) -> None:
    with pytest.raises(ConfigError, match="is neither a name nor a function of the parameters"):
        OptimizerRecipe(optimizer)


@pytest.mark.parametrize("rate", [0.1, 1, 0.0])
def test_a_function_and_a_learning_rate_contradict_each_other(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"^learningRate cannot reach an optimizer that is a function\. .*lr=0\.1"):
        OptimizerRecipe(sgd, rate)


def test_a_function_and_arguments_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^optimizerParams cannot reach an optimizer that is a function"):
        OptimizerRecipe(sgd, None, {"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"^learningRate and optimizerParams cannot reach"):
        OptimizerRecipe(sgd, 0.1, {"momentum": 0.9})


def test_two_learning_rates_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"learningRate=0\.1 .*optimizerParams.*'lr'"):
        OptimizerRecipe("sgd", 0.1, {"lr": 0.5})
    assert OptimizerRecipe("sgd", None, {"lr": 0.5}).build(parameters()).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, float("nan")])
def test_a_learning_rate_that_does_not_learn_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"learningRate=.* does not learn\. Use a number above 0"):
        OptimizerRecipe("sgd", rate)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"momentun": 0.9}, "unexpected keyword argument 'momentun'"),
        ({"momentum": -1.0}, "Invalid momentum value"),
        ({"momentum": "much"}, "not supported between instances"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
    ids=str,
)
def test_arguments_that_do_not_suit_the_optimizer_are_refused_with_its_reason(
    params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"optimizerParams=.* do not suit optimizer='sgd': .*{reason}"):
        OptimizerRecipe("sgd", 0.1, params)


def test_a_function_that_returns_no_optimizer_is_named_by_what_it_returned() -> None:
    recipe = OptimizerRecipe(lambda params: next(iter(params)).shape)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"given as optimizer returned torch\.Size\(\[3, 2\]\), not a torch\.optim"):
        recipe.build(parameters())
