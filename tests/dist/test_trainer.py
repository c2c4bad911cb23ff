"""The training loop without Spark: two ranks under torchrun against one plain loop over the same batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.io.plan import ShardPlan
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel, Setting
from sparkdl.trainer import Trainer
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

ROWS, BATCH, EPOCHS = 40, 10, 3
# Rows of each rank in each step: even, none on one rank, uneven, none on the other.
SLICES = ((5, 5), (10, 0), (3, 7), (0, 10))
PLAN = ShardPlan((ROWS // 2, ROWS // 2), BATCH)
CROSS_ENTROPY = nn.CrossEntropyLoss()


def rows_of(seed: int, rows: int) -> Batch:
    """Random rows, whose label is a class number."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 3, generator=random, dtype=torch.float64)
    labels = (features.sum(1) > 0).long() + (features[:, 0] > 1).long()
    return Batch((features,), (labels,), torch.rand(rows, generator=random, dtype=torch.float64))


def mlp() -> nn.Module:
    """A row-wise module; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def noisy() -> nn.Module:
    """A module that draws random numbers and keeps running means."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)).double()


def one_number() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def squared_error(output: Tensor, label: Tensor) -> Tensor:
    """A loss of a user's own, which returns the mean of the rows that it was given."""
    return ((output[:, 0] - label.double()) ** 2).mean()


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        module: Makes the module.
        loss: Called with (output, label).
        weighted: True where rows have weights.
        micro_batch_size: As in `TrainConfig`.
        optimizer: As in `OptimizerRecipe`.
    """

    module: Callable[[], nn.Module] = mlp
    loss: Callable[..., Tensor] = CROSS_ENTROPY
    weighted: bool = False
    micro_batch_size: int | None = None
    optimizer: tuple[str, float, tuple[tuple[str, Any], ...]] = ("sgd", 0.3, (("momentum", 0.9),))

    def rows(self, seed: int, rows: int) -> Batch:
        batch = rows_of(seed, rows)
        return batch if self.weighted else replace(batch, weight=None)

    def recipe(self) -> OptimizerRecipe:
        name, rate, params = self.optimizer
        return OptimizerRecipe(name, rate, dict(params))


CASES = {
    "even and empty slices": Case(),
    "row weights": Case(weighted=True),
    "accumulated gradients": Case(micro_batch_size=2),
    "accumulated gradients of weighted rows": Case(micro_batch_size=3, weighted=True),
    "ignored rows": Case(loss=nn.CrossEntropyLoss(ignore_index=0), micro_batch_size=4),
    "class weights": Case(
        loss=nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)), weighted=True
    ),
    "a loss that returns a mean": Case(module=one_number, loss=squared_error, micro_batch_size=4),
    "an adaptive optimizer": Case(optimizer=("adamw", 0.01, (("weight_decay", 0.1),))),
}


def cut(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    weight = None if batch.weight is None else batch.weight[part]
    return Batch((batch.inputs[0][part],), (batch.labels[0][part],), weight)


@dataclass(frozen=True)
class HandMade:
    """The batches of one rank, as `EpochData`."""

    case: Case
    rank: int
    plan: ShardPlan = PLAN
    position: tuple[int, int] = (0, 0)

    @property
    def dealt(self) -> tuple[int, ...]:
        return (self.rank,)

    def deal(self, shards: Sequence[int]) -> None:
        raise AssertionError("nobody asked for it")

    @contextlib.contextmanager
    def open_epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        yield iter([self._slice(batch, step) for step, batch in enumerate(global_batches(self.case, epoch))])

    @contextlib.contextmanager
    def open_validation(self, rows: int) -> Iterator[Iterator[Batch]]:
        held_out = self.case.rows(99, 12)
        own = cut(held_out, 0, 9) if self.rank == 0 else cut(held_out, 9, 12)
        yield own.split(rows)

    def _slice(self, batch: Batch, step: int) -> Batch:
        border = SLICES[step][0]
        return cut(batch, 0, border) if self.rank == 0 else cut(batch, border, BATCH)


def global_batches(case: Case, epoch: int) -> Sequence[Batch]:
    """The rows of all ranks, step after step."""
    rows = case.rows(epoch, ROWS)
    return [cut(rows, start, start + BATCH) for start in range(0, ROWS, BATCH)]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All weights, by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def train(case: Case, events: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One fit of this rank."""
    module, objective = case.module(), Objective(case.loss)
    config = TrainConfig(max_epochs=EPOCHS, batch_size=BATCH, micro_batch_size=case.micro_batch_size, seed=4)
    if dist.get_rank() == 1:  # rank 0's weights are the ones that count
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    strategy = DataParallel()
    build = optimization_builder(case.recipe(), None, config, steps_per_epoch=len(SLICES))
    strategy.prepare(module, objective, build, config, Setting(case.rows(0, 2), False))
    report = (lambda event: None) if events is None else events.append
    trainer = Trainer(
        strategy, objective, config, device=torch.device("cpu"), has_validation=True, report=report
    )  # fmt: skip
    history = list(trainer.fit(HandMade(case, dist.get_rank())))
    strategy.close()
    return {"weights": weights_of(strategy.module), "history": history}


