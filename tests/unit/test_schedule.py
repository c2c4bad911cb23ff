"""Learning rates over the steps: against torch's schedulers driven by hand, and against runs without a break."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyspark import cloudpickle
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as ls
from torch.optim.lr_scheduler import LRScheduler

from sparkdl.checkpoint import flatten_state, unflatten_state
from sparkdl.errors import ConfigError
from sparkdl.schedule import (
    Horizon,
    LearningRates,
    Schedule,
    SchedulerRecipe,
    scaled_rate_factor,
    scheduler_names,
    warmup_factor,
)

EPOCHS, STEPS = 4, 5
HORIZON = Horizon(STEPS, EPOCHS)
LOSSES = [3.0, 2.0, 2.5, 2.5]

# What a name needs besides its length; all names are here or need nothing.
PARAMS: dict[str, dict[str, Any]] = {
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 3, "mode": "triangular2"},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda position: 0.9**position},
    "MultiplicativeLR": {"lr_lambda": lambda position: 0.9},
    "MultiStepLR": {"milestones": [1, 3, 3]},
    "ReduceLROnPlateau": {"patience": 0, "min_lr": 0.01},
    "StepLR": {"step_size": 2},
}


class Decay:
    """A function with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, position: float) -> float:
        self.calls += 1
        return 0.9**self.calls


def sequential(optimizer: Optimizer) -> LRScheduler:
    parts = [
        ls.LinearLR(optimizer, 0.1, total_iters=3),
        ls.MultiStepLR(optimizer, [2, 5]),
        ls.ExponentialLR(optimizer, 0.9),
    ]
    return ls.SequentialLR(optimizer, parts, [2, 3])


def chained(optimizer: Optimizer) -> LRScheduler:
    return ls.ChainedScheduler([ls.MultiStepLR(optimizer, [1, 2]), ls.CosineAnnealingLR(optimizer, 9)])


FUNCTIONS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "sequential": sequential,
    "chained": chained,
    "function": lambda optimizer: ls.LambdaLR(optimizer, lambda position: 1 / (1 + position)),
    "function with a state": lambda optimizer: ls.LambdaLR(optimizer, Decay()),
    "one cycle in three phases": lambda optimizer: ls.OneCycleLR(optimizer, 0.7, 100, three_phase=True),
    "cyclic by function": lambda optimizer: ls.CyclicLR(optimizer, 0.1, 0.7, 2, scale_fn=lambda cycle: 0.5**cycle),
    "cyclic with a state": lambda optimizer: ls.CyclicLR(optimizer, 0.1, 0.7, 2, scale_fn=Decay()),
    "cyclic exp_range": lambda optimizer: ls.CyclicLR(optimizer, 0.1, 0.7, 2, mode="exp_range", gamma=0.9),
}
ALL = [*scheduler_names(), *FUNCTIONS]


def recipe_of(name: str, interval: Any) -> SchedulerRecipe:
    if name in FUNCTIONS:
        return SchedulerRecipe(FUNCTIONS[name], interval=interval)
    return SchedulerRecipe(name, PARAMS.get(name, {}), interval)


def make(kind: str = "sgd") -> Optimizer:
    """An optimizer of two groups, whose gradients are 1."""
    groups = [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}]
    for group in groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])  # type: ignore[index]
    return torch.optim.SGD(groups, lr=0.4, momentum=0.5) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.4)


