"""Optimizers by name or by function: what is made, and what is refused before anything starts."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pyspark import cloudpickle
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from sparkdl.errors import ConfigError
from sparkdl.optimizer import OptimizerRecipe, optimizer_names
from sparkdl.schedule import Schedule


def linear() -> nn.Linear:
    """A module with a weight of two dimensions and a bias of one."""
    return nn.Linear(2, 3)


class Net(nn.Module):
    """A layer, a normalisation and a head whose weights are the layer's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.head.weight = self.body.weight
        self.scale = nn.Parameter(torch.ones(()))


def only(recipe: OptimizerRecipe, module: nn.Module | None = None, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a recipe that makes one and no schedules."""
    (made,), schedules = recipe.build(module or linear(), **options)
    assert schedules is None
    return made


def members(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of the parameters of every group."""
    names = {id(value): name for name, value in module.named_parameters()}
    return [[names[id(value)] for value in group["params"]] for group in optimizer.param_groups]


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.25, momentum=0.5)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_name_makes_an_optimizer_that_steps(name: str) -> None:
    made = only(OptimizerRecipe(name, learning_rate=0.1), module := linear())
    values, before = list(module.parameters()), module.weight.detach().clone()
    assert type(made).__name__.lower() == name
    assert made.param_groups[0]["lr"] == 0.1
    for _ in range(3):
        made.zero_grad()
        sum(((value - 3) ** 2).sum() for value in values).backward()  # type: ignore[union-attr]
        made.step()
    assert not torch.equal(values[0].detach(), before)


def test_the_names_are_those_of_torch_without_what_cannot_work_here() -> None:
    names = optimizer_names()
    assert {"adam", "adamw", "sgd", "rmsprop", "adagrad"} <= set(names)
    assert not {"lbfgs", "sparseadam", "muon", "optimizer"} & set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW"])
def test_names_may_be_written_as_torch_writes_its_classes(name: str) -> None:
    assert type(only(OptimizerRecipe(name))) is torch.optim.AdamW
    assert type(only(OptimizerRecipe())) is torch.optim.AdamW


def test_the_learning_rate_of_a_name_is_a_thousandth_unless_given() -> None:
    assert only(OptimizerRecipe("sgd")).param_groups[0]["lr"] == 1e-3
    assert only(OptimizerRecipe("sgd", 0.5)).param_groups[0]["lr"] == 0.5


def test_further_arguments_reach_the_optimizer() -> None:
    group = only(OptimizerRecipe("sgd", 0.5, {"momentum": 0.9, "nesterov": True})).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, True)
    group = only(OptimizerRecipe("adamw", None, {"weight_decay": 0.3, "fused": False})).param_groups[0]
    assert (group["weight_decay"], group["fused"]) == (0.3, False)


@pytest.mark.parametrize("make", [sgd, lambda params: torch.optim.SGD(params, lr=0.25), torch.optim.SGD])
def test_a_function_of_the_parameters_makes_the_optimizer(make: Any) -> None:
    made = only(OptimizerRecipe(make), module := linear())
    assert isinstance(made, torch.optim.SGD)
    assert members(made, module) == [["weight", "bias"]]


@pytest.mark.parametrize("recipe", [OptimizerRecipe("adamw", 0.1, {"eps": 1e-6}), OptimizerRecipe(sgd)])
def test_a_recipe_travels(recipe: OptimizerRecipe) -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(recipe))
    before, after = (only(found).param_groups[0] for found in (recipe, copy))
    assert {name: value for name, value in before.items() if name != "params"} == {
        name: value for name, value in after.items() if name != "params"
    }


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_runs_in_one_kernel_unless_something_else_is_asked_for(name: str) -> None:
    assert only(OptimizerRecipe(name)).defaults["fused"] is True
    assert only(OptimizerRecipe(name, None, {"foreach": True})).defaults["fused"] is None
    grouped = only(OptimizerRecipe(name, parameter_groups={"bias": {"foreach": True}}))
    assert [group["fused"] for group in grouped.param_groups] == [None, None]


# ---- groups ----------------------------------------------------------------------------------------------------------
def test_frozen_parameters_are_left_out_and_tied_ones_are_there_once() -> None:
    module = Net()
    module.norm.requires_grad_(False)
    made = only(OptimizerRecipe("sgd"), module)
    assert members(made, module) == [["scale", "body.weight", "body.bias", "head.bias"]]
    assert members(only(OptimizerRecipe(sgd), module), module) == members(made, module)


