"""Messages between ranks that do not wait for each other: a header of two integers, and bytes whose number both know.

They travel from point to point over gloo, through memory of the CPU. Nothing is pickled. There is a thread for every
rank that is listened to: gloo tells those who wait for one rank at once when it dies, and those who wait for any rank
never.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Inbox", "Kind", "Message", "Package", "receive_package", "send_message", "send_package"]

_HEADER, _CONTENT, _PACKAGE = 1, 2, 3  # tags
_ALIGNMENT = 16  # bytes
# As good as for ever: a rank that has nothing to say is not hanging, and one that died is noticed otherwise.
_PATIENCE = timedelta(days=365)


class Package:
    """Room for tensors of some shapes and types, and for which of them are there, in one run of bytes on the CPU.

    Args:
        tensors: Whose shapes and types.

    Attributes:
        data: The bytes: uint8 of shape (bytes,), pinned where a tensor is on a GPU.
        there: Which tensors are there: uint8 of shape (tensors,), a view of the bytes.
        tensors: Views of the bytes, in order.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        bounds = [_aligned(len(tensors))]
        for tensor in tensors:
            bounds.append(bounds[-1] + _aligned(tensor.numel() * tensor.element_size()))
        pinned = any(tensor.device.type == "cuda" for tensor in tensors)
        self.data = torch.zeros(bounds[-1], dtype=torch.uint8, pin_memory=pinned)
        self.there = self.data[: len(tensors)]
        self.tensors = [
            self.data[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(bounds, tensors, strict=False)
        ]

    @torch.no_grad()
    def put(self, tensors: Iterable[Tensor | None]) -> None:
        """Copy tensors in; None where one is not there."""
        there = []
        for room, tensor in zip(self.tensors, tensors, strict=True):
            there.append(tensor is not None)
            if tensor is not None:
                room.copy_(tensor.to_dense())
        self.there.copy_(torch.tensor(there, dtype=torch.uint8))

    def get(self) -> list[Tensor | None]:
        """The tensors, which are views; None where one is not there."""
        return [tensor if there else None for tensor, there in zip(self.tensors, self.there.tolist(), strict=True)]


class Kind(IntEnum):
    """What a message says."""

    CONTENT = 0
    """A package follows."""

    NOTHING = 1
    """The rank has come as far, with nothing to send."""

    FAREWELL = 2
    """No further message will come."""


class Message(NamedTuple):
    """A header, and who sent it."""

    source: int
    kind: Kind
    step: int


class Inbox:
    """What some ranks send, in the order in which it arrives.

    A rank sends its next message once it has been answered: until then, its package stays as it is.

    Args:
        packages: Where the package of each rank goes.
        group: A gloo group of all ranks.
    """

    def __init__(self, packages: Mapping[int, Package], group: dist.ProcessGroup) -> None:
        self._group = group
        self._arrived: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._listen, args=(source, package), name=f"sparkdl-inbox-{source}", daemon=True)
            for source, package in packages.items()
        ]
        for thread in self._threads:
            thread.start()

    def take(self, timeout: timedelta, awaited: Callable[[], str]) -> Message:
        """The next message.

        Args:
            timeout: How long to wait for it.
            awaited: Says what is waited for, and from whom.

        Raises:
            TimeoutError: None came.
            RuntimeError: A rank is gone.
        """
        try:
            message = self._arrived.get(timeout=timeout.total_seconds())
        except queue.Empty:
            seconds = timeout.total_seconds()
            raise TimeoutError(
                f"Timed out waiting {seconds:g} s for {awaited()}. See what holds it up, or allow more with "
                "timeouts={'collective': ...}."
            ) from None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        """Wait until every rank has said farewell."""
        for thread in self._threads:
            thread.join()

    def _listen(self, source: int, package: Package) -> None:
        header = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                _receive(header, source, _HEADER, self._group, _PATIENCE)
                kind, step = header.tolist()
                if kind == Kind.FAREWELL:
                    return
                if kind == Kind.CONTENT:
                    _receive(package.data, source, _CONTENT, self._group, _PATIENCE)
                self._arrived.put(Message(source, Kind(kind), step))
        except Exception as error:
            error.add_note(f"Rank {source} was listened to.")
            self._arrived.put(error)


def send_message(kind: Kind, step: int, package: Package | None, to: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send a message to the inbox of a rank.

    Args:
        kind: What it says.
        step: A number that goes with it.
        package: Its content, for `Kind.CONTENT`.
        to: The rank.
        group: That of the inbox.

    Returns:
        What to wait for.
    """
    works = [_sent(torch.tensor([kind, step]), to, _HEADER, group)]
    if kind is Kind.CONTENT:
        assert package is not None
        works.append(_sent(package.data, to, _CONTENT, group))
    return works


def send_package(package: Package, to: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to send a package to a rank that waits for it."""
    return _sent(package.data, to, _PACKAGE, group)


def receive_package(package: Package, source: int, group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Wait for a package of a rank.

    Raises:
        RuntimeError: The rank is gone, or sent none in time.
    """
    _receive(package.data, source, _PACKAGE, group, timeout)


def _sent(data: Tensor, to: int, tag: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.isend(data, to, group=group, tag=tag)
    assert work is not None  # None is for ranks outside of the group
    return work


def _receive(data: Tensor, source: int, tag: int, group: dist.ProcessGroup, timeout: timedelta) -> None:
    work = dist.irecv(data, source, group=group, tag=tag)
    assert work is not None
    work.wait(timeout)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
