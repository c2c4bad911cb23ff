"""What the training loop can be told, on two ranks, against one plain process that does the same by hand."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparkdl import Callback
from sparkdl.batch import Batch
from sparkdl.callbacks import Callbacks, RunView
from sparkdl.config import Column, Columns, TrainConfig
from sparkdl.errors import CallbackError, ConfigError
from sparkdl.objective import Objective, TrainingStep
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel, Setting
from sparkdl.preparation import freeze_parameters, prepare_module
from sparkdl.schedule import SchedulerRecipe
from sparkdl.trainer import Trainer
from tests.dist.conftest import Torchrun
from tests.dist.test_trainer import BATCH, EPOCHS, SLICES, Case, HandMade, global_batches, mlp

pytestmark = [pytest.mark.dist, pytest.mark.timeout(250)]

RATE = 0.3
SGD = OptimizerRecipe("sgd", RATE, {"momentum": 0.9})
COLUMNS = Columns(
    (Column("features", "input_0", "vector", "float64"),), (Column("label", "label_0", "scalar", "int64", flat=True),)
)


def normed() -> nn.Module:
    """A module whose rows depend on each other."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def dropping() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh()), nn.Linear(8, 3)).double()


class OddRow(nn.Module):
    """Gives no numbers for the batch that holds one certain row."""

    def __init__(self, marked: float) -> None:
        super().__init__()
        self.inner, self.marked = normed(), marked

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features)
        return found * torch.nan if (features[:, 0] == self.marked).any() else found


class Narrow(nn.Module):
    """Has no memory for more than three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.most = mlp(), 0

    def forward(self, features: Tensor) -> Tensor:
        self.most = max(self.most, len(features))
        if len(features) > 3 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        found: Tensor = self.inner(features)
        return found


class Single(nn.Module):
    """Computes in single precision, whatever it is given: autocast leaves doubles alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp().float()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features.float())
        return found


class Diary(Callback):
    """Writes down what it sees."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def on_fit_start(self, run: RunView) -> None:
        self.lines.append(("start", run.rank, run.world_size, run.num_epochs, run.steps_per_epoch))

    def on_step_end(self, run: RunView) -> None:
        self.lines.append(("step", run.epoch, run.step, run.learning_rate))

    def on_validation_end(self, run: RunView, metrics: Mapping[str, float]) -> None:
        self.lines.append(("validation", run.epoch, sorted(metrics)))

    def on_epoch_end(self, run: RunView) -> None:
        assert run.loss == run.history[-1]["loss"]
        self.lines.append(("epoch", run.epoch, len(run.history)))

    def on_fit_end(self, run: RunView) -> None:
        self.lines.append(("end", run.step))


class Clumsy(Callback):
    """Fails on all ranks after the third step."""

    seen = ""

    def on_step_end(self, run: RunView) -> None:
        if run.step == 3:
            raise KeyError("three")

    def on_exception(self, run: RunView, error: BaseException) -> None:
        self.seen = str(error)


def two_losses(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training step with a loss per row and further numbers."""
    output = module(batch["features"])
    size = output.square().sum(1)
    entropy = nn.functional.cross_entropy(output, batch["label"], reduction="none")
    return {"loss": entropy + 0.1 * size, "size": size, "entropy": entropy.mean()}