def test_weight_decay_is_for_two_and_more_dimensions() -> None:
    made = only(OptimizerRecipe("adamw", weight_decay=0.2), module := Net())
    decays = [group["weight_decay"] for group in made.param_groups]
    assert dict(zip(decays, members(made, module), strict=True)) == {
        0.2: ["body.weight"],
        0.0: ["scale", "body.bias", "norm.weight", "norm.bias", "head.bias"],
    }
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Embedding(5, 2))
    made = only(OptimizerRecipe("sgd", weight_decay=0.2), module)
    assert [group["weight_decay"] for group in made.param_groups] == [0.2, 0.0]
    assert members(made, module) == [["0.weight", "1.weight"], ["0.bias"]]


def test_groups_get_their_options_by_the_first_pattern_that_is_found_in_the_name() -> None:
    groups = {"^head": {"lr": 1.0}, "bias$": {"momentum": 0.5}, r"norm\.w": {"lr": 0.25, "weight_decay": 0.5}}
    made = only(OptimizerRecipe("sgd", 0.1, {"momentum": 0.9}, parameter_groups=groups), module := Net())
    assert members(made, module) == [
        ["head.bias"],
        ["body.bias", "norm.bias"],
        ["norm.weight"],
        ["scale", "body.weight"],
    ]
    found = [(group["lr"], group["momentum"], group["weight_decay"]) for group in made.param_groups]
    assert found == [(1.0, 0.9, 0), (0.1, 0.5, 0), (0.25, 0.9, 0.5), (0.1, 0.9, 0)]


def test_groups_and_weight_decay_together() -> None:
    groups = {"body": {"lr": 1.0}, "norm": {"weight_decay": 0.5}}
    made = only(OptimizerRecipe("sgd", 0.1, weight_decay=0.2, parameter_groups=groups), module := Net())
    assert members(made, module) == [
        ["body.weight"],
        ["body.bias"],
        ["norm.weight", "norm.bias"],
        ["scale", "head.bias"],
    ]
    found = [(group["lr"], group["weight_decay"]) for group in made.param_groups]
    assert found == [(1.0, 0.2), (1.0, 0.0), (0.1, 0.5), (0.1, 0.0)]


def test_decayed_weights_are_those_that_hand_written_groups_give() -> None:
    torch.manual_seed(0)
    module, twin = Net(), Net()
    twin.load_state_dict(module.state_dict())
    made = only(OptimizerRecipe("adamw", 0.1, weight_decay=0.3), module)
    by_hand = torch.optim.AdamW(
        [
            {"params": [value for value in twin.parameters() if value.ndim > 1], "weight_decay": 0.3},
            {"params": [value for value in twin.parameters() if value.ndim < 2], "weight_decay": 0},
        ],
        lr=0.1,
        fused=True,
    )
    for _ in range(3):
        for net, optimizer in ((module, made), (twin, by_hand)):
            optimizer.zero_grad()
            sum((value**2).sum() for value in net.parameters()).backward()  # type: ignore[union-attr]
            optimizer.step()
    for value, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_all_learning_rates_of_a_name_are_scaled() -> None:
    recipe = OptimizerRecipe("sgd", 0.5, parameter_groups={"bias": {"lr": 2.0}, "weight": {"momentum": 0.5}})
    assert [group["lr"] for group in only(recipe, rate_scale=0.25).param_groups] == [0.5, 0.125]
    assert only(OptimizerRecipe("sgd", None, {"lr": 0.5}), rate_scale=4.0).param_groups[0]["lr"] == 2.0
    assert only(OptimizerRecipe("sgd"), rate_scale=2.0).param_groups[0]["lr"] == 2e-3
    assert recipe.parameter_groups["bias"] == {"lr": 2.0}


@pytest.mark.parametrize("kind", ["function", "configure"])
def test_a_learning_rate_that_cannot_be_reached_cannot_be_scaled(kind: str) -> None:
    recipe = OptimizerRecipe(sgd) if kind == "function" else OptimizerRecipe(configure=of_all)
    with pytest.raises(ConfigError, match=rf"learningRateScaling .* by 0\.5, but cannot reach .*{kind}"):
        recipe.build(linear(), rate_scale=0.5)


