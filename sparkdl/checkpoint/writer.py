"""Writing checkpoints beside the training, which is held up for one copy of the state."""

import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparkdl.checkpoint.state import encode_facts, flatten_state
from sparkdl.checkpoint.store import Checkpoint, CheckpointStore
from sparkdl.errors import CheckpointError
from sparkdl.storage import reason

__all__ = ["AsyncWriter"]

logger = logging.getLogger(__name__)

_GRACE = 1.0  # seconds for the last write when the process is about to die


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    tensors: Mapping[str, Tensor]
    structure: Any
    facts: Any


class AsyncWriter:
    """Writes checkpoints in a thread while the training goes on; a context manager.

    Leaving the block waits for the last write; leaving it by an exception gives it a second. A write that fails is
    logged and kept in ``failures``, and never disturbs the training.

    Args:
        store: Where to.
        timeout: For one write, from its beginning.

    Attributes:
        written: The checkpoints that are complete.
        failures: One sentence for each that failed or was overdue.
        stalled_seconds: How long `save` and `wait` have held up their callers.
    """

    def __init__(self, store: CheckpointStore, *, timeout: timedelta) -> None:
        self.written: list[Checkpoint] = []
        self.failures: list[str] = []
        self.stalled_seconds = 0.0
        self._store = store
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._began = 0.0
        self._step = 0
        self._told = False
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
            else:
                self._idle.wait(_GRACE)
        finally:
            if self._thread is not None:
                self._jobs.put(None)
                if not self.busy:
                    self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return not self._idle.is_set()

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> bool:
        """Copy the state to host memory and begin to write it; what is changed afterwards is not written.

        It is one copy, into memory that the next one uses again.

        Args:
            step: Optimizer steps finished.
            state: As for `flatten_state`.
            facts: As for `CheckpointStore.write`.

        Returns:
            False, and nothing is copied, while the one before is still being written; False also where memory does not
            suffice for the copy, which is a failure like others.

        Raises:
            CheckpointError: State or facts hold what cannot be stored.
        """
        began = time.monotonic()
        if self.busy:
            self._tell_overdue(began)
            return False
        try:
            tensors, structure = flatten_state(state)
            encoded = encode_facts(facts)
            job = _Job(step, self._copy(tensors), structure, encoded)
        except CheckpointError:
            raise
        except (MemoryError, RuntimeError) as error:  # torch has no other for a lack of host memory
            self._fail(f"The checkpoint of step {step} cannot be copied to host memory: {reason(error)}.")
            return False
        finally:
            self.stalled_seconds += time.monotonic() - began
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sparkdl-checkpoint", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._began, self._step, self._told = time.monotonic(), step, False
        self._jobs.put(job)
        return True

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until the last checkpoint is on storage, or its write has failed.

        Args:
            timeout: For the write, from its beginning; None: the writer's own.

        Raises:
            CheckpointError: The write has taken longer than the timeout. It is not stopped.
        """
        limit = (self._timeout if timeout is None else timeout).total_seconds()
        began = time.monotonic()
        finished = self._idle.wait(max(0.0, self._began + limit - began))
        self.stalled_seconds += time.monotonic() - began
        if not finished:
            raise CheckpointError(self._overdue(limit))

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return buffers

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self.written.append(self._store.write_flat(job.step, job.tensors, job.structure, job.facts))
            except Exception as error:
                self._fail(str(error))
            finally:
                self._idle.set()

    def _fail(self, why: str) -> None:
        self.failures.append(f"{why} The training goes on.")
        logger.warning("%s", self.failures[-1])

    def _overdue(self, limit: float) -> str:
        return (
            f"The checkpoint of step {self._step} was not written to {self._store.url!r} in {limit:g} seconds. "
            "Allow more for 'checkpoint' in the timeouts, or use a faster store."
        )

    def _tell_overdue(self, now: float) -> None:
        limit = self._timeout.total_seconds()
        if not self._told and now - self._began > limit:
            self._told = True
            self._fail(self._overdue(limit))
