"""The contract of every way to train in parallel, on two and on four ranks: what `sparkdl.parallel.Strategy` promises.

A further strategy is one more entry of `STRATEGIES`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.checkpoint import AsyncWriter, CheckpointSchedule, CheckpointStore, Saver
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.in_memory import InMemoryData, TensorRows, open_rows
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import (
    Auto,
    DataParallel,
    FullyShardedDataParallel,
    Hybrid,
    HybridShardedDataParallel,
    Int8,
    LocalSGD,
    ParameterServer,
    Pipeline,
    PowerSGD,
    Setting,
    Strategy,
    TensorParallel,
    TopK,
    strategy_names,
)
from sparkdl.trainer import Trainer
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]

# 7 steps of 5 or 6 rows from 5 shards: on four ranks some have no rows in some steps.
ROWS, BATCH, SHARDS, EPOCHS, STEPS = 40, 6, 5, 2, 7
SAVED = STEPS + 3  # steps after which a checkpoint is written, in the second epoch
FOLDER = "SPARKDL_TEST_STRATEGIES"
RATE = 0.2


@dataclass(frozen=True)
class Entry:
    """A strategy and what is promised of it.

    Attributes:
        make: Makes one, for some ranks.
        exact: True where the result is that of one process that sees the whole batches.
        repeats: True where two runs, and a resumed one, are equal to the bit.
        ranks: The numbers of ranks that it is tried on.
        momentum: Of SGD.
    """

    make: Callable[[int], Strategy]
    exact: bool = True
    repeats: bool = True
    ranks: Sequence[int] = (2, 4)
    momentum: float = 0.9


PLAN = {"0": "colwise", "2": "rowwise", "4": "colwise_gather"}
STRATEGIES: dict[str, Entry] = {
    "ddp": Entry(lambda ranks: DataParallel()),
    "ddp by priority": Entry(lambda ranks: DataParallel(schedule="priority")),
    "ddp in half precision": Entry(lambda ranks: DataParallel(compression="fp16"), exact=False),
    "ddp with PowerSGD": Entry(lambda ranks: DataParallel(compression=PowerSGD(rank=1)), exact=False),
    "ddp with top-k": Entry(lambda ranks: DataParallel(compression=TopK(ratio=0.2)), exact=False, momentum=0.5),
    "ddp in 8 bits": Entry(lambda ranks: DataParallel(compression=Int8()), exact=False),
    "fsdp": Entry(lambda ranks: FullyShardedDataParallel(wrap=("2", "4"))),
    "hsdp": Entry(lambda ranks: HybridShardedDataParallel(shard_size=2)),
    "tensor_parallel": Entry(lambda ranks: TensorParallel(PLAN)),
    "tensor_parallel in replicas": Entry(lambda ranks: TensorParallel(PLAN, size=2), ranks=(4,)),
    "pipeline": Entry(lambda ranks: Pipeline(num_microbatches=ranks)),
    "pipeline, gpipe, in replicas": Entry(lambda ranks: Pipeline(2, ("4",), 3, "gpipe"), ranks=(4,)),
    "pipeline, interleaved": Entry(lambda ranks: Pipeline(4, (), 2, "interleaved", 2), ranks=(2,)),
    "hybrid": Entry(lambda ranks: Hybrid(), ranks=(4,)),
    "hybrid of dense layers": Entry(lambda ranks: Hybrid(dense={"2": "colwise", "4": "rowwise"})),
    "local_sgd after every step": Entry(lambda ranks: LocalSGD(sync_every=1), momentum=0),
    "local_sgd": Entry(lambda ranks: LocalSGD(sync_every=3), exact=False, momentum=0),
    "DiLoCo": Entry(lambda ranks: LocalSGD(sync_every=3, outer="nesterov"), exact=False, momentum=0),
    "gossip": Entry(lambda ranks: LocalSGD(sync_every=2, outer="ring"), exact=False, momentum=0),
    "parameter_server, synchronous": Entry(lambda ranks: ParameterServer(max_staleness=0)),
    "parameter_server": Entry(
        lambda ranks: ParameterServer(num_servers=ranks // 2, max_staleness=2), exact=False, repeats=False, momentum=0
    ),
    "auto": Entry(lambda ranks: Auto(budget_seconds=1.0), repeats=False),
}


def module() -> nn.Module:
    """The same every time; layers that can be cut, and sharded in two and in four."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(3, 8),
            nn.ELU(inplace=True),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        ).double()


