"""What the driver knows of the ranks, and the one error that the user sees when a run fails.

Ranks tell why they failed, and where they are once a second; a connection that ends without a goodbye is a process that
died. Spark tells only which task it lost first, which is often a rank that a peer's death woke up.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparkdl.barrier.event_files import Event
from sparkdl.barrier.rank_log import log_of_rank
from sparkdl.barrier.rendezvous import error_of
from sparkdl.barrier.watchdog import HANG, where
from sparkdl.errors import Failure, SparkdlError, TrainingFailedError

__all__ = ["FAILURE_NOTE", "Monitor"]

FAILURE_NOTE = "sparkdl failure: "
"""What a rank's account begins with where it travels in a note of Spark's own error."""

_REPORTS_SECONDS = 1.0  # for the reports of other ranks after the first hang
_LAST_WORDS_SECONDS = 1.0
_ENDING_SECONDS = 3.0  # for Spark to end a job with a failed task: it waits until the task's Python process is gone
_SILENT_SECONDS = 5.0  # longer than between two heartbeats
_STACKS = 4
_STACK_CHARACTERS = 6000
_CANCELLED = re.compile(
    r"SPARK_JOB_CANCELLED|OPERATION_CANCELED|cancelled part of cancelled job group|SparkContext was shut down|"
    r"Job \S+ cancelled|Stage \S+ cancelled|killed via (?:the )?Web UI"
)
_JAVA_REASON = re.compile(r"^(?:Caused by: )?[\w.$]+(?:Exception|Error): (.+)$", re.MULTILINE)
_PYTHON_REASON = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*$", re.MULTILINE)
_EXECUTOR = re.compile(r"ExecutorLostFailure \(.+")
_SAYS_NOTHING = ("awaitResult", "failed barrier ResultStage")


@dataclass(slots=True)
class _Rank:
    """What is known of one rank; times by the driver's clock.

    Attributes:
        host: Its executor's address; "" before it said anything.
        heard: When it said something last.
        heard_live: The same, over its connection alone.
        phase: What it did then.
        step: Optimizer steps that it had done.
        waited: Seconds for which its clock had stood still when it said that it hangs.
        gone: True once its connection ended without a goodbye.
    """

    host: str = ""
    heard: float | None = None
    heard_live: float | None = None
    phase: str = "setup"
    step: int = 0
    waited: float = 0.0
    gone: bool = False


class Monitor:
    """Takes the events of one attempt, from any thread.

    Args:
        world_size: Ranks.
        on_event: Called for every event of progress.
    """

    def __init__(self, world_size: int, on_event: Callable[[Event], None] | None = None) -> None:
        self._ranks = [_Rank() for _ in range(world_size)]
        self._on_event = on_event
        self._changed = threading.Condition()
        self._first_hang: float | None = None
        self._slots: int | None = None
        self.failures: dict[int, Failure] = {}

    # ---- while the stage runs ----------------------------------------------------------------------------------------
    def receive(self, event: Event) -> None:
        """Take an event that came over a rank's connection."""
        with self._changed:
            self._ranks[event["rank"]].heard_live = time.monotonic()
        self.receive_file(event)

    def receive_file(self, event: Event) -> None:
        """Take an event that a rank left in a file."""
        kind = event["event"]
        with self._changed:
            rank = self._ranks[event["rank"]]
            rank.gone = kind == "gone"
            if kind != "gone":
                rank.host, rank.heard = event["host"], time.monotonic()
            if kind == "alive":
                rank.phase, rank.step = event["phase"], event["step"]
            elif kind == "failure":
                self._fail(event, rank)
            self._changed.notify_all()
        if kind == "log":
            log_of_rank(event)
        elif kind not in ("alive", "failure", "gone") and self._on_event is not None:
            self._on_event(event)

    def _fail(self, event: Event, rank: _Rank) -> None:
        failure = Failure(**{name: event[name] for name in Failure.__slots__})
        known = self.failures.get(failure.rank)
        if known is None or (known.consequence and not failure.consequence):
            self.failures[failure.rank] = failure
        if failure.kind == HANG and "phase" in event:
            rank.phase, rank.step, rank.waited = event["phase"], failure.step or 0, event["waited"]
            self._first_hang = self._first_hang or time.monotonic()

    def is_silent(self, rank: int) -> bool:
        """True for a rank that is not heard over a connection."""
        heard = self._ranks[rank].heard_live
        return heard is None or time.monotonic() - heard > _SILENT_SECONDS

    def patience(self) -> float | None:
        """Seconds that the job has to end by itself, now that the run has failed; None while it has not."""
        with self._changed:
            if self._has_cause():
                return _ENDING_SECONDS
            if self._slots is not None:
                return 0.0
            if self._first_hang is not None and time.monotonic() > self._first_hang + _REPORTS_SECONDS:
                return 0.0  # what hangs does not end by itself
            return None

    def has_started(self) -> bool:
        """True once all ranks were heard of."""
        with self._changed:
            return all(rank.heard is not None for rank in self._ranks)

    def lose_slots(self, slots: int) -> None:
        """Take note that the ranks cannot start: the cluster has too few slots left."""
        with self._changed:
            self._slots = slots

    def _has_cause(self) -> bool:
        return any(not failure.consequence and failure.kind != HANG for failure in self.failures.values())

    # ---- afterwards --------------------------------------------------------------------------------------------------
    def settle(self, error: Exception) -> None:
        """Wait a moment for those who may explain ``error``, while they can still be heard."""
        if _CANCELLED.search(str(error)) or self._slots is not None:
            return
        end = time.monotonic() + _LAST_WORDS_SECONDS
        with self._changed:
            if self._first_hang is not None:
                end = self._first_hang + _REPORTS_SECONDS
            self._changed.wait_for(self._is_settled, max(0.0, end - time.monotonic()))

    def _is_settled(self) -> bool:
        if self._has_cause() or len(self.failures) == len(self._ranks):
            return True
        return self._first_hang is None and any(self._is_dead(rank) for rank in range(len(self._ranks)))

    def _is_dead(self, rank: int) -> bool:
        return self._ranks[rank].gone and rank not in self.failures

    def error(self, error: Exception) -> SparkdlError:
        """What really went wrong, from the ranks' own accounts, else from Spark's."""
        text = str(error)
        for failure in _accounts(text):
            self.failures.setdefault(failure.rank, failure)
        if self._has_cause():
            return error_of(self.failures)
        if any(failure.kind == HANG for failure in self.failures.values()):
            return self._hang()
        if self._slots is not None:
            return TrainingFailedError(
                f"{len(self._ranks)} ranks were to start, but the cluster has {self._slots} slots left: executors were "
                "lost before all ranks had begun.",
                self.failures,
                lost=True,
            )
        if _CANCELLED.search(text):
            return TrainingFailedError(
                "The job was cancelled, by the driver's program or in Spark's user interface. Spark says: "
                f"{_first_line(text)}",
                self.failures,
            )
        return self._silence(text)

    def _hang(self) -> TrainingFailedError:
        hung = {rank: failure for rank, failure in self.failures.items() if failure.kind == HANG}
        culprits = [rank for rank, failure in hung.items() if not failure.consequence]
        culprits = sorted(culprits or (rank for rank in range(len(self._ranks)) if self._is_missing(rank)))
        waiting = [rank for rank in range(len(self._ranks)) if rank not in culprits]
        seconds = max((self._ranks[rank].waited for rank in waiting or culprits), default=0.0)
        waited = f"{_ranks(waiting)} waited for {'it' if len(culprits) == 1 else 'them'}" if waiting else ""
        if culprits:
            # Those who wait know the step better than the last heartbeat of one who says nothing.
            step = min(failure.step or 0 for failure in hung.values())
            arrived = "; ".join(self._absence(rank, step) for rank in culprits)
            message = arrived + (f"; {waited}" if waited else "") + (f" for {seconds:.0f} s" if seconds else "") + "."
        else:
            steps = ", ".join(
                f"rank {rank} {where(self._ranks[rank].phase, self._ranks[rank].step)}" for rank in waiting
            )
            message = f"All ranks waited for each other for {seconds:.0f} s: {steps}."
        return TrainingFailedError(message + _stacks(self.failures, [*culprits, *waiting]), self.failures, lost=True)

    def _is_missing(self, rank: int) -> bool:
        """True for a rank that said nothing while others said that they wait, unless it waited as well."""
        known = self._ranks[rank]
        silent = known.heard is None or time.monotonic() - known.heard > _SILENT_SECONDS
        return rank not in self.failures and (silent or known.phase != "reduce")

    def _absence(self, rank: int, step: int) -> str:
        known = self._ranks[rank]
        told = "never heard of" if known.heard is None else f"last heard of {time.monotonic() - known.heard:.0f} s ago"
        if rank in self.failures:
            told = f"no progress for {known.waited:.0f} s"
        host = f" on {known.host}" if known.host else ""
        return f"Rank {rank}{host} did not arrive in step {step + 1} ({told}, in phase {known.phase})"

    def _silence(self, text: str) -> TrainingFailedError:
        known = self.failures
        dead = [rank for rank in range(len(self._ranks)) if self._is_dead(rank)]
        silent = bool(dead or known) or "exited unexpectedly" in text or "ExecutorLost" in text
        lead = "A rank's process died without a word (killed, or out of memory?)" if silent else ""
        if silent and dead:
            lead += ": " + "; ".join(self._death(rank) for rank in dead)
        seen = "".join(f"\n  rank {rank}: {known[rank].message}" for rank in sorted(known))
        return TrainingFailedError(
            (f"{lead}. " if lead else "")
            + f"Spark says: {_reason(text)}"
            + (f"\nThe other ranks saw only the consequence:{seen}" if seen else ""),
            known,
            lost=silent,
        )

    def _death(self, rank: int) -> str:
        known = self._ranks[rank]
        return f"rank {rank} on {known.host}, last seen {where(known.phase, known.step)}"


