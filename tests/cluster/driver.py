"""A driver that fits as it is told: one JSON request per line of its input, one answer in the folder of each event.

python -m tests.cluster.driver '{"spark.master": "local[4]"}'
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sparkdl import SparkdlError, TorchEstimator
from tests import faults
from tests.faults import FailAt, Fragile

ROWS, BATCH, EPOCHS, INTERVAL = 192, 16, 3, 5


class _JsonLines(logging.Handler):
    """Notes every record in a file at once, with its time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"time": record.created, "level": record.levelname, "name": record.name, "message": record.getMessage()}
        with self._path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")


def fit(spark: SparkSession, event: FailAt, workers: int, dropout: float, params: dict[str, Any]) -> dict[str, Any]:
    """Train a module to which something happens, and tell how it went."""
    features = F.array(F.sin("id").cast("float"), F.cos("id").cast("float"))
    df = spark.range(0, ROWS, 1, 4).select(features.alias("features"), F.sin("id").cast("float").alias("label"))
    module = Fragile(event, dropout=dropout)
    with torch.no_grad():  # the same every time
        torch.manual_seed(3)
        for value in module.parameters():
            value.copy_(torch.randn_like(value) / 20)
    settings: dict[str, Any] = {
        "checkpointDir": f"{event.folder}/checkpoints",
        "checkpointInterval": INTERVAL,
        "keepCheckpoints": 100,
        "maxEpochs": EPOCHS,
        "batchSize": BATCH,
        "numShards": 4,
        "optimizer": "adamw",
        "verbose": False,
        **params,
    }
    try:
        model = TorchEstimator(module=module, loss="mse", numTrainWorkers=workers, **settings).fit(df)
    except SparkdlError as error:
        lost = bool(getattr(error, "lost", False))
        return {"ended": time.time(), "error": type(error).__name__, "message": str(error), "lost": lost}
    ended = time.time()
    torch.save(model.module.state_dict(), Path(event.folder) / "weights.pt")
    summary = model.summary
    told = {"history": model.history, "restarts": list(summary.restarts), "checkpoints": summary.checkpoints}
    return {"ended": ended, **told}


def main() -> None:
    """Serve requests until the input ends."""
    cloudpickle.register_pickle_by_value(faults)  # executors have no tests
    builder = SparkSession.builder.appName("sparkdl-faults")
    for name, value in json.loads(sys.argv[1]).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("WARN")
    logger = logging.getLogger("sparkdl")
    logger.setLevel(logging.INFO)
    print("READY", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        event = FailAt(**request["event"])
        folder = Path(event.folder)
        handler = _JsonLines(folder / "log.jsonl")
        logger.addHandler(handler)
        outcome = fit(spark, event, request["workers"], request["dropout"], request["params"])
        logger.removeHandler(handler)
        partial = folder / "outcome.partial"
        partial.write_text(json.dumps({**outcome, "folder": event.folder}))
        partial.rename(folder / "outcome.json")
    spark.stop()


if __name__ == "__main__":
    main()
