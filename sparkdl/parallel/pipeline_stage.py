"""One stage of a pipeline: a part of the module as `torch.distributed.pipelining` calls it, and what it takes."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.utils._pytree import tree_flatten, tree_unflatten

from sparkdl.parallel.split import Stages
from sparkdl.parallel.tracing import Autocast
from sparkdl.serialization import state_of

__all__ = ["Part", "TimedStage", "filled", "owners"]


class Part(nn.Module):
    """A stage as `PipelineStage` calls it: from tensors to a tuple of tensors, in the precision of the run."""

    def __init__(self, split: Stages, number: int, autocast: Autocast) -> None:
        super().__init__()
        self.body = split.modules[number]
        self.number = number
        self.is_last = number == len(split.modules) - 1
        self._restore = split.restore
        self._autocast = autocast

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the next stage is given; of the last one, the tensors in the module's output."""
        with self._autocast():
            # What was received is a leaf of autograd, which a layer that works in place must not change.
            output = self.body(*(value.clone() if self.number else value for value in given))
        leaves, self._structure = tree_flatten(output)
        self._constants = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        return tuple(leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor))

    def restored(self, returned: Sequence[Tensor], rows: int, size: int) -> Any:
        """The module's output for the first ``rows`` of a micro-batch of ``size`` rows."""
        tensors = iter(value[:rows] if value.dim() and len(value) == size else value for value in returned)
        leaves = [
            self._constants[place] if place in self._constants else next(tensors)
            for place in range(len(returned) + len(self._constants))
        ]
        return self._restore(tree_unflatten(leaves, self._structure))


class TimedStage(PipelineStage):
    """Knows how long it has computed; the schedule waits for other ranks in between."""

    _seconds = 0.0

    @contextlib.contextmanager
    def stopwatch(self) -> Iterator[None]:
        """In which computing is done."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """Seconds of computing since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """See `PipelineStage`."""
        with self.stopwatch():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """See `PipelineStage`."""
        with self.stopwatch():
            return super().backward_one_chunk(*args, **kwargs)


def owners(module: nn.Module, split: Stages, size: int) -> dict[str, int]:
    """Which rank of a pipeline speaks for a tensor: the first whose stages use it, or the first of all."""
    users: dict[int, int] = {}
    for number, part in enumerate(split.modules):
        for value in (*part.parameters(), *part.buffers()):
            users.setdefault(id(value), number % size)
    return {name: users.get(id(value), 0) for name, value in state_of(module).items()}


def filled(rows: Tensor, size: int, filler: Tensor) -> Tensor:
    """Rows of shape (rows, ...) and as many copies of ``filler``, shape (1, ...), as make ``size``."""
    return torch.cat([rows, filler.expand(size - len(rows), *filler.shape[1:])])
