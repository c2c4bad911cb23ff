"""What the driver makes of what it heard: one error, the first cause."""

import json
import logging
import time
from dataclasses import asdict
from typing import Any

import pytest

from sparkdl.barrier.monitor import FAILURE_NOTE, Monitor
from sparkdl.errors import ConfigError, Failure, TrainingFailedError

WORKER_DIED = "org.apache.spark.SparkException: Python worker exited unexpectedly (crashed)"
PEER = "Connection closed by peer [127.0.0.1]:4321"


def failure(rank: int, kind: str = "RuntimeError", message: str = "planted", **more: Any) -> Failure:
    values: dict[str, Any] = {"consequence": False, "step": 16, "time": 100.0 + rank, "traceback": f"stack {rank}\n"}
    return Failure(rank=rank, host=f"host{rank}", kind=kind, message=message, **{**values, **more})


def told(monitor: Monitor, account: Failure, **more: Any) -> None:
    monitor.receive({"event": "failure", **asdict(account), **more})


def hang(monitor: Monitor, rank: int, phase: str = "compute", waited: float = 30.0, step: int = 16) -> None:
    message = f"no progress for {waited:.0f} s in step {step + 1}, phase {phase}"
    account = failure(rank, "Hang", message, consequence=phase == "reduce", step=step)
    told(monitor, account, phase=phase, waited=waited)


def alive(monitor: Monitor, rank: int, phase: str = "compute", step: int = 16) -> None:
    monitor.receive(
        {"event": "alive", "rank": rank, "host": f"host{rank}", "attempt": 1, "phase": phase, "step": step, "since": 0}
    )


def error(monitor: Monitor, text: str = WORKER_DIED) -> TrainingFailedError:
    found = monitor.error(RuntimeError(text))
    assert isinstance(found, TrainingFailedError)
    return found


# ---- the first cause -------------------------------------------------------------------------------------------------
def test_a_ranks_own_error_comes_before_its_consequences() -> None:
    monitor = Monitor(3)
    told(monitor, failure(0, message=PEER, consequence=True, time=90.0))
    assert monitor.patience() is None
    told(monitor, failure(2, time=101.0))
    told(monitor, failure(1, time=100.5, message="earlier"))
    assert monitor.patience() is not None
    found = error(monitor, f"SparkException: {PEER}")
    assert str(found).startswith("Rank 1 on host1 failed: RuntimeError: earlier\n\nstack 1")
    assert not found.lost
    assert sorted(found.failures) == [0, 1, 2]


def test_an_account_that_only_spark_brought_counts_as_well() -> None:
    text = f"{WORKER_DIED}\n  {FAILURE_NOTE}{json.dumps(asdict(failure(1)))}\n{FAILURE_NOTE}[1]\n{FAILURE_NOTE}{{"
    assert str(error(Monitor(2), text)).startswith("Rank 1 on host1 failed: RuntimeError: planted")


def test_an_error_of_ours_keeps_its_class() -> None:
    monitor = Monitor(2)
    told(monitor, failure(1, "ConfigError"))
    found = monitor.error(RuntimeError(WORKER_DIED))
    assert type(found) is ConfigError
    assert str(found) == "planted"


def test_a_cause_takes_the_place_of_a_consequence() -> None:
    monitor = Monitor(1)
    told(monitor, failure(0, message=PEER, consequence=True))
    told(monitor, failure(0, message="the cause"))
    told(monitor, failure(0, message="later"))
    assert monitor.failures[0].message == "the cause"


def test_a_rank_that_was_told_to_stop_is_lost() -> None:
    monitor = Monitor(2)
    told(monitor, failure(1, "Preempted"))
    assert error(monitor).lost


