"""Parquet that Spark wrote, found and inspected by Spark jobs: the same as without them."""

import pickle
from pathlib import Path

import pyarrow.compute as pc
import pytest
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.dataset import ParquetDataset, discover, discover_locally
from sparkdl.io.inspection import inspect_dataset, inspect_locally
from sparkdl.storage import default_file_system

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

COLUMNS = Columns(
    (Column("features", "input_0", "vector", "float32"),),
    (Column("label", "label_0", "scalar", "int64", flat=True, validity="class"),),
    validation=Column("held", "validation", "scalar", "bool", flat=True),
)
SECRET = "wordthatissecret"


@pytest.fixture(scope="module")
def table(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows 0 to 199 with Vectors, in folders day=2024-01-01 to day=2024-01-04."""
    path = str(tmp_path_factory.mktemp("table") / "rows")
    df = spark.range(0, 200, 1, 2).select(
        "id",
        (F.col("id") % 3).cast("int").alias("label"),
        (F.col("id") % 5 == 0).alias("held"),
        F.sin("id").alias("x"),
        F.date_add(F.lit("2024-01-01").cast("date"), (F.col("id") % 4).cast("int")).alias("day"),
    )
    assembled = VectorAssembler(inputCols=["x", "id"], outputCol="features").transform(df)
    assembled.write.partitionBy("day").parquet(path)
    return path


def test_what_spark_wrote_has_the_columns_that_spark_reads(spark: SparkSession, table: str) -> None:
    found = discover(spark, ParquetDataset(table))
    assert [(one.name, one.dataType) for one in found.schema] == [
        (one.name, one.dataType) for one in spark.read.parquet(table).schema
    ]
    assert all(file.path.startswith(f"file://{table}/day=2024-01-0") for file in found.files)


def test_a_job_finds_what_a_process_finds(spark: SparkSession, table: str) -> None:
    filters = (pc.field("id") < 150) & pc.field("day").isin(["2024-01-02", "2024-01-04"])
    dataset = ParquetDataset(f"file://{table}", filters=filters)
    found, alone = discover(spark, dataset), discover_locally(dataset)
    assert found.files == alone.files
    assert found.schema == alone.schema
    staged = inspect_dataset(spark, found, COLUMNS)
    assert staged == inspect_locally(alone, COLUMNS)
    kept = [number for number in range(150) if number % 4 in (1, 3)]
    assert sum(group.rows for group in staged.train) == sum(number % 5 != 0 for number in kept)
    assert sum(group.rows for group in staged.validation) == sum(number % 5 == 0 for number in kept)
    assert staged.facts.labels == (0, 2)
    assert staged.facts.widths == {"input_0": 2, "label_0": 1}


def test_errors_of_a_job_are_those_of_a_process_and_hold_no_secret(
    spark: SparkSession, table: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"^file://{tmp_path}/none does not exist\.") as missing:
        discover(spark, ParquetDataset(f"{tmp_path}/none", storage_options={"secret_key": SECRET}))
    (tmp_path / "b.csv").write_bytes(b"id\n1\n")
    with pytest.raises(DataError, match=rf"^file://{tmp_path}/b\.csv cannot be read as Parquet: .*another format"):
        discover(spark, ParquetDataset(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^'table' is a relative path"):
        discover(spark, ParquetDataset("table"))
    found = discover(spark, ParquetDataset([table, table], storage_options={"secret_key": SECRET}))
    staged = inspect_dataset(spark, found, COLUMNS)
    assert SECRET not in f"{missing.value!r} {found!r} {staged!r} {pickle.dumps(staged)!r}"


def test_the_first_bad_file_is_named_whichever_task_meets_it(spark: SparkSession, tmp_path: Path) -> None:
    good = spark.range(10).select("id", F.lit(1).alias("label"))
    for number in range(6):
        bad = good.withColumn("label", F.col("label").cast("string")) if number in (3, 5) else good
        bad.coalesce(1).write.parquet(f"{tmp_path}/{number}")
    columns = Columns((Column("id", "input_0", "scalar", "float32"),), COLUMNS.labels)
    found = discover(spark, ParquetDataset(str(tmp_path)))
    with pytest.raises(
        DataError, match=rf"^file://{tmp_path}/3/\S+ holds 'label' as string, but the first file as int"
    ):
        inspect_dataset(spark, found, columns)


def test_paths_without_a_scheme_are_on_hadoops_default_file_system(spark: SparkSession) -> None:
    assert default_file_system(spark) == "file:///"
