"""Which rows of files read in place are kept, counted row group by row group before the fit.

`inspect_dataset` does so in a Spark job, `inspect_locally` in this process; the plan is made from what they find. This
hides how little has to be read for that: what folders and footers tell is not looked for in the rows.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.convert import null_rows, to_array, whole
from sparkdl.io.dataset import DiscoveredDataset, FileEntry, open_listed
from sparkdl.io.filters import filter_rows
from sparkdl.io.in_place import (
    InPlace,
    dropping_columns,
    in_place,
    kept_rows,
    physical_columns,
    source_columns,
    with_draw,
    with_folders,
    without_nulls,
)
from sparkdl.io.plan import RowGroup
from sparkdl.io.schema import show_row
from sparkdl.io.spark_jobs import run_job
from sparkdl.io.spark_types import spark_type
from sparkdl.io.stage import Facts, StagedDataset
from sparkdl.storage import FileSystems

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["FileReport", "inspect_dataset", "inspect_file", "inspect_locally", "merge_reports"]

_FIRST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a plan needs to know of one file.

    Attributes:
        path: The file.
        train: Index and number of kept rows of each row group that has training rows.
        validation: The same of validation rows.
        facts: What is known of the rows.
        nulls: How many kept rows have a null where none may be, by column.
    """

    path: str
    train: tuple[tuple[int, int], ...]
    validation: tuple[tuple[int, int], ...]
    facts: Facts
    nulls: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": self.path,
            "train": self.train,
            "validation": self.validation,
            "facts": self.facts.to_json(),
            "nulls": dict(self.nulls),
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "FileReport":
        """The inverse of `to_json`."""
        train, validation = (tuple((index, rows) for index, rows in values[split]) for split in ("train", "validation"))
        return cls(values["path"], train, validation, Facts.of_json(values["facts"]), values["nulls"])


def inspect_file(discovered: DiscoveredDataset, entry: FileEntry, columns: Columns) -> FileReport:
    """Count the rows of one file that are kept, reading as little as the answer takes.

    Row groups are left out by the values of folders and by the statistics in the footer. Rows are counted from the
    footer where no filter, split or null can concern them; else the columns that decide are read.

    Raises:
        DataError: The file cannot be read, its columns are not those of the first file, or values in it cannot be
            trained on. Nulls are only counted.
    """
    return _inspect(in_place(discovered, columns), entry, FileSystems(discovered.dataset.storage_options))


def inspect_locally(discovered: DiscoveredDataset, columns: Columns) -> StagedDataset:
    """Inspect all files in this process.

    Raises:
        DataError: As `inspect_file` and `merge_reports`.
    """
    context, systems = in_place(discovered, columns), FileSystems(discovered.dataset.storage_options)
    return merge_reports(discovered, columns, [_inspect(context, entry, systems) for entry in discovered.files])


def inspect_dataset(spark: "SparkSession", discovered: DiscoveredDataset, columns: Columns) -> StagedDataset:
    """Inspect all files on the executors, in one Spark job.

    Raises:
        DataError: As `inspect_file` and `merge_reports`.
    """
    work = functools.partial(_inspect_job, in_place(discovered, columns), discovered.files)
    reports = run_job(spark, len(discovered.files), work)
    return merge_reports(discovered, columns, [FileReport.of_json(report) for report in reports])


def merge_reports(discovered: DiscoveredDataset, columns: Columns, reports: Sequence[FileReport]) -> StagedDataset:
    """What the plan needs to know of all files; a data set of which no row is kept has no row groups.

    Raises:
        DataError: Nulls where none may be, or rows of different widths.
    """
    facts = Facts()
    for report in reports:
        facts = facts.merge(report.facts, columns)
    for name in dict.fromkeys(name for report in reports for name in report.nulls):
        bad = [report for report in reports if report.nulls.get(name)]
        raise DataError(
            f"{name!r} is null in {sum(report.nulls[name] for report in bad)} rows of {discovered.dataset}, in "
            f"{len(bad)} of {len(reports)} files; the first is {bad[0].path}. Leave such rows out with "
            f"filters=pyarrow.compute.field({name!r}).is_valid(), or fill them before fit."
        )
    train = [RowGroup(report.path, *group) for report in reports for group in report.train]
    validation = [RowGroup(report.path, *group) for report in reports for group in report.validation]
    files = {entry.path: (entry.size, entry.mtime_ns) for entry in discovered.files}
    return StagedDataset(str(discovered.dataset), tuple(sorted(train)), tuple(sorted(validation)), facts, files)


