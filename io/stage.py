"""DataFrame to Parquet, once: spooled by each rank to its own disk, or staged for all ranks on shared storage.

Rows are checked and brought into their final form on the way (see `sparkdl.io.schema`), so that what is read every
epoch is ready to become tensors.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from sparkdl.config import Columns
from sparkdl.errors import DataError
from sparkdl.io.plan import RowGroup
from sparkdl.io.schema import SHARD, VALIDATION, as_named, encode, row_bytes, select_expressions, show_row
from sparkdl.storage import open_file_system

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = [
    "Facts",
    "Spool",
    "StagedDataset",
    "deal_rows",
    "open_spool",
    "read_sample",
    "remove_staged",
    "stage_dataset",
    "window_rows",
]

_ROW_GROUP_BYTES = 8 << 20
_STAGED_SCHEMA = "facts string"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is learnt of the rows while they are written.

    Attributes:
        widths: Values per row of each column.
        labels: Smallest and largest class number; None without class labels or rows.
        row: One of the rows, as text.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[int, int] | None = None
    row: str = ""

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
        return Facts({**self.widths, **other.widths}, labels, self.row or other.row)

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Facts":
        """The inverse of `to_json`."""
        labels = values["labels"]
        return cls(values["widths"], (labels[0], labels[1]) if labels else None, values["row"])


@dataclass(frozen=True, slots=True)
class StagedDataset:
    """Staged rows: what the plan needs to know of them, so that no rank lists files or asks for sizes again.

    Attributes:
        url: Directory that holds the files.
        train: Row groups of the training rows, sorted by path.
        validation: Row groups of the validation rows, sorted by path.
        facts: What is known of the rows.
        files: Size in bytes of every file; part of the plan's fingerprint.
    """

    url: str
    train: tuple[RowGroup, ...]
    validation: tuple[RowGroup, ...]
    facts: Facts
    files: Mapping[str, int]


@dataclass(slots=True)
class Spool:
    """Rows that one rank has on its own disk.

    Attributes:
        shards: Row groups of each of the rank's shards.
        validation: Row groups of its validation rows.
        facts: What is known of the rows.
        sample: A few training rows in staged form; None where the rank has none.
    """

    shards: dict[int, tuple[RowGroup, ...]]
    validation: tuple[RowGroup, ...]
    facts: Facts
    sample: pa.Table | None


def deal_rows(df: "DataFrame", columns: Columns, *, num_shards: int, world_size: int) -> "DataFrame":
    """Deal the rows of a DataFrame to shards and the shards to partitions, one per rank.

    Rows go round robin from each source partition, which starts at a shard of its own, so that many small partitions
    do not all feed the first shard. Spark's own round-robin `repartition` has that flaw. `repartitionById` places
    exactly; a hash of the shard number would leave ranks empty. The sort makes the order independent of the order in
    which shuffle blocks arrive.
    """
    from pyspark.sql import functions as F

    selected = df.select(*select_expressions(columns), F.monotonically_increasing_id().alias("id"))
    partition, row = F.shiftright("id", 33), F.col("id").bitwiseAND((1 << 33) - 1)
    dealt = selected.withColumn(SHARD, ((partition + row) % num_shards).cast("int"))
    placed = dealt.repartitionById(world_size, F.col(SHARD) % world_size)
    return placed.sortWithinPartitions("id").drop("id")


@contextlib.contextmanager
def open_spool(batches: Iterator[pa.RecordBatch], columns: Columns, shards: Sequence[int]) -> Iterator[Spool]:
    """Write a rank's rows to its local disk, for the time of the block.

    The files have no names: they vanish with the process, however it dies.

    Args:
        batches: The rank's partition of `deal_rows`.
        columns: What to keep of it.
        shards: The rank's shards.

    Raises:
        DataError: Rows that cannot be trained on.
    """
    directory = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or None
    if directory is not None and not os.path.isdir(directory):
        directory = None
    with contextlib.ExitStack() as stack:
        names: list[int | str] = [*shards, VALIDATION]
        writers = {name: _Writer(stack.enter_context(tempfile.TemporaryFile(dir=directory))) for name in names}
        facts, sample = Facts(), None
        for batch in batches:
            if not batch.num_rows:
                continue
            table, new = _encode(batch, columns, facts)
            facts = facts.merge(new, columns)
            train = _train_mask(batch, columns)
            if train is not None:
                writers[VALIDATION].write(table.filter(pc.invert(train)))
            for shard in shards:
                mask = pc.equal(batch.column(SHARD), shard) if len(shards) > 1 else None
                mask = _both(mask, train)
                rows = table if mask is None else table.filter(mask)
                writers[shard].write(rows)
                if sample is None and rows.num_rows:
                    sample = rows.slice(0, 2).combine_chunks()
        groups = {name: writer.close() for name, writer in writers.items()}
        validation = groups.pop(VALIDATION)
        yield Spool({int(name): found for name, found in groups.items()}, validation, facts, sample)


def stage_dataset(df: "DataFrame", columns: Columns, directory: str) -> StagedDataset:
    """Write the training and validation rows of a DataFrame to ``directory``, in one Spark job.

    Every partition becomes a file of each kind. A file counts only when its task reports it, so what failed or
    speculative attempts leave behind is never read.

    Args:
        df: The rows; evaluated once.
        columns: What to keep of it.
        directory: URL of a directory that all executors reach; must not exist yet.

    Raises:
        DataError: Rows that cannot be trained on.
    """
    import functools

    selected = df.select(*select_expressions(columns))
    write = functools.partial(_stage_partition, columns, directory)
    groups: dict[str, list[RowGroup]] = {"train": [], VALIDATION: []}
    facts, files = Facts(), {}
    for (text,) in selected.mapInArrow(write, _STAGED_SCHEMA).toArrow().to_pandas().itertuples(index=False):
        report = json.loads(text)
        if "error" in report:
            raise DataError(report["error"])
        facts = facts.merge(Facts.of_json(report["facts"]), columns)
        for kind, path, rows, size in report["files"]:
            groups[kind] += [RowGroup(path, index, count) for index, count in enumerate(rows)]
            files[path] = size
    train, validation = (tuple(sorted(groups[kind])) for kind in ("train", VALIDATION))
    return StagedDataset(directory, train, validation, facts, files)


def remove_staged(df: "DataFrame", directory: str) -> None:
    """Remove a staged directory from an executor: over Spark Connect the driver may not see it."""
    import functools

    job = df.sparkSession.range(1).mapInArrow(functools.partial(_remove, directory), "removed boolean")
    job.toArrow()


def read_sample(row_group: RowGroup, rows: int = 2) -> pa.Table:
    """The first rows of a staged row group.

    Raises:
        DataError: The file cannot be read.
    """
    file_system, path = open_file_system(row_group.path)
    try:
        with file_system.open_input_file(path) as source:
            return pq.ParquetFile(source).read_row_group(row_group.index).slice(0, rows)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{row_group.path} cannot be read by this executor: {error}. stagingDir must be storage that all executors "
            "share."
        ) from error


class _Writer:
    """A Parquet file that grows by row groups of about `_ROW_GROUP_BYTES`."""

    def __init__(self, sink: IO[bytes] | pa.NativeFile, path: str | None = None) -> None:
        self.path = path or f"/dev/fd/{sink.fileno()}"
        self._sink = sink
        self._writer: pq.ParquetWriter | None = None
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._rows: list[int] = []

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self._tables)
        if self._writer is None:
            # Numbers that are read many times from a local disk: neither compression nor dictionaries pay.
            self._writer = pq.ParquetWriter(
                self._sink, table.schema, compression="none", use_dictionary=False, write_statistics=False
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows.append(table.num_rows)
        self._tables, self._bytes = [], 0

    def close(self) -> tuple[RowGroup, ...]:
        """Finish the file; returns its row groups, none where no row was written."""
        if self._tables:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._sink.flush()
        return tuple(RowGroup(self.path, index, rows) for index, rows in enumerate(self._rows))


def _encode(batch: pa.RecordBatch, columns: Columns, facts: Facts) -> tuple[pa.Table, Facts]:
    table, widths = encode(batch, columns, facts.widths)
    labels = None
    for column in columns.labels:
        if column.validity == "class":
            found = pc.min_max(table.column(column.field)).as_py()
            labels = (int(found["min"]), int(found["max"]))
    return table, Facts(widths, labels, facts.row or show_row(as_named(batch, columns), 0))


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
    facts = Facts()
    writers: dict[str, _Writer] = {}
    with contextlib.ExitStack() as stack:

        def writer(kind: str) -> _Writer:
            if kind not in writers:
                file_system.create_dir(f"{root}/{kind}", recursive=True)
                sink = stack.enter_context(file_system.open_output_stream(f"{root}/{kind}/{name}"))
                writers[kind] = _Writer(sink, f"{directory}/{kind}/{name}")
            return writers[kind]

        for batch in batches:
            if not batch.num_rows:
                continue
            table, new = _encode(batch, columns, facts)
            facts = facts.merge(new, columns)
            train = _train_mask(batch, columns)
            rows = {"train": table if train is None else table.filter(train)}
            if train is not None:
                rows[VALIDATION] = table.filter(pc.invert(train))
            for kind, kept in rows.items():
                if kept.num_rows:
                    writer(kind).write(kept)
        groups = {kind: kept.close() for kind, kept in writers.items()}
    files: list[Any] = []
    for kind, found in groups.items():
        if found:
            size = file_system.get_file_info(f"{root}/{kind}/{name}").size
            files.append((kind, found[0].path, [group.rows for group in found], size))
    return {"facts": facts.to_json(), "files": files}


def _remove(directory: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        file_system, path = open_file_system(directory)
        found = file_system.get_file_info(path).type != pyarrow.fs.FileType.NotFound
        if found and batch.num_rows:
            file_system.delete_dir(path)
        yield pa.RecordBatch.from_pydict({"removed": [found] * batch.num_rows})


def window_rows(columns: Columns, facts: Facts, window_bytes: int) -> int:
    """Rows of one shard's shuffle window that take ``window_bytes`` in memory."""
    return max(1, window_bytes // max(1, row_bytes(columns, facts.widths)))
