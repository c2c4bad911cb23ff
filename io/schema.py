"""Columns from Spark to torch: which types are taken, how they travel, what they become.

| Spark column | staged Parquet | tensor |
|---|---|---|
| ML Vector (dense, sparse, mixed), array of floats | fixed-size binary, values of the module's dtype | (rows, values) |
| array of integers | fixed-size binary of int64 | (rows, values), int64 |
| float, double, decimal, boolean | number | (rows, 1) as input; (rows,) as label or weight |
| byte, short, int, long | int64 | (rows,), int64 |

A row of many values is one fixed-size binary cell: Parquet then has no list levels to decode, which makes it about ten
times as fast to read and write as a list, and a tensor is a view of the page. Nulls, NaN and ragged rows are refused
here, on the way into staged data, so that nothing behind this module meets them.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.utils.dlpack

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn
    from pyspark.sql import DataFrame
    from pyspark.sql.types import DataType

__all__ = [
    "SHARD",
    "VALIDATION",
    "as_named",
    "decode",
    "encode",
    "resolve_column",
    "row_bytes",
    "select_expressions",
    "show_row",
    "to_array",
]

SHARD, VALIDATION = "shard", "validation"  # columns that travel beside those of the user
Array = npt.NDArray[Any]
_VALUES = b"sparkdl.values"  # Parquet field metadata: dtype of the values in a fixed-size binary cell
_MOST_CLASSES = 1 << 31
_INTEGRAL = ("tinyint", "smallint", "int", "bigint")
_FLOATING = ("float", "double", "boolean")


def resolve_column(
    df: "DataFrame",
    name: str,
    *,
    field: str,
    param: str,
    floating: str,
    role: Literal["input", "target", "number", "class", "weight", "validation"],
) -> Column:
    """Check that a column exists and has a type that ``role`` can use. Starts no job.

    Args:
        df: The DataFrame to be trained on or transformed.
        name: The column.
        field: Its name in staged data.
        param: The Param that named it, for messages.
        floating: Name of the torch dtype of floating values (the module's).
        role: What the column is for: a "target" keeps integers as they are, a "number" is always floating.

    Raises:
        ConfigError: No such column, or a type that cannot be used.
    """
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import types as T

    found = next((entry for entry in df.schema.fields if entry.name == name), None)
    if found is None:
        raise ConfigError(f"{param}={name!r} is not a column. The DataFrame has {', '.join(df.columns)}.")
    spark_type = found.dataType
    text = spark_type.simpleString()
    where = f"{param}={name!r} has type {'vector' if isinstance(spark_type, VectorUDT) else text}"
    number = text in _INTEGRAL + _FLOATING or text.startswith("decimal")
    if role == "validation":
        if text != "boolean":
            raise ConfigError(f"{where}; it must be boolean, true for the rows held out for validation.")
        return Column(name, field, "scalar", "bool", flat=True)
    if role in ("class", "weight"):
        if not number:
            hint = " Index strings with pyspark.ml.feature.StringIndexer." if text == "string" else ""
            wanted = "class numbers 0, 1, ..." if role == "class" else "numbers"
            raise ConfigError(f"{where}; it must hold {wanted}.{hint}")
        dtype = "int64" if role == "class" else floating
        return Column(name, field, "scalar", dtype, flat=True, validity=role)
    if isinstance(spark_type, VectorUDT):
        return Column(name, field, "vector", floating)
    if number:
        integral = text in _INTEGRAL and role != "number"
        dtype = "int64" if integral else floating
        return Column(name, field, "scalar", dtype, flat=integral or role != "input")
    if isinstance(spark_type, T.ArrayType):
        element = spark_type.elementType.simpleString()
        if element in ("float", "double") or (element in _INTEGRAL and role == "number"):
            return Column(name, field, "array", floating)
        if element in _INTEGRAL and role != "number":
            return Column(name, field, "array", "int64")
    raise ConfigError(f"{where}; use {_advice(spark_type)}.")


def _advice(spark_type: "DataType") -> str:
    text = spark_type.simpleString()
    if text == "string":
        return "pyspark.ml.feature.StringIndexer to turn strings into numbers"
    if text.startswith("struct"):
        return "its fields as columns of their own"
    if text in ("date", "timestamp", "timestamp_ntz"):
        return "numbers derived from it (hour, day of week, unix_timestamp)"
    return "an ML Vector, an array of numbers, or a number"


def select_expressions(columns: Columns) -> list["SparkColumn"]:
    """What Spark must select so that `encode` understands the batches."""
    from pyspark.sql import functions as F

    chosen = []
    for column in columns:
        source = F.col(f"`{column.name.replace('`', '``')}`")
        if column.kind == "scalar":
            # Class labels travel as doubles, so that 0.5 is seen and refused instead of cut to 0.
            integral = column.dtype == "int64" and column.validity != "class"
            source = source.cast("bigint" if integral else "double")
        chosen.append(source.alias(column.field))
    if columns.validation is not None:
        flag = F.col(f"`{columns.validation.name.replace('`', '``')}`")
        chosen.append(F.coalesce(flag, F.lit(False)).alias(VALIDATION))
    return chosen


def encode(
    batch: pa.RecordBatch, columns: Columns, widths: Mapping[str, int] | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """Turn an Arrow batch of selected columns into the staged form, refusing what cannot be trained on.

    Args:
        batch: Columns as chosen by `select_expressions`.
        columns: What they are.
        widths: Values per row of each column, where known from earlier batches.

    Returns:
        The batch with one fixed-size cell per column (without the validation flag), and its widths.

    Raises:
        DataError: A null, a NaN or infinity, a ragged row or a bad label; names the column and shows the row.
    """
    arrays, fields, seen = [], [], {}
    named = as_named(batch, columns)
    for column in columns:
        values = to_array(batch.column(column.field), column, named, (widths or {}).get(column.field))
        seen[column.field] = values.shape[1] if values.ndim == 2 else 1
        array, kind = _cells(values)
        arrays.append(array)
        fields.append(pa.field(column.field, array.type, nullable=False, metadata={_VALUES: kind.encode()}))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields)), seen


def to_array(array: pa.Array, column: Column, batch: pa.RecordBatch | None = None, width: int | None = None) -> Array:
    """One Arrow column as a NumPy array: shape (rows,) for numbers, (rows, values) for vectors and arrays.

    Args:
        array: The column, as Spark delivers it.
        column: What it is.
        batch: The batch that it comes from, under the user's names, to show the offending row.
        width: Values that each row must have; None takes the first row's.

    Raises:
        DataError: As `encode`.
    """
    dtype = np.dtype(column.dtype)
    if array.null_count:
        row = pc.index(array.is_null(), True).as_py()
        raise DataError(
            f"{column.name!r} is null in {array.null_count} of {len(array)} rows; the first: {show_row(batch, row)}. "
            f"Drop such rows (df.dropna(subset=[{column.name!r}])) or fill them before fit."
        )
    if column.kind == "scalar":
        values = array.to_numpy(zero_copy_only=False)
    elif column.kind == "array":
        values = _rectangle(array, column, batch, width)
    else:
        values = _dense(array, column, batch, width)
    if values.dtype.kind == "f" and dtype.kind == "f":
        with np.errstate(over="ignore"):  # what no float32 can hold becomes infinite, and is refused as such
            values = values.astype(dtype, copy=False)
    _check_values(values, column, batch)
    return np.ascontiguousarray(values, dtype)


def decode(table: pa.Table, columns: Columns) -> dict[str, torch.Tensor]:
    """Staged columns as tensors, views of the Arrow buffers where their type allows.

    Returns:
        One tensor per column, by its staged name.
    """
    tensors = {}
    for column in columns:
        array = table.column(column.field).combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # combine_chunks() of no rows keeps the type but not the array
            array = pa.array([], array.type)
        if pa.types.is_fixed_size_binary(array.type):
            kind = (table.schema.field(column.field).metadata or {})[_VALUES].decode()
            width = array.type.byte_width // np.dtype(kind).itemsize
            flat = pa.Array.from_buffers(
                pa.from_numpy_dtype(kind),
                len(array) * width,
                [None, array.buffers()[1]],
                offset=array.offset * width,
            )
            tensors[column.field] = torch.utils.dlpack.from_dlpack(flat).reshape(len(array), width)
        else:
            tensor = torch.utils.dlpack.from_dlpack(array)
            tensors[column.field] = tensor if column.flat else tensor[:, None]
    return tensors


def _cells(values: Array) -> tuple[pa.Array, str]:
    """Fixed-size cells over the memory of ``values``: no copy."""
    if values.ndim == 1:
        return pa.array(values), values.dtype.name
    rows, width = values.shape
    size = width * values.itemsize
    buffers = [None, pa.py_buffer(values)]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), rows, buffers), values.dtype.name


def _rectangle(array: pa.Array, column: Column, batch: pa.RecordBatch | None, width: int | None) -> Array:
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    width = _width(lengths, column, batch, width)
    values = array.flatten()
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py() // max(width, 1)
        raise DataError(
            f"{column.name!r} has a null inside an array; the first row: {show_row(batch, row)}. "
            "Fill or drop nulls inside arrays before fit."
        )
    found: Array = values.to_numpy(zero_copy_only=False).reshape(len(array), width)
    return found


def _dense(array: pa.Array, column: Column, batch: pa.RecordBatch | None, width: int | None) -> Array:
    """Spark ML vectors, a struct of type (0 sparse, 1 dense), size, indices and values, as a dense matrix."""
    rows = len(array)
    sparse = array.field("type").to_numpy(zero_copy_only=False) == 0
    values = array.field("values")
    lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    sizes = lengths
    if sparse.any():
        sizes = np.where(sparse, array.field("size").fill_null(0).to_numpy(zero_copy_only=False), lengths)
    width = _width(sizes, column, batch, width)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if not sparse.any():
        dense: Array = flat.reshape(rows, width)
        return dense
    of_sparse = np.repeat(sparse, lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(flat)) - starts  # the position within its row; right for dense rows
    position[of_sparse] = array.field("indices").flatten().to_numpy(zero_copy_only=False)
    out = np.zeros((rows, width), np.dtype(column.dtype))
    with np.errstate(over="ignore"):
        out[np.repeat(np.arange(rows), lengths), position] = flat
    return out


def _width(lengths: Array, column: Column, batch: pa.RecordBatch | None, width: int | None) -> int:
    expected = int(lengths[0]) if width is None and len(lengths) else width or 0
    odd = np.flatnonzero(lengths != expected)
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"{column.name!r} has {expected} values in earlier rows, but {int(lengths[row])} in this one: "
            f"{show_row(batch, row)}. Every row needs the same number: pad or cut the column before fit."
        )
    return expected


def _check_values(values: Array, column: Column, batch: pa.RecordBatch | None) -> None:
    if values.dtype.kind == "f" and column.validity != "any":
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            bad = int((~finite.reshape(len(values), -1)).any(1).sum())
            raise DataError(
                f"{column.name!r} is NaN or infinite in {bad} of {len(values)} rows; the first: "
                f"{show_row(batch, row)}. Drop or impute such rows before fit (pyspark.ml.feature.Imputer)."
            )
    if column.validity not in ("weight", "class") or values.size == 0:
        return
    if column.validity == "weight":
        bad_rows = np.flatnonzero(values < 0)
        if len(bad_rows):
            raise DataError(
                f"{column.name!r} is negative in a row: {show_row(batch, int(bad_rows[0]))}. Weights are >= 0."
            )
        return
    bad_rows = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values >= _MOST_CLASSES))
    if len(bad_rows):
        row = int(bad_rows[0])
        raise DataError(
            f"{column.name!r} must hold class numbers 0, 1, ..., but is {values[row]:g} in a row: "
            f"{show_row(batch, row)}. Index classes with pyspark.ml.feature.StringIndexer, or train a regressor."
        )


def as_named(batch: pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """A batch with its columns under the names that the user knows, for messages."""
    flag = () if columns.validation is None else (columns.validation,)
    found = {column.field: column.name for column in (*columns, *flag)}
    kept = [name for name in batch.schema.names if name != SHARD]
    return batch.select(kept).rename_columns([found.get(name, name) for name in kept])


def show_row(batch: pa.RecordBatch | None, row: int) -> str:
    """A row of a batch as text, for messages."""
    if batch is None:
        return f"row {row}"
    text = json.dumps(batch.slice(row, 1).to_pylist()[0], default=str)
    return text if len(text) <= 300 else text[:300] + "..."


def row_bytes(columns: Columns, widths: Mapping[str, int]) -> int:
    """Bytes that one row takes in memory."""
    return sum(np.dtype(column.dtype).itemsize * widths.get(column.field, 1) for column in columns)
