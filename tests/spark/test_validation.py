"""Validation rows, however they are held out: each is validated on once, and none is trained on."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType
from torch import Tensor, nn

from sparkdl import TorchEstimator, TorchModel, TorchRegressor
from sparkdl.config import Column, Columns, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io import ParquetDataset
from sparkdl.io.stage import deal_rows
from sparkdl.io.validation import DATASET, hold_out
from tests.spark.modules import job_ids

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

ROWS, SHARDS, BATCH = 120, 3, 12
X = Column("x", "input_0", "scalar", "float32")
NUMBER = Column("id", "label_0", "scalar", "int64", flat=True)


class Witness(nn.Module):
    """Notes which rows it sees, and when."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.weigh = nn.Linear(1, 1)
        self.steps = 0

    def forward(self, row: Tensor, x: Tensor) -> Tensor:
        held = torch.is_inference_mode_enabled()
        if not held and len(row) <= 2:  # a rank tries its first two rows before the first step
            return self.weigh(x)[:, 0]
        note = {"step": None if held else self.steps, "rows": row.tolist()}
        self.steps += not held
        file = os.open(f"{self.folder}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, json.dumps(note).encode() + b"\n")
        os.close(file)
        return self.weigh(x)[:, 0]


def rows_of(spark: SparkSession, first: int = 0, last: int = ROWS, partitions: int = 4) -> DataFrame:
    return spark.range(first, last, 1, partitions).select("id", F.sin("id").alias("x"), F.cos("id").alias("label"))


def parquet_of(folder: Path, first: int = 0, last: int = ROWS) -> ParquetDataset:
    ids = np.arange(first, last)
    half = (first + last) // 2
    folder.mkdir()
    for part, rows in enumerate((ids[: half - first], ids[half - first :])):
        table = pa.table({"id": rows, "x": np.sin(rows), "label": np.cos(rows)})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=17)
    return ParquetDataset(str(folder))


class Fits:
    """Fits of one kind of data, and what their modules saw."""

    def __init__(self, spark: SparkSession, folder: Path, mode: str) -> None:
        self._folder, self._fits = folder, 0
        self.rows: Any = parquet_of(folder / "rows") if mode == "in place" else rows_of(spark)
        last = ROWS + 31
        self.second: Any = (
            parquet_of(folder / "second", ROWS, last) if mode == "in place" else rows_of(spark, ROWS, last)
        )
        place = {"staged": "stagingDir", "with checkpoints": "checkpointDir"}.get(mode)
        self._settings = {} if place is None else {place: str(folder / "shared")}

    def fit(self, ranks: int, **settings: Any) -> tuple[TorchModel, list[frozenset[int]], list[int]]:
        """The model, the rows of each training step, and the rows that were validated on."""
        self._fits += 1
        notes = self._folder / str(self._fits)
        notes.mkdir()
        estimator = TorchEstimator(
            module=Witness(str(notes)), loss="mse", inputCols=["id", "x"], optimizer="sgd", learningRate=0.001,
            batchSize=BATCH, numShards=SHARDS, maxEpochs=1, numTrainWorkers=ranks, verbose=False,
            **{**self._settings, **settings},
        )  # fmt: skip
        model = estimator.fit(self.rows)
        seen = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
        steps: dict[int, list[int]] = {}
        for note in seen:
            if note["step"] is not None:
                steps.setdefault(note["step"], []).extend(note["rows"])
        assert all(len(rows) == len(set(rows)) for rows in steps.values())
        held = sorted(row for note in seen if note["step"] is None for row in note["rows"])
        return model, [frozenset(steps[step]) for step in sorted(steps)], held


