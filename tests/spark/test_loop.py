"""The training loop through the Estimators: what is set arrives in the ranks, and what they find comes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import Tensor, nn

from sparkdl import Callback, RunView, TorchClassificationModel, TorchClassifier, TorchEstimator, TorchRegressor
from sparkdl.config import TrainConfig
from sparkdl.errors import CallbackError, ConfigError, DataError, TrainingFailedError
from sparkdl.tracking import TensorBoard, read_events

pytestmark = [pytest.mark.spark, pytest.mark.timeout(200)]

ROWS = 300


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    """Three classes by two features, a number to regress on, and a third of the rows held out."""
    random = np.random.default_rng(5)
    features = random.normal(size=(ROWS, 2))
    noise = random.normal(size=ROWS)
    frame = pd.DataFrame(
        {
            "id": range(ROWS),
            "x": list(features),
            "a": features[:, 0],
            "b": features[:, 1],
            "label": np.clip((features.sum(1) + 0.4 * noise + 1.5) // 1, 0, 2).astype(int),
            "number": features @ [2.0, -1.0] + 0.1 * noise,
            "held_out": np.arange(ROWS) % 3 == 0,
        }
    )
    made = spark.createDataFrame(frame).withColumn("features", array_to_vector("x")).drop("x")
    return made.repartition(3, "id")


def mlp(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, outputs))


def both_losses(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two inputs, two outputs, two losses."""
    found = module(torch.cat([batch["a"], batch["b"]], 1))
    classes = nn.functional.cross_entropy(found[:, :3], batch["label"])
    numbers = (found[:, 3] - batch["number"]).square()
    return {"loss": classes + numbers, "classes": classes, "numbers": numbers}


def two_outputs(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = module(torch.cat([batch["a"], batch["b"]], 1))
    return found[:, :3], found[:, 3:]


def adam_and_rates(module: nn.Module) -> tuple[list[Any], list[Any]]:
    adam = torch.optim.Adam(module.parameters(), lr=0.05)
    return [adam], [torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)]


class Fragile(Callback):
    """Fails when the second epoch ends."""

    def on_epoch_end(self, run: RunView) -> None:
        if run.epoch == 2:
            raise RuntimeError("no more")


class NaNRow(nn.Module):
    """Gives no number for rows with a certain value."""

    def __init__(self, marked: float) -> None:
        super().__init__()
        self.inner, self.marked = mlp(1), marked

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features)[:, 0]
        return torch.where(features[:, 0] == self.marked, torch.nan, found)


@pytest.fixture(scope="module")
def watched(rows: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> TorchClassificationModel:
    """A classifier fitted with nearly everything that the loop has."""
    folder = tmp_path_factory.mktemp("watched")
    return TorchClassifier(
        module=mlp(),
        maxEpochs=4,
        batchSize=32,
        learningRate=0.05,
        numTrainWorkers=2,
        scheduler="CosineAnnealingLR",
        warmupSteps=4,
        gradientClipNorm=1.0,
        precision="bf16",
        validationIndicatorCol="held_out",
        metrics=["accuracy", "f1", "auroc", "log_loss", "precision", "recall"],
        restoreBest=True,
        trackers=[TensorBoard(str(folder / "board"))],
        trackingDir=str(folder / "events"),
        verbose=False,
    ).fit(rows)


# ---- validation ------------------------------------------------------------------------------------------------------
def test_metrics_are_those_of_sparks_evaluators_on_the_transformed_validation_rows(
    watched: TorchClassificationModel, rows: DataFrame
) -> None:
    predicted = watched.transform(rows.filter("held_out"))
    best = watched.history[watched.summary.bestEpoch - 1]
    for name, spark_name in {
        "accuracy": "accuracy",
        "f1": "f1",
        "precision": "weightedPrecision",
        "recall": "weightedRecall",
        "log_loss": "logLoss",
    }.items():
        expected = MulticlassClassificationEvaluator(metricName=spark_name).evaluate(predicted)
        # The ranks validate in mixed precision, transform does not.
        assert best[f"validation_{name}"] == pytest.approx(expected, abs=0.011), name


def test_numbers_and_areas_are_those_of_sparks_evaluators(rows: DataFrame) -> None:
    fitted = TorchRegressor(
        module=mlp(1), labelCol="number", maxEpochs=2, validationDataset=rows.filter("held_out"), numTrainWorkers=2,
        batchSize=32, metrics=["rmse", "mae", "r2"], learningRate=0.05, verbose=False,
    ).fit(rows.filter("not held_out"))  # fmt: skip
    predicted = fitted.transform(rows.filter("held_out"))
    for name in ("rmse", "mae", "r2"):
        expected = RegressionEvaluator(labelCol="number", metricName=name).evaluate(predicted)
        assert fitted.history[-1][f"validation_{name}"] == pytest.approx(expected, rel=1e-4)
    two = rows.withColumn("label", F.least("label", F.lit(1)))
    binary = TorchClassifier(
        module=mlp(1), maxEpochs=2, validationIndicatorCol="held_out", metrics=["auroc"], batchSize=32, verbose=False
    ).fit(two)
    area = BinaryClassificationEvaluator(numBins=0).evaluate(binary.transform(two.filter("held_out")))
    assert binary.history[-1]["validation_auroc"] == pytest.approx(area, abs=1e-4)


def test_the_best_weights_come_back(watched: TorchClassificationModel) -> None:
    losses = [record["validation_loss"] for record in watched.history]
    assert watched.summary.bestEpoch == losses.index(min(losses)) + 1


def test_what_looks_at_validation_rows_needs_some(rows: DataFrame) -> None:
    estimator = TorchClassifier(module=mlp(), validationIndicatorCol="none", metrics=["accuracy"], maxEpochs=1)
    with pytest.raises(
        DataError, match=r"'none' is true in no row, but metrics needs validation rows. Check how it is"
    ):
        estimator.fit(rows.withColumn("none", F.lit(False)))
    with pytest.raises(ConfigError, match=r"metrics=\['accuracy'\] needs validation rows, but none are held out"):
        TorchClassifier(module=mlp(), metrics=["accuracy"]).fit(rows)
    with pytest.raises(ConfigError, match="monitor='validation_loss' needs validation rows, but none are held out"):
        TorchClassifier(module=mlp(), monitor="validation_loss").fit(rows)


# ---- what is told ----------------------------------------------------------------------------------------------------
def test_the_history_is_a_list_a_data_frame_and_a_picture(watched: TorchClassificationModel) -> None:
    frame = watched.history.toPandas()
    assert list(frame["epoch"]) == [1, 2, 3, 4]
    assert frame["learning_rate"].is_monotonic_decreasing
    assert len(watched.plot_history().axes) >= 3


def test_the_summary_says_where_the_time_went(watched: TorchClassificationModel) -> None:
    summary = watched.summary
    assert set(summary.timeSplit) == {"data", "compute", "synchronisation", "validation", "checkpoint"}
    assert 0 < sum(summary.timeSplit.values()) < summary.seconds
    assert len(summary.rankSeconds) == len(summary.rankMemory) == 2
    assert all(memory > 50 << 20 for memory in summary.rankMemory)
    assert summary.rankMicroBatchSize == (None, None)
    assert summary.rowsPerSecond > 0


def test_events_are_written_to_json_lines(watched: TorchClassificationModel) -> None:
    events = read_events(watched.summary.events or "")
    assert events[0]["event"] == "start"
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2, 3, 4]
    assert events[-1]["event"] == "end"
    board = Path(watched.summary.events or "").parents[1] / "board"
    assert list(board.rglob("events.out.tfevents.*"))


