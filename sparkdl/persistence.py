"""Estimators and models on Spark's file systems.

    metadata/               JSON: class, uid, Params, how the module is built, what was learnt of the training
    weights.safetensors     the module's weights (of an Estimator: its initial ones)
    objects.pickle          only on request: what cannot be described (classes of a notebook, lambdas), by value

Files go through Spark, not through this process's disk: over Spark Connect the client's disk is not the server's.
Nothing is unpickled unless the reader is told to.
"""

import functools
import os
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyspark import cloudpickle
from pyspark.errors import AnalysisException
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter
from pyspark.sql import functions as F
from torch import nn

from sparkdl import parallel
from sparkdl.errors import PersistenceError
from sparkdl.serialization import (
    describe_module,
    dump_weights,
    path_of,
    resolve_function,
    restore_module,
)
from sparkdl.storage import open_file_system
from sparkdl.tracking import MLflow, TensorBoard, WeightsAndBiases

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["FORMAT_VERSION", "ModuleReader", "ModuleWriter", "Saved"]

FORMAT_VERSION = 1
_PICKLE = "objects.pickle"
_NEVER_SAVED = ("validationDataset",)  # rows are no setting
_TRACKERS = (MLflow, TensorBoard, WeightsAndBiases)
_ALLOW_CONF = "spark.sparkdl.allowPickle"


class Saved(ABC):
    """What a class of Params with modules and functions among them gives to be written, and takes when read."""

    @abstractmethod
    def _saved_objects(self) -> dict[str, Any]:
        """Modules, functions and names by role; they are no JSON values."""

    def _saved_facts(self) -> dict[str, Any]:
        """JSON values beside the Params."""
        return {}

    @abstractmethod
    def _restore(self, objects: dict[str, Any], facts: dict[str, Any]) -> None:
        """Take what was read."""


class ModuleWriter(MLWriter):
    """Writes an instance. ``option("allowPickle", "true")`` permits pickling what cannot be described."""

    def __init__(self, instance: Any) -> None:
        super().__init__()
        self._instance = instance

    def saveImpl(self, path: str) -> None:
        """Write metadata, weights and, if allowed and needed, pickles.

        Raises:
            PersistenceError: Something can only be pickled, and that was not allowed.
        """
        instance, spark = self._instance, self.sparkSession
        described: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        pickled: dict[str, Any] = {}
        for role, thing in instance._saved_objects().items():
            try:
                described[role], weights = _describe(thing, role)
            except PersistenceError as error:
                if not _pickle_allowed(self.optionMap, spark):
                    raise PersistenceError(f"{error} (In a pipeline: the Spark conf {_ALLOW_CONF}=true.)") from error
                described[role], weights = {"pickle": role}, None
                pickled[role] = thing
            if weights is not None:
                files[_weights_file(role)] = weights
        if pickled:
            files[_PICKLE] = cloudpickle.dumps(pickled)
        extra = {
            "formatVersion": FORMAT_VERSION,
            "objects": described,
            "facts": instance._saved_facts(),
        }
        plain = {
            param.name: value
            for param, value in instance._paramMap.items()
            if param.name not in described and param.name not in _NEVER_SAVED
        }
        # The defaults are the class's own; those of another version must not come back.
        DefaultParamsWriter.saveMetadata(instance, path, spark, extraMetadata=extra, paramMap=plain)
        for name, content in files.items():
            write_file(spark, path, name, content)