@pytest.mark.parametrize(
    ("mode", "numbers_of_ranks"),
    [
        ("spooled", (1, 3)),
        ("in place", (1, 2)),
        *(pytest.param(mode, (1, 2, 3), marks=pytest.mark.slow) for mode in ("spooled", "staged", "in place")),
    ],
)
def test_a_fraction_is_validated_on_once_and_the_rest_trained_on_once(
    spark: SparkSession, tmp_path: Path, mode: str, numbers_of_ranks: tuple[int, ...]
) -> None:
    fits = Fits(spark, tmp_path, mode)
    found = []
    for ranks in numbers_of_ranks:
        model, steps, held = fits.fit(ranks, validationFraction=0.25, seed=4)
        train = Counter(row for rows in steps for row in rows)
        assert set(train.values()) == {1}
        assert sorted([*train, *held]) == list(range(ROWS))
        assert abs(len(held) - 30) < 4 * 22.5**0.5
        assert model.history[0]["rows"] == len(train)
        with torch.inference_mode():
            missed = model.module.weigh(torch.tensor(held).sin()[:, None])[:, 0] - torch.tensor(held).cos()
        assert model.history[0]["validation_loss"] == pytest.approx(float((missed**2).mean()), rel=1e-4)
        found.append((steps, held))
    assert all(other == found[0] for other in found)
    # The model knows nothing of the flag.
    assert model.transform(rows_of(spark)).columns == ["id", "x", "label", "output"]


@pytest.mark.parametrize(
    ("mode", "numbers_of_ranks"),
    [
        ("spooled", (3,)),
        pytest.param("spooled", (1, 2), marks=pytest.mark.slow),
        pytest.param("with checkpoints", (2,), marks=pytest.mark.slow),
        *(pytest.param(mode, (1, 2, 3), marks=pytest.mark.slow) for mode in ("staged", "in place")),
    ],
)
def test_a_second_data_set_is_validated_on_once_and_what_is_trained_on_stays_the_same(
    spark: SparkSession, tmp_path: Path, mode: str, numbers_of_ranks: tuple[int, ...]
) -> None:
    fits = Fits(spark, tmp_path, mode)
    _, expected, none = fits.fit(2)
    assert none == []
    assert sorted(row for rows in expected for row in rows) == list(range(ROWS))
    for ranks in numbers_of_ranks:
        model, steps, held = fits.fit(ranks, validationDataset=fits.second)
        assert steps == expected
        assert held == list(range(ROWS, ROWS + 31))
        assert "validation_loss" in model.history[0]
    if mode in ("staged", "with checkpoints"):
        data = tmp_path / "shared" / ("data" if mode == "with checkpoints" else "")
        assert list(data.iterdir()) == []


def test_a_second_data_set_may_lie_in_other_folders_under_other_filters(spark: SparkSession, tmp_path: Path) -> None:
    fits = Fits(spark, tmp_path, "in place")
    ids = np.arange(ROWS, ROWS + 40)
    rows = pa.table({"id": ids, "part": ids % 2, "x": pa.array(np.sin(ids)), "label": np.cos(ids)})
    pq.write_to_dataset(
        rows.append_column("late", pa.array(ids >= ROWS + 20)), tmp_path / "other", partition_cols=["part"]
    )
    second = ParquetDataset(str(tmp_path / "other"), filters=[("part", "=", 1), ("late", "=", True)])
    _, steps, held = fits.fit(2, validationDataset=second)
    assert sorted(row for rows in steps for row in rows) == list(range(ROWS))
    assert held == list(range(ROWS + 21, ROWS + 40, 2))


# ---- which rows are drawn --------------------------------------------------------------------------------------------
def drawn(df: DataFrame, columns: Columns, fraction: float = 0.4, seed: int = 1) -> DataFrame:
    config = TrainConfig(validation_fraction=fraction, seed=seed)
    flagged, found, _ = hold_out(df, columns, config, None, spooled=True)
    assert found.validation is not None
    return flagged.withColumn("held", F.col(found.validation.name))


def test_rows_are_drawn_by_their_values_whatever_the_partitions(spark: SparkSession) -> None:
    columns = Columns((X,), (NUMBER,))
    df = rows_of(spark, 0, 2000)
    held = {row["id"] for row in drawn(df, columns).filter("held").collect()}
    assert abs(len(held) - 800) < 4 * 480**0.5
    for other in (df.repartition(7), df.orderBy(F.desc("x")), df.withColumn("more", F.rand()).coalesce(1)):
        assert {row["id"] for row in drawn(other, columns).filter("held").collect()} == held
    again = {row["id"] for row in drawn(df, columns, seed=2).filter("held").collect()}
    assert abs(len(again & held) - 320) < 4 * 320**0.5
    more = {row["id"] for row in drawn(df, columns, fraction=0.6).filter("held").collect()}
    assert held < more


