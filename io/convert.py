"""From Arrow arrays to what a module can be fed with: the values, checked, in the dtype of their column.

The table of types is in `sparkdl.io.schema`. Nothing here knows Spark; an array may come from Spark's Arrow batches or
from any Parquet file.
"""

import bisect
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.checks import Array, Rows, Source, check_values, common_width, replacement_of_nulls

__all__ = ["SparseRows", "Value", "convert", "keep_mask", "null_rows", "raw_array", "to_array", "whole"]


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of vectors most of whose values are 0, as they are stored: they are spread out where they are to lie.

    Attributes:
        shape: Of all rows, (rows, ...).
        places: Place of each stored value among all, shape (stored,), int64.
        values: The stored values, shape (stored,), in the column's dtype.
    """

    shape: torch.Size
    places: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def write(self, out: torch.Tensor) -> None:
        """Spread the rows out over ``out``, a contiguous tensor of their shape and dtype."""
        out.zero_().view(-1).index_copy_(0, self.places.to(out.device), self.values.to(out.device))

    def dense(self) -> torch.Tensor:
        """The rows as a tensor."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.write(out)
        return out


Value: TypeAlias = torch.Tensor | SparseRows | tuple[torch.Tensor, ...] | pa.Array
"""A tensor of shape (rows, ...); sparse vectors; an assembled column's parts, each of shape (rows,); a raw column's
Arrow array."""

_VECTOR_FIELDS = ("type", "size", "indices", "values")


# Sums of what is to be checked may overflow, as may doubles that no float32 can hold: both are looked at afterwards.
_overflow_is_seen = np.errstate(over="ignore", invalid="ignore")


@_overflow_is_seen
def convert(
    table: pa.Table, columns: Columns, widths: Mapping[str, int] | None = None, *, finished: bool = True
) -> dict[str, Value]:
    """The columns of Parquet that is read in place, as tensors: views of Arrow's memory where the type allows.

    Args:
        table: Columns under the user's names, with Arrow's own types; of assembled columns, their parts.
        columns: What they are.
        widths: Values per row of each column by staged name, where known.
        finished: False leaves to the caller what costs less where the rows are put together: to spread out sparse
            vectors, and to look for NaN and infinity among the parts of assembled columns.

    Returns:
        By staged name: a tensor in the column's dtype; for an assembled column the parts, floating ones in their own
        dtype, to be stacked; for a raw column the Arrow array; for sparse vectors `SparseRows` unless ``finished``.

    Raises:
        DataError: A null, a NaN or infinity, a ragged row, a bad label, an unknown word, or a type that the column
            had not in other files; names the column and shows the row.
    """
    values: dict[str, Value] = {}
    for column in columns:
        if column.kind == "raw":
            values[column.field] = raw_array(whole(table.column(column.name)), column, table)
        elif column.kind == "assembled" and not column.shape:
            parts = [(name, whole(table.column(name))) for name in column.parts]
            read_as = column if finished else replace(column, validity="any")
            values[column.field] = tuple(_tensor(_part(array, name, read_as, table)) for name, array in parts)
        else:
            if column.kind == "assembled":
                array = pa.StructArray.from_arrays([whole(table.column(name)) for name in column.parts], column.parts)
            else:
                array = whole(table.column(column.name))
            width = (widths or {}).get(column.field)
            sparse = None if finished or column.kind != "vector" else _sparse_rows(array, column, table, width)
            if sparse is not None:
                values[column.field] = sparse
                continue
            tensor = _tensor(to_array(array, column, table, width))
            values[column.field] = tensor if column.flat or tensor.ndim > 1 else tensor[:, None]
    return values


@_overflow_is_seen
def to_array(array: pa.Array, column: Column, batch: Rows | None = None, width: int | None = None) -> Array:
    """One Arrow column as a NumPy array.

    Args:
        array: The column, as Spark or Parquet deliver it; of an assembled column, a struct of its parts.
        column: What it is; not a raw one.
        batch: The batch that it comes from, under the user's names, to show the offending row.
        width: Values that each row must have; None takes the first row's.

    Returns:
        Shape (rows,) for numbers and words, (rows, values) for vectors and arrays, (rows, ...) with a declared shape;
        maybe a read-only view of Arrow's memory.

    Raises:
        DataError: As `convert`.
    """
    source = Source(column, batch, column.name)
    dtype = np.dtype(column.dtype)
    if column.kind == "text":
        return _numbers_of_words(array, source)
    if column.kind == "assembled":
        values = np.empty((len(array), len(column.parts)), dtype)
        for place, part in enumerate(array.flatten()):
            values[:, place] = _part(part, array.type.field(place).name, column, batch)
        return values.reshape(-1, *(column.shape or (len(column.parts),)))
    values = _numbers(array, source) if column.kind == "scalar" else _matrix(array, source, width, column.shape)
    if values.dtype.kind == "f" and dtype.kind == "f":
        values = values.astype(dtype, copy=False)  # what no float32 can hold becomes infinite, and is refused as such
    check_values(values, source)
    values = np.ascontiguousarray(values, dtype)
    return values.reshape(-1, *column.shape) if column.shape else values


