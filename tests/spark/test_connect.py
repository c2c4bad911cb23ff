"""The whole of a user's work over Spark Connect, in a client process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="Spark Connect needs the extra sparkdl-torch[connect]")
pytestmark = [pytest.mark.spark, pytest.mark.timeout(280)]

SCRIPT = """
import json, os, sys
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import SparkSession, functions as F
from torch import nn
import sparkdl
from sparkdl import TorchClassifier
from sparkdl.io import ParquetDataset

folder = sys.argv[1]
spark = SparkSession.builder.remote("local[2]").getOrCreate()
x, y = F.sin(F.col("id") * 1.7), F.cos(F.col("id") * 2.3)
df = spark.range(0, 64, 1, 3).select("id", x.alias("x"), y.alias("y"), (x > y).cast("double").alias("label"))

def classifier(**params):
    return TorchClassifier(
        module=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)),
        learningRate=0.05, batchSize=16, maxEpochs=1, numTrainWorkers=2, verbose=False, **params,
    )

def predictions(model):
    rows = model.transform(df).orderBy("id").select("id", "prediction", "probability").collect()
    return [[row.id, row.prediction, row.probability.toArray().tolist()] for row in rows]

assembler = VectorAssembler(inputCols=["x", "y"], outputCol="features")
model = Pipeline(stages=[assembler, classifier()]).fit(df)
before = predictions(model)
model.write().overwrite().save(os.path.join(folder, "model"))
loaded = PipelineModel.load(os.path.join(folder, "model"))
after = predictions(loaded)

staged = Pipeline(stages=[assembler, classifier(stagingDir=os.path.join(folder, "staging"))]).fit(df)
df.write.parquet(os.path.join(folder, "rows"))
dataset = ParquetDataset("file:" + os.path.join(folder, "rows"), assemble={"features": ["x", "y"]})
in_place = classifier(numShards=3).fit(dataset)
keyed = Pipeline(stages=[assembler, classifier(partitioning="key", partitionKeyCol="label")]).fit(df)
try:
    classifier(featuresCol="x", labelCol="nothing").fit(df)
    refusal = None
except sparkdl.SparkdlError as error:
    refusal = str(error)
try:
    sparkdl.launch(print, num_train_workers=3)
    slots = None
except sparkdl.SparkdlError as error:
    slots = str(error)

print(json.dumps({
    "session": type(spark).__module__,
    "before": before,
    "after": after,
    "history": model.stages[-1].history,
    "ranks": model.stages[-1].summary.rankRows,
    "loaded history": loaded.stages[-1].history,
    "staged": [staged.stages[-1].summary.staged, sum(staged.stages[-1].summary.rankRows)],
    "in place": [in_place.summary.staged, sum(in_place.summary.rankRows), in_place.history[0]["rows"]],
    "keyed": sum(keyed.stages[-1].summary.rankRows),
    "left": os.listdir(os.path.join(folder, "staging")),
    "launched": sparkdl.launch(abs, -2, num_train_workers=2),
    "refusal": refusal,
    "slots": slots,
}))
spark.stop()
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a client saw; it runs in a process of its own, as a classic session and a remote one exclude each other."""
    folder = tmp_path_factory.mktemp("connect")
    script = folder / "client.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPARK_")}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        cwd=Path.cwd(),
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pipeline_fits_over_connect(client: dict[str, Any]) -> None:
    assert client["session"].startswith("pyspark.sql.connect")
    assert [record["rows"] for record in client["history"]] == [64]
    assert len(client["ranks"]) == 2
    assert sum(client["ranks"]) == 64


def test_a_fitted_pipeline_transforms_over_connect(client: dict[str, Any]) -> None:
    assert [row[0] for row in client["before"]] == list(range(64))
    for _, prediction, probability in client["before"]:
        assert sum(probability) == pytest.approx(1)
        assert prediction == probability.index(max(probability))


def test_a_pipeline_saved_and_loaded_over_connect_predicts_the_same(client: dict[str, Any]) -> None:
    assert client["after"] == client["before"]
    assert client["loaded history"] == client["history"]


def test_staging_works_over_connect_and_is_removed(client: dict[str, Any]) -> None:
    assert client["staged"] == [True, 64]
    assert client["left"] == []


def test_parquet_is_read_in_place_and_rows_are_dealt_by_key_over_connect(client: dict[str, Any]) -> None:
    assert client["in place"] == [True, 64, 64]
    assert client["keyed"] == 64


def test_launch_and_refusals_work_over_connect(client: dict[str, Any]) -> None:
    assert client["launched"] == [2, 2]
    assert "labelCol='nothing' is not a column" in client["refusal"]
    assert "needs 3 slots at once, but this cluster runs 2 tasks" in client["slots"]
