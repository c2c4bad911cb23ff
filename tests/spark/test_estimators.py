"""Estimators and models as a Spark ML user meets them; what they compute is compared with plain torch, row by row."""

import copy
import gc
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pyspark.errors import PySparkException
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.linalg import Vector, Vectors, VectorUDT
from pyspark.ml.param import shared
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType
from torch import Tensor, nn

from sparkdl import (
    TorchClassificationModel,
    TorchClassifier,
    TorchEstimator,
    TorchModel,
    TorchRegressionModel,
    TorchRegressor,
)
from sparkdl.errors import ConfigError
from tests.spark.modules import FourInputs, TwoHeads, absolute_error, job_ids, loss_of_two_heads, make_sgd

pytestmark = pytest.mark.spark

QUIET: dict[str, Any] = {"verbose": False, "maxEpochs": 1}


def with_vectors(spark: SparkSession, rows: Sequence[tuple[Any, ...]], vector: str, ddl: str) -> DataFrame:
    """Rows whose first column is an ML Vector and whose other columns a DDL string describes, in two partitions.

    Every partition more is a Python worker more that has to import torch.
    """
    fields = StructType.fromDDL(ddl).fields
    return spark.createDataFrame(list(rows), StructType([StructField(vector, VectorUDT()), *fields])).coalesce(2)


def in_order(df: DataFrame) -> list[Row]:
    return sorted(df.collect(), key=lambda row: row["id"])


def plain(module: nn.Module, *inputs: Any) -> Any:
    """What the module returns for these rows, without Spark and without sparkdl."""
    with torch.inference_mode():
        return module(*inputs)


