"""Stopped at some step and resumed: to the bit on as many ranks, to the order of summation on fewer."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.checkpoint import AsyncWriter, CheckpointSchedule, CheckpointStore, Preempted, Saver
from sparkdl.config import TrainConfig
from sparkdl.io.batches import RankData, Reading
from sparkdl.io.decode import Decoder
from sparkdl.io.plan import ShardPlan, plan_pieces, shards_of
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel, Setting
from sparkdl.schedule import SchedulerRecipe
from sparkdl.trainer import History, Trainer
from tests.dist.conftest import Torchrun
from tests.unit.staged import COLUMNS, FIELDS, WIDTH, consecutive, write_staged

pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]

SHARDS, ROWS, BATCH, EPOCHS = 4, 240, 24, 2
STEPS = ROWS // BATCH  # of an epoch
STOPPED = STEPS + 4  # in the second epoch
FOLDER = "SPARKDL_TEST_RESUME"
LAYOUT = {"input_0": ("float32", (WIDTH,)), "label_0": ("int64", ())}


def module() -> nn.Module:
    """Parameters for several of DDP's buckets, running means, and random numbers; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wide = [part for _ in range(2) for part in (nn.Linear(640, 640), nn.Tanh())]
        return nn.Sequential(nn.Linear(WIDTH, 640), nn.BatchNorm1d(640), *wide, nn.Dropout(0.3), nn.Linear(640, 2))


def row_wise() -> nn.Module:
    """A module whose result does not depend on which rows meet in a rank."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 2))


def parity(output: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, label % 2, reduction="none")


def open_rows(folder: Path) -> RankData:
    groups = write_staged(folder / f"rows-{dist.get_rank()}.parquet", consecutive([10] * (ROWS // 10)))
    pieces = plan_pieces(groups, SHARDS)
    return RankData(
        plan=ShardPlan(tuple(sum(piece.rows for piece in own) for own in pieces), BATCH),
        pieces=dict(enumerate(pieces)),
        validation=(),
        decoder=Decoder(COLUMNS),
        layout=LAYOUT,
        reading=Reading(FIELDS),
        window=20,
        shuffle="window",
        seed=3,
        shards=shards_of(dist.get_rank(), dist.get_world_size(), SHARDS),
        fingerprint="rows",
    )


def train(
    make: Callable[[], nn.Module], name: str, *, stop: int | None = None, resume: bool = False
) -> tuple[dict[str, Tensor], History] | str:
    """Train, save after every third step; stop after a step as if told to, or go on from the newest checkpoint."""
    folder = Path(os.environ[FOLDER])
    with open_rows(folder).open_epoch(0) as batches:
        example = next(batches)
    data = open_rows(folder)
    config = TrainConfig(
        max_epochs=EPOCHS, batch_size=BATCH, warmup_steps=3, averaging="ema", averaging_decay=0.9,
        gradient_clip_norm=0.5, restore_best=True,
    )  # fmt: skip
    cosine = SchedulerRecipe("CosineAnnealingLR", {}, "step")
    objective, strategy = Objective(parity), DataParallel()
    build = optimization_builder(OptimizerRecipe("adamw", 0.01), cosine, config, steps_per_epoch=STEPS)
    strategy.prepare(make(), objective, build, config, Setting(example, False))
    store = CheckpointStore(str(folder / name))
    seen = 0

    def stopped() -> bool:
        nonlocal seen
        seen += 1
        return seen == stop and dist.get_rank() == dist.get_world_size() - 1

    writer = AsyncWriter(store, timeout=timedelta(minutes=1))
    try:
        with Saver(writer, CheckpointSchedule(3, None, STEPS), stopped=stopped) as saver:
            trainer = Trainer(strategy, objective, config, device=torch.device("cpu"), saver=saver)
            if resume:
                newest = store.newest()
                assert newest is not None
                assert newest.step == STOPPED
                trainer.load_state_dict(data, store.load(newest))
            history = list(trainer.fit(data))  # as torch.load takes it
        last, best = strategy.module.state_dict(), trainer.gather().state_dict()
        weights = {**last, **{f"best.{name}": value for name, value in best.items()}}
        return {name: value.clone() for name, value in weights.items()}, history
    except Preempted as error:
        return str(error)
    finally:
        strategy.close()


def four_ranks() -> dict[str, Any]:
    """Undisturbed, and stopped and resumed; and a checkpoint for fewer ranks."""
    calm = train(module, "calm")
    stopped = train(module, "stopped", stop=STOPPED)
    resumed = train(module, "stopped", resume=True)
    even = train(row_wise, "even")
    train(row_wise, "fewer", stop=STOPPED)
    return {"calm": calm, "stopped": stopped, "resumed": resumed, "even": even}


def three_ranks() -> Any:
    return train(row_wise, "fewer", resume=True)


@pytest.fixture(scope="module")
def found(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("resume")))
        first, *others = torchrun(four_ranks, 4)
        for other in others:
            assert all(torch.equal(first["resumed"][0][name], value) for name, value in weights_of(other).items())
        return {**first, "fewer": torchrun(three_ranks, 3)[0]}


def weights_of(found: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of a resumed rank; running means are each rank's own between steps."""
    return {name: value for name, value in found["resumed"][0].items() if name.endswith(("weight", "bias"))}


def test_who_is_told_to_stop_says_what_was_saved(found: dict[str, Any]) -> None:
    assert found["stopped"] == f"rank 3 was told to stop (SIGTERM); the state after step {STOPPED} was saved"


def test_on_as_many_ranks_a_resumed_run_is_equal_to_the_bit(found: dict[str, Any]) -> None:
    calm, resumed = found["calm"][0], found["resumed"][0]
    assert calm.keys() == resumed.keys()
    assert [name for name, value in calm.items() if not torch.equal(value, resumed[name])] == []


def test_on_fewer_ranks_it_is_equal_to_the_order_of_summation(found: dict[str, Any]) -> None:
    for name, value in found["even"][0].items():
        torch.testing.assert_close(found["fewer"][0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resumed", "fewer"])
def test_the_history_is_whole(found: dict[str, Any], name: str) -> None:
    expected = found["calm" if name == "resumed" else "even"][1]
    history = found[name][1]
    assert [record["rows"] for record in history] == [ROWS] * EPOCHS
    assert [record["step"] for record in history] == [record["step"] for record in expected]
    assert [record["learning_rate"] for record in history] == [record["learning_rate"] for record in expected]
    assert [record["loss"] for record in history] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    assert all(record["checkpoint"] >= 0 and 0 <= record["data_wait"] <= 1 for record in history)
