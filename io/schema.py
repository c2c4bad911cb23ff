"""Columns from Spark or Parquet to torch: which types are taken, how they travel, what they become.

| Spark, Parquet read in place | staged Parquet | tensor |
|---|---|---|
| ML Vector: dense, sparse, mixed | cell of the module's dtype | (rows, values) |
| array of floats, decimals, booleans | cell of the module's dtype | (rows, values) |
| array of integers, dates, timestamps | cell of int64 | (rows, values), int64 |
| nested arrays with a declared shape | cell of all values of the row | (rows, *shape) |
| float (16 to 64 bits), decimal, boolean | number | (rows, 1) as input; (rows,) as label or weight |
| byte, short, int, long, unsigned ones | int64 | (rows,), int64 |
| date | int64 | (rows,), int64: days since 1970-01-01 |
| timestamp of any unit, timestamp_ntz | int64 | (rows,), int64: microseconds since 1970-01-01 UTC |
| string or dictionary, with a vocabulary | int64; string while it is learnt | (rows,), int64 |
| several numbers, assembled | cell of all of them | (rows, parts); int64 where all are integers |
| string, binary, other arrays, map, for a transform | as it is | none: an Arrow array |

A vector or array with a declared shape becomes (rows, *shape). Integers become floats where a regressor is trained on
them. What is not in the table is refused by name: structs, intervals, variants.

A row of many values is one fixed-size binary cell: Parquet then has no list levels to decode, which makes it about ten
times as fast to read and write as a list, and a tensor is a view of the page. Nulls are refused, dropped or filled, NaN
and ragged rows refused, on the way into staged data or out of Parquet read in place, so that nothing behind meets them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack

from sparkdl.config import Column, Columns
from sparkdl.io.checks import Array, show_row
from sparkdl.io.convert import Value, convert, keep_mask, null_rows, raw_array, to_array, whole
from sparkdl.io.resolve import ColumnRules, Role, check_rules, resolve_column

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn

__all__ = [
    "SHARD",
    "VALIDATION",
    "ColumnRules",
    "Role",
    "Value",
    "as_named",
    "check_rules",
    "convert",
    "decode",
    "drop_null_rows",
    "encode",
    "keep_mask",
    "resolve_column",
    "select_expressions",
    "show_row",
    "to_array",
]

SHARD, VALIDATION = "shard", "validation"  # columns that travel beside those of the user
_VALUES = b"sparkdl.values"  # Parquet field metadata: dtype of the values in a fixed-size binary cell


def select_expressions(columns: Columns) -> list["SparkColumn"]:
    """What Spark must select so that `encode` understands the batches: values in their own types, by staged name.

    Arrow converts them, not Spark: a cast in Spark would cut a class of 0.5 to 0 and a timestamp to seconds, and lets
    the session's time zone decide on a timestamp_ntz.
    """
    from pyspark.sql import functions as F

    chosen = []
    for column in columns:
        if column.kind == "assembled":
            source = F.struct(*(F.col(_quoted(part)) for part in column.parts))
        else:
            source = F.col(_quoted(column.name))
        chosen.append(source.alias(column.field))
    if columns.validation is not None:
        flag = F.col(_quoted(columns.validation.name))
        chosen.append(F.coalesce(flag, F.lit(False)).alias(VALIDATION))
    return chosen


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def drop_null_rows(batch: pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """The batch without the rows that have a null in a column whose nulls are to be dropped.

    Args:
        batch: Columns as chosen by `select_expressions`, and others.
        columns: What they are.
    """
    masks = [null_rows(batch.column(column.field), column) for column in columns if column.nulls == "drop"]
    found = [mask for mask in masks if mask is not None]
    return batch.filter(pa.array(~np.logical_or.reduce(found))) if found else batch


def encode(
    batch: pa.RecordBatch, columns: Columns, widths: Mapping[str, int] | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """Turn an Arrow batch of selected columns into the staged form, refusing what cannot be trained on.

    Args:
        batch: Columns as chosen by `select_expressions`, after `drop_null_rows`.
        columns: What they are.
        widths: Values per row of each column, where known from earlier batches.

    Returns:
        The batch (without the validation flag) with one fixed-size cell per column, raw ones and words to be numbered
        as they are; and its widths, without those of raw columns.

    Raises:
        DataError: A null, a NaN or infinity, a ragged row, a bad label or an unknown word; names the column and shows
            the row.
    """
    arrays, fields, seen = [], [], {}
    named = as_named(batch, columns)
    for column in columns:
        array, metadata = batch.column(column.field), None
        if _stays_arrow(column):
            array = raw_array(array, column, named)
        else:
            values = to_array(array, column, named, (widths or {}).get(column.field))
            array, metadata = _cells(values), {_VALUES: values.dtype.name.encode()}
            seen[column.field] = math.prod(values.shape[1:])
        nullable = _stays_arrow(column) and not isinstance(column.nulls, str)  # filled when the words are numbered
        arrays.append(array)
        fields.append(pa.field(column.field, array.type, nullable=nullable, metadata=metadata))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields)), seen


def decode(table: pa.Table, columns: Columns) -> dict[str, torch.Tensor | pa.Array]:
    """Staged columns as tensors, views of the Arrow buffers where their type allows; raw ones as Arrow arrays.

    Returns:
        One tensor or array per column, by its staged name.

    Raises:
        DataError: A word that is not in its column's vocabulary.
    """
    values: dict[str, torch.Tensor | pa.Array] = {}
    for column in columns:
        array = whole(table.column(column.field))
        if column.kind == "raw":
            values[column.field] = array
        elif column.kind == "text" and not pa.types.is_int64(array.type):
            values[column.field] = torch.from_numpy(to_array(array, column))
        elif pa.types.is_fixed_size_binary(array.type):
            kind = (table.schema.field(column.field).metadata or {})[_VALUES].decode()
            width = array.type.byte_width // np.dtype(kind).itemsize
            flat = pa.Array.from_buffers(
                pa.from_numpy_dtype(kind),
                len(array) * width,
                [None, array.buffers()[1]],
                offset=array.offset * width,
            )
            values[column.field] = torch.utils.dlpack.from_dlpack(flat).reshape(len(array), *(column.shape or (width,)))
        else:
            tensor = torch.utils.dlpack.from_dlpack(array)
            values[column.field] = tensor if column.flat else tensor[:, None]
    return values


def _stays_arrow(column: Column) -> bool:
    return column.kind == "raw" or (column.kind == "text" and column.vocabulary is None)


def _cells(values: Array) -> pa.Array:
    """Fixed-size cells over the memory of ``values``: no copy."""
    if values.ndim == 1:
        return pa.array(values)
    size = math.prod(values.shape[1:]) * values.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(values)])


def as_named(batch: pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """A batch with its columns under the names that the user knows, for messages."""
    flag = () if columns.validation is None else (columns.validation,)
    found = {column.field: column.name for column in (*columns, *flag)}
    kept = [name for name in batch.schema.names if name != SHARD]
    return batch.select(kept).rename_columns([found.get(name, name) for name in kept])