def rows(*, weighted: bool) -> TensorRows:
    """Three classes; labels follow from the features."""
    random = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    labels = (features.sum(1) > 0).long() + (features[:, 0] > 1).long()
    weight = torch.rand(ROWS, generator=random, dtype=torch.float64) + 0.1
    return TensorRows({"features": features}, {"label": labels}, weight=weight if weighted else None)


class Narrow:
    """Rows as a rank of a pipeline gets them: those that it does not need are not there."""

    def __init__(self, data: InMemoryData, *, inputs: bool, labels: bool) -> None:
        self._data, self._inputs, self._labels = data, inputs, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    @contextlib.contextmanager
    def open_epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        with self._data.open_epoch(epoch) as batches:
            yield (
                Batch(
                    batch.inputs if self._inputs else (),
                    batch.labels if self._labels else (),
                    batch.weight,
                )
                for batch in batches
            )


def oracle(momentum: float, *, weighted: bool) -> dict[str, Tensor]:
    """One process, whole batches, no part of sparkdl but the order of the rows."""
    trained, given = module(), rows(weighted=weighted)
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE, momentum=momentum)
    data = open_rows(given, config(), rank=0, world_size=1)
    for epoch in range(EPOCHS):
        with data.open_epoch(epoch) as batches:
            for batch in batches:
                optimizer.zero_grad()
                losses = nn.functional.cross_entropy(trained(batch.inputs[0]), batch.labels[0], reduction="none")
                weight = torch.ones(batch.rows, dtype=torch.float64) if batch.weight is None else batch.weight
                ((losses * weight).sum() / weight.sum()).backward()
                optimizer.step()
    return state_of(trained)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(
        max_epochs=EPOCHS,
        batch_size=BATCH,
        num_shards=SHARDS,
        num_train_workers=SHARDS,
        seed=7,
        verbose=False,
        **settings,
    )