def test_equal_rows_are_on_one_side_whatever_their_types(spark: SparkSession) -> None:
    fields = {
        "flag": "id % 2 = 0",
        "amount": "cast(id % 7 as decimal(20, 3))",
        "day": "date_add(date'2026-01-01', cast(id % 5 as int))",
        "moment": "timestamp_seconds(id % 5)",
        "local": "cast(timestamp_seconds(id % 5) as timestamp_ntz)",
        "word": "if(id % 4 = 0, null, concat('word ', id % 4))",
        "bytes": "cast(concat('bytes ', id % 3) as binary)",
        "zero": "if(id >= 300, -0.0d, 0.0d)",
        "values": "array(id % 3, null)",
        "nested": "array(array(cast(id % 2 as float)))",
    }
    df = spark.range(0, 600, 1, 3).select("id", *(F.expr(text).alias(name) for name, text in fields.items()))
    vectors = StructType(
        [StructField("part", StructType.fromDDL("a long").fields[0].dataType), StructField("v", VectorUDT())]
    )
    dense = [(part, Vectors.dense([float(part), 0.0])) for part in range(3)]
    df = df.withColumn("part", F.col("id") % 3).join(spark.createDataFrame(dense, vectors), "part")
    columns = Columns(tuple(Column(name, "input_0", "raw", "") for name in (*fields, "v")), ())
    sides = (
        drawn(df, columns).groupBy(*fields, "v").agg(F.countDistinct("held").alias("sides"), F.count("*").alias("n"))
    )
    found = sides.collect()
    assert {row["sides"] for row in found} == {1}
    assert 50 < len(found) < 600
    assert max(row["n"] for row in found) > 1
    share = drawn(df, columns).agg(F.avg(F.col("held").cast("double"))).first()
    assert share is not None
    assert 0.2 < share[0] < 0.6


# ---- the first data set's shards stay as they are --------------------------------------------------------------------
@pytest.mark.slow
def test_the_shards_are_those_of_a_fit_without_validation_also_where_both_end_in_a_shuffle(spark: SparkSession) -> None:
    """Adaptive execution would cut the partitions of both by the size of both."""
    columns = Columns((X,), (NUMBER,))
    ids = (F.col("id") * 7 % 4000).alias("id")
    both = spark.range(0, 4000, 1, 4).groupBy(ids).count().select("id", F.sin("id").alias("x"))
    train, second = both.filter("id % 3 > 0"), both.filter("id % 3 = 0")
    size, partitions = "spark.sql.adaptive.coalescePartitions.minPartitionSize", "spark.sql.shuffle.partitions"
    settings = {size: "1kb", partitions: "16"}
    before = {name: spark.conf.get(name, None) for name in settings}
    for name, value in settings.items():
        spark.conf.set(name, value)

    def shards(df: DataFrame, read: Columns) -> list[list[int]]:
        dealt = deal_rows(df, read, num_shards=3, world_size=2, partitioning=partitioning).toArrow().to_pylist()
        rows = [row for row in dealt if not row.get("validation")]
        return [[row["label_0"] for row in rows if row["shard"] == shard] for shard in range(3)]

    try:
        for partitioning in ("sample", "batch", "random"):
            union, read, _ = hold_out(train, columns, TrainConfig(num_shards=3), second, spooled=True)
            assert isinstance(union, DataFrame)
            expected = shards(train, columns)
            assert shards(union, read) == expected, partitioning
            plain = train.withColumn(DATASET, F.lit(False)).union(second.withColumn(DATASET, F.lit(True)))
            assert shards(plain, read) != expected or partitioning == "batch", "the case that this test is about"
        held = deal_rows(union, read, num_shards=3, world_size=2).toArrow().to_pylist()
        ranks = Counter(row["shard"] for row in held if row["validation"])
        assert sorted(row["label_0"] for row in held if row["validation"]) == list(range(0, 4000, 3))
        assert max(ranks.values()) - min(ranks.values()) <= 3
    finally:
        for name, value in before.items():
            spark.conf.unset(name) if value is None else spark.conf.set(name, value)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"partitioning": "key", "partitionKeyCol": "a key"}],
    ids=str,
)
def test_a_second_dataframe_may_be_cached_or_limited_and_have_more_columns(
    spark: SparkSession, settings: dict[str, Any]
) -> None:
    rows = rows_of(spark).withColumn("a key", F.col("id") % 5)
    second = rows_of(spark, ROWS, ROWS + 50).withColumn("gap", F.expr("make_interval(0, 0, 0, 1)"))
    second = second.select("gap", "label", F.lit(1).cast("long").alias("a key"), "x", "id").limit(20).cache()
    try:
        regressor = TorchRegressor(
            module=nn.Linear(1, 1), featuresCol="x", maxEpochs=1, batchSize=30, numTrainWorkers=2, verbose=False,
            validationDataset=second, **settings,
        )  # fmt: skip
        model = regressor.fit(rows.limit(100).cache())
        missed = [model.predict(row["x"]) - row["label"] for row in second.drop("gap").collect()]
    finally:
        second.unpersist()
        rows.limit(100).unpersist()
    assert model.history[0]["rows"] == 100
    assert model.history[0]["validation_loss"] == pytest.approx(float(np.mean(np.square(missed))), rel=1e-4)


