"""Fitted models: Spark ML Transformers that hold a trained module."""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from pyspark.ml import Model
from pyspark.ml.linalg import DenseVector, Vector, VectorUDT
from pyspark.ml.param import Params
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import ArrayType, DataType, DoubleType, FloatType, StructField, StructType
from torch import nn

from sparkdl.config import Column, Columns, Device
from sparkdl.errors import ConfigError
from sparkdl.history import History, decode_history, decode_json, encode_json
from sparkdl.io.decode import Transform
from sparkdl.io.resolve import TypedColumns
from sparkdl.io.schema import resolve_column, select_expressions
from sparkdl.objective import Step, call_module
from sparkdl.params import (
    COLUMN_RULES,
    ClassifierColumns,
    EstimatorColumns,
    InputColumns,
    RegressorColumns,
    accessors,
    column_rules,
)
from sparkdl.persistence import ModuleReader, ModuleWriter, Saved
from sparkdl.predict import (
    Kind,
    Outputs,
    Predictor,
    decide,
    is_one_logit,
    pickled_for_transform,
    probabilities,
    raw_scores,
    standardised,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pyspark.sql import DataFrame

__all__ = [
    "Fitted",
    "TorchClassificationModel",
    "TorchModel",
    "TorchRegressionModel",
    "TrainingSummary",
    "check_outputs",
    "copy_params",
    "fitted_copy",
]


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What happened in a fit.

    Attributes:
        objectiveHistory: Loss of every epoch.
        totalIterations: Optimizer steps.
        worldSize: Ranks that trained.
        numShards: Shards of the data.
        device: Where rank 0 trained.
        backend: How gradients were reduced.
        threads: Torch threads of a rank.
        rows: Training rows.
        droppedRows: Rows, of the training and validation rows, that were left out for their nulls.
        rankRows: Training rows that each rank counted in the last epoch; of ranks that share a replica, one does.
        rankShards: The shards that each rank read then.
        cache: Where rank 0 kept decoded rows for later epochs.
        staged: True where rows lay where all ranks reach them (staged, or read in place), False where each spooled its
            own.
        seconds: The whole fit.
        restarts: Why and with how many ranks the run was started again, in order.
        checkpoints: The directory of the run's checkpoints; None where it wrote none.
        bestEpoch: The epoch with the best value of 'monitor', from 1; 0 where there was none.
        timeSplit: Seconds that went into 'data' (waiting for rows), 'compute' (forward, backward, optimizer),
            'synchronisation' (waiting for other ranks and exchanging gradients), 'validation' and 'checkpoint'; means
            over the ranks, since the last restart.
        rankSeconds: Seconds that each rank computed: one that needs longer holds up the others.
        rankMemory: Most bytes that each rank used: of its GPU in the fit, else of its process.
        rankMicroBatchSize: Rows of one forward at most, of each rank; fewer than microBatchSize where that did not fit.
        rowsPerSecond: Training rows of all ranks by the seconds of their epochs.
        events: Where the events of the fit were written, one JSON object per line.
        strategy: How the ranks trained together, with its options; what "auto" chose.
    """

    objectiveHistory: tuple[float, ...]
    totalIterations: int
    worldSize: int
    numShards: int
    device: str
    backend: str
    threads: int
    rows: int
    droppedRows: int
    rankRows: tuple[int, ...]
    rankShards: tuple[tuple[int, ...], ...]
    cache: str
    staged: bool
    seconds: float
    restarts: tuple[str, ...] = ()
    checkpoints: str | None = None
    bestEpoch: int = 0
    timeSplit: Mapping[str, float] = field(default_factory=dict)
    rankSeconds: tuple[float, ...] = ()
    rankMemory: tuple[int, ...] = ()
    rankMicroBatchSize: tuple[int | None, ...] = ()
    rowsPerSecond: float = math.nan
    events: str | None = None
    strategy: str = ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a model knows besides its Params.

    Attributes:
        module: The trained module, on the CPU, in eval mode.
        floating: Name of the dtype that floating inputs are given in.
        shapes: Shape of one row of each input, as the module takes it.
        outputs: Classes of a classifier, targets of a regressor.
        transform: The user's function on the input columns.
        prediction_step: The user's way to get the output; None calls the module with the inputs in order.
        input_names: Names of the inputs, for ``prediction_step``.
        assemble: Columns that were put together, for inputs that the DataFrame does not have.
        moments: Mean and scale of standardised inputs, by field.
        history: One record per epoch.
        summary: What happened in the fit; None where the model was not fitted here or saved with it.
    """

    module: nn.Module
    floating: str
    shapes: tuple[tuple[int, ...], ...]
    outputs: int
    transform: Transform | None = None
    prediction_step: Step | None = None
    input_names: tuple[str, ...] = ()
    assemble: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    moments: Mapping[str, list[list[float]]] = field(default_factory=dict)
    history: History = field(default_factory=History)
    summary: TrainingSummary | None = None


class _TorchModel(Model, InputColumns, Saved, MLWritable, MLReadable[Any]):
    """Common to all models: transform, predict, save, load."""

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(device="auto", featuresCol="features", **COLUMN_RULES)
        self._fitted: Fitted | None = None

    @property
    def module(self) -> nn.Module:
        """The trained module, on the CPU and in eval mode. Changing it changes the model."""
        return self._state.module

    @property
    def history(self) -> History:
        """One record per epoch: epoch, step, rows, loss, seconds, rows_per_second, data_wait, ...; has `toPandas`."""
        return self._state.history

    def plot_history(self, metrics: Sequence[str] | None = None) -> "Figure":
        """Losses, metrics and the learning rate over the epochs, as a matplotlib Figure; see `History.plot`."""
        return self.history.plot(metrics)

    @property
    def summary(self) -> TrainingSummary:
        """What happened in the fit.

        Raises:
            ConfigError: The model was not fitted with one.
        """
        if self._state.summary is None:
            raise ConfigError("This model has no training summary.")
        return self._state.summary

    @property
    def hasSummary(self) -> bool:
        """True where `summary` can be read."""
        return self._state.summary is not None

    @property
    def numFeatures(self) -> int:
        """Values per row that the module takes, over all inputs."""
        return sum(math.prod(shape) for shape in self._state.shapes)

    @property
    def _state(self) -> Fitted:
        if self._fitted is None:
            raise AttributeError(f"{type(self).__name__} has no module; models are made by fit or load.")
        return self._fitted

    def copy(self, extra: Any = None) -> Any:
        """A copy with the same module; see `pyspark.ml.param.Params.copy`."""
        return super().copy(extra)

    def _device(self) -> Device:
        chosen: Any = self.getOrDefault(self.device)
        if chosen not in get_args(Device):
            raise ConfigError(f"device={chosen!r} is not known. Use one of {', '.join(get_args(Device))}.")
        return cast("Device", chosen)

    def _input_names(self) -> list[str]:
        return list(self.getInputCols()) if self.isSet("inputCols") and self.getInputCols() else [self.getFeaturesCol()]

    @abstractmethod
    def _outputs(self) -> tuple[Outputs, dict[str, DataType]]:
        """What to compute, and the new columns with their types, in order."""

    def transformSchema(self, schema: StructType) -> StructType:
        """The schema of `transform`'s result, known without a job."""
        added = [StructField(name, kind) for name, kind in self._outputs()[1].items()]
        return StructType([*schema.fields, *added])

    def _transform(self, dataset: "DataFrame") -> "DataFrame":
        outputs, added = self._outputs()
        check_outputs(dataset, list(added))
        if not added:
            return dataset
        columns = self._resolve(dataset)
        predictor = self.predictor(columns, self._device())
        result = StructType([StructField(name, kind) for name, kind in zip(outputs.names, added.values(), strict=True)])
        predict = arrow_udf(_iterate(predictor), result)  # type: ignore[call-overload]
        given = F.struct(*select_expressions(Columns(columns, ())))
        made = "__sparkdl_" + self.uid
        predicted = dataset.select("*", predict(given).alias(made))
        chosen = [
            F.col(f"{_quoted(made)}.{_quoted(name)}").alias(column)
            for name, column in zip(outputs.names, added, strict=True)
        ]
        return predicted.select("*", *chosen).drop(made)

    def predictor(self, columns: tuple[Column, ...], device: Device) -> Predictor:
        """What `transform` runs in Python workers, for these input columns."""
        state = self._state
        payload = pickled_for_transform(self.module, state.transform, state.prediction_step, state.input_names)
        return Predictor(payload, columns, self._outputs()[0], state.moments, device)

    def _resolve(self, dataset: "DataFrame") -> tuple[Column, ...]:
        param = "inputCols" if len(self._input_names()) > 1 else "featuresCol"
        state = self._state
        assemble = {name: parts for name, parts in state.assemble.items() if name not in dataset.columns}
        rules = column_rules(self, transform=state.transform is not None, shapes={}, assemble=assemble)
        found = []
        for number, name in enumerate(self._input_names()):
            column = resolve_column(
                dataset, name, field=f"input_{number}", param=param, floating=state.floating, role="input", rules=rules
            )
            # Rows are never left out of a DataFrame that is transformed: a null that fit dropped is an error here.
            nulls = "error" if column.nulls == "drop" else column.nulls
            found.append(replace(column, validity="any", nulls=nulls))
        return tuple(found)

    def _forward_one(self, value: Any) -> Any:
        """The module's output for one row, with an axis of one row."""
        given = value if isinstance(value, tuple) else (value,)
        tensors = []
        for entry in given:
            array = np.asarray(entry.toArray() if isinstance(entry, Vector) else entry)
            kind = getattr(torch, self._state.floating) if array.dtype.kind == "f" else torch.int64
            tensor = torch.as_tensor(array).to(kind)
            tensors.append(tensor[None] if tensor.ndim or kind == torch.int64 else tensor[None, None])
        tensors = standardised(tensors, self._state.moments)
        with torch.inference_mode():
            return call_module(self.module, tensors, self._state.prediction_step, self._state.input_names)

    def _scores_of(self, value: Any) -> np.ndarray[Any, np.dtype[Any]]:
        """The module's one output for one row, as doubles."""
        scores: np.ndarray[Any, np.dtype[Any]] = self._forward_one(value).double().numpy()
        return scores

    # ---- persistence -------------------------------------------------------------------------------------------------
    def write(self) -> ModuleWriter:
        """A writer; ``option("allowPickle", "true")`` permits pickling a module that cannot be described."""
        return ModuleWriter(self)

    @classmethod
    def read(cls) -> ModuleReader:
        """A reader; ``option("allowPickle", "true")`` opens pickles."""
        return ModuleReader(cls)

    def _saved_objects(self) -> dict[str, Any]:
        state = self._state
        calls = {"transform": state.transform, "predictionStep": state.prediction_step}
        return {"module": self.module, **{role: call for role, call in calls.items() if call is not None}}

    def _saved_facts(self) -> dict[str, Any]:
        state = self._state
        return {
            "floating": state.floating,
            "shapes": state.shapes,
            "outputs": state.outputs,
            "assemble": dict(state.assemble),
            "moments": dict(state.moments),
            "input_names": state.input_names,
            "history": encode_json(state.history),
            "summary": encode_json(asdict(state.summary)) if state.summary else None,
        }

    def _restore(self, objects: dict[str, Any], facts: dict[str, Any]) -> None:
        summary = decode_json(facts["summary"])
        if summary is not None:
            summary = TrainingSummary(**{name: _tuples(value) for name, value in summary.items()})
        self._fitted = Fitted(
            module=objects["module"].eval(),
            floating=facts["floating"],
            shapes=tuple(tuple(shape) for shape in facts["shapes"]),
            outputs=facts["outputs"],
            transform=objects.get("transform"),
            prediction_step=objects.get("predictionStep"),
            input_names=tuple(facts.get("input_names", ())),
            assemble={name: tuple(parts) for name, parts in facts["assemble"].items()},
            moments=facts["moments"],
            history=decode_history(facts["history"]),
            summary=summary,
        )


@accessors
class TorchClassificationModel(_TorchModel, ClassifierColumns):
    """A fitted classifier: raw scores, probabilities and the class, as Spark ML's own classifiers write them."""

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(predictionCol="prediction", probabilityCol="probability", rawPredictionCol="rawPrediction")

    @property
    def numClasses(self) -> int:
        """Classes that the module tells apart."""
        return self._state.outputs

    def predict(self, value: "Vector | Sequence[float] | tuple[Any, ...]") -> float:
        """The class of one row: its features, or a tuple of its inputs."""
        return float(decide(self.predictProbability(value).toArray()[None], self._thresholds())[0])

    def predictRaw(self, value: Any) -> DenseVector:
        """The score of each class for one row."""
        return DenseVector(raw_scores(self._scores_of(value))[0])

    def predictProbability(self, value: Any) -> DenseVector:
        """The probability of each class for one row."""
        scores = self._scores_of(value)
        return DenseVector(probabilities(raw_scores(scores), one_logit=is_one_logit(scores))[0])

    def _thresholds(self) -> tuple[float, ...] | None:
        if not self.isSet("thresholds") or self.getThresholds() is None:
            return None
        thresholds = tuple(self.getThresholds())
        if len(thresholds) != self.numClasses:
            raise ConfigError(
                f"thresholds has {len(thresholds)} values for {self.numClasses} classes. Give one per class."
            )
        return thresholds

    def _outputs(self) -> tuple[Outputs, dict[str, DataType]]:
        wanted: list[tuple[str, Kind, DataType]] = [
            (self.getRawPredictionCol(), "raw", VectorUDT()),
            (self.getProbabilityCol(), "probability", VectorUDT()),
            (self.getPredictionCol(), "prediction", DoubleType()),
        ]
        named = [entry for entry in wanted if entry[0]]
        kinds = tuple(kind for _, kind, _ in named)
        return Outputs(tuple(map(str, kinds)), kinds, self._thresholds()), {
            name: spark_type for name, _, spark_type in named
        }


@accessors
class TorchRegressionModel(_TorchModel, RegressorColumns):
    """A fitted regressor: one double per row, or an array of doubles with several targets."""

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(predictionCol="prediction")

    @property
    def numTargets(self) -> int:
        """Numbers that the module predicts per row."""
        return self._state.outputs

    def predict(self, value: "Vector | Sequence[float] | tuple[Any, ...]") -> float | list[float]:
        """The prediction for one row: its features, or a tuple of its inputs."""
        found = self._scores_of(value).reshape(-1).tolist()
        return found[0] if self.numTargets == 1 else found

    def _outputs(self) -> tuple[Outputs, dict[str, DataType]]:
        one = self.numTargets == 1
        kind: Kind = "number" if one else "targets"
        name = self.getPredictionCol()
        return Outputs(("prediction",), (kind,)), {
            name: DoubleType() if one else ArrayType(DoubleType())
        } if name else {}


@accessors
class TorchModel(_TorchModel, EstimatorColumns):
    """A fitted module of any kind: each output becomes an array of floats, flattened per row."""

    def predict(self, value: "Vector | Sequence[float] | tuple[Any, ...]") -> Any:
        """The module's output for one row, flattened as in `transform`; a list of them where it has several."""
        result = self._forward_one(value)
        several = isinstance(result, tuple | list)
        found = [part.double().reshape(-1).tolist() for part in (result if several else (result,))]
        return found if several else found[0]

    def _outputs(self) -> tuple[Outputs, dict[str, DataType]]:
        several = self.isSet("outputCols") and self.getOutputCols()
        names = list(self.getOutputCols()) if several else [self.getOutputCol()]
        named = [name for name in names if name]
        fields = tuple(f"output_{number}" for number in range(len(named)))
        kinds: tuple[Kind, ...] = tuple("output" for _ in named)
        return Outputs(fields, kinds), {name: ArrayType(FloatType()) for name in named}


def check_outputs(dataset: TypedColumns, names: list[str]) -> None:
    """Refuse output columns that exist already or are named twice.

    Raises:
        ConfigError: As said.
    """
    taken = set(dataset.columns)
    for number, name in enumerate(names):
        if name in taken:
            raise ConfigError(
                f"Output column {name!r} exists already in the DataFrame. Drop it, or name another output column."
            )
        if name in names[:number]:
            raise ConfigError(f"Output column {name!r} is named twice. Give every output a name of its own.")


def fitted_copy(module: nn.Module) -> nn.Module:
    """A module as a model holds it: on the CPU, in eval mode, without gradients."""
    module = copy.deepcopy(module).cpu().eval()
    for parameter in module.parameters():
        parameter.grad = None
    return module


def copy_params(source: Params, target: Params) -> None:
    """Give ``target`` the values and defaults of the Params that both have."""
    known = {param.name for param in target.params}
    target._setDefault(**{param.name: value for param, value in source._defaultParamMap.items() if param.name in known})
    target._set(**{param.name: value for param, value in source._paramMap.items() if param.name in known})


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _iterate(predictor: Predictor) -> Any:
    """The predictor as a function with the hints by which Spark sees an iterator Arrow UDF."""
    from collections.abc import Iterator

    import pyarrow as pa

    def predict(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        yield from predictor(batches)

    return predict