class ModuleReader(MLReader[Any]):
    """Reads an instance.

    Pickles are opened only with ``option("allowPickle", "true")``, or the Spark conf ``spark.sparkdl.allowPickle``.
    """

    def __init__(self, cls: type) -> None:
        super().__init__()
        self._cls = cls
        self._options: dict[str, str] = {}

    def option(self, key: str, value: Any) -> "ModuleReader":
        """Set an option of the reader; keys are case-insensitive."""
        self._options[key.lower()] = str(value)
        return self

    def load(self, path: str) -> Any:
        """Read an instance.

        Raises:
            PersistenceError: A newer format, another class, a class that is not trusted, or a pickle that was not
                allowed.
        """
        spark = self.sparkSession
        metadata = DefaultParamsReader.loadMetadata(path, spark)
        expected = f"{self._cls.__module__}.{self._cls.__name__}"
        if metadata["class"] != expected:
            raise PersistenceError(f"{path} holds a {metadata['class']}; load it with that class, not with {expected}.")
        if metadata.get("formatVersion", 0) > FORMAT_VERSION:
            raise PersistenceError(
                f"{path} has format {metadata['formatVersion']}, this version of sparkdl reads up to {FORMAT_VERSION}. "
                "Install a newer sparkdl-torch."
            )
        pickled: dict[str, Any] | None = None
        objects = {}
        for role, described in metadata["objects"].items():
            if "pickle" in described:
                self._check_pickle(spark, path, role)
                if pickled is None:
                    pickled = pickle.loads(read_file(spark, f"{path.rstrip('/')}/{_PICKLE}"))
                objects[role] = pickled[role]
            elif "module" in described:
                weights = read_file(spark, f"{path.rstrip('/')}/{_weights_file(role)}")
                objects[role] = restore_module(described["module"], weights)
            else:
                objects[role] = _restored(described)
        instance = self._cls()
        instance._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(instance, {**metadata, "defaultParamMap": {}})
        instance._restore(objects, metadata["facts"])
        return instance

    def _check_pickle(self, spark: "SparkSession", path: str, role: str) -> None:
        if not _pickle_allowed(self._options, spark):
            raise PersistenceError(
                f"The {role} in {path} was saved as a pickle, and unpickling runs code from the file. If you trust it, "
                f'load with .read().option("allowPickle", "true"), or set {_ALLOW_CONF}=true for stages of a pipeline.'
            )


def _pickle_allowed(options: Mapping[str, str], spark: "SparkSession") -> bool:
    """Writers and readers of pipelines hand no options to their stages: those ask the session."""
    conf = spark.conf.get(_ALLOW_CONF, "false") or "false"
    return options.get("allowpickle", conf).lower() == "true"


def _describe(thing: Any, role: str) -> tuple[dict[str, Any], bytes | None]:
    if isinstance(thing, nn.Module):
        return {"module": describe_module(thing)}, dump_weights(thing)
    if thing is None or isinstance(thing, str):
        return {"value": thing}, None
    if isinstance(thing, list | tuple) and not any(isinstance(entry, nn.Module) for entry in thing):
        return {"list": [_describe(entry, role)[0] for entry in thing]}, None
    if isinstance(thing, Mapping) and not any(isinstance(entry, nn.Module) for entry in thing.values()):
        return {"dict": {name: _describe(entry, role)[0] for name, entry in thing.items()}}, None
    if isinstance(thing, _TRACKERS):
        settings = {name: value for name, value in asdict(thing).items() if not name.startswith("_")}
        return {"tracker": type(thing).__name__, "fields": settings}, None
    if _is_of_parallel(type(thing)):
        return _describe_options(thing, role), None
    path = path_of(thing)
    if path is None:
        raise PersistenceError(
            f"The {role} {thing!r} cannot be imported by its name (it is a lambda, or defined in a notebook, a script "
            "or a function). Define it in a Python file that can be imported, or save with "
            '.option("allowPickle", "true").'
        )
    return {"import": path}, None


def _is_of_parallel(kind: type) -> bool:
    """True of the strategies and their options, which are described by their fields."""
    return is_dataclass(kind) and kind.__name__ in parallel.__all__ and getattr(parallel, kind.__name__) is kind