def raw_array(array: pa.Array, column: Column, batch: Rows | None) -> pa.Array:
    """A raw column as it is.

    Raises:
        DataError: It has nulls.
    """
    if array.null_count:
        replacement_of_nulls(array, Source(column, batch, column.name))
    return array


def keep_mask(table: pa.Table, columns: Columns) -> Array | None:
    """Which rows of Parquet that is read in place stay: shape (rows,), boolean; None where all do.

    Rows go that have a null, be it inside an array, in a column whose nulls are to be dropped.

    Args:
        table: As for `convert`.
        columns: What to look at.
    """
    gone = [
        null_rows(whole(table.column(name)), column)
        for column in columns
        if column.nulls == "drop"
        for name in column.parts or (column.name,)
    ]
    found = [mask for mask in gone if mask is not None]
    return ~np.logical_or.reduce(found) if found else None


def null_rows(array: pa.Array, column: Column) -> Array | None:
    """Which rows have a null, or one inside: shape (rows,), boolean; None where none has."""
    array = _plain_layout(array)
    inner: list[tuple[Array, Array]] = []
    if column.kind == "array" and _is_list(array.type):
        below = null_rows(array.flatten(), column)
        if below is not None:
            inner.append((np.repeat(np.arange(len(array)), _lengths(array)), below))
    elif column.kind == "assembled" and pa.types.is_struct(array.type):
        masks = [null_rows(part, column) for part in array.flatten()]
        inner += [(np.arange(len(array)), mask) for mask in masks if mask is not None]
    if not array.null_count and not inner:
        return None
    mask: Array = array.is_null().to_numpy(zero_copy_only=False).copy()
    for rows, below in inner:
        mask[rows[below]] = True
    return mask


def whole(chunks: pa.ChunkedArray) -> pa.Array:
    """A column of a table as one array; without a copy where it is one chunk."""
    if chunks.num_chunks == 1:
        return chunks.chunk(0)
    return chunks.combine_chunks() if chunks.num_chunks else pa.array([], chunks.type)


def _tensor(values: Array) -> torch.Tensor:
    if values.flags.writeable:
        return torch.from_numpy(values)
    # NumPy's views of Arrow's memory are read-only, which torch warns of; by way of Arrow it takes them.
    tensor = torch.utils.dlpack.from_dlpack(pa.array(values.reshape(-1)))
    return tensor if values.ndim == 1 else tensor.reshape(values.shape)


def _part(array: pa.Array, name: str, column: Column, batch: Rows | None) -> Array:
    """One part of an assembled column, shape (rows,): floats as they are, all else in the column's dtype."""
    source = Source(column, batch, name)
    values = _numbers(array, source)
    check_values(values, source)
    return values if values.dtype.kind == "f" else values.astype(column.dtype, copy=False)


def _numbers(array: pa.Array, source: Source) -> Array:
    """An array of numbers, shape (rows,), in the dtype that comes nearest to Arrow's type; nulls refused or filled."""
    array = _primitive(array, source)
    if not array.null_count:
        values: Array = array.to_numpy(zero_copy_only=False)
        return values
    # In a dtype that holds both: a byte has no value above 127.
    dtype = _dtype_to_fill(np.dtype(array.type.to_pandas_dtype()), source.column)
    fill = np.asarray(replacement_of_nulls(array, source)).astype(dtype)
    kind = pa.from_numpy_dtype(dtype)
    values = array.cast(kind, safe=False).fill_null(pa.scalar(fill[()], kind)).to_numpy()
    return values


def _dtype_to_fill(dtype: np.dtype[Any], column: Column) -> np.dtype[Any]:
    """Holds the values and what fills them up; floats stay floats until they were checked, for a class may be 0.5."""
    return np.result_type(dtype, column.dtype) if dtype.kind == "f" else np.dtype(column.dtype)