def _inspect(context: InPlace, entry: FileEntry, systems: FileSystems) -> FileReport:
    with open_listed(systems, entry, context.storage_options) as source, pq.ParquetFile(source) as file:
        _check_types(file.schema_arrow, context, entry)
        try:
            return _Inspection(context, entry, source, file).report()
        except DataError as error:
            raise DataError(f"{entry.path}: {error}") from error


def _check_types(found: pa.Schema, context: InPlace, entry: FileEntry) -> None:
    for name in physical_columns(context):
        expected = spark_type(context.schema.field(name).type).simpleString()
        if name not in found.names:
            raise DataError(
                f"{entry.path} has no column {name!r}, but the first file has one, of type {expected}. All files need "
                "the columns that are trained on; name files of one schema, or write them again."
            )
        kind = spark_type(found.field(name).type).simpleString()
        if kind != expected:
            raise DataError(
                f"{entry.path} holds {name!r} as {kind}, but the first file as {expected}. All files need the same "
                "types; name files of one schema, or write them again."
            )


class _Inspection:
    """The inspection of one open file."""

    def __init__(self, context: InPlace, entry: FileEntry, source: pa.NativeFile, file: pq.ParquetFile) -> None:
        self._context = context
        self._entry = entry
        self._source = source
        self._file = file
        self._leaves = _leaves_by_column(file.schema_arrow)
        self._nulls: dict[str, int] = {}
        self._labels: tuple[int, int] | None = None
        self._dropped = 0

    def report(self) -> FileReport:
        train, validation = [], []
        for index in self._possible_groups():
            rows = self._file.metadata.row_group(index).num_rows
            kept, held = self._count(index, rows) if rows else (0, 0)
            if kept > held:
                train.append((index, kept - held))
            if held:
                validation.append((index, held))
        widths, row = self._first_row(min((*train, *validation))[0]) if train or validation else ({}, "")
        facts = Facts(widths, self._labels, row, self._dropped)
        return FileReport(self._entry.path, tuple(train), tuple(validation), facts, self._nulls)

    def _possible_groups(self) -> list[int]:
        """Row groups that may hold rows that the filter keeps, as far as folders and statistics tell."""
        context, every = self._context, list(range(self._file.metadata.num_row_groups))
        if context.filters is None:
            return every
        one_row = with_folders(pa.table({"": [0]}), context, self._entry.path)
        if context.row_filters is None:
            return every if filter_rows(one_row, context.filters).num_rows else []
        folders = [
            pc.field(name).is_null() if not (value := one_row.column(name)[0]).is_valid else pc.field(name) == value
            for name in context.partition_types
        ]
        known = _all_of(folders)
        fragment = ds.ParquetFileFormat().make_fragment(
            self._source, partition_expression=pc.scalar(True) if known is None else known
        )
        parts = fragment.split_by_row_group(filter=context.row_filters, schema=context.schema)
        return sorted(group.id for part in parts for group in part.row_groups)

    def _count(self, index: int, rows: int) -> tuple[int, int]:
        """How many rows of a row group are kept, and how many of these are held out for validation."""
        context, columns = self._context, self._context.columns
        deciding = set(context.filter_columns)
        if columns.validation is not None:
            deciding.add(columns.validation.name)
        sources = {name: column for column in columns for name in source_columns(column)}
        uncertain = {name for name in sources if not self._never_null(index, name)}
        dropping = {name: column for name, column in dropping_columns(context).items() if name in uncertain}
        checked = [name for name in sources if name in uncertain and sources[name].nulls == "error"]
        certain = context.row_filters is None and not dropping
        labels = [
            column
            for column in columns.labels
            if column.validity == "class" and not (certain and self._note_statistics(index, column))
        ]
        read = {*deciding, *dropping, *checked, *(column.name for column in labels)}
        if not read:
            return rows, 0
        passed = filter_rows(self._read(index, read), context.row_filters)
        kept = without_nulls(passed, dropping)
        self._dropped += passed.num_rows - kept.num_rows
        for name in checked:
            gone = null_rows(whole(kept.column(name)), sources[name])
            if gone is not None and gone.any():
                self._nulls[name] = self._nulls.get(name, 0) + int(gone.sum())
        for column in labels:
            if column.name not in self._nulls:
                self._note_labels(column, kept)
        if columns.validation is None:
            return kept.num_rows, 0
        return kept.num_rows, pc.sum(kept.column(columns.validation.name).cast(pa.int64())).as_py() or 0

    def _read(self, index: int, names: set[str]) -> pa.Table:
        wanted = [name for name in self._context.schema.names if name in names - self._context.partition_types.keys()]
        table = self._file.read_row_group(index, columns=wanted, use_threads=False)
        table = with_folders(table, self._context, self._entry.path)
        return with_draw(table, self._context, self._entry.path, index)

    def _never_null(self, index: int, name: str) -> bool:
        if name in self._context.partition_types:
            return self._entry.partitions[name] is not None
        group = self._file.metadata.row_group(index)
        # One leaf without nulls is enough: a null or an empty list further up counts as a null of every leaf below. And
        # an array has but one leaf, so that none of its elements is null either.
        statistics = (group.column(leaf).statistics for leaf in self._leaves[name])
        return any(one is not None and one.has_null_count and one.null_count == 0 for one in statistics)

    def _note_statistics(self, index: int, column: Column) -> bool:
        """Take the smallest and largest label from the footer; False where it does not tell, or tells of bad ones."""
        name = column.name
        if name in self._context.partition_types or not pa.types.is_integer(self._file.schema_arrow.field(name).type):
            return False
        found = self._file.metadata.row_group(index).column(self._leaves[name][0]).statistics
        if found is None or not found.has_min_max or found.min < 0 or found.max >= 1 << 31:
            return False
        self._widen_labels(found.min, found.max)
        return True

    def _note_labels(self, column: Column, kept: pa.Table) -> None:
        if kept.num_rows:
            values = to_array(whole(kept.column(column.name)), column, kept)
            self._widen_labels(int(values.min()), int(values.max()))

    def _widen_labels(self, low: int, high: int) -> None:
        known = self._labels or (low, high)
        self._labels = min(known[0], low), max(known[1], high)

    def _first_row(self, index: int) -> tuple[dict[str, int], str]:
        """Values per row of each column, and a row as text, from the first kept rows of a row group."""
        context = self._context
        widths = {column.field: 1 for column in context.columns if column.kind in ("scalar", "text")}
        open_columns = []
        for column in context.columns:
            if column.kind == "assembled":
                widths[column.field] = len(column.parts)
            elif column.name in context.coded and column.kind == "array":
                widths[column.field] = math.prod(context.coded[column.name].shape)
            elif column.kind in ("vector", "array"):
                open_columns.append(column)
        if not open_columns or self._nulls:
            return widths, ""
        row = ""
        wanted = list(physical_columns(context))
        for batch in self._file.iter_batches(_FIRST_ROWS, row_groups=[index], columns=wanted, use_threads=False):
            table = with_folders(pa.Table.from_batches([batch]), context, self._entry.path)
            kept = kept_rows(table, context, None)
            if kept.num_rows and not row:
                row = show_row(kept.slice(0, 1), 0)
            for column in list(open_columns):
                values = whole(kept.column(column.name)).drop_null().slice(0, 1)
                if len(values):
                    widths[column.field] = math.prod(to_array(values, column).shape[1:])
                    open_columns.remove(column)
            if not open_columns:
                break
        return widths, row


def _leaves_by_column(schema: pa.Schema) -> dict[str, list[int]]:
    """Where the leaves of each column are among those of the file, which has them in the same order."""

    def count(kind: pa.DataType) -> int:
        if isinstance(kind, pa.BaseExtensionType):
            return count(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return count(kind.value_type)
        if pa.types.is_map(kind):
            return count(kind.key_type) + count(kind.item_type)
        return sum(count(kind.field(number).type) for number in range(kind.num_fields)) or 1

    found, first = {}, 0
    for one in schema:
        leaves = count(one.type)
        found[one.name] = list(range(first, first + leaves))
        first += leaves
    return found


def _all_of(conditions: Sequence[pc.Expression]) -> pc.Expression | None:
    return functools.reduce(lambda left, right: left & right, conditions) if conditions else None


def _inspect_job(context: InPlace, files: Sequence[FileEntry], numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    systems = FileSystems(context.storage_options)
    for number in numbers:
        yield _inspect(context, files[number], systems).to_json()
