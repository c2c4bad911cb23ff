"""Rows as users have them: Parquet where it lies, images, text, nulls, ragged arrays; kept, dealt and exchanged."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as spark_types
from torch import nn

from sparkdl import (
    TorchClassificationModel,
    TorchClassifier,
    TorchEstimator,
    TorchModel,
    TorchRegressor,
    allow_modules,
    serialization,
)
from sparkdl.errors import ConfigError, DataError, PersistenceError, SparkdlError
from sparkdl.io import ParquetDataset
from sparkdl.storage import open_file_system
from tests.spark.modules import Census, PictureAndMatrix, Pictures, Words, census_loss, decode_png
from tests.unit.test_storage import S3Server, s3_server

__all__ = ["s3_server"]  # a fixture

pytestmark = pytest.mark.spark

RATE = 0.125
QUIET: dict[str, Any] = {"verbose": False, "maxEpochs": 1}


def census(rows: int, **settings: Any) -> TorchEstimator:
    """An estimator whose module counts how often each row was trained on."""
    return TorchEstimator(
        **{
            "module": Census(rows),
            "loss": census_loss,
            "inputCols": ["id", "features"],
            "outputCols": ["seen", "regressed"],
            "optimizer": "sgd",
            "learningRate": RATE,
            "numTrainWorkers": 2,
            **QUIET,
            **settings,
        }
    )


def assert_counted(model: TorchModel, rows: int, kept: list[int], batch_rows: float, epochs: int = 1) -> None:
    """Every row that was kept was trained on once per epoch, and no other."""
    expected = torch.zeros(rows)
    expected[kept] = float(epochs)
    torch.testing.assert_close(model.module.times_seen(batch_rows, RATE), expected, atol=1e-4, rtol=1e-4)


# ---- Parquet where it lies -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows in three days, of which the first half of each is before noon; some row groups are tiny."""
    folder = tmp_path_factory.mktemp("table")
    for day in range(3):
        ids = np.arange(80 * day, 80 * day + 80)
        rows = pa.table(
            {
                "id": ids,
                "a": np.sin(ids).astype(np.float32),
                "b": np.cos(ids).astype(np.float32),
                "c": ids / 240,
                "label": np.sin(ids) + 1,
                "hour": (ids % 80) * 24 // 80,
                "late": ids % 80 >= 60,
            }
        )
        (folder / f"day={day}").mkdir()
        with pq.ParquetWriter(folder / f"day={day}" / "part-0.parquet", rows.schema) as writer:
            for start, stop in ((0, 1), (1, 50), (50, 80)):
                writer.write_table(rows.slice(start, stop - start))
    return folder


ASSEMBLE = {"features": ["a", "b", "c"]}


def test_parquet_is_trained_on_in_place(spark: SparkSession, table: Path) -> None:
    dataset = ParquetDataset(str(table), filters=(pc.field("day") > 0) & (pc.field("hour") < 12), assemble=ASSEMBLE)
    model = census(240, batchSize=20, numShards=4, maxEpochs=2).fit(dataset)
    kept = [row for row in range(80, 240) if row % 80 < 40]
    assert_counted(model, 240, kept, 20, epochs=2)
    assert model.summary.staged
    assert model.summary.rankRows == (40, 40)
    assert model.summary.rankShards == ((0, 2), (1, 3))
    record = model.history[-1]
    assert (record["rows"], record["step"]) == (80, 8)
    assert (record["shard_rows_min"], record["shard_rows_max"], record["skew"]) == (20, 20, 1.0)
    # The DataFrame that is transformed may have the parts, or the whole.
    parts = model.transform(spark.read.parquet(str(table))).select("id", "regressed").sort("id").toArrow()
    whole = spark.read.parquet(str(table)).select("id", F.array("a", "b", "c").alias("features"))
    same = model.transform(whole).select("id", "regressed").sort("id").toArrow()
    assert parts.equals(same)
    rows = pq.read_table(table).sort_by("id")
    features = np.stack([rows[name].to_numpy().astype(np.float32) for name in "abc"], 1)
    with torch.inference_mode():
        expected = model.module(torch.arange(240), torch.from_numpy(features))[1]
    np.testing.assert_allclose(np.concatenate(parts["regressed"].to_numpy()), expected, rtol=1e-5, atol=1e-6)


