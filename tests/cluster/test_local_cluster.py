"""Executors in JVMs of their own, as on a real cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyspark
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

SCRIPT = """
import json, os, sys
from pyspark.sql import SparkSession, functions as F
from torch import nn
import sparkdl
from sparkdl import SparkdlError, TorchRegressor

builder = SparkSession.builder.master("local-cluster[2,1,1024]").config("spark.ui.enabled", "false")
for name, value in json.loads(sys.argv[1]).items():
    builder = builder.config(name, value)
spark = builder.config("spark.driver.host", "127.0.0.1").config("spark.log.level", "OFF").getOrCreate()
x = F.sin(F.col("id") * 1.7)
df = spark.range(0, 64, 1, 3).select(F.array(x.cast("float")).alias("features"), (3 * x).alias("label"))

def executor_process():
    import psutil
    process = psutil.Process()
    while "java" not in process.name():
        process = process.parent()
    return process.pid

told = {}
try:
    model = TorchRegressor(
        module=nn.Linear(1, 1), optimizer="sgd", learningRate=0.1, batchSize=16, maxEpochs=4, numTrainWorkers=2,
        verbose=False,
    ).fit(df)
    told["loss"] = [record["loss"] for record in model.history]
    told["rows"] = model.summary.rankRows
    told["executors"] = sparkdl.launch(executor_process, num_train_workers=2)
    told["predictions"] = model.transform(df).select("prediction", "label").collect()
    told["driver"] = spark.sparkContext._gateway.proc.pid
except SparkdlError as error:
    told["error"] = [type(error).__name__, str(error)]
try:
    sparkdl.launch(print, num_train_workers=3)
except SparkdlError as error:
    told["slots"] = [type(error).__name__, str(error)]
print(json.dumps(told))
spark.stop()
"""


def run_on_cluster(folder: Path, **settings: str) -> dict[str, Any]:
    """Run the script on two executors of one slot each."""
    script = folder / "job.py"
    script.write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)],
        # local-cluster starts its executors from a Spark installation; the package of pyspark is one.
        env={**kept, "SPARK_HOME": str(Path(pyspark.__file__).parent), "PYSPARK_PYTHON": sys.executable},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_cluster(tmp_path_factory.mktemp("cluster"))


def test_two_executors_train_one_module(told: dict[str, Any]) -> None:
    assert "error" not in told, told["error"]
    assert len(set(told["executors"])) == 2, "both ranks ran in one executor"
    assert told["driver"] not in told["executors"]
    assert sum(told["rows"]) == 64
    assert min(told["rows"]) > 0
    assert told["loss"][-1] < 0.7 * told["loss"][0]
    assert len(told["predictions"]) == 64


def test_a_cluster_without_enough_slots_is_told_at_once(told: dict[str, Any]) -> None:
    kind, message = told["slots"]
    assert kind == "SlotsError"
    assert "needs 3 slots at once, but this cluster runs 2 tasks at a time" in message


def test_dynamic_allocation_is_refused_with_the_line_that_turns_it_off(tmp_path: Path) -> None:
    settings = {"spark.dynamicAllocation.enabled": "true", "spark.dynamicAllocation.shuffleTracking.enabled": "true"}
    kind, message = run_on_cluster(tmp_path, **settings)["error"]
    assert kind == "LaunchError"
    assert (
        "numTrainWorkers=2 runs in a barrier stage, which Spark does not start while dynamic allocation is on"
        in message
    )
    assert "--conf spark.dynamicAllocation.enabled=false" in message
