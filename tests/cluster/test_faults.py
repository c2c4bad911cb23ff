"""What breaks on clusters of real processes: how soon the driver knows, what it says, and what comes out in the end."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sparkdl.checkpoint import CheckpointStore
from tests.cluster.clusters import (
    LOCAL,
    LOCAL_CLUSTER,
    NETWORK,
    ROOT,
    SPARE,
    STANDALONE,
    Cluster,
    NotPermittedError,
    Outcome,
    await_value,
    command,
    log_of,
    set_isolated,
    set_link,
    small_disk,
)
from tests.cluster.driver import BATCH, EPOCHS, INTERVAL, ROWS
from tests.cluster.table import Measured
from tests.faults import PLANTED, FailAt, Kind, Step, acted, failed_at, steps_of

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

Record = Callable[[Measured], None]

STEPS = ROWS // BATCH  # of an epoch
PACE = 0.05  # seconds: a step is not much shorter than the writing of a checkpoint
STEP_TIMEOUT = 5.0
SOON = 5.0
HANGS = STEP_TIMEOUT + 2
TIMEOUTS = {"step": STEP_TIMEOUT}
DIED = r"process died without a word|[Rr]ank 1 .*(died|lost)|[Ee]xecutor"
HUNG = r"[Rr]ank 1\b.*(no progress|not arrive|no sign|hang|silent)"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and what is to follow.

    Attributes:
        kind: What happens to rank 1.
        step: The forward in which it happens.
        ends: "error", "restart" or "trained".
        bar: Seconds within which the driver knows.
        cause: Pattern of the first line that the user is told.
    """

    kind: Kind
    step: int
    ends: str
    bar: float
    cause: str = ""


RAISES = Fault("raise", 8, "error", SOON, PLANTED)
LINGERS = Fault("linger", 8, "error", SOON, PLANTED)
NAN = Fault("nan", 8, "error", SOON, "The loss is nan after step")
MEMORY = Fault("memory", 8, "error", SOON, "memory")
EXITS = Fault("exit", STEPS + 7, "restart", SOON, DIED)
KILLED = Fault("sigkill", 8, "restart", SOON, DIED)
TOLD = Fault("sigterm", 8, "restart", SOON, r"Preempted: .*the state after step . was saved")
STOPPED = Fault("sigstop", 9, "restart", HANGS, HUNG)
SLEEPS = Fault("hang", STEPS + 3, "restart", HANGS, HUNG)
HOLDS_THE_LOCK = Fault("gil", 9, "restart", HANGS, HUNG)
SLOW = Fault("slow", 2, "trained", 0.0)
EXECUTOR = Fault("executor", 9, "restart", SOON, DIED)

CASES = [
    *((LOCAL, fault) for fault in (RAISES, LINGERS, NAN, MEMORY, SLOW, EXITS, KILLED, TOLD, STOPPED, SLEEPS)),
    (LOCAL, HOLDS_THE_LOCK),
    *((LOCAL_CLUSTER, fault) for fault in (RAISES, KILLED, STOPPED, EXECUTOR)),
    *((STANDALONE, fault) for fault in (LINGERS, EXITS, STOPPED, EXECUTOR)),
]


def detected_at(outcome: Outcome) -> float | None:
    """When the driver knew: when it logged the first attempt's end, or when it raised."""
    logged = [record.time for record in log_of(outcome.folder) if record.message.startswith("attempt 1 failed")]
    return logged[0] if logged else outcome.ended if outcome.error else None


def attempts(folder: str) -> list[list[Step]]:
    """Rank 0's training forwards, by attempt."""
    found: list[list[Step]] = []
    for step in steps_of(folder, 0):
        if step.number == 1:
            found.append([])
        found[-1].append(step)
    return found


def longest_write(outcome: Outcome) -> int:
    """Steps that rank 0 did while it wrote one checkpoint, at most; of those that the first attempt finished."""
    found = [0]
    first, *later = attempts(outcome.folder)
    end = later[0][0].time if later else float("inf")
    for manifest in Path(outcome.checkpoints or "/nowhere").glob("step-*/manifest.json"):
        written, step = manifest.stat().st_mtime, int(manifest.parent.name.split("-")[1])
        if written < end:
            found.append(sum(one.number > step and one.time <= written for one in first))
    return max(found)


def compared(one: Outcome, other: Outcome) -> str:
    """How the weights of two fits compare."""
    left, right = one.weights, other.weights
    assert left.keys() == right.keys()
    if all(torch.equal(left[name], right[name]) for name in left):
        return "bitwise"
    return f"{max(float((left[name] - right[name]).abs().max()) for name in left):.0e}"