def train(
    make: Callable[[], nn.Module] = mlp,
    recipe: OptimizerRecipe = SGD,
    *,
    objective: Callable[[], Objective] = lambda: Objective(nn.CrossEntropyLoss()),
    scheduler: SchedulerRecipe | None = None,
    callbacks: Callbacks = Callbacks(),  # noqa: B008 - a value
    logged: tuple[str, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """One fit of this rank."""
    config = TrainConfig(max_epochs=EPOCHS, **{"batch_size": BATCH, "base_batch_size": BATCH, "seed": 4, **settings})
    case, loss = Case(), objective()
    module = make()
    freeze_parameters(module, config.frozen_parameters)
    module = prepare_module(module, config)
    strategy = DataParallel()
    build = optimization_builder(recipe, scheduler, config, steps_per_epoch=len(SLICES))
    strategy.prepare(module, loss, build, config, Setting(case.rows(0, 2), False))
    trainer = Trainer(
        strategy, loss, config, device=torch.device("cpu"), has_validation=True, callbacks=callbacks, logged=logged
    )
    error = ""
    try:
        trainer.fit(HandMade(case, dist.get_rank()))
    except (CallbackError, ConfigError) as found:
        error = str(found)
    strategy.close()
    return {
        "weights": {name: value.clone() for name, value in trainer.gather().state_dict().items()},
        "history": [dict(record) for record in trainer.history],
        "micro_batch_size": strategy.micro_batch_size,
        "error": error,
        "best": trainer.best_epoch,
    }


def marked_row() -> float:
    """A number of one row: rank 1's in the third step of the second epoch."""
    return float(global_batches(Case(), 1)[2].inputs[0][-1, 0])


def two_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    first, last = module[0], module[2]  # type: ignore[index]
    return [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.Adam(last.parameters(), lr=0.01)]


def tripled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 12.0)


COSINE = SchedulerRecipe("CosineAnnealingLR", {}, "step")
DIVERGING = SchedulerRecipe(tripled, {}, "epoch")
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": train,
    "clipped by norm": partial(train, gradient_clip_norm=0.1),
    "clipped by value": partial(train, gradient_clip_value=0.02),
    "ema": partial(train, averaging="ema", averaging_decay=0.8),
    "ema from the second epoch on": partial(train, averaging="ema", averaging_decay=0.8, averaging_start=2),
    "swa": partial(train, averaging="swa", averaging_start=2),
    "cosine": partial(train, scheduler=COSINE, warmup_steps=3),
    "scaled": partial(train, base_batch_size=4 * BATCH, learning_rate_scaling="linear"),
    "frozen": partial(train, frozen_parameters=("^0\\.",)),
    "two optimizers": partial(train, recipe=OptimizerRecipe(configure=two_optimizers)),
    "decayed": partial(train, recipe=OptimizerRecipe("adamw", 0.01, weight_decay=0.5)),
    "skipped": partial(train, lambda: OddRow(marked_row()), non_finite="skip"),
    "out of memory": partial(train, Narrow),
    "synchronised": partial(train, normed, sync_batch_norm=True),
    "synchronised in pieces": partial(train, normed, sync_batch_norm=True, micro_batch_size=100),
    "synchronised in small pieces": partial(train, normed, sync_batch_norm=True, micro_batch_size=2),
    "dropping": partial(train, dropping),
    "recomputed": partial(train, dropping, activation_checkpointing=("0",)),
    "32": partial(train, Single),
    "bf16": partial(train, Single, precision="bf16"),
    "16": partial(train, Single, precision="16"),
    "two losses": partial(
        train, objective=lambda: TrainingStep(two_losses, COLUMNS), logged=("size", "entropy"), micro_batch_size=2
    ),
    "stopped": partial(train, scheduler=DIVERGING, early_stopping_patience=1, restore_best=True),
    "not restored": partial(train, scheduler=DIVERGING, early_stopping_patience=1),
    "no such entry": partial(train, restore_best=True, monitor="validation_accuracy"),
}


def train_all() -> dict[str, Any]:
    """Every scenario in turn, in one group of ranks."""
    results = {name: scenario() for name, scenario in SCENARIOS.items()}
    diary, clumsy = Diary(), Clumsy()
    results["diary"] = {**train(callbacks=Callbacks([diary])), "lines": diary.lines}
    results["clumsy"] = {**train(callbacks=Callbacks([clumsy])), "seen": clumsy.seen}
    return results


@pytest.fixture(scope="module")
def results(torchrun: Torchrun) -> list[dict[str, Any]]:
    """What the two ranks found."""
    return torchrun(train_all, 2)


# ---- the oracle ------------------------------------------------------------------------------------------------------
def plainly(
    make: Callable[[], nn.Module] = mlp,
    *,
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] | None = None,
    before_step: Callable[[nn.Module], Any] = lambda module: None,
    after_step: Callable[[nn.Module, int], Any] = lambda module, step: None,
    after_epoch: Callable[[nn.Module, int], Any] = lambda module, epoch: None,
    rate: Callable[[int], float] = lambda step: RATE,
    skip: Callable[[Batch], bool] = lambda batch: False,
) -> nn.Module:
    """One process, whole batches, no part of the library."""
    module = make()
    made = optimizers(module) if optimizers else [torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)]
    step = 0
    for epoch in range(EPOCHS):
        for batch in global_batches(Case(), epoch):
            if not optimizers:
                made[0].param_groups[0]["lr"] = rate(step)
            module.zero_grad()
            nn.functional.cross_entropy(module(batch.inputs[0]), batch.labels[0]).backward()
            if not skip(batch):
                before_step(module)
                for optimizer in made:
                    optimizer.step()
            step += 1
            after_step(module, step)
        after_epoch(module, epoch)
    return module