# ---- hangs -----------------------------------------------------------------------------------------------------------
def test_the_rank_that_did_not_arrive_is_named_with_its_stack() -> None:
    monitor = Monitor(4)
    for rank in range(4):
        alive(monitor, rank, "compute" if rank == 2 else "reduce")
    hang(monitor, 2)
    for rank in (3, 0):
        hang(monitor, rank, "reduce", waited=29.6)
    told(monitor, failure(1, message=PEER, consequence=True))
    found = error(monitor)
    assert str(found).startswith(
        "Rank 2 on host2 did not arrive in step 17 (no progress for 30 s, in phase compute); "
        "ranks 0, 1, 3 waited for it for 30 s.\n\nRank 2: no progress for 30 s in step 17, phase compute\nstack 2"
    )
    assert found.lost
    assert sorted(found.failures) == [0, 1, 2, 3]


def test_a_rank_that_says_nothing_is_found_through_those_who_wait() -> None:
    monitor = Monitor(3)
    for rank in range(3):
        alive(monitor, rank, "data" if rank == 1 else "reduce", step=12 + rank)
    hang(monitor, 0, "reduce")
    told(monitor, failure(2, message=PEER, consequence=True))
    found = error(monitor)
    assert str(found).startswith(
        "Rank 1 on host1 did not arrive in step 17 (last heard of 0 s ago, in phase data); ranks 0, 2 waited for it"
    )
    assert "stack 0" in str(found)


def test_a_rank_that_was_never_heard_of_did_not_arrive() -> None:
    monitor = Monitor(2)
    hang(monitor, 0, "reduce")
    assert str(error(monitor)).startswith("Rank 1 did not arrive in step 17 (never heard of, in phase setup)")


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    monitor = Monitor(2)
    hang(monitor, 0, "reduce", step=16)
    hang(monitor, 1, "reduce", step=17)
    assert str(error(monitor)).startswith(
        "All ranks waited for each other for 30 s: rank 0 in step 17, phase reduce, rank 1 in step 18, phase reduce."
    )


def test_equal_stacks_of_many_ranks_are_not_all_shown() -> None:
    monitor = Monitor(40)
    for rank in range(40):
        hang(monitor, rank, "reduce" if rank else "compute")
    assert str(error(monitor)).count("stack ") == 4


def test_the_first_hang_waits_a_second_for_the_others() -> None:
    monitor = Monitor(2)
    began = time.monotonic()
    hang(monitor, 0, "reduce")
    assert monitor.patience() is None
    monitor.settle(RuntimeError(WORKER_DIED))
    assert 0.9 < time.monotonic() - began < 10
    assert monitor.patience() is not None


def test_nobody_is_waited_for_once_all_have_spoken() -> None:
    monitor = Monitor(2)
    hang(monitor, 0, "reduce")
    hang(monitor, 1)
    began = time.monotonic()
    monitor.settle(RuntimeError(WORKER_DIED))
    assert time.monotonic() - began < 1


def test_an_error_of_its_own_explains_a_hang() -> None:
    monitor = Monitor(2)
    hang(monitor, 0, "reduce")
    told(monitor, failure(1))
    found = error(monitor)
    assert str(found).startswith("Rank 1 on host1 failed")
    assert not found.lost


# ---- deaths ----------------------------------------------------------------------------------------------------------
def test_a_process_that_dies_is_named_with_the_place_where_it_was_last() -> None:
    monitor = Monitor(2)
    alive(monitor, 1, "compute", 4)
    monitor.receive({"event": "gone", "rank": 1, "host": "host1"})
    told(monitor, failure(0, message=PEER, consequence=True))
    found = error(monitor)
    assert str(found).startswith(
        "A rank's process died without a word (killed, or out of memory?): "
        "rank 1 on host1, last seen in step 5, phase compute. Spark says: Python worker exited unexpectedly"
    )
    assert f"rank 0: {PEER}" in str(found)
    assert found.lost
    assert sorted(found.failures) == [0]


