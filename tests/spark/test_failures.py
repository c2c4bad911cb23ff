"""A rank that fails: what the user sees, how soon, and what is left of it."""

import contextlib
import gc
import hashlib
import importlib
import json
import logging
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import Tensor, nn

from sparkdl import TorchEstimator, TorchModel, TrainingFailedError
from sparkdl.barrier.context import RankContext
from sparkdl.barrier.launch import launch_stage, new_run_id
from sparkdl.config import Timeouts

pytestmark = [pytest.mark.spark, pytest.mark.timeout(180)]

ROWS = 64
BATCH = 8
PLANTED = "planted failure of rank one"
SOON = 10.0  # seconds from the failure to the driver's error


# ---- what can happen in a rank ---------------------------------------------------------------------------------------
def nothing() -> None:
    """A rank that does not fail."""


def raise_error() -> None:
    raise RuntimeError(PLANTED)


class SlowToDie:
    """Keeps the process that lets go of it alive for ten seconds."""

    def __del__(self) -> None:
        time.sleep(10)


def raise_error_and_live_on() -> None:
    error = RuntimeError(PLANTED)
    error.holder = SlowToDie()  # goes when the exception goes
    raise error


def die_by_sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take_ages() -> None:
    time.sleep(0.2)


@dataclass
class Event:
    """Happens on rank 1 from its fifth batch on, and notes when it happened first."""

    act: Callable[[], None]
    marker: str
    seen: int = field(default=0, init=False)

    def __call__(self) -> None:
        if not dist.is_initialized() or dist.get_rank() != 1:
            return
        self.seen += 1
        if self.seen > 4:
            if not os.path.exists(self.marker):
                Path(self.marker).write_text(str(time.time()))
            self.act()


class Eventful(nn.Module):
    """A linear module to whose forward something happens."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.event = event

    def forward(self, features: Tensor) -> Tensor:
        self.event()
        return self.linear(features)


@dataclass
class EventfulLoss:
    """Squared error to whose computation something happens."""

    event: Event

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        self.event()
        return (output - label) ** 2


def raise_value_error() -> None:
    raise ValueError(PLANTED)


class AtHome(nn.Linear):
    """A module of a package that only the driver has."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AtHome":
        return AtHome()

    def __reduce__(self) -> Any:
        return importlib.import_module, ("left_at_home",)


# ---- helpers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    features = F.array(F.sin("id").cast("float"), F.cos("id").cast("float"))
    return spark.range(0, ROWS, 1, 4).select(features.alias("features"), F.sin("id").cast("float").alias("label"))


def fit(
    df: DataFrame, module: nn.Module, loss: Any = "mse", *, epochs: int = 50, workers: int = 2, **params: Any
) -> TorchModel:
    settings = {"maxRestarts": 0, "verbose": False, **params}
    estimator = TorchEstimator(
        module=module, loss=loss, maxEpochs=epochs, batchSize=BATCH, numTrainWorkers=workers, **settings
    )
    return estimator.fit(df)


@dataclass(frozen=True)
class Failed:
    """A fit that failed, and what it changed in the driver's process."""

    error: TrainingFailedError
    seconds: float
    """From the event in the rank to the error on the driver."""

    before: dict[str, Any]
    after: dict[str, Any]


