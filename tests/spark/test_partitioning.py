"""The rows of each shard, for every partitioning: every row once, evenly where it can be, and the same in every run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError
from sparkdl.io.deal import check_partitioning
from sparkdl.io.stage import deal_rows, stage_dataset
from tests.spark.test_stage import COLUMNS, FEATURES, HELD, NUMBER, in_partitions, numbers_in, with_features

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

Shards = dict[int, list[int]]
WITH_VALIDATION = Columns((FEATURES,), (NUMBER,), validation=HELD)


def dealt_shards(df: DataFrame, num_shards: int, world_size: int, columns: Columns = COLUMNS, **how: Any) -> Shards:
    """The numbers in each shard in order, after checking that each lies in its rank's partition."""
    dealt = deal_rows(df, columns, num_shards=num_shards, world_size=world_size, **how)
    # All columns, as a rank asks for: of fewer, adaptive execution may make other partitions.
    rows = dealt.withColumn("partition", F.spark_partition_id()).toArrow().to_pylist()
    assert {row["partition"] == row["shard"] % world_size for row in rows} <= {True}
    found: Shards = {shard: [] for shard in range(num_shards)}
    for row in rows:
        found[row["shard"]].append(int(row["label_0"]))
    return found


def sizes(shards: Shards) -> list[int]:
    return [len(rows) for rows in shards.values()]


def all_rows(shards: Shards) -> list[int]:
    return sorted(row for rows in shards.values() for row in rows)


# ---- sample ----------------------------------------------------------------------------------------------------------
def test_the_partitions_are_as_many_as_ranks_also_with_adaptive_execution(spark: SparkSession) -> None:
    assert spark.conf.get("spark.sql.adaptive.enabled") == "true"
    grouped = with_features(spark.range(1000).groupBy((F.col("id") % 50).alias("id")).count())
    dealt = deal_rows(grouped, COLUMNS, num_shards=4, world_size=4)
    partitions = dealt.select(F.spark_partition_id().alias("partition")).distinct().toArrow()["partition"].to_pylist()
    assert sorted(partitions) == [0, 1, 2, 3]


def test_every_row_goes_to_one_shard_and_the_shards_do_not_depend_on_the_ranks(spark: SparkSession) -> None:
    df = in_partitions(spark, [13, 0, 250, 1, 36])
    first = dealt_shards(df, 7, 1)
    assert sorted(row for rows in first.values() for row in rows) == list(range(300))
    assert max(sizes(first)) - min(sizes(first)) <= 5
    for world_size in (2, 4):
        assert dealt_shards(df, 7, world_size) == first


def test_a_shuffle_before_the_fit_gives_the_same_shards_in_every_run(spark: SparkSession) -> None:
    shuffled = with_features(spark.range(0, 400, 1, 6).repartition(5, "id"))
    assert dealt_shards(shuffled, 4, 4) == dealt_shards(shuffled, 4, 4) == dealt_shards(shuffled, 4, 2)


@pytest.mark.parametrize(("rows", "partitions"), [(40, 20), (10, 10), (1000, 1), (7, 4)], ids=lambda value: str(value))
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


@pytest.mark.parametrize(("num_shards", "step", "rows"), [(4, 4, 1), (4, 8, 3), (7, 4, 1)])
def test_partitions_of_which_only_every_kth_has_rows_are_dealt_evenly(
    spark: SparkSession, num_shards: int, step: int, rows: int
) -> None:
    """As a join or a filter leaves them. By its number alone, every such partition would begin at the same shard."""
    filled = 20
    partition = (F.floor(F.col("id") / rows) * step).cast("int")
    df = with_features(spark.range(0, filled * rows, 1, 1).repartitionById(filled * step, partition))
    shards = dealt_shards(df, num_shards, num_shards)
    assert all_rows(shards) == list(range(filled * rows))
    # The rows of a partition beyond a multiple of the shards fall where a hash says: three standard deviations.
    assert max(sizes(shards)) - filled * rows / num_shards <= 3 * (filled / num_shards) ** 0.5


