"""What training gives does not depend on how many ranks did it, and every row counts exactly once."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import Tensor, nn

from sparkdl import TorchClassificationModel, TorchClassifier, TorchEstimator, TorchModel
from sparkdl.config import Column, Columns
from sparkdl.io.plan import RowGroup, ShardPlan, batch_row_ids, plan_pieces
from sparkdl.io.stage import StagedDataset, stage_dataset
from tests.spark.modules import Census, census_loss

pytestmark = pytest.mark.spark

SHARDS = 4
SEED = 11


def partitioned(df: DataFrame, rows: Sequence[int]) -> DataFrame:
    """Rows with ids from 0 in partitions of the given sizes, in the order of their ids."""
    number = F.lit(len(rows) - 1)
    for partition in reversed(range(len(rows) - 1)):
        number = F.when(F.col("id") < sum(rows[: partition + 1]), partition).otherwise(number)
    return df.repartitionById(len(rows), number.cast("int"))


def weights_of(module: nn.Module) -> Tensor:
    """All weights of a module in one vector of doubles."""
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def distance(found: nn.Module, expected: nn.Module) -> float:
    """Norm of the difference of the weights, relative to the norm of the expected ones."""
    return float((weights_of(found) - weights_of(expected)).norm() / weights_of(expected).norm())


# ---- staged: the same weights from any number of ranks, and from one plain loop --------------------------------------
WIDTH = 2048
BATCH = 96
LEARNING_RATE = 0.05
WINDOW_BYTES = 64 << 20
# Rows of each partition, and so of each file. The two large files have more than one row group.
PARTITIONS = (3, 1300, 0, 40, 1, 2100, 97)


def wide_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Features and labels that are functions of the row's id."""
    for batch in batches:
        ids = batch.column("id").to_numpy()[:, None]
        features = np.sin(ids * 0.37 + np.arange(WIDTH) * (ids % 13 + 1)).astype(np.float32)
        labels = (np.sin(ids * 0.37) > 0) + (ids % 3 == 0)
        offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * WIDTH)
        lists = pa.ListArray.from_arrays(offsets, pa.array(features.ravel()))
        yield pa.RecordBatch.from_arrays([lists, pa.array(labels.ravel().astype(np.int32))], ["features", "label"])


@pytest.fixture(scope="module")
def skewed(spark: SparkSession) -> Iterator[DataFrame]:
    """Wide rows in partitions of very different sizes, handed to Python a few hundred at a time."""
    setting = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(setting)
    spark.conf.set(setting, "300")
    rows = partitioned(spark.range(0, sum(PARTITIONS), 1, 1), PARTITIONS)
    yield rows.mapInArrow(wide_rows, "features array<float>, label int")
    spark.conf.set(setting, str(before))


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    """A row-wise module that draws no random numbers, with its initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 3))


@pytest.fixture(scope="module")
def fits(
    skewed: DataFrame, mlp: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, TorchClassificationModel]:
    """The same fit on 1, 2 and 4 ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("staging")
    found = {}
    for workers in (1, 2, 4):
        classifier = TorchClassifier(
            module=mlp, optimizer="sgd", learningRate=LEARNING_RATE, maxEpochs=1, batchSize=BATCH, seed=SEED,
            numTrainWorkers=workers, numShards=SHARDS, stagingDir=str(folder), verbose=False,
        )  # fmt: skip
        found[workers] = classifier.fit(skewed)
        assert not list(folder.iterdir()), "staged rows were left behind"
    return found


@pytest.fixture(scope="module")
def staged(skewed: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> StagedDataset:
    """The same rows staged once more: the same DataFrame gives the same files."""
    columns = Columns(
        inputs=(Column("features", "input_0", "array", "float32"),),
        labels=(Column("label", "label_0", "scalar", "int64", flat=True, validity="class"),),
    )
    return stage_dataset(skewed, columns, str(tmp_path_factory.mktemp("oracle") / "rows"))


def read_rows(row_groups: Sequence[RowGroup]) -> tuple[Tensor, Tensor]:
    """Features and labels of all staged rows, row group after row group."""
    tables = [pq.ParquetFile(group.path).read_row_group(group.index) for group in row_groups]
    cells = b"".join(cell for table in tables for cell in table["input_0"].to_pylist())
    features = np.frombuffer(cells, np.float32).reshape(-1, WIDTH)
    labels = np.concatenate([table["label_0"].to_numpy() for table in tables])
    return torch.from_numpy(features.copy()), torch.from_numpy(labels)


def train_plainly(module: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
    """SGD as a textbook has it; returns the loss of every batch."""
    losses = []
    for features, labels in batches:
        loss = nn.functional.cross_entropy(module(features), labels)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
        losses.append(loss.item())
    return losses


def test_the_staged_files_are_as_skewed_as_the_partitions(staged: StagedDataset) -> None:
    by_file: dict[str, list[int]] = {}
    for group in staged.train:
        by_file.setdefault(group.path, []).append(group.rows)
    assert [sum(rows) for rows in by_file.values()] == [rows for rows in PARTITIONS if rows]
    assert sorted(len(rows) for rows in by_file.values()) == [1, 1, 1, 1, 2, 2]
    shards = plan_pieces(staged.train, SHARDS)
    assert any(left[-1].row_group == right[0].row_group for left, right in pairwise(shards)), "no group crosses a cut"


def test_1_2_and_4_ranks_end_with_the_same_weights(fits: dict[int, TorchClassificationModel], mlp: nn.Module) -> None:
    assert distance(fits[1].module, mlp) > 0.01, "nothing was learnt"
    for workers in (2, 4):
        assert fits[workers].summary.worldSize == workers
        assert distance(fits[workers].module, fits[1].module) <= 1e-5
        assert fits[workers].history[0]["loss"] == pytest.approx(fits[1].history[0]["loss"], rel=1e-5)


def test_the_weights_are_those_of_a_plain_loop_over_the_planned_row_ids(
    fits: dict[int, TorchClassificationModel], staged: StagedDataset, mlp: nn.Module
) -> None:
    features, labels = read_rows(staged.train)
    shard_rows = tuple(sum(piece.rows for piece in pieces) for pieces in plan_pieces(staged.train, SHARDS))
    planned = list(
        batch_row_ids(
            staged.train,
            ShardPlan(shard_rows, BATCH),
            window=WINDOW_BYTES // (WIDTH * 4 + 8),
            shuffle="window",
            seed=SEED,
            epoch=0,
        )
    )
    assert sorted(np.concatenate(planned).tolist()) == list(range(sum(PARTITIONS)))

    with torch.random.fork_rng():
        expected = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 3))
    expected.load_state_dict(mlp.state_dict())
    losses = train_plainly(expected, ((features[ids], labels[ids]) for ids in planned))

    assert distance(expected, mlp) > 0.01
    for workers, model in fits.items():
        assert distance(model.module, expected) <= 1e-5, f"{workers} ranks"
        assert model.history[0]["step"] == len(planned)
        mean = float(np.average(losses, weights=[len(ids) for ids in planned]))
        assert model.history[0]["loss"] == pytest.approx(mean, rel=1e-4)