def _primitive(array: pa.Array, source: Source) -> pa.Array:
    """Numbers and times as integers or floats that NumPy has, without loss."""
    array = _plain_layout(array)
    kind = array.type
    integral = source.column.dtype == "int64" and source.column.validity != "class"
    if pa.types.is_integer(kind):
        return _exact(array, pa.int64(), source) if pa.types.is_uint64(kind) and integral else array
    if pa.types.is_date(kind) and integral:
        return array.cast(pa.date32()).cast(pa.int32())
    if pa.types.is_timestamp(kind) and integral:
        return _exact(array, pa.timestamp("us", kind.tz), source).cast(pa.int64())
    if not integral:
        if pa.types.is_float32(kind) or pa.types.is_float64(kind):
            return array
        if pa.types.is_float16(kind):
            return array.cast(pa.float32())
        if pa.types.is_decimal(kind):
            return array.cast(pa.float64())
        if pa.types.is_boolean(kind):
            return array.cast(pa.uint8())
    raise source.wrong_type(kind, "integers" if integral else "numbers")


def _exact(array: pa.Array, wanted: pa.DataType, source: Source) -> pa.Array:
    def fits(rows: int) -> bool:
        try:
            array.slice(0, rows).cast(wanted)
        except pa.ArrowInvalid:
            return False
        return True

    if fits(len(array)):
        return array.cast(wanted)
    place = bisect.bisect_left(range(1, len(array)), True, key=lambda rows: not fits(rows))
    raise DataError(
        f"{source.name!r} is of Arrow type {array.type} and has a value that {wanted} cannot hold: "
        f"{source.row(place)}. Cast the column before fit: integers go up to 2**63 - 1, times are in microseconds."
    )


def _matrix(array: pa.Array, source: Source, width: int | None, shape: tuple[int, ...]) -> Array:
    """Vectors or arrays as a matrix (rows, values); nested arrays with the axes of ``shape`` in one."""
    array = _plain_layout(array)
    column = source.column
    if shape:
        width = math.prod(shape)
    elif column.padding is not None:
        width = column.padding.length
    if array.null_count:
        fill = replacement_of_nulls(array, source)
        valid: Array = array.is_valid().to_numpy(zero_copy_only=False)
        if width is None and not valid.any():
            raise DataError(
                f"{source.name!r} is null in all of {len(array)} rows, so that nobody knows how many values to fill "
                f"with {fill}. Declare shapes={{{column.name!r}: ...}}."
            )
        kept = _matrix(array.drop_null(), source.among(valid), width, shape)
        values = np.full((len(array), kept.shape[1]), fill, _dtype_to_fill(kept.dtype, column))
        values[valid] = kept
        return values
    if column.kind == "vector":
        return _dense(array, source, width)
    if not _is_list(array.type):
        raise source.wrong_type(array.type, "arrays")
    lengths = _lengths(array)
    if _is_list(array.type.value_type):
        common_width(lengths, source, shape[0], declared=True)
        inner = _matrix(array.flatten(), source.inside(lengths), None, shape[1:])
        return inner.reshape(len(array), -1) if len(inner) else inner.reshape(0, width or 0)
    if column.padding is not None:
        return _padded(_numbers(array.flatten(), source.inside(lengths)), lengths, source)
    width = common_width(lengths, source, width, declared=bool(shape))
    return _numbers(array.flatten(), source.inside(lengths)).reshape(len(array), width)


def _padded(values: Array, lengths: Array, source: Source) -> Array:
    """Rows of the given lengths, one after another in ``values``, as a matrix of the padding's length."""
    padding, rows = source.column.padding, len(lengths)
    assert padding is not None
    if (lengths == padding.length).all():
        return values.reshape(rows, padding.length)
    if not padding.truncate and (lengths > padding.length).any():
        row = int(np.argmax(lengths > padding.length))
        raise DataError(
            f"{source.name!r} has {lengths[row]} values in a row, more than the {padding.length} of its padding: "
            f"{source.row(row)}. Pad to more values, or set truncate=True to cut longer rows."
        )
    taken = np.minimum(lengths, padding.length)
    position = np.arange(taken.sum()) - np.repeat(taken.cumsum() - taken, taken)
    out = np.full((rows, padding.length), padding.value, _dtype_to_fill(values.dtype, source.column))
    out[np.repeat(np.arange(rows), taken), position] = values[np.repeat(lengths.cumsum() - lengths, taken) + position]
    return out


def _dense(array: pa.Array, source: Source, width: int | None) -> Array:
    """Spark ML vectors as a dense matrix."""
    stored, places, width = _stored(array, source, width)
    if places is None:
        dense: Array = stored.reshape(len(array), width)
        return dense
    out = np.zeros((len(array), width), source.column.dtype)
    out.reshape(-1)[places] = stored
    return out


