"""LightningModules and transformers' modules train through the Estimators as their own libraries train them."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning
import torch
from pyspark.sql import DataFrame, SparkSession
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from sparkdl import TorchClassificationModel, TorchClassifier, TorchEstimator, TorchModel, adapters
from sparkdl.adapters import hugging_face
from sparkdl.adapters import lightning as lightning_module
from sparkdl.errors import ConfigError, PersistenceError
from sparkdl.schedule import Schedule

pytestmark = [pytest.mark.spark, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
ROWS, HELD_OUT, EPOCHS = 120, 40, 5


# ---- modules ---------------------------------------------------------------------------------------------------------
class Net(lightning.LightningModule):
    """Three classes of two features, in the style of Lightning's own examples."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({"train_acc": (scores.argmax(1) == y).float().mean()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self(x)
        self.log("val_loss", nn.functional.cross_entropy(scores, y) + 1)
        self.log("val_acc", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.7)}}


class OwnNames(Net):
    """Logs other things of validation rows than of training rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_seen", 1.0)
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class ByName(pytorch_lightning.LightningModule):
    """Two numbers of two columns; one of its layers is never used."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.weigh = nn.Linear(2, 1)
        self.idle = nn.Linear(5, 5)

    def training_step(self, batch: Any) -> Any:
        errors = (self.weigh(torch.cat([batch["a"], batch["b"]], 1))[:, 0] - batch["number"]).square()
        return {"loss": errors.mean(), "size": errors.detach().abs().mean(), "errors": errors}

    def predict_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> Any:
        return 2 * self.weigh(torch.cat([batch["a"], batch["b"]], 1))

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.9), "interval": "step"}]


