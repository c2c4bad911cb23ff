"""Batched inference over Arrow: what `transform` runs in the Python workers."""

import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyspark import cloudpickle
from torch import Tensor, nn

from sparkdl.barrier.device import cuda_index
from sparkdl.config import Column, Device
from sparkdl.errors import ConfigError, LaunchError
from sparkdl.io.convert import raw_array
from sparkdl.io.decode import Transform, apply_transform, draws_random_numbers
from sparkdl.io.schema import to_array
from sparkdl.objective import Step, call_module

__all__ = [
    "Outputs",
    "Predictor",
    "decide",
    "is_one_logit",
    "pickled_for_transform",
    "probabilities",
    "raw_scores",
    "standardised",
]

Array = npt.NDArray[Any]
Kind = Literal["raw", "probability", "prediction", "number", "targets", "output"]
Call = Callable[[nn.Module, Sequence[Tensor]], Any]
_Parts = tuple[nn.Module, Transform | None, Call]
_ROWS = 1024  # rows of one forward


@dataclass(frozen=True, slots=True)
class Outputs:
    """What to make of the module's output.

    Attributes:
        names: Fields of the result, in order.
        kinds: What each of them holds.
        thresholds: Divide a classifier's probabilities before the largest wins.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    thresholds: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Predictor:
    """A picklable function from Arrow columns to Arrow structs, for an iterator Arrow UDF.

    Attributes:
        module: What `pickled_for_transform` returned; loaded once per Python worker.
        inputs: The module's input columns, in order.
        outputs: What to return.
        moments: Mean and scale of standardised inputs, by field.
        device: Where to run.
    """

    module: bytes = field(repr=False)
    inputs: tuple[Column, ...]
    outputs: Outputs
    moments: Mapping[str, list[list[float]]] = field(default_factory=dict)
    device: Device = "auto"

    def __call__(self, batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        """Predict for every batch: a struct of the input columns to a struct of the outputs."""
        device = _task_device(self.device)
        digest = hashlib.sha256(self.module).hexdigest()
        module, transform, call = _loaded(digest, str(device), lambda: pickle.loads(self.module))
        for batch in batches:
            tensors = self._tensors(batch, transform)
            yield self._struct(self.run(module, device, tensors, call), len(batch))

    def _tensors(self, batch: pa.StructArray, transform: Transform | None) -> Sequence[Tensor]:
        values: dict[str, Any] = {}
        for number, column in enumerate(self.inputs):
            array = batch.field(number)
            values[column.name] = raw_array(array, column, None) if column.kind == "raw" else _tensor(array, column)
        if transform is not None:
            generator = torch.Generator().manual_seed(0) if draws_random_numbers(transform) else None
            values = apply_transform(transform, values, len(batch), generator)
        return standardised([values[column.name] for column in self.inputs], self.moments)

    def run(
        self, module: nn.Module, device: torch.device, inputs: Sequence[Tensor], call: Call = call_module
    ) -> list[Array]:
        """The outputs for some rows, in the order of `Outputs.names`."""
        rows = len(inputs[0])
        parts: list[list[Array]] = []
        with torch.inference_mode():
            for start in range(0, rows, _ROWS):
                some = [tensor[start : start + _ROWS].to(device) for tensor in inputs]
                result = call(module, some)
                parts.append(self._values(result))
        return [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else []

    def _values(self, result: Any) -> list[Array]:
        if self.outputs.kinds[0] == "output":
            several = result if isinstance(result, tuple | list) else (result,)
            if len(several) != len(self.outputs.names):
                raise ConfigError(
                    f"The module returned {len(several)} outputs, but {len(self.outputs.names)} output columns are "
                    "named. Name one column per output with outputCols."
                )
            return [tensor.reshape(len(tensor), -1).float().cpu().numpy() for tensor in several]
        scores = result.cpu().double().numpy()
        if self.outputs.kinds[0] in ("number", "targets"):
            return [scores.reshape(len(scores), -1)]
        raw = raw_scores(scores)
        chance = probabilities(raw, one_logit=is_one_logit(scores))
        made = {
            "raw": raw,
            "probability": chance,
            "prediction": decide(chance, self.outputs.thresholds),
        }
        return [made[kind] for kind in self.outputs.kinds]

    def _struct(self, values: list[Array], rows: int) -> pa.StructArray:
        arrays = []
        for number, kind in enumerate(self.outputs.kinds):
            column = values[number] if values else np.empty((0, 0))
            if kind in ("prediction", "number"):
                arrays.append(pa.array(column.reshape(-1), pa.float64()))
            elif kind in ("raw", "probability"):
                arrays.append(_vectors(column))
            else:
                arrays.append(_lists(column, pa.float32() if kind == "output" else pa.float64()))
        return pa.StructArray.from_arrays(arrays, list(self.outputs.names))


def pickled_for_transform(
    module: nn.Module, transform: Transform | None, step: Step | None = None, names: Sequence[str] = ()
) -> bytes:
    """A module and how it is used, for `Predictor`.

    Args:
        module: The module.
        transform: The user's function on the input columns.
        step: The user's predictionStep.
        names: Names of the inputs, for the step.
    """
    call: Call = call_module if step is None else functools.partial(call_module, step=step, names=tuple(names))
    pickled: bytes = cloudpickle.dumps((module, transform, call))
    return pickled


def standardised(inputs: Sequence[Tensor], moments: Mapping[str, list[list[float]]]) -> list[Tensor]:
    """Inputs as the module was trained on them.

    Args:
        inputs: One tensor per input, in order.
        moments: Mean and scale by field; inputs without are left as they are.
    """
    found = []
    for number, tensor in enumerate(inputs):
        mean, scale = moments.get(f"input_{number}", (None, None))
        if mean is not None:
            tensor = (tensor - torch.tensor(mean, dtype=tensor.dtype)) * torch.tensor(scale, dtype=tensor.dtype)
        found.append(tensor)
    return found


def _tensor(array: pa.Array, column: Column) -> Tensor:
    values = to_array(array, column)
    if values.ndim == 1 and not column.flat:
        values = values[:, None]
    # to_array may return a view of Arrow's read-only memory, which torch warns of
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def raw_scores(scores: Array) -> Array:
    """Scores per class, shape (rows, classes); one logit z of class 1 becomes [-z, z]."""
    if is_one_logit(scores):
        logit = scores.reshape(-1, 1)
        return np.hstack([-logit, logit])
    return scores


def probabilities(raw: Array, *, one_logit: bool) -> Array:
    """Softmax of the scores; for one logit z the sigmoid, as MLlib does for its margins."""
    if one_logit:
        sigmoid: Array = np.exp(-np.logaddexp(0.0, -raw))
        return sigmoid
    shifted = np.exp(raw - raw.max(1, keepdims=True))
    softmax: Array = shifted / shifted.sum(1, keepdims=True)
    return softmax


def decide(chance: Array, thresholds: Sequence[float] | None) -> Array:
    """The class with the largest probability, each divided by its threshold, as `pyspark.ml.param.HasThresholds` says.

    A class with threshold 0 wins unless its probability is 0.
    """
    if thresholds is None:
        thresholds = (1.0,) * chance.shape[1]
    if len(thresholds) != chance.shape[1]:
        raise ConfigError(f"thresholds has {len(thresholds)} values for {chance.shape[1]} classes. Give one per class.")
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = chance / np.asarray(thresholds)
    scaled[np.isnan(scaled)] = -np.inf
    winner: Array = scaled.argmax(1).astype(np.float64)
    return winner


def is_one_logit(scores: Array) -> bool:
    """True where a classifier's module returned one number per row, shape (rows,) or (rows, 1)."""
    return scores.ndim == 1 or scores.shape[1] == 1


