"""Parquet files that grow side by side by row groups of bounded size, and a sentence for when their disk is full."""

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from sparkdl.errors import DataError
from sparkdl.io.encryption import encryption_of
from sparkdl.io.plan import RowGroup

__all__ = ["ROW_GROUP_BYTES", "RowGroupFiles"]

ROW_GROUP_BYTES = 8 << 20


class RowGroupFiles:
    """Parquet files that are written at the same time, each with a name; a context manager that closes them.

    A file is created for the first row of its name. Its row groups have `ROW_GROUP_BYTES` to twice that, unless one row
    alone is larger, and the last what is left.

    Args:
        create: Opens the file of a name; returns where to write and the path under which it will be read.
        action: What is done, for messages: "Spooling rows".
        place: Where the files lie, for messages.
        remedy: What to do where they find no room there.

    Raises:
        DataError: From every method: the disk is full, or fails otherwise.
    """

    def __init__(
        self, create: Callable[[str], tuple[pa.NativeFile, str]], *, action: str, place: str, remedy: str
    ) -> None:
        self._create = create
        self._action, self._place, self._remedy = action, place, remedy
        self._files: dict[str, _File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()

    def write(self, name: str, table: pa.Table) -> None:
        """Append rows to the file of a name."""
        if not table.num_rows:
            return
        with self._explained():
            if name not in self._files:
                self._files[name] = _File(*self._create(name))
            self._files[name].write(table)

    def close(self) -> dict[str, tuple[RowGroup, ...]]:
        """Finish the files; returns the row groups of each name that got rows."""
        with self._explained():
            return {name: file.close() for name, file in self._files.items()}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            written = sum(file.written for file in self._files.values())
            raise DataError(
                f"{self._action} to {self._place} failed after {written / 1e6:.1f} MB: {error}. {self._remedy}"
            ) from error


class _File:
    """One Parquet file."""

    def __init__(self, sink: pa.NativeFile, path: str) -> None:
        self.written = 0
        self._path = path
        self._sink = sink
        self._writer: pq.ParquetWriter | None = None
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._rows: list[int] = []

    def write(self, table: pa.Table) -> None:
        for part in _parts(table):
            self._tables.append(part)
            self._bytes += part.nbytes
            if self._bytes >= ROW_GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self._tables)
        if self._writer is None:
            # Numbers that are read many times from a local disk: neither compression nor dictionaries pay.
            self._writer = pq.ParquetWriter(
                self._sink,
                table.schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                encryption_properties=encryption_of(self._path),
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._rows.append(table.num_rows)
        self.written += self._bytes
        self._tables, self._bytes = [], 0

    def close(self) -> tuple[RowGroup, ...]:
        if self._tables:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._sink.close()
        return tuple(RowGroup(self._path, index, rows) for index, rows in enumerate(self._rows))

    def abandon(self) -> None:
        """Close a file that has no use any more, unless it is closed; its disk may be full."""
        if self._sink.closed:
            return
        if self._writer is not None:
            self._writer.is_open = False  # else its finaliser would try to write the footer
        with contextlib.suppress(OSError):
            self._sink.close()


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """A table in halves of halves, down to the size of a row group."""
    if table.nbytes <= ROW_GROUP_BYTES or table.num_rows <= 1:
        yield table
        return
    half = table.num_rows // 2
    yield from _parts(table.slice(0, half))
    yield from _parts(table.slice(half))
