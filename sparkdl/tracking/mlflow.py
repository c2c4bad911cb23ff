"""MLflow: one run per fit, with its Params, its metrics and the model."""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from sparkdl.errors import ConfigError, PersistenceError
from sparkdl.history import encode_json, numbers_of
from sparkdl.tracking.base import RunInfo, import_library

__all__ = ["MLflow"]

_ARTIFACT = "model"
_PARENT = "mlflow.parentRunId"
_MOST_CHARACTERS = 6000  # of a param
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # of one request

# Fits of one program begin at a time. A local store is made by whoever asks first, and lets experiments share a name.
_creating = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MLflow:
    """Writes an MLflow run for every fit: Params, metrics by optimizer step, the status, and the model.

    The run is nested under the run that is active where ``fit`` is called, if it is on the same server; in the threads
    of a CrossValidator, under the one that is active where its ``fit`` is called. MLflow's own active run is left as it
    is. Entries of the history keep their names; what is reported between epochs is under ``step/``.

    The model is in the run's artifacts: ``mlflow.pyfunc.load_model(f"runs:/{run_id}/model")`` loads it, and predicts on
    a pandas DataFrame with the input columns what ``transform`` adds to a Spark one. No pickle is written. A module
    whose class cannot be imported by its name, because it is defined in a notebook, is not logged; the log says so.

    Attributes:
        tracking_uri: The server, or a local store; None takes that of ``mlflow.set_tracking_uri`` or the environment.
        experiment: Name of the experiment, made where it does not exist; None takes that of the parent run, else the
            one that ``mlflow.start_run`` would take.
        run_name: Name of the run; None lets MLflow invent one.
        log_model: False leaves out the model.
        registered_model_name: Register the model under this name as well.
        tags: Tags of the run.
        parent_run_id: Nest the run under this one, whichever is active.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    log_model: bool = True
    registered_model_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    _active: str | None = field(default=None, repr=False, compare=False)

    def check(self) -> None:
        """Import MLflow.

        Raises:
            ConfigError: It is not installed, or a model is to be registered that is not logged.
        """
        import_library("mlflow", "MLflow", "mlflow")
        if self.registered_model_name is not None and not self.log_model:
            raise ConfigError(
                f"registered_model_name={self.registered_model_name!r} needs the model, but log_model=False. "
                "Leave out one of them."
            )

    def bind(self) -> "MLflow":
        """The same, with the run that is active in this thread; unchanged where none is."""
        mlflow: Any = sys.modules.get("mlflow")  # what was not imported has no active run
        active = None if mlflow is None else mlflow.active_run()
        return self if active is None else replace(self, _active=active.info.run_id)

    def start(self, run: RunInfo) -> "_MlflowRun":
        """Create a run."""
        return _MlflowRun(self, run)


class _MlflowRun:
    def __init__(self, tracker: MLflow, run: RunInfo) -> None:
        import mlflow

        self._tracker = tracker
        self._client = mlflow.MlflowClient(tracking_uri=tracker.tracking_uri)
        with _creating:
            parent = self._parent()
            experiment = self._experiment(parent)
        created = self._client.create_run(
            experiment,
            start_time=int(run.started * 1000),
            tags={
                "sparkdl.run_id": run.run_id,
                "sparkdl.estimator": run.estimator,
                "sparkdl.uid": run.uid,
                **({} if parent is None else {_PARENT: parent.info.run_id}),
                **tracker.tags,
            },
            run_name=tracker.run_name,
        )
        self._run_id: str = created.info.run_id
        self._artifacts: str = created.info.artifact_uri
        params = [mlflow.entities.Param(name, _text(value)) for name, value in run.params.items()]
        for some in _in_parts(params, _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=some)

    def log_step(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._log(step, values, time)

    def log_epoch(self, record: Mapping[str, Any], time: float) -> None:
        values = {name: value for name, value in numbers_of(record).items() if name != "step"}
        self._log(int(record["step"]), values, time)

    def finish(self, model: Any, error: BaseException | None) -> None:
        status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            if model is not None and self._tracker.log_model:
                self._log_model(model)
        finally:
            self._client.set_terminated(self._run_id, status)

    def _log(self, step: int, values: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(time * 1000), step) for name, value in values.items()]
        for some in _in_parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=some)

    def _parent(self) -> Any:
        """The run that this one belongs under; None where there is none on this server, or it is over."""
        tracker = self._tracker
        if tracker.parent_run_id is not None:
            return self._client.get_run(tracker.parent_run_id)
        if tracker._active is None:
            return None
        import mlflow
        from mlflow.exceptions import MlflowException

        if tracker.tracking_uri not in (None, mlflow.get_tracking_uri()):
            return None
        try:
            found = self._client.get_run(tracker._active)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.status == "RUNNING" else None

    def _experiment(self, parent: Any) -> str:
        tracker = self._tracker
        if tracker.experiment is not None:
            return str(self._named_experiment(tracker.experiment))
        if parent is not None:
            return str(parent.info.experiment_id)
        if tracker.tracking_uri is not None:
            return "0"
        # What start_run takes: set_experiment's, the environment's, that of a Databricks notebook, or the default.
        from mlflow.tracking.fluent import _get_experiment_id

        return str(_get_experiment_id())

    def _named_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another program was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _log_model(self, model: Any) -> None:
        """Write the model to the run's artifacts.

        Raises:
            PersistenceError: It has parts that can only be pickled.
        """
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import AnyType, ColSpec, Schema

        from sparkdl.tracking.pyfunc import LOADER, TRUSTED, input_names, output_names, write_model

        any_type: Any = AnyType  # whose constructor has no annotations
        signature = ModelSignature(
            inputs=Schema([ColSpec(any_type(), name) for name in input_names(model)]),
            outputs=Schema([ColSpec(any_type(), name) for name in output_names(model)]),
        )
        with tempfile.TemporaryDirectory(prefix="sparkdl-mlflow-") as folder:
            data, saved = os.path.join(folder, "fitted"), os.path.join(folder, "saved")
            os.mkdir(data)
            try:
                write_model(model, data)
            except PersistenceError as error:
                raise PersistenceError(f"The model was not logged; everything else was. {error}") from error
            mlflow.pyfunc.save_model(
                saved,
                loader_module=LOADER,
                data_path=data,
                mlflow_model=Model(artifact_path=_ARTIFACT, run_id=self._run_id, signature=signature),
                model_config={TRUSTED: []},
                pip_requirements=_requirements(),
            )
            self._client.log_artifacts(self._run_id, saved, _ARTIFACT)
        if self._tracker.registered_model_name is not None:
            self._register(self._tracker.registered_model_name)

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._client.create_model_version(name, f"{self._artifacts}/{_ARTIFACT}", self._run_id)


def _requirements() -> list[str]:
    from importlib.metadata import version

    import torch

    return [f"sparkdl-torch=={version('sparkdl-torch')}", f"torch=={torch.__version__.partition('+')[0]}"]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(encode_json(value))
    return text[:_MOST_CHARACTERS]


def _in_parts(values: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part
