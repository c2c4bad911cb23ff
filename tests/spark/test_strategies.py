"""Every way to train in parallel through an Estimator, on barrier tasks of one Spark session."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from sparkdl import Callback, RunView, TorchClassificationModel, TorchClassifier
from sparkdl.errors import CallbackError, ConfigError
from sparkdl.io.dataset import ParquetDataset
from sparkdl.parallel import (
    Auto,
    DataParallel,
    FullyShardedDataParallel,
    Hybrid,
    HybridShardedDataParallel,
    LocalSGD,
    ParameterServer,
    Pipeline,
    PowerSGD,
    Strategy,
    TensorParallel,
    TopK,
)

pytestmark = [pytest.mark.spark, pytest.mark.timeout(250)]

ROWS = 66
PLAN = {"0": "colwise", "2": "rowwise"}
# Those whose result is that of one process on whole batches.
EXACT: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": FullyShardedDataParallel(wrap=("2",)),
    "hsdp": HybridShardedDataParallel(shard_size=2),
    "tensor_parallel": TensorParallel(PLAN, size=2),
    "pipeline": Pipeline(stages=2, num_microbatches=2),
    "hybrid": Hybrid(dense=PLAN),
    "local_sgd": LocalSGD(sync_every=1),
    "parameter_server": ParameterServer(num_servers=1, max_staleness=0),
    "auto": Auto(budget_seconds=1.0),
}
OTHERS: dict[str, Any] = {
    "compressed": DataParallel(compression=PowerSGD(rank=2)),
    "DiLoCo": LocalSGD(sync_every=2, outer="nesterov"),
    "asynchronous": ParameterServer(num_servers=2),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Fails(Callback):
    """Raises on one rank after some steps."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, run: RunView) -> None:
        if run.rank == self.rank and run.step == 3:
            raise ValueError(f"rank {run.rank} has had enough")


class Dies(Callback):
    """Kills the process of one rank after some steps, once."""

    def __init__(self, rank: int, folder: str) -> None:
        self.rank, self.mark = rank, Path(folder) / "died"

    def on_step_end(self, run: RunView) -> None:
        if run.rank == self.rank and run.step == 7 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    """Three classes that follow from four features; some rows are held out."""
    x = [F.sin(F.col("id") * (3 + 2 * k)) for k in range(4)]
    return spark.range(ROWS, numPartitions=3).select(
        "id",
        array_to_vector(F.array(*x)).alias("features"),
        (F.when(x[0] + x[1] > 0.5, 2).when(x[2] > 0, 1).otherwise(0)).cast("int").alias("label"),
        (1 + F.col("id") % 3).cast("double").alias("weight"),
        (F.col("id") % 6 == 5).alias("held_out"),
    )


def classifier(strategy: Any, **params: Any) -> TorchClassifier:
    settings = {
        "module": network, "optimizer": "sgd", "learningRate": 0.5, "maxEpochs": 2, "batchSize": 12,
        "numTrainWorkers": 4, "numShards": 4, "weightCol": "weight", "validationIndicatorCol": "held_out",
        "metrics": ["accuracy"], "verbose": False, "seed": 5,
    }  # fmt: skip
    return TorchClassifier(**{**settings, **params}, strategy=strategy)


@pytest.fixture(scope="module")
def reference(rows: DataFrame) -> TorchClassificationModel:
    """One rank, the same batches."""
    return classifier("ddp", numTrainWorkers=1).fit(rows)


SLOW = ("hsdp", "local_sgd", "compressed", "DiLoCo")  # the loop's own contract has them as well


def named(strategies: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in strategies]


@pytest.mark.parametrize("name", named(EXACT))
def test_a_fit_equals_that_of_one_rank(rows: DataFrame, reference: TorchClassificationModel, name: str) -> None:
    model = classifier(EXACT[name]).fit(rows)
    for key, value in reference.module.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[key], value, rtol=1e-5, atol=1e-7)
    assert [record["rows"] for record in model.history] == [55, 55]
    assert model.summary.rows == 55
    for record, expected in zip(model.history, reference.history, strict=True):
        for entry in ("loss", "validation_loss", "validation_accuracy"):
            assert record[entry] == pytest.approx(expected[entry], rel=1e-5)
    assert type(model.module) is nn.Sequential


@pytest.mark.parametrize("name", named(OTHERS))
def test_a_fit_that_is_an_approximation_learns(rows: DataFrame, name: str) -> None:
    model = classifier(OTHERS[name]).fit(rows)
    assert model.history[-1]["loss"] < model.history[0]["loss"]
    assert [record["rows"] for record in model.history] == [55, 55]
    assert model.transform(rows).count() == ROWS


