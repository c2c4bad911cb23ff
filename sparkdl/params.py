"""The Spark Params of the Estimators and Models.

Params that come from `TrainConfig` are made from its fields by one rule: the field's name in camelCase, the text under
the field as doc. Every Param gets a getter and a setter of Spark's form.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasBatchSize,
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
    HasThresholds,
    HasValidationIndicatorCol,
    HasWeightCol,
)

from sparkdl.config import TrainConfig

__all__ = [
    "ClassifierColumns",
    "EstimatorColumns",
    "InputColumns",
    "RegressorColumns",
    "TrainParams",
    "accessors",
    "camel_case",
    "field_docs",
]

P = TypeVar("P", bound=type[Params])


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


def _converter(annotation: Any) -> Callable[[Any], Any]:
    text = str(annotation)
    for kind, converter in (("bool", TypeConverters.toBoolean), ("int", TypeConverters.toInt)):
        if kind in text:
            return converter
    return TypeConverters.toString


def train_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `TrainConfig` that are Params: all but the timeouts."""
    return [field for field in dataclasses.fields(TrainConfig) if field.type is not timedelta]


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
    """The columns that the module is called with."""

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
    HasLearningRate,
    HasNumTrainWorkers,
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
        "learning rate of an optimizer given by name; 0.001 if not set. It is not scaled by the number of ranks.",
        TypeConverters.toFloat,
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
        self._setDefault(**{camel_case(field.name): field.default for field in train_fields()})

    def _value(self, name: str) -> Any:
        """Value of a Param, or None where it has neither value nor default."""
        param = self.getParam(name)
        return self.getOrDefault(param) if self.isDefined(param) else None

    def train_config(self) -> TrainConfig:
        """The Params as the config that travels to the ranks."""
        return TrainConfig(**{field.name: self._value(camel_case(field.name)) for field in train_fields()})


class ClassifierColumns(HasPredictionCol, HasProbabilityCol, HasRawPredictionCol, HasThresholds):
    """What a classifier writes. An empty name switches a column off."""


class RegressorColumns(HasPredictionCol):
    """What a regressor writes."""


class EstimatorColumns(HasOutputCol, HasOutputCols):
    """What a general estimator writes: one column, or one per output of the module."""

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(outputCol="output")