def _describe_options(thing: Any, role: str) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if _is_of_parallel(type(value)):
            return _describe_options(value, role)
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        if isinstance(value, Mapping):
            return {"dict": {str(name): plain(entry) for name, entry in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise PersistenceError(
            f"The {role} {thing!r} holds a {type(value).__name__}, which cannot be described. Use numbers and text, or "
            'save with .option("allowPickle", "true").'
        )

    options = {one.name: plain(getattr(thing, one.name)) for one in fields(thing) if one.init}
    return {"strategy": type(thing).__name__, "options": options}


def _restored_options(described: Any) -> Any:
    if isinstance(described, list):
        return tuple(_restored_options(entry) for entry in described)
    if not isinstance(described, Mapping):
        return described
    if "dict" in described:
        return {name: _restored_options(entry) for name, entry in described["dict"].items()}
    name = described["strategy"]
    if name not in parallel.__all__ or not is_dataclass(getattr(parallel, name)):
        raise PersistenceError(
            f"The file holds a strategy of unknown kind {name!r}. Was it written by a newer version?"
        )
    options = {option: _restored_options(value) for option, value in described["options"].items()}
    return getattr(parallel, name)(**options)


def _restored(described: Mapping[str, Any]) -> Any:
    """What `_describe` described, but for modules."""
    if "strategy" in described:
        return _restored_options(described)
    if "import" in described:
        return resolve_function(described["import"])
    if "list" in described:
        return [_restored(entry) for entry in described["list"]]
    if "dict" in described:
        return {name: _restored(entry) for name, entry in described["dict"].items()}
    if "tracker" in described:
        known: dict[str, Any] = {kind.__name__: kind for kind in _TRACKERS}
        if described["tracker"] not in known:
            raise PersistenceError(
                f"The file holds a tracker of unknown kind {described['tracker']!r}. Was it written by a newer version?"
            )
        settings = described["fields"].items()
        return known[described["tracker"]](
            **{name: tuple(value) if isinstance(value, list) else value for name, value in settings}
        )
    return described["value"]


def _weights_file(role: str) -> str:
    return "weights.safetensors" if role == "module" else f"{role}.safetensors"


def write_file(spark: "SparkSession", directory: str, name: str, content: bytes) -> None:
    """Write a small file through Spark's file systems, beside the metadata that Spark has just written there."""
    # Only Spark knows what a path without scheme, or a relative one, means to it.
    metadata = spark.read.text(f"{directory.rstrip('/')}/metadata").inputFiles()[0]
    path = f"{unquote(metadata).rsplit('/', 2)[0]}/{name}"
    with tempfile.TemporaryDirectory(prefix="sparkdl-") as folder:
        local = os.path.join(folder, name)
        with open(local, "wb") as file:
            file.write(content)
        if hasattr(spark, "_jsparkSession"):
            hadoop = spark._jvm.org.apache.hadoop.fs  # type: ignore[union-attr]
            target = hadoop.Path(path)
            file_system = target.getFileSystem(spark._jsparkSession.sessionState().newHadoopConf())
            file_system.copyFromLocalFile(False, True, hadoop.Path(local), target)
            return
        if ":" not in directory:
            try:  # the server's default file system, which is all that a Connect client can copy to
                spark.copyFromLocalToFs(local, urlparse(path).path)
                return
            except Exception as error:
                if "local file system destination" not in str(error):
                    raise
    # A server keeps its clients off its own disk. Its executors write there, as Spark's own writers do.
    source = spark.createDataFrame([(content,)], "content binary")
    source.mapInArrow(functools.partial(_write_local, path), "written int").toArrow()


def _write_local(path: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    file_system, inner = open_file_system(path)
    for batch in batches:
        file_system.create_dir(os.path.dirname(inner), recursive=True)
        for content in batch.column(0):
            with file_system.open_output_stream(inner) as sink:
                sink.write(content.as_buffer())
        yield pa.RecordBatch.from_pydict({"written": pa.array([1] * batch.num_rows, pa.int32())})


def read_file(spark: "SparkSession", path: str) -> bytes:
    """Read a file through Spark's file systems.

    Raises:
        PersistenceError: There is no such file.
    """
    try:
        row = spark.read.format("binaryFile").load(path).select(F.col("content")).first()
    except AnalysisException as error:
        if error.getCondition() != "PATH_NOT_FOUND":
            raise
        row = None
    if row is None:
        raise PersistenceError(f"{path} is missing; the save was not completed.")
    return bytes(row[0])
