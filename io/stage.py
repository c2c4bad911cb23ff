"""DataFrame to Parquet, once: spooled by each rank to its own disk, or staged for all ranks on shared storage.

Rows are checked and brought into their final form on the way (see `sparkdl.io.schema`), so that what is read every
epoch is ready to become tensors. They arrive in Arrow batches of 64 MB at most, unless the session sets
``spark.sql.execution.arrow.maxBytesPerBatch`` otherwise, and are encoded and written in parts of a row group's size:
memory does not grow with the rows, nor with the size of one.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from sparkdl.config import Columns, Partitioning
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.deal import check_partitioning, deal_rows
from sparkdl.io.encryption import encrypted
from sparkdl.io.plan import Piece, RowGroup, plan_pieces
from sparkdl.io.remove import remove_staged
from sparkdl.io.schema import (
    SHARD,
    VALIDATION,
    as_named,
    drop_null_rows,
    encode,
    select_expressions,
    show_row,
)
from sparkdl.io.writer import ROW_GROUP_BYTES, RowGroupFiles
from sparkdl.storage import open_file_system

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = [
    "Facts",
    "Spool",
    "StagedDataset",
    "deal_rows",
    "open_spool",
    "remove_staged",
    "stage_dataset",
]

_FIRST_ROWS = 64  # encoded before it is known how large an encoded row is
_STAGED_SCHEMA = "facts string"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is learnt of the rows while they are written.

    Attributes:
        widths: Values per row of each column.
        labels: Smallest and largest class number; None without class labels or rows.
        row: One of the rows, as text.
        dropped: Rows left out because a column that drops nulls has one there.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[int, int] | None = None
    row: str = ""
    dropped: int = 0

    def merge(self, other: "Facts", columns: Columns) -> "Facts":
        """The facts of both, for rows that shall be trained on together.

        Raises:
            DataError: The two differ in the width of a column.
        """
        for column in columns:
            mine, theirs = self.widths.get(column.field), other.widths.get(column.field)
            if mine is not None and theirs is not None and mine != theirs:
                raise DataError(
                    f"{column.name!r} has {mine} values in some rows, such as {self.row}, and {theirs} in others, such "
                    f"as {other.row}. Every row needs the same number: pad or cut the column before fit."
                )
        both = [labels for labels in (self.labels, other.labels) if labels is not None]
        labels = (min(low for low, _ in both), max(high for _, high in both)) if both else None
        return Facts(
            {**self.widths, **other.widths},
            labels,
            self.row or other.row,
            dropped=self.dropped + other.dropped,
        )

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Facts":
        """The inverse of `to_json`. What is missing is as in `Facts()`, what is not known is ignored."""
        known = {name: values[name] for name in cls.__slots__ if name in values}
        if known.get("labels"):
            known["labels"] = tuple(known["labels"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class StagedDataset:
    """Staged rows: what the plan needs to know of them, so that no rank lists files or asks for sizes again.

    Attributes:
        url: Directory that holds the files.
        train: Row groups of the training rows, sorted by path.
        validation: Row groups of the validation rows, sorted by path.
        facts: What is known of the rows.
        files: What tells every file from one that takes its place: size in bytes, and the time of its last change where
            others may write it too. Part of the plan's fingerprint.
        shards: Row groups of each shard, where the rows were placed by shard; None where they are cut where they lie.
    """

    url: str
    train: tuple[RowGroup, ...]
    validation: tuple[RowGroup, ...]
    facts: Facts
    files: Mapping[str, int | tuple[int, int | None]]
    shards: tuple[tuple[RowGroup, ...], ...] | None = None

    def pieces(self, num_shards: int) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of each shard's training rows.

        Raises:
            ConfigError: The rows were placed in another number of shards.
        """
        if self.shards is None:
            return plan_pieces(self.train, num_shards)
        if len(self.shards) != num_shards:
            raise ConfigError(
                f"numShards={num_shards}, but the rows in {self.url} were placed in {len(self.shards)} shards when "
                f"they were staged. Use numShards={len(self.shards)}, or stage them anew."
            )
        return tuple(tuple(Piece(group, 0, group.rows) for group in groups) for groups in self.shards)