def _vectors(values: Array) -> pa.StructArray:
    """Dense ML vectors in the struct form that Spark's VectorUDT has in Arrow."""
    rows = len(values)
    return pa.StructArray.from_arrays(
        [
            pa.array(np.ones(rows, np.int8)),
            pa.nulls(rows, pa.int32()),
            pa.nulls(rows, pa.list_(pa.int32())),
            _lists(values, pa.float64()),
        ],
        ["type", "size", "indices", "values"],
    )


def _lists(values: Array, kind: pa.DataType) -> pa.ListArray:
    rows, width = values.shape
    offsets = np.arange(0, rows * width + 1, width, dtype=np.int32) if width else np.zeros(rows + 1, np.int32)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


@functools.lru_cache(maxsize=2)
def _cached(digest: str, device: str) -> list[_Parts]:
    """A slot for one module in this Python worker."""
    return []


def _loaded(digest: str, device: str, load: Callable[[], _Parts]) -> _Parts:
    """The module and how it is used, loaded once per Python worker and device; the two used last are kept."""
    slot = _cached(digest, device)
    if not slot:
        module, transform, call = load()
        slot.append((module.to(device).eval(), transform, call))
    return slot[0]


def _task_device(asked: Device) -> torch.device:
    """The GPU that Spark assigned to the task; with ``"cuda"`` any; else the CPU."""
    from pyspark import TaskContext

    task = TaskContext.get()
    if asked == "cpu" or not torch.cuda.is_available() or task is None:
        if asked == "cuda":
            raise LaunchError(
                "device='cuda' was asked for transform, but torch sees no GPU on this executor. Use 'auto'."
            )
        return torch.device("cpu")
    gpu = task.resources().get("gpu")
    if gpu:
        return torch.device("cuda", cuda_index(gpu.addresses[0], os.environ))
    if asked == "cuda":
        return torch.device("cuda", task.partitionId() % torch.cuda.device_count())
    return torch.device("cpu")