def assert_same(found: Mapping[str, Tensor], expected: nn.Module, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(dict(found), dict(expected.state_dict()), rtol=tolerance, atol=tolerance)


def validation_loss(module: nn.Module) -> float:
    rows = Case().rows(99, 12)
    with torch.no_grad():
        return nn.functional.cross_entropy(module.eval()(rows.inputs[0]), rows.labels[0]).item()


# ---- gradients and weights -------------------------------------------------------------------------------------------
def test_both_ranks_always_end_with_the_same_bits(results: list[dict[str, Any]]) -> None:
    for name in set(SCENARIOS) - {"no such entry"}:
        for key, value in results[0][name]["weights"].items():
            if "running" not in key and "num_batches" not in key:
                assert torch.equal(value, results[1][name]["weights"][key]), (name, key)


def test_gradients_of_the_global_batch_are_clipped(results: list[dict[str, Any]]) -> None:
    by_norm = plainly(before_step=lambda module: clip_grad_norm_(module.parameters(), 0.1))
    assert_same(results[0]["clipped by norm"]["weights"], by_norm, 1e-6)  # the norm is divided by with 1e-6 added
    by_value = plainly(before_step=lambda module: clip_grad_value_(module.parameters(), 0.02))
    assert_same(results[0]["clipped by value"]["weights"], by_value)


@pytest.mark.parametrize(("name", "start"), [("ema", 0), ("ema from the second epoch on", len(SLICES))])
def test_a_moving_average_is_what_is_validated_and_returned(
    results: list[dict[str, Any]], name: str, start: int
) -> None:
    average = AveragedModel(mlp(), multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    plainly(after_step=lambda module, step: average.update_parameters(module) if step > start else None)
    assert_same(results[0][name]["weights"], average.module)
    assert results[0][name]["history"][-1]["validation_loss"] == pytest.approx(validation_loss(average.module))


def test_the_weights_of_the_epochs_are_averaged(results: list[dict[str, Any]]) -> None:
    average = AveragedModel(mlp())
    plainly(after_epoch=lambda module, epoch: average.update_parameters(module) if epoch >= 1 else None)
    assert_same(results[0]["swa"]["weights"], average.module)


def test_the_rate_warms_up_and_then_follows_its_schedule(results: list[dict[str, Any]]) -> None:
    total = EPOCHS * len(SLICES) - 3

    def rate(step: int) -> float:
        if step < 3:
            return RATE * (step + 1) / 3
        probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(probe, total)
        for _ in range(step - 3):
            probe.step()
            cosine.step()
        return float(cosine.get_last_lr()[0])

    assert_same(results[0]["cosine"]["weights"], plainly(rate=rate))


def test_the_rate_is_scaled_with_the_batch(results: list[dict[str, Any]]) -> None:
    assert_same(results[0]["scaled"]["weights"], plainly(rate=lambda step: RATE / 4))
    assert results[0]["scaled"]["history"][0]["learning_rate"] == pytest.approx(RATE / 4)


def test_frozen_parameters_stay_as_they_are(results: list[dict[str, Any]]) -> None:
    start, found = mlp().state_dict(), results[0]["frozen"]["weights"]
    assert {name for name in found if torch.equal(found[name], start[name])} == {"0.weight", "0.bias"}
    assert_same(
        found,
        plainly(optimizers=lambda module: [torch.optim.SGD(list(module.parameters())[2:], lr=RATE, momentum=0.9)]),
    )


def test_several_optimizers_each_have_their_parameters(results: list[dict[str, Any]]) -> None:
    assert_same(results[0]["two optimizers"]["weights"], plainly(optimizers=two_optimizers))


def test_weights_decay_and_biases_do_not(results: list[dict[str, Any]]) -> None:
    def decayed(module: nn.Module) -> list[torch.optim.Optimizer]:
        values = list(module.parameters())
        groups = [
            {"params": [value for value in values if value.ndim > 1], "weight_decay": 0.5},
            {"params": [value for value in values if value.ndim < 2], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=0.01)]

    assert_same(results[0]["decayed"]["weights"], plainly(optimizers=decayed), 1e-7)


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(results: list[dict[str, Any]]) -> None:
    marked = marked_row()
    for rank in results:
        history = rank["skipped"]["history"]
        assert [record["skipped_steps"] for record in history] == [0, 1, 0]
        assert all(torch.isfinite(value).all() for value in rank["skipped"]["weights"].values())
        assert all(0 < record["loss"] < 10 for record in history)
    slopes = nn.ModuleDict({"inner": normed()})
    assert set(results[0]["skipped"]["weights"]) == set(slopes.state_dict())
    assert marked in global_batches(Case(), 1)[2].inputs[0]
    # One of the steps was taken less often: BatchNorm's own count says so.
    assert int(results[0]["skipped"]["weights"]["inner.1.num_batches_tracked"]) < EPOCHS * len(SLICES)


def test_a_rank_without_memory_halves_its_micro_batches_and_ends_with_the_same_weights(
    results: list[dict[str, Any]],
) -> None:
    expected = plainly()
    found = {name.removeprefix("inner."): value for name, value in results[0]["out of memory"]["weights"].items()}
    assert_same(found, expected)
    for rank in results:
        assert rank["out of memory"]["micro_batch_size"] in (2, 3)


@pytest.mark.parametrize("name", ["synchronised", "synchronised in pieces"])
def test_batch_norm_over_ranks_is_batch_norm_over_the_global_batch(results: list[dict[str, Any]], name: str) -> None:
    expected = plainly(normed)
    for rank in results:
        assert_same(rank[name]["weights"], expected)


def test_ranks_with_unequal_rows_make_as_many_micro_batches_where_batch_norm_waits(
    results: list[dict[str, Any]],
) -> None:
    assert results[0]["synchronised in small pieces"]["history"][-1]["rows"] == 40


def test_recomputed_activations_change_nothing(results: list[dict[str, Any]]) -> None:
    for name, value in results[0]["dropping"]["weights"].items():
        assert torch.equal(value, results[0]["recomputed"]["weights"][name])


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_mixed_precision_comes_close_to_full_precision(results: list[dict[str, Any]], precision: str) -> None:
    found, full = results[0][precision]["history"], results[0]["32"]["history"]
    assert found[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.05)
    assert found[-1]["loss"] != full[-1]["loss"]
    assert ("skipped_steps" in found[0]) == (precision == "16")


def test_a_training_step_returns_losses_and_further_numbers(results: list[dict[str, Any]]) -> None:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
    for epoch in range(EPOCHS):
        totals = dict.fromkeys(("loss", "size", "entropy"), 0.0)
        for batch in global_batches(Case(), epoch):
            optimizer.zero_grad()
            found = two_losses(module, {"features": batch.inputs[0], "label": batch.labels[0]})
            found["loss"].mean().backward()
            optimizer.step()
            for name in totals:
                totals[name] += float(found[name].detach().mean()) / len(SLICES)
        for rank in results:
            record = rank["two losses"]["history"][epoch]
            assert {name: record[name] for name in totals} == pytest.approx(totals)
    rows = Case().rows(99, 12)
    with torch.no_grad():
        found = two_losses(module, {"features": rows.inputs[0], "label": rows.labels[0]})
    record = results[0]["two losses"]["history"][-1]
    assert record["validation_loss"] == pytest.approx(float(found["loss"].mean()))
    assert record["validation_size"] == pytest.approx(float(found["size"].mean()))
    assert_same(results[0]["two losses"]["weights"], module)


# ---- the end ---------------------------------------------------------------------------------------------------------
def test_all_ranks_stop_at_the_same_epoch_and_the_best_weights_come_back(results: list[dict[str, Any]]) -> None:
    losses: list[float] = []
    states: list[nn.Module] = []

    def note(module: nn.Module, epoch: int) -> None:
        states.append(copy.deepcopy(module))
        losses.append(validation_loss(states[-1]))

    plainly(after_epoch=note, rate=lambda step: RATE * 12.0 ** (step // len(SLICES)))
    best = losses.index(min(losses))
    over = next(epoch for epoch in range(EPOCHS) if epoch > best)
    assert over < EPOCHS, "the oracle does not diverge"
    for rank in results:
        assert len(rank["stopped"]["history"]) == over + 1
        assert rank["stopped"]["best"] == best + 1
        assert_same(rank["stopped"]["weights"], states[best], 1e-7)
        assert_same(rank["not restored"]["weights"], states[over], 1e-7)


def test_an_entry_that_the_history_lacks_is_an_error_with_those_that_it_has(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert (
            "monitor='validation_accuracy' is no entry of the history. Use one of loss, "
            in rank["no such entry"]["error"]
        )


def test_the_history_says_where_the_time_went(results: list[dict[str, Any]]) -> None:
    for rank in results:
        for record in rank["plain"]["history"]:
            shares = [record[name] for name in ("data_wait", "compute", "synchronisation")]
            assert all(0 <= share <= 1 for share in shares)
            assert sum(shares) <= 1.01
            assert record["validation_seconds"] > 0


# ---- callbacks -------------------------------------------------------------------------------------------------------
def test_callbacks_are_called_on_every_rank_in_order(results: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(results):
        lines = rank["diary"]["lines"]
        assert lines[0] == ("start", number, 2, EPOCHS, len(SLICES))
        assert lines[-1] == ("end", EPOCHS * len(SLICES))
        steps = [line[1:3] for line in lines if line[0] == "step"]
        assert steps == [(1 + step // len(SLICES), step + 1) for step in range(EPOCHS * len(SLICES))]
        assert [line[0] for line in lines[1:7]] == ["step"] * 4 + ["validation", "epoch"]
        assert lines[5] == ("validation", 1, ["validation_loss"])


def test_a_callback_that_raises_is_named(results: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(results):
        expected = f"The callback Clumsy failed in on_step_end, on rank {number} after step 3: KeyError: 'three'"
        assert rank["clumsy"]["error"] == rank["clumsy"]["seen"] == expected
