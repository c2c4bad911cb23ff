"""From the Arrow table of a row group to the values of its rows, in the reader threads."""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparkdl.config import Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.convert import SparseRows
from sparkdl.io.plan import Piece
from sparkdl.io.schema import convert, decode

__all__ = [
    "Decoder",
    "Layout",
    "Transform",
    "Values",
    "apply_transform",
    "draws_random_numbers",
    "layout_of",
    "stacked",
]

Values = Mapping[str, Tensor | SparseRows | tuple[Tensor, ...]]
"""By staged field name: a tensor of shape (rows, ...), sparse rows of that shape, or the columns that make up one, each
of shape (rows,)."""

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""By staged field name: name of the dtype, and shape of one row."""

Transform = Callable[..., Mapping[str, Any]]
"""The user's function on a dict of columns, and a `torch.Generator` where it takes two arguments."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a rank reads of a row group, and what becomes of it.

    Attributes:
        columns: The columns, by role.
        transform: The user's function on the columns of some rows; see `apply_transform`.
        native: True for Parquet read in place, whose columns have the user's names and Arrow's own types; False for
            what was staged.
        seed: Seed of the run, for transforms that draw random numbers.
    """

    columns: Columns
    transform: Transform | None = None
    native: bool = False
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """True where the rows differ from epoch to epoch."""
        return self.transform is not None and draws_random_numbers(self.transform)

    def __call__(self, table: pa.Table, piece: Piece | None = None, epoch: int = 0) -> Values:
        """Decode the rows of a piece.

        Args:
            table: The rows, with the columns that were read.
            piece: Where they come from; decides on random numbers.
            epoch: The epoch; likewise.

        Raises:
            DataError: Rows that cannot be trained on, or a transform that failed on them.
        """
        if not self.native:
            values: dict[str, Any] = decode(table, self.columns)
        else:
            values = convert(table, self.columns, finished=self.transform is not None)
        if self.transform is None:
            return values
        generator = _generator(self.seed, epoch, piece) if self.is_random else None
        names = {column.field: column.name for column in self.columns}
        given = {names[field]: value for field, value in stacked(values, self.columns).items()}
        made = apply_transform(self.transform, given, table.num_rows, generator)
        return {field: made[name] for field, name in names.items()}

    def check(self, table: pa.Table, written: Mapping[str, Tensor]) -> None:
        """Look for NaN and infinity in what was put together of parts, at the cost of a sum where there are none.

        Args:
            table: The rows as they were read.
            written: The same rows in memory, by field.

        Raises:
            DataError: As `sparkdl.io.convert.convert`.
        """
        if not self.native or self.transform is not None:
            return
        for column in self.columns:
            rows = written[column.field]
            if column.kind == "assembled" and rows.is_floating_point() and not math.isfinite(float(rows.sum())):
                convert(table, Columns((column,), ()))


def apply_transform(
    transform: Transform, columns: Mapping[str, Any], rows: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Call the user's function on some rows.

    Args:
        transform: Gets a dict from column name to tensor, shape (rows, ...), or to Arrow array where the column holds
            text or bytes; returns such a dict, with a tensor of as many rows for each of the columns. What it leaves
            out stays as it was.
        columns: What to give it.
        rows: How many rows these are.
        generator: Given as second argument to a function that takes two.

    Raises:
        DataError: The function raised.
        ConfigError: It returned something else than it should.
    """
    try:
        result = transform(dict(columns)) if generator is None else transform(dict(columns), generator)
    except Exception as error:
        raise DataError(
            f"The transform failed on {rows} rows of {', '.join(columns)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Mapping):
        raise ConfigError(
            f"The transform returned a {type(result).__name__}. Return a dict from column name to tensor."
        )
    found = {name: result.get(name, value) for name, value in columns.items()}
    for name, value in found.items():
        if isinstance(value, np.ndarray):
            value = found[name] = torch.from_numpy(value)
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"The transform left {name!r} as a {type(value).__name__}, but a module needs a tensor. Return "
                f"{{{name!r}: tensor of {rows} rows}}."
            )
        if value.ndim == 0 or len(value) != rows:
            raise ConfigError(
                f"The transform was given {rows} rows and returned {name!r} of shape {tuple(value.shape)}. It must "
                "return as many rows as it got: drop rows before fit, with filters or in Spark."
            )
    return found


def draws_random_numbers(transform: Transform) -> bool:
    """True where a transform takes a generator as second argument, so that its result differs from epoch to epoch."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 and positional[1].default is inspect.Parameter.empty


def stacked(values: Values, columns: Columns) -> dict[str, Tensor]:
    """The values with the parts of assembled columns put together, each of shape (rows, parts), and all rows dense."""
    dtypes = {column.field: column.dtype for column in columns}

    def whole(name: str, value: Tensor | SparseRows | tuple[Tensor, ...]) -> Tensor:
        if isinstance(value, SparseRows):
            return value.dense()
        return torch.stack(value, 1).to(getattr(torch, dtypes[name])) if isinstance(value, tuple) else value

    return {name: whole(name, value) for name, value in values.items()}


def layout_of(values: Values, columns: Columns) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of some decoded rows."""
    found = {}
    for column in columns:
        value = values[column.field]
        parts: Sequence[Tensor | SparseRows] = value if isinstance(value, tuple) else (value,)
        shape = (len(parts),) if isinstance(value, tuple) else tuple(value.shape[1:])
        dtype = column.dtype if isinstance(value, tuple) else str(parts[0].dtype).removeprefix("torch.")
        found[column.field] = (dtype, shape)
    return found


def _generator(seed: int, epoch: int, piece: Piece | None) -> torch.Generator:
    """Random numbers for the rows of one piece in one epoch, whichever rank and thread decodes them."""
    where = (piece.row_group.path.rpartition("/")[2], piece.row_group.index, piece.start) if piece else ()
    digest = hashlib.blake2b(repr((seed, epoch, where)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