def measure(fault: Fault, cluster: str, outcome: Outcome, calm: Outcome | None, title: str = "") -> Measured:
    """The line of the table."""
    known, tries = detected_at(outcome), attempts(outcome.folder)
    told = outcome.message or "\n".join(outcome.restarts)
    found = Measured(
        title or fault.kind,
        cluster,
        "error" if outcome.error else "restart" if outcome.restarts else "trained",
        detect=None if known is None else known - failed_at(outcome.folder),
        bar=fault.bar or None,
        cause=told.partition("\n")[0],
    )
    if outcome.error:
        return found
    warm_ups = sum(step.number == 1 for step in steps_of(outcome.folder, 2))  # one per attempt: DDP is shown an example
    return replace(
        found,
        resume=tries[1][0].time - failed_at(outcome.folder) if outcome.restarts else None,
        repeated=sum(len(steps) for steps in tries) - EPOCHS * STEPS - warm_ups,
        rows_lost=sum(ROWS - record["rows"] for record in outcome.history) + ROWS * (EPOCHS - len(outcome.history)),
        weights=compared(outcome, calm) if calm is not None else "",
    )


def check(fault: Fault, found: Measured, outcome: Outcome, *, weights: str = "bitwise") -> None:
    """What must be true of every failure."""
    assert found.outcome == fault.ends, outcome
    assert re.search(fault.cause, found.cause), outcome
    if fault.ends != "trained":
        assert found.detect is not None
        assert 0 <= found.detect <= fault.bar, outcome
    if fault.ends == "error":
        assert not outcome.lost
        assert len(attempts(outcome.folder)) == 1, "it was tried again"
        return
    assert found.rows_lost == 0
    assert found.weights == weights
    assert found.repeated is not None
    writing = longest_write(outcome)
    assert found.repeated <= INTERVAL + max(writing, 2), f"more than the interval and one write, of {writing} steps"


# ---- places for checkpoints ------------------------------------------------------------------------------------------
def _check_place(outcome: Outcome, calm: Outcome, title: str, cluster: str, measured: Record) -> None:
    """Training went on, the driver's log has the reason, and the last good checkpoint verifies."""
    assert not outcome.error, outcome
    warnings = [
        record.message
        for record in log_of(outcome.folder)
        if record.level == "WARNING" and "checkpoint" in record.message
    ]
    found = Measured(
        title,
        cluster,
        "restart" if outcome.restarts else "trained",
        repeated=len(steps_of(outcome.folder, 0)) - EPOCHS * STEPS,
        rows_lost=sum(ROWS - record["rows"] for record in outcome.history),
        weights=compared(outcome, calm),
        cause=warnings[0] if warnings else "",
    )
    measured(found)
    assert (found.outcome, found.repeated, found.rows_lost, found.weights) == ("trained", 0, 0, "bitwise")
    assert outcome.checkpoints is not None
    store = CheckpointStore(outcome.checkpoints)
    newest = store.newest()
    assert newest is not None
    assert newest.step >= INTERVAL
    assert store.load(newest)["reader"]["epoch"] * STEPS + store.load(newest)["reader"]["step"] == newest.step
    assert warnings, "the driver's log has no warning"


def _mounted(stack: contextlib.ExitStack, path: Path, mebibytes: int, title: str, measured: Record) -> Path:
    try:
        return stack.enter_context(small_disk(path, mebibytes))
    except NotPermittedError as refused:
        measured(Measured(title, LOCAL, "skipped", cause=str(refused)))
        pytest.skip(str(refused))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.mark.parametrize("cluster", [LOCAL], indirect=True)
def test_the_disk_is_full_in_the_middle_of_a_checkpoint(
    cluster: Cluster, tmp_path: Path, stack: contextlib.ExitStack, measured: Record
) -> None:
    title = "checkpoint disk full"
    disk = _mounted(stack, tmp_path / "disk", 36, title, measured)  # two checkpoints of 15 MB, and a part of the third
    event = FailAt(1, 1, "none", str(tmp_path))
    calm = cluster.driver.calm(2)
    outcome = cluster.driver.start(event, 2, checkpointDir=str(disk), stagingDir=str(tmp_path / "rows"))()
    _check_place(outcome, calm, title, cluster.name, measured)


@pytest.mark.parametrize("cluster", [LOCAL], indirect=True)
def test_the_disk_becomes_read_only(
    cluster: Cluster, tmp_path: Path, stack: contextlib.ExitStack, measured: Record
) -> None:
    title = "checkpoint disk read-only"
    disk = _mounted(stack, tmp_path / "disk", 400, title, measured)
    calm = cluster.driver.calm(2)
    event = FailAt(1, INTERVAL + 2, "outside", str(tmp_path))
    end = cluster.driver.start(event, 2, checkpointDir=str(disk), stagingDir=str(tmp_path / "rows"))
    _await_event(str(tmp_path))

    def remounted() -> bool | None:
        try:
            command("mount", "-o", "remount,ro", str(disk))
        except NotPermittedError:  # busy: a file is open for writing
            return None
        return True

    await_value(remounted, 30, "a moment without an open file")
    acted(str(tmp_path))
    _check_place(end(), calm, title, cluster.name, measured)