def train_all() -> dict[str, Any]:
    """Every case in turn, in one group of ranks."""
    results: dict[str, Any] = {name: train(case) for name, case in CASES.items()}
    events: list[dict[str, Any]] = []
    results["noisy"] = [train(Case(module=noisy), events), train(Case(module=noisy))]
    results["events"] = events
    return results


# ---- the oracle ------------------------------------------------------------------------------------------------------
def row_losses(case: Case, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some rows and what it is to be divided by, from the definition."""
    outputs, labels = module(batch.inputs[0]), batch.labels[0]
    weight = torch.ones(len(labels), dtype=torch.float64) if batch.weight is None else batch.weight
    if case.loss is squared_error:
        return (weight * (outputs[:, 0] - labels.double()) ** 2).sum(), weight.sum()
    assert isinstance(case.loss, nn.CrossEntropyLoss)
    weight = weight * (labels != case.loss.ignore_index)
    if case.loss.weight is not None:
        weight = weight * case.loss.weight[labels]
    return -(weight * outputs.log_softmax(1)[torch.arange(len(labels)), labels]).sum(), weight.sum()


def train_plainly(case: Case) -> dict[str, Any]:
    """One process, whole batches, no part of the trainer."""
    module = case.module()
    name, rate, params = case.optimizer
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name](module.parameters(), lr=rate, **dict(params))
    history = []
    for epoch in range(EPOCHS):
        total = divisor = 0.0
        for batch in global_batches(case, epoch):
            optimizer.zero_grad()
            losses, denominator = row_losses(case, module, batch)
            (losses / denominator).backward()
            optimizer.step()
            total, divisor = total + losses.item(), divisor + denominator.item()
        with torch.no_grad():
            losses, denominator = row_losses(case, module, case.rows(99, 12))
        history.append({"loss": total / divisor, "validation_loss": (losses / denominator).item()})
    return {"weights": weights_of(module), "history": history}


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(torchrun: Torchrun) -> list[dict[str, Any]]:
    """What the two ranks found."""
    return torchrun(train_all, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_with_the_weights_of_one_plain_process(results: list[dict[str, Any]], name: str) -> None:
    expected = train_plainly(CASES[name])
    start = weights_of(CASES[name].module())
    for key, value in expected["weights"].items():
        found = results[0][name]["weights"][key]
        assert float((found - value).norm() / value.norm()) <= 1e-6, key
        assert float((start[key] - value).norm() / value.norm()) > 1e-3, f"{key} was not trained"


@pytest.mark.parametrize("name", CASES)
def test_the_history_holds_the_mean_losses_over_all_ranks(results: list[dict[str, Any]], name: str) -> None:
    expected = train_plainly(CASES[name])["history"]
    for rank in results:
        found = rank[name]["history"]
        assert [record["epoch"] for record in found] == [1, 2, 3]
        assert [record["step"] for record in found] == [4, 8, 12]
        assert [record["rows"] for record in found] == [ROWS] * EPOCHS
        for key in ("loss", "validation_loss"):
            assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], rel=1e-6)


def test_the_loss_goes_down(results: list[dict[str, Any]]) -> None:
    for name in CASES:
        history = results[0][name]["history"]
        assert history[-1]["loss"] < history[0]["loss"], name


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_end_with_the_same_bits(results: list[dict[str, Any]], name: str) -> None:
    for key, value in results[0][name]["weights"].items():
        assert torch.equal(value, results[1][name]["weights"][key])


def test_random_layers_draw_the_same_numbers_in_the_same_run_again(results: list[dict[str, Any]]) -> None:
    first, second = results[0]["noisy"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])
    assert [record["loss"] for record in first["history"]] == [record["loss"] for record in second["history"]]


@pytest.mark.parametrize(("rows", "at_most"), [(5, 4), (9, 4), (129, 64), (8, 4), (3, 4), (0, 4), (7, 1)])
def test_micro_batches_of_a_share_are_as_even_as_can_be(rows: int, at_most: int) -> None:
    share = rows_of(0, rows)
    parts = list(share.split(at_most))
    sizes = [part.rows for part in parts]
    assert max(sizes) - min(sizes) <= 1, "BatchNorm refuses a rest of one row"
    assert max(sizes) <= at_most
    assert len(sizes) == max(1, -(-rows // at_most))
    assert torch.equal(torch.cat([part.inputs[0] for part in parts]), share.inputs[0])
    assert torch.equal(torch.cat([part.weight for part in parts if part.weight is not None]), share.weight)


def test_every_epoch_is_reported_with_its_losses(results: list[dict[str, Any]]) -> None:
    epochs = [event for event in results[0]["events"] if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2, 3]
    assert all(
        {"loss", "validation_loss", "rows_per_second", "data_wait", "seconds"} <= event.keys() for event in epochs
    )
