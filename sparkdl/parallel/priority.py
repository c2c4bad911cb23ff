"""Gradients are sent in the order in which the next forward needs them, while it runs already.

Peng et al., "A generic communication scheduler for distributed DNN training acceleration" (ByteScheduler, SOSP 2019);
Jayarajan et al., "Priority-based parameter propagation" (P3, arXiv 1905.03960). A backward pass brings the gradients of
the last layer first, but the forward that follows needs the first layer first. So gradients are cut into chunks, of
those that are there the most urgent ones are sent first, and the next forward waits for a parameter where it uses it.
That hides the exchange behind forward and backward, instead of the backward alone.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparkdl.errors import ConfigError

__all__ = ["PriorityExchange", "order_of_use"]

CHUNK_BYTES = 1 << 20
"""What is sent before a more urgent gradient has its turn; smaller parameters share a message."""

_PATIENCE = 2.0  # seconds for threads to end, which one that waits for a lost rank does not
_WINDOW = 2  # chunks on their way at once: the second one fills the pauses of the first


@dataclass
class _Unit:
    """Parameters whose gradients travel together.

    Attributes:
        parameters: In the order of their use.
        first_chunk: The number of its first chunk among all.
        missing: How many of their gradients are not there yet.
        gradients: All of them, shape (values,), once they are there.
        chunks: Its parts.
        unsent: How many of them are not the mean over ranks yet; -1 where gradients are missing.
        pending: True from the backward pass until the weights are new.
    """

    parameters: list[nn.Parameter]
    first_chunk: int = 0
    missing: int = 0
    gradients: Tensor | None = None
    chunks: Sequence[Tensor] = ()
    unsent: int = -1
    pending: bool = False

    def is_there(self) -> bool:
        """True where this rank has the gradients."""
        return self.unsent > 0


class PriorityExchange:
    """Brings gradients to the mean over ranks, and weights forward, one part of the module after the other.

    Rank 0 says which chunk is next, the most urgent one that it has; the other ranks send it when they have it. What
    waits for the network are two threads: one says what comes next and starts it, the other sees it arrive. Weights
    change in the thread that trains alone, before their first use.

    Args:
        parameters: In the order of their use, equal on all ranks.
        chunk_bytes: Size of a chunk.

    Attributes:
        waited: Seconds that the training thread has waited for others.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], chunk_bytes: int = CHUNK_BYTES) -> None:
        self._units = list(_units(parameters, chunk_bytes))
        self._chunk_bytes = chunk_bytes
        self._unit_of = {id(value): unit for unit in self._units for value in unit.parameters}
        self._owners: list[_Unit] = []  # of each chunk
        for unit in self._units:
            unit.first_chunk = len(self._owners)
            values = sum(value.numel() for value in unit.parameters)
            self._owners += [unit] * -(-values // self._chunk_values(unit))
        self._group: dist.ProcessGroup | None = dist.new_group()
        self._world_size = dist.get_world_size()
        self._leads = dist.get_rank() == 0
        self._update: Callable[[], None] | None = None
        self._armed = False
        self.waited = 0.0
        # What the threads share, under one lock.
        self._changed = Condition()
        self._urgent: list[int] = []  # on rank 0, chunks that are there
        self._due = self._in_flight = 0
        self._closed = False
        self._error: Exception | None = None
        self._works: SimpleQueue[tuple[_Unit, Tensor, Any] | None] = SimpleQueue()
        self._handles = [value.register_post_accumulate_grad_hook(self._take) for value in parameters]
        self._threads = [
            Thread(target=work, name="sparkdl-priority", daemon=True) for work in (self._send, self._see_arrive)
        ]
        for thread in self._threads:
            thread.start()

    # ---- in the thread that trains -----------------------------------------------------------------------------------
    def waiting(self) -> TorchFunctionMode:
        """A context in which a parameter has its new value before torch does anything with it."""
        return _EachUse(self._need)

    def settle(self) -> None:
        """Wait until all weights are new."""
        for unit in self._units:
            self._finish(unit)

    def begin(self, update: Callable[[], None]) -> None:
        """From here on, gradients are taken as the backward pass brings them.

        Args:
            update: Brings the weights forward by the gradients that are there when it is called.
        """
        self.settle()
        self._update, self._armed = update, True
        with self._changed:
            for unit in self._units:
                unit.missing, unit.unsent, unit.pending = len(unit.parameters), -1, True
            self._due += len(self._owners)
            self._changed.notify_all()

    def take_all(self) -> None:
        """Take the gradients that are there, as a backward pass would have brought them."""
        for unit in reversed(self._units):
            for value in unit.parameters:
                self._take(value)

    def end(self) -> None:
        """The backward pass is over.

        Raises:
            ConfigError: Some parameters got no gradient. The other ranks got zeros for them, so that none waits.
        """
        self._armed = False
        lacking = [unit for unit in self._units if unit.missing]
        for unit in lacking:
            for value in unit.parameters:
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            self._hand_over(unit)
        if lacking:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or all(unit.unsent == 0 for unit in self._units))
            raise ConfigError(
                "schedule='priority', but some parameters had no part in the output of a step. Use schedule='ready', "
                "or freeze these parameters (frozenParameters)."
            )

    def close(self) -> None:
        """End the threads, which may still wait for a rank that is gone, and let go of process group and parameters."""
        for handle in self._handles:
            handle.remove()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._works.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._group = None

    def _take(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        unit = self._unit_of[id(parameter)]
        unit.missing -= 1
        if not unit.missing:
            self._hand_over(unit)

    def _hand_over(self, unit: _Unit) -> None:
        """Let the gradients of a unit be sent."""
        gradients = [value.grad.reshape(-1) for value in unit.parameters if value.grad is not None]
        for value in unit.parameters:
            value.grad = None
        flat = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        with self._changed:
            unit.gradients, unit.chunks = flat, flat.split(self._chunk_values(unit))
            unit.unsent = len(unit.chunks)
            if self._leads:
                for number in range(unit.unsent):
                    heapq.heappush(self._urgent, unit.first_chunk + number)
            self._changed.notify_all()

    def _need(self, parameter: Tensor) -> None:
        unit = self._unit_of.get(id(parameter))
        if unit is not None:
            self._finish(unit)

    def _finish(self, unit: _Unit) -> None:
        """Wait for the mean over ranks, and bring the weights forward by it."""
        if not unit.pending:
            return
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: unit.unsent == 0 or self._error is not None)
        self.waited += time.perf_counter() - began
        if self._error is not None:
            raise self._error
        assert unit.gradients is not None
        assert self._update is not None
        parts = unit.gradients.split([value.numel() for value in unit.parameters])
        for value, part in zip(unit.parameters, parts, strict=True):
            value.grad = part.view(value.shape)
        self._update()
        for value in unit.parameters:
            value.grad = None
        unit.gradients, unit.chunks, unit.pending = None, (), False

    def _chunk_values(self, unit: _Unit) -> int:
        return max(1, self._chunk_bytes // unit.parameters[0].element_size())

    # ---- in threads of their own -------------------------------------------------------------------------------------
    def _send(self) -> None:
        group, told = self._group, torch.zeros((), dtype=torch.int64)
        try:
            while True:
                with self._changed:
                    self._wait(lambda: self._due > 0 and self._in_flight < _WINDOW)
                    if self._leads:
                        self._wait(lambda: bool(self._urgent))
                        told.fill_(heapq.heappop(self._urgent))
                dist.broadcast(told, 0, group=group)
                if told < 0:
                    raise RuntimeError("Connection closed by peer: rank 0 left while gradients were under way")
                unit = self._owners[int(told)]
                with self._changed:
                    self._wait(unit.is_there)
                    self._due -= 1
                    self._in_flight += 1
                chunk = unit.chunks[int(told) - unit.first_chunk]
                self._works.put((unit, chunk, dist.all_reduce(chunk, group=group, async_op=True)))
        except _ClosedError:
            if self._leads and self._due:  # a thread that waits inside of gloo when the process ends would abort it
                dist.broadcast(told.fill_(-1), 0, group=group)
        except Exception as error:
            self._fail(error)

    def _see_arrive(self) -> None:
        try:
            while (given := self._works.get()) is not None:
                unit, chunk, work = given
                work.wait()
                chunk.div_(self._world_size)
                with self._changed:
                    self._in_flight -= 1
                    unit.unsent -= 1
                    self._changed.notify_all()
        except Exception as error:
            self._fail(error)

    def _wait(self, there: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._closed or there())
        if self._closed:
            raise _ClosedError

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class _ClosedError(Exception):
    """There is nothing more to send."""


class _EachUse(TorchFunctionMode):
    """Tells of parameters before torch does anything with them, wherever a module does it."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, nn.Parameter):
                    self._tell(one)
        return function(*args, **kwargs)


def order_of_use(parameters: Sequence[nn.Parameter], run: Callable[[], Any]) -> list[nn.Parameter]:
    """The parameters in the order in which rank 0 uses them; a collective.

    Args:
        parameters: All that are trained.
        run: Computes something with them.
    """
    places = {id(value): place for place, value in enumerate(parameters)}
    used: dict[int, None] = {}

    def note(value: Tensor) -> None:
        if id(value) in places:
            used.setdefault(places[id(value)])

    with _EachUse(note):
        run()
    order = torch.tensor([*used, *(place for place in range(len(parameters)) if place not in used)])
    dist.broadcast(order, 0)
    return [parameters[place] for place in order.tolist()]


def _units(parameters: Sequence[nn.Parameter], chunk_bytes: int) -> Iterator[_Unit]:
    """Neighbours that make no more than a chunk together; larger ones are by themselves."""
    own: list[nn.Parameter] = []
    for value in parameters:
        if own and (value.dtype != own[0].dtype or sum(one.nbytes for one in own) + value.nbytes > chunk_bytes):
            yield _Unit(own)
            own = []
        own.append(value)
    yield _Unit(own)