def state_of(trained: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.state_dict().items()}


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def train(
    entry: Entry, *, weighted: bool = False, folder: str | None = None, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    """One fit of this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    strategy, how, given = entry.make(ranks), config(**settings), rows(weighted=weighted)
    place = strategy.replicas(ranks).place_of(rank)
    trained = module()
    strategy.check(trained, replace(how, num_train_workers=ranks))
    if rank == 1:  # rank 0's weights are the ones that count
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
    objective = Objective(nn.CrossEntropyLoss())
    recipe = OptimizerRecipe("sgd", RATE, {"momentum": entry.momentum})
    build = optimization_builder(recipe, None, how, steps_per_epoch=STEPS)
    whole = open_rows(
        given, how, rank=rank, world_size=ranks, dealt=place.shards(SHARDS), validation=rows(weighted=weighted)
    )
    data = Narrow(whole, inputs=place.reads_inputs, labels=place.reads_labels)
    strategy.prepare(trained, objective, build, how, Setting(given.batch.part(0, 2), False))
    with contextlib.ExitStack() as stack:
        saver = None
        store = None if folder is None else CheckpointStore(folder, keep=9)
        if store is not None:
            schedule = CheckpointSchedule(SAVED, None, STEPS)
            saver = stack.enter_context(Saver(AsyncWriter(store, timeout=timedelta(minutes=1)), schedule))
        trainer = Trainer(strategy, objective, how, device=torch.device("cpu"), has_validation=True, saver=saver)
        if resume:
            assert store is not None
            trainer.load_state_dict(data, store.load(f"step-{SAVED:012d}"))
        history = list(trainer.fit(data))
    gathered = trainer.gather()
    found = {
        "history": history,
        "weights": state_of(gathered),
        "kind": type(gathered).__name__,
        "plain": all(type(value) in (Tensor, nn.Parameter) for value in gathered.state_dict().values()),
        "name": strategy.name,
        "busy": strategy.busy_seconds,
        "steps": strategy.optimization.steps,
    }
    strategy.close()
    return found


def train_all() -> dict[str, Any]:
    """Every strategy in turn, in one group of ranks."""
    results = {}
    folder = Path(os.environ[FOLDER])
    for name, entry in STRATEGIES.items():
        if dist.get_world_size() in entry.ranks:
            own = str(folder / f"{dist.get_world_size()}" / name.replace(" ", "_"))
            results[name] = {
                "calm": train(entry, folder=own),
                "resumed": train(entry, folder=own, resume=True),
                "weighted": train(entry, weighted=True),
            }
            dist.barrier()
    return results


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, by the number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("strategies")))
        return {ranks: torchrun(train_all, ranks) for ranks in (2, 4)}


BOTH = [
    pytest.param(name, ranks, id=f"{name} on {ranks}") for name, entry in STRATEGIES.items() for ranks in entry.ranks
]
EXACT = [both for both in BOTH if STRATEGIES[str(both.values[0])].exact]


@pytest.mark.parametrize(("name", "ranks"), BOTH)
def test_it_learns(found: dict[int, list[dict[str, Any]]], name: str, ranks: int) -> None:
    history = found[ranks][0][name]["calm"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


@pytest.mark.parametrize(("name", "ranks"), EXACT)
@pytest.mark.parametrize("kind", ["calm", "weighted"])
def test_it_equals_one_process_where_mathematics_says_so(
    found: dict[int, list[dict[str, Any]]], name: str, ranks: int, kind: str
) -> None:
    expected = oracle(STRATEGIES[name].momentum, weighted=kind == "weighted")
    for key, value in expected.items():
        weights = found[ranks][0][name][kind]["weights"][key]
        assert float((weights - value).norm() / value.norm()) <= 1e-5, key


@pytest.mark.parametrize(("name", "ranks"), BOTH)
def test_every_row_is_counted_once(found: dict[int, list[dict[str, Any]]], name: str, ranks: int) -> None:
    for one in found[ranks]:
        history = one[name]["calm"]["history"]
        assert [record["rows"] for record in history] == [ROWS] * EPOCHS
        assert [record["step"] for record in history] == [STEPS, 2 * STEPS]


@pytest.mark.parametrize(("name", "ranks"), BOTH)
def test_all_ranks_end_with_the_same_plain_module(
    found: dict[int, list[dict[str, Any]]], name: str, ranks: int
) -> None:
    expected = module().state_dict()
    for one in found[ranks]:
        calm = one[name]["calm"]
        assert calm["kind"] == "Sequential"
        assert calm["plain"]
        assert list(calm["weights"]) == list(expected)
        for key, value in calm["weights"].items():
            assert torch.equal(value, found[ranks][0][name]["calm"]["weights"][key]), key


@pytest.mark.parametrize(("name", "ranks"), BOTH)
def test_a_resumed_run_goes_on_where_it_was_saved(
    found: dict[int, list[dict[str, Any]]], name: str, ranks: int
) -> None:
    for one in found[ranks]:
        calm, resumed = one[name]["calm"], one[name]["resumed"]
        assert [record["rows"] for record in resumed["history"]] == [ROWS] * EPOCHS
        if not STRATEGIES[name].repeats:
            assert resumed["history"][-1]["loss"] == pytest.approx(calm["history"][-1]["loss"], rel=0.2)
            continue
        assert [key for key, value in calm["weights"].items() if not torch.equal(value, resumed["weights"][key])] == []
        assert resumed["history"][-1]["loss"] == pytest.approx(calm["history"][-1]["loss"], rel=1e-12)


def test_every_strategy_with_a_name_is_under_contract() -> None:
    """`auto` picks one of the others and has no ranks of its own."""
    assert {name for name in strategy_names() if name != "auto"} <= {
        entry.make(2).name for entry in STRATEGIES.values()
    }


def test_a_checkpoint_of_another_strategy_is_refused(found: dict[int, list[dict[str, Any]]]) -> None:
    strategy = DataParallel()
    trainer = object.__new__(Trainer)
    trainer._strategy = strategy
    with pytest.raises(ConfigError, match="strategy='ddp' cannot go on from this checkpoint: strategy='fsdp' wrote it"):
        trainer.load_state_dict(None, {"strategy": {"name": "fsdp"}})  # type: ignore[arg-type]
