"""Executors in JVMs of their own, as on a real cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyspark
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(280)]

# Two executors of one slot each; the same once more with dynamic allocation.
SCRIPT = """
import json, sys
import psutil
from pyspark.sql import SparkSession, functions as F
from torch import nn
import sparkdl
from sparkdl import SparkdlError, TorchRegressor

def start(**settings):
    builder = SparkSession.builder.master("local-cluster[2,1,1024]").config("spark.ui.enabled", "false")
    for name, value in settings.items():
        builder = builder.config(name, value)
    return builder.config("spark.driver.host", "127.0.0.1").config("spark.log.level", "OFF").getOrCreate()

def fit(spark):
    x = F.sin(F.col("id") * 1.7)
    df = spark.range(0, 64, 1, 3).select(F.array(x.cast("float")).alias("features"), (3 * x).alias("label"))
    model = TorchRegressor(
        module=nn.Linear(1, 1), optimizer="sgd", learningRate=0.1, batchSize=16, maxEpochs=4, numTrainWorkers=2,
        verbose=False,
    ).fit(df)
    return model, df

def executor():
    process = psutil.Process()
    while "java" not in process.name():
        process = process.parent()
    return process.pid

def refusal(run):
    try:
        return ["nothing", str(run())]
    except SparkdlError as error:
        return [type(error).__name__, str(error)]

spark = start()
model, df = fit(spark)
told = {
    "loss": [record["loss"] for record in model.history],
    "rows": model.summary.rankRows,
    "executors": sparkdl.launch(executor, num_train_workers=2),
    "predictions": model.transform(df).select("prediction").count(),
    "driver": spark.sparkContext._gateway.proc.pid,
    "slots": refusal(lambda: sparkdl.launch(print, num_train_workers=3)),
}
spark.stop()
spark = start(**{
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
})
told["dynamic allocation"] = refusal(lambda: fit(spark))
print(json.dumps(told))
spark.stop()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a driver on a cluster found."""
    folder = tmp_path_factory.mktemp("cluster")
    script = folder / "job.py"
    script.write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, str(script)],
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


def test_two_executors_train_one_module(told: dict[str, Any]) -> None:
    assert len(set(told["executors"])) == 2, "both ranks ran in one executor"
    assert told["driver"] not in told["executors"]
    assert sum(told["rows"]) == 64
    assert min(told["rows"]) > 0
    assert told["loss"][-1] < 0.7 * told["loss"][0]
    assert told["predictions"] == 64


def test_a_cluster_without_enough_slots_is_told_at_once(told: dict[str, Any]) -> None:
    kind, message = told["slots"]
    assert kind == "SlotsError"
    assert "needs 3 slots at once, but this cluster runs 2 tasks at a time" in message


def test_dynamic_allocation_is_refused_with_the_line_that_turns_it_off(told: dict[str, Any]) -> None:
    kind, message = told["dynamic allocation"]
    assert kind == "LaunchError"
    assert "numTrainWorkers=2 runs in a barrier stage, which Spark does not start while dynamic allocation" in message
    assert "--conf spark.dynamicAllocation.enabled=false" in message