def test_ranks_of_a_pipeline_read_what_they_need(
    spark: SparkSession, rows: DataFrame, reference: TorchClassificationModel, tmp_path: Path
) -> None:
    """Of files that are read in place; where the rows come from does not matter to the result of a pipeline."""
    flat = rows.select(
        *(F.sin(F.col("id") * (3 + 2 * k)).alias(f"x{k}") for k in range(4)), "label", "weight", "held_out"
    )
    flat.coalesce(2).write.parquet(str(tmp_path / "rows"))
    dataset = ParquetDataset(f"file:{tmp_path}/rows", assemble={"features": [f"x{k}" for k in range(4)]})
    one, two = (
        classifier(strategy, numTrainWorkers=ranks).fit(dataset)
        for strategy, ranks in (("ddp", 1), (Pipeline(stages=2, num_microbatches=2), 4))
    )
    for key, value in one.module.state_dict().items():
        torch.testing.assert_close(two.module.state_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        (Pipeline(stages=2, num_microbatches=2), 0),
        pytest.param(ParameterServer(), 1, marks=pytest.mark.slow, id="parameter_server"),
        pytest.param(ParameterServer(), 3, marks=pytest.mark.slow, id="a server"),
        pytest.param("fsdp", 2, marks=pytest.mark.slow, id="fsdp"),
        pytest.param(TensorParallel(PLAN, size=2), 3, marks=pytest.mark.slow, id="tensor_parallel"),
        pytest.param(LocalSGD(sync_every=2), 1, marks=pytest.mark.slow, id="local_sgd"),
        pytest.param(LocalSGD(sync_every=2, outer="ring"), 1, marks=pytest.mark.slow, id="gossip"),
    ],
    ids=["pipeline", "parameter_server", "a server", "fsdp", "tensor_parallel", "local_sgd", "gossip"],
)
def test_the_failure_of_one_rank_ends_the_fit_of_all(rows: DataFrame, strategy: Strategy, rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(CallbackError, match=f"rank {rank} has had enough"):
        classifier(strategy, callbacks=[Fails(rank)]).fit(rows)
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        ("fsdp", 1),
        (TensorParallel(PLAN, size=2), 2),
        (Pipeline(stages=2, num_microbatches=2), 0),
        (Hybrid(dense=PLAN), 3),
        (LocalSGD(sync_every=3), 2),
        (LocalSGD(sync_every=2, outer="ring"), 1),
        (ParameterServer(max_staleness=0), 3),
        (ParameterServer(max_staleness=0), 0),
        (DataParallel(compression=TopK(ratio=0.2)), 1),
    ],
    ids=["fsdp", "tensor", "pipeline", "dense", "local_sgd", "gossip", "a server", "a worker", "top-k"],
)
def test_a_killed_rank_leaves_no_trace_in_the_weights(
    rows: DataFrame, strategy: Strategy, rank: int, folder: str
) -> None:
    def fit(name: str, **params: Any) -> TorchClassificationModel:
        settings = {"maxEpochs": 3, "checkpointDir": f"{folder}/{name}", "checkpointInterval": 3}
        return classifier(strategy, **settings, **params).fit(rows)

    calm, disturbed = fit("calm"), fit("disturbed", callbacks=[Dies(rank, folder)])
    assert len(disturbed.summary.restarts) == 1
    assert [record["rows"] for record in disturbed.history] == [55] * 3
    for key, value in calm.module.state_dict().items():
        assert torch.equal(disturbed.module.state_dict()[key], value), key


@pytest.mark.parametrize("make", [lambda: "fsdp", lambda: Pipeline(stages=2, num_microbatches=3, cut_points=("2",))])
def test_an_estimator_is_saved_with_its_strategy(spark: SparkSession, make: Callable[[], Any], folder: str) -> None:
    estimator = classifier(make(), module=network())
    estimator.write().overwrite().save(f"{folder}/estimator")
    loaded = TorchClassifier.load(f"{folder}/estimator")
    assert loaded.getStrategy() == make()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"strategy": "dpp"}, "strategy='dpp' is not known. Use one of ddp, fsdp"),
        ({"strategy": nn.ReLU()}, r"strategy=ReLU\(\) is no strategy"),
        (
            {"strategy": TensorParallel(PLAN, size=3)},
            r"size=3 x replicas=1 makes 3 ranks, but there are numTrainWorkers=4",
        ),
        ({"strategy": Pipeline(stages=2), "balanceShards": True, "stagingDir": "/x"}, "balanceShards=True moves rows"),
        ({"strategy": ParameterServer(num_servers=4)}, "num_servers=4"),
        ({"strategy": Pipeline(stages=2), "numShards": 1}, "with 2 replicas is more than numShards=1"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(sorted(value)),
)
def test_what_cannot_be_arranged_is_refused_before_any_job(
    spark: SparkSession, rows: DataFrame, params: dict[str, Any], message: str
) -> None:
    before = spark.sparkContext.statusTracker().getJobIdsForGroup(None)
    with pytest.raises(ConfigError, match=message):
        classifier(params.pop("strategy"), **params).fit(rows)
    assert spark.sparkContext.statusTracker().getJobIdsForGroup(None) == before