def states(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_weights(found: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def assert_rows_close(found: Sequence[Any], expected: Any) -> None:
    rows = [row.toArray() if isinstance(row, Vector) else row for row in found]
    np.testing.assert_allclose(np.array(rows, np.float64), np.asarray(expected, np.float64), rtol=1e-5, atol=1e-6)


# ---- three classes, from mixed vectors, on two ranks -----------------------------------------------------------------
FLOWERS = 45
FLOWER_WIDTH = 4
VECTOR = "my.features"
LABEL = "the label"


def flower(id_: int) -> list[float]:
    return [math.sin(id_ + 1), 0.0, float(id_ % 3), 0.1 * id_ if id_ % 2 else 0.0]


@pytest.fixture(scope="module")
def flowers(spark: SparkSession) -> DataFrame:
    """Sparse and dense vectors in one column with a dot in its name, double labels, and columns that nobody needs.

    One of these, an interval, cannot travel to Python at all.
    """
    rows = []
    for id_ in range(FLOWERS):
        values = flower(id_)
        dense = Vectors.dense(values)
        sparse = Vectors.sparse(FLOWER_WIDTH, {place: value for place, value in enumerate(values) if value})
        rows.append((sparse if id_ % 3 == 1 else dense, id_, float(id_ % 3), id_ % 5 == 0, f"row {id_}"))
    ddl = f"id long, `{LABEL}` double, `held out` boolean, `odd``name` string"
    return with_vectors(spark, rows, VECTOR, ddl).selectExpr("*", "make_interval(0, 0, 0, 1) as gap")


@pytest.fixture(scope="module")
def flower_net() -> nn.Module:
    """In eval mode, which fit must neither heed nor change."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(FLOWER_WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def flower_classifier(flower_net: nn.Module) -> TorchClassifier:
    return TorchClassifier(
        module=flower_net,
        learningRate=0.05,
        maxEpochs=3,
        batchSize=16,
        seed=3,
        featuresCol=VECTOR,
        labelCol=LABEL,
        validationIndicatorCol="held out",
        predictionCol="pre.diction",
        probabilityCol="prob ability",
        numTrainWorkers=2,
        verbose=False,
    )


@pytest.fixture(scope="module")
def flower_model(flower_classifier: TorchClassifier, flowers: DataFrame) -> TorchClassificationModel:
    return flower_classifier.fit(flowers)


@pytest.fixture(scope="module")
def flower_rows(flower_model: TorchClassificationModel, flowers: DataFrame) -> list[Row]:
    return in_order(flower_model.transform(flowers).drop("gap"))


def flower_tensor() -> Tensor:
    return torch.tensor([flower(id_) for id_ in range(FLOWERS)])


def test_a_classifier_writes_what_plain_torch_computes(
    flower_model: TorchClassificationModel, flower_rows: list[Row]
) -> None:
    scores = plain(flower_model.module, flower_tensor())
    assert_rows_close([row["rawPrediction"] for row in flower_rows], scores)
    assert_rows_close([row["prob ability"] for row in flower_rows], scores.softmax(1))
    assert [row["pre.diction"] for row in flower_rows] == scores.argmax(1).double().tolist()
    assert (flower_model.numClasses, flower_model.numFeatures) == (3, FLOWER_WIDTH)


def test_predictions_for_one_row_are_those_of_transform(
    flower_model: TorchClassificationModel, flower_rows: list[Row]
) -> None:
    for row in flower_rows[:6]:
        for value in (row[VECTOR], Vectors.dense(row[VECTOR].toArray()), flower(row["id"])):
            assert flower_model.predict(value) == row["pre.diction"]
            assert_rows_close([flower_model.predictRaw(value)], [row["rawPrediction"].toArray()])
            assert_rows_close([flower_model.predictProbability(value)], [row["prob ability"].toArray()])


def test_history_has_one_record_per_epoch_and_its_validation_loss_is_that_of_plain_torch(
    flower_model: TorchClassificationModel,
) -> None:
    history = flower_model.history
    held = [id_ for id_ in range(FLOWERS) if id_ % 5 == 0]
    trained = FLOWERS - len(held)
    steps = math.ceil(trained / 16)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert [record["step"] for record in history] == [steps, 2 * steps, 3 * steps]
    for record in history:
        assert record["rows"] == trained
        assert record["seconds"] > 0
        assert record["rows_per_second"] == pytest.approx(trained / record["seconds"])
        assert 0 <= record["data_wait"] <= 1
        assert math.isfinite(record["loss"])
    assert history[-1]["loss"] < history[0]["loss"]

    scores = plain(flower_model.module, flower_tensor()[held])
    expected = nn.functional.cross_entropy(scores, torch.tensor([id_ % 3 for id_ in held]))
    assert history[-1]["validation_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_summary_says_what_was_chosen(flower_model: TorchClassificationModel) -> None:
    summary = flower_model.summary
    assert flower_model.hasSummary
    assert summary.objectiveHistory == tuple(record["loss"] for record in flower_model.history)
    assert summary.totalIterations == flower_model.history[-1]["step"]
    assert (summary.worldSize, summary.numShards) == (2, 2)
    assert (summary.device, summary.backend) == ("cpu", "gloo")
    assert summary.threads >= 1
    assert sum(summary.rankRows) == summary.rows == flower_model.history[0]["rows"]
    assert len(summary.rankRows) == 2
    assert not summary.staged
    assert summary.seconds > sum(record["seconds"] for record in flower_model.history)


def test_columns_that_nobody_asked_for_survive_in_order(
    flower_model: TorchClassificationModel, flowers: DataFrame, flower_rows: list[Row]
) -> None:
    found = flower_model.transform(flowers)
    assert found.columns == [*flowers.columns, "rawPrediction", "prob ability", "pre.diction"]
    assert found.schema == flower_model.transformSchema(flowers.schema)
    kept = [name for name in flowers.columns if name != "gap"]
    before = in_order(flowers.drop("gap"))
    assert [[row[name] for name in kept] for row in flower_rows] == [list(row) for row in before]


def test_columns_of_one_name_survive(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    """As a join leaves them behind; Spark's own models carry them along."""
    twice = flowers.select(f"`{VECTOR}`", "id", (F.col("id") + 1).alias("id"))
    found = flower_model.transform(twice)
    assert found.columns == [VECTOR, "id", "id", "rawPrediction", "prob ability", "pre.diction"]
    assert {tuple(row)[2] - tuple(row)[1] for row in found.collect()} == {1}


def test_the_caller_keeps_module_and_dataframe_as_they_were(
    spark: SparkSession,
    flower_classifier: TorchClassifier,
    flower_model: TorchClassificationModel,
    flower_net: nn.Module,
    flowers: DataFrame,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        fresh = nn.Sequential(nn.Linear(FLOWER_WIDTH, 8), nn.Tanh(), nn.Linear(8, 3))
    assert_same_weights(flower_net, fresh)
    assert flower_classifier.getModule() is flower_net
    assert not any(part.training for part in flower_net.modules())
    assert all(value.grad is None and value.requires_grad for value in flower_net.parameters())
    assert not torch.equal(flower_model.module[0].weight, flower_net[0].weight)
    assert not flower_model.module.training
    assert not flowers.is_cached
    assert spark._jsparkSession.sharedState().cacheManager().isEmpty()


def test_the_same_seed_gives_the_same_weights_also_through_copies_and_param_maps(
    flower_classifier: TorchClassifier, flower_model: TorchClassificationModel, flowers: DataFrame
) -> None:
    other = flower_classifier.copy({flower_classifier.maxEpochs: 7, flower_classifier.predictionCol: "found"})
    again = other.fit(flowers, {other.maxEpochs: 3})
    assert_same_weights(again.module, flower_model.module)
    assert again.getPredictionCol() == "found"
    assert (other.getMaxEpochs(), flower_classifier.getMaxEpochs()) == (7, 3)
    assert flower_classifier.getPredictionCol() == "pre.diction"


def test_thresholds_decide_as_spark_says(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    """The class with the largest p/t wins; one threshold may be 0, and then its class wins."""
    for thresholds in ([0.9, 0.05, 0.4], [0.0, 0.5, 0.5]):
        model = flower_model.copy({flower_model.thresholds: thresholds})
        rows = in_order(model.transform(flowers).select("id", "`prob ability`", "`pre.diction`", f"`{VECTOR}`"))
        for row in rows:
            scaled = [p / t if t else math.inf for p, t in zip(row["prob ability"], thresholds, strict=True)]
            assert row["pre.diction"] == scaled.index(max(scaled)) == model.predict(row[VECTOR])
    assert not flower_model.isSet("thresholds")


def test_thresholds_of_a_wrong_length_are_refused(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    model = flower_model.copy({flower_model.thresholds: [0.5, 0.5]})
    with pytest.raises(ConfigError, match=r"thresholds has 2 values for 3 classes\. Give one per class"):
        model.transform(flowers)


def test_an_empty_name_switches_an_output_off(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    model = flower_model.copy({flower_model.rawPredictionCol: "", flower_model.probabilityCol: ""})
    found = model.transform(flowers)
    assert found.columns == [*flowers.columns, "pre.diction"]
    expected = plain(flower_model.module, flower_tensor()).argmax(1).tolist()
    assert [row["pre.diction"] for row in in_order(found.select("id", "`pre.diction`"))] == expected
    silent = model.copy({model.predictionCol: ""})
    assert silent.transform(flowers).columns == flowers.columns


def test_an_empty_dataframe_is_transformed(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    found = flower_model.transform(flowers.where("id < 0"))
    assert found.columns[-3:] == ["rawPrediction", "prob ability", "pre.diction"]
    assert found.drop("gap").collect() == []


def test_output_columns_that_exist_are_refused_at_transform(
    flower_model: TorchClassificationModel, flowers: DataFrame
) -> None:
    message = "Output column 'pre.diction' exists already in the DataFrame. Drop it, or name another output column"
    with pytest.raises(ConfigError, match=message):
        flower_model.transform(flowers.withColumn("pre.diction", F.lit(1)))


def test_a_missing_features_column_is_refused_at_transform(
    flower_model: TorchClassificationModel, flowers: DataFrame
) -> None:
    with pytest.raises(ConfigError, match=r"featuresCol='my\.features' is not a column\. The DataFrame has id"):
        flower_model.transform(flowers.select("id"))


def test_transform_starts_no_job_and_is_pruned_where_its_output_is_not_used(
    spark: SparkSession,
    flower_model: TorchClassificationModel,
    flowers: DataFrame,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with job_ids(spark, "transform alone") as jobs:
        found = flower_model.transform(flowers)
        found.select("id").explain()
        unused = capsys.readouterr().out
        found.select("id", "`pre.diction`", "rawPrediction", "`prob ability`").explain()
        used = capsys.readouterr().out
    assert jobs == []
    assert "EvalPython" not in unused
    assert len(re.findall(r"EvalPython", used)) == 1, "three outputs come from one pass over the rows"


def test_only_needed_columns_cross_to_python(flower_model: TorchClassificationModel, flowers: DataFrame) -> None:
    """An interval has no place in Arrow: a row that carries one fails as soon as it crosses. (fit met it, too.)"""
    with pytest.raises(PySparkException, match=r"(?i)interval"):
        flowers.select("gap").toArrow()
    found = flower_model.transform(flowers).selectExpr("id", "gap", "`pre.diction`")
    # The cast stays above the Python evaluation, which the filter on its result keeps in place.
    shown = found.where("`pre.diction` >= 0").selectExpr("id", "cast(gap as string) text")
    rows = shown.collect()
    assert len(rows) == FLOWERS
    assert {row["text"] for row in rows} == {"1 days"}


# ---- two classes -----------------------------------------------------------------------------------------------------
PAIRS = 24


def pair(id_: int) -> tuple[list[float], list[float], float, int]:
    return [id_ / PAIRS, -1.0], [0.1 * (id_ % 4), 0.2, math.cos(id_)], 0.01 * id_, id_ % 5


@pytest.fixture(scope="module")
def pairs(spark: SparkSession) -> DataFrame:
    rows = []
    for id_ in range(PAIRS):
        vector, array, number, place = pair(id_)
        rows.append((Vectors.dense(vector), array, number, place, id_, id_ % 2))
    ddl = "array array<float>, number double, place int, id long, label long"
    return with_vectors(spark, rows, "vector", ddl)


def pair_tensors() -> tuple[Tensor, ...]:
    vectors, arrays, numbers, places = zip(*map(pair, range(PAIRS)), strict=True)
    return torch.tensor(vectors), torch.tensor(arrays), torch.tensor(numbers)[:, None], torch.tensor(places)


def test_two_logits_from_several_inputs_in_order(pairs: DataFrame) -> None:
    model = TorchClassifier(
        module=FourInputs, inputCols=["vector", "array", "number", "place"], batchSize=10, **QUIET
    ).fit(pairs)
    found = model.transform(pairs)
    rows = in_order(found)
    scores = plain(model.module, *pair_tensors())
    assert_rows_close([row["rawPrediction"] for row in rows], scores)
    assert_rows_close([row["probability"] for row in rows], scores.softmax(1))
    assert [row["prediction"] for row in rows] == scores.argmax(1).double().tolist()
    assert (model.numClasses, model.numFeatures) == (2, 7)
    vector, array, number, place = pair(7)
    assert model.predict((Vectors.dense(vector), array, number, place)) == rows[7]["prediction"]
    assert 0 <= BinaryClassificationEvaluator().evaluate(found) <= 1


@pytest.fixture(scope="module")
def one_logit_model(pairs: DataFrame) -> TorchClassificationModel:
    """From a function, and of a module that learns only from the data how wide its input is."""
    arrays = pairs.select("id", F.col("array").cast("array<double>").alias("features"), F.col("label").cast("int"))
    return TorchClassifier(module=lambda: nn.LazyLinear(1), batchSize=10, **QUIET).fit(arrays)


def test_one_logit_is_the_score_of_class_one(one_logit_model: TorchClassificationModel, pairs: DataFrame) -> None:
    model = one_logit_model
    found = model.transform(pairs.withColumnRenamed("array", "features"))
    rows = in_order(found)
    logits = plain(model.module, pair_tensors()[1])[:, 0].double()
    assert_rows_close([row["rawPrediction"] for row in rows], torch.stack([-logits, logits], 1))
    assert_rows_close([row["probability"] for row in rows], torch.stack([(-logits).sigmoid(), logits.sigmoid()], 1))
    assert [row["prediction"] for row in rows] == (logits > 0).double().tolist()
    assert (model.numClasses, model.numFeatures) == (2, 3)
    assert type(model.module) is nn.Linear, "the lazy layer knows its shape, and can be saved"
    assert model.predict(pair(5)[1]) == rows[5]["prediction"]
    assert_rows_close([model.predictRaw(pair(5)[1])], [rows[5]["rawPrediction"].toArray()])
    assert 0 <= BinaryClassificationEvaluator().evaluate(found) <= 1


def test_a_lazy_module_from_a_fit_is_saved_and_loaded(one_logit_model: TorchClassificationModel, tmp_path: Any) -> None:
    path = str(tmp_path / "model")
    one_logit_model.save(path)
    loaded = TorchClassificationModel.load(path)
    inputs = pair_tensors()[1]
    torch.testing.assert_close(plain(loaded.module, inputs), plain(one_logit_model.module, inputs))


# ---- regression ------------------------------------------------------------------------------------------------------
HOUSES = 11
LEARNING_RATE = 0.05
MOMENTUM = 0.9


def house(id_: int) -> tuple[float, int, float]:
    """Size, price and weight."""
    return 0.2 * id_ - 1, 3 * id_ % 7, float(id_ % 3)


def trained_by_hand(module: nn.Module, epochs: int) -> tuple[nn.Module, list[float]]:
    """The module after some steps of SGD on the weighted mean over all rows, and the loss before each step."""
    sizes, prices, weights = (
        torch.tensor([house(id_)[place] for id_ in range(HOUSES)], dtype=torch.float32) for place in range(3)
    )
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    losses = []
    for _ in range(epochs):
        loss = (weights * (module(sizes[:, None])[:, 0] - prices) ** 2).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return module.eval(), losses


@pytest.fixture(scope="module")
def house_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.fixture(scope="module")
def houses(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(
        [(id_, *house(id_)) for id_ in range(HOUSES)], "id int, size double, price int, w double"
    ).coalesce(2)


def house_regressor(module: nn.Module, **params: Any) -> TorchRegressor:
    return TorchRegressor(
        module=module,
        optimizer="sgd",
        learningRate=LEARNING_RATE,
        optimizerParams={"momentum": MOMENTUM},
        maxEpochs=2,
        featuresCol="size",
        labelCol="price",
        numTrainWorkers=2,
        verbose=False,
        **params,
    )


@pytest.fixture(scope="module")
def house_model(house_net: nn.Module, houses: DataFrame) -> TorchRegressionModel:
    return house_regressor(house_net, weightCol="w").fit(houses)


def test_row_weights_learning_rate_and_optimizer_params_reach_every_step(
    house_model: TorchRegressionModel, house_net: nn.Module
) -> None:
    expected, losses = trained_by_hand(house_net, 2)
    assert_same_weights(house_model.module, expected, rtol=1e-5, atol=1e-6)
    assert [record["loss"] for record in house_model.history] == pytest.approx(losses, rel=1e-5)


def test_a_row_of_weight_two_counts_as_two_rows_and_micro_batches_change_nothing(
    house_net: nn.Module, houses: DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    repeated = houses.withColumn("copy", F.explode(F.sequence(F.lit(0), F.lit(2)))).where("copy < w")
    assert repeated.count() == sum(house(id_)[2] for id_ in range(HOUSES))
    with caplog.at_level(logging.INFO, logger="sparkdl"):
        model = house_regressor(house_net, microBatchSize=2).fit(repeated)
    expected, losses = trained_by_hand(house_net, 2)
    assert_same_weights(model.module, expected, rtol=1e-5, atol=1e-6)
    assert [record["loss"] for record in model.history] == pytest.approx(losses, rel=1e-5)
    assert "2 of 4 slots used" in caplog.text
    assert "256 = 2 x 128" in caplog.text
    assert "cpu" in caplog.text


def test_a_regressor_writes_one_double_per_row(house_model: TorchRegressionModel, houses: DataFrame) -> None:
    found = house_model.transform(houses)
    assert found.schema["prediction"].dataType.simpleString() == "double"
    rows = in_order(found)
    expected = plain(house_model.module, torch.tensor([[house(id_)[0]] for id_ in range(HOUSES)]))[:, 0]
    assert_rows_close([row["prediction"] for row in rows], expected)
    assert house_model.predict(house(4)[0]) == pytest.approx(rows[4]["prediction"], rel=1e-6)
    assert house_model.numTargets == 1
    error = RegressionEvaluator(labelCol="price", metricName="mse").evaluate(found)
    assert error == pytest.approx(np.mean([(row["prediction"] - row["price"]) ** 2 for row in rows]))


def test_a_regressor_of_several_targets_writes_an_array_of_doubles(pairs: DataFrame) -> None:
    targets = pairs.select("id", "array", F.array("number", F.lit(1.0)).alias("label"))
    model = TorchRegressor(module=nn.Linear(3, 2), featuresCol="array", batchSize=5, **QUIET).fit(targets)
    found = model.transform(targets)
    assert found.schema["prediction"].dataType.simpleString() == "array<double>"
    rows = in_order(found)
    assert_rows_close([row["prediction"] for row in rows], plain(model.module, pair_tensors()[1]))
    assert model.numTargets == 2
    assert model.predict(pair(3)[1]) == pytest.approx(rows[3]["prediction"], rel=1e-6, abs=1e-6)


# ---- any module, any loss --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two_heads_model(pairs: DataFrame) -> TorchModel:
    """On two ranks, with BatchNorm, a layer that is never used, and two labels for two outputs."""
    labelled = pairs.select("array", F.array("number", "number").alias("numbers"), (F.col("id") % 3).alias("kind"))
    return TorchEstimator(
        module=TwoHeads(),
        loss=loss_of_two_heads,
        featuresCol="array",
        labelCols=["numbers", "kind"],
        outputCols=["numbers found", "scores.found"],
        batchSize=8,
        numTrainWorkers=2,
        **QUIET,
    ).fit(labelled)


def test_several_labels_and_outputs(two_heads_model: TorchModel, pairs: DataFrame) -> None:
    model = two_heads_model
    found = model.transform(pairs)
    assert found.columns == [*pairs.columns, "numbers found", "scores.found"]
    assert found.schema["numbers found"].dataType.simpleString() == "array<float>"
    rows = in_order(found)
    numbers, scores = plain(model.module, pair_tensors()[1])
    assert_rows_close([row["numbers found"] for row in rows], numbers)
    assert_rows_close([row["scores.found"] for row in rows], scores)


def test_several_outputs_of_one_row(two_heads_model: TorchModel, pairs: DataFrame) -> None:
    row = in_order(two_heads_model.transform(pairs))[2]
    found = two_heads_model.predict(pair(2)[1])
    assert len(found) == 2
    assert_rows_close([found[0]], [row["numbers found"]])
    assert_rows_close([found[1]], [row["scores.found"]])


def test_batch_norm_learns_and_unused_parameters_do_not(two_heads_model: TorchModel) -> None:
    trained, fresh = two_heads_model.module, TwoHeads()
    assert int(trained.norm.num_batches_tracked) == 3
    assert not torch.equal(trained.norm.running_mean, fresh.norm.running_mean)
    assert trained.norm.running_mean.isfinite().all()
    assert all(value.grad is None for value in trained.parameters())


def test_the_wrong_number_of_output_columns_is_refused(two_heads_model: TorchModel, pairs: DataFrame) -> None:
    model = two_heads_model.copy({two_heads_model.outputCols: ["one"]})
    with pytest.raises(PySparkException, match=r"The module returned 2 outputs, but 1 output columns are named"):
        model.transform(pairs).collect()


def test_a_loss_and_an_optimizer_that_are_functions_on_staged_rows(
    pairs: DataFrame, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs.select("id", "vector", F.col("array").alias("label"))
    module = nn.Linear(2, 3)
    with caplog.at_level(logging.INFO, logger="sparkdl"):
        model = TorchEstimator(
            module=module,
            loss=absolute_error,
            optimizer=make_sgd,
            featuresCol="vector",
            outputCol="found",
            stagingDir=str(tmp_path / "staging"),
            **QUIET,
        ).fit(rows)
    vectors, arrays, *_ = pair_tensors()
    expected = copy.deepcopy(module)
    loss = absolute_error(expected(vectors), arrays)
    loss.backward()
    make_sgd(expected.parameters()).step()
    assert_same_weights(model.module, expected, rtol=1e-5, atol=1e-6)
    assert model.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert model.summary.staged
    assert "1 of 4 slots used" in caplog.text

    found = model.transform(rows)
    assert found.schema["found"].dataType.simpleString() == "array<float>"
    outputs = plain(model.module, vectors)
    assert_rows_close([row["found"] for row in in_order(found)], outputs)
    assert model.predict(Vectors.dense(pair(4)[0])) == pytest.approx(outputs[4].tolist(), rel=1e-6, abs=1e-6)


# ---- among Spark's own -----------------------------------------------------------------------------------------------
# CrossValidator leaves its pool of threads to the garbage collector, which complains of it.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <function Pool.__del__:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings("ignore:unclosed running multiprocessing pool:ResourceWarning")
def test_cross_validation_over_a_grid(pairs: DataFrame) -> None:
    rows = pairs.select("array", "label")
    classifier = TorchClassifier(module=nn.Linear(3, 2), featuresCol="array", **QUIET)
    validator = CrossValidator(
        estimator=classifier,
        estimatorParamMaps=ParamGridBuilder().addGrid(classifier.learningRate, [0.02]).build(),
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=2,
        seed=1,
    )
    found = validator.fit(rows)
    gc.collect()
    assert 0 <= found.avgMetrics[0] <= 1
    assert isinstance(found.bestModel, TorchClassificationModel)
    assert found.transform(rows).count() == PAIRS


def test_params_are_sparks_own() -> None:
    classifier = TorchClassifier(module=nn.Linear(1, 2))
    for mixin in (
        shared.HasNumTrainWorkers,
        shared.HasBatchSize,
        shared.HasLearningRate,
        shared.HasSeed,
        shared.HasFeaturesCol,
        shared.HasInputCols,
        shared.HasLabelCol,
        shared.HasWeightCol,
        shared.HasValidationIndicatorCol,
        shared.HasPredictionCol,
        shared.HasProbabilityCol,
        shared.HasRawPredictionCol,
        shared.HasThresholds,
    ):
        assert isinstance(classifier, mixin)
    regressor = TorchRegressor(module=nn.Linear(1, 1))
    for name in ("thresholds", "probabilityCol", "rawPredictionCol"):
        assert not regressor.hasParam(name)
    assert TorchEstimator(module=nn.Linear(1, 1), loss="mse").getOutputCol() == "output"


@pytest.mark.parametrize("kind", [TorchClassifier, TorchRegressor, TorchEstimator])
def test_every_param_has_doc_getter_and_setter(kind: Callable[..., Any]) -> None:
    estimator = kind(module=nn.Linear(1, 1))
    for param in estimator.params:
        title = param.name[0].upper() + param.name[1:]
        assert len(param.doc) > 10
        assert f"{param.name}: " in estimator.explainParams()
        value = estimator.getOrDefault(param) if estimator.isDefined(param) else None
        if value is not None:
            assert getattr(estimator, f"get{title}")() == value
            assert getattr(estimator, f"set{title}")(value) is estimator
            assert estimator.isSet(param)


def test_defaults_are_the_documented_ones() -> None:
    classifier = TorchClassifier(module=nn.Linear(1, 2))
    values = {param.name: classifier.getOrDefault(param) for param in classifier.params if classifier.isDefined(param)}
    assert values.pop("module") is not None
    assert {name: value for name, value in values.items() if value is not None} == {
        "loss": "cross_entropy",
        "optimizer": "adamw",
        "learningRateScaling": "none",
        "baseBatchSize": 256,
        "schedulerInterval": "epoch",
        "warmupSteps": 0,
        "precision": "32",
        "averaging": "none",
        "averagingDecay": 0.999,
        "averagingStart": 1,
        "frozenParameters": [],
        "activationCheckpointing": [],
        "syncBatchNorm": False,
        "torchCompile": False,
        "nonFinite": "stop",
        "monitorMode": "auto",
        "earlyStoppingMinDelta": 0.0,
        "restoreBest": False,
        "maxEpochs": 10,
        "batchSize": 256,
        "shuffle": "window",
        "seed": 0,
        "balanceShards": False,
        "cache": "auto",
        "nulls": "error",
        "standardization": False,
        "featuresCol": "features",
        "labelCol": "label",
        "predictionCol": "prediction",
        "probabilityCol": "probability",
        "rawPredictionCol": "rawPrediction",
        "strategy": "ddp",
        "numTrainWorkers": 1,
        "device": "auto",
        "keepCheckpoints": 3,
        "maxRestarts": 3,
        "allowUnencryptedTraffic": False,
        "verbose": True,
    }
    assert TorchRegressor(module=nn.Linear(1, 1)).getLoss() == "mse"