# ---- refusals and empty sets -----------------------------------------------------------------------------------------
def regressor(**settings: Any) -> TorchRegressor:
    return TorchRegressor(
        **{"module": nn.Linear(1, 1), "featuresCol": "x", "maxEpochs": 1, "batchSize": 30, "verbose": False, **settings}
    )


def test_what_cannot_be_is_refused_before_any_job(spark: SparkSession, tmp_path: Path) -> None:
    rows, parquet = rows_of(spark), parquet_of(tmp_path / "rows")
    cases = [
        ({"validationFraction": 0.2, "validationDataset": rows}, rows,
         r"^validationFraction=0\.2 and validationDataset are set"),
        ({"validationFraction": 1.5}, parquet, r"^validationFraction=1\.5 is not between 0 and 1"),
        ({"validationDataset": parquet}, rows,
         r"^fit was given a DataFrame, but validationDataset a ParquetDataset.*Give "
         r"both of one kind: the DataFrame of these files is spark\.read\.parquet\('.*rows'\)\.$"),
        ({"validationDataset": rows}, parquet, r"^validationDataset was given a DataFrame, but fit a ParquetDataset"),
        ({"validationDataset": rows_of(spark.newSession())}, rows,
         r"^validationDataset belongs to another Spark session"),
        ({"validationDataset": rows.drop("x")}, rows, r"^validationDataset has no column 'x', but"),
        ({"validationDataset": rows.withColumn("x", F.lit(1.0).cast("float"))}, rows,
         r"^validationDataset holds 'x' as float, not double as in the rows that are trained on\. Cast"),
        ({"validationFraction": 0.2}, rows.withColumn("validationFraction", F.lit(1)),
         r"^There is a column 'validationFraction', but"),
        ({"featuresCol": "tags", "transform": dict, "validationFraction": 0.2},
         rows.withColumn("tags", F.create_map("id", "x")),
         r"'tags' has type map<bigint,double>, and Spark hashes no maps\. Set validationIndicatorCol"),
    ]  # fmt: skip
    with job_ids(spark, "refused") as jobs:
        for settings, dataset, message in cases:
            with pytest.raises(ConfigError, match=message):
                regressor(**settings).fit(dataset)
    assert jobs == []