def _sparse_rows(array: pa.Array, column: Column, batch: Rows, width: int | None) -> SparseRows | None:
    """Vectors as they are stored; None where `to_array` has something to look at, or most values are stored anyway."""
    array = _plain_layout(array)
    if array.null_count or column.validity not in ("any", "finite"):
        return None
    stored, places, width = _stored(
        array, Source(column, batch, column.name), math.prod(column.shape) if column.shape else width
    )
    if places is None or 2 * len(stored) > len(array) * width:
        return None
    stored = np.ascontiguousarray(stored, column.dtype)
    if column.validity == "finite" and not np.isfinite(stored.sum()):
        return None
    shape = torch.Size((len(array), *(column.shape or (width,))))
    return SparseRows(shape, torch.from_numpy(places), _tensor(stored))


def _stored(array: pa.Array, source: Source, width: int | None) -> tuple[Array, Array | None, int]:
    """Spark ML vectors, a struct of type (0 sparse, 1 dense), size, indices and values: what they store.

    Returns:
        The stored values; their places among all values of all rows, None where all are stored; values per row.
    """
    if not pa.types.is_struct(array.type) or any(array.type.get_field_index(name) < 0 for name in _VECTOR_FIELDS):
        raise source.wrong_type(array.type, "ML vectors")
    rows, declared = len(array), bool(source.column.shape)
    sparse = array.field("type").to_numpy(zero_copy_only=False) == 0
    values = array.field("values")
    lengths = _lengths(values)
    sizes = lengths
    if sparse.any():
        sizes = np.where(sparse, array.field("size").fill_null(0).to_numpy(zero_copy_only=False), lengths)
    width = common_width(sizes, source, width, declared=declared)
    stored = values.flatten().to_numpy(zero_copy_only=False)
    if not sparse.any():
        return stored, None, width
    if sparse.all():
        position = array.field("indices").flatten().to_numpy(zero_copy_only=False)
    else:
        # The position within its row is right for dense rows.
        position = np.arange(len(stored)) - np.repeat(lengths.cumsum() - lengths, lengths)
        position[np.repeat(sparse, lengths)] = array.field("indices").flatten().to_numpy(zero_copy_only=False)
    if len(position) and not 0 <= position.min() <= position.max() < width:
        place = int(np.argmax((position < 0) | (position >= width)))
        row = int(np.searchsorted(lengths.cumsum(), place, "right"))
        raise DataError(
            f"{source.name!r} has a sparse vector with an index that is not below its size: {source.row(row)}. Write "
            "the column anew."
        )
    return stored, np.repeat(np.arange(rows) * width, lengths) + position, width


def _numbers_of_words(array: pa.Array, source: Source) -> Array:
    """The places of words in their column's vocabulary, shape (rows,), int64."""
    vocabulary = source.column.vocabulary
    assert vocabulary is not None, "a vocabulary is learnt before rows become tensors"
    array = _plain_layout(array, dictionary=True)
    if not pa.types.is_dictionary(array.type):
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            raise source.wrong_type(array.type, "strings")
        array = array.dictionary_encode()
    words = array.dictionary.to_pylist()
    places = _places(_Vocabulary(vocabulary))
    of_word = np.array([places.get(word, -1) for word in words] or [0], np.int64)
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    index = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    values: Array = of_word.take(index)
    if null is not None:
        values[null] = 0  # known for the moment: the word at index 0 need not be
    if of_word.min() < 0 and len(values) and values.min() < 0:
        row = int(np.argmax(values < 0))
        raise DataError(
            f"{source.name!r} holds the word {words[index[row]][:100]!r}, which is not among the {len(vocabulary)} of "
            f"its vocabulary: {source.row(row)}. Add it to the vocabulary, or replace it before fit."
        )
    if null is not None:
        values[null] = replacement_of_nulls(array, source)
    return values


class _Vocabulary:
    """A key for caches: Python hashes a tuple anew each time, which takes long where it has a million words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    def __hash__(self) -> int:
        return hash((len(self.words), self.words[:4]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Vocabulary) and (self.words is other.words or self.words == other.words)


@functools.lru_cache(maxsize=64)
def _places(vocabulary: _Vocabulary) -> dict[str, int]:
    return {word: place for place, word in enumerate(vocabulary.words)}


def _plain_layout(array: pa.Array, *, dictionary: bool = False) -> pa.Array:
    """An array without extension types and dictionaries; with ``dictionary``, one that has no null stays."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type) and not (dictionary and not array.dictionary.null_count):
        array = array.dictionary_decode()
    return array


def _is_list(kind: pa.DataType) -> bool:
    found: bool = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return found


def _lengths(array: pa.Array) -> Array:
    lengths: Array = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lengths