def test_what_is_no_number_survives_saving(watched: TorchClassificationModel, tmp_path: Path) -> None:
    watched.history[0]["odd"] = float("nan")
    try:
        watched.write().save(str(tmp_path / "model"))
    finally:
        del watched.history[0]["odd"]
    metadata = "".join(part.read_text() for part in (tmp_path / "model" / "metadata").glob("part-*"))
    json.loads(metadata, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    assert np.isnan(loaded.history[0]["odd"])
    assert loaded.summary == watched.summary
    assert loaded.history.toPandas().equals(watched.history.toPandas().assign(odd=loaded.history.toPandas()["odd"]))


# ---- steps of one's own ----------------------------------------------------------------------------------------------
def test_a_training_step_with_two_inputs_outputs_and_losses(rows: DataFrame, tmp_path: Path) -> None:
    estimator = TorchEstimator(
        module=mlp(4),
        trainingStep=both_losses,
        predictionStep=two_outputs,
        configure=adam_and_rates,
        inputCols=["a", "b"],
        labelCols=["label", "number"],
        outputCols=["classes", "value"],
        validationIndicatorCol="held_out",
        maxEpochs=3,
        batchSize=32,
        numTrainWorkers=2,
        verbose=False,
    )
    model = estimator.fit(rows)
    record = model.history[-1]
    assert record["loss"] == pytest.approx(record["classes"] + record["numbers"], rel=1e-4)
    assert record["validation_loss"] == pytest.approx(
        record["validation_classes"] + record["validation_numbers"], rel=1e-4
    )
    assert record["learning_rate"] == pytest.approx(0.05 * 0.5**2)
    assert model.history[-1]["loss"] < model.history[0]["loss"]
    first = model.transform(rows).orderBy("id").first()
    assert first is not None
    assert (len(first["classes"]), len(first["value"])) == (3, 1)
    one = model.predict((np.array([first["a"]], "float32"), np.array([first["b"]], "float32")))
    assert one[0] == pytest.approx(first["classes"], rel=1e-4)


def test_a_step_and_a_loss_exclude_each_other(rows: DataFrame) -> None:
    with pytest.raises(ConfigError, match="loss='mse' and trainingStep are both set"):
        TorchRegressor(module=mlp(1), loss="mse", trainingStep=both_losses).fit(rows)
    with pytest.raises(ConfigError, match="trainingStep=3 is not a function"):
        TorchEstimator(module=mlp(1), trainingStep=3).fit(rows)


# ---- looking for a learning rate -------------------------------------------------------------------------------------
def test_a_learning_rate_is_suggested_that_makes_the_loss_fall(rows: DataFrame) -> None:
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    estimator = TorchClassifier(
        module=module, optimizer="sgd", batchSize=32, numTrainWorkers=2, scheduler="StepLR",
        schedulerParams={"step_size": 1}, verbose=False,
    )  # fmt: skip
    search = estimator.findLearningRate(rows, start=1e-4, end=100.0, numSteps=60)
    assert search.learning_rates[0] == 1e-4
    assert len(search.learning_rates) == len(search.losses) <= 60
    assert 0.01 < (search.suggestion or 0.0) < 10
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert search.plot().axes
    with pytest.raises(ConfigError, match=r"start=1\.0 and end=1\.0 are no range of learning rates"):
        estimator.findLearningRate(rows, start=1.0, end=1.0)


# ---- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_callback_that_raises_ends_the_fit_and_is_named(rows: DataFrame) -> None:
    with pytest.raises(
        CallbackError, match=r"The callback Fragile failed in on_epoch_end, on rank \d after step \d+: Run"
    ):
        TorchClassifier(
            module=mlp(), callbacks=[Fragile()], maxEpochs=3, numTrainWorkers=2, batchSize=64, verbose=False
        ).fit(rows)
    with pytest.raises(
        ConfigError, match=r"callbacks holds <class .*Fragile'>, which is no callback. Give an instance"
    ):
        TorchClassifier(module=mlp(), callbacks=[Fragile]).fit(rows)


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_rows_or_is_left_out(rows: DataFrame) -> None:
    marked = float(np.float32(rows.orderBy("id").first()["a"]))  # type: ignore[index]
    settings: dict[str, Any] = {
        "module": NaNRow(marked), "loss": "mse", "labelCol": "number", "batchSize": 20, "numTrainWorkers": 2,
        "maxEpochs": 2, "verbose": False,
    }  # fmt: skip
    with pytest.raises(
        TrainingFailedError,
        match=r"is nan in step \d+ \(epoch 1, step \d+\), on rank (\d), which had rows \d+ to \d+ of shard \1, in",
    ):
        TorchRegressor(**settings).fit(rows)
    model = TorchRegressor(nonFinite="skip", **settings).fit(rows)
    assert [record["skipped_steps"] for record in model.history] == [1, 1]
    assert model.history[1]["loss"] < model.history[0]["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "8"}, "precision='8' is not known. Use one of 32, bf16, 16"),
        ({"gradientClipNorm": 0.0}, "gradientClipNorm=0 leaves no gradient"),
        ({"averagingStart": 2}, "averagingStart=2 is set, but nothing is averaged"),
        ({"averaging": "ema", "averagingStart": 9, "maxEpochs": 2}, "is after the last epoch"),
        ({"averaging": "ema", "averagingDecay": 1.0}, "averagingDecay=1 is not the part"),
        ({"frozenParameters": ["nothing"]}, "frozenParameters: 'nothing' matches no parameter. There are 0.weight"),
        ({"frozenParameters": [""]}, "leave no parameter of Sequential to train"),
        ({"activationCheckpointing": ["["]}, "is no regular expression"),
        ({"activationCheckpointing": ["block"]}, "'block' matches no submodule. There are 0, 1, 2"),
        ({"syncBatchNorm": True}, "syncBatchNorm=True, but Sequential has no BatchNorm layer"),
        ({"scheduler": "CosineAnealing"}, "is unknown|is not known"),
        ({"schedulerParams": {"gamma": 1}}, "schedulerParams=.* are set, but there is no scheduler"),
        ({"scheduler": "StepLR", "configure": adam_and_rates}, "scheduler and configure are both set"),
        ({"optimizer": "sgd", "configure": adam_and_rates}, "optimizer='sgd' and configure are both set"),
        ({"parameterGroups": {"nothing": {"lr": 1.0}}}, "nothing"),
        ({"metrics": ["accuray"]}, "accuray"),
        ({"trackers": [3]}, "trackers holds 3, which is no tracker"),
        ({"callbacks": [3]}, "callbacks holds 3, which is no callback"),
        ({"trackingDir": "here"}, "trackingDir='here' is relative"),
        ({"earlyStoppingPatience": 0}, "earlyStoppingPatience=0 is too small"),
        (
            {"module": nn.Linear(2, 3).double(), "precision": "bf16"},
            "has no effect on Linear, which computes in float64",
        ),
    ],
)
def test_settings_that_make_no_sense_are_found_before_any_job(
    rows: DataFrame, settings: dict[str, Any], message: str
) -> None:
    tracker = rows.sparkSession.sparkContext.statusTracker()
    before = len(tracker.getJobIdsForGroup(None))
    with pytest.raises(ConfigError, match=message):
        TorchClassifier(**{"module": mlp(), "verbose": False, **settings}).fit(rows)
    assert len(tracker.getJobIdsForGroup(None)) == before


def test_every_setting_of_the_loop_is_a_param() -> None:
    made: Callable[..., Any] = TorchClassifier
    assert made(precision="bf16", warmupSteps=3).train_config() == TrainConfig(precision="bf16", warmup_steps=3)
