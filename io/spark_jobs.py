"""Spark jobs that do numbered work on the executors.

This hides how work gets into a Spark task and its results out of it: as rows of text, errors among them.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparkdl.errors import ConfigError, DataError, SparkdlError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Work", "run_job"]

Work = Callable[[Iterator[int]], Iterator[dict[str, Any]]]
_JOB_SCHEMA = "found string"


def run_job(spark: "SparkSession", count: int, work: Work) -> list[dict[str, Any]]:
    """Do work for the numbers from 0 to ``count`` on the executors; its results in that order.

    Args:
        spark: Runs the job.
        count: How many pieces of work there are; Spark deals them to tasks.
        work: Makes of some numbers one result each, in their order; results are JSON values.

    Raises:
        SparkdlError: What the work raised, for the smallest number where it did.
    """
    job = spark.range(count).mapInArrow(functools.partial(_run_task, work), _JOB_SCHEMA)
    found = sorted((json.loads(text) for text in job.toArrow().column("found").to_pylist()), key=lambda one: one[0])
    for _, kind, result in found:
        if kind != "":
            raise (ConfigError if kind == ConfigError.__name__ else DataError)(result)
    return [result for _, _, result in found]


def _run_task(work: Work, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    numbers = [number for batch in batches for number in batch.column(0).to_pylist()]
    done = 0
    try:
        for result in work(iter(numbers)):
            yield pa.RecordBatch.from_pydict({"found": [json.dumps([numbers[done], "", result])]})
            done += 1
    except SparkdlError as error:
        # Raised here, Spark would run the task again, and wrap the message into its own and a traceback.
        yield pa.RecordBatch.from_pydict({"found": [json.dumps([numbers[done], type(error).__name__, str(error)])]})
