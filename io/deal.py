"""Which row goes to which shard: four ways to partition a DataFrame, all said in DataFrame expressions.

| partitioning | a shard gets | use it |
|---|---|---|
| ``"sample"`` | every S-th row of each Spark partition | by default: each shard is a sample of all rows |
| ``"batch"`` | the k-th of S runs of consecutive rows | for rows in an order that a shard shall keep together |
| ``"random"`` | rows drawn by a hash of (seed, partition, position) | for rows in an order that repeats itself |
| ``"key"`` | all rows of the keys that hash to it | for users, sessions or devices that must not be torn apart |
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from sparkdl.config import Columns, Partitioning
from sparkdl.errors import ConfigError
from sparkdl.io.schema import SHARD, VALIDATION, select_expressions

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn
    from pyspark.sql import DataFrame

__all__ = ["check_partitioning", "deal_rows", "plan_cuts"]

_ID, _KEY, _OWNER = "id", "key", "owner"
_ROW_BITS = 33  # of monotonically_increasing_id: the row's position; the partition's number is above


def check_partitioning(df: "DataFrame", partitioning: Partitioning, key: str | None) -> None:
    """Check how a DataFrame shall be partitioned. Starts no job.

    Args:
        df: The DataFrame to be trained on.
        partitioning: How.
        key: The column for ``"key"``.

    Raises:
        ConfigError: No such partitioning, or one by a column that is not named, not there or has no simple type.
    """
    if partitioning not in get_args(Partitioning):
        raise ConfigError(
            f"partitioning={partitioning!r} is not known. Use one of {', '.join(map(repr, get_args(Partitioning)))}."
        )
    if partitioning != "key":
        return
    if key is None:
        raise ConfigError(
            "partitioning='key' keeps rows of equal key in one shard, but no key was named. Name the column that holds "
            "the key."
        )
    found = next((entry for entry in df.schema.fields if entry.name == key), None)
    if found is None:
        raise ConfigError(f"key={key!r} is not a column. The DataFrame has {', '.join(df.columns)}.")
    from pyspark.sql.types import AtomicType, VariantType

    if not isinstance(found.dataType, AtomicType) or isinstance(found.dataType, VariantType):
        raise ConfigError(
            f"key={key!r} has type {found.dataType.simpleString()}; rows are told apart by a number, a text, a date or "
            "the like. Use a column of such a type."
        )


def deal_rows(
    df: "DataFrame",
    columns: Columns,
    *,
    num_shards: int,
    world_size: int,
    owners: Sequence[Sequence[int]] | None = None,
    partitioning: Partitioning = "sample",
    key: str | None = None,
    seed: int = 0,
) -> "DataFrame":
    """Deal the rows of a DataFrame to shards and the shards to partitions, one per rank.

    What shard a row gets follows from its place in the DataFrame's partitions (or from its key), never from the number
    of ranks. It is the same in every run of one physical plan.

    - ``"sample"``: round robin from each source partition. Each run of ``num_shards`` partitions starts at a shard
      drawn by hash, and each of its partitions one further: however small the partitions are, and whichever of them
      have rows, shards grow alike. Spark's own round-robin `repartition` feeds the first shards when they are small.
    - ``"batch"``: shard k holds the k-th of ``num_shards`` runs of consecutive training rows, whose sizes differ by at
      most one. Where the runs begin must be known first: the DataFrame is evaluated once more, at once and with all of
      its columns (a plan of fewer columns may be cut into other partitions), and twice more where some rows are for
      validation. Those go where their neighbours go.
    - ``"random"``: by a hash of (seed, partition, position).
    - ``"key"``: by a hash of the key column. Rows of equal key share a shard, those without a key too (text is compared
      byte by byte, whatever its collation). Frequent keys make large shards, few keys leave some empty.

    Args:
        df: The rows.
        columns: What to keep of them.
        num_shards: Shards.
        world_size: Ranks, and partitions of the result.
        owners: Groups of partitions; shard s lies in those of ``owners[s % len(owners)]``, in each with all of its
            rows. None: in partition ``s % world_size``.
        partitioning: How rows are dealt.
        key: The column for ``"key"``.
        seed: Seed of ``"random"``.

    Returns:
        The columns that were selected and the shard. The rows of a partition are in the order that they had.

    Raises:
        ConfigError: As `check_partitioning`.
    """
    from pyspark.sql import functions as F

    check_partitioning(df, partitioning, key)
    keys = [F.xxhash64(F.col(f"`{key.replace('`', '``')}`")).alias(_KEY)] if partitioning == "key" and key else []
    selected = df.select(*select_expressions(columns), F.monotonically_increasing_id().alias(_ID), *keys)
    partition, row = F.shiftright(_ID, _ROW_BITS), F.col(_ID).bitwiseAND((1 << _ROW_BITS) - 1)
    if partitioning == "sample":
        start = partition + F.pmod(F.xxhash64(partition - partition % num_shards), F.lit(num_shards))
        shard = (start + row) % num_shards
    elif partitioning == "batch":
        shard = _run_of(_first_ids(selected, columns, num_shards), 0, num_shards - 1)
    elif partitioning == "random":
        shard = F.pmod(F.xxhash64(F.lit(seed), F.col(_ID)), F.lit(num_shards))
    else:
        shard = F.pmod(F.col(_KEY), F.lit(num_shards))
    dealt = selected.withColumn(SHARD, shard.cast("int"))
    target = F.col(SHARD) % (world_size if owners is None else len(owners))
    if owners is not None:
        copies = F.array(*(F.array(*map(F.lit, own)) for own in owners))
        dealt = dealt.withColumn(_OWNER, F.explode(F.element_at(copies, target + 1)))
        target = F.col(_OWNER)
    # Places exactly; a hash of the shard's number would leave ranks empty.
    placed = dealt.repartitionById(world_size, target)
    # Without the sort, the order would be that in which shuffle blocks arrive.
    return placed.sortWithinPartitions(_ID).drop(_ID, _KEY, _OWNER)


def plan_cuts(partition_rows: Mapping[int, int], num_shards: int) -> list[tuple[int, int]]:
    """Where consecutive rows are cut into runs whose sizes differ by at most one.

    Args:
        partition_rows: Rows of each partition that has some.
        num_shards: Runs.

    Returns:
        Partition and position of the first row of each run but the first; nothing where there are no rows.
    """
    partitions = sorted(partition_rows)
    ends = np.cumsum([partition_rows[partition] for partition in partitions], dtype=np.int64)
    total = int(ends[-1]) if partitions else 0
    cuts = []
    for run in range(1, num_shards if total else 0):
        position = run * total // num_shards
        place = int(np.searchsorted(ends, position, side="right"))
        partition = partitions[place]
        cuts.append((partition, position - int(ends[place]) + partition_rows[partition]))
    return cuts


def _first_ids(selected: "DataFrame", columns: Columns, num_shards: int) -> list[int]:
    """The id of the first training row of each run but the first."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    # Columns that nobody asks for are not read, and adaptive execution then cuts partitions elsewhere.
    all_columns = F.xxhash64(*selected.columns)
    marked = selected.select(
        _ID,
        F.shiftright(_ID, _ROW_BITS).alias("partition"),
        all_columns.alias("digest"),
        *([VALIDATION] if columns.validation is not None else []),
    )
    training = marked if columns.validation is None else marked.filter(~F.col(VALIDATION))
    counted = training.groupBy("partition").agg(F.count(F.lit(1)).alias("rows"), F.max("digest").alias("digest"))
    rows = {row["partition"]: row["rows"] for row in counted.toArrow().to_pylist()}
    cuts = plan_cuts(rows, num_shards)
    if columns.validation is None or not cuts:
        return [(partition << _ROW_BITS) + position for partition, position in cuts]
    number = F.row_number().over(Window.partitionBy("partition").orderBy(_ID)) - 1
    wanted = training.withColumn("number", number).filter(
        F.struct("partition", "number").isin([F.struct(F.lit(p).cast("bigint"), F.lit(n).cast("int")) for p, n in cuts])
    )
    ids = {(row["partition"], row["number"]): row[_ID] for row in wanted.toArrow().to_pylist()}
    # A DataFrame that is another one each time it is evaluated may lack the row; its runs are not equal anyway.
    return [ids.get((partition, position), (partition << _ROW_BITS) + position) for partition, position in cuts]


def _run_of(first_ids: Sequence[int], low: int, high: int) -> "SparkColumn":
    """Number of the run between ``low`` and ``high`` that a row belongs to, by bisection."""
    from pyspark.sql import functions as F

    if low == high or not first_ids:
        return F.lit(low)
    middle = (low + high + 1) // 2
    lower, upper = _run_of(first_ids, low, middle - 1), _run_of(first_ids, middle, high)
    return F.when(F.col(_ID) < first_ids[middle - 1], lower).otherwise(upper)