def test_a_process_dies_at_every_operation_of_a_checkpoint(measured: Record) -> None:
    name = "test_a_process_that_is_killed_at_any_operation_leaves_a_good_checkpoint"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", f"tests/unit/test_checkpoint.py::{name}"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    measured(
        Measured(
            "SIGKILL at any operation of a checkpoint", "one process", "trained", cause=done.stdout.splitlines()[-1]
        )
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- ranks, processes and executors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cluster", "fault"), CASES, indirect=["cluster"], ids=[f"{name}-{fault.kind}" for name, fault in CASES]
)
def test_a_rank_fails(cluster: Cluster, fault: Fault, folder: str, measured: Record) -> None:
    calm = None if fault.ends == "error" else cluster.driver.calm(2)
    outcome = cluster.driver.start(FailAt(1, fault.step, fault.kind, folder, pace=PACE), 2, timeouts=TIMEOUTS)()
    found = measure(fault, cluster.name, outcome, calm)
    measured(found)
    check(fault, found, outcome)


# ---- a host that does not come back ----------------------------------------------------------------------------------
@pytest.mark.parametrize("cluster", [SPARE], indirect=True)
def test_a_lost_host_leaves_fewer_ranks(cluster: Cluster, folder: str, measured: Record) -> None:
    fault = Fault("host", 9, "restart", HANGS, DIED)
    calm = cluster.driver.calm(4, dropout=0.0)
    outcome = cluster.driver.start(
        FailAt(1, fault.step, fault.kind, folder, pace=PACE), 4, minWorkers=1, dropout=0.0, timeouts=TIMEOUTS
    )()
    found = measure(fault, cluster.name, outcome, None, "host of 2 ranks")
    close = outcome.weights.keys() == calm.weights.keys() and all(
        torch.allclose(outcome.weights[name], calm.weights[name], rtol=0, atol=1e-6) for name in calm.weights
    )
    measured(replace(found, weights=compared(outcome, calm)))
    assert outcome.restarts[0].endswith("Started again with 2 ranks.")
    check(fault, replace(found, weights="close" if close else "far"), outcome, weights="close")


# ---- networks --------------------------------------------------------------------------------------------------------
def _await_event(folder: str) -> None:
    await_value(lambda: (Path(folder) / "failed").exists() or None, 120, "the step of the event")


def _await_detection(folder: str) -> None:
    def look() -> bool | None:
        return any(record.message.startswith("attempt 1 failed") for record in log_of(folder)) or None

    await_value(look, 120, "the driver's word of the failure")


@pytest.mark.parametrize("cluster", [NETWORK], indirect=True)
def test_the_link_between_two_ranks_is_cut(cluster: Cluster, folder: str, measured: Record) -> None:
    fault = Fault("outside", 9, "restart", HANGS, r"[Rr]ank|progress")
    calm = cluster.driver.calm(2)
    end = cluster.driver.start(FailAt(1, fault.step, fault.kind, folder, pace=PACE), 2, timeouts=TIMEOUTS)
    try:
        _await_event(folder)
        set_isolated(cluster.hosts, isolated=True)
        acted(folder)
        _await_detection(folder)
    finally:
        set_isolated(cluster.hosts, isolated=False)
    outcome = end()
    found = measure(fault, cluster.name, outcome, calm, "link between ranks")
    measured(found)
    check(fault, found, outcome)


@pytest.mark.parametrize("cluster", [NETWORK], indirect=True)
def test_a_host_falls_off_the_network(cluster: Cluster, folder: str, measured: Record) -> None:
    fault = Fault("outside", 9, "restart", HANGS, r"[Rr]ank|progress|[Ee]xecutor")
    calm = cluster.driver.calm(2, dropout=0.0)
    end = cluster.driver.start(
        FailAt(1, fault.step, fault.kind, folder, pace=PACE), 2, minWorkers=1, dropout=0.0, timeouts=TIMEOUTS
    )
    try:
        _await_event(folder)
        set_link(cluster.hosts[1], up=False)
        acted(folder)
        outcome = end()
    except TimeoutError as error:
        measured(Measured("network of a host", cluster.name, "no end", bar=fault.bar, cause=str(error)))
        raise
    finally:
        set_link(cluster.hosts[1], up=True)
    found = measure(fault, cluster.name, outcome, None, "network of a host")
    close = all(torch.allclose(outcome.weights[name], calm.weights[name], rtol=0, atol=1e-6) for name in calm.weights)
    measured(replace(found, weights=compared(outcome, calm)))
    assert outcome.restarts[-1].endswith("Started again with 1 ranks.")
    check(fault, replace(found, weights="close" if close else "far"), outcome, weights="close")
