"""Fixtures that every test can use: one Spark session, and a check that tests leave the process as they found it."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from pyspark.sql import SparkSession

# Executors run the Python of the tests; without this, whatever `python3` is first on the PATH.
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
# JVMs of tests live for a minute or two: the second compiler and the parallel collector take more time there than they
# give. In the environment, so that Connect servers and the executors of a local-cluster get it as well.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """One classic session with four slots. Its Python workers have torch when they start, and live on."""
    session = (
        SparkSession.builder.master("local[4]")
        .appName("sparkdl-tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.python.daemon.module", "sparkdl.daemon")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """No test may leave a process group, threads of ours or environment variables behind."""
    environment = dict(os.environ)
    yield
    assert not dist.is_initialized(), "a test left its process group open"
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("sparkdl")]
    assert not ours, f"a test left threads running: {ours}"
    changed = {name for name in {**environment, **os.environ} if environment.get(name) != os.environ.get(name)}
    # pytest, torch, OpenCV (which Petastorm's image codec imports) and Spark keep their own there.
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "LD_LIBRARY_PATH"}
    changed -= {name for name in changed if name.startswith(("_PYSPARK", "PYSPARK", "SPARK_"))}
    assert not changed, f"a test left changed environment variables: {changed}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A fresh directory, as a string."""
    return str(tmp_path)