def driver_state() -> dict[str, Any]:
    """What a fit must leave alone in the process that calls it."""
    return {
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "listening": sorted(
            entry.laddr for entry in psutil.Process().net_connections("inet") if entry.status == psutil.CONN_LISTEN
        ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch seed": torch.initial_seed(),
        "torch threads": torch.get_num_threads(),
    }


def fit_and_fail(df: DataFrame, folder: Path, act: Callable[[], None], **params: Any) -> Failed:
    """Fit while ``act`` happens on rank 1, in the module's forward or, if asked, in the loss."""
    event = Event(act, str(folder / "marker"))
    quiet = Event(nothing, str(folder / "unused"))
    in_loss = params.pop("in_loss", False)
    before = driver_state()
    with pytest.raises(TrainingFailedError) as caught:
        fit(df, Eventful(quiet if in_loss else event), EventfulLoss(event) if in_loss else "mse", **params)
    return Failed(caught.value, time.time() - float(Path(event.marker).read_text()), before, driver_state())


def poll(describe: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What ``describe`` returns, once that is empty or the time is up."""
    end = time.monotonic() + seconds
    while (found := describe()) and time.monotonic() < end:
        time.sleep(0.25)
    return found


def processes(spark: SparkSession) -> list[psutil.Process]:
    """All that the session's JVM started and that still runs."""
    return psutil.Process(spark.sparkContext._gateway.proc.pid).children(recursive=True)


def leftovers(spark: SparkSession) -> list[str]:
    """What Python workers have that idle ones do not: other programs, links between ranks, spooled rows."""
    found: list[str] = []
    addresses: dict[tuple[str, int], int] = {}
    links: list[tuple[int, Any]] = []
    for process in processes(spark):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            if "sparkdl.daemon" not in process.cmdline():
                found.append(f"process {process.pid}: {process.cmdline()}")
            worker = "sparkdl.daemon" in psutil.Process(process.ppid()).cmdline()
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and worker:
                    found.append(f"{process.pid} listens on {connection.laddr}")
                if connection.status == psutil.CONN_ESTABLISHED:
                    addresses[tuple(connection.laddr)] = process.pid
                    links.append((process.pid, connection))
            for descriptor in Path(f"/proc/{process.pid}/fd").glob("*"):
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if "(deleted)" in target and tempfile.gettempdir() in target:
                        found.append(f"{process.pid} holds {target}")
    found += [f"{pid} is linked to {link.raddr}" for pid, link in links if tuple(link.raddr) in addresses]
    return found


def spool_directories(spark: SparkSession) -> list[Path]:
    """Where Spark lets its tasks keep local files, as a task is told."""
    ask = F.udf(lambda _: os.environ["SPARK_LOCAL_DIRS"], "string")
    (answer,) = spark.range(1).select(ask("id")).first()
    folders = [Path(entry) for entry in answer.split(",")]
    assert all(folder.is_dir() for folder in folders)
    return folders


def stray_files(spark: SparkSession) -> list[Path]:
    """Files that are not Spark's own: those lie in folders of two hexadecimal digits."""
    return [
        path
        for folder in spool_directories(spark)
        for path in folder.glob("*")
        if not re.fullmatch(r"[0-9a-f]{2}", path.name)
    ]


# ---- what the user sees ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def warm(rows: DataFrame) -> DataFrame:
    """The rows, after a fit that went well: what Spark starts on first use is there, and workers have torch."""
    fit(rows, nn.Linear(2, 1), epochs=1, workers=4)
    return rows


@pytest.fixture(scope="module")
def failed(warm: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    """A fit whose second rank raised an error."""
    return fit_and_fail(warm, tmp_path_factory.mktemp("raise"), raise_error)


def test_the_user_sees_the_cause_and_not_a_closed_connection(failed: Failed) -> None:
    first = str(failed.error).splitlines()[0]
    assert re.match(rf"Rank 1 on .+ failed: RuntimeError: {PLANTED}", first)
    assert "in raise_error" in str(failed.error), "the rank's own traceback is missing"


def test_the_error_holds_the_account_of_the_rank(failed: Failed) -> None:
    account = failed.error.failures[1]
    assert (account.rank, account.kind, account.message) == (1, "RuntimeError", PLANTED)
    assert not account.consequence
    assert all(other.consequence for rank, other in failed.error.failures.items() if rank != 1)


def test_the_driver_hears_of_a_failure_soon(failed: Failed) -> None:
    assert failed.seconds < SOON


def test_a_failed_fit_leaves_the_driver_as_it_was(failed: Failed) -> None:
    assert failed.after == failed.before


def test_a_failed_fit_leaves_nothing_in_processes_or_on_disk(failed: Failed, spark: SparkSession) -> None:
    assert poll(lambda: leftovers(spark)) == []
    assert stray_files(spark) == []


def test_a_fit_after_a_failed_fit_works(failed: Failed, rows: DataFrame) -> None:
    model = fit(rows, nn.Linear(2, 1), epochs=2, workers=4)
    assert [record["rows"] for record in model.history] == [ROWS, ROWS]


def test_the_cause_comes_soon_though_the_failing_rank_stays_alive(warm: DataFrame, tmp_path: Path) -> None:
    failed = fit_and_fail(warm, tmp_path, raise_error_and_live_on)
    assert re.match(rf"Rank 1 on .+ failed: RuntimeError: {PLANTED}", str(failed.error))
    assert failed.seconds < 9, "the error came only when the process had gone"


def test_a_rank_that_is_killed_is_said_to_have_died_without_a_word(warm: DataFrame, tmp_path: Path) -> None:
    failed = fit_and_fail(warm, tmp_path, die_by_sigkill)
    assert re.match("A rank's process died without a word", str(failed.error))
    assert 1 not in failed.error.failures
    assert failed.seconds < SOON


def test_an_error_in_the_users_loss_on_one_rank_is_the_cause(warm: DataFrame, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    failed = fit_and_fail(warm.coalesce(2), tmp_path, raise_value_error, in_loss=True, stagingDir=str(staging))
    assert PLANTED in str(failed.error).splitlines()[0]
    assert PLANTED in failed.error.failures[1].message
    assert failed.seconds < SOON
    assert not list(staging.glob("*")), "staged rows were left behind"


def test_a_module_that_executors_cannot_import_is_told_once(warm: DataFrame) -> None:
    with pytest.raises(TrainingFailedError) as caught:
        fit(warm, AtHome())
    told = str(caught.value)
    assert re.match(r"Rank \d on \S+ failed: ModuleNotFoundError: No module named 'left_at_home'", told)
    assert told.count("ModuleNotFoundError: No module named 'left_at_home'") <= 2, (
        "once as message, once in the traceback"
    )
    assert {failure.kind for failure in caught.value.failures.values()} == {"ModuleNotFoundError"}


@pytest.mark.slow
def test_ctrl_c_stops_the_ranks_at_once(warm: DataFrame, spark: SparkSession, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def press_ctrl_c() -> None:
        poll(lambda: not marker.exists(), 60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fit(warm, Eventful(Event(take_ages, str(marker))))  # takes at least 80 seconds, left alone
    seconds = time.time() - float(marker.read_text())
    thread.join()
    assert seconds < SOON
    assert not poll(lambda: list(spark.sparkContext.statusTracker().getActiveJobsIds()))
    assert poll(lambda: leftovers(spark)) == []
    assert fit(warm, nn.Linear(2, 1), epochs=1).history[0]["rows"] == ROWS


# ---- ranks that hang -------------------------------------------------------------------------------------------------
AT = 100  # some heartbeats later
STUCK = 3.0  # seconds without progress that make a hang


@dataclass
class Steps:
    """A rank's work: steps that end in an all-reduce, in one of which something happens to rank 2."""

    act: Callable[[], None]
    folder: str
    steps: int = 200

    def __call__(self, rank: RankContext, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
        for _ in batches:
            pass
        rank.agree(lambda: ("", {}, None))
        (Path(self.folder) / f"pid-{rank.world.rank}").write_text(str(os.getpid()))
        minutes = timedelta(minutes=2)
        with rank.process_group(torch.device("cpu"), rendezvous_timeout=minutes, collective_timeout=minutes):
            for step in range(self.steps):
                rank.clock.at("compute", step)
                time.sleep(0.02)
                if rank.world.rank == 2 and step == AT:
                    (Path(self.folder) / "marker").write_text(str(time.time()))
                    self.act()
                rank.clock.at("reduce", step)
                dist.all_reduce(torch.ones(1))
        yield b"done"

    @property
    def happened(self) -> float:
        """When it happened."""
        return float((Path(self.folder) / "marker").read_text())

    def processes(self) -> list[int]:
        """The ranks' processes that are still there."""
        pids = [int(path.read_text()) for path in Path(self.folder).glob("pid-*")]
        return [pid for pid in pids if psutil.pid_exists(pid)]


def get_stuck() -> None:
    time.sleep(3600)


def stop_the_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave_without_a_word() -> None:
    os._exit(3)


def run_steps(spark: SparkSession, steps: Steps, **settings: Any) -> list[list[bytes]]:
    source = spark.range(4).repartitionById(4, F.col("id").cast("int"))
    return launch_stage(
        source, steps, world_size=4, run_id=new_run_id(), timeouts=Timeouts(step=timedelta(seconds=STUCK)), **settings
    )


@pytest.mark.parametrize("act", [get_stuck, pytest.param(stop_the_process, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_ends(
    warm: DataFrame, spark: SparkSession, tmp_path: Path, act: Callable[[], None]
) -> None:
    steps = Steps(act, str(tmp_path))
    with pytest.raises(TrainingFailedError) as caught:
        run_steps(spark, steps)
    seconds = time.time() - steps.happened
    first = str(caught.value).splitlines()[0]
    assert re.match(
        rf"Rank 2 on \S+ did not arrive in step {AT + 1} \(.*in phase compute\); ranks 0, 1, 3 waited for it", first
    )
    assert caught.value.lost
    assert seconds < STUCK + SOON
    shown = "get_stuck" if act is get_stuck else "all_reduce"
    assert shown in str(caught.value), "no stack is shown"
    assert (2 in caught.value.failures) == (act is get_stuck)
    assert poll(steps.processes, 15) == []
    assert poll(lambda: leftovers(spark)) == []


def test_a_rank_that_leaves_is_named_and_lost(warm: DataFrame, spark: SparkSession, tmp_path: Path) -> None:
    steps = Steps(leave_without_a_word, str(tmp_path))
    with pytest.raises(TrainingFailedError, match="A rank's process died without a word") as caught:
        run_steps(spark, steps)
    assert time.time() - steps.happened < SOON
    assert re.search(r"rank 2 on \S+, last seen in", str(caught.value).splitlines()[0])
    assert caught.value.lost


# ---- jobs that are cancelled -----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("how", ["group", "all"])
def test_a_job_that_the_user_cancels_is_no_loss(warm: DataFrame, spark: SparkSession, tmp_path: Path, how: str) -> None:
    context, steps = spark.sparkContext, Steps(nothing, str(tmp_path), steps=100_000)
    before = driver_state()

    def cancel() -> None:
        poll(lambda: not (tmp_path / "marker").exists(), 60)
        if how == "group":
            context.cancelJobGroup("mine")
        else:
            context.cancelAllJobs()

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    context.setJobGroup("mine", "a fit", interruptOnCancel=True)
    try:
        with pytest.raises(TrainingFailedError, match="The job was cancelled") as caught:
            run_steps(spark, steps)
    finally:
        context.setLocalProperty("spark.jobGroup.id", None)
        thread.join()
    assert not caught.value.lost
    assert time.time() - steps.happened < SOON
    assert poll(steps.processes, 15) == []
    assert poll(lambda: leftovers(spark)) == []
    assert driver_state() == before


# ---- what ranks say --------------------------------------------------------------------------------------------------
class Talkative:
    """A rank's work: it logs."""

    def __call__(self, rank: RankContext, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
        for _ in batches:
            pass
        logger = logging.getLogger("sparkdl.io.cache")
        logger.info("news of %d", rank.world.rank)
        logger.warning("worries of %d", rank.world.rank)
        yield str(rank.attempt).encode()


def test_what_ranks_log_reaches_the_driver(spark: SparkSession, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparkdl.rank")
    source = spark.range(2).repartitionById(2, F.col("id").cast("int"))
    told = launch_stage(source, Talkative(), world_size=2, run_id=new_run_id(), attempt=3)
    assert told == [[b"3"], [b"3"]]
    lines = [record.getMessage() for record in caplog.records if record.name == "sparkdl.rank"]
    found = sorted(re.sub(r" on \S+:", ":", line) for line in lines)
    assert found == ["rank 0: news of 0", "rank 0: worries of 0", "rank 1: worries of 1"]


# ---- ten in a row ----------------------------------------------------------------------------------------------------
def counts(spark: SparkSession) -> dict[str, float]:
    """What ten fits must not add up, here and in the Python workers."""
    gc.collect()
    own = psutil.Process()
    found = {
        "threads": threading.active_count(),
        "descriptors": own.num_fds(),
        "children": len(own.children()),
        "temporary files": len([*Path(tempfile.gettempdir()).glob("sparkdl*"), *stray_files(spark)]),
        "environment": len(os.environ),
        "workers": 0,
        "descriptors of a worker": 0,
        "threads of a worker": 0,
        "children of a worker": 0,
    }
    for process in processes(spark):
        with contextlib.suppress(psutil.Error):  # it may be gone by now
            if "sparkdl.daemon" not in psutil.Process(process.ppid()).cmdline():
                continue
            found["workers"] += 1
            for name, count in (
                ("descriptors", process.num_fds()),
                ("threads", process.num_threads()),
                ("children", len(process.children())),
            ):
                found[f"{name} of a worker"] = max(found[f"{name} of a worker"], count)
    return found


@pytest.mark.slow
def test_ten_fits_in_a_row_leave_no_more_than_three(warm: DataFrame, spark: SparkSession) -> None:
    after_three: dict[str, float] = {}

    def grown() -> dict[str, tuple[float, float]]:
        now = counts(spark)
        return {name: (was, now[name]) for name, was in after_three.items() if now[name] > was}

    for number in range(1, 11):
        assert fit(warm, nn.Linear(2, 1), epochs=2, workers=4).history[-1]["rows"] == ROWS
        if number == 3:
            assert poll(lambda: leftovers(spark)) == []
            after_three = counts(spark)
    assert poll(grown, 15) == {}


# ---- what stays in workers that live on ------------------------------------------------------------------------------
def look_around(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The state of this Python worker, which later jobs of anyone inherit."""
    for _ in batches:
        pass
    state = {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": sys.path,
        "torch threads": torch.get_num_threads(),
        "torch random": digest(torch.get_rng_state().numpy().tobytes()),
        "numpy random": digest(pickle.dumps(np.random.get_state())),
        "python random": digest(pickle.dumps(random.getstate())),
        "gradients": torch.is_grad_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "process group": dist.is_initialized(),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("sparkdl")),
    }
    yield pa.RecordBatch.from_pydict({"state": [json.dumps(state)]})


def digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()


def worker_states(spark: SparkSession) -> dict[int, dict[str, Any]]:
    """The state of four idle Python workers, by process."""
    one_each = spark.range(4).repartitionById(4, F.col("id").cast("int"))
    found = [json.loads(row[0]) for row in one_each.mapInArrow(look_around, "state string", barrier=True).collect()]
    return {state.pop("pid"): state for state in found}


def test_a_fit_changes_nothing_in_workers_that_live_on(warm: DataFrame, spark: SparkSession) -> None:
    fit(warm, nn.Linear(2, 1), epochs=1, workers=4)
    before = worker_states(spark)
    model = fit(warm, nn.Linear(2, 1), epochs=2, workers=4)
    after = worker_states(spark)
    assert model.summary.worldSize == 4
    assert set(before) == set(after), "the workers were not used again, so this test shows nothing"
    assert after == before
    assert leftovers(spark) == []
    assert stray_files(spark) == []