# ---- configure -------------------------------------------------------------------------------------------------------
def of_all(module: nn.Module) -> torch.optim.Optimizer:
    return sgd(module.parameters())


def two(module: nn.Module) -> list[torch.optim.Optimizer]:
    weight, bias = module.parameters()
    return [torch.optim.Adam([weight]), torch.optim.SGD([bias], lr=0.5)]


@pytest.mark.parametrize("form", [list, tuple])
def test_configure_returns_one_or_several_optimizers(form: Any) -> None:
    made, schedules = OptimizerRecipe(configure=of_all).build(linear())
    assert [type(one) for one in made] == [torch.optim.SGD]
    assert schedules == []
    made, schedules = OptimizerRecipe(configure=lambda module: form(two(module))).build(module := linear())
    assert [members(one, module) for one in made] == [[["weight"]], [["bias"]]]
    assert schedules == []


def test_configure_may_leave_parameters_out() -> None:
    made, _ = OptimizerRecipe(configure=lambda module: two(module)[0]).build(module := linear())
    assert [members(one, module) for one in made] == [[["weight"]]]


@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_configure_returns_schedulers_beside_the_optimizers(form: Any, interval: Any) -> None:
    def configure(module: nn.Module) -> Any:
        optimizers = two(module)
        own = Schedule(StepLR(optimizers[1], 3), "step")
        return form([optimizers, [StepLR(optimizers[0], 2), own, ReduceLROnPlateau(optimizers[0])]])

    made, schedules = OptimizerRecipe(configure=configure).build(linear(), interval=interval)
    assert schedules is not None
    assert [type(one).__name__ for one in made] == ["Adam", "SGD"]
    found = [(type(one.scheduler), one.interval, one.monitor) for one in schedules]
    assert found == [(StepLR, interval, None), (StepLR, "step", None), (ReduceLROnPlateau, interval, None)]


@pytest.mark.parametrize(
    ("make", "expected"), [(lambda one: (one, StepLR(one, 2)), 1), (lambda one: ([one], []), 0)], ids=["one", "none"]
)
def test_a_pair_may_hold_a_single_scheduler_or_none(make: Any, expected: int) -> None:
    made, schedules = OptimizerRecipe(configure=lambda module: make(of_all(module))).build(linear())
    assert (len(made), len(schedules or [])) == (1, expected)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda one: None, "None"),
        (lambda one: [], r"\[\]"),
        (lambda one: {"optimizer": one}, "dict"),
        (lambda one: [one, 3], r"\[SGD, int\]"),
        (lambda one: StepLR(one, 2), "StepLR"),
        (lambda one: ([one], [StepLR(one, 2), None]), r"\(\[SGD\], \[StepLR, None\]\)"),
        (lambda one: ([one], [one]), r"\(\[SGD\], \[SGD\]\)"),
        (lambda one: ([], [StepLR(one, 2)]), r"\(\[\], \[StepLR\]\)"),
        (lambda one: ([StepLR(one, 2)], [one]), r"\(\[StepLR\], \[SGD\]\)"),
        (lambda one: (one, StepLR(one, 2), "val"), r"\(SGD, StepLR, str\)"),
    ],
)
def test_what_configure_returned_wrongly_is_shown(make: Any, shown: str) -> None:
    recipe = OptimizerRecipe(configure=lambda module: make(of_all(module)))
    with pytest.raises(ConfigError, match=rf"^configure returned {shown}\. Return an optimizer, a list"):
        recipe.build(linear())


def test_an_optimizer_of_another_modules_parameters_is_refused() -> None:
    other = linear()
    with pytest.raises(ConfigError, match=r"\(SGD\) of none of the parameters that are trained\. Ranks train a copy"):
        OptimizerRecipe(configure=lambda module: of_all(other)).build(linear())