@dataclass(slots=True)
class Spool:
    """Rows that one rank has on its own disk.

    Attributes:
        shards: Row groups of each of the rank's shards.
        validation: Row groups of its validation rows.
        facts: What is known of the rows.
    """

    shards: dict[int, tuple[RowGroup, ...]]
    validation: tuple[RowGroup, ...]
    facts: Facts


@contextlib.contextmanager
def open_spool(
    batches: Iterator[pa.RecordBatch], columns: Columns, shards: Sequence[int], *, encrypt: bool = False
) -> Iterator[Spool]:
    """Write a rank's rows to its local disk, for the time of the block.

    The files have no names: they vanish with the process, however it dies.

    Args:
        batches: The rank's partition of `deal_rows`.
        columns: What to keep of it.
        shards: The rank's shards.
        encrypt: Encrypt the files, see `sparkdl.io.encryption`.

    Raises:
        ConfigError: They cannot be encrypted here.
        DataError: Rows that cannot be trained on, or a disk that is full.
    """
    directory = _local_directory()
    with contextlib.ExitStack() as stack:

        def create(name: str) -> tuple[pa.NativeFile, str]:
            path = f"/dev/fd/{stack.enter_context(tempfile.TemporaryFile(dir=directory)).fileno()}"
            if encrypt:
                stack.enter_context(encrypted(path))
            return pa.OSFile(path, "wb"), path

        files = stack.enter_context(
            RowGroupFiles(
                create,
                action="Spooling rows",
                place=directory,
                remedy="Free space there, give the executors a larger disk (SPARK_LOCAL_DIRS), or set stagingDir to "
                "storage that all executors share.",
            )
        )
        encoder = _Encoder(columns)
        for batch, table in encoder.encode(batches):
            train = _train_mask(batch, columns)
            if train is not None:
                files.write(VALIDATION, table.filter(pc.invert(train)))
            for shard in shards:
                mask = pc.equal(batch.column(SHARD), shard) if len(shards) > 1 else None
                mask = _both(mask, train)
                rows = table if mask is None else table.filter(mask)
                files.write(str(shard), rows)
        groups = files.close()
        yield Spool({shard: groups.get(str(shard), ()) for shard in shards}, groups.get(VALIDATION, ()), encoder.facts)


def stage_dataset(
    df: "DataFrame",
    columns: Columns,
    directory: str,
    *,
    partitioning: Partitioning = "batch",
    num_shards: int = 1,
    key: str | None = None,
    seed: int = 0,
) -> StagedDataset:
    """Write the training and validation rows of a DataFrame to ``directory``, in one Spark job.

    With ``"batch"`` every partition becomes a file of each kind, without a shuffle: the plan cuts the files, in the
    order of their partitions, into any number of runs. Otherwise rows are dealt as `deal_rows` does, and every shard
    becomes a file of each kind. A file counts only when its task reports it, so what failed or speculative attempts
    leave behind is never read.

    Args:
        df: The rows; evaluated once.
        columns: What to keep of it.
        directory: URL of a directory that all executors reach; must not exist yet.
        partitioning: How rows are dealt to shards.
        num_shards: Shards; of no account with ``"batch"``.
        key: The column for ``"key"``.
        seed: Seed of ``"random"``.

    Raises:
        ConfigError: The DataFrame cannot be partitioned in that way.
        DataError: Rows that cannot be trained on, or storage that is full.
    """
    import functools

    check_partitioning(df, partitioning, key)
    if partitioning == "batch":
        source = df.select(*select_expressions(columns))
    else:
        source = deal_rows(
            df,
            columns,
            num_shards=num_shards,
            world_size=num_shards,
            partitioning=partitioning,
            key=key,
            seed=seed,
        )
    write = functools.partial(_stage_partition, columns, directory)
    groups: dict[str, list[RowGroup]] = {"train": [], VALIDATION: []}
    shards: list[tuple[RowGroup, ...]] = [()] * num_shards
    facts, files = Facts(), {}
    for (text,) in source.mapInArrow(write, _STAGED_SCHEMA).toArrow().to_pandas().itertuples(index=False):
        report = json.loads(text)
        if "error" in report:
            raise DataError(report["error"])
        facts = facts.merge(Facts.of_json(report["facts"]), columns)
        for kind, path, rows, size in report["files"]:
            found = tuple(RowGroup(path, index, count) for index, count in enumerate(rows))
            groups[kind] += found
            files[path] = size
            if kind == "train" and partitioning != "batch":
                shards[report["partition"]] = found  # of as many partitions as shards
    train, validation = (tuple(sorted(groups[kind])) for kind in ("train", VALIDATION))
    return StagedDataset(
        directory, train, validation, facts, files, shards=None if partitioning == "batch" else tuple(shards)
    )


