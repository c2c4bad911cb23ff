"""The rows of files read in place, made from the row groups that a reader has read.

Runs in the reader threads of a rank. An `InPlace` is what travels there; `select_rows` makes the rows of the plan. This
hides that a column may come from a file, from the name of a folder or from several columns, that it may have to be
decoded, and which rows of a row group are kept. Inspection counts the same rows by the same functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.convert import null_rows, whole
from sparkdl.io.dataset import DiscoveredDataset
from sparkdl.io.draw import Draw
from sparkdl.io.filters import filter_columns, filter_rows
from sparkdl.io.folders import folder_texts, folder_value
from sparkdl.io.plan import Piece
from sparkdl.io.unischema import as_lists, decode_unischema

__all__ = [
    "InPlace",
    "Split",
    "dropping_columns",
    "in_place",
    "kept_rows",
    "narrowed",
    "physical_columns",
    "select_rows",
    "source_columns",
    "with_draw",
    "with_folders",
    "without_nulls",
]

Split = Literal["train", "validation"]


@dataclass(frozen=True, eq=False, slots=True)
class InPlace:
    """All that a reader needs to know to make the rows of a plan out of row groups; small, and can be pickled.

    Attributes:
        columns: What is trained on, under the user's names.
        filters: Which rows are; None: all.
        row_filters: The same, unless folders alone decide: then the plan holds no other file, and no row is looked at.
        filter_columns: The columns that ``row_filters`` looks at.
        schema: Types of the columns of files and folders that any of this names.
        partition_types: Types of the folders' columns among them.
        coded: Fields among the columns that a Petastorm codec decodes.
        time_zone: Of timestamps in folder names.
        storage_options: For the store.
        draw: Which rows are drawn for validation; None: none are.
        file_names: Names of the files by path, for the draw.
        validation: How validation rows are made, where they come from a data set of their own.
        dropping: Columns whose nulls drop the row; None: those among ``columns`` that say so.
    """

    columns: Columns
    filters: pc.Expression | None
    row_filters: pc.Expression | None
    filter_columns: tuple[str, ...]
    schema: pa.Schema
    partition_types: Mapping[str, pa.DataType]
    coded: Mapping[str, Any]
    time_zone: str
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    draw: Draw | None = None
    file_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    validation: "InPlace | None" = None
    dropping: Mapping[str, Column] | None = None


def in_place(discovered: DiscoveredDataset, columns: Columns) -> InPlace:
    """What a reader of these columns needs to know of a data set."""
    filtered = filter_columns(discovered.filters, discovered.arrow_schema)
    by_folder = discovered.partition_types.keys() >= set(filtered)
    used = {name for column in columns for name in source_columns(column)} | set(filtered)
    if columns.validation is not None:
        used.add(columns.validation.name)
    return InPlace(
        columns=columns,
        filters=discovered.filters,
        row_filters=None if by_folder else discovered.filters,
        filter_columns=() if by_folder else filtered,
        schema=pa.schema([one for one in discovered.arrow_schema if one.name in used]),
        partition_types={name: kind for name, kind in discovered.partition_types.items() if name in used},
        coded={name: one for name, one in discovered.coded.items() if name in used},
        time_zone=discovered.time_zone,
        storage_options=discovered.dataset.storage_options,
        draw=discovered.draw,
        file_names={} if discovered.draw is None else discovered.file_names,
    )


def narrowed(context: InPlace, columns: Columns) -> InPlace:
    """The same rows with some of the columns alone, those that decide which rows these are apart."""
    used = {name for column in columns for name in source_columns(column)} | {*context.filter_columns}
    used |= {*dropping_columns(context)}
    if columns.validation is not None:
        used.add(columns.validation.name)
    schema = pa.schema([one for one in context.schema if one.name in used or one.name in context.partition_types])
    return replace(context, columns=columns, schema=schema, dropping=dropping_columns(context))


def physical_columns(context: InPlace) -> tuple[str, ...]:
    """Names of the columns to read from the files."""
    return tuple(name for name in context.schema.names if name not in context.partition_types)


def select_rows(table: pa.Table, piece: Piece, *, context: InPlace, split: Split = "train") -> pa.Table:
    """The rows of a piece, out of all rows of its row group.

    Args:
        table: The row group as read from the file: the `physical_columns`.
        piece: Which of the kept rows. Its row group counts the kept rows, not those in the file.
        context: What `in_place` returned.
        split: Training or validation rows.

    Returns:
        The columns of ``context.columns`` under the user's names: those of folders added, those of Petastorm decoded to
        lists of fixed size, and those that only filters look at left out.

    Raises:
        DataError: Not as many rows are kept as were planned, or a cell that a codec cannot decode.
    """
    group = piece.row_group
    table = with_folders(table, context, group.path)
    if table.num_rows != group.rows:
        table = kept_rows(with_draw(table, context, group.path, group.index), context, split)
    if table.num_rows != group.rows:
        raise DataError(
            f"Row group {group.index} of {group.path} has {table.num_rows} rows to train on, but {group.rows} were "
            "planned. The file was changed after it was inspected; fit again."
        )
    names = list(dict.fromkeys(name for column in context.columns for name in source_columns(column)))
    rows = table.slice(piece.start, piece.rows).select(names)
    return as_lists(rows, decode_unischema(rows, context.coded, [name for name in names if name in context.coded]))


def source_columns(column: Column) -> tuple[str, ...]:
    """The columns of files and folders that a column is made of."""
    return column.parts or (column.name,)


def dropping_columns(context: InPlace) -> dict[str, Column]:
    """The columns of files and folders whose nulls drop the row, each with the column that says so."""
    if context.dropping is not None:
        return dict(context.dropping)
    return {name: column for column in context.columns if column.nulls == "drop" for name in source_columns(column)}


def with_folders(table: pa.Table, context: InPlace, path: str) -> pa.Table:
    """The table with the columns of the folders of its file; a folder further down wins over one above."""
    from pyspark.sql.pandas.types import from_arrow_type

    texts = folder_texts(path.split("/")[:-1])
    for name, kind in context.partition_types.items():
        value = folder_value(texts[name], from_arrow_type(kind), context.time_zone)
        constant = pa.repeat(pa.scalar(value, kind), table.num_rows)
        table = table.append_column(name, constant)
    return table


def with_draw(table: pa.Table, context: InPlace, path: str, index: int) -> pa.Table:
    """The table of a whole row group with the column that says which rows are drawn, where rows are."""
    if context.draw is None or context.columns.validation is None:
        return table
    drawn = context.draw.by_place(context.file_names[path], index, table.num_rows)
    return table.append_column(context.columns.validation.name, pa.array(drawn))


def kept_rows(table: pa.Table, context: InPlace, split: Split | None) -> pa.Table:
    """The rows that are trained on, out of all rows of a row group that has its folders' columns.

    Args:
        table: With all columns that decide.
        context: What `in_place` returned.
        split: Training or validation rows; None: both.
    """
    table = without_nulls(filter_rows(table, context.row_filters), dropping_columns(context))
    if split is None or context.columns.validation is None:
        return table
    held = pc.coalesce(pc.field(context.columns.validation.name), pc.scalar(False))
    return filter_rows(table, held if split == "validation" else ~held)


def without_nulls(table: pa.Table, dropping: Mapping[str, Column]) -> pa.Table:
    """The rows that have a null in none of some columns, which `dropping_columns` returned."""
    gone = [null_rows(whole(table.column(name)), column) for name, column in dropping.items()]
    found = [mask for mask in gone if mask is not None]
    return table.filter(pa.array(~np.logical_or.reduce(found))) if found else table