# ---- batch -----------------------------------------------------------------------------------------------------------
def test_contiguous_shards_are_runs_of_rows_whose_sizes_differ_by_one(spark: SparkSession) -> None:
    df = in_partitions(spark, [13, 0, 250, 1, 36])
    cuts = [shard * 300 // 7 for shard in range(8)]
    expected = {shard: list(range(cuts[shard], cuts[shard + 1])) for shard in range(7)}
    assert dealt_shards(df, 7, 1, partitioning="batch") == dealt_shards(df, 7, 4, partitioning="batch") == expected


def test_contiguous_shards_of_few_rows_or_none(spark: SparkSession) -> None:
    few = dealt_shards(with_features(spark.range(0, 3, 1, 2)), 5, 2, partitioning="batch")
    assert few == {0: [], 1: [0], 2: [], 3: [1], 4: [2]}
    assert dealt_shards(with_features(spark.range(0)), 2, 2, partitioning="batch") == {0: [], 1: []}


@pytest.mark.parametrize("held", ["number >= 60", "number % 3 = 0", "true"])
def test_contiguous_shards_have_equally_many_training_rows_wherever_validation_rows_lie(
    spark: SparkSession, held: str
) -> None:
    df = in_partitions(spark, [40, 0, 50, 10]).withColumn("held", F.expr(held))
    dealt = deal_rows(df, WITH_VALIDATION, num_shards=4, world_size=2, partitioning="batch").toArrow().to_pylist()
    assert sorted(int(row["label_0"]) for row in dealt) == list(range(100))
    train = [[row["label_0"] for row in dealt if row["shard"] == shard and not row["validation"]] for shard in range(4)]
    assert max(map(len, train)) - min(map(len, train)) <= 1
    assert [row for rows in train for row in rows] == sorted(row["label_0"] for row in dealt if not row["validation"])


def test_the_count_of_rows_sees_the_partitions_that_are_dealt(spark: SparkSession) -> None:
    """Adaptive execution joins small partitions by their bytes, of the columns that are read."""
    size = "spark.sql.adaptive.advisoryPartitionSizeInBytes"
    smallest = "spark.sql.adaptive.coalescePartitions.minPartitionSize"
    partitions = "spark.sql.adaptive.coalescePartitions.initialPartitionNum"
    settings = {size: "40kb", smallest: "1kb", partitions: "16"}
    before = {name: spark.conf.get(name, None) for name in settings}
    for name, value in settings.items():
        spark.conf.set(name, value)
    try:
        wide = F.transform(F.sequence(F.lit(1), F.lit(40)), lambda place: (F.col("id") * place % 997).cast("float"))
        columns = Columns((Column("wide", "input_0", "array", "float32"),), (NUMBER,))
        df = spark.range(0, 3000, 1, 2).withColumn("wide", wide).repartition(F.col("id") % 50)
        df = df.withColumn("number", F.col("id"))
        narrow = df.select(F.spark_partition_id().alias("p")).distinct().count()
        full = df.select(F.spark_partition_id().alias("p"), F.xxhash64("wide", "number").alias("h"))
        assert narrow < full.groupBy("p").agg(F.max("h")).toArrow().num_rows, "the case that this test is about"
        shards = dealt_shards(df, 4, 2, columns, partitioning="batch")
    finally:
        for name, value in before.items():
            spark.conf.unset(name) if value is None else spark.conf.set(name, value)
    assert sizes(shards) == [750] * 4
    assert all_rows(shards) == list(range(3000))


# ---- random ----------------------------------------------------------------------------------------------------------
def test_random_shards_follow_the_seed_and_nothing_else(spark: SparkSession) -> None:
    df = in_partitions(spark, [500, 0, 300, 200])
    first = dealt_shards(df, 4, 1, partitioning="random", seed=1)
    assert all_rows(first) == list(range(1000))
    assert max(abs(size - 250) for size in sizes(first)) < 4 * 250**0.5
    assert dealt_shards(df, 4, 4, partitioning="random", seed=1) == first
    assert dealt_shards(df, 4, 1, partitioning="random", seed=2) != first
    assert first[0] != list(range(first[0][0], first[0][0] + 4 * len(first[0]), 4))


# ---- key -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "key",
    ["number % 17", "concat('user ', number % 17)", "date_add(date'2026-01-01', cast(number % 17 as int))", "1.5"],
    ids=["number", "text", "date", "one value"],
)
def test_rows_of_equal_key_share_a_shard_and_keys_that_are_null_too(spark: SparkSession, key: str) -> None:
    source = in_partitions(spark, [60, 0, 100]).withColumn("a.key", F.expr(f"if(number % 10 = 3, null, {key})"))
    shards = dealt_shards(source, 4, 2, partitioning="key", key="a.key")
    assert all_rows(shards) == list(range(160))
    key_of = {row["number"]: row["a.key"] for row in source.select("number", "`a.key`").collect()}
    homes: dict[Any, set[int]] = {}
    for shard, numbers in shards.items():
        assert numbers == sorted(numbers)
        for number in numbers:
            homes.setdefault(key_of[number], set()).add(shard)
    assert {len(found) for found in homes.values()} == {1}
    assert len(homes) == len(set(key_of.values()))
    if key == "1.5":
        assert sizes(shards).count(0) >= 2, "two keys fill two shards at most"


