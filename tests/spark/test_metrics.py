"""Metrics by name against Spark's evaluators with default settings, on what transform makes of the same scores."""

from typing import Any

import pytest
import torch
from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    Evaluator,
    MulticlassClassificationEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from torch import Tensor

from sparkdl.metrics import Metrics
from sparkdl.predict import decide, is_one_logit, probabilities, raw_scores

pytestmark = pytest.mark.spark

OF_CLASSES = {
    "accuracy": "accuracy",
    "f1": "f1",
    "precision": "weightedPrecision",
    "recall": "weightedRecall",
    "log_loss": "logLoss",
    "hamming_loss": "hammingLoss",
}
OF_NUMBERS = {"mae": "mae", "mse": "mse", "rmse": "rmse", "r2": "r2"}


def transformed(spark: SparkSession, scores: Tensor, labels: Tensor) -> DataFrame:
    exact = scores.double().numpy()
    chance = probabilities(raw_scores(exact), one_logit=is_one_logit(exact))
    rows = zip(chance.tolist(), decide(chance, None).tolist(), labels.double().tolist(), strict=True)
    return (
        spark.createDataFrame(list(rows), "p array<double>, prediction double, label double")
        .select(array_to_vector("p").alias("probability"), "prediction", "label")
        .repartition(3)
    )


def ours(kind: Any, names: list[str], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    metrics = Metrics(names, kind=kind)
    for piece in range(2):
        metrics.update(outputs[piece::2], labels[piece::2])
    return metrics.compute()


def theirs(evaluators: dict[str, Evaluator], frame: DataFrame) -> dict[str, float]:
    return {name: evaluator.evaluate(frame) for name, evaluator in evaluators.items()}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_names_of_classes_equal_sparks_evaluators(spark: SparkSession, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    # Many rows are equal; of five classes one is never a label, and one is never predicted.
    scores = torch.randn(60, classes, generator=generator).repeat(4, 1)
    scores[:, 4:] -= 30
    labels = torch.randint(0, 2 if classes < 5 else 4, (240,), generator=generator)
    labels[labels == 3] = classes - 1
    frame = transformed(spark, scores, labels)
    evaluators: dict[str, Evaluator] = {
        name: MulticlassClassificationEvaluator(metricName=metric)  # type: ignore[arg-type]
        for name, metric in OF_CLASSES.items()
    }
    if classes < 5:
        evaluators["auroc"] = BinaryClassificationEvaluator(rawPredictionCol="probability", numBins=0)
    expected = theirs(evaluators, frame)
    assert ours("class", list(expected), scores, labels) == pytest.approx(expected, rel=1e-12)


def test_the_area_under_the_curve_of_precision_is_not_sparks(spark: SparkSession) -> None:
    """Spark joins the curve's points by straight lines; the average precision is a sum of steps, as in scikit-learn."""
    scores, labels = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([1, 0, 1, 0])
    evaluator = BinaryClassificationEvaluator(metricName="areaUnderPR", rawPredictionCol="probability", numBins=0)
    assert evaluator.evaluate(transformed(spark, scores, labels)) == pytest.approx(0.5 + (1 / 2 + 2 / 3) / 4)
    assert ours("class", ["average_precision"], scores, labels) == {"average_precision": pytest.approx(5 / 6)}


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_names_of_numbers_equal_sparks_evaluators(spark: SparkSession, offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    labels = (torch.randn(300, generator=generator) + offset).double()
    outputs = labels + torch.randn(300, generator=generator)
    frame = spark.createDataFrame(
        list(zip(outputs.tolist(), labels.tolist(), strict=True)), "prediction double, label double"
    ).repartition(3)
    expected = {
        name: RegressionEvaluator(metricName=metric).evaluate(frame)  # type: ignore[arg-type]
        for name, metric in OF_NUMBERS.items()
    }
    assert ours("number", list(expected), outputs, labels) == pytest.approx(expected, rel=1e-9)
    explained = RegressionEvaluator(metricName="var").evaluate(frame)
    assert explained == pytest.approx(float(((outputs - labels.mean()) ** 2).mean()), rel=1e-4)
