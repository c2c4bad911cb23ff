"""Trackers, with the real libraries: what they write, that nothing is written twice, and that none fails a fit."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from pyarrow.fs import FileSelector
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import Evaluator
from pyspark.ml.linalg import DenseVector, Vectors
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import SparkSession
from torch import Tensor, nn

from sparkdl import TorchClassificationModel, TorchModel, TorchRegressionModel, TorchRegressor
from sparkdl.config import Columns, RunSpec, TrainConfig
from sparkdl.errors import ConfigError, DataError, PersistenceError
from sparkdl.history import History
from sparkdl.model import Fitted
from sparkdl.storage import open_file_system
from sparkdl.tracking import (
    MLflow,
    RunInfo,
    TensorBoard,
    Tracking,
    WeightsAndBiases,
    as_of_this_thread,
    check_trackers,
    events_url,
    flat_params,
    read_events,
)
from sparkdl.tracking.pyfunc import PyfuncModel, _load_pyfunc, write_model
from tests.spark.modules import FourInputs, TwoHeads

RUN = RunInfo(
    "run-1", {"maxEpochs": 3, "optimizer": "adamw", "inputCols": ["a", "b"]}, "TorchRegressor", "uid_1", 1.7e9
)
PLAN = {"event": "plan", "rank": 0, "host": "a", "attempt": 1, "epochs": 3, "steps": 10}


def step(number: int, **more: Any) -> dict[str, Any]:
    """A step's event, of epochs of ten steps."""
    epoch, place = (number - 1) // 10 + 1, (number - 1) % 10 + 1
    origin = {"event": "step", "rank": 0, "host": "a", "attempt": 1}
    return {
        **origin,
        "epoch": epoch,
        "step": place,
        "global_step": number,
        "loss": 1 / number,
        "data_wait": 0.25,
        **more,
    }


def epoch(number: int, **more: Any) -> dict[str, Any]:
    record = {"epoch": number, "step": 10 * number, "loss": 1 / number, "validation_f1": 0.1 * number}
    return {"event": "epoch", "rank": 0, "host": "a", "attempt": 1, **record, **more}


def feed(tracking: Tracking) -> None:
    """A fit of three epochs that was started again after its second one."""
    tracking(PLAN)
    for event in (step(4), step(8, loss=math.nan), epoch(1), step(14), epoch(2, loss=math.inf)):
        tracking(event)
    tracking({**PLAN, "attempt": 2})
    for event in (step(12), step(14), epoch(2), step(24), epoch(3)):
        tracking({**event, "attempt": 2})


class Memory:
    """A tracker of one's own, that keeps what it gets; each of its runs may be slow or fail."""

    def __init__(self, hook: Callable[[str], None] = lambda call: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        self._hook = hook

    def start(self, run: RunInfo) -> "Memory":
        return self._take("start", run)

    def log_step(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._take("step", step, dict(values))

    def log_epoch(self, record: Mapping[str, Any], time: float) -> None:
        self._take("epoch", dict(record))

    def finish(self, model: Any, error: BaseException | None) -> None:
        self._take("finish", model, error)

    def _take(self, *call: Any) -> "Memory":
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        self._hook(call[0])
        return self

    def steps(self) -> list[int]:
        return [call[1] for call in self.calls if call[0] == "step"]

    def epochs(self) -> list[int]:
        return [call[1]["epoch"] for call in self.calls if call[0] == "epoch"]


@pytest.fixture
def events(folder: str) -> str:
    return f"{folder}/events/run-1.jsonl"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of ours; the libraries log as they like."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sparkdl")]


def failing_fit(tracking: Tracking, error: BaseException) -> None:
    with tracking:
        feed(tracking)
        raise error


