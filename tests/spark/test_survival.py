"""A run that loses ranks: what comes out is what would have come out."""

import random
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkdl import TorchEstimator, TorchModel, TrainingFailedError
from sparkdl.checkpoint import CheckpointStore
from sparkdl.errors import LaunchError
from tests.faults import PLANTED, FailAt, Fragile, Kind, failed_at, steps_of

pytestmark = [pytest.mark.spark, pytest.mark.timeout(280)]

ROWS, BATCH, EPOCHS, INTERVAL = 192, 16, 3, 5
STEPS = ROWS // BATCH  # of an epoch


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    features = F.array(F.sin("id").cast("float"), F.cos("id").cast("float"))
    return spark.range(0, ROWS, 1, 4).select(features.alias("features"), F.sin("id").cast("float").alias("label"))


def fit(df: DataFrame, event: FailAt, *, workers: int, **params: Any) -> TorchModel:
    """Train a module to which something happens."""
    settings: dict[str, Any] = {
        "checkpointDir": f"{event.folder}/checkpoints",
        "checkpointInterval": INTERVAL,
        "maxEpochs": EPOCHS,
        "batchSize": BATCH,
        "numShards": 4,
        "verbose": False,
        "optimizer": "adamw",
        **params,
    }
    module = Fragile(event)
    with torch.no_grad():  # the same every time
        torch.manual_seed(3)
        for value in module.parameters():
            value.copy_(torch.randn_like(value) / 20)
    return TorchEstimator(module=module, loss="mse", numTrainWorkers=workers, **settings).fit(df)


def event(folder: Path, rank: int = 0, step: int = 1, kind: Kind = "none", **more: Any) -> FailAt:
    return FailAt(rank, step, kind, str(folder), **more)


Undisturbed = Callable[[int], TorchModel]


@pytest.fixture(scope="module")
def undisturbed(rows: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The model of a run that nothing happened to, from the number of ranks."""

    @cache
    def fitted(ranks: int) -> TorchModel:
        return fit(rows, event(tmp_path_factory.mktemp("calm")), workers=ranks)

    return fitted


def same(one: TorchModel, other: TorchModel) -> bool:
    """Equal weights, to the last bit."""
    left, right = one.module.state_dict(), other.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(model: TorchModel) -> list[float]:
    return [record["loss"] for record in model.history]


# ---- to the bit ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "rank", "step", "kind"),
    [(4, 2, 8, "sigkill"), pytest.param(2, 0, STEPS + 7, "exit", marks=pytest.mark.slow)],
)
def test_a_killed_rank_leaves_no_trace_in_the_weights(
    rows: DataFrame, undisturbed: Undisturbed, tmp_path: Path, ranks: int, rank: int, step: int, kind: Kind
) -> None:
    model = fit(rows, event(tmp_path, rank, step, kind), workers=ranks)
    assert failed_at(str(tmp_path))
    assert same(model, undisturbed(ranks))
    assert losses(model) == pytest.approx(losses(undisturbed(ranks)), rel=1e-9)
    assert [record["rows"] for record in model.history] == [ROWS] * EPOCHS
    (restart,) = model.summary.restarts
    assert re.match(rf"A rank's process died without a word.* Started again with {ranks} ranks\.", restart)
    steps = steps_of(str(tmp_path), 1 - min(rank, 1))
    assert len({one.pid for one in steps}) == 2, "both attempts trained"
    repeated = len(steps) - EPOCHS * STEPS - warm_ups(ranks)
    # The interval, the step that was lost, and the steps of one write: these take some milliseconds each.
    assert repeated <= 2 * INTERVAL + 1


def warm_ups(ranks: int) -> int:
    """Forwards of two attempts that are no steps: with several ranks, DDP is shown an example first."""
    return 2 if ranks > 1 else 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_step_the_weights_are_the_same(
    rows: DataFrame, undisturbed: Undisturbed, tmp_path: Path, ranks: int, seed: int
) -> None:
    draw = random.Random(f"{ranks} {seed}")
    scripted = event(tmp_path, draw.randrange(ranks), draw.randrange(1, EPOCHS * STEPS), "sigkill")
    model = fit(rows, scripted, workers=ranks)
    assert same(model, undisturbed(ranks)), scripted


# ---- what is not tried again -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raise", PLANTED),
        pytest.param("nan", "The loss is nan in step", marks=pytest.mark.slow),
        pytest.param("memory", "", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_its_own_ends_the_run(rows: DataFrame, tmp_path: Path, kind: Kind, reason: str) -> None:
    with pytest.raises(TrainingFailedError, match=f"Rank . on .* failed: .*{reason}") as caught:
        fit(rows, event(tmp_path, 1, 4, kind, every=True), workers=2)
    assert not caught.value.lost
    assert len({one.pid for one in steps_of(str(tmp_path), 0)}) == 1, "it was tried again"
    assert time.time() - failed_at(str(tmp_path)) < 8


@pytest.mark.slow
def test_a_rank_that_is_lost_again_and_again_ends_the_run(rows: DataFrame, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError, match=r"2 attempts ended like this \(maxRestarts=1\)") as caught:
        fit(rows, event(tmp_path, 1, 3, "exit", every=True), workers=2, maxRestarts=1)
    assert caught.value.lost


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_without_a_place_for_checkpoints_a_restart_begins_again(rows: DataFrame, tmp_path: Path) -> None:
    scripted = event(tmp_path, 1, STEPS + 2, "exit")
    model = fit(rows, scripted, workers=2, checkpointDir=None, checkpointInterval=None)
    assert len(model.summary.restarts) == 1
    assert [record["rows"] for record in model.history] == [ROWS] * EPOCHS
    assert len(steps_of(str(tmp_path), 0)) >= EPOCHS * STEPS + STEPS


def test_checkpoints_are_kept_and_rows_are_not(undisturbed: Undisturbed) -> None:
    model = undisturbed(4)
    store = CheckpointStore(model.summary.checkpoints)
    newest = store.newest()
    assert newest is not None
    assert newest.step == EPOCHS * STEPS
    assert newest.facts["world_size"] == 4
    assert newest.facts["config"]["batch_size"] == BATCH
    assert newest.facts["config"]["timeouts"]["step"] == 600
    state = store.load(newest)
    assert state["reader"]["epoch"] * STEPS + state["reader"]["step"] == newest.step
    assert len(list(Path(model.summary.checkpoints).glob("step-*"))) == 3
    assert not list(Path(model.summary.checkpoints).parent.glob("data/*")), "staged rows were left behind"
    assert all(record["checkpoint"] >= 0 for record in model.history)


def test_sigterm_saves_the_next_step(rows: DataFrame, undisturbed: Undisturbed, tmp_path: Path) -> None:
    model = fit(rows, event(tmp_path, 1, 8, "sigterm"), workers=4, checkpointInterval=1000)
    assert same(model, undisturbed(4))
    assert re.match(
        "Rank . on .*Preempted: rank 1 was told to stop .*the state after step . was saved", model.summary.restarts[0]
    )
    assert len(steps_of(str(tmp_path), 0)) <= EPOCHS * STEPS + 1 + warm_ups(4), "steps were repeated"


def test_a_place_for_checkpoints_that_cannot_be_written_is_refused_before_any_rank_starts(
    rows: DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(LaunchError, match="checkpointDir='file:///proc/none' must be writable from all executors"):
        fit(rows, event(tmp_path), workers=2, checkpointDir="/proc/none")
    assert not steps_of(str(tmp_path), 0)