class _Encoder:
    """Encodes batches in parts of a row group's size, and gathers the facts.

    A sparse vector is a few numbers in Spark's batch and thousands in staged form: how many rows make a part is learnt
    from the part before.
    """

    def __init__(self, columns: Columns) -> None:
        self.facts = Facts()
        self._columns = columns

    def encode(self, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
        """Each part as it came and in staged form; parts without rows are left out."""
        rows = _FIRST_ROWS
        for batch in batches:
            start = 0
            while start < batch.num_rows:
                part = batch.slice(start, rows)
                start += part.num_rows
                kept = drop_null_rows(part, self._columns)
                self.facts = replace(self.facts, dropped=self.facts.dropped + part.num_rows - kept.num_rows)
                if not kept.num_rows:
                    continue
                table = self._encode(kept)
                yield kept, table
                rows = max(1, ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes))

    def _encode(self, batch: pa.RecordBatch) -> pa.Table:
        columns, facts = self._columns, self.facts
        table, widths = encode(batch, columns, facts.widths)
        labels = None
        for column in columns.labels:
            if column.validity == "class":
                found = pc.min_max(table.column(column.field)).as_py()
                labels = (int(found["min"]), int(found["max"]))
        row = facts.row or show_row(as_named(batch, columns), 0)
        self.facts = facts.merge(Facts(widths, labels, row), columns)
        return table


def _local_directory() -> str:
    """The disk with most free space among those that Spark gave to the executor."""
    disks = [disk for disk in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if os.path.isdir(disk)]
    return max(disks, key=lambda disk: shutil.disk_usage(disk).free, default=tempfile.gettempdir())


def _train_mask(batch: pa.RecordBatch, columns: Columns) -> pa.Array | None:
    return None if columns.validation is None else pc.invert(batch.column(VALIDATION))


def _both(left: pa.Array | None, right: pa.Array | None) -> pa.Array | None:
    if left is None or right is None:
        return left if right is None else right
    return pc.and_(left, right)


def _stage_partition(columns: Columns, directory: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        report = _write_partition(columns, directory, batches)
    except DataError as error:
        # Raised here, Spark would run the task again, and wrap the message into its own and a traceback.
        report = {"error": str(error)}
    yield pa.RecordBatch.from_pydict({"facts": [json.dumps(report)]})


def _write_partition(columns: Columns, directory: str, batches: Iterator[pa.RecordBatch]) -> dict[str, Any]:
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    file_system, root = open_file_system(directory)
    name = f"part-{task.partitionId():05d}-{task.taskAttemptId()}.parquet"

    def create(kind: str) -> tuple[pa.NativeFile, str]:
        file_system.create_dir(f"{root}/{kind}", recursive=True)
        return file_system.open_output_stream(f"{root}/{kind}/{name}"), f"{directory}/{kind}/{name}"

    encoder = _Encoder(columns)
    with RowGroupFiles(
        create,
        action="Staging rows",
        place=directory,
        remedy="Free space there, or choose another stagingDir.",
    ) as writers:
        for batch, table in encoder.encode(batches):
            train = _train_mask(batch, columns)
            writers.write("train", table if train is None else table.filter(train))
            if train is not None:
                writers.write(VALIDATION, table.filter(pc.invert(train)))
        groups = writers.close()
    files = [
        (kind, found[0].path, [group.rows for group in found], file_system.get_file_info(f"{root}/{kind}/{name}").size)
        for kind, found in groups.items()
    ]
    return {"partition": task.partitionId(), "facts": encoder.facts.to_json(), "files": files}