def test_rows_of_parquet_may_be_held_out(table: Path) -> None:
    rows = pq.read_table(table / "day=0" / "part-0.parquet")
    dataset = ParquetDataset(f"file://{table}", filters=[("day", "=", 0)], assemble=ASSEMBLE)
    regressor = TorchRegressor(module=nn.Linear(3, 1), validationIndicatorCol="late", batchSize=20, **QUIET)
    model = regressor.fit(dataset)
    assert model.history[0]["rows"] == 60
    features = np.stack([rows[name].to_numpy().astype(np.float32) for name in "abc"], 1)[60:]
    with torch.inference_mode():
        missed = model.module(torch.from_numpy(features))[:, 0] - torch.from_numpy(rows["label"].to_numpy()[60:])
    assert model.history[0]["validation_loss"] == pytest.approx(float((missed**2).mean()), rel=1e-4)
    with pytest.raises(ConfigError, match=r"assemble has an entry for 'features', but only a, label are read"):
        TorchRegressor(module=nn.Linear(1, 1), featuresCol="a", **QUIET).fit(dataset)


def test_rows_of_parquet_cannot_be_moved(spark: SparkSession, table: Path) -> None:
    dataset = ParquetDataset(str(table), assemble=ASSEMBLE)
    with pytest.raises(
        ConfigError, match=r"partitioning='key' moves rows, but Parquet read in place stays where it is"
    ):
        census(240, partitioning="key", partitionKeyCol="hour").fit(dataset)
    with pytest.raises(ConfigError, match=r"featuresCol='x' is not a column\. The DataFrame has .*day"):
        TorchRegressor(module=nn.Linear(1, 1), featuresCol="x", **QUIET).fit(ParquetDataset(str(table)))


# ---- text, images, arrays --------------------------------------------------------------------------------------------
def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_transform_decodes_images_in_fit_and_in_transform(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (60, 4, 4), dtype=np.uint8)
    rows = [(number, bytearray(png(image)), int(image.mean() > 127)) for number, image in enumerate(pixels)]
    df = spark.createDataFrame(rows, "id long, picture binary, label int").repartition(2)
    classifier = TorchClassifier(
        module=Pictures(), featuresCol="picture", transform=decode_png, batchSize=20, numTrainWorkers=2, **QUIET
    )
    model = classifier.fit(df)
    assert model.numFeatures == 16
    assert model.history[0]["rows"] == 60
    found = np.stack([row["rawPrediction"].toArray() for row in model.transform(df).sort("id").collect()])
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(pixels[:, None]).float() / 255).double()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    model.write().overwrite().save(str(tmp_path / "model"))
    monkeypatch.setattr(serialization, "_allowed", set())
    with pytest.raises(PersistenceError, match=r"asks for the function tests\.spark\.modules:decode_png"):
        TorchClassificationModel.load(str(tmp_path / "model"))
    allow_modules("tests")
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    again = np.stack([row["rawPrediction"].toArray() for row in loaded.transform(df).sort("id").collect()])
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ConfigError, match=r"featuresCol='picture' has type binary.*transform"):
        classifier.copy({classifier.transform: None}).fit(df)