def settings_of(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """All that schedulers change."""
    return [(group["lr"], group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]


def walk(rates: LearningRates, optimizer: Optimizer, first: int = 0, last: int = EPOCHS * STEPS) -> Iterator[list[Any]]:
    """Take steps as the loop does, and give what each of them used."""
    for step in range(first, last):
        before = settings_of(optimizer)
        told = rates.current(step)
        with rates.warmed(step):
            used = settings_of(optimizer)
            optimizer.step()
        assert told == [rate for rate, *_ in used]
        assert settings_of(optimizer) == before
        yield used
        rates.after_step(step + 1)
        if (step + 1) % STEPS == 0:
            rates.after_epoch({"loss": LOSSES[step // STEPS]})


# ---- arithmetic ------------------------------------------------------------------------------------------------------
@given(st.integers(1, 10_000), st.integers(0, 20_000))
def test_warm_up_rises_by_equal_amounts_to_one_and_stays(warmup_steps: int, step: int) -> None:
    factor = warmup_factor(step, warmup_steps)
    assert 0 < factor <= 1
    assert math.isclose(factor, min(step + 1, warmup_steps) / warmup_steps)
    assert warmup_factor(warmup_steps - 1, warmup_steps) == 1.0
    assert warmup_factor(step, 0) == 1.0


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(1, 100_000))
def test_scaling_over_two_batch_sizes_is_scaling_over_both_at_once(first: int, second: int, third: int) -> None:
    for scaling in ("none", "linear", "sqrt"):
        twice = scaled_rate_factor(second, first, scaling) * scaled_rate_factor(third, second, scaling)
        assert math.isclose(twice, scaled_rate_factor(third, first, scaling))
        assert scaled_rate_factor(first, first, scaling) == 1.0
    root = scaled_rate_factor(second, first, "sqrt")
    assert math.isclose(root * root, scaled_rate_factor(second, first, "linear"))


def test_the_published_example_of_linear_scaling() -> None:
    assert 0.1 * scaled_rate_factor(8192, 256, "linear") == 3.2  # Goyal et al. 2017: ImageNet in one hour
    assert 0.1 * scaled_rate_factor(1024, 256, "sqrt") == 0.2
    assert scaled_rate_factor(8192, 256, "none") == 1.0


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 2000))
def test_a_horizon_counts_the_positions_of_a_scheduler(steps: int, epochs: int, warmup_steps: int) -> None:
    horizon = Horizon(steps, epochs, warmup_steps)
    assert horizon.length("epoch") == epochs
    assert horizon.length("step") == max(1, steps * epochs - warmup_steps)


# ---- names -----------------------------------------------------------------------------------------------------------
def test_the_names_are_the_classes_of_torch_that_stand_on_their_own() -> None:
    assert set(scheduler_names()) == set(ls.__all__) - {"LRScheduler", "SequentialLR", "ChainedScheduler"}
    assert scheduler_names() == sorted(scheduler_names())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CosineAnnealingLR", ls.CosineAnnealingLR),
        ("cosineannealinglr", ls.CosineAnnealingLR),
        ("CosineAnnealing", ls.CosineAnnealingLR),
        ("onecycle", ls.OneCycleLR),
        ("LINEAR", ls.LinearLR),
        ("reducelronplateau", ls.ReduceLROnPlateau),
    ],
)
def test_names_are_known_in_any_case_and_without_lr(name: str, expected: type[LRScheduler]) -> None:
    assert type(SchedulerRecipe(name).build(make(), HORIZON).scheduler) is expected


@pytest.mark.parametrize("name", ["cosine", "sequential", "ChainedScheduler", "LRScheduler", "lr", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"scheduler='{name}' is unknown\. Use one of .*CosineAnnealingLR, .*StepLR, or a"
    ):
        SchedulerRecipe(name)


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("StepLR", {}, "step_size"),
        ("StepLR", {"step_sise": 2}, "step_sise"),
        ("CosineAnnealingWarmRestarts", {"T_0": 0}, "Expected positive integer T_0"),
        ("OneCycleLR", {"pct_start": 2.0}, "pct_start"),
        ("ReduceLROnPlateau", {"mode": "larger"}, "mode larger is unknown"),
        ("CyclicLR", {"base_lr": [0.1, 0.2], "max_lr": [1.0, 1.0, 1.0]}, "same length"),
    ],
)
def test_arguments_that_do_not_suit_the_scheduler_are_refused_with_its_reason(
    name: str, params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"schedulerParams=.* do not suit scheduler='{name}' .*: .*{reason}"):
        SchedulerRecipe(name, params)


