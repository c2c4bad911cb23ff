"""Bad input gets a clear error, and nothing is lost: what is wrong, what was found and what to do.

What can be known without looking at a row is refused before any Spark job; bad values while the rows are written, by an
error that names the column and shows a row; a module that does not fit at its first forward, before any rank waits for
another. Whatever fails leaves nothing behind.
"""

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pyspark.ml.linalg import SparseVector, Vectors, VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import ArrayType, DoubleType, StructField, StructType
from torch import Tensor, nn

from sparkdl import SparkdlError, TorchClassifier, TorchEstimator, TorchRegressor
from sparkdl.errors import ConfigError, DataError, SlotsError
from tests.spark.modules import job_ids

pytestmark = pytest.mark.spark


class HoldsLock(nn.Linear):
    """A module that can be trained, but not sent anywhere."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock = threading.Lock()


class LossWithLock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, output: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, label)


def function_with_lock(*results: Any) -> Callable[..., Any]:
    """A function that closes over what cannot be pickled."""
    lock = threading.Lock()

    def locked(*_: Any) -> Any:
        with lock:
            return results[0]

    return locked


@pytest.fixture(scope="module")
def people(spark: SparkSession) -> DataFrame:
    """A few good rows with columns of many types."""
    row = (Vectors.dense(1.0, 2.0), [1.0, 2.0], ["a"], 1, 0.5, "north", datetime.timedelta(days=1), (1.0, 2.0), True)
    names = "features array words label weight text span pair flag"
    schema = (
        "array array<double>, words array<string>, label int, weight double, text string, span interval day to second"
    )
    schema += ", pair struct<x: double, y: double>, flag boolean"
    fields = StructType.fromDDL(schema).fields
    assert ["features", *(entry.name for entry in fields)] == names.split()
    return spark.createDataFrame([row] * 4, StructType([StructField("features", VectorUDT()), *fields]))


# ---- before any job --------------------------------------------------------------------------------------------------
CLASSIFIER: dict[str, Any] = {"module": nn.Linear(2, 2), "verbose": False}
GENERAL: dict[str, Any] = {**CLASSIFIER, "loss": "mse"}
SETTINGS: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "no module": (TorchClassifier, {}, r"TorchClassifier needs a module: an nn.Module, or a function"),
    "no loss": (TorchEstimator, {"module": nn.Linear(2, 2)}, "TorchEstimator needs a loss: a name, a torch loss"),
    "module is a number": (TorchClassifier, {"module": 3}, "module=3 is neither an nn.Module nor a function"),
    "module from a function is none": (
        TorchClassifier,
        {"module": lambda: "net"},
        "The function given as module returned 'net', not an nn.Module",
    ),
    "module without parameters": (TorchClassifier, {"module": nn.ReLU()}, "The module ReLU has no parameter"),
    "module with a lock": (
        TorchClassifier,
        {"module": HoldsLock()},
        r"(?s)HoldsLock cannot be copied: cannot pickle '_thread.lock' object.*keep locks",
    ),
    "loss module with a lock": (
        TorchClassifier,
        {**CLASSIFIER, "loss": LossWithLock()},
        r"(?s)LossWithLock.*cannot pickle '_thread.lock' object",
    ),
    "loss function with a lock": (
        TorchClassifier,
        {**CLASSIFIER, "loss": function_with_lock()},
        r"(?s)must travel to the executors, but cannot be pickled: cannot pickle '_thread.lock'.*inside the ranks",
    ),
    "optimizer function with a lock": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": function_with_lock()},
        "cannot be pickled: cannot pickle '_thread.lock' object",
    ),
    "unknown loss": (
        TorchClassifier,
        {**CLASSIFIER, "loss": "crossentropy"},
        r"loss='crossentropy' is not known. Use one of .*cross_entropy.*\bmse\b.*, or a callable",
    ),
    "loss is a class": (
        TorchClassifier,
        {**CLASSIFIER, "loss": nn.CrossEntropyLoss},
        r"CrossEntropyLoss.* cannot be called with \(output, label\). Pass an instance, not a class",
    ),
    "loss of probabilities for a classifier": (
        TorchClassifier,
        {**CLASSIFIER, "loss": "binary_cross_entropy"},
        "takes probabilities, but a classifier's module returns scores. Use 'cross_entropy'",
    ),
    "unknown optimizer": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": "adamm"},
        r"optimizer='adamm' is unknown. Use one of .*\badamw\b.*\bsgd\b.*, or a function of the parameters",
    ),
    "optimizer is a number": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": 3},
        "optimizer=3 is neither a name nor a function",
    ),
    "optimizer argument that it does not take": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": "sgd", "optimizerParams": {"betas": (0.9, 0.99)}},
        r"optimizerParams=\{'betas': \(0.9, 0.99\)\} do not suit optimizer='sgd'.*betas",
    ),
    "learning rate beside an optimizer function": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": torch.optim.SGD, "learningRate": 0.1},
        "learningRate cannot reach an optimizer that is a function. Set them inside the function",
    ),
    "optimizer arguments beside an optimizer function": (
        TorchClassifier,
        {**CLASSIFIER, "optimizer": torch.optim.SGD, "optimizerParams": {"momentum": 0.9}, "learningRate": 0.1},
        "learningRate and optimizerParams cannot reach an optimizer that is a function",
    ),
    "learning rate of zero": (TorchClassifier, {**CLASSIFIER, "learningRate": 0.0}, r"learningRate=0.0 does not learn"),
    "device with an index": (
        TorchClassifier,
        {**CLASSIFIER, "device": "cuda:1"},
        "device='cuda:1' is not known. Use one of auto, cpu, cuda",
    ),
    "unknown shuffle": (
        TorchClassifier,
        {**CLASSIFIER, "shuffle": "some"},
        "shuffle='some' is not known. Use one of window, full, none",
    ),
    "zero epochs": (TorchClassifier, {**CLASSIFIER, "maxEpochs": 0}, "maxEpochs=0 is too small. Use 1 or more"),
    "batches of no row": (TorchClassifier, {**CLASSIFIER, "batchSize": 0}, "batchSize=0 is too small. Use 1 or more"),
    "micro-batches of no row": (
        TorchClassifier,
        {**CLASSIFIER, "microBatchSize": 0},
        "microBatchSize=0 is too small. Use 1 or more",
    ),
    "no workers": (
        TorchClassifier,
        {**CLASSIFIER, "numTrainWorkers": 0},
        "numTrainWorkers=0 is too small. Use 1 or more",
    ),
    "no shards": (TorchClassifier, {**CLASSIFIER, "numShards": 0}, "numShards=0 is too small. Use 1 or more"),
    "negative seed": (TorchClassifier, {**CLASSIFIER, "seed": -1}, "seed=-1 is too small. Use 0 or more"),
    "fewer shards than workers": (
        TorchClassifier,
        {**CLASSIFIER, "numTrainWorkers": 2, "numShards": 1},
        "numTrainWorkers=2 is more than numShards=1: some ranks would have nothing to read. Use numShards >= 2",
    ),
    "batches smaller than shards": (
        TorchClassifier,
        {**CLASSIFIER, "numShards": 4, "batchSize": 3},
        "batchSize=3 cannot be dealt to numShards=4 shards.*Use batchSize >= 4, or fewer shards",
    ),
    "one input and several": (
        TorchClassifier,
        {**CLASSIFIER, "featuresCol": "features", "inputCols": ["array"]},
        r"featuresCol='features' and inputCols=\['array'\] are both set. Set one",
    ),
    "an empty list of inputs": (TorchClassifier, {**CLASSIFIER, "inputCols": []}, "inputCols is empty. Name at least"),
    "one label and several": (
        TorchEstimator,
        {**GENERAL, "labelCol": "label", "labelCols": ["weight"]},
        r"labelCol='label' and labelCols=\['weight'\] are both set. Set one",
    ),
    "one output and several": (
        TorchEstimator,
        {**GENERAL, "outputCol": "output", "outputCols": ["a", "b"]},
        r"outputCol='output' and outputCols=\['a', 'b'\] are both set. Set one",
    ),
    "negative threshold": (
        TorchClassifier,
        {**CLASSIFIER, "thresholds": [0.5, -0.5]},
        r"thresholds=\[0.5, -0.5\] must be >= 0, with at most one 0",
    ),
    "two thresholds of zero": (
        TorchClassifier,
        {**CLASSIFIER, "thresholds": [0.0, 0.0]},
        r"thresholds=\[0.0, 0.0\] must be >= 0, with at most one 0",
    ),
    "output column that exists": (
        TorchClassifier,
        {**CLASSIFIER, "predictionCol": "weight"},
        "Output column 'weight' exists already in the DataFrame. Drop it, or name another",
    ),
    "output column named twice": (
        TorchClassifier,
        {**CLASSIFIER, "probabilityCol": "p", "predictionCol": "p"},
        "Output column 'p' is named twice. Give every output a name of its own",
    ),
    "missing features": (
        TorchClassifier,
        {**CLASSIFIER, "featuresCol": "feature"},
        "featuresCol='feature' is not a column. The DataFrame has features, array, words, label, .*flag",
    ),
    "missing input": (
        TorchClassifier,
        {**CLASSIFIER, "inputCols": ["array", "nothing"]},
        "inputCols='nothing' is not a column",
    ),
    "missing label": (TorchRegressor, {**CLASSIFIER, "labelCol": "target"}, "labelCol='target' is not a column"),
    "missing labels": (
        TorchEstimator,
        {**GENERAL, "labelCols": ["label", "target"]},
        "labelCols='target' is not a column",
    ),
    "missing weight": (TorchClassifier, {**CLASSIFIER, "weightCol": "w"}, "weightCol='w' is not a column"),
    "missing indicator": (
        TorchClassifier,
        {**CLASSIFIER, "validationIndicatorCol": "held_out"},
        "validationIndicatorCol='held_out' is not a column",
    ),
    "features of text": (
        TorchClassifier,
        {**CLASSIFIER, "featuresCol": "text"},
        "featuresCol='text' has type string; use .*StringIndexer",
    ),
    "features of durations": (
        TorchClassifier,
        {**CLASSIFIER, "featuresCol": "span"},
        "featuresCol='span' has type interval day to second; use numbers derived from it",
    ),
    "features in a struct": (
        TorchClassifier,
        {**CLASSIFIER, "featuresCol": "pair"},
        "featuresCol='pair' has type struct<.*>; use its fields as columns of their own",
    ),
    "features in an array of text": (
        TorchClassifier,
        {**CLASSIFIER, "inputCols": ["words"]},
        "inputCols='words' has type array<string>; use an ML Vector, an array of numbers, or a number",
    ),
    "labels of text": (
        TorchClassifier,
        {**CLASSIFIER, "labelCol": "text"},
        r"labelCol='text' has type string; it must hold class numbers 0, 1, ....*StringIndexer",
    ),
    "targets of text": (
        TorchRegressor,
        {**CLASSIFIER, "labelCol": "text"},
        "labelCol='text' has type string; use .*StringIndexer",
    ),
    "classes in a vector": (
        TorchClassifier,
        {**CLASSIFIER, "labelCol": "features", "featuresCol": "array"},
        "labelCol='features' has type vector; it must hold class numbers",
    ),
    "weights of text": (
        TorchClassifier,
        {**CLASSIFIER, "weightCol": "text"},
        "weightCol='text' has type string; it must hold numbers",
    ),
    "indicator of numbers": (
        TorchClassifier,
        {**CLASSIFIER, "validationIndicatorCol": "label"},
        "validationIndicatorCol='label' has type int; it must be boolean",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_work_is_refused_before_any_job(spark: SparkSession, people: DataFrame, name: str) -> None:
    kind, params, message = SETTINGS[name]
    estimator = kind(**params)
    with job_ids(spark, f"refused: {name}") as jobs, pytest.raises(ConfigError, match=message):
        estimator.fit(people)
    assert jobs == []


def test_jobs_are_seen_where_there_are_any(spark: SparkSession, people: DataFrame) -> None:
    with job_ids(spark, "control") as jobs:
        people.count()
    assert jobs


def test_more_workers_than_slots_are_refused_at_once(spark: SparkSession, people: DataFrame) -> None:
    started = time.monotonic()
    message = "numTrainWorkers=5 needs 5 slots at once, but this cluster runs 4 tasks at a time. .*numTrainWorkers=4"
    with job_ids(spark, "slots") as jobs, pytest.raises(SlotsError, match=message):
        TorchClassifier(**CLASSIFIER, numTrainWorkers=5).fit(people)
    assert len(jobs) <= 1, "the preflight's own, which finds all that is wrong at once"
    assert time.monotonic() - started < 15  # Spark itself waits for ten minutes


def test_settings_of_a_wrong_type_are_refused_where_they_are_made() -> None:
    with pytest.raises(TypeError, match="maxEpochs"):
        TorchClassifier(maxEpochs="three")
    with pytest.raises(TypeError, match="optimizerParams"):
        TorchClassifier(optimizerParams="momentum")
    with pytest.raises(TypeError, match="keyword"):
        TorchClassifier(nn.Linear(2, 2))  # type: ignore[misc]


def test_constructors_only_store() -> None:
    estimator = TorchClassifier(module=None, maxEpochs=-1, batchSize=-1, device="abacus", loss="none")
    assert (estimator.getMaxEpochs(), estimator.getBatchSize(), estimator.getDevice()) == (-1, -1, "abacus")


# ---- bad values, before any rank joins -------------------------------------------------------------------------------
TWO = Vectors.dense(1.0, 2.0)
INF = float("inf")
NAN = float("nan")
POINTS = StructType([StructField("point", VectorUDT()), StructField("label", DoubleType())])
LISTS = StructType([StructField("list", ArrayType(DoubleType())), StructField("label", DoubleType())])
FLAGGED = "label double, x double, held boolean"


@dataclass(frozen=True)
class Case:
    """Rows that cannot be trained on."""

    message: str
    rows: Sequence[tuple[Any, ...]]
    schema: StructType | str
    params: dict[str, Any]
    kind: type[Any] = TorchClassifier
    error: type[SparkdlError] = DataError
    staged: bool = False
    partitions: int = 1


def loss_of_pairs(output: Tensor, label: Tensor) -> Tensor:
    first, second, third = output.T
    return first + second + third - label


def rows_of(*labels: float | None, point: Any = TWO) -> list[tuple[Any, float | None]]:
    return [(point, label) for label in labels]


ON_POINTS: dict[str, Any] = {"featuresCol": "point"}
ON_LISTS: dict[str, Any] = {"featuresCol": "list"}
ON_X: dict[str, Any] = {"featuresCol": "x", "module": nn.Linear(1, 2)}

CASES = {
    "null labels": Case(
        r"'label' is null in 2 of 4 rows; the first: \{.point.: .*.label.: null\}\. Drop such rows",
        rows_of(0.0, None, 1.0, None),
        POINTS,
        ON_POINTS,
    ),
    "null features": Case(r"'point' is null in 1 of 2 rows", [(TWO, 1.0), (None, 0.0)], POINTS, ON_POINTS, staged=True),
    "labels outside the classes": Case(
        r"'label' holds class 2, but the module tells 2 classes apart: labels must lie in 0..1",
        rows_of(0.0, 1.0, 2.0),
        POINTS,
        ON_POINTS,
    ),
    "labels outside the classes, staged": Case(
        r"'label' holds class 2, but the module tells 2 classes apart: labels must lie in 0..1",
        rows_of(0.0, 1.0, 2.0),
        POINTS,
        ON_POINTS,
        staged=True,
    ),
    "a label outside the classes where a rank has validation rows only": Case(
        r"'label' holds class 7, but the module tells 2 classes apart",
        [(0.0, 1.0, False), (7.0, 2.0, True), (1.0, 3.0, False), (7.0, 4.0, True)],
        FLAGGED,
        {**ON_X, "validationIndicatorCol": "held", "numTrainWorkers": 2},
    ),
    "labels between classes": Case(
        r"'label' must hold class numbers 0, 1, ..., but is 0.5 in a row: \{.*0.5.*\}.*StringIndexer",
        rows_of(0.0, 0.5),
        POINTS,
        ON_POINTS,
    ),
    "negative labels": Case(
        r"'label' must hold class numbers .* but is -1 in a row", rows_of(0.0, -1.0), POINTS, ON_POINTS
    ),
    "no rows": Case(
        r"The DataFrame has no rows to train on. Check the filters", [], POINTS, {**ON_POINTS, "numTrainWorkers": 2}
    ),
    "no rows, staged": Case(r"The DataFrame has no rows to train on. Check", [], POINTS, ON_POINTS, staged=True),
    "all rows held out": Case(
        r"no rows to train on. All rows are marked for validation",
        [(0.0, 1.0, True), (1.0, 2.0, True)],
        FLAGGED,
        {**ON_X, "validationIndicatorCol": "held"},
        staged=True,
    ),
    "NaN in a vector": Case(
        r"'point' is NaN or infinite in 1 of 3 rows; the first: \{.*NaN.*\}. Drop or impute",
        [*rows_of(0.0, 1.0), (Vectors.dense(1.0, NAN), 0.0)],
        POINTS,
        ON_POINTS,
    ),
    "infinite number": Case(
        r"'x' is NaN or infinite in 1 of 2 rows; the first: \{.*Infinity.*\}",
        [(0.0, 1.0, False), (1.0, INF, False)],
        FLAGGED,
        ON_X,
    ),
    "arrays of several lengths": Case(
        r"'list' has 2 values in earlier rows, but 3 in this one: \{.list.: \[7.0, 8.0, 9.0\].*\}. .*pad or cut",
        [([1.0, 2.0], 0.0), ([3.0, 4.0], 1.0), ([7.0, 8.0, 9.0], 0.0)],
        LISTS,
        ON_LISTS,
    ),
    "arrays of several lengths, each rank with one": Case(
        r"'list' has (2|3) values in .*rows.*\{.*\[.*8.0.*\].*\}",
        [([1.0, 8.0], 0.0), ([1.0, 8.0, 9.0], 1.0), ([3.0, 8.0], 0.0), ([4.0, 8.0, 6.0], 0.0)],
        LISTS,
        {**ON_LISTS, "numTrainWorkers": 2},
    ),
    "vectors of several sizes, each partition with one": Case(
        r"'point' has (2|3) values in .*rows.*\{.*8.0.*\}",
        [(Vectors.dense(1.0, 8.0), 0.0), (SparseVector(3, {1: 8.0}), 1.0)],
        POINTS,
        ON_POINTS,
        partitions=2,
        staged=True,
    ),
    "a null inside an array": Case(
        r"'list' has a null inside an array; the first row: \{.*\[5.0, null\].*\}",
        [([1.0, 2.0], 0.0), ([5.0, None], 1.0)],
        LISTS,
        ON_LISTS,
    ),
    "negative weights": Case(
        r"'x' is negative in a row: \{.*.x.: -0.25\}. Weights are >= 0",
        [(0.0, 1.0, False), (1.0, -0.25, False)],
        FLAGGED,
        {"featuresCol": "label", "weightCol": "x", "module": nn.Linear(1, 2)},
    ),
    "an output that does not fit the loss": Case(
        r"output has shape \(2, 3\), the label \(2,\); MSELoss needs one output per target",
        rows_of(0.0, 1.0),
        POINTS,
        {**ON_POINTS, "module": nn.Linear(2, 3)},
        kind=TorchRegressor,
        error=ConfigError,
    ),
    "outputs that the user's loss cannot take": Case(
        r"(?s)The loss .*loss_of_pairs cannot take the module's output of shape \(2, 2\), float32 with labels of shape "
        r"\(2,\), float32: not enough values",
        rows_of(0.0, 1.0),
        POINTS,
        {**ON_POINTS, "loss": loss_of_pairs},
        kind=TorchEstimator,
        error=ConfigError,
    ),
    "a classifier with an image for an output": Case(
        r"must return one score per class, shape \(rows, classes\).*returned shape \(2, 1, 2\)",
        rows_of(0.0, 1.0),
        POINTS,
        {**ON_POINTS, "module": nn.Sequential(nn.Linear(2, 2), nn.Unflatten(1, (1, 2)))},
        error=ConfigError,
    ),
    "a module that fails in its first forward": Case(
        r"(?s)The module failed on its first forward, with 1 positional inputs of shape \(2, 2\) float32 .*"
        r"RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        rows_of(0.0, 1.0),
        POINTS,
        {**ON_POINTS, "module": nn.Linear(5, 2)},
        error=ConfigError,
    ),
    "thresholds of another number of classes": Case(
        r"thresholds has 3 values for 2 classes. Give one per class",
        rows_of(0.0, 1.0),
        POINTS,
        {**ON_POINTS, "thresholds": [0.2, 0.3, 0.5]},
        error=ConfigError,
    ),
}


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Path]:
    """A staging directory, which must be empty when the test ends."""
    directory = tmp_path / "staging"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []


# On the way of another case; what they add is a sentence, which tests without Spark look at.
SECOND = {
    "negative labels",
    "infinite number",
    "arrays of several lengths",
    "a null inside an array",
    "negative weights",
    "outputs that the user's loss cannot take",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SECOND else []) for name in CASES]
)
def test_rows_that_cannot_be_trained_on_are_refused_before_any_rank_joins(
    spark: SparkSession, staging: Path, name: str
) -> None:
    case = CASES[name]
    params: dict[str, Any] = {"module": nn.Linear(2, 2), "maxEpochs": 1, "verbose": False, **case.params}
    if case.staged:
        params["stagingDir"] = str(staging)
    df = spark.createDataFrame(list(case.rows), case.schema).coalesce(case.partitions)
    with pytest.raises(case.error, match=case.message) as caught:
        case.kind(**params).fit(df)
    assert "Traceback" not in str(caught.value), "the user needs the sentence, not the executors' stack"
