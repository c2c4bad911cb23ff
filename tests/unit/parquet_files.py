"""Parquet files as users have them, for tests of what reads them in place."""

import contextlib
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkdl.config import Column, Columns
from sparkdl.io.dataset import DiscoveredDataset, ParquetDataset, discover_locally
from sparkdl.io.in_place import in_place, physical_columns, select_rows
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import plan_pieces
from sparkdl.io.stage import StagedDataset

ID = Column("id", "label_0", "scalar", "int64", flat=True)
COLUMNS = Columns((Column("x", "input_0", "scalar", "float32"),), (ID,))
SPARK_SCHEMA = "org.apache.spark.sql.parquet.row.metadata"


def write(path: Path, columns: Mapping[str, Any] | pa.Table, rows_per_group: int = 10, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=rows_per_group, **settings)
    return path


def numbers(first: int, last: int) -> dict[str, Any]:
    ids = np.arange(first, last)
    return {"id": ids, "x": ids.astype(np.float32) / 2}


def discovered(folder: Path, **options: Any) -> DiscoveredDataset:
    return discover_locally(ParquetDataset(str(folder), **options))


def read_rows(
    found: DiscoveredDataset,
    columns: Columns,
    staged: StagedDataset,
    split: str = "train",
    shards: int = 1,
) -> list[dict[str, Any]]:
    """The rows of a split as a rank's reader makes them, shard after shard."""
    context = pickle.loads(pickle.dumps(in_place(found, columns)))
    rows: list[dict[str, Any]] = []
    for pieces in plan_pieces(getattr(staged, split), shards):
        with PlannedReader(
            pieces,
            columns=physical_columns(context),
            select=lambda table, piece: select_rows(table, piece, context=context, split=split),  # type: ignore[arg-type]
            decode=lambda table, number: table,
            storage_options=context.storage_options,
        ) as reader:
            for table in reader:
                rows += table.to_pylist()
    return rows


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No file stays open and no thread is left behind."""
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    assert len(os.listdir("/proc/self/fd")) <= files
    assert set(threading.enumerate()) == threads