def test_petastorm_data_sets_train_through_the_same_path(spark: SparkSession, tmp_path: Path) -> None:
    from petastorm.codecs import CompressedImageCodec, NdarrayCodec, ScalarCodec
    from petastorm.unischema import Unischema, UnischemaField

    schema = Unischema(
        "Described",
        [
            UnischemaField("id", np.int64, (), ScalarCodec(spark_types.LongType()), False),
            UnischemaField("picture", np.uint8, (4, 4), CompressedImageCodec("png"), False),
            UnischemaField("matrix", np.float32, (2, 3), NdarrayCodec(), False),
        ],
    )
    random = np.random.default_rng(2)
    rows = [
        {
            "id": np.int64(number),
            "picture": random.integers(0, 255, (4, 4), dtype=np.uint8),
            "matrix": random.normal(size=(2, 3)).astype(np.float32),
        }
        for number in range(24)
    ]
    cells = [{name: field.codec.encode(field, row[name]) for name, field in schema.fields.items()} for row in rows]
    cells = [
        {name: bytes(cell) if isinstance(cell, bytearray) else cell for name, cell in row.items()} for row in cells
    ]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "part-0.parquet", row_group_size=5)
    dataset = ParquetDataset(str(tmp_path), unischema=schema)
    estimator = TorchEstimator(
        module=PictureAndMatrix(), loss="mse", inputCols=["picture", "matrix"], labelCol="id", optimizer="sgd",
        learningRate=1e-9, batchSize=24, numTrainWorkers=2, **QUIET,
    )  # fmt: skip
    model = estimator.fit(dataset)
    assert model.history[0]["rows"] == 24
    # Hardly anything was learnt, so the loss is that of the initial module on the rows as they were encoded.
    pictures = torch.from_numpy(np.stack([row["picture"] for row in rows]))
    matrices = torch.from_numpy(np.stack([row["matrix"] for row in rows]))
    with torch.inference_mode():
        missed = model.module(pictures, matrices)[:, 0] - torch.arange(24)
    assert model.history[0]["loss"] == pytest.approx(float((missed**2).mean()), rel=1e-3)


def test_parquet_on_s3_is_trained_on_in_place(spark: SparkSession, s3_server: S3Server) -> None:
    file_system, path = open_file_system(f"s3a://{s3_server.bucket}/rows", s3_server.options)
    ids = np.arange(60)
    rows = pa.table({"id": ids, "a": np.sin(ids), "b": np.cos(ids), "label": np.sin(ids) + 1})
    pq.write_to_dataset(
        rows.append_column("half", pa.array(ids % 2)), path, partition_cols=["half"], filesystem=file_system
    )
    dataset = ParquetDataset(
        f"s3a://{s3_server.bucket}/rows",
        filters=[("half", "=", 1)],
        assemble={"features": ["a", "b"]},
        storage_options=s3_server.options,
    )
    model = census(60, module=Census(60, width=2), batchSize=10, numShards=4).fit(dataset)
    assert_counted(model, 60, list(range(1, 60, 2)), 10)
    secret = s3_server.options["secret_key"]
    assert secret not in repr(dataset)
    assert secret not in json.dumps([model.history, str(model.summary), str(model.explainParams())])
    with pytest.raises(SparkdlError) as refused:
        census(60).fit(replace(dataset, url=f"s3a://{s3_server.bucket}/nothing"))
    assert "nothing" in str(refused.value)
    assert secret not in str(refused.value)


def test_a_file_that_is_cut_short_while_ranks_train_is_named(spark: SparkSession, tmp_path: Path) -> None:
    for number in range(2):
        rows = pa.table({"x": np.arange(20.0) + 20 * number, "label": np.zeros(20)})
        pq.write_table(rows, tmp_path / f"{number}.parquet", row_group_size=5)
    files, calls = [str(tmp_path / f"{number}.parquet") for number in range(2)], tmp_path / "_calls"

    def cut_short(columns: dict[str, Any]) -> dict[str, Any]:
        """At the sixth call the ranks have read their first rows, joined and begun."""
        with calls.open("ab") as file:
            file.write(b".")
        if calls.stat().st_size == 6:
            for path in files:
                os.truncate(path, 50)
        return columns

    regressor = TorchRegressor(
        module=nn.Linear(1, 1), featuresCol="x", transform=cut_short, cache="none", batchSize=4, numTrainWorkers=2,
        verbose=False, maxEpochs=50,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"Row group \d of \S*/[01]\.parquet (cannot be read|has \d rows).*fit again"):
        regressor.fit(ParquetDataset(str(tmp_path)))


