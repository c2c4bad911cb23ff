"""A rank that makes no progress ends itself, so that the others wake up and the driver learns where it was.

The training thread notes where it is in a `ProgressClock`; a thread reads it. Nothing wakes a rank that waits inside a
collective but the death of a peer's process, so a hang ends with the process. A thread that never lets go of Python's
lock would stop the watchdog too: behind it stands `faulthandler`, whose timer needs no lock.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Literal

from sparkdl.barrier.channel import RankChannel
from sparkdl.config import Timeouts
from sparkdl.errors import Failure

__all__ = ["HANG", "Phase", "Place", "ProgressClock", "Watchdog", "where"]

Phase = Literal["setup", "data", "compute", "reduce", "validation", "checkpoint", "done"]
HANG = "Hang"  # the kind of failure

_UNLIMITED = ("setup", "done")  # reader, rendezvous and Spark have limits of their own
_TICK_SECONDS = 0.25
_BEAT_SECONDS = 1.0
_SEND_SECONDS = 5.0
_LINGER_SECONDS = 1.0
_BACKSTOP_SECONDS = 10.0  # after the watchdog ought to have acted
_EXIT_CODE = 75
_SPARKS_TIMER = "PYTHON_TRACEBACK_DUMP_INTERVAL_SECONDS"  # faulthandler has one timer, which Spark may use
_STDERR = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where the training thread is.

    Attributes:
        phase: What it does; "reduce" is waiting for other ranks.
        step: Optimizer steps that are done.
        since: When it came there, by `time.monotonic`.
    """

    phase: str
    step: int
    since: float


class ProgressClock:
    """Where a rank is: written by its training thread, read by others, without a lock."""

    def __init__(self) -> None:
        self._place: tuple[str, int, float] = ("setup", 0, time.monotonic())

    def at(self, phase: str, step: int) -> None:
        """The rank is in this phase now; every call counts as progress.

        Args:
            phase: One of `Phase`.
            step: Optimizer steps that are done.
        """
        self._place = (phase, step, time.monotonic())

    @property
    def place(self) -> Place:
        """Where the rank is."""
        return Place(*self._place)


def where(phase: str, step: int) -> str:
    """A place in words.

    >>> where("compute", 16), where("validation", 16), where("setup", 0)
    ('in step 17, phase compute', 'after step 16, phase validation', 'in phase setup')
    """
    if phase in _UNLIMITED:
        return f"in phase {phase}"
    if phase in ("data", "compute", "reduce"):
        return f"in step {step + 1}, phase {phase}"
    return f"after step {step}, phase {phase}"


class Watchdog:
    """Tells the driver once a second that a rank is alive, and ends the process of one that makes no progress.

    Use as a context manager around the training, in the training thread.

    Args:
        clock: Where the rank is.
        channel: The rank's line to the driver.
        rank: The rank.
        host: Its executor's address, as Spark knows it.
        attempt: How often the run was started, this time included.
        timeouts: ``step`` and ``checkpoint`` are how long the clock may stand still.
    """

    def __init__(
        self, clock: ProgressClock, channel: RankChannel, *, rank: int, host: str, attempt: int, timeouts: Timeouts
    ) -> None:
        self._clock = clock
        self._channel = channel
        self._rank = rank
        self._host = host
        self._attempt = attempt
        self._timeouts = timeouts
        self._training_thread = threading.get_ident()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sparkdl-watchdog", daemon=True)
        self._has_backstop = not os.environ.get(_SPARKS_TIMER)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._disarm()

    def _watch(self) -> None:
        place, still = self._clock.place, 0.0
        before, beat = time.monotonic(), float("-inf")
        while not self._closing.wait(_TICK_SECONDS):
            now, found = time.monotonic(), self._clock.place
            # A process that was stopped, or starved of CPU, gets back the time that it did not have.
            still = still + min(now - before, 4 * _TICK_SECONDS) if found == place else 0.0
            place, before = found, now
            limit = self._limit(place.phase)
            if limit is not None and still > limit:
                self._end(place, still)
            if now - beat >= _BEAT_SECONDS:
                beat = now
                self._channel.send("alive", phase=place.phase, step=place.step, since=round(now - place.since, 1))
                if limit is None:
                    self._disarm()
                elif self._has_backstop:
                    faulthandler.dump_traceback_later(limit - still + _BACKSTOP_SECONDS, exit=True, file=_STDERR)

    def _limit(self, phase: str) -> float | None:
        if phase in _UNLIMITED:
            return None
        limit: timedelta = self._timeouts.checkpoint if phase == "checkpoint" else self._timeouts.step
        return limit.total_seconds()

    def _disarm(self) -> None:
        if self._has_backstop:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, place: Place, still: float) -> None:
        """Say where the rank is, and end the process."""
        waits = place.phase == "reduce"
        failure = Failure(
            rank=self._rank,
            host=self._host,
            kind=HANG,
            message=f"no progress for {still:.0f} s {where(place.phase, place.step)}",
            traceback=self._stacks(),
            consequence=waits,
            attempt=self._attempt,
            step=place.step,
            time=time.time(),
        )
        with contextlib.suppress(OSError):  # the executor's log, for where no driver is reached
            os.write(_STDERR, f"rank {self._rank}: {failure.message}\n{failure.traceback}".encode(errors="replace"))
        self._channel.send("failure", **asdict(failure), phase=place.phase, waited=round(still, 1))
        self._channel.flush(_SEND_SECONDS)
        if waits:  # the death of this process wakes the others: let those who wait as well say where they are
            time.sleep(_LINGER_SECONDS)
        os._exit(_EXIT_CODE)

    def _stacks(self) -> str:
        """The Python stacks of all threads but this one, the training thread's first."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        order = sorted(frames, key=lambda ident: ident != self._training_thread)
        return "\n".join(
            f"Thread {names.get(ident, ident)}, most recent call last:\n"
            + "".join(traceback.format_stack(frames[ident]))
            for ident in order
        )
