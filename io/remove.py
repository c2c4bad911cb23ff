"""Removing staged rows. Light: the task that does it need not import what trains."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs

from sparkdl.storage import open_file_system

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["remove_staged"]


def remove_staged(df: "DataFrame", directory: str) -> None:
    """Remove a staged directory from an executor: over Spark Connect the driver may not see it."""
    job = df.sparkSession.range(0, 1, 1, 1).mapInArrow(functools.partial(_remove, directory), "removed boolean")
    job.toArrow()


def _remove(directory: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        file_system, path = open_file_system(directory)
        found = file_system.get_file_info(path).type != pyarrow.fs.FileType.NotFound
        if found and batch.num_rows:
            file_system.delete_dir(path)
        yield pa.RecordBatch.from_pydict({"removed": [found] * batch.num_rows})
