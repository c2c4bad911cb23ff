"""Saving a run's state at steps on which all ranks agree.

Before each step the ranks exchange two numbers in the background: whether rank 0 finds a checkpoint due, and whether
any rank was told to stop. The answer is there when the step is done, and equal on all ranks.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from sparkdl.checkpoint.store import CheckpointStore
from sparkdl.checkpoint.writer import AsyncWriter
from sparkdl.config import TrainConfig
from sparkdl.errors import CheckpointError

__all__ = ["CheckpointSchedule", "Preempted", "Saver", "open_saver", "told_to_stop"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointSchedule:
    """When checkpoints are due: a pure function of steps and seconds. With neither, at the end of every epoch."""

    interval: int | None
    """Optimizer steps from one checkpoint to the next."""

    seconds: float | None
    """Seconds from one checkpoint to the next."""

    steps_per_epoch: int
    """Optimizer steps of an epoch."""

    def by_step(self, step: int) -> bool:
        """Whether one is due after this many optimizer steps; equal on all ranks."""
        if self.interval is None and self.seconds is not None:
            return False
        return step > 0 and step % (self.interval or self.steps_per_epoch) == 0

    def by_time(self, now: float, last: float) -> bool:
        """Whether one is due by the clock: one rank decides, and tells the others.

        Args:
            now: Seconds, of any clock that only goes forward.
            last: The same when the last checkpoint began, or the training.
        """
        return self.seconds is not None and now - last >= self.seconds


class Preempted(Exception):
    """A rank was told to stop; what the ranks had done is saved."""


class Saver:
    """Writes checkpoints from rank 0 while the ranks go on; use as a context manager, while the process group is up.

    Args:
        writer: Where to; used on rank 0 alone.
        schedule: When.
        stopped: True once this process was told to stop.
    """

    def __init__(
        self, writer: AsyncWriter, schedule: CheckpointSchedule, *, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._writer = writer
        self._schedule = schedule
        self._stopped = stopped
        self._rank = dist.get_rank()
        # The answer must not wait for a GPU.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._due = False
        self._saved = time.monotonic()
        self._stalled = 0.0

    def __enter__(self) -> "Saver":
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._writer.__exit__(kind, error, traceback)
        except CheckpointError as late:  # the training is done all the same
            logger.warning("%s", late)

    def take_stalled_seconds(self) -> float:
        """Seconds for which saving has held up this rank since this was asked last."""
        told, self._stalled = self._stalled, self._writer.stalled_seconds
        return self._stalled - told

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps by their number alone; equal on all ranks."""
        return self._schedule.by_step(step)

    def ask(self, step: int) -> None:
        """Ask the other ranks whether all save after this step.

        Args:
            step: Optimizer steps of the run when this one will be done.
        """
        if self._rank == 0:
            self._due = self._due or self._schedule.by_step(step)
            self._due = self._due or self._schedule.by_time(time.monotonic(), self._saved)
        ready = self._due and not self._writer.busy
        stopped = self._rank + 1 if self._stopped() else 0
        self._answers = torch.tensor([ready, stopped], dtype=torch.int32)
        self._asked = dist.all_reduce(self._answers, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> bool:
        """Whether all ranks save now; the answer to the last `ask`."""
        self._asked.wait()
        return bool(self._answers.any())

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Hand the state to the writer, which may still be busy; after an answer of `agreed`, and at the end.

        Args:
            step: Optimizer steps of the run so far.
            state: As `sparkdl.checkpoint.flatten_state` takes it.
            facts: What shall be known of the checkpoint without reading its state.

        Raises:
            CheckpointError: The state holds what cannot be stored.
            Preempted: A rank was told to stop. The state is on storage by then, if the store could be written to.
        """
        began = time.monotonic()
        stop = int(self._answers[1])  # the rank that was told to, from 1
        saved = torch.zeros((), dtype=torch.int32)
        if self._rank == 0:
            self._wait()
            saved += self._writer.save(step, state, facts)
            self._due, self._saved = False, began
            if stop:
                saved *= self._wait()
        if stop:
            dist.all_reduce(saved, group=self._group)  # none may end the run before its state is on storage
            outcome = "was saved" if saved else "could not be saved"
            raise Preempted(f"rank {stop - 1} was told to stop (SIGTERM); the state after step {step} {outcome}")

    def _wait(self) -> bool:
        """Until the last checkpoint is on storage; False where it is not, which fails no training."""
        failures = len(self._writer.failures)
        try:
            self._writer.wait()
        except CheckpointError as error:
            logger.warning("%s The training goes on.", error)
            return False
        return len(self._writer.failures) == failures


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether this process has been sent SIGTERM during the block, in which that does not end it.

    Only the main thread may ask for signals; elsewhere SIGTERM does what it did.
    """
    told = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: told
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def open_saver(store: CheckpointStore | None, config: TrainConfig, steps_per_epoch: int) -> Iterator[Saver | None]:
    """Writes checkpoints as configured; from then on SIGTERM asks for one.

    Args:
        store: Where to; None writes none.
        config: When.
        steps_per_epoch: Optimizer steps of an epoch.
    """
    if store is None:
        yield None
        return
    writer = AsyncWriter(store, timeout=config.timeouts.checkpoint)
    schedule = CheckpointSchedule(config.checkpoint_interval, config.checkpoint_seconds, steps_per_epoch)
    with told_to_stop() as stopped, Saver(writer, schedule, stopped=stopped) as saver:
        yield saver
