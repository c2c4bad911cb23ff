"""Starting a run again after the cluster lost a rank.

Spark retries tasks, but never a barrier stage that returns results: one lost executor ends the job. So the driver
starts the stage again, with as many ranks as the cluster still has slots for; what ranks saved is theirs to find.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from sparkdl.errors import TrainingFailedError

__all__ = ["Restart", "RestartPolicy", "supervise"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often and with how many ranks a run is started again.

    Attributes:
        max_restarts: Restarts at most.
        num_workers: Ranks that are wanted.
        min_workers: Ranks that a restart needs at least.
        backoff: Pause before the first restart; each further one is twice as long.
        longest_backoff: The longest pause.
        slots_timeout: How long lost slots may take to come back, before a restart makes do with fewer ranks.
    """

    max_restarts: int
    num_workers: int
    min_workers: int
    backoff: timedelta = timedelta(seconds=1)
    longest_backoff: timedelta = timedelta(seconds=30)
    slots_timeout: timedelta = timedelta(seconds=30)

    def pause(self, restart: int) -> timedelta:
        """The pause before a restart.

        >>> policy = RestartPolicy(8, 4, 4)
        >>> [policy.pause(restart).total_seconds() for restart in (1, 2, 3, 6)]
        [1.0, 2.0, 4.0, 30.0]
        """
        return min(self.backoff * (1 << min(restart - 1, 32)), self.longest_backoff)


@dataclass(frozen=True, slots=True)
class Restart:
    """One restart of a run.

    Attributes:
        attempt: The attempt that failed, from 1.
        reason: The first line of its error.
        ranks: Ranks of the next attempt.
        seconds: From the error until the next attempt began.
    """

    attempt: int
    reason: str
    ranks: int
    seconds: float


def supervise(
    run: Callable[[int, int], T],
    policy: RestartPolicy,
    *,
    find_slots: Callable[[], int | None],
    on_restart: Callable[[Restart], None] = lambda restart: None,
) -> T:
    """Call ``run(attempt, ranks)`` until it returns, or fails for a reason that a restart would not remove.

    Args:
        run: Starts the ranks and returns what they made.
        policy: How often, and with how many ranks.
        find_slots: Ranks that the cluster can run at once; None where it does not tell.
        on_restart: Called before every restart.

    Raises:
        TrainingFailedError: A rank's own error; or the cluster lost ranks more often than the policy allows, or has
            fewer slots left than it asks for.
    """
    attempt, ranks = 1, policy.num_workers
    while True:
        try:
            return run(attempt, ranks)
        except TrainingFailedError as error:
            failed = time.monotonic()
            if not error.lost or policy.max_restarts == 0:
                raise
            if attempt > policy.max_restarts:
                raise _after(
                    error, f"{attempt} attempts ended like this (maxRestarts={policy.max_restarts})."
                ) from None
            why = str(error).partition("\n")[0]
            logger.warning("attempt %d failed: %s", attempt, why)
            time.sleep(policy.pause(attempt).total_seconds())
            slots = _await_slots(policy, find_slots)
            if slots is not None and slots < policy.min_workers:
                raise _after(
                    error,
                    f"It could not be started again: {policy.min_workers} ranks are needed, but the cluster has "
                    f"{slots} slots left. Add executors, or set a smaller minWorkers.",
                ) from None
            ranks = policy.num_workers if slots is None else min(slots, policy.num_workers)
            restart = Restart(attempt, why, ranks, time.monotonic() - failed)
            logger.warning("starting again with %d ranks (restart %d of %d)", ranks, attempt, policy.max_restarts)
            on_restart(restart)
            attempt += 1


def _await_slots(policy: RestartPolicy, find_slots: Callable[[], int | None]) -> int | None:
    """The slots of the cluster, once they are as many as wanted, or time is up."""
    end = time.monotonic() + policy.slots_timeout.total_seconds()
    while (slots := find_slots()) is not None and slots < policy.num_workers and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return slots


def _after(error: TrainingFailedError, sentence: str) -> TrainingFailedError:
    return TrainingFailedError(f"{error}\n{sentence}", error.failures, lost=True)