@pytest.fixture(scope="module")
def texts(spark: SparkSession) -> DataFrame:
    """Words with tokens of different number, a null here and there."""
    rows = [("red", [1, 2], 1.0)] * 6 + [("green", [3], 2.0)] * 4 + [("blue", [4, 5, 6, 7], 3.0), (None, [8], 4.0)]
    return spark.createDataFrame(rows, "word string, tokens array<int>, label double").repartition(3)


def test_words_are_learnt_rows_padded_and_nulls_dropped(texts: DataFrame) -> None:
    estimator = TorchEstimator(
        module=Words(), loss="mse", inputCols=["word", "tokens"], vocabularies={"word": None},
        padding={"tokens": {"length": 3, "truncate": True}}, nulls={"word": "drop"}, batchSize=4, numTrainWorkers=2,
        **QUIET,
    )  # fmt: skip
    model = estimator.fit(texts)
    assert model.getVocabularies() == {"word": ["red", "green", "blue"]}
    assert (model.history[0]["rows"], model.summary.droppedRows) == (11, 1)
    known = texts.dropna(subset=["word"])
    for row in model.transform(known).distinct().collect():
        word = torch.tensor([["red", "green", "blue"].index(row["word"])])
        tokens = torch.tensor([[*row["tokens"], 0, 0][:3]])
        with torch.inference_mode():
            assert row["output"] == pytest.approx([model.module(word, tokens).item()], rel=1e-5)
    with pytest.raises(Exception, match=r"word.*is null in 1 of"):
        model.transform(texts).collect()
    with pytest.raises(Exception, match=r"pink"):
        model.transform(known.withColumn("word", F.lit("pink"))).collect()


def test_nulls_are_errors_unless_they_are_filled(spark: SparkSession) -> None:
    df = spark.createDataFrame([(1.0, 1.0), (None, 2.0), (3.0, 3.0)], "x double, label double").coalesce(1)
    regressor = TorchRegressor(module=nn.Linear(1, 1), featuresCol="x", **QUIET)
    with pytest.raises(DataError, match=r"'x' is null in 1 of 3 rows"):
        regressor.fit(df)
    model = regressor.copy({regressor.nulls: {"x": 0.5}}).fit(df)
    found = [row["prediction"] for row in model.transform(df).collect()]
    with torch.inference_mode():
        assert found == pytest.approx(model.module(torch.tensor([[1.0], [0.5], [3.0]]))[:, 0].tolist())
    unlabelled = df.select("x", F.expr("nullif(label, 2.0)").alias("label")).dropna(subset=["x"])
    unlabelled = unlabelled.union(spark.createDataFrame([(7.0, None)], "x double, label double"))
    with pytest.raises(DataError, match=r"'label' is null"):
        regressor.copy({regressor.nulls: 0.0}).fit(unlabelled)
    with pytest.raises(ConfigError, match=r"padding=\{'x': 3\} is not a rule\. Use \{'length'"):
        regressor.copy({regressor.padding: {"x": 3}}).fit(df)


