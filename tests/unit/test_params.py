"""The Params: each with getter, setter and one text; constructors that only store."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, get_args, get_origin

import pytest
from pyspark.ml import Estimator, Model
from pyspark.ml.param import Param, Params, shared
from pyspark.ml.util import MLReadable, MLWritable
from torch import nn

from sparkdl import (
    TorchClassificationModel,
    TorchClassifier,
    TorchEstimator,
    TorchModel,
    TorchRegressionModel,
    TorchRegressor,
)
from sparkdl.config import Timeouts, TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.params import camel_case, field_docs, train_fields

ESTIMATORS = [TorchClassifier, TorchRegressor, TorchEstimator]
MODELS = [TorchClassificationModel, TorchRegressionModel, TorchModel]
MODULE = nn.Linear(2, 2)

# A value of each Param that is not its default.
VALUES: dict[str, Any] = {
    "module": MODULE,
    "loss": "l1",
    "optimizer": "sgd",
    "optimizerParams": {"momentum": 0.9},
    "learningRate": 0.25,
    "learningRateScaling": "sqrt",
    "baseBatchSize": 128,
    "weightDecay": 0.125,
    "parameterGroups": {"bias": {"lr": 0.5}},
    "configure": dict,
    "scheduler": "cosineannealinglr",
    "schedulerParams": {"eta_min": 0.25},
    "schedulerInterval": "step",
    "warmupSteps": 10,
    "trainingStep": dict,
    "predictionStep": dict,
    "precision": "bf16",
    "gradientClipNorm": 1.0,
    "gradientClipValue": 0.5,
    "averaging": "ema",
    "averagingDecay": 0.5,
    "averagingStart": 2,
    "frozenParameters": ["embedding"],
    "activationCheckpointing": ["blocks.*"],
    "syncBatchNorm": True,
    "torchCompile": True,
    "nonFinite": "skip",
    "validationFraction": 0.25,
    "validationDataset": "a second one",
    "metrics": ["accuracy"],
    "monitor": "validation_accuracy",
    "monitorMode": "max",
    "earlyStoppingPatience": 3,
    "earlyStoppingMinDelta": 0.01,
    "restoreBest": True,
    "callbacks": [],
    "trackers": [],
    "trackingDir": "/shared/events",
    "maxEpochs": 3,
    "batchSize": 64,
    "microBatchSize": 16,
    "shuffle": "none",
    "seed": 42,
    "featuresCol": "vector",
    "inputCols": ["a", "b"],
    "labelCol": "target",
    "labelCols": ["t", "u"],
    "weightCol": "importance",
    "validationIndicatorCol": "held_out",
    "predictionCol": "class",
    "probabilityCol": "chance",
    "rawPredictionCol": "scores",
    "thresholds": [0.3, 0.7],
    "outputCol": "result",
    "outputCols": ["r", "s"],
    "strategy": "local_sgd",
    "numTrainWorkers": 2,
    "numShards": 4,
    "partitioning": "key",
    "partitionKeyCol": "user",
    "reshuffleInterval": 2,
    "balanceShards": True,
    "cache": "disk",
    "cacheBytes": 1 << 30,
    "readerThreads": 3,
    "nulls": {"a": 0.5, "b": "drop"},
    "padding": {"a": {"length": 8, "value": -1, "truncate": True}},
    "shapes": {"a": [3, 4]},
    "vocabularies": {"a": ["red", "green"], "b": None},
    "standardization": True,
    "transform": dict,
    "device": "cpu",
    "stagingDir": "/shared/staging",
    "verbose": False,
    "checkpointDir": "/shared/checkpoints",
    "checkpointInterval": 50,
    "checkpointSeconds": 30.0,
    "keepCheckpoints": 5,
    "maxRestarts": 1,
    "minWorkers": 1,
    "timeouts": {"step": 60.0},
    "allowUnencryptedTraffic": True,
}
COMMON_BEFORE = [
    "module", "loss", "optimizer", "optimizerParams", "learningRate", "learningRateScaling", "baseBatchSize",
    "weightDecay", "parameterGroups", "configure", "scheduler", "schedulerParams", "schedulerInterval", "warmupSteps",
    "trainingStep", "predictionStep", "maxEpochs", "batchSize", "microBatchSize", "precision", "gradientClipNorm",
    "gradientClipValue", "averaging", "averagingDecay", "averagingStart", "frozenParameters", "activationCheckpointing",
    "syncBatchNorm", "torchCompile", "nonFinite", "shuffle", "seed", "partitioning", "partitionKeyCol",
    "reshuffleInterval", "balanceShards", "cache", "cacheBytes", "readerThreads", "nulls", "padding", "shapes",
    "vocabularies", "standardization", "transform",
    "featuresCol", "inputCols", "labelCol",
]  # fmt: skip
VALIDATION = [
    "validationIndicatorCol", "validationFraction", "validationDataset", "metrics", "monitor", "monitorMode",
    "earlyStoppingPatience", "earlyStoppingMinDelta", "restoreBest", "callbacks", "trackers", "trackingDir",
]  # fmt: skip
COMMON_AFTER = [
    "strategy", "numTrainWorkers", "numShards", "device", "stagingDir", "checkpointDir", "checkpointInterval",
    "checkpointSeconds", "keepCheckpoints", "maxRestarts", "minWorkers", "timeouts", "allowUnencryptedTraffic",
    "verbose",
]  # fmt: skip
SIGNATURES = {
    TorchClassifier: [
        *COMMON_BEFORE, "weightCol", *VALIDATION, "predictionCol", "probabilityCol", "rawPredictionCol",
        "thresholds", *COMMON_AFTER,
    ],
    TorchRegressor: [*COMMON_BEFORE, "weightCol", *VALIDATION, "predictionCol", *COMMON_AFTER],
    TorchEstimator: [
        *COMMON_BEFORE, "labelCols", "weightCol", *VALIDATION, "outputCol", "outputCols", *COMMON_AFTER,
    ],
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "learningRateScaling": "none",
    "baseBatchSize": 256,
    "schedulerInterval": "epoch",
    "warmupSteps": 0,
    "precision": "32",
    "averaging": "none",
    "averagingDecay": 0.999,
    "averagingStart": 1,
    "frozenParameters": (),
    "activationCheckpointing": (),
    "syncBatchNorm": False,
    "torchCompile": False,
    "nonFinite": "stop",
    "monitorMode": "auto",
    "earlyStoppingMinDelta": 0.0,
    "restoreBest": False,
    "optimizer": "adamw",
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
    "outputCol": "output",
    "strategy": "ddp",
    "numTrainWorkers": 1,
    "device": "auto",
    "keepCheckpoints": 3,
    "maxRestarts": 3,
    "allowUnencryptedTraffic": False,
    "verbose": True,
}


def title(name: str) -> str:
    return name[0].upper() + name[1:]


def every_param(kinds: Sequence[type[Any]]) -> list[Any]:
    return [
        pytest.param(kind, param.name, id=f"{kind.__name__}-{param.name}") for kind in kinds for param in kind().params
    ]


# ---- one Param at a time ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "name"), every_param([*ESTIMATORS, *MODELS]))
def test_every_param_has_a_getter_and_a_setter_that_work(kind: type[Any], name: str) -> None:
    instance = kind()
    getter, setter = getattr(instance, f"get{title(name)}"), getattr(instance, f"set{title(name)}")
    assert not instance.isSet(name)
    assert setter(VALUES[name]) is instance
    assert getter() == VALUES[name] == instance.getOrDefault(name)
    assert instance.isSet(name)
    instance.clear(instance.getParam(name))
    assert not instance.isSet(name)
    assert not kind().isSet(name), "an instance keeps its values for itself"


@pytest.mark.parametrize(("kind", "name"), every_param([*ESTIMATORS, *MODELS]))
def test_every_param_has_a_text_which_its_setter_repeats(kind: type[Any], name: str) -> None:
    doc = kind().getParam(name).doc
    assert len(doc) > 10
    assert "undefined" not in doc
    for prefix in ("get", "set"):
        method = getattr(kind, f"{prefix}{title(name)}")
        assert method.__name__ == f"{prefix}{title(name)}"
        assert inspect.getdoc(method)
    if not hasattr(shared, f"Has{title(name)}"):
        assert doc in (inspect.getdoc(getattr(kind, f"set{title(name)}")) or "")


@pytest.mark.parametrize(("kind", "name"), every_param(ESTIMATORS))
def test_the_constructor_takes_every_param(kind: type[Any], name: str) -> None:
    instance = kind(**{name: VALUES[name]})
    assert instance.getOrDefault(name) == VALUES[name]
    assert [param.name for param in instance.params if instance.isSet(param)] == [name]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("maxEpochs", "three"), ("maxEpochs", 2.5), ("batchSize", [1]), ("learningRate", "fast"), ("verbose", "yes"),
     ("featuresCol", 3), ("inputCols", "a"), ("thresholds", "high"), ("optimizerParams", [1]), ("device", 0),
     ("stagingDir", 1), ("seed", "zero"), ("numShards", "two")],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_as_spark_does(name: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=f'Invalid param value given for param "{name}"'):
        TorchClassifier(**{name: bad})
    with pytest.raises(TypeError, match=f'Invalid param value given for param "{name}"'):
        getattr(TorchClassifier(), f"set{title(name)}")(bad)


# ---- Params from config fields ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_config_field_has_a_text(field: dataclasses.Field[Any]) -> None:
    assert len(field_docs(TrainConfig)[field.name]) > 20
    assert not field_docs(TrainConfig)[field.name].startswith(" ")


@pytest.mark.parametrize("field", train_fields(), ids=lambda field: field.name)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_param_of_a_config_field_has_its_text_and_its_default(
    kind: type[Any], field: dataclasses.Field[Any]
) -> None:
    instance = kind()
    param = instance.getParam(camel_case(field.name))
    assert param.doc == field_docs(TrainConfig)[field.name]
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    assert instance.getOrDefault(param) == (None if field.name == "timeouts" else default)
    assert param.parent == instance.uid


def test_timeouts_are_given_in_seconds_by_name() -> None:
    config = TorchRegressor(timeouts={"step": 60, "checkpoint": 1.5}).train_config()
    assert config.timeouts == Timeouts(step=timedelta(minutes=1), checkpoint=timedelta(seconds=1.5))
    assert TorchRegressor(timeouts={}).train_config().timeouts == Timeouts()
    with pytest.raises(ConfigError, match=r"timeouts=.'steps': 60. is not known. Use some of rendezvous, step"):
        TorchRegressor(timeouts={"steps": 60}).train_config()
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"timeouts=.'step': {bad}. is no time to wait. Use a number of seconds"):
            TorchRegressor(timeouts={"step": bad}).train_config()


def test_the_texts_of_the_timeouts_are_in_their_param() -> None:
    text = field_docs(TrainConfig)["timeouts"]
    for field in dataclasses.fields(Timeouts):
        assert f"'{field.name}' ({field.default.total_seconds():.0f})" in text
        assert field_docs(Timeouts)[field.name]


def test_the_params_are_the_config_that_travels() -> None:
    names = [field.name for field in train_fields()]
    values = {name: VALUES[camel_case(name)] for name in names}
    given = TorchRegressor(**{camel_case(name): value for name, value in values.items()})
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    assert given.train_config() == TrainConfig(**{**values, "timeouts": Timeouts(step=timedelta(minutes=1))})
    assert TorchRegressor().train_config() == TrainConfig()


@pytest.mark.parametrize(
    ("name", "camel"), [("seed", "seed"), ("max_epochs", "maxEpochs"), ("num_train_workers", "numTrainWorkers")]
)
def test_a_param_is_its_field_in_camel_case(name: str, camel: str) -> None:
    assert camel_case(name) == camel


def test_choices_are_named_in_the_texts() -> None:
    for field in dataclasses.fields(TrainConfig):
        if get_origin(field.type) is Literal:
            assert all(f"'{choice}'" in field_docs(TrainConfig)[field.name] for choice in get_args(field.type))


def test_texts_under_fields_are_found_in_any_dataclass() -> None:
    @dataclasses.dataclass
    class Config:
        """A config."""

        first: int = 1
        """The first,
        over two lines."""

        second: str = "b"

        third: int | None = None
        """The third."""

    assert field_docs(Config) == {"first": "The first, over two lines.", "third": "The third."}


# ---- constructors ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_constructor_has_the_documented_arguments_by_keyword_with_the_defaults_of_the_params(
    kind: type[Any],
) -> None:
    parameters = dict(inspect.signature(kind).parameters)
    assert list(parameters) == SIGNATURES[kind]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    instance = kind()
    assert sorted(param.name for param in instance.params) == sorted(parameters)
    losses = {TorchClassifier: "cross_entropy", TorchRegressor: "mse", TorchEstimator: None}
    for name, parameter in parameters.items():
        assert parameter.default == {"loss": losses[kind], **DEFAULTS}.get(name)
        found = instance.getOrDefault(name) if instance.isDefined(name) else None
        assert (tuple(found) if isinstance(found, list) else found) == parameter.default


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_positional_and_unknown_arguments_are_refused(kind: type[Any]) -> None:
    with pytest.raises(TypeError, match="keyword arguments"):
        kind(MODULE)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        kind(epochs=3)


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize(
    "settings",
    [
        {"maxEpochs": 0, "batchSize": -5, "microBatchSize": 0, "numTrainWorkers": 0, "numShards": -1, "seed": -1},
        {"batchSize": 2, "numShards": 4, "numTrainWorkers": 8},
        {"shuffle": "everything", "device": "cuda:1"},
        {"loss": "no such loss", "optimizer": "no such optimizer", "learningRate": -1.0},
        {"optimizer": lambda params: None, "learningRate": 0.1, "optimizerParams": {"lr": 3}},
        {"featuresCol": "a", "inputCols": ["b"]},
        {"module": 3, "loss": 4, "optimizer": 5},
        {"module": lambda: 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_constructors_store_what_is_given_and_judge_nothing(kind: type[Any], settings: dict[str, Any]) -> None:
    instance = kind(**settings)
    assert all(
        instance.getOrDefault(name) is value or instance.getOrDefault(name) == value for name, value in settings.items()
    )


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_default_that_is_given_by_name_is_as_good_as_not_given(kind: type[Any]) -> None:
    parameters = inspect.signature(kind).parameters
    instance = kind(**{name: parameter.default for name, parameter in parameters.items()})
    assert instance.train_config() == kind().train_config()
    assert instance._value("weightCol") is None


def test_the_callers_module_is_stored_as_it_is() -> None:
    assert TorchClassifier(module=MODULE).getModule() is MODULE

    def make() -> nn.Module:
        raise AssertionError("a constructor calls nothing")

    assert TorchClassifier(module=make).getModule() is make


def test_one_constructor_does_not_see_the_arguments_of_another() -> None:
    first, second = TorchClassifier(batchSize=1), TorchClassifier(maxEpochs=2)
    assert (first.getBatchSize(), first.getMaxEpochs()) == (1, 10)
    assert (second.getBatchSize(), second.getMaxEpochs()) == (256, 2)


# ---- as Spark ML has it ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*ESTIMATORS, *MODELS])
def test_the_classes_are_those_of_spark_ml(kind: type[Any]) -> None:
    assert issubclass(kind, Estimator if kind in ESTIMATORS else Model)
    assert issubclass(kind, MLWritable)
    assert issubclass(kind, MLReadable)
    assert kind().uid.startswith(f"{kind.__name__}_")
    assert kind().uid != kind().uid


@pytest.mark.parametrize(("kind", "name"), every_param([*ESTIMATORS, *MODELS]))
def test_params_that_spark_shares_come_from_its_mixins(kind: type[Any], name: str) -> None:
    """All but HasLoss, whose loss is a string; ours may be a module or a function."""
    mixin = getattr(shared, f"Has{title(name)}", None)
    if mixin is not None and mixin is not shared.HasLoss:
        assert issubclass(kind, mixin)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_all_params_can_be_explained(kind: type[Any]) -> None:
    instance = kind(module=MODULE, maxEpochs=3, thresholds=[0.5, 0.5]) if kind is TorchClassifier else kind(maxEpochs=3)
    text = instance.explainParams()
    for param in instance.params:
        assert f"{param.name}: {param.doc}" in text
    assert "(default: 10, current: 3)" in text


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_copies_have_the_extra_values_and_are_independent(kind: type[Any]) -> None:
    original = kind(module=MODULE, maxEpochs=3)
    changed = original.copy({original.batchSize: 7})
    assert type(changed) is kind
    assert changed.uid == original.uid
    assert (changed.getBatchSize(), changed.getMaxEpochs()) == (7, 3)
    changed.setMaxEpochs(4)
    assert (original.getBatchSize(), original.getMaxEpochs()) == (256, 3)
    assert changed.getModule() is MODULE


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_was_never_fitted_says_how_models_are_made(kind: Callable[[], Any]) -> None:
    with pytest.raises(AttributeError, match=rf"{kind.__name__} has no module; models are made by fit or load"):
        _ = kind().module


@pytest.mark.parametrize("kind", [*ESTIMATORS, *MODELS])
def test_params_of_the_class_are_placeholders_and_those_of_an_instance_its_own(kind: type[Any]) -> None:
    first, second = kind(), kind()
    for param in first.params:
        assert isinstance(param, Param)
        assert param.parent == first.uid
        assert getattr(kind, param.name).parent == Params._dummy().uid
        assert second.getParam(param.name).parent == second.uid