@pytest.mark.parametrize(
    "recipe",
    [
        OptimizerRecipe(torch.optim.LBFGS),
        OptimizerRecipe(configure=lambda module: torch.optim.LBFGS(module.parameters())),
    ],
)
def test_lbfgs_needs_more_than_one_gradient_in_a_step(recipe: OptimizerRecipe) -> None:
    with pytest.raises(ConfigError, match="LBFGS computes the loss several times in one step"):
        recipe.build(linear())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": "sgd"}, "optimizer"),
        ({"optimizer": sgd}, "optimizer"),
        ({"learning_rate": 0.1, "weight_decay": 0.0}, "learningRate and weightDecay"),
        ({"params": {"lr": 1}, "parameter_groups": {"x": {}}}, "optimizerParams and parameterGroups"),
    ],
)
def test_configure_and_the_settings_of_another_optimizer_contradict_each_other(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{named} cannot reach the optimizers of configure"):
        OptimizerRecipe(**settings, configure=of_all)


def test_configure_is_a_function() -> None:
    with pytest.raises(ConfigError, match=r"configure=\[1\] is not a function"):
        OptimizerRecipe(configure=[1])  # type: ignore[arg-type]


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
    assert only(OptimizerRecipe("sgd", None, {"lr": 0.5})).param_groups[0]["lr"] == 0.5


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
        recipe.build(linear())


def test_a_function_and_groups_contradict_each_other() -> None:
    with pytest.raises(
        ConfigError, match=r"^weightDecay and parameterGroups cannot reach an optimizer that is a function"
    ):
        OptimizerRecipe(sgd, weight_decay=0.1, parameter_groups={"bias": {"lr": 1.0}})


def test_a_module_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has nothing to train.*frozenParameters"):
        OptimizerRecipe("sgd").build(linear().requires_grad_(False))


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_a_weight_decay_below_zero_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"weightDecay=.* is no weight decay\. Use a number, 0 or above"):
        OptimizerRecipe("sgd", weight_decay=decay)


def test_two_weight_decays_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"weightDecay=0\.1 and optimizerParams=.*'weight_decay', are both set"):
        OptimizerRecipe("sgd", None, {"weight_decay": 0.1}, weight_decay=0.1)


def test_an_optimizer_without_weight_decay_is_refused_one() -> None:
    without = [name for name in optimizer_names() if "weight_decay" not in only(OptimizerRecipe(name)).defaults]
    for name in without:
        with pytest.raises(ConfigError, match=rf"optimizer='{name}' knows no weight decay"):
            OptimizerRecipe(name, weight_decay=0.1)
    assert "rprop" in without
    assert "adamw" not in without


@pytest.mark.parametrize("pattern", ["(", "*", 3])
def test_a_group_is_named_by_a_regular_expression(pattern: Any) -> None:
    with pytest.raises(ConfigError, match=r"parameterGroups has .*, which is no regular expression: .+"):
        OptimizerRecipe("sgd", parameter_groups={pattern: {"lr": 1.0}})


@pytest.mark.parametrize("options", [0.1, None, ["lr"]])
def test_options_of_a_group_are_a_dict(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"parameterGroups has 'bias': .*, which is no dict\. Give one"):
        OptimizerRecipe("adam", parameter_groups={"bias": options})


@pytest.mark.parametrize("options", [{"momentun": 0.9}, {"params": []}])
def test_options_that_the_optimizer_does_not_know_are_refused_with_those_it_knows(options: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"parameterGroups has 'bias': .*the options of optimizer='sgd' are .*lr, .*momentum, .*nesterov",
    ):
        OptimizerRecipe("sgd", parameter_groups={"bias": options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"momentum": "much"}, "not supported"),
        ({"nesterov": True}, "Nesterov"),
    ],
)
def test_options_that_do_not_suit_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"parameterGroups has 'bias': .*not suit optimizer='sgd': {reason}|{reason}"
    ):
        OptimizerRecipe("sgd", parameter_groups={"bias": options})


def test_a_pattern_that_changes_nothing_is_refused() -> None:
    recipe = OptimizerRecipe("sgd", parameter_groups={"bias": {"lr": 1.0}, "haed": {"lr": 2.0}})
    with pytest.raises(
        ConfigError, match=r"'haed', which applies to no trained parameter: it is found in no name\. .*body"
    ):
        recipe.build(Net())
    recipe = OptimizerRecipe("sgd", parameter_groups={"bias": {"lr": 1.0}, "head": {"lr": 2.0}})
    with pytest.raises(ConfigError, match=r"'head', which .*: patterns before it take all names"):
        recipe.build(Net())
    module = Net()
    module.norm.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'norm', which applies to no trained parameter"):
        OptimizerRecipe("sgd", parameter_groups={"norm": {"lr": 1.0}}).build(module)