# ---- learnt over all ranks -------------------------------------------------------------------------------------------
def test_inputs_are_standardised_with_the_moments_of_all_rows(spark: SparkSession, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal([5.0, -300.0, 2.0], [2.0, 50.0, 0.0], (90, 3))
    rows = [([float(value) for value in row], float(row[0])) for row in values]
    df = spark.createDataFrame(rows, "features array<double>, label double").repartition(4)
    regressor = TorchRegressor(
        module=nn.Linear(3, 1), standardization=True, batchSize=30, numTrainWorkers=2, learningRate=0.01, **QUIET
    )
    model = regressor.fit(df)
    mean, scale = model._fitted.moments["input_0"]
    assert mean == pytest.approx(values.mean(0), rel=1e-5)
    assert scale[:2] == pytest.approx(1 / values.std(0)[:2], rel=1e-5)
    assert scale[2] == 1.0, "a constant is only shifted"
    standardised = torch.from_numpy((values - values.mean(0)) * np.array(scale)).float()
    with torch.inference_mode():
        expected = sorted(model.module(standardised)[:, 0].tolist())
    assert sorted(row["prediction"] for row in model.transform(df).collect()) == pytest.approx(expected, abs=1e-5)
    assert model.predict(rows[0][0]) == pytest.approx(model.module(standardised[:1]).item(), abs=1e-5)
    model.save(str(tmp_path / "model"))
    assert type(model).load(str(tmp_path / "model")).predict(rows[0][0]) == model.predict(rows[0][0])


# ---- kept, dealt, exchanged ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def narrow(spark: SparkSession) -> DataFrame:
    """200 rows in the order of their ids."""
    features = F.array(*[F.sin(F.col("id") * 0.37 + place).cast("float") for place in range(3)])
    rows = spark.range(0, 200, 1, 3)
    return rows.select("id", features.alias("features"), F.cos(F.col("id") * 0.37).alias("label"))


@pytest.mark.slow
def test_where_rows_are_kept_changes_no_weight(narrow: DataFrame, tmp_path: Path) -> None:
    weights = {}
    for cache in ("none", "memory", "disk", "device"):
        model = census(200, batchSize=20, numShards=4, maxEpochs=2, cache=cache, stagingDir=str(tmp_path)).fit(narrow)
        assert_counted(model, 200, list(range(200)), 20, epochs=2)
        assert {"none": "not asked for", "device": "memory"}.get(cache, cache) in model.summary.cache
        weights[cache] = model.module.regress.weight
    for cache, weight in weights.items():
        assert torch.equal(weight, weights["none"]), cache


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"partitioning": "key", "partitionKeyCol": "bucket"}, marks=pytest.mark.slow),
        {"partitioning": "batch", "reshuffleInterval": 1},
        {"partitioning": "random", "shuffle": "full", "cache": "disk"},
    ],
    ids=str,
)
def test_every_row_is_trained_on_once_however_rows_are_dealt(narrow: DataFrame, settings: dict[str, Any]) -> None:
    df = narrow.withColumn("bucket", (F.col("id") % 7).cast("string"))
    model = census(200, batchSize=20, numShards=4, maxEpochs=2, **settings).fit(df)
    assert_counted(model, 200, list(range(200)), 20, epochs=2)
    assert sum(model.summary.rankRows) == 200


def test_balanced_shards_are_reported(narrow: DataFrame, tmp_path: Path) -> None:
    model = census(200, batchSize=20, numShards=6, balanceShards=True, maxEpochs=2, stagingDir=str(tmp_path)).fit(
        narrow
    )
    assert_counted(model, 200, list(range(200)), 20, epochs=2)
    assert sorted(shard for own in model.summary.rankShards for shard in own) == list(range(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle": "full", "cache": "none"}, r"shuffle='full' permutes all rows of a shard, which takes a cache"),
        ({"reshuffleInterval": 1, "cache": "none"}, r"reshuffleInterval=1 exchanges all rows, which takes a cache"),
        ({"reshuffleInterval": 1, "balanceShards": True}, r"reshuffleInterval=1 and balanceShards=True exclude"),
        ({"reshuffleInterval": 0}, r"reshuffleInterval=0 is too small"),
        ({"cache": "tape"}, r"cache='tape' is not known\. Use one of auto, none, memory, disk, device"),
        ({"partitioning": "alphabet"}, r"partitioning='alphabet' is not known\. Use one of sample, batch, random, key"),
        ({"partitioning": "key"}, r"partitioning='key' needs partitionKeyCol"),
        ({"partitionKeyCol": "id"}, r"partitionKeyCol='id' is set, but partitioning=None"),
        ({"partitioning": "key", "partitionKeyCol": "nowhere"}, r"'nowhere' is not a column"),
        ({"balanceShards": True}, r"balanceShards=True needs rows that all ranks reach.*stagingDir"),
        ({"transform": 3}, r"transform=3 is not a function"),
        ({"transform": lambda columns, generator: columns, "cache": "memory"}, r"cache='memory' would keep what"),
        ({"cacheBytes": -1}, r"cacheBytes=-1 is too small"),
        ({"readerThreads": 0}, r"readerThreads=0 is too small"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    narrow: DataFrame, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        census(200, **settings).fit(narrow)
