"""The Spark Params of the Estimators and Models.

Params that come from `TrainConfig` are made from its fields by one rule: the field's name in camelCase, the text under
the field as doc. Every Param gets a getter and a setter of Spark's form.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasBatchSize,
    HasCheckpointInterval,
    HasFeaturesCol,
    HasInputCols,
    HasLabelCol,
    HasLearningRate,
    HasNumTrainWorkers,
    HasOutputCol,
    HasOutputCols,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasStandardization,
    HasThresholds,
    HasValidationIndicatorCol,
    HasWeightCol,
)

from sparkdl.config import Padding, Timeouts, TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.schema import ColumnRules

__all__ = [
    "COLUMN_RULES",
    "ClassifierColumns",
    "EstimatorColumns",
    "InputColumns",
    "RegressorColumns",
    "TrainParams",
    "accessors",
    "build_timeouts",
    "camel_case",
    "column_rules",
    "field_docs",
    "rules_of_targets",
]

P = TypeVar("P", bound=type[Params])
COLUMN_RULES: dict[str, Any] = {"nulls": "error", "padding": None, "shapes": None, "vocabularies": None}


def camel_case(name: str) -> str:
    """The Param's name of a config field.

    >>> camel_case("num_train_workers")
    'numTrainWorkers'
    """
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def field_docs(config: type) -> dict[str, str]:
    """The text that stands under each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
            assert isinstance(below.value, ast.Constant)
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _identity(value: Any) -> Any:
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"Could not convert {value!r} to a dict")
    return dict(value)


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _nulls(rule) for name, rule in value.items()}
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"Could not convert {value!r} to a rule for nulls")
    return value


def _timeouts(value: Any) -> dict[str, float]:
    return {str(name): TypeConverters.toFloat(seconds) for name, seconds in _dict(value).items()}


def _converter(annotation: Any) -> Callable[[Any], Any]:
    text = str(annotation)
    if annotation is Timeouts:
        return _timeouts
    if "tuple" in text:
        return TypeConverters.toListString
    for kind, converter in (
        ("bool", TypeConverters.toBoolean),
        ("int", TypeConverters.toInt),
        ("float", TypeConverters.toFloat),
    ):
        if kind in text:
            return converter
    return TypeConverters.toString