@pytest.mark.parametrize(
    ("mode", "settings", "found"),
    [
        ("spooled", {"validationIndicatorCol": "held"}, r"validationIndicatorCol='held' is true in no row"),
        ("staged", {"validationDataset": None}, r"validationDataset has no rows"),
        ("in place", {"validationFraction": 1e-9}, r"validationFraction=1e-09 drew none of the rows"),
        *(
            pytest.param(mode, settings, found, marks=pytest.mark.slow)
            for mode, settings, found in (
                ("spooled", {"validationFraction": 1e-9}, r"validationFraction=1e-09 drew none of the rows"),
                ("spooled", {"validationDataset": None}, r"validationDataset has no rows"),
                ("in place", {"validationDataset": None}, r"validationDataset has no rows"),
            )
        ),
    ],
)
def test_a_fit_without_validation_rows_warns(
    spark: SparkSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    settings: dict[str, Any],
    found: str,
) -> None:
    rows = rows_of(spark, 0, 20).withColumn("held", F.lit(False))
    second: Any = rows.filter("id < 0")
    dataset: Any = rows
    if mode == "in place":
        rows.write.parquet(str(tmp_path / "rows"))
        dataset = ParquetDataset(str(tmp_path / "rows"))
        second = ParquetDataset(str(tmp_path / "rows"), filters=[("id", "<", 0)])
    settings = {**settings, **({"validationDataset": second} if "validationDataset" in settings else {})}
    if mode == "staged":
        settings["stagingDir"] = str(tmp_path / "staging")
    with caplog.at_level(logging.WARNING, "sparkdl"):
        model = regressor(**settings).fit(dataset)
    assert "validation_loss" not in model.history[0]
    assert model.history[0]["rows"] == 20
    (message,) = [record.getMessage() for record in caplog.records if "validation" in record.getMessage()]
    assert message.startswith(f"{found}: the fit goes without validation. ".replace("\\", ""))
    with pytest.raises(DataError, match=rf"^{found}, but restoreBest needs validation rows\."):
        regressor(restoreBest=True, **settings).fit(dataset)


# ---- Spark Connect ---------------------------------------------------------------------------------------------------
OVER_CONNECT = """
import json, sys
from pathlib import Path
from pyspark.sql import SparkSession, functions as F
import sparkdl
from sparkdl.config import Columns
from tests.spark.test_validation import NUMBER, X, Fits, drawn, regressor, rows_of

spark = SparkSession.builder.remote("local[2]").getOrCreate()
drew = sorted(row["id"] for row in drawn(rows_of(spark, 0, 300), Columns((X,), (NUMBER,))).filter("held").collect())
found = {}
for mode in ("spooled", "staged", "in place"):
    folder = Path(sys.argv[1], mode)
    folder.mkdir()
    fits = Fits(spark, folder, mode)
    _, steps, held = fits.fit(2, validationDataset=fits.second)
    found[mode] = [sorted(row for rows in steps for row in rows), held]
_, steps, held = fits.fit(2, validationFraction=0.25)
fraction = sorted([*(row for rows in steps for row in rows), *held])
try:
    regressor(validationDataset=rows_of(spark.newSession())).fit(rows_of(spark))
    refusal = None
except sparkdl.SparkdlError as error:
    refusal = str(error)
print(json.dumps([type(spark).__module__, drew, found, fraction, refusal]))
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_validation_rows_are_held_out_over_connect_as_on_classic_spark(spark: SparkSession, folder: str) -> None:
    pytest.importorskip("grpc", reason="Spark Connect needs the extra sparkdl-torch[connect]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_"))}
    done = subprocess.run(
        [sys.executable, "-c", OVER_CONNECT, folder],
        env={**environment, "PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    session, drew, found, fraction, refusal = json.loads(done.stdout.splitlines()[-1])
    assert session.startswith("pyspark.sql.connect")
    here = drawn(rows_of(spark, 0, 300), Columns((X,), (NUMBER,))).filter("held").collect()
    assert drew == sorted(row["id"] for row in here)
    assert found == {
        mode: [list(range(ROWS)), list(range(ROWS, ROWS + 31))] for mode in ("spooled", "staged", "in place")
    }
    assert fraction == list(range(ROWS))
    assert "belongs to another Spark session" in refusal
