"""Values that cannot be trained on, and the sentences that refuse them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sparkdl.config import Column
from sparkdl.errors import DataError

__all__ = ["Array", "Rows", "Source", "check_values", "common_width", "replacement_of_nulls", "show_row"]

Array = npt.NDArray[Any]
Rows: TypeAlias = pa.RecordBatch | pa.Table

_MOST_CLASSES = 1 << 31


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from, for messages.

    Attributes:
        column: Their column.
        batch: The batch, under the user's names.
        name: The column that a message names: a part, where the column is assembled.
        locate: From a value's place to its row in the batch.
        inner: True inside the rows of an array.
    """

    column: Column
    batch: Rows | None
    name: str
    locate: Callable[[int], int] = int
    inner: bool = False

    def row(self, place: int) -> str:
        """The row of a value, as text."""
        return show_row(self.batch, self.locate(place))

    def inside(self, lengths: Array) -> "Source":
        """The source of the elements of arrays of the given lengths."""
        return replace(
            self, inner=True, locate=lambda place: self.locate(int(np.searchsorted(lengths.cumsum(), place, "right")))
        )

    def among(self, valid: Array) -> "Source":
        """The source of the rows that a mask leaves."""
        return replace(self, locate=lambda place: self.locate(int(np.flatnonzero(valid)[place])))

    def wrong_type(self, found: pa.DataType, wanted: str) -> DataError:
        """The error for rows whose type is not the one that the column was resolved with."""
        return DataError(
            f"{self.name!r} is of Arrow type {found} in these rows, but {wanted} were expected of it. All files of a "
            "data set must have one schema: cast the column where it is written."
        )


def show_row(batch: Rows | None, row: int) -> str:
    """A row of a batch as text, for messages."""
    if batch is None:
        return f"row {row}"
    try:
        text = json.dumps(batch.slice(row, 1).to_pylist()[0], default=str)
    except (OverflowError, ValueError):  # a time that Python's datetime cannot hold
        return f"row {row}"
    return text if len(text) <= 300 else text[:300] + "..."


def replacement_of_nulls(array: pa.Array, source: Source) -> float:
    """The number that replaces the nulls of an array.

    Raises:
        DataError: The column says of none.
    """
    if not isinstance(source.column.nulls, str):
        return source.column.nulls
    row = source.row(pc.index(array.is_null(), True).as_py())
    if source.inner:
        raise DataError(
            f"{source.name!r} has a null inside an array; the first row: {row}. Fill or drop nulls inside arrays "
            f"before fit, or set nulls={{{source.column.name!r}: 'drop'}} or a number to replace them."
        )
    raise DataError(
        f"{source.name!r} is null in {array.null_count} of {len(array)} rows; the first: {row}. Drop such rows "
        f"(df.dropna(subset=[{source.name!r}])) or fill them before fit, or set "
        f"nulls={{{source.column.name!r}: 'drop'}} or a number to replace them."
    )


def common_width(lengths: Array, source: Source, width: int | None, *, declared: bool = False) -> int:
    """How many values each of some vectors or arrays has.

    Args:
        lengths: Values of each row.
        source: Where they come from.
        width: What they should be; None takes the first row's.
        declared: True where the user declared it, by a shape.

    Raises:
        DataError: They differ; shows the first row that does.
    """
    expected = int(lengths[0]) if width is None and len(lengths) else width or 0
    odd = np.flatnonzero(lengths != expected)
    if len(odd):
        row, column = int(odd[0]), source.column
        found = f"{int(lengths[row])} in this one: {source.row(row)}"
        if declared:
            raise DataError(
                f"{column.name!r} is declared with shape {column.shape}, so that {expected} values are expected "
                f"{'at one of its levels' if source.inner or len(column.shape) > 1 else 'in a row'}, but there are "
                f"{found}. Declare the shape that the rows have, or pad or cut the column before fit."
            )
        padding = f", or set padding for {column.name!r}" if column.kind == "array" else ""
        raise DataError(
            f"{column.name!r} has {expected} values in earlier rows, but {found}. Every row needs the same number: pad "
            f"or cut the column before fit{padding}."
        )
    return expected


def check_values(values: Array, source: Source) -> None:
    """Check values, shape (rows, ...), against the validity of their column, before they are cast to its dtype.

    Raises:
        DataError: NaN or infinity, a negative weight, or a label that is no class number.
    """
    column = source.column
    if values.size == 0:
        return
    if values.dtype.kind == "f" and column.validity != "any" and not _certainly_finite(values, column.dtype):
        finite = np.isfinite(values.astype(column.dtype) if np.dtype(column.dtype).kind == "f" else values)
        bad = ~finite.reshape(len(values), -1).all(1)
        if bad.any():
            raise DataError(
                f"{source.name!r} is NaN or infinite in {int(bad.sum())} of {len(values)} rows; the first: "
                f"{source.row(int(np.argmax(bad)))}. Drop or impute such rows before fit (pyspark.ml.feature.Imputer)."
            )
    if column.validity == "weight" and values.min() < 0:
        row = int(np.argmax(values < 0))
        raise DataError(f"{column.name!r} is negative in a row: {source.row(row)}. Weights are >= 0.")
    if column.validity == "class":
        odd = (values < 0) | (values >= _MOST_CLASSES)
        if values.dtype.kind == "f":
            odd |= values != np.floor(values)
        if odd.any():
            row = int(np.argmax(odd))
            raise DataError(
                f"{column.name!r} must hold class numbers 0, 1, ..., but is {values[row]:g} in a row: "
                f"{source.row(row)}. Index classes with pyspark.ml.feature.StringIndexer, or train a regressor."
            )


def _certainly_finite(values: Array, dtype: str) -> bool:
    """True only where all values are finite, also in the dtype; cheaper than to look at each of them."""
    if values.dtype == dtype or np.dtype(dtype).kind != "f":
        return bool(np.isfinite(values.sum()))  # NaN and infinity never leave a sum
    largest = np.finfo(dtype).max
    return bool(-largest <= values.min() and values.max() <= largest)
