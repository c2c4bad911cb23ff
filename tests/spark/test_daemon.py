"""Python workers that have torch when they start."""

import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]


def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """What a task finds loaded, and how long it takes to load what training needs."""
    for _ in batches:
        pass
    loaded = "torch" in sys.modules
    began = time.perf_counter()
    import sparkdl.task  # noqa: F401

    yield pa.RecordBatch.from_pydict({"loaded": [loaded], "seconds": [time.perf_counter() - began]})


def test_workers_of_the_daemon_have_torch_when_they_start(spark: SparkSession) -> None:
    assert spark.conf.get("spark.python.daemon.module") == "sparkdl.daemon"
    rows = spark.range(2).repartition(2).mapInArrow(look, "loaded boolean, seconds double").collect()
    assert all(row["loaded"] for row in rows)
    assert max(row["seconds"] for row in rows) < 0.5
