"""From a DataFrame to shards and staged files: every row once, evenly, and the same in every run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import RowGroup
from sparkdl.io.schema import decode
from sparkdl.io.stage import Facts, StagedDataset, deal_rows, remove_staged, stage_dataset
from tests.unit.staged import whole, write_staged

pytestmark = pytest.mark.spark

FEATURES = Column("features", "input_0", "array", "float32")
NUMBER = Column("number", "label_0", "scalar", "int64", flat=True)
COLUMNS = Columns((FEATURES,), (NUMBER,))
HELD = Column("held", "validation", "scalar", "bool", flat=True)

Shards = dict[int, list[int]]


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


def dealt_shards(df: DataFrame, num_shards: int, world_size: int, columns: Columns = COLUMNS) -> Shards:
    """The numbers in each shard in order, after checking that each lies in its rank's partition."""
    dealt = deal_rows(df, columns, num_shards=num_shards, world_size=world_size)
    rows = dealt.select("shard", "label_0", F.spark_partition_id().alias("partition")).toArrow().to_pylist()
    assert {row["partition"] == row["shard"] % world_size for row in rows} <= {True}
    found: Shards = {shard: [] for shard in range(num_shards)}
    for row in rows:
        found[row["shard"]].append(int(row["label_0"]))
    return found


def sizes(shards: Shards) -> list[int]:
    return [len(rows) for rows in shards.values()]


# ---- dealing ---------------------------------------------------------------------------------------------------------
def test_the_partitions_are_as_many_as_ranks_also_with_adaptive_execution(spark: SparkSession) -> None:
    assert spark.conf.get("spark.sql.adaptive.enabled") == "true"
    grouped = with_features(spark.range(1000).groupBy((F.col("id") % 50).alias("id")).count())
    dealt = deal_rows(grouped, COLUMNS, num_shards=4, world_size=4)
    partitions = dealt.select(F.spark_partition_id().alias("partition")).distinct().toArrow()["partition"].to_pylist()
    assert sorted(partitions) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_shards", [4, 7])
def test_every_row_goes_to_one_shard_and_the_shards_do_not_depend_on_the_ranks(
    spark: SparkSession, num_shards: int
) -> None:
    df = in_partitions(spark, [13, 0, 250, 1, 36])
    first = dealt_shards(df, num_shards, 1)
    assert sorted(row for rows in first.values() for row in rows) == list(range(300))
    assert max(sizes(first)) - min(sizes(first)) <= 5
    for world_size in (2, 4):
        assert dealt_shards(df, num_shards, world_size) == first


def test_a_shuffle_before_the_fit_gives_the_same_shards_in_every_run(spark: SparkSession) -> None:
    shuffled = with_features(spark.range(0, 400, 1, 6).repartition(5, "id"))
    assert dealt_shards(shuffled, 4, 4) == dealt_shards(shuffled, 4, 4) == dealt_shards(shuffled, 4, 2)


@pytest.mark.parametrize(
    ("rows", "partitions"), [(20, 20), (40, 20), (10, 10), (1000, 1), (7, 4)], ids=lambda value: str(value)
)
def test_many_small_partitions_and_one_large_one_are_dealt_evenly(
    spark: SparkSession, rows: int, partitions: int
) -> None:
    shards = dealt_shards(with_features(spark.range(0, rows, 1, partitions)), 4, 4)
    assert sorted(row for found in shards.values() for row in found) == list(range(rows))
    assert max(sizes(shards)) - min(sizes(shards)) <= 1 + (rows % partitions > 0)


def test_consecutive_rows_of_a_partition_go_to_consecutive_shards(spark: SparkSession) -> None:
    shards = dealt_shards(with_features(spark.range(0, 12, 1, 1)), 3, 1)
    assert shards == {0: [0, 3, 6, 9], 1: [1, 4, 7, 10], 2: [2, 5, 8, 11]}


def test_an_empty_dataframe_is_dealt_to_empty_shards(spark: SparkSession) -> None:
    assert dealt_shards(with_features(spark.range(0)), 2, 2) == {0: [], 1: []}


# ---- staging ---------------------------------------------------------------------------------------------------------
def numbers_in(groups: tuple[RowGroup, ...], columns: Columns = COLUMNS) -> list[int]:
    """The numbers in row groups, after checking that the features belong to them."""
    fields = [column.field for column in columns]
    with PlannedReader(whole(groups), columns=fields, decode=lambda table: decode(table, columns)) as reader:
        read = list(reader)
    for found in read:
        assert found["input_0"].tolist() == [[number % 100, 0.5] for number in found["label_0"].tolist()]
    return [number for found in read for number in found["label_0"].tolist()]


def files_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
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
    shards = dealt_shards(df, 4, 2, columns)
    assert sorted(row for found in shards.values() for row in found) == list(range(40))
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


@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
def test_staged_files_are_removed_and_nothing_else(spark: SparkSession, leftovers: Path, scheme: str) -> None:
    for _ in range(2):  # what is gone already is no error
        remove_staged(spark.range(1), f"{scheme}{leftovers}/staged")
    assert not (leftovers / "staged").exists()