def test_arguments_that_do_not_suit_the_optimizer_are_refused_when_it_is_there() -> None:
    recipe = SchedulerRecipe("OneCycleLR")
    with pytest.raises(ConfigError, match=r"with the optimizer Adagrad: optimizer must support momentum"):
        recipe.build(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), HORIZON)


def test_arguments_may_have_one_value_per_group() -> None:
    params = {"base_lr": [0.1, 0.2], "max_lr": [1.0, 2.0]}
    optimizer = make()
    SchedulerRecipe("CyclicLR", params).build(optimizer, HORIZON)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("scheduler", [3, None, ["StepLR"]], ids=str)
def test_what_is_neither_a_name_nor_a_function_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match="is neither a name nor a function of the optimizer"):
        SchedulerRecipe(scheduler)


def test_a_function_and_arguments_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^schedulerParams cannot reach a scheduler that is a function\."):
        SchedulerRecipe(sequential, {"gamma": 0.5})


def test_a_function_that_returns_no_scheduler_is_named_by_what_it_returned() -> None:
    recipe = SchedulerRecipe(lambda optimizer: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="The function given as scheduler returned 3, neither a scheduler"):
        recipe.build(make(), HORIZON)


def test_a_function_may_say_when_its_scheduler_steps() -> None:
    own = SchedulerRecipe(lambda optimizer: Schedule(ls.StepLR(optimizer, 2), "step"), interval="epoch")
    assert own.build(make(), HORIZON).interval == "step"
    assert SchedulerRecipe(sequential, interval="step").build(make(), HORIZON).interval == "step"


def test_a_schedule_needs_a_scheduler_and_a_known_interval() -> None:
    with pytest.raises(ConfigError, match=r"A schedule needs a scheduler of torch\.optim\.lr_scheduler, but got 0\.1"):
        Schedule(0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"interval='batch' is not known\. Use 'step' or 'epoch'"):
        Schedule(ls.StepLR(make(), 2), "batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ALL)
def test_a_recipe_travels(name: str, interval: str) -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(recipe_of(name, interval)))
    schedule = copy.build(make(), HORIZON)
    assert isinstance(schedule.scheduler, LRScheduler)
    assert schedule.interval == interval


# ---- lengths ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("CosineAnnealingLR", "T_max"),
        ("OneCycleLR", "total_steps"),
        ("LinearLR", "total_iters"),
        ("ConstantLR", "total_iters"),
        ("PolynomialLR", "total_iters"),
    ],
)
def test_a_length_that_is_left_out_is_that_of_the_fit(name: str, attribute: str) -> None:
    horizon = Horizon(STEPS, EPOCHS, warmup_steps=3)
    for interval, expected in (("epoch", EPOCHS), ("step", EPOCHS * STEPS - 3)):
        recipe = SchedulerRecipe(name, {}, interval)  # type: ignore[arg-type]
        assert getattr(recipe.build(make(), horizon).scheduler, attribute) == expected
    own = SchedulerRecipe(name, {attribute: 99}, "step").build(make(), horizon)
    assert getattr(own.scheduler, attribute) == 99


def test_one_cycle_may_be_given_its_length_as_epochs_and_steps() -> None:
    own = SchedulerRecipe("OneCycleLR", {"epochs": 7, "steps_per_epoch": 11}, "step").build(make(), HORIZON)
    assert own.scheduler.total_steps == 77  # type: ignore[attr-defined]


def test_one_cycle_rises_to_the_learning_rate_of_the_optimizer() -> None:
    optimizer = make()
    rates = LearningRates([optimizer], [SchedulerRecipe("OneCycleLR", interval="step").build(optimizer, HORIZON)])
    used = [[rate for rate, *_ in groups] for groups in walk(rates, optimizer)]
    assert [max(group) for group in zip(*used, strict=True)] == pytest.approx([0.4, 0.2], rel=0.02)
    by_hand = SchedulerRecipe("OneCycleLR", {"max_lr": 0.3}, "step").build(optimizer, HORIZON)
    assert by_hand.scheduler.optimizer.param_groups[0]["max_lr"] == 0.3