def test_zero_and_minus_zero_are_one_key(spark: SparkSession) -> None:
    df = with_features(spark.range(8)).withColumn("key", F.expr("if(number % 2 = 0, 0.0d, -0.0d)"))
    assert sorted(sizes(dealt_shards(df, 4, 1, partitioning="key", key="key"))) == [0, 0, 0, 8]


@pytest.mark.parametrize(
    ("partitioning", "key", "message"),
    [
        ("rows", None, r"^partitioning='rows' is not known\. Use one of 'sample', 'batch', 'random', 'key'\.$"),
        ("key", None, r"^partitioning='key' keeps rows of equal key in one shard, but no key was named\. Name the col"),
        ("key", "user", r"^key='user' is not a column\. The DataFrame has number, features\.$"),
        ("key", "features", r"^key='features' has type array<float>; .*Use a column of such a type\.$"),
    ],
)
def test_a_partitioning_that_cannot_be_is_refused_before_any_job(
    spark: SparkSession, folder: str, partitioning: Any, key: str | None, message: str
) -> None:
    df = with_features(spark.range(8))
    with pytest.raises(ConfigError, match=message):
        check_partitioning(df, partitioning, key)
    with pytest.raises(ConfigError, match=message):
        deal_rows(df, COLUMNS, num_shards=2, world_size=1, partitioning=partitioning, key=key)
    with pytest.raises(ConfigError, match=message):
        stage_dataset(df, COLUMNS, f"{folder}/staged", partitioning=partitioning, key=key)


# ---- staged ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how", [{"partitioning": "sample"}, {"partitioning": "random", "seed": 3}, {"partitioning": "key", "key": "group"}]
)
def test_staged_rows_lie_in_the_shards_that_spooled_rows_lie_in(
    spark: SparkSession, folder: str, how: dict[str, Any]
) -> None:
    df = in_partitions(spark, [60, 0, 35, 5]).withColumn("held", F.col("number") % 5 == 0)
    df = df.withColumn("group", F.floor(F.col("number") / 30))
    staged = stage_dataset(df, WITH_VALIDATION, f"{folder}/staged", num_shards=5, **how)
    expected = dealt_shards(df, 5, 2, WITH_VALIDATION, **how)
    assert staged.shards is not None
    found = [numbers_in(groups) for groups in staged.shards]
    assert found == [[number for number in expected[shard] if number % 5] for shard in range(5)]
    assert sorted(numbers_in(staged.validation)) == list(range(0, 100, 5))
    assert sorted(group for groups in staged.shards for group in groups) == list(staged.train)
    homes = [(group.path, shard) for shard, groups in enumerate(staged.shards) for group in groups]
    assert len({path for path, _ in homes}) == len(set(homes)), "a file belongs to one shard"
    assert [[piece.row_group for piece in pieces] for pieces in staged.pieces(5)] == [*map(list, staged.shards)]


