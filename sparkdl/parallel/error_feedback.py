"""The communication hook of `DistributedDataParallel` that sends gradients compressed, and keeps what was not sent."""

from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from sparkdl.errors import ConfigError
from sparkdl.parallel.compression import Compression
from sparkdl.parallel.rank_states import gather_states

__all__ = ["CompressedAllReduce"]

_PATIENCE = 2.0  # seconds for the thread to end, which it does not while it waits for a lost rank


class CompressedAllReduce:
    """The communication hook of a compression, and its memory; a rank without others has none to send to.

    Buckets are exchanged one after the other, in the order in which DDP hands them over, which is the same on all
    ranks. On gloo that happens in a thread beside the backward pass, over a process group of its own, since what the
    backward pass itself sends has no fixed place in that order.

    Args:
        compression: What is sent.
        named: The parameters whose gradients are reduced, by name.

    Attributes:
        active: False sends gradients whole and leaves no trace.
    """

    def __init__(self, compression: Compression, named: Mapping[str, nn.Parameter]) -> None:
        self._compression = compression
        self._named = dict(named)
        self._names = {id(value): name for name, value in named.items()}
        self._group: dist.ProcessGroup | None = None
        self._kept: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        self._steps = 0
        self.active = True
        self._waiting: SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None] | None = None
        if next(iter(named.values())).device.type == "cpu" and dist.get_world_size() > 1:
            self._group = dist.new_group()
            self._waiting = SimpleQueue()
            self._thread = Thread(target=_work_off, args=(self._waiting,), name="sparkdl-compression", daemon=True)
            self._thread.start()

    def hook(self, state: None, bucket: GradBucket) -> Future[Tensor]:
        """As `DistributedDataParallel.register_comm_hook` takes it."""
        work = partial(self._reduce if self.active else self._reduce_whole, bucket)
        if self._waiting is None:
            future: Future[Tensor] = Future(devices=[bucket.buffer().device])
            future.set_result(work())
        else:
            future = Future()
            self._waiting.put((work, future))
        return future

    @torch.no_grad()
    def _reduce(self, bucket: GradBucket) -> Tensor:
        if self._compression.compresses(self._steps):
            buffer = bucket.buffer()
            parts = [(self._names[id(value)], value.shape) for value in bucket.parameters()]
            sizes = [shape.numel() for _, shape in parts]
            for (name, _), part in zip(parts, buffer.split(sizes), strict=True):
                if name in self._kept:
                    part += self._kept[name]
            mean, kept = self._compression.mean(buffer, parts, self._shared, self._group)
            if kept is not None:
                self._kept.update(zip((name for name, _ in parts), kept.split(sizes), strict=True))
            buffer.copy_(mean)
        else:
            self._reduce_whole(bucket)
        self._steps += bucket.is_last()
        reduced: Tensor = bucket.buffer()
        return reduced

    def _reduce_whole(self, bucket: GradBucket) -> Tensor:
        buffer: Tensor = bucket.buffer()
        dist.all_reduce(buffer, group=self._group)
        return buffer.div_(dist.get_world_size(self._group))

    @torch.no_grad()
    def add_what_is_kept(self) -> None:
        """Add to the gradients what was kept, and forget it: a rank alone keeps nothing back."""
        for name, kept in self._kept.items():
            value = self._named[name]
            if value.grad is not None:
                value.grad += kept.view(value.shape)
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """What all ranks keep, whole on rank 0 alone; a collective."""
        return {
            "compression": type(self._compression).__name__,
            "kept": gather_states(self._kept),
            "shared": dict(self._shared),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what rank 0's `state_dict` returned.

        With another number of ranks every rank gets the mean of what was kept: as large a part of the next gradient as
        before.

        Raises:
            ConfigError: Another compression wrote it, and keeps parts of gradients.
        """
        own = type(self._compression).__name__
        if own != state["compression"] and any(state["kept"]):
            raise ConfigError(
                f"compression={own!r} cannot go on from this checkpoint: compression={state['compression']!r} wrote it "
                "and keeps parts of gradients that are still to be sent. Use the same compression."
            )
        if own != state["compression"]:
            return
        everyone = state["kept"]
        if len(everyone) == dist.get_world_size():
            kept = everyone[dist.get_rank()]
        else:
            names = {name for one in everyone for name in one}
            kept = {name: sum(one[name] for one in everyone if name in one) / len(everyone) for name in names}
        self._kept = {name: value.to(self._named[name].device, copy=True) for name, value in kept.items()}
        self._shared = {name: value.to(self._named[name].device, copy=True) for name, value in state["shared"].items()}
        self._steps = state["steps"]

    def close(self) -> None:
        """End the thread, which may still wait for a rank that is gone, and let go of the process group."""
        if self._waiting is not None:
            self._waiting.put(None)
            self._thread.join(_PATIENCE)
        self._group = None


def _work_off(waiting: "SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None]") -> None:
    while (given := waiting.get()) is not None:
        work, future = given
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)  # type: ignore[arg-type] # torch annotates it as a result
        del given, work, future  # holds a bucket