def test_a_rank_that_connects_again_is_not_dead() -> None:
    monitor = Monitor(1)
    monitor.receive({"event": "gone", "rank": 0, "host": "host0"})
    alive(monitor, 0)
    assert str(error(monitor)).startswith("A rank's process died without a word (killed, or out of memory?). Spark")


def test_an_error_of_spark_alone_is_no_loss() -> None:
    found = error(Monitor(2), "java.lang.IllegalStateException: no such table\n\tat somewhere")
    assert str(found) == "Spark says: no such table"
    assert not found.lost


@pytest.mark.parametrize(
    "text",
    [
        "[SPARK_JOB_CANCELLED] Job 3 cancelled part of cancelled job group mine SQLSTATE: XXKDA",
        "org.apache.spark.SparkException: Job 7 cancelled because SparkContext was shut down",
        "[OPERATION_CANCELED] Operation has been canceled.",
    ],
)
def test_a_job_that_was_cancelled_is_said_to_be(text: str) -> None:
    monitor = Monitor(2)
    monitor.receive({"event": "gone", "rank": 1, "host": "host1"})
    told(monitor, failure(0, message=PEER, consequence=True))
    began = time.monotonic()
    monitor.settle(RuntimeError(text))
    assert time.monotonic() - began < 0.5
    found = error(monitor, text)
    assert str(found).startswith("The job was cancelled")
    assert text in str(found)
    assert not found.lost


# ---- events ----------------------------------------------------------------------------------------------------------
def test_progress_is_passed_on_and_the_rest_is_kept() -> None:
    seen: list[Any] = []
    monitor = Monitor(1, seen.append)
    alive(monitor, 0)
    told(monitor, failure(0))
    monitor.receive({"event": "gone", "rank": 0, "host": "host0"})
    monitor.receive({"event": "step", "rank": 0, "host": "host0", "step": 3})
    assert [event["event"] for event in seen] == ["step"]


def test_lines_of_ranks_reach_the_drivers_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparkdl.rank")
    line = {"event": "log", "rank": 3, "host": "far", "level": logging.WARNING, "logger": "x", "message": "100 % full"}
    Monitor(4).receive(line)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "sparkdl.rank",
        "WARNING",
        "rank 3 on far: 100 % full",
    )


def test_ranks_that_are_heard_over_their_connection_need_no_files() -> None:
    monitor = Monitor(2)
    assert monitor.is_silent(0)
    alive(monitor, 0)
    monitor.receive_file({"event": "alive", "rank": 1, "host": "h", "attempt": 1, "phase": "data", "step": 1})
    assert not monitor.is_silent(0)
    assert monitor.is_silent(1)


def test_of_a_lost_executor_sparks_own_reason_is_told() -> None:
    text = (
        "An error occurred while calling o1980.getResult.\n"
        ": org.apache.spark.SparkException: Exception thrown in awaitResult: \n"
        "Caused by: org.apache.spark.SparkException: Job aborted due to stage failure: Could not recover from a failed "
        "barrier ResultStage. Most recent failure reason: Stage failed because barrier task ResultTask(3, 1) finished "
        "unsuccessfully.\nExecutorLostFailure (executor 1 exited caused by one of the running tasks) Reason: Command "
        "exited with code 137\n"
    )
    found = error(Monitor(2), text)
    assert found.lost
    assert "Spark says: ExecutorLostFailure (executor 1 exited caused by one of the running tasks)" in str(found)


def test_ranks_that_cannot_start_for_lack_of_slots_are_given_up_at_once() -> None:
    monitor = Monitor(3)
    alive(monitor, 0)
    assert not monitor.has_started()
    monitor.lose_slots(2)
    assert monitor.patience() == 0
    found = error(monitor, "SPARK_JOB_CANCELLED")
    assert found.lost
    assert str(found).startswith("3 ranks were to start, but the cluster has 2 slots left: executors were lost")
    for rank in range(3):
        alive(monitor, rank)
    assert monitor.has_started()