def test_contiguous_rows_are_staged_where_they_lie_and_cut_later(spark: SparkSession, folder: str) -> None:
    staged = stage_dataset(in_partitions(spark, [13, 0, 50, 1, 36]), COLUMNS, f"{folder}/staged", partitioning="batch")
    assert staged.shards is None
    assert [sum(piece.rows for piece in pieces) for pieces in staged.pieces(4)] == [25] * 4
    assert [sum(piece.rows for piece in pieces) for pieces in staged.pieces(1)] == [100]


# ---- large rows ------------------------------------------------------------------------------------------------------
def test_rows_of_200_kb_arrive_and_are_written_in_bounded_parts(spark: SparkSession, tmp_path: Path) -> None:
    """Spark's batches end at 10,000 rows, which are 2 GB here, or at 64 MB."""
    wide = F.array_repeat((F.col("number") % 100).cast("float"), 50_000)
    df = spark.range(0, 360, 1, 1).select(F.col("id").alias("number")).withColumn("wide", wide)
    columns = Columns((Column("wide", "input_0", "array", "float32"),), (NUMBER,))

    def largest(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"bytes": [max(batch.nbytes for batch in batches)]})

    dealt = deal_rows(df, columns, num_shards=1, world_size=1)
    assert dealt.mapInArrow(largest, "bytes bigint", barrier=True).toArrow()["bytes"][0].as_py() <= 65 << 20
    staged = stage_dataset(df, columns, f"{tmp_path}/staged")
    assert sum(group.rows for group in staged.train) == 360
    metadata = pq.ParquetFile(staged.train[0].path).metadata
    assert max(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)) <= 17 << 20


# ---- Spark Connect ---------------------------------------------------------------------------------------------------
OVER_CONNECT = """
import json, sys
from pyspark.sql import SparkSession, functions as F
from sparkdl.io.stage import deal_rows, stage_dataset
from tests.spark.test_stage import with_features
from tests.spark.test_partitioning import WITH_VALIDATION, dealt_shards

spark = SparkSession.builder.remote("local[2]").getOrCreate()
df = with_features(spark.range(0, 60, 1, 3)).withColumn("held", F.col("number") >= 48)
found = {}
for name in ("sample", "batch", "random", "key"):
    how = {"partitioning": name, "key": "number" if name == "key" else None}
    staged = stage_dataset(df, WITH_VALIDATION, f"{sys.argv[1]}/{name}", num_shards=3, **how)
    rows = [sum(piece.rows for piece in pieces) for pieces in staged.pieces(3)]
    found[name] = [list(dealt_shards(df, 3, 2, WITH_VALIDATION, **how).items()), rows]
print(json.dumps([type(spark).__module__, found]))
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_shards_are_the_same_over_spark_connect(spark: SparkSession, folder: str) -> None:
    pytest.importorskip("grpc", reason="Spark Connect needs the extra sparkdl-torch[connect]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_"))}
    process = subprocess.run(
        [sys.executable, "-c", OVER_CONNECT, folder],
        env={**environment, "PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    module, found = json.loads(process.stdout.splitlines()[-1])
    assert module.startswith("pyspark.sql.connect")
    df = with_features(spark.range(0, 60, 1, 3)).withColumn("held", F.col("number") >= 48)
    for name, (shards, rows) in found.items():
        here = dealt_shards(df, 3, 2, WITH_VALIDATION, partitioning=name, key="number" if name == "key" else None)
        assert dict(shards) == here
        assert sum(rows) == 48
        expected = [16] * 3 if name == "batch" else [len([row for row in here[shard] if row < 48]) for shard in here]
        assert rows == expected
