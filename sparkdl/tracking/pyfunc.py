"""A fitted model as MLflow's pyfunc: the files in its data directory, and what loads them.

    model.json              class, Params, what was learnt of the training, and the module's description
    module.safetensors      the module's weights

Nothing is pickled, and loading runs no code from the files: classes are looked up as `sparkdl.serialization` does. A
file can only name classes of torch, and of packages that were imported or that the caller trusts, by
``load_model(uri, model_config={"trusted": ["my_package"]})`` or `sparkdl.allow_modules`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch import nn

from sparkdl.config import Column
from sparkdl.errors import ConfigError, DataError, PersistenceError
from sparkdl.history import decode_json, encode_json
from sparkdl.io.spark_types import spark_type
from sparkdl.serialization import describe_module, dump_weights, path_of, resolve_function, restore_module

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LOADER", "TRUSTED", "PyfuncModel", "input_names", "output_names", "write_model"]

LOADER = __name__
TRUSTED = "trusted"
_FILE = "model.json"
_VERSION = 1


def write_model(model: Any, directory: str) -> None:
    """Write a fitted model to an empty local directory.

    Args:
        model: A model of `sparkdl.model`.
        directory: The directory.

    Raises:
        PersistenceError: It has parts that can only be pickled.
    """
    objects: dict[str, Any] = {}
    for role, thing in model._saved_objects().items():
        if isinstance(thing, nn.Module):
            objects[role] = {"module": describe_module(thing)}
            with open(os.path.join(directory, f"{role}.safetensors"), "wb") as file:
                file.write(dump_weights(thing))
        elif (path := path_of(thing)) is not None:
            objects[role] = {"import": path}
        else:
            raise PersistenceError(
                f"The {role} {thing!r} cannot be imported by its name (it is a lambda, or defined in a notebook, a "
                "script or a function). Define it in a Python file that can be imported."
            )
    params = {param.name: value for param, value in model._paramMap.items() if param.name not in objects}
    described = {
        "version": _VERSION,
        "class": type(model).__name__,
        "uid": model.uid,
        "params": params,
        "objects": objects,
        "facts": model._saved_facts(),
    }
    with open(os.path.join(directory, _FILE), "w", encoding="utf-8") as file:
        json.dump(encode_json(described), file, allow_nan=False)


def input_names(model: Any) -> list[str]:
    """The columns that a model reads; of assembled ones, their parts."""
    assemble: Mapping[str, Sequence[str]] = model._saved_facts()["assemble"]
    return list(dict.fromkeys(part for name in model._input_names() for part in assemble.get(name, (name,))))


def output_names(model: Any) -> list[str]:
    """The columns that a model adds."""
    return list(model._outputs()[1])


class PyfuncModel:
    """Predicts on pandas what a fitted model's ``transform`` adds to a Spark DataFrame; without Spark, on the CPU.

    Args:
        model: The fitted model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def predict(self, data: Any) -> "pd.DataFrame":
        """The columns that the model adds, for rows with its input columns.

        Args:
            data: A pandas DataFrame, or what pandas makes one of. Vectors and arrays are lists, NumPy arrays or vectors
                of Spark ML. NaN and None are nulls, as they are for ``spark.createDataFrame``.

        Returns:
            One row per row of the data, with its index. Vectors and arrays are NumPy arrays.

        Raises:
            ConfigError: A column is missing, or of a type that the module cannot be fed with.
            DataError: Values that it cannot be fed with, such as nulls.
        """
        import pandas as pd

        frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
        added = self.model._outputs()[1]
        if frame.empty:
            return pd.DataFrame({name: [] for name in added}, index=frame.index)
        rows = _Rows(frame, input_names(self.model))
        columns: tuple[Column, ...] = self.model._resolve(rows)
        (found,) = self.model.predictor(columns, "cpu")(iter([rows.struct(columns)]))
        made = zip(added, found.flatten(), strict=True)
        return pd.DataFrame({name: _cells(array) for name, array in made}, index=frame.index)


class _Rows:
    """A pandas DataFrame as Arrow, with the types that Spark would give it."""

    def __init__(self, frame: "pd.DataFrame", names: Sequence[str]) -> None:
        from pyspark.sql.types import StructField, StructType

        missing = [name for name in names if name not in frame.columns]
        if missing:
            raise ConfigError(f"The data has no column {missing[0]!r}. It has {', '.join(map(str, frame.columns))}.")
        self._arrays = {name: _arrow(frame[name]) for name in names}
        self.columns = list(names)
        self.schema = StructType([StructField(name, spark_type(array.type)) for name, array in self._arrays.items()])

    def struct(self, columns: Sequence[Column]) -> pa.StructArray:
        """One field per column, as Spark's batches have them."""
        arrays = [
            pa.StructArray.from_arrays([self._arrays[part] for part in column.parts], list(column.parts))
            if column.kind == "assembled"
            else self._arrays[column.name]
            for column in columns
        ]
        return pa.StructArray.from_arrays(arrays, [column.field for column in columns])


def _arrow(series: "pd.Series[Any]") -> pa.Array:
    try:
        if series.dtype == object:
            series = series.map(_plain)
        found = pa.Array.from_pandas(series)
    except pa.ArrowException as error:
        raise DataError(
            f"{series.name!r} holds values that make up no column: {error}. Give all rows the same type, such as "
            "lists of floats."
        ) from error
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _plain(value: Any) -> Any:
    """A cell as Arrow takes it."""
    from pyspark.ml.linalg import Vector

    if isinstance(value, Vector):
        return value.toArray()
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim != 1 else value


def _cells(array: pa.Array) -> Any:
    """Numbers as they are; vectors, which have the form of Spark's, and lists as NumPy arrays."""
    return (array.field("values") if pa.types.is_struct(array.type) else array).to_pandas().to_numpy()


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """What ``mlflow.pyfunc.load_model`` calls.

    Raises:
        PersistenceError: A file of a newer version, or one that names what is not trusted.
    """
    allowed: Sequence[str] = (model_config or {}).get(TRUSTED, ())
    with open(os.path.join(data_path, _FILE), encoding="utf-8") as file:
        described = decode_json(json.load(file))
    if described["version"] > _VERSION:
        raise PersistenceError(
            f"The model has format {described['version']}, this version of sparkdl reads up to {_VERSION}. "
            "Install a newer sparkdl-torch."
        )
    from sparkdl.model import TorchClassificationModel, TorchModel, TorchRegressionModel

    kinds: dict[str, Any] = {
        kind.__name__: kind for kind in (TorchClassificationModel, TorchRegressionModel, TorchModel)
    }
    if described["class"] not in kinds:
        raise PersistenceError(
            f"The file is of a {described['class']}, which is no model. Known are {', '.join(kinds)}."
        )
    objects = {}
    for role, thing in described["objects"].items():
        if "import" in thing:
            objects[role] = resolve_function(thing["import"], allowed)
        else:
            with open(os.path.join(data_path, f"{role}.safetensors"), "rb") as file:
                objects[role] = restore_module(thing["module"], file.read(), allowed)
    model = kinds[described["class"]]()
    model._resetUid(described["uid"])
    model._set(**described["params"])
    model._restore(objects, described["facts"])
    return PyfuncModel(model)