def train_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `TrainConfig`, each of which is a Param."""
    return list(dataclasses.fields(TrainConfig))


def _from_config(cls: P) -> P:
    """Add a Param for every field of `TrainConfig`."""
    docs = field_docs(TrainConfig)
    for field in train_fields():
        name = camel_case(field.name)
        setattr(cls, name, Param(Params._dummy(), name, docs[field.name], _converter(field.type)))
    return cls


def accessors(cls: P) -> P:
    """Add ``getX`` and ``setX`` for every Param of the class that lacks them."""
    for name in dir(cls):
        param = getattr(cls, name)
        if not isinstance(param, Param):
            continue
        title = name[0].upper() + name[1:]
        if not hasattr(cls, f"get{title}"):

            def getter(self: Any, name: str = name) -> Any:
                return self.getOrDefault(name)

            _add(cls, f"get{title}", getter, f"Gets the value of {name} or its default value.")
        if not hasattr(cls, f"set{title}"):

            def setter(self: Any, value: Any, *, name: str = name) -> Any:
                return self._set(**{name: value})

            _add(cls, f"set{title}", setter, f"Sets {name}: {param.doc}")
    return cls


def _add(cls: type, name: str, method: Any, doc: str) -> None:
    method.__name__, method.__qualname__, method.__doc__ = name, f"{cls.__qualname__}.{name}", doc
    setattr(cls, name, method)


class InputColumns(HasFeaturesCol, HasInputCols):
    """The columns that the module is called with, and what becomes of odd values in them."""

    nulls: "Param[Any]" = Param(
        Params._dummy(),
        "nulls",
        "what becomes of nulls: 'error', 'drop' (leave the row out, in training), or a number that replaces them; or a "
        "dict from column to one of these.",
        _nulls,
    )
    padding: "Param[dict[str, Any]]" = Param(
        Params._dummy(),
        "padding",
        "how rows of array columns become equally long: a dict from column to {'length': values per row, 'value': what "
        "fills shorter rows up (0), 'truncate': whether longer rows are cut (False: they are an error)}.",
        _dict,
    )
    shapes: "Param[dict[str, list[int]]]" = Param(
        Params._dummy(),
        "shapes",
        "shape of one row of columns that hold more than a list of values: a dict from column to sizes, [3, 32, 32] "
        "for an image. Nested arrays need one.",
        _dict,
    )
    vocabularies: "Param[dict[str, Any]]" = Param(
        Params._dummy(),
        "vocabularies",
        "words of text columns: a dict from column to a list, in which a word's place is its number (int64); None has "
        "fit learn all words of the training rows, the most frequent first.",
        _dict,
    )

    device: "Param[str]" = Param(Params._dummy(), "device", field_docs(TrainConfig)["device"], TypeConverters.toString)

    featuresCol: "Param[str]" = Param(
        Params._dummy(),
        "featuresCol",
        "the module's only input: an ML Vector, an array of numbers, or a number. Floating values arrive as (rows, "
        "values) in the module's dtype, integers as int64.",
        TypeConverters.toString,
    )
    inputCols: "Param[list[str]]" = Param(
        Params._dummy(),
        "inputCols",
        "several inputs, given to the module as positional arguments in this order; instead of featuresCol.",
        TypeConverters.toListString,
    )


@_from_config
class TrainParams(
    InputColumns,
    HasLabelCol,
    HasWeightCol,
    HasValidationIndicatorCol,
    HasSeed,
    HasBatchSize,
    HasCheckpointInterval,
    HasLearningRate,
    HasNumTrainWorkers,
    HasStandardization,
):
    """What every Estimator can be told about training."""

    module: "Param[Any]" = Param(
        Params._dummy(),
        "module",
        "the torch.nn.Module to train, or a function that returns one. The caller's own is never changed.",
        _identity,
    )
    loss: "Param[Any]" = Param(
        Params._dummy(),
        "loss",
        "a name of torch.nn.functional without '_loss' (cross_entropy, mse, ...), a torch loss module, or a function "
        "of (output, label) that returns one value per row or the mean. Their mean over the global batch is minimised.",
        _identity,
    )
    optimizer: "Param[Any]" = Param(
        Params._dummy(),
        "optimizer",
        "a name of torch.optim in lower case (adamw, sgd, ...), or a function from parameters to an optimizer.",
        _identity,
    )
    optimizerParams: "Param[dict[str, Any]]" = Param(
        Params._dummy(), "optimizerParams", "further arguments of an optimizer given by name, as a dict.", _dict
    )
    learningRate: "Param[float]" = Param(
        Params._dummy(),
        "learningRate",
        "learning rate of an optimizer given by name; 0.001 if not set. The number of ranks does not change it; see "
        "learningRateScaling.",
        TypeConverters.toFloat,
    )
    weightDecay: "Param[float]" = Param(
        Params._dummy(),
        "weightDecay",
        "weight decay of an optimizer given by name, for weights of two and more dimensions alone: biases and the "
        "parameters of normalisation layers are not decayed. For all of them: optimizerParams={'weight_decay': ...}.",
        TypeConverters.toFloat,
    )
    parameterGroups: "Param[dict[str, Any]]" = Param(
        Params._dummy(),
        "parameterGroups",
        "options of an optimizer given by name for some parameters: a dict from regular expression, searched for in "
        "the parameters' names, to {'lr': ..., 'weight_decay': ...}. The first that is found counts.",
        _dict,
    )
    configure: "Param[Any]" = Param(
        Params._dummy(),
        "configure",
        "a function from the module to its optimizers and schedulers, instead of optimizer and scheduler: it returns "
        "an optimizer, a list of them, or a pair of lists, (optimizers, schedulers).",
        _identity,
    )
    scheduler: "Param[Any]" = Param(
        Params._dummy(),
        "scheduler",
        "learning rate schedule: a class of torch.optim.lr_scheduler by name, in any case (CosineAnnealingLR, "
        "ReduceLROnPlateau, ...), or a function from an optimizer to a scheduler. See schedulerInterval.",
        _identity,
    )
    schedulerParams: "Param[dict[str, Any]]" = Param(
        Params._dummy(),
        "schedulerParams",
        "arguments of a scheduler given by name, as a dict. Where its length (T_max, total_steps, total_iters) is left "
        "out, it is that of the whole fit.",
        _dict,
    )
    strategy: "Param[Any]" = Param(
        Params._dummy(),
        "strategy",
        "how the ranks train the module together: ddp, fsdp, hsdp, tensor_parallel, pipeline, hybrid, local_sgd, "
        "parameter_server, auto (measures on the cluster and picks one); or an object of sparkdl.parallel, which has "
        "options.",
        _identity,
    )
    trainingStep: "Param[Any]" = Param(
        Params._dummy(),
        "trainingStep",
        "a function of (module, batch) that returns the loss, instead of loss: the mean over the batch's rows, or one "
        "value per row; or a dict of 'loss' and further numbers, whose means are added to the history. The batch is a "
        "dict from column name to tensor.",
        _identity,
    )
    predictionStep: "Param[Any]" = Param(
        Params._dummy(),
        "predictionStep",
        "a function of (module, batch) that returns the output, for transform and metrics: the batch is a dict from "
        "the names of the input columns to tensors. Not set: the module is called with them in order.",
        _identity,
    )
    metrics: "Param[Any]" = Param(
        Params._dummy(),
        "metrics",
        "metrics of the validation rows: a list of names (accuracy, f1, auroc, mae, ...) and torchmetrics objects, or "
        "a dict from the name in the history, after 'validation_', to one of them.",
        _identity,
    )
    callbacks: "Param[Any]" = Param(
        Params._dummy(), "callbacks", "a list of sparkdl.Callback objects, called on every rank.", _identity
    )
    trackers: "Param[Any]" = Param(
        Params._dummy(),
        "trackers",
        "a list of trackers of sparkdl.tracking (TensorBoard, MLflow, WeightsAndBiases), which the driver feeds.",
        _identity,
    )
    validationDataset: "Param[Any]" = Param(
        Params._dummy(),
        "validationDataset",
        "rows to validate on: a second DataFrame with the same columns, or a second ParquetDataset where fit gets one. "
        "It is not saved with the estimator.",
        _identity,
    )
    transform: "Param[Any]" = Param(
        Params._dummy(),
        "transform",
        "a function from a dict of columns to such a dict, called by the reader threads with some rows at a time, and "
        "by the model's transform with the input columns alone: decoding, augmentation, tokenising. Numbers come as "
        "tensors of shape (rows, ...), text and bytes as Arrow arrays; tensors of as many rows must come back. A "
        "second argument, where the function has one, is a torch.Generator seeded by (seed, epoch, row group).",
        _identity,
    )
    labelCol: "Param[str]" = Param(
        Params._dummy(), "labelCol", "the column that the output is compared with.", TypeConverters.toString
    )
    weightCol: "Param[str]" = Param(
        Params._dummy(),
        "weightCol",
        "weights of the rows, >= 0: the loss is the weighted mean over the global batch. Not set: each counts once.",
        TypeConverters.toString,
    )
    validationIndicatorCol: "Param[str]" = Param(
        Params._dummy(),
        "validationIndicatorCol",
        "boolean column, true for the rows that are held out: after each epoch their loss is added to the history.",
        TypeConverters.toString,
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(optimizer="adamw", optimizerParams=None, learningRate=None, featuresCol="features")
        self._setDefault(weightDecay=None, parameterGroups=None, configure=None, scheduler=None, schedulerParams=None)
        self._setDefault(trainingStep=None, predictionStep=None, metrics=None, callbacks=None, trackers=None)
        self._setDefault(strategy="ddp", transform=None, validationDataset=None, **COLUMN_RULES)
        # A Param is what JSON can hold.
        defaults = {
            camel_case(field.name): list(field.default) if isinstance(field.default, tuple) else field.default
            for field in train_fields()
        }
        self._setDefault(**{**defaults, "timeouts": None})

    def _value(self, name: str) -> Any:
        """Value of a Param, or None where it has neither value nor default."""
        param = self.getParam(name)
        return self.getOrDefault(param) if self.isDefined(param) else None

    def train_config(self) -> TrainConfig:
        """The Params as the config that travels to the ranks."""
        values = {field.name: self._value(camel_case(field.name)) for field in train_fields()}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return TrainConfig(**{**values, "timeouts": build_timeouts(values["timeouts"] or {})})


def build_timeouts(seconds: Mapping[str, float]) -> Timeouts:
    """The timeouts, from seconds by name.

    Raises:
        ConfigError: An unknown name, or no time at all.
    """
    known = [field.name for field in dataclasses.fields(Timeouts)]
    for name, value in seconds.items():
        if name not in known:
            raise ConfigError(f"timeouts={{{name!r}: {value:g}}} is not known. Use some of {', '.join(known)}.")
        if not 0 < value < timedelta.max.total_seconds():
            raise ConfigError(f"timeouts={{{name!r}: {value:g}}} is no time to wait. Use a number of seconds above 0.")
    return Timeouts(**{name: timedelta(seconds=value) for name, value in seconds.items()})


def column_rules(
    params: InputColumns,
    *,
    transform: bool,
    shapes: Mapping[str, tuple[int, ...]],
    assemble: Mapping[str, tuple[str, ...]],
) -> ColumnRules:
    """What is to become of odd values, from the Params.

    Args:
        params: The Estimator or model.
        transform: True where a transform reads text and bytes.
        shapes: Shapes that are known already; the Params go before them.
        assemble: Parts of assembled columns.

    Raises:
        ConfigError: A rule that makes no sense.
    """
    padding = {}
    for name, rule in (params.getOrDefault("padding") or {}).items():
        if not isinstance(rule, dict) or not {"length"} <= rule.keys() <= {"length", "value", "truncate"}:
            raise ConfigError(
                f"padding={{{name!r}: {rule!r}}} is not a rule. Use {{'length': values per row, 'value': 0, "
                "'truncate': False}; the last two may be left out."
            )
        padding[name] = Padding(**rule)
    declared = {name: tuple(shape) for name, shape in (params.getOrDefault("shapes") or {}).items()}
    words = (params.getOrDefault("vocabularies") or {}).items()
    return ColumnRules(
        nulls=params.getOrDefault("nulls"),
        padding=padding,
        shapes={**shapes, **declared},
        vocabularies={name: None if known is None else tuple(known) for name, known in words},
        transform=transform,
        assemble=assemble,
    )


def rules_of_targets(rules: ColumnRules) -> ColumnRules:
    """The rules for labels and weights: one number for all columns must not make up a label."""
    if isinstance(rules.nulls, Mapping) or rules.nulls == "drop":
        return rules
    return dataclasses.replace(rules, nulls="error")


class ClassifierColumns(HasPredictionCol, HasProbabilityCol, HasRawPredictionCol, HasThresholds):
    """What a classifier writes. An empty name switches a column off."""


class RegressorColumns(HasPredictionCol):
    """What a regressor writes."""


class EstimatorColumns(HasOutputCol, HasOutputCols):
    """What a general estimator writes: one column, or one per output of the module."""

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(outputCol="output")