class Freely(Net):
    """Takes its steps from what it is given."""

    def __init__(self, *, made: Any = None, trains: Any = None, validates: Any = None) -> None:
        super().__init__()
        self.made, self.trains, self.validates = made, trains, validates

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.trains(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.validates(self, batch)

    def configure_optimizers(self) -> Any:
        return self.made(Adam(self.parameters()))


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Alternating(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:  # type: ignore[override]
        return super().training_step(batch, batch_idx)


class Hooked(Net):
    def on_train_start(self) -> None:
        raise AssertionError("nobody calls this")

    def optimizer_step(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nobody calls this")


class Bare(lightning.LightningModule):
    def training_step(self, batch: Any, *rest: Any) -> Any:
        assert rest == (0,)
        return batch.mean()


def tiny_bert(kind: Any, **options: Any) -> Any:
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(config)


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def points() -> pd.DataFrame:
    random = np.random.default_rng(4)
    features = random.normal(size=(ROWS + HELD_OUT, 2)).astype(np.float32)
    noise = random.normal(size=len(features))
    return pd.DataFrame(
        {
            "id": range(len(features)),
            "x": list(features),
            "a": features[:, 0],
            "b": features[:, 1],
            "y": np.clip((features.sum(1) + 0.4 * noise + 1.5) // 1, 0, 2).astype(int),
            "number": (features @ [2.0, -1.0]).astype(np.float32),
            "held_out": np.arange(len(features)) >= ROWS,
        }
    )


@pytest.fixture(scope="module")
def rows(spark: SparkSession, points: pd.DataFrame) -> DataFrame:
    schema = "id long, x array<float>, a float, b float, y long, number float, held_out boolean"
    return spark.createDataFrame(points, schema).repartition(2, "id")


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    """Sentences of up to six tokens, whose class is whether the token 7 occurs."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 10, (ROWS, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (ROWS, 1), generator=generator)).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids == 7).any(1).long()}


@pytest.fixture(scope="module")
def sentences(spark: SparkSession, tokens: dict[str, Tensor]) -> DataFrame:
    frame = pd.DataFrame(
        {
            "id": range(ROWS),
            "input_ids": tokens["input_ids"].tolist(),
            "attention_mask": tokens["attention_mask"].tolist(),
            "labels": tokens["labels"].tolist(),
            "marks": (tokens["input_ids"] == 7).long().tolist(),
        }
    )
    schema = "id long, input_ids array<int>, attention_mask array<int>, labels int, marks array<int>"
    return spark.createDataFrame(frame, schema).repartition(2, "id")


def state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


# ---- Lightning -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def classifier(rows: DataFrame) -> TorchClassificationModel:
    """Trained by two ranks in steps of all rows."""
    return TorchClassifier(
        **lightning_module(Net()),
        inputCols=["x"],
        labelCol="y",
        validationIndicatorCol="held_out",
        batchSize=ROWS,
        maxEpochs=EPOCHS,
        numTrainWorkers=2,
        metrics=["accuracy"],
        verbose=False,
    ).fit(rows)


# Of Lightning's Trainer, which is here to compare with.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_lightning_module_trains_as_with_lightnings_trainer(
    classifier: TorchClassificationModel, points: pd.DataFrame
) -> None:
    x, y = torch.from_numpy(np.stack(points["x"])), torch.from_numpy(points["y"].to_numpy())
    module = Net()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = [DataLoader(TensorDataset(x[rows], y[rows]), len(x)) for rows in (slice(ROWS), slice(ROWS, None))]
    trainer.fit(module, *loaders)
    torch.testing.assert_close(state(classifier.module), state(module), rtol=1e-4, atol=1e-5)
    last = classifier.history[-1]
    for entry, logged in {
        "loss": "train_loss",
        "acc": "train_acc",
        "validation_loss": "val_loss",
        "validation_acc": "val_acc",
        "validation_accuracy": "val_acc",
    }.items():
        assert last[entry] == pytest.approx(float(trainer.callback_metrics[logged]), rel=1e-4), entry
    assert last["learning_rate"] == pytest.approx(0.05 * 0.7 ** (EPOCHS - 1))


def test_a_fitted_lightning_module_is_described_and_predicts_again(
    classifier: TorchClassificationModel, rows: DataFrame, points: pd.DataFrame, tmp_path: Path
) -> None:
    classifier.save(str(tmp_path / "model"))
    loaded = TorchClassificationModel.load(str(tmp_path / "model"))
    assert isinstance(loaded.module, Net)
    shown = loaded.transform(rows).orderBy("id").toPandas()["rawPrediction"]
    with torch.no_grad():
        expected = classifier.module(torch.from_numpy(np.stack(points["x"])))
    torch.testing.assert_close(torch.tensor(np.stack([row.toArray() for row in shown])).float(), expected)


def test_validation_steps_log_what_they_like(rows: DataFrame) -> None:
    model = TorchClassifier(
        **lightning_module(OwnNames()), inputCols=["x"], labelCol="y", validationIndicatorCol="held_out",
        maxEpochs=1, numTrainWorkers=2, verbose=False,
    ).fit(rows)  # fmt: skip
    record = model.history[0]
    assert record["seen"] == 1
    assert 0 < record["validation_acc"] < 1
    assert not record.keys() & {"acc", "validation_seen"}


@pytest.mark.slow
def test_steps_that_take_a_dict_of_columns(
    rows: DataFrame, points: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = TorchEstimator(
        **lightning_module(ByName(), batch="dict"),
        inputCols=["a", "b"],
        labelCols=["number"],
        validationIndicatorCol="held_out",
        batchSize=40,
        maxEpochs=4,
        numTrainWorkers=2,
        verbose=False,
    )
    model = estimator.fit(rows)
    first, last = model.history[0], model.history[-1]
    assert last["loss"] < first["loss"] / 2
    assert last["size"] == pytest.approx(last["loss"])
    assert last["validation_size"] == pytest.approx(last["validation_loss"])
    assert "errors" not in last
    assert last["learning_rate"] == pytest.approx(0.1 * 0.9**11)
    found = np.stack(model.transform(rows).orderBy("id").toPandas()["output"])
    with torch.no_grad():
        expected = 2 * model.module.weigh(torch.from_numpy(np.stack(points["x"])))  # type: ignore[operator]
    torch.testing.assert_close(torch.tensor(found), expected)

    model.save(str(tmp_path / "model"))
    estimator.save(str(tmp_path / "estimator"))
    monkeypatch.setattr("sparkdl.serialization._allowed", {"sparkdl.adapters"})
    loaded = TorchModel.load(str(tmp_path / "model"))
    row = rows.orderBy("id").first()
    assert row is not None
    assert loaded.predict((row["a"], row["b"])) == pytest.approx(found[0].tolist())
    again = TorchEstimator.load(str(tmp_path / "estimator"))
    assert again.getTrainingStep() is adapters.lightning_step_by_name
    assert again.getConfigure() is adapters.lightning_optimizers


def test_hooks_that_nobody_calls_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lightning_module(Net())
        assert not caplog.records
        lightning_module(Hooked())
    assert "Hooked overrides on_train_start, optimizer_step. Only Lightning's Trainer calls that" in caplog.text


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "Linear is no LightningModule, neither of lightning.pytorch nor of pytorch_lightning"),
        (Net(), {"batch": "list"}, "batch='list' is not known. Use 'tuple' or 'dict'"),
        (Manual(), {}, "Manual sets automatic_optimization = False and takes its optimizer steps itself"),
        (Alternating(), {}, "training_step of Alternating takes 'optimizer_idx', which is not known here"),
        (Bare(), {}, "Bare has no configure_optimizers of its own"),
    ],
)
def test_modules_that_only_lightnings_trainer_can_train_are_refused(
    module: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lightning_module(module, **options)


# ---- configure_optimizers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda one: one, [1]),
        (lambda one: [one], [1]),
        (lambda one: (one, one), [2]),
        (lambda one: {"optimizer": one}, [1]),
        (lambda one: ([one], []), [1]),
        (lambda one: ([one], [StepLR(one, 2)]), [1, ("epoch", None)]),
        (lambda one: ([one], [{"scheduler": StepLR(one, 2), "interval": "step"}]), [1, ("step", None)]),
        (
            lambda one: {"optimizer": one, "lr_scheduler": ReduceLROnPlateau(one), "monitor": "val_loss"},
            [1, ("epoch", "validation_loss")],
        ),
        (
            lambda one: {"optimizer": one, "lr_scheduler": {"scheduler": ReduceLROnPlateau(one), "monitor": "train/f"}},
            [1, ("epoch", "f")],
        ),
        (
            lambda one: [
                {"optimizer": one, "lr_scheduler": {"scheduler": OneCycleLR(one, 1.0, 9), "interval": "step"}},
                {"optimizer": one, "lr_scheduler": {"scheduler": StepLR(one, 3), "name": "rate", "frequency": 1}},
            ],
            [2, ("step", None), ("epoch", None)],
        ),
        (
            lambda one: ([one], [{"scheduler": ReduceLROnPlateau(one), "monitor": "value", "strict": False}]),
            [1, ("epoch", "value")],
        ),
    ],
)
def test_all_forms_of_configure_optimizers(made: Callable[[Any], Any], expected: list[Any]) -> None:
    optimizers, schedules = adapters.lightning_optimizers(Freely(made=made))
    assert all(isinstance(one, Adam) for one in optimizers)
    assert all(isinstance(one, Schedule) for one in schedules)
    assert [len(optimizers), *[(one.interval, one.monitor) for one in schedules]] == expected


def no_trainer(one: Any) -> Any:
    return Net().trainer.estimated_stepping_batches


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda one: None, "configure_optimizers of Freely returned None. Return an optimizer, a list"),
        (lambda one: {"lr_scheduler": StepLR(one, 1)}, "returned a dict of 'lr_scheduler'. Return"),
        (lambda one: [], "returned a list of nothing. Return"),
        (lambda one: ([one], [3]), "A schedule needs a scheduler of torch.optim.lr_scheduler, but got 3"),
        (lambda one: [{"optimizer": one, "frequency": 5}], "asks for frequency=5, but everything steps every time"),
        (lambda one: ([one], [{"scheduler": StepLR(one, 1), "frequency": 2}]), "asks for frequency=2"),
        (lambda one: ([one], [{"scheduler": StepLR(one, 1), "intervall": "step"}]), "a scheduler 'intervall', which"),
        (lambda one: ([one], [{"scheduler": StepLR(one, 1), "interval": "batch"}]), "interval='batch' is not known"),
        (lambda one: ([one], [{"scheduler": ReduceLROnPlateau(one), "interval": "step"}]), "Only ReduceLROnPlateau"),
        (lambda one: ([one], [{"scheduler": StepLR(one, 1), "reduce_on_plateau": True}]), "Only ReduceLROnPlateau"),
        (no_trainer, r"failed: RuntimeError: Net is not attached to a `Trainer`. \(There is no Trainer here"),
    ],
)
def test_what_configure_optimizers_cannot_have(made: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters.lightning_optimizers(Freely(made=made))


# ---- steps -----------------------------------------------------------------------------------------------------------
def batch_of(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.ones(rows, 2), "y": torch.zeros(rows, dtype=torch.long)}


def logs(module: Any, batch: Any) -> Any:
    module.log("val_loss", 3.0)
    module.log("count", len(batch[0]))
    module.log("train/one", torch.ones(1, requires_grad=True))
    return batch[0]


def test_where_a_gradient_is_wanted_it_is_that_of_the_training_step() -> None:
    module = Freely(trains=lambda self, batch: self(batch[0]).sum(), validates=logs).eval()
    found = adapters.lightning_step(module, batch_of())
    assert set(found) == {"loss"}
    assert found["loss"].requires_grad
    with torch.inference_mode():
        found = adapters.lightning_step(module, batch_of())
    assert found == {"loss": torch.tensor(3.0), "count": 4.0, "one": torch.tensor(1.0)}
    assert not found["one"].requires_grad
    assert "log" not in vars(module)


def test_the_loss_of_a_validation_step_is_what_it_returns_by_name_logs_or_returns() -> None:
    def both(module: Any, batch: Any) -> Any:
        module.log("val_loss", 3.0)
        return {"loss": torch.tensor(1.0), "rows": torch.zeros(4), "number": 2}

    with torch.no_grad():
        found = adapters.lightning_step(Freely(validates=both), batch_of())
        alone = adapters.lightning_step(Freely(validates=lambda self, batch: batch[0].sum()), batch_of())
    assert found == {"loss": torch.tensor(1.0), "number": 2}
    assert alone == {"loss": torch.tensor(8.0)}


def test_one_column_alone_is_its_tensor() -> None:
    assert float(adapters.lightning_step(Bare(), {"x": torch.ones(3, 2)})["loss"]) == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            lambda self, batch: None,
            "{} of Freely returned None, and so no loss. Return the loss, or a dict with 'loss'",
        ),
        (lambda self, batch: {"preds": batch[0]}, "{} of Freely returned a dict of 'preds', and so no loss"),
        (
            lambda self, batch: self.log("f1", nn.Identity()),
            r"self.log\('f1'\) got a Identity, but only single numbers",
        ),
        (lambda self, batch: self.log("all", batch[0]), r"got a Tensor of shape \(4, 2\), but only single numbers"),
        (lambda self, batch: self.log("n", 1, reduce_fx="sum"), r"self.log\('n'\) asks for reduce_fx='sum'"),
    ],
)
def test_steps_without_a_loss_or_with_odd_logs_are_refused(step: Callable[..., Any], message: str) -> None:
    module = Freely(trains=step, validates=step)
    with pytest.raises(ConfigError, match=message.format("training_step")):
        adapters.lightning_step(module, batch_of())
    hint = ", or log it as 'val_loss'" if "with 'loss'" in message else ""
    with torch.no_grad(), pytest.raises(ConfigError, match=message.format("validation_step") + hint):
        adapters.lightning_step(module, batch_of())
    assert "log" not in vars(module)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bert(sentences: DataFrame) -> TorchClassificationModel:
    return TorchClassifier(
        **hugging_face(tiny_bert(BertForSequenceClassification)),
        inputCols=["input_ids", "attention_mask"],
        labelCol="labels",
        optimizer="sgd",
        optimizerParams={"momentum": 0.9},
        learningRate=0.1,
        batchSize=ROWS,
        maxEpochs=EPOCHS,
        numTrainWorkers=2,
        verbose=False,
    ).fit(sentences)


def test_bert_trains_as_in_a_plain_loop(bert: TorchClassificationModel, tokens: dict[str, Tensor]) -> None:
    module = tiny_bert(BertForSequenceClassification).train()
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(EPOCHS):
        loss = module(**tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(state(bert.module), state(module), rtol=1e-4, atol=1e-5)
    assert [record["loss"] for record in bert.history] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_fitted_bert_can_only_be_pickled_and_predicts_again(
    bert: TorchClassificationModel,
    sentences: DataFrame,
    tokens: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(tmp_path / "model")
    with pytest.raises(PersistenceError, match="config is a BertConfig, which is no plain value"):
        bert.save(path)
    bert.write().overwrite().option("allowPickle", "true").save(path)
    monkeypatch.setattr("sparkdl.serialization._allowed", {"sparkdl.adapters"})
    loaded = TorchClassificationModel.read().option("allowPickle", "true").load(path)
    shown = loaded.transform(sentences).orderBy("id").toPandas()["rawPrediction"]
    with torch.no_grad():
        expected = bert.module(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    found = torch.tensor(np.stack([row.toArray() for row in shown])).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_label_per_token(sentences: DataFrame) -> None:
    model = TorchEstimator(
        **hugging_face(tiny_bert(BertForTokenClassification)),
        inputCols=["input_ids", "attention_mask"],
        labelCol="labels",
        learningRate=0.05,
        batchSize=30,
        maxEpochs=3,
        numTrainWorkers=2,
        verbose=False,
    ).fit(sentences.drop("labels").withColumnRenamed("marks", "labels"))
    assert model.history[-1]["loss"] < model.history[0]["loss"] / 2
    first = model.transform(sentences).orderBy("id").first()
    assert first is not None
    assert len(first["output"]) == 6 * 2


def test_columns_have_to_be_called_like_arguments(sentences: DataFrame) -> None:
    settings = {**hugging_face(tiny_bert(BertForSequenceClassification)), "maxEpochs": 1, "verbose": False}
    with pytest.raises(ConfigError, match=r"returned no loss for the columns input_ids, label\. Let labelCol"):
        TorchClassifier(**settings, inputCols=["input_ids"], labelCol="label").fit(
            sentences.withColumnRenamed("labels", "label")
        )


def test_modules_without_loss_or_tensors_are_named(tokens: dict[str, Tensor]) -> None:
    inputs = {"input_ids": tokens["input_ids"][:2]}
    encoder = tiny_bert(BertModel)
    assert adapters.hugging_face_prediction(encoder, inputs).shape == (2, 6, 8)
    assert adapters.hugging_face_prediction(tiny_bert(BertModel, return_dict=False), inputs).shape == (2, 6, 8)
    with pytest.raises(ConfigError, match=r"BertModel returned no loss for the columns input_ids\. Let labelCol"):
        adapters.hugging_face_step(encoder, inputs)
    with pytest.raises(ConfigError, match="Wordy returned a str, in which there is no tensor to predict with"):
        adapters.hugging_face_prediction(Wordy(), inputs)


class Wordy(nn.Module):
    def forward(self, input_ids: Tensor) -> str:
        return "words"


# ---- other processes -------------------------------------------------------------------------------------------------
def run_python(code: str, *arguments: str, folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_adapters_import_no_library(tmp_path: Path) -> None:
    run_python(
        """
        import sys
        import sparkdl.adapters
        found = {"lightning", "pytorch_lightning", "transformers"} & set(sys.modules)
        assert not found, found
        """,
        folder=tmp_path,
    )


IN_A_FRESH_PROCESS = """
    import json, sys
    from pyspark.sql import SparkSession
    import sparkdl

    *models, rows, answer = sys.argv[1:]
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    sparkdl.allow_modules("tests.spark.test_adapters")
    reader = sparkdl.TorchClassificationModel.read().option("allowPickle", "true")
    loaded = [reader.load(path) for path in models]
    with open(rows) as file:
        given = json.load(file)
    found = [model.predictRaw(tuple(row)).toArray().tolist() for model, row in zip(loaded, given, strict=True)]
    with open(answer, "w") as file:
        json.dump(found, file)
    spark.stop()
"""


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_a_fresh_process_predicts_the_same(
    classifier: TorchClassificationModel, bert: TorchClassificationModel, tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("net", "bert", "rows.json", "answer.json")]
    classifier.save(paths[0])
    bert.write().option("allowPickle", "true").save(paths[1])
    given = [[[0.5, -1.5]], [tokens["input_ids"][0].tolist(), tokens["attention_mask"][0].tolist()]]
    Path(paths[2]).write_text(json.dumps(given))
    run_python(IN_A_FRESH_PROCESS, *paths, folder=tmp_path)
    found = json.loads(Path(paths[3]).read_text())
    for scores, model, row in zip(found, (classifier, bert), given, strict=True):
        assert scores == pytest.approx(model.predictRaw(tuple(row)).toArray().tolist(), rel=1e-5)