@pytest.mark.parametrize(
    "recipe",
    [
        SchedulerRecipe("OneCycleLR", {"total_steps": 19}, "step"),
        SchedulerRecipe(lambda optimizer: Schedule(ls.OneCycleLR(optimizer, 0.1, 19), "step")),
    ],
)
def test_one_cycle_that_ends_before_the_fit_does_is_refused(recipe: SchedulerRecipe) -> None:
    with pytest.raises(ConfigError, match="OneCycleLR ends after 19 steps, but the fit has 20 to schedule"):
        recipe.build(make(), HORIZON)
    recipe.build(make(), Horizon(STEPS, EPOCHS, warmup_steps=1))


@pytest.mark.parametrize("warmup_steps", [0, 1, 3, EPOCHS * STEPS - 1, EPOCHS * STEPS, 100])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_one_cycle_ends_with_the_fit_whatever_the_warm_up(interval: Any, warmup_steps: int) -> None:
    optimizer = make()
    horizon = Horizon(STEPS, EPOCHS, warmup_steps)
    schedule = SchedulerRecipe("OneCycleLR", {"max_lr": 1.0}, interval).build(optimizer, horizon)
    last = list(walk(LearningRates([optimizer], [schedule], warmup_steps), optimizer))[-1][0][0]
    if warmup_steps < EPOCHS * STEPS - 1:
        assert last == pytest.approx(1.0 / 25 / 1e4)


# ---- against torch ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ALL)
def test_rates_and_momenta_are_those_of_torchs_scheduler_driven_by_hand(name: str, interval: Any, kind: str) -> None:
    optimizer, twin = make(kind), make(kind)
    found = list(walk(LearningRates([optimizer], [recipe_of(name, interval).build(optimizer, HORIZON)]), optimizer))

    scheduler = recipe_of(name, interval).build(twin, HORIZON).scheduler
    expected = []
    for epoch in range(EPOCHS):
        for _ in range(STEPS):
            expected.append(settings_of(twin))
            twin.step()
            if interval == "step" and name != "ReduceLROnPlateau":
                scheduler.step()
        if name == "ReduceLROnPlateau":
            scheduler.step(LOSSES[epoch])  # type: ignore[arg-type]
        elif interval == "epoch":
            scheduler.step()
    assert found == expected
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert torch.equal(group["params"][0], other["params"][0])
    if name not in ("ConstantLR",):
        assert len({str(used) for used in found}) > 1, "nothing was scheduled"


@pytest.mark.parametrize("name", [name for name in ALL if name != "ReduceLROnPlateau"])
def test_a_schedule_of_steps_begins_after_the_warm_up(name: str) -> None:
    optimizer, twin = make(), make()
    schedule = recipe_of(name, "step").build(optimizer, Horizon(STEPS, EPOCHS, 6))
    found = list(walk(LearningRates([optimizer], [schedule], 6), optimizer))

    scheduler = recipe_of(name, "step").build(twin, Horizon(STEPS, EPOCHS, 6)).scheduler
    first = settings_of(twin)
    for step in range(6):
        for used, whole in zip(found[step], first, strict=True):
            assert used == (whole[0] * ((step + 1) / 6), *whole[1:])
    for used in found[6:]:
        assert used == settings_of(twin)
        twin.step()
        scheduler.step()


def test_a_schedule_of_epochs_goes_on_during_the_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = LearningRates([optimizer], [Schedule(ls.StepLR(optimizer, 1, gamma=0.5))], warmup_steps=8)
    found = [used[0][0] for used in walk(rates, optimizer)]
    assert found == pytest.approx(
        [(step + 1) / 8 for step in range(5)] + [0.5 * n / 8 for n in (6, 7, 8, 8, 8)] + [0.25] * 5 + [0.125] * 5
    )


