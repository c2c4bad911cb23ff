"""From a DataFrame to staged files: every row once, checked, and told to the plan."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.plan import RowGroup
from sparkdl.io.schema import decode
from sparkdl.io.stage import Facts, StagedDataset, deal_rows, remove_staged, stage_dataset
from tests.unit.staged import read_group, write_staged

pytestmark = pytest.mark.spark

FEATURES = Column("features", "input_0", "array", "float32")
NUMBER = Column("number", "label_0", "scalar", "int64", flat=True)
COLUMNS = Columns((FEATURES,), (NUMBER,))
HELD = Column("held", "validation", "scalar", "bool", flat=True)


def with_features(df: DataFrame) -> DataFrame:
    """Rows of ``id`` as what `COLUMNS` names; the features follow from the number."""
    number = F.col("id").alias("number")
    return df.select(number, F.array((number % 100).cast("float"), F.lit(0.5).cast("float")).alias("features"))


def in_partitions(spark: SparkSession, sizes: list[int]) -> DataFrame:
    """Rows with ids from 0 in partitions of the given sizes."""
    partition = F.lit(len(sizes) - 1)
    for number in reversed(range(len(sizes) - 1)):
        partition = F.when(F.col("id") < sum(sizes[: number + 1]), number).otherwise(partition)
    return with_features(spark.range(0, sum(sizes), 1, 1).repartitionById(len(sizes), partition.cast("int")))


# ---- staging ---------------------------------------------------------------------------------------------------------
def numbers_in(groups: tuple[RowGroup, ...], columns: Columns = COLUMNS) -> list[int]:
    """The numbers in row groups, after checking that the features belong to them."""
    numbers: list[int] = []
    for group in groups:
        found = decode(read_group(group), columns)
        assert found["input_0"].tolist() == [[number % 100, 0.5] for number in found["label_0"].tolist()]
        numbers += found["label_0"].tolist()
    return numbers


def files_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_staged_rows_are_there_once_with_what_the_plan_must_know(
    spark: SparkSession, tmp_path: Path, scheme: str
) -> None:
    url = f"{scheme}{tmp_path}/new folder/staged"
    staged = stage_dataset(in_partitions(spark, [5, 0, 300, 1, 0, 20]), COLUMNS, url)
    assert staged.url == url
    assert [group.rows for group in staged.train] == [5, 300, 1, 20], "partitions without rows make no file"
    assert list(staged.train) == sorted(staged.train)
    assert staged.validation == ()
    assert sorted(numbers_in(staged.train)) == list(range(326))
    assert (staged.facts.widths, staged.facts.labels) == ({"input_0": 2, "label_0": 1}, None)
    on_disk = files_below(tmp_path)
    assert {f"{scheme}{path}" for path in on_disk} == set(staged.files) == {group.path for group in staged.train}
    assert {path: os.path.getsize(path.removeprefix(scheme)) for path in staged.files} == staged.files
    for group in staged.train:
        assert pq.ParquetFile(group.path.removeprefix(scheme)).metadata.row_group(group.index).num_rows == group.rows


def test_row_groups_of_one_file_are_counted_in_order(spark: SparkSession, folder: str) -> None:
    wide = Columns((Column("wide", "input_0", "array", "float64"),), (NUMBER,))
    values = F.transform(F.sequence(F.lit(1), F.lit(300)), lambda place: place.cast("double"))
    df = with_features(spark.range(0, 24_000, 1, 1)).withColumn("wide", values)
    staged = stage_dataset(df, wide, f"{folder}/staged")
    assert len(staged.files) == 1
    assert len(staged.train) > 1
    assert [group.index for group in staged.train] == list(range(len(staged.train)))
    assert sum(group.rows for group in staged.train) == 24_000


def test_an_empty_dataframe_stages_nothing(spark: SparkSession, tmp_path: Path) -> None:
    for df in (with_features(spark.range(0)), spark.createDataFrame([], "number bigint, features array<float>")):
        staged = stage_dataset(df, COLUMNS, f"{tmp_path}/staged")
        assert staged == StagedDataset(f"{tmp_path}/staged", (), (), Facts(), {})
    assert files_below(tmp_path) == set()


def test_validation_rows_are_staged_apart_and_a_null_flag_means_training(spark: SparkSession, tmp_path: Path) -> None:
    flag = F.when(F.col("number") % 5 == 0, True).when(F.col("number") % 5 == 1, None).otherwise(F.lit(False))
    df = in_partitions(spark, [50, 50, 3]).withColumn("held", flag)
    staged = stage_dataset(df, Columns((FEATURES,), (NUMBER,), validation=HELD), f"{tmp_path}/staged")
    assert sorted(numbers_in(staged.validation)) == list(range(0, 103, 5))
    assert sorted(numbers_in(staged.train)) == [number for number in range(103) if number % 5]
    assert set(staged.files) == files_below(tmp_path) == {group.path for group in (*staged.train, *staged.validation)}


def test_a_partition_with_rows_of_one_kind_makes_one_file(spark: SparkSession, tmp_path: Path) -> None:
    df = in_partitions(spark, [10, 10]).withColumn("held", F.col("number") < 10)
    staged = stage_dataset(df, Columns((FEATURES,), (NUMBER,), validation=HELD), f"{tmp_path}/staged")
    assert [group.rows for group in staged.train] == [group.rows for group in staged.validation] == [10]
    assert files_below(tmp_path) == set(staged.files), "a file without rows was left, which no Parquet reader can open"


ODD_NAMES = ["a.b", "with space", "back`tick", "ünïcode", "label_0", "shard", "id", "a`.`b"]


def test_columns_may_have_any_name(spark: SparkSession, folder: str) -> None:
    inputs = [Column(name, f"input_{place}", "scalar", "int64", flat=True) for place, name in enumerate(ODD_NAMES)]
    columns = Columns(tuple(inputs), (NUMBER,))
    odd = [(F.col("id") * 100 + place).alias(name) for place, name in enumerate(ODD_NAMES)]
    df = spark.range(0, 40, 1, 3).select(F.col("id").alias("number"), *odd)
    dealt = deal_rows(df, columns, num_shards=4, world_size=2)
    assert sorted(int(row) for row in dealt.toArrow()["label_0"].to_pylist()) == list(range(40))
    staged = stage_dataset(df, columns, f"{folder}/staged")
    for group in staged.train:
        table = pq.ParquetFile(group.path).read_row_group(group.index)
        for place in range(len(ODD_NAMES)):
            expected = [number * 100 + place for number in table["label_0"].to_pylist()]
            assert table[f"input_{place}"].to_pylist() == expected


def test_class_labels_are_known_over_all_partitions(spark: SparkSession, folder: str) -> None:
    label = Column("label", "label_0", "scalar", "int64", flat=True, validity="class")
    df = in_partitions(spark, [10, 0, 10]).withColumn("label", F.col("number") % 10 + 2)
    staged = stage_dataset(df, Columns((FEATURES,), (label,)), f"{folder}/staged")
    assert (staged.facts.widths, staged.facts.labels) == ({"input_0": 2, "label_0": 1}, (2, 11))


# ---- failures --------------------------------------------------------------------------------------------------------
def test_rows_that_cannot_be_trained_on_are_a_data_error(spark: SparkSession, tmp_path: Path) -> None:
    bad = F.when(F.col("number") == 57, F.lit(float("nan")).cast("float")).otherwise(F.lit(0.5).cast("float"))
    df = in_partitions(spark, [30, 30, 30]).withColumn("features", F.array(F.lit(1.0).cast("float"), bad))
    with pytest.raises(DataError, match=r"^'features' is NaN or infinite in 1 of 30 rows.*\"number\": 57.*Imputer"):
        stage_dataset(df, COLUMNS, f"{tmp_path}/staged")


def test_widths_that_differ_between_partitions_are_refused(spark: SparkSession, folder: str) -> None:
    width = F.when(F.col("number") < 10, 3).otherwise(4)
    df = in_partitions(spark, [10, 10]).withColumn("features", F.array_repeat(F.lit(1.0).cast("float"), width))
    with pytest.raises(
        DataError, match=r"'features' has [34] values in some rows, such as .*, and [34] in others.*pad or cut"
    ):
        stage_dataset(df, COLUMNS, f"{folder}/staged")


def test_only_files_that_a_task_reported_are_counted(spark: SparkSession, tmp_path: Path) -> None:
    """Spark runs a task again when it failed, or was slow; what the first attempt wrote stays where it is."""
    leftover = tmp_path / "staged" / "train" / "part-00000-999999.parquet"
    leftover.parent.mkdir(parents=True)
    write_staged(leftover, [range(1000, 1010)])
    staged = stage_dataset(in_partitions(spark, [10, 10]), COLUMNS, f"{tmp_path}/staged")
    assert sorted(numbers_in(staged.train)) == list(range(20))
    assert str(leftover) in files_below(tmp_path) - set(staged.files)


def test_what_a_failed_job_left_is_removed(spark: SparkSession, tmp_path: Path) -> None:
    bad = F.when(F.col("number") == 15, None).otherwise(F.col("number"))
    df = in_partitions(spark, [10, 10]).withColumn("number", bad)
    with pytest.raises(DataError, match=r"'number' is null in 1 of 10 rows; the first: .*dropna"):
        stage_dataset(df, COLUMNS, f"{tmp_path}/staged")
    remove_staged(spark.range(1), f"{tmp_path}/staged")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, timeout=20).returncode:
        pytest.skip("only root may mount a file system, and some sandboxes do not let it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=20)


def test_storage_that_fills_is_one_sentence_on_the_driver(spark: SparkSession, small_disk: Path) -> None:
    values = F.array_repeat((F.col("id") % 100).cast("float"), 1000)
    df = spark.range(0, 4000, 1, 2).select(F.col("id").alias("number"), values.alias("features"))
    with pytest.raises(
        DataError,
        match=rf"^Staging rows to {small_disk}/staged failed after 0\.0 MB: .*No space left on device.* Free space "
        r"there, or choose another stagingDir\.$",
    ):
        stage_dataset(df, COLUMNS, f"{small_disk}/staged")


# ---- removal ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def leftovers(tmp_path: Path) -> Iterator[Path]:
    """A staged directory beside something that is not ours."""
    (tmp_path / "staged" / "train").mkdir(parents=True)
    (tmp_path / "staged" / "train" / "part-00000-1.parquet").write_bytes(b"cut sho")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("kept")
    yield tmp_path
    assert files_below(tmp_path) == {f"{tmp_path}/other/kept"}


def test_staged_files_are_removed_and_nothing_else(spark: SparkSession, leftovers: Path) -> None:
    for _ in range(2):  # what is gone already is no error
        remove_staged(spark.range(1), f"file:{leftovers}/staged")
    assert not (leftovers / "staged").exists()