def _accounts(text: str) -> Iterable[Failure]:
    """Accounts of ranks in the text of Spark's error."""
    for line in text.splitlines():
        note = line.strip()
        if note.startswith(FAILURE_NOTE):
            try:
                yield Failure(**json.loads(note.removeprefix(FAILURE_NOTE)))
            except (ValueError, TypeError):
                continue


def _reason(text: str) -> str:
    """The sentence of Spark's error that says most."""
    reasons = [match for match in _JAVA_REASON.findall(text) if not any(words in match for words in _SAYS_NOTHING)]
    raised = _PYTHON_REASON.findall(text.partition("Traceback (most recent call last):")[2])
    return str((raised or reasons or _EXECUTOR.findall(text) or [_first_line(text)])[0])


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks in words.

    >>> _ranks([1]), _ranks([0, 1, 3])
    ('rank 1', 'ranks 0, 1, 3')
    """
    numbers = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def _stacks(failures: Mapping[int, Failure], order: Iterable[int]) -> str:
    """The stacks of some ranks, those first that are the most telling; equal ones of many ranks say no more."""
    found: dict[str, Any] = {
        f"\n\nRank {rank}: {failures[rank].message}\n{failures[rank].traceback[:_STACK_CHARACTERS]}": None
        for rank in order
        if rank in failures
    }
    return "".join([*found][:_STACKS])
