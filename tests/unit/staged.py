"""Staged Parquet files whose every value follows from the row's id, for tests of what reads them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparkdl.config import Column, Columns
from sparkdl.io.plan import Piece, RowGroup
from sparkdl.io.schema import encode
from sparkdl.storage import open_file_system

Ids = npt.NDArray[np.int64]

WIDTH = 3
COLUMNS = Columns(
    inputs=(Column("features", "input_0", "array", "float32"),),
    labels=(Column("id", "label_0", "scalar", "int64", flat=True),),
)
FIELDS = ["input_0", "label_0"]
WIDTHS = {"input_0": WIDTH, "label_0": 1}


def features_of(ids: Ids) -> npt.NDArray[np.float32]:
    """The features of rows, shape (rows, WIDTH)."""
    return np.stack([ids % 9973, -(ids % 7), 1 / (1 + ids % 5)], axis=1).astype(np.float32)


def spark_batch(ids: Iterable[int], **others: pa.Array) -> pa.RecordBatch:
    """Rows as Spark hands them to Python, with further columns where given."""
    numbers = np.array(list(ids), np.int64)
    values = pa.array(features_of(numbers).tolist(), pa.list_(pa.float32()))
    return pa.RecordBatch.from_pydict({"input_0": values, "label_0": pa.array(numbers), **others})


def write_staged(path: Path | str, groups: Iterable[Iterable[int]], columns: Columns = COLUMNS) -> list[RowGroup]:
    """A staged file with one row group for each group of ids."""
    tables = [encode(spark_batch(ids), columns, WIDTHS)[0] for ids in groups]
    with pq.ParquetWriter(path, tables[0].schema, compression="none", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
    return [RowGroup(str(path), index, table.num_rows) for index, table in enumerate(tables)]


def read_group(group: RowGroup) -> pa.Table:
    """A row group, read plainly."""
    file_system, path = open_file_system(group.path)
    with file_system.open_input_file(path) as source:
        return pq.ParquetFile(source).read_row_group(group.index)


def consecutive(sizes: Sequence[int], first: int = 0) -> list[range]:
    """Ids from ``first`` on, in groups of the given sizes."""
    ends = first + np.cumsum(sizes)
    return [range(int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True)]


def whole(groups: Iterable[RowGroup]) -> list[Piece]:
    """Every row group as one piece."""
    return [Piece(group, 0, group.rows) for group in groups]


def assert_rows(inputs: torch.Tensor, labels: torch.Tensor, ids: Sequence[int] | Ids) -> None:
    """The tensors hold the rows of these ids, in this order."""
    assert labels.tolist() == list(ids)
    expected = features_of(np.asarray(ids, np.int64).reshape(-1))
    assert inputs.shape == expected.shape
    np.testing.assert_array_equal(inputs.numpy(), expected)
