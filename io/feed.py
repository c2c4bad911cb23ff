"""Rows in memory: filled piece by piece by the reader threads, gathered into batches by the thread that makes them."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparkdl.errors import DataError
from sparkdl.io.convert import SparseRows
from sparkdl.io.decode import Layout, Values

__all__ = ["RowMemory", "ShardFeed", "Standardise", "Taken", "WindowPool", "gather", "row_nbytes"]

Tensors = dict[str, Tensor]
_TURNED_BYTES = 3 << 20  # turned at once
_thread = threading.local()
Allocate = Callable[[str, int], Tensor]
"""From the name of a field and a number of rows to an uninitialised tensor of its layout."""

Standardise = Mapping[str, tuple[Tensor, Tensor]]
"""By field: what is subtracted from its values, and what they are then multiplied with, each of shape (values,)."""


def row_nbytes(layout: Layout) -> int:
    """Bytes that one row takes in memory."""
    return sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in layout.values())


@dataclass(slots=True)
class RowMemory:
    """The rows of a window, or of a whole shard, one tensor per field.

    Attributes:
        rows: How many rows there is room for.
        layout: Of each field.
        allocate: Gives the memory, on the first write.
        names: The user's names of the fields, for messages.
        standardise: Applied to what is written.
        tensors: The fields, each of shape (at least ``rows``, ...); empty before the first write.
    """

    rows: int
    layout: Layout
    allocate: Allocate
    names: Mapping[str, str]
    standardise: Standardise = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self) -> Tensors:
        """Allocate, unless that was done before.

        Raises:
            MemoryError: There is no room; likewise OSError and RuntimeError, depending on the kind of memory.
        """
        with self._lock:
            if not self.tensors:
                self.tensors = {name: self.allocate(name, self.rows) for name in self.layout}
        return self.tensors

    def write(self, start: int, values: Values) -> None:
        """Copy decoded rows to their place: the only copy between the decoded pages and the batches.

        Raises:
            DataError: The rows have another shape or type than those before.
        """
        tensors = self.prepare()
        for name, value in values.items():
            parts = value if isinstance(value, tuple) else (value,)
            place = tensors[name][start : start + len(parts[0])]
            self._check(name, value)
            if isinstance(value, SparseRows):
                value.write(place)
            elif isinstance(value, tuple):
                _write_side_by_side(value, place)
            else:
                place.copy_(value)
            if name in self.standardise:
                mean, scale = self.standardise[name]
                place.sub_(mean).mul_(scale)

    def _check(self, name: str, value: Tensor | SparseRows | tuple[Tensor, ...]) -> None:
        dtype, expected = self.layout[name]
        found = (len(value),) if isinstance(value, tuple) else tuple(value.shape[1:])
        kind = dtype if isinstance(value, tuple) else str(value.dtype).removeprefix("torch.")
        if (found, kind) != (tuple(expected), dtype):
            raise DataError(
                f"{self.names[name]!r} has shape {tuple(expected)} of {dtype} in the first rows, but {found} of {kind} "
                "in others. Every row needs the same: check the transform, or pad or cut the column before fit."
            )


def _write_side_by_side(columns: Sequence[Tensor], out: Tensor) -> None:
    """Write columns of shape (rows,) to ``out``, of shape (rows, columns).

    They are put one below the other and the matrix is turned: torch copies turned matrices block by block, which takes
    half the time of ``torch.stack(columns, 1)``, and without the GIL. The memory is used again, see `WindowPool`.
    """
    block = max(1, _TURNED_BYTES // (len(columns) * out.itemsize))
    size = len(columns) * min(block, len(out))
    flat: Tensor | None = getattr(_thread, "flat", None)
    if flat is None or flat.dtype != out.dtype or len(flat) < size:
        flat = _thread.flat = torch.empty(size, dtype=out.dtype)
    for start in range(0, len(out), block):
        part = out[start : start + block]
        below = flat[: part.numel()].view(len(columns), len(part))
        torch.stack([column[start : start + block] for column in columns], 0, out=below)
        part.copy_(below.t())


class WindowPool:
    """Memory of windows that are done, for those to come: fresh memory costs a page fault every 4 KiB.

    Args:
        layout: Of each field.
        rows: Rows of the largest window.
    """

    def __init__(self, layout: Layout, rows: int) -> None:
        self._layout = layout
        self._rows = rows
        self._free: dict[str, list[Tensor]] = {name: [] for name in layout}
        self._lock = threading.Lock()

    def allocate(self, name: str, rows: int) -> Tensor:
        """Memory for ``rows`` rows of a field, or more."""
        with self._lock:
            if self._free[name]:
                return self._free[name].pop()
        dtype, shape = self._layout[name]
        return torch.empty((max(rows, self._rows), *shape), dtype=getattr(torch, dtype))

    def give_back(self, tensors: Tensors) -> None:
        """Take memory that nobody reads any more."""
        with self._lock:
            for name, tensor in tensors.items():
                self._free[name].append(tensor)
            tensors.clear()


@dataclass(slots=True)
class _Part:
    """Rows that wait to be taken, in order.

    Attributes:
        tensors: Where they lie.
        order: Their places there, shape (rows,).
        rows: How many they are.
        taken: How many were taken.
        done: Called when all were.
    """

    tensors: Tensors
    order: Tensor
    rows: int
    done: Callable[[], None] | None
    taken: int = 0


@dataclass(slots=True)
class Taken:
    """Rows that were taken and are yet to be gathered.

    Attributes:
        tensors: Where they lie, by field.
        order: Places there; theirs are those from ``start`` to ``stop``.
        start: See ``order``.
        stop: See ``order``.
    """

    tensors: Tensors
    order: Tensor
    start: int
    stop: int

    @property
    def places(self) -> Tensor:
        """Their places, shape (rows,)."""
        return self.order[self.start : self.stop]


class ShardFeed:
    """The rows of one shard in the order of the epoch, window by window."""

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque()
        self.rows = 0

    def add(self, tensors: Tensors, order: Tensor, done: Callable[[], None] | None = None) -> None:
        """Append rows: ``order`` are their places in ``tensors``, ``done`` is called when all were gathered."""
        rows = order.shape[0]
        self._parts.append(_Part(tensors, order, rows, done))
        self.rows += rows

    def settle(self) -> None:
        """Copy out the rows that wait, so that their windows can be filled again; nobody may still gather from these.

        Only what fills less than half of its memory is copied.
        """
        for part in self._parts:
            left = part.order[part.taken :]
            if part.done is None or 2 * len(left) > len(next(iter(part.tensors.values()))):
                continue
            part.tensors = {name: tensor.index_select(0, left) for name, tensor in part.tensors.items()}
            part.order, part.rows, part.taken = torch.arange(len(left)), len(left), 0
            part.done()
            part.done = None

    def take(self, rows: int, taken: list[Taken], finished: list[Callable[[], None]]) -> None:
        """Append to ``taken`` where the next rows lie, and to ``finished`` what to call when they were gathered.

        What follows the rows that were taken last is added to those: of one shard, whole groups of batches are one.
        """
        self.rows -= rows
        while rows:
            part = self._parts[0]
            count = min(rows, part.rows - part.taken)
            if taken and taken[-1].order is part.order and taken[-1].stop == part.taken:
                taken[-1].stop += count
            else:
                taken.append(Taken(part.tensors, part.order, part.taken, part.taken + count))
            part.taken += count
            rows -= count
            if part.taken == part.rows:
                if part.done is not None:
                    finished.append(part.done)
                self._parts.popleft()


def gather(taken: Sequence[Taken], layout: Layout) -> Tensors:
    """One tensor per field of the rows at the given places, in this order, shape (rows, ...)."""
    if not taken:
        return {name: torch.empty((0, *shape), dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()}
    first = taken[0].tensors
    if all(one.tensors is first for one in taken):
        places = taken[0].places if len(taken) == 1 else torch.cat([one.places for one in taken])
        return {name: tensor.index_select(0, places) for name, tensor in first.items()}
    total = sum(one.stop - one.start for one in taken)
    found = {name: tensor.new_empty((total, *tensor.shape[1:])) for name, tensor in first.items()}
    at = 0
    for one in taken:
        places, end = one.places, at + one.stop - one.start
        for name, out in found.items():
            torch.index_select(one.tensors[name], 0, places, out=out[at:end])
        at = end
    return found