def test_weights_move_by_the_rates_that_are_told() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = SchedulerRecipe("CosineAnnealingLR", interval="step").build(optimizer, Horizon(STEPS, EPOCHS, 3))
    rates = LearningRates([optimizer], [schedule], warmup_steps=3)
    told = []
    for step in range(20):
        told.append(rates.current(step)[0])
        with rates.warmed(step):
            optimizer.step()
        rates.after_step(step + 1)
        assert weight.item() == pytest.approx(-sum(told), abs=1e-15)


def test_several_schedules_and_optimizers() -> None:
    first, second = make(), make("adamw")
    twins = [make(), make("adamw")]
    by_hand = [ls.ExponentialLR(twins[0], 0.9), ls.StepLR(twins[0], 3), ls.OneCycleLR(twins[1], 0.3, 20)]
    schedules = [
        Schedule(ls.ExponentialLR(first, 0.9), "step"),
        Schedule(ls.StepLR(first, 3), "step"),
        Schedule(ls.OneCycleLR(second, 0.3, 20), "step"),
    ]
    rates = LearningRates([first, second], schedules)
    for step in range(20):
        assert rates.current(step) == [group["lr"] for twin in twins for group in twin.param_groups]
        assert [settings_of(one) for one in (first, second)] == [settings_of(one) for one in twins]
        for one in twins:
            one.step()
        for scheduler in by_hand:
            scheduler.step()
        with rates.warmed(step):
            first.step()
            second.step()
        rates.after_step(step + 1)


def test_a_rate_that_is_a_tensor_is_warmed_and_restored() -> None:
    weight = nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([weight], lr=rate)
    rates = LearningRates([optimizer], [Schedule(ls.ExponentialLR(optimizer, 0.5), "step")], warmup_steps=2)
    kept = optimizer.param_groups[0]["lr"]
    assert rates.current(0) == [0.25]
    with rates.warmed(0):
        assert optimizer.param_groups[0]["lr"].item() == 0.25
    assert optimizer.param_groups[0]["lr"] is kept
    assert kept.item() == 0.5
    for step in (1, 2, 3):
        rates.after_step(step)
    assert rates.current(3) == [0.25]


def test_rates_are_restored_after_a_step_that_failed() -> None:
    optimizer = make()
    rates = LearningRates([optimizer], warmup_steps=10)
    told = rates.current(3)

    def fail() -> None:
        with rates.warmed(3):
            assert [group["lr"] for group in optimizer.param_groups] == told == pytest.approx([0.16, 0.08])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]


