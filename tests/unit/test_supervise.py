"""Restarts: which failures are worth one, how often, with how many ranks."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from sparkdl.barrier.supervise import Restart, RestartPolicy, supervise
from sparkdl.errors import DataError, Failure, TrainingFailedError

FAILURE = Failure(1, "10.0.0.2", "Hang", "no progress", "", consequence=False)
LOST = TrainingFailedError("A rank's process died.\nmore", {1: FAILURE}, lost=True)
OWN = TrainingFailedError("ValueError: planted")


def policy(restarts: int = 3, ranks: int = 4, least: int = 4, **settings: timedelta) -> RestartPolicy:
    quick = {"backoff": timedelta(milliseconds=1), "slots_timeout": timedelta(seconds=0.7), **settings}
    return RestartPolicy(restarts, ranks, least, **quick)


def failing(*errors: Exception) -> Callable[[int, int], list[tuple[int, int]]]:
    """A run that fails like this, one attempt after the other, and returns all attempts at last."""
    seen: list[tuple[int, int]] = []
    left = list(errors)

    def run(attempt: int, ranks: int) -> list[tuple[int, int]]:
        seen.append((attempt, ranks))
        if left:
            raise left.pop(0)
        return seen

    return run


def test_a_lost_rank_is_worth_a_restart() -> None:
    assert supervise(failing(LOST, LOST), policy(), find_slots=lambda: 4) == [(1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("error", [OWN, DataError("bad rows"), KeyboardInterrupt()])
def test_an_error_of_a_ranks_own_is_raised_at_once(error: Exception) -> None:
    run = failing(error)
    with pytest.raises(type(error)) as caught:
        supervise(run, policy(), find_slots=lambda: 4)
    assert caught.value is error
    assert run(9, 9) == [(1, 4), (9, 9)]


def test_an_own_error_after_a_restart_ends_the_run() -> None:
    with pytest.raises(TrainingFailedError, match="planted"):
        supervise(failing(LOST, OWN), policy(), find_slots=lambda: 4)


def test_restarts_are_counted() -> None:
    run = failing(*[LOST] * 9)
    with pytest.raises(
        TrainingFailedError, match=r"process died(.|\n)*3 attempts ended like this \(maxRestarts=2\)"
    ) as got:
        supervise(run, policy(2), find_slots=lambda: 4)
    assert got.value.failures == {1: FAILURE}
    assert got.value.lost


def test_without_restarts_the_error_is_the_first_one() -> None:
    with pytest.raises(TrainingFailedError) as caught:
        supervise(failing(LOST), policy(0), find_slots=lambda: 4)
    assert caught.value is LOST


def test_a_smaller_cluster_gets_fewer_ranks() -> None:
    assert supervise(failing(LOST), policy(least=2), find_slots=lambda: 3) == [(1, 4), (2, 3)]


def test_slots_may_come_back() -> None:
    slots = iter([0, 2, 4])
    assert supervise(failing(LOST), policy(slots_timeout=timedelta(seconds=30)), find_slots=lambda: next(slots)) == [
        (1, 4),
        (2, 4),
    ]


def test_more_slots_than_ranks_are_no_reason_for_more_ranks() -> None:
    assert supervise(failing(LOST), policy(), find_slots=lambda: 40) == [(1, 4), (2, 4)]


def test_a_cluster_that_does_not_tell_is_asked_for_all_ranks() -> None:
    assert supervise(failing(LOST), policy(least=1), find_slots=lambda: None) == [(1, 4), (2, 4)]


def test_too_few_slots_end_the_run() -> None:
    with pytest.raises(
        TrainingFailedError, match=r"process died(.|\n)*3 ranks are needed, but the cluster has 2 slots left. Add"
    ):
        supervise(failing(LOST), policy(least=3), find_slots=lambda: 2)


def test_restarts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Restart] = []
    with caplog.at_level(logging.WARNING):
        supervise(failing(LOST), policy(least=1), find_slots=lambda: 2, on_restart=told.append)
    assert [(one.attempt, one.reason, one.ranks) for one in told] == [(1, "A rank's process died.", 2)]
    assert 0.7 <= told[0].seconds < 10
    assert caplog.messages == [
        "attempt 1 failed: A rank's process died.",
        "starting again with 2 ranks (restart 1 of 3)",
    ]


def test_pauses_grow() -> None:
    began = time.monotonic()
    pausing = policy(3, backoff=timedelta(seconds=0.1), longest_backoff=timedelta(seconds=0.2))
    supervise(failing(LOST, LOST, LOST), pausing, find_slots=lambda: 4)
    assert 0.5 <= time.monotonic() - began < 5