def test_another_order_of_the_rows_would_have_been_noticed(
    fits: dict[int, TorchClassificationModel], staged: StagedDataset, mlp: nn.Module
) -> None:
    features, labels = read_rows(staged.train)
    with torch.random.fork_rng():
        other = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 3))
    other.load_state_dict(mlp.state_dict())
    train_plainly(other, zip(features.split(BATCH), labels.split(BATCH), strict=True))
    assert distance(fits[1].module, other) > 1e-4


# ---- exactly once, counted by the weights ----------------------------------------------------------------------------
def take_census(
    df: DataFrame, rows: int, *, workers: int, shards: int, batch_size: int, epochs: int = 1, staging: str | None = None
) -> TorchModel:
    """Fit a `Census`, and check that every row was trained on once per epoch."""
    estimator = TorchEstimator(
        module=Census(rows), loss=census_loss, inputCols=["id", "features"], outputCols=["seen", "regressed"],
        optimizer="sgd", learningRate=0.125, maxEpochs=epochs, batchSize=batch_size, seed=SEED,
        numTrainWorkers=workers, numShards=shards, stagingDir=staging, verbose=False,
    )  # fmt: skip
    model = estimator.fit(df)
    steps = model.history[0]["step"]
    assert steps == -(-rows // batch_size)
    assert rows % steps == 0, "choose numbers that make all batches equal"
    torch.testing.assert_close(model.module.times_seen(rows / steps, 0.125), torch.full((rows,), float(epochs)))
    assert [record["rows"] for record in model.history] == [rows] * epochs
    assert model.summary.rows == sum(model.summary.rankRows) == rows
    return model


def narrow(spark: SparkSession, partitions: Sequence[int]) -> DataFrame:
    """Rows with an id, three features and a label."""
    rows = partitioned(spark.range(0, sum(partitions), 1, 1), partitions)
    features = F.array(*[F.sin(F.col("id") * 0.37 + place).cast("float") for place in range(3)])
    return rows.select("id", features.alias("features"), F.cos(F.col("id") * 0.37).alias("label"))


def test_spooled_rows_are_trained_on_once_per_epoch_by_1_and_4_ranks(spark: SparkSession) -> None:
    df = narrow(spark, (2, 150, 0, 7, 41))
    models = {
        workers: take_census(df, 200, workers=workers, shards=SHARDS, batch_size=20, epochs=2) for workers in (1, 4)
    }
    for workers, model in models.items():
        assert not model.summary.staged
        assert len(model.summary.rankRows) == workers
        losses = [record["loss"] for record in model.history]
        assert losses == pytest.approx([record["loss"] for record in models[1].history], rel=0.05)
        assert losses[1] < losses[0]


def test_many_partitions_of_one_row_are_dealt_evenly(spark: SparkSession) -> None:
    model = take_census(narrow(spark, [1] * 40), 40, workers=4, shards=4, batch_size=8)
    assert max(model.summary.rankRows) - min(model.summary.rankRows) <= 2


def test_fewer_rows_than_ranks_train(spark: SparkSession) -> None:
    model = take_census(narrow(spark, (2, 1)), 3, workers=4, shards=4, batch_size=4)
    assert 0 in model.summary.rankRows


def test_more_shards_than_rows_train(spark: SparkSession, tmp_path: Path) -> None:
    take_census(narrow(spark, (1, 4)), 5, workers=2, shards=8, batch_size=8, staging=str(tmp_path))


def test_one_giant_row_group_feeds_4_shards_evenly(spark: SparkSession, tmp_path: Path) -> None:
    model = take_census(narrow(spark, [402]), 402, workers=4, shards=4, batch_size=67, staging=str(tmp_path))
    assert model.summary.staged
    assert sorted(model.summary.rankRows) == [100, 100, 101, 101]