@pytest.mark.parametrize("name", ALL)
def test_steps_that_are_left_out_are_counted_and_do_not_warn(name: str) -> None:
    optimizer, twin = make(), make()
    rates = LearningRates([optimizer], [recipe_of(name, "step").build(optimizer, HORIZON)])
    expected = list(walk(LearningRates([twin], [recipe_of(name, "step").build(twin, HORIZON)]), twin))
    for step in range(20):  # warnings are errors here
        assert settings_of(optimizer) == expected[step]
        rates.after_step(step + 1)
        if (step + 1) % STEPS == 0:
            rates.after_epoch({"loss": LOSSES[step // STEPS]})


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"StepLR belongs to an optimizer \(AdamW\) that is not one of the run's"):
        LearningRates([make()], [Schedule(ls.StepLR(make("adamw"), 2))])


# ---- on a metric -----------------------------------------------------------------------------------------------------
def test_a_plateau_is_looked_for_where_it_is_said() -> None:
    record = {"loss": 5.0, "validation_loss": 4.0, "validation_f1": 0.5}
    for own, run, expected in [
        (None, None, 4.0),
        (None, "loss", 5.0),
        ("validation_f1", "loss", 0.5),
    ]:
        optimizer = make()
        schedule = Schedule(ls.ReduceLROnPlateau(optimizer), "step", own)
        rates = LearningRates([optimizer], [schedule])
        rates.after_step(1)
        assert math.isinf(schedule.scheduler.best)  # type: ignore[attr-defined]
        rates.after_epoch(record, run)
        assert schedule.scheduler.best == expected  # type: ignore[attr-defined]
    optimizer = make()
    schedule = Schedule(ls.ReduceLROnPlateau(optimizer))
    LearningRates([optimizer], [schedule]).after_epoch({"loss": 5.0})
    assert schedule.scheduler.best == 5.0  # type: ignore[attr-defined]


def test_a_value_that_is_missing_is_named_beside_those_that_are_there() -> None:
    optimizer = make()
    rates = LearningRates([optimizer], [SchedulerRecipe("ReduceLROnPlateau").build(optimizer, HORIZON)])
    with pytest.raises(ConfigError, match=r"looks at 'validation_f1', but .* only epoch, loss\. Set monitor"):
        rates.after_epoch({"loss": 1.0, "epoch": 1}, "validation_f1")


def test_which_way_is_better_reaches_the_scheduler_unless_its_arguments_say_it() -> None:
    def mode(recipe: SchedulerRecipe) -> str:
        return recipe.build(make(), HORIZON).scheduler.mode  # type: ignore[attr-defined, no-any-return]

    assert mode(SchedulerRecipe("ReduceLROnPlateau")) == "min"
    assert mode(SchedulerRecipe("ReduceLROnPlateau", mode="max")) == "max"
    assert mode(SchedulerRecipe("ReduceLROnPlateau", {"mode": "min"}, mode="max")) == "min"


# ---- going on --------------------------------------------------------------------------------------------------------
def through_a_checkpoint(state: Any) -> Any:
    tensors, structure = flatten_state(state)
    return unflatten_state(tensors, json.loads(json.dumps(structure)))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_has_the_rates_of_one_without_a_break(name: str, interval: Any, kind: str) -> None:
    warmup_steps = 7 if kind == "sgd" else 0
    horizon = Horizon(STEPS, EPOCHS, warmup_steps)

    def begin() -> tuple[Optimizer, LearningRates]:
        optimizer = make(kind)
        return optimizer, LearningRates(
            [optimizer], [recipe_of(name, interval).build(optimizer, horizon)], warmup_steps
        )

    optimizer, rates = begin()
    expected = list(walk(rates, optimizer))
    for stop in (1, 4, 5, 11, 18):
        optimizer, rates = begin()
        found = list(walk(rates, optimizer, 0, stop))
        state = through_a_checkpoint({"optimizer": optimizer.state_dict(), "rates": rates.state_dict()})
        optimizer, rates = begin()
        if stop % 2:
            rates.load_state_dict(state["rates"])
        optimizer.load_state_dict(state["optimizer"])
        if not stop % 2:
            rates.load_state_dict(state["rates"])
        assert found + list(walk(rates, optimizer, stop)) == expected


def test_what_was_loaded_is_not_changed_by_going_on() -> None:
    optimizer = make()
    rates = LearningRates([optimizer], [Schedule(sequential(optimizer), "step"), Schedule(chained(optimizer), "step")])
    state = through_a_checkpoint(rates.state_dict())
    text = json.dumps(flatten_state(state)[1])
    rates.load_state_dict(state)
    list(walk(rates, optimizer))
    assert json.dumps(flatten_state(state)[1]) == text


def test_the_state_of_other_schedulers_is_refused() -> None:
    optimizer, other = make(), make()
    state = LearningRates([optimizer], [Schedule(ls.StepLR(optimizer, 2))]).state_dict()
    rates = LearningRates([other], [Schedule(ls.ExponentialLR(other, 0.5))])
    with pytest.raises(ConfigError, match=r"has the schedulers \['StepLR'\], this run has \['ExponentialLR'\]"):
        rates.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"this run has \[\]"):
        LearningRates([other]).load_state_dict(state)