# ---- before the fit --------------------------------------------------------------------------------------------------
def test_to_make_trackers_imports_nothing() -> None:
    program = (
        "import sys\n"
        "from sparkdl.tracking import MLflow, TensorBoard, WeightsAndBiases\n"
        "TensorBoard('/logs'), MLflow(), WeightsAndBiases('project')\n"
        "print([name for name in ('torch', 'pyspark', 'mlflow', 'tensorboard', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("tracker", [TensorBoard("/logs"), MLflow(), WeightsAndBiases("project")], ids=repr)
def test_trackers_are_values(tracker: Any) -> None:
    assert tracker == dataclasses.replace(tracker)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(tracker, dataclasses.fields(tracker)[0].name, "other")


@pytest.mark.parametrize(
    ("tracker", "library", "extra"),
    [
        (TensorBoard("/logs"), "tensorboard", "tensorboard"),
        (MLflow(), "mlflow", "mlflow"),
        (WeightsAndBiases("project"), "wandb", "wandb"),
    ],
    ids=["tensorboard", "mlflow", "wandb"],
)
def test_a_missing_library_is_named_with_its_extra(
    tracker: Any, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as where it is not installed
    with pytest.raises(ConfigError, match=rf"needs {library}, which cannot.*sparkdl-torch\[{extra}\]"):
        check_trackers([Memory(), tracker])


@pytest.mark.parametrize("wrong", ["tensorboard", TensorBoard, 3], ids=str)
def test_what_is_no_tracker_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="which is no tracker"):
        check_trackers([wrong])


def test_one_tracker_without_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no list"):
        check_trackers(TensorBoard("/logs"))  # type: ignore[arg-type]


def test_trackers_that_can_work_pass(folder: str) -> None:
    check_trackers(None)
    check_trackers([Memory(), TensorBoard(folder), WeightsAndBiases("project", mode="offline")])


def test_params_are_flat_and_plain() -> None:
    params = {
        "module": nn.Linear(2, 1),
        "loss": nn.functional.mse_loss,
        "validationDataset": pd.DataFrame({"x": [1]}),
        "optimizerParams": {"betas": (0.9, 0.99), "options": {}},
        "trackers": [TensorBoard("/logs")],
        "weightCol": None,
        "learningRate": math.inf,
    }
    found = flat_params(params)
    assert found == {
        "module": "Linear",
        "loss": "mse_loss",
        "validationDataset": "DataFrame",
        "optimizerParams.betas": [0.9, 0.99],
        "optimizerParams.options": {},
        "trackers": ["TensorBoard"],
        "weightCol": None,
        "learningRate": math.inf,
    }


# ---- JSON lines ------------------------------------------------------------------------------------------------------
def strict_lines(path: str) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def test_every_event_is_a_line_of_valid_json_and_comes_back(events: str) -> None:
    before = time.time()
    with Tracking([], RUN, events) as tracking:
        feed(tracking)
    lines = strict_lines(events)
    kinds = [(line["event"], line.get("global_step", line.get("epoch"))) for line in lines]
    assert kinds == [
        ("start", None), ("plan", None), ("step", 4), ("step", 8), ("epoch", 1), ("step", 14), ("epoch", 2),
        ("plan", None), ("step", 24), ("epoch", 3), ("end", None),
    ]  # fmt: skip
    assert lines[0]["params"] == RUN.params
    assert lines[3]["loss"] == "NaN"
    assert lines[6]["loss"] == "Infinity"
    assert all(before <= line["time"] <= time.time() for line in lines)
    found = read_events(events)
    assert math.isnan(found[3]["loss"])
    assert found[6]["loss"] == math.inf
    assert found[2] == {**step(4), "time": lines[2]["time"]}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does, 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_local_file_can_be_read_while_the_fit_runs(events: str) -> None:
    with Tracking([], RUN, events) as tracking:
        tracking(step(4))
        until(lambda: Path(events).exists() and len(read_events(events)) == 2)
        assert read_events(events)[1]["global_step"] == 4


def test_a_line_that_was_not_written_to_its_end_is_left_out(events: str) -> None:
    with Tracking([], RUN, events) as tracking:
        tracking(step(4))
    text = Path(events).read_text()
    Path(events).write_text(text[:-5])
    assert [event["event"] for event in read_events(events)] == ["start", "step"]


def test_an_object_store_gets_the_whole_file_at_every_epoch_and_at_the_end() -> None:
    url = "memory://bucket/events/run-7.jsonl"
    with Tracking([], RUN, url) as tracking:
        tracking(step(4))
        tracking(epoch(1))
        until(lambda: open_file_system(url)[0].get_file_info("/bucket/events/run-7.jsonl").is_file)
        assert [event["event"] for event in read_events(url)] == ["start", "step", "epoch"]
        tracking(step(14))
        tracking(epoch(2))
        tracking(step(24))
    assert [event["event"] for event in read_events(url)] == ["start", "step", "epoch", "step", "epoch", "step", "end"]


def test_a_store_that_fails_is_told_of_once_and_tried_again(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    obstacle = Path(folder, "runs")
    obstacle.write_text("a file where a directory is to be")
    url = f"local://{folder}/runs/run-1.jsonl"  # of fsspec's, which is no file system that grows files here
    with Tracking([], RUN, url) as tracking:
        for number in (1, 2):
            tracking(epoch(number))
        until(lambda: len(told(caplog)) > 0)
        obstacle.unlink()
    (message,) = told(caplog)
    assert message.startswith(f"events cannot be written to {url}: ")
    assert [event["event"] for event in read_events(url)] == ["start", "epoch", "epoch", "end"]


def test_a_file_that_cannot_be_opened_is_told_of_and_fails_nothing(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    Path(folder, "runs").write_text("a file where a directory is to be")
    with Tracking([memory := Memory()], RUN, f"{folder}/runs/run-1.jsonl") as tracking:
        feed(tracking)
    (message,) = told(caplog)
    assert re.match(r"The events file .*run-1\.jsonl failed and is left alone from now on; the fit goes on\.", message)
    assert memory.epochs() == [1, 2, 3]


def test_events_of_no_fit_cannot_be_read(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        read_events(f"{folder}/none.jsonl")


def spec(**config: Any) -> RunSpec:
    return RunSpec(run_id="run-1", config=TrainConfig(**config), columns=Columns((), ()), payload=b"")


def test_events_lie_where_the_settings_say() -> None:
    assert events_url(spec(tracking_dir="s3://b/t/", checkpoint_dir="/c")) == "s3://b/t/run-1.jsonl"
    assert events_url(spec(checkpoint_dir="/c")) == "/c/run-1/run-1.jsonl"


def test_without_a_directory_events_are_in_a_file_that_goes_with_the_process() -> None:
    program = (
        "from sparkdl.config import Columns, RunSpec, TrainConfig\n"
        "from sparkdl.tracking import RunInfo, Tracking, events_url, read_events\n"
        "url = events_url(RunSpec(run_id='r', config=TrainConfig(), columns=Columns((), ()), payload=b''))\n"
        "with Tracking([], RunInfo('r', {}, 'E', 'u', 0.0), url) as tracking:\n"
        "    tracking({'event': 'plan'})\n"
        "print(len(read_events(url)), url)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    count, path = done.stdout.split()
    assert count == "3"
    assert not os.path.exists(os.path.dirname(path))


# ---- trackers of any kind --------------------------------------------------------------------------------------------
def test_a_tracker_gets_every_step_and_epoch_once_whatever_restarts_repeat(events: str) -> None:
    memory = Memory()
    with Tracking([memory], RUN, events) as tracking:
        feed(tracking)
        tracking.fitted("the model")
    assert memory.calls[0] == ("start", RUN)
    assert memory.steps() == [4, 8, 14, 24]
    assert memory.epochs() == [1, 2, 3]
    assert memory.calls[1] == ("step", 4, {"step/epoch": 1.0, "step/loss": 0.25, "step/data_wait": 0.25})
    assert memory.calls[3] == ("epoch", {"epoch": 1, "step": 10, "loss": 1.0, "validation_f1": 0.1})
    assert memory.calls[-1] == ("finish", "the model", None)
    assert memory.threads == {"sparkdl-tracking-Memory"}


def test_a_step_of_an_epoch_that_is_over_is_left_out(events: str) -> None:
    memory = Memory()
    with Tracking([memory], RUN, events) as tracking:
        for event in (step(4), epoch(1), step(9), step(11)):
            tracking(event)
    assert memory.steps() == [4, 11]


def test_a_fit_that_fails_finishes_all_trackers(events: str) -> None:
    first, second = Memory(), Memory()
    error = RuntimeError("rank 1 died")
    with pytest.raises(RuntimeError, match="rank 1 died"):
        failing_fit(Tracking([first, second], RUN, events), error)
    for memory in (first, second):
        assert memory.calls[-1] == ("finish", None, error)
    assert read_events(events)[-1]["error"] == "RuntimeError: rank 1 died"


@pytest.mark.parametrize("bad_call", ["start", "step", "epoch", "finish"])
def test_a_tracker_that_raises_is_named_once_and_fails_nothing(
    bad_call: str, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(call: str) -> None:
        if call == bad_call:
            raise OSError("no such server")

    bad, good = Memory(hook), Memory()
    with Tracking([bad, good], RUN, events) as tracking:
        feed(tracking)
    assert told(caplog) == ["Memory failed and is left alone from now on; the fit goes on. OSError: no such server"]
    calls = [call[0] for call in bad.calls]
    assert calls.count(bad_call) == 1
    # It gets nothing more; but what it has opened is closed.
    assert calls[calls.index(bad_call) + 1 :] in ([], ["finish"])
    assert ("finish" in calls) == (bad_call != "start")
    assert good.epochs() == [1, 2, 3]
    assert len(read_events(events)) == 11


def test_a_slow_tracker_holds_up_nobody_and_gets_fewer_steps_but_all_epochs(events: str) -> None:
    go_on = threading.Event()

    def hook(call: str) -> None:
        assert go_on.wait(20)

    slow, quick = Memory(hook), Memory()
    with Tracking([slow, quick], RUN, events) as tracking:
        began = time.perf_counter()
        for number in range(1, 1001):
            tracking(step(number))
            if number % 250 == 0:
                tracking(epoch(number // 250, step=number))
        assert time.perf_counter() - began < 5
        until(lambda: len(quick.epochs()) == 4)
        go_on.set()
    assert slow.epochs() == [1, 2, 3, 4]
    assert len(slow.steps()) < 100
    assert slow.steps() == sorted(slow.steps())
    assert slow.steps()[-1] == 1000
    assert len(read_events(events)) == 1006  # the file has them all


def test_the_end_does_not_wait_for_ever(events: str, caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()
    memory = Memory(lambda call: assert_waited(go_on))
    with Tracking([memory], RUN, events, patience=timedelta(seconds=0.2)) as tracking:
        tracking(step(4))
    assert told(caplog) == ["Memory is not finished in time; the fit does not wait for it any longer."]
    go_on.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("sparkdl")])
    assert memory.calls[-1][0] == "finish"


def assert_waited(event: threading.Event) -> None:
    assert event.wait(20)


def test_events_after_the_end_are_left_out(events: str) -> None:
    with Tracking([memory := Memory()], RUN, events) as tracking:
        tracking(step(4))
    tracking(step(8))
    assert memory.steps() == [4]


# ---- TensorBoard -----------------------------------------------------------------------------------------------------
def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(directory)
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def check_scalars(found: dict[str, list[tuple[int, float]]]) -> None:
    assert [one for one, _ in found["loss"]] == [10, 20, 30]
    np.testing.assert_allclose([value for _, value in found["loss"]], [1, math.inf, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose([value for _, value in found["validation_f1"]], [0.1, 0.2, 0.3], rtol=1e-6)
    assert [one for one, _ in found["step/loss"]] == [4, 8, 14, 24]
    assert math.isnan(found["step/loss"][1][1])


def test_tensorboard_has_a_folder_for_the_run(folder: str, events: str) -> None:
    with Tracking([TensorBoard(folder)], RUN, events) as tracking:
        feed(tracking)
    check_scalars(scalars(f"{folder}/run-1"))


def test_tensorboard_files_go_to_an_object_store(folder: str, events: str) -> None:
    url = "memory://bucket/tensorboard"
    with Tracking([TensorBoard(url)], RUN, events) as tracking:
        feed(tracking)
    file_system, path = open_file_system(f"{url}/run-1")
    for info in file_system.get_file_info(FileSelector(path)):
        with file_system.open_input_stream(info.path) as stream:
            Path(folder, info.base_name).write_bytes(stream.read())
    check_scalars(scalars(folder))


def test_tensorboard_with_an_unknown_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="on a file system that this Python cannot open"):
        check_trackers([TensorBoard("nosuchstore://bucket/logs")])


# ---- Weights & Biases ------------------------------------------------------------------------------------------------
@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """No key of an account, no reports to the makers of wandb, and nothing outside of a folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", f"{folder}/netrc")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, f"{folder}/{name}")


def records_of(directory: str) -> list[Any]:
    """The records of the one offline run in a directory: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(directory).glob("wandb/offline-run-*/*.wandb")
    content, position, whole, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block is too short for a header
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def services() -> list[str]:
    return [child.name() for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


@pytest.mark.usefixtures("no_account")
@pytest.mark.parametrize("error", [None, RuntimeError("rank 1 died")], ids=["success", "failure"])
def test_wandb_writes_one_offline_run_and_leaves_nothing_behind(
    error: BaseException | None, folder: str, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = WeightsAndBiases("project", name="fit", group="all", tags=("a",), mode="offline", directory=folder)
    check_trackers([tracker])
    tracking = Tracking([tracker], RUN, events)
    if error is None:
        with tracking:
            feed(tracking)
    else:
        with pytest.raises(RuntimeError, match="rank 1 died"):
            failing_fit(tracking, error)
    assert told(caplog) == []
    records = records_of(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][-1:]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("project", "fit", "all", ["a"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["maxEpochs"] == 3
    assert config["run_id"] == "run-1"
    rows = rows_of(records)
    assert [row["_step"] for row in rows] == [4, 8, 10, 14, 20, 24, 30]
    assert rows[0]["step/loss"] == 0.25
    assert rows[2]["loss"] == 1.0
    (ended,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == (0 if error is None else 1)
    assert services() == []
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.usefixtures("no_account")
def test_wandb_leaves_the_users_own_run_alone_and_serves_fits_at_a_time(folder: str, events: str) -> None:
    import wandb

    options: dict[str, Any] = {"mode": "offline", "settings": wandb.Settings(console="off", silent=True)}
    own = wandb.init(project="own", dir=folder, **options)
    try:
        directories = [f"{folder}/{number}" for number in range(2)]
        for directory in directories:
            os.mkdir(directory)
        fits = [
            Tracking([WeightsAndBiases("project", mode="offline", directory=directory)], RUN, f"{directory}/e.jsonl")
            for directory in directories
        ]
        with fits[0], fits[1]:
            for fit in fits:
                feed(fit)
        for directory in directories:  # the service writes the rest of a run after finish() has returned
            until(lambda directory=directory: len(rows_of(records_of(directory))) == 7)  # type: ignore[misc]
        assert wandb.run is own
        own.log({"a": 1})
        assert services()
    finally:
        own.finish()
        wandb.teardown()


@pytest.mark.usefixtures("no_account")
def test_wandb_without_an_account_is_refused_before_the_fit() -> None:
    with pytest.raises(ConfigError, match=r"WeightsAndBiases .*use mode='offline' and `wandb sync` later"):
        check_trackers([WeightsAndBiases("project", mode="online")])


# ---- MLflow ----------------------------------------------------------------------------------------------------------
MLFLOW = pytest.mark.filterwarnings(
    # Of MLflow's own types, when mlflow.pyfunc is imported.
    "ignore:.*Any type hint is inferred as AnyType:UserWarning",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tracking URI of a store on disk, which is that of this process as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow

        uri = (
            tmp_path_factory.mktemp("mlflow") / "store"
        ).as_uri()  # to be made by MLflow, with its default experiment
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient().search_experiments()  # MLflow makes a local store at first use, in more than one step
        yield uri
        mlflow.set_tracking_uri(None)


def runs_of(uri: str, experiment: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found is not None else []


def regression(**params: Any) -> TorchRegressionModel:
    """A model that doubles the sum of two features."""
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, 2.0)
    nn.init.zeros_(module.bias)
    model = TorchRegressionModel()
    model._set(**params)
    history = History([{"epoch": 1, "step": 1, "loss": math.nan}])
    model._fitted = Fitted(module.eval(), "float32", ((2,),), 1, history=history)
    return model


@MLFLOW
def test_mlflow_has_a_run_with_params_metrics_by_step_and_the_model(
    store: str, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    tracker = MLflow(experiment="plain", run_name="fit", tags={"team": "a"}, registered_model_name="doubler")
    check_trackers([tracker])
    for _ in range(2):
        with Tracking([tracker], RUN, events) as tracking:
            feed(tracking)
            tracking.fitted(regression())
    assert told(caplog) == []
    run, other = runs_of(store, "plain")
    assert other.info.run_id != run.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "fit")
    assert run.data.params == {"maxEpochs": "3", "optimizer": "adamw", "inputCols": '["a", "b"]'}
    assert run.data.tags["team"] == "a"
    assert run.data.tags["sparkdl.run_id"] == "run-1"
    assert "mlflow.parentRunId" not in run.data.tags
    client = mlflow.MlflowClient()

    def series(name: str) -> list[tuple[int, float]]:
        return [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]

    assert series("loss") == [(10, 1.0), (20, math.inf), (30, 1 / 3)]
    assert [one for one, _ in series("step/loss")] == [4, 8, 14, 24]
    assert math.isnan(series("step/loss")[1][1])
    assert {version.run_id for version in client.search_model_versions("name = 'doubler'")} == {
        run.info.run_id, other.info.run_id,
    }  # fmt: skip
    for uri in (f"runs:/{run.info.run_id}/model", "models:/doubler/1"):
        model = mlflow.pyfunc.load_model(uri)
        assert model.metadata.get_input_schema().input_names() == ["features"]
        frame = pd.DataFrame({"features": [[1.0, 2.0], [3.0, 4.0]]}, index=[7, 9])
        pd.testing.assert_frame_equal(model.predict(frame), pd.DataFrame({"prediction": [6.0, 14.0]}, index=[7, 9]))
    written = client.list_artifacts(run.info.run_id, "model/data/fitted")
    assert sorted(os.path.basename(file.path) for file in written) == ["model.json", "module.safetensors"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("rank 1 died"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
    ids=["error", "ctrl-c"],
)
def test_mlflow_says_how_a_fit_ended(error: BaseException, status: str, store: str, events: str) -> None:
    with pytest.raises(type(error)):
        failing_fit(Tracking([MLflow(experiment=status)], RUN, events), error)
    (run,) = runs_of(store, status)
    assert run.info.status == status
    assert run.info.end_time is not None


@MLFLOW
def test_a_model_that_cannot_be_described_is_not_logged_but_the_run_is(
    store: str, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Local(nn.Linear):
        pass

    model = regression()
    model._fitted = dataclasses.replace(model._state, module=Local(2, 1))
    with Tracking([MLflow(experiment="local")], RUN, events) as tracking:
        feed(tracking)
        tracking.fitted(model)
    (message,) = told(caplog)
    assert re.search(
        r"MLflow failed .* The model was not logged; everything else was\. .*Local cannot be imported", message
    )
    (run,) = runs_of(store, "local")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == 1 / 3


@MLFLOW
def test_a_logged_model_with_functions_of_a_package_loads_once_the_package_is_trusted(
    store: str, events: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    model, rows = models()["nulls and a transform"]
    with Tracking([MLflow(experiment="trust")], RUN, events) as tracking:
        tracking.fitted(model)
    (run,) = runs_of(store, "trust")
    uri, expected = f"runs:/{run.info.run_id}/model", PyfuncModel(model).predict(pd.DataFrame(rows))
    with pytest.raises(PersistenceError, match="which is in none of the trusted packages"):
        mlflow.pyfunc.load_model(uri)
    loaded = mlflow.pyfunc.load_model(uri, model_config={"trusted": [__name__]})
    pd.testing.assert_frame_equal(loaded.predict(pd.DataFrame(rows)), expected)
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"trusted": [__name__]}))
    pd.testing.assert_frame_equal(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame(rows)), expected)


def test_a_model_need_not_be_logged(store: str, events: str) -> None:
    import mlflow

    with Tracking([MLflow(experiment="bare", log_model=False)], RUN, events) as tracking:
        tracking.fitted(regression())
    (run,) = runs_of(store, "bare")
    assert mlflow.MlflowClient().list_artifacts(run.info.run_id) == []
    with pytest.raises(ConfigError, match="needs the model, but log_model=False"):
        check_trackers([MLflow(log_model=False, registered_model_name="x")])


def test_mlflow_takes_the_experiment_that_start_run_would_take(store: str, events: str) -> None:
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")  # set_experiment leaves it in the environment
        chosen = mlflow.set_experiment("chosen")
        with Tracking([MLflow()], RUN, events):
            pass
        assert [run.info.experiment_id for run in runs_of(store, "chosen")] == [chosen.experiment_id]
        with (
            mlflow.start_run(experiment_id=mlflow.create_experiment("of the parent")) as parent,
            Tracking([MLflow()], RUN, events),
        ):
            pass
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs_of(store, "of the parent")}
    assert parents == {None, parent.info.run_id}


def test_a_run_is_nested_under_the_one_that_is_active_where_fit_is_called(
    store: str, events: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import mlflow

    tracker = MLflow(experiment="nested")
    other = (tmp_path_factory.mktemp("mlflow") / "other").as_uri()

    def fit(one: MLflow = tracker) -> str | None:
        with Tracking([one], RUN, events):
            pass
        newest = max(runs_of(one.tracking_uri or store, "nested"), key=lambda run: run.info.start_time)
        found: str | None = newest.data.tags.get("mlflow.parentRunId")
        mlflow.MlflowClient(one.tracking_uri or store).delete_run(newest.info.run_id)
        return found

    assert fit() is None
    with mlflow.start_run() as first:
        assert fit() == first.info.run_id
        (bound,) = as_of_this_thread([tracker])
        assert bound == tracker
        # Not on another server, which does not know it.
        assert fit(dataclasses.replace(tracker, tracking_uri=other)) is None
        assert mlflow.active_run().info.run_id == first.info.run_id
    assert fit(bound) is None  # it is over
    with mlflow.start_run() as second:
        assert fit(bound) == second.info.run_id
    assert fit(dataclasses.replace(tracker, parent_run_id=first.info.run_id)) == first.info.run_id


def test_fits_that_begin_at_a_time_share_a_new_experiment(store: str, folder: str) -> None:
    ready = threading.Barrier(4)

    def fit(number: int) -> None:
        ready.wait(20)
        with Tracking([MLflow(experiment="shared")], RUN, f"{folder}/{number}.jsonl"):
            pass

    threads = [threading.Thread(target=fit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(runs_of(store, "shared")) == 4


class Anything(Evaluator):
    """Finds all models equally good, without looking at them."""

    def _evaluate(self, dataset: Any) -> float:
        return 0.0


# CrossValidator leaves its pool of threads to the garbage collector, which complains of it.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <function Pool.__del__:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings("ignore:unclosed running multiprocessing pool:ResourceWarning")
@MLFLOW
@pytest.mark.spark
@pytest.mark.slow
def test_the_fits_of_a_cross_validator_are_nested_under_the_run_where_it_was_called(
    store: str, spark: SparkSession
) -> None:
    import mlflow

    rows = [(Vectors.dense(x, 1.0), float(x)) for x in range(16)]
    df = spark.createDataFrame(rows, ["features", "label"]).coalesce(1)
    name = "cross validation"
    tracker = MLflow(experiment=name)  # made where no run is active
    estimator = TorchRegressor(
        module=nn.Linear(2, 1), trackers=[tracker], maxEpochs=2, batchSize=4, device="cpu", verbose=False
    )
    grid = ParamGridBuilder().addGrid(estimator.learningRate, [0.125]).build()
    validator = CrossValidator(
        estimator=Pipeline(stages=[estimator]),
        estimatorParamMaps=grid, evaluator=Anything(), numFolds=2, seed=1,
    )  # fmt: skip
    begun, over = threading.Event(), threading.Event()

    def have_another_run() -> None:
        with mlflow.start_run():
            begun.set()
            over.wait(200)

    other = threading.Thread(target=have_another_run)
    other.start()
    try:
        assert begun.wait(60)
        with mlflow.start_run() as parent:
            best = validator.fit(df).bestModel.stages[0]
    finally:
        over.set()
        other.join()
    runs = runs_of(store, name)
    assert len(runs) == 3  # two folds, and the best one on all rows
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.params["learningRate"] for run in runs} == {"0.125"}
    newest = max(runs, key=lambda run: run.info.start_time)
    series = mlflow.MlflowClient().get_metric_history(newest.info.run_id, "loss")
    assert [(one.step, one.value) for one in series] == [(one["step"], one["loss"]) for one in best.history]
    loaded = mlflow.pyfunc.load_model(f"runs:/{newest.info.run_id}/model")
    found = loaded.predict(pd.DataFrame({"features": [[3.0, 1.0]]}))["prediction"][0]
    assert found == best.predict(Vectors.dense(3.0, 1.0))


# ---- the model as MLflow's pyfunc ------------------------------------------------------------------------------------
def by_hand(kind: type, module: nn.Module, shapes: Any, outputs: int, params: dict[str, Any], **fitted: Any) -> Any:
    model = kind()
    model._set(**params)
    model._fitted = Fitted(module.eval(), "float32", shapes, outputs, **fitted)
    return model


def halve(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transform that can be imported."""
    return {"a": columns["a"] / 2}


def models() -> dict[str, tuple[Any, list[Any]]]:
    """Models of all kinds, and rows for Spark with the columns that they read."""
    vector = [DenseVector([float(i), 1.0, -i / 2]) for i in range(6)]
    sparse = [Vectors.sparse(3, {i % 3: float(i)}) for i in range(6)]
    return {
        "classifier": (
            by_hand(
                TorchClassificationModel, nn.Linear(3, 3), ((3,),), 3,
                {"featuresCol": "v", "thresholds": [0.2, 0.5, 0.9]},
                moments={"input_0": [[1.0, 0.0, 0.5], [2.0, 1.0, 1.0]]},
            ),
            [{"v": value, "more": "text"} for value in vector],
        ),
        "one logit": (
            by_hand(TorchClassificationModel, nn.Linear(3, 1), ((3,),), 2, {"featuresCol": "v"}),
            [{"v": value} for value in sparse],
        ),
        "four inputs": (
            by_hand(
                TorchClassificationModel, FourInputs(), ((2,), (3,), (1,), ()), 2,
                {"inputCols": ["vector", "array", "number", "place"], "vocabularies": {"place": list("abcde")}},
            ),
            [
                {"vector": DenseVector([1, i]), "array": [float(i), 1.0, 2.0], "number": i / 4, "place": "abcde"[i % 5]}
                for i in range(6)
            ],
        ),
        "assembled": (
            by_hand(
                TorchRegressionModel, nn.Linear(2, 1), ((2,),), 1, {"featuresCol": "ab"}, assemble={"ab": ("a", "b")}
            ),
            [{"a": i, "b": i / 2} for i in range(6)],
        ),
        "targets": (
            by_hand(
                TorchRegressionModel, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ((2, 2),), 2,
                {"featuresCol": "a", "shapes": {"a": [2, 2]}},
            ),
            [{"a": [[1.0, i / 2], [0.0, 2.0]]} for i in range(6)],
        ),
        "two outputs": (
            by_hand(TorchModel, TwoHeads(), ((3,),), 0, {"featuresCol": "v", "outputCols": ["numbers", "scores"]}),
            [{"v": value} for value in vector],
        ),
        "nulls and a transform": (
            by_hand(
                TorchModel, nn.Linear(1, 1), ((1,),), 0, {"featuresCol": "a", "nulls": 7.0}, transform=halve
            ),
            [{"a": None if i == 2 else float(i)} for i in range(6)],
        ),
    }  # fmt: skip


def as_arrays(frame: pd.DataFrame) -> dict[str, Any]:
    return {
        name: np.array([value.toArray() if isinstance(value, DenseVector) else value for value in frame[name]])
        for name in frame.columns
    }


@pytest.mark.spark
@pytest.mark.parametrize("name", list(models()))
def test_a_loaded_model_predicts_on_pandas_what_transform_does_on_spark(
    name: str, spark: SparkSession, folder: str
) -> None:
    model, rows = models()[name]
    write_model(model, folder)
    loaded = _load_pyfunc(folder, {"trusted": [__name__]})
    assert loaded.model.uid == model.uid
    df = spark.createDataFrame([tuple(row.values()) for row in rows], list(rows[0])).coalesce(1)
    transformed = model.transform(df)
    added = [column for column in transformed.columns if column not in df.columns]
    expected, found = as_arrays(transformed.select(added).toPandas()), as_arrays(loaded.predict(pd.DataFrame(rows)))
    assert list(found) == added
    for column in added:
        np.testing.assert_array_equal(found[column], expected[column])


def test_what_was_learnt_travels_with_nan_in_it(folder: str) -> None:
    write_model(regression(), folder)
    text = Path(folder, "model.json").read_text()
    assert "NaN" in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(_load_pyfunc(folder).model.history[0]["loss"])


def test_arrays_and_numpy_cells_are_taken_and_no_rows_give_none() -> None:
    loaded = PyfuncModel(regression())
    for cells in (
        [np.array([1.0, 2.0]), np.array([0.0, 1.0])],
        [[1.0, 2.0], [0.0, 1.0]],
        [DenseVector([1, 2]), DenseVector([0, 1])],
    ):
        assert loaded.predict({"features": cells})["prediction"].tolist() == [6.0, 2.0]
    assert loaded.predict(pd.DataFrame({"features": []})).to_dict("list") == {"prediction": []}


def test_columns_that_cannot_be_fed_are_named() -> None:
    loaded = PyfuncModel(regression())
    with pytest.raises(ConfigError, match=r"has no column 'features'. It has a, b"):
        loaded.predict(pd.DataFrame({"a": [1], "b": [2]}))
    with pytest.raises(DataError, match="'features' holds values that make up no column"):
        loaded.predict(pd.DataFrame({"features": [[1.0, 2.0], "text"]}))
    with pytest.raises(DataError, match="'features' is null"):
        loaded.predict(pd.DataFrame({"features": [[1.0, 2.0], None]}))
    with pytest.raises(ConfigError, match="has type string"):
        loaded.predict(pd.DataFrame({"features": ["a", "b"]}))


def test_a_function_that_can_only_be_pickled_is_refused(folder: str) -> None:
    model = regression()
    model._fitted = dataclasses.replace(model._state, transform=lambda columns: columns)
    with pytest.raises(PersistenceError, match=r"The transform .* cannot be imported by its name"):
        write_model(model, folder)


def doctored(folder: str, **changes: Any) -> None:
    path = Path(folder, "model.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_file_gets_no_code_to_run(folder: str) -> None:
    model, _ = models()["nulls and a transform"]
    write_model(model, folder)
    with pytest.raises(
        PersistenceError, match=r"asks for the function .*:halve, which is in none of the trusted packages"
    ):
        _load_pyfunc(folder)
    write_model(regression(), folder)
    doctored(folder, **{"class": "Popen"})
    with pytest.raises(PersistenceError, match="is of a Popen, which is no model"):
        _load_pyfunc(folder)


def test_a_model_of_a_newer_format_is_refused(folder: str) -> None:
    write_model(regression(), folder)
    doctored(folder, version=2)
    with pytest.raises(PersistenceError, match="has format 2, this version of sparkdl reads up to 1"):
        _load_pyfunc(folder)


def test_loading_needs_no_spark_session(folder: str) -> None:
    write_model(regression(), folder)
    program = (
        "import pandas as pd, sys\n"
        f"from sparkdl.tracking.pyfunc import _load_pyfunc\n"
        f"print(_load_pyfunc({folder!r}).predict(pd.DataFrame({{'features': [[1.0, 2.0]]}})).to_dict('list'))\n"
        "from pyspark import SparkContext; assert SparkContext._gateway is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.returncode) == ("{'prediction': [6.0]}", 0), done.stderr
