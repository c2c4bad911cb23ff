"""From a plan and Parquet to the batches of one rank: decode, shuffle in windows, gather, hand over ahead of need."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparkdl.batch import Batch
from sparkdl.config import Columns, Shuffle
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import Piece, ShardPlan, Window, plan_windows
from sparkdl.io.schema import decode

__all__ = ["RankData", "prefetched"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class RankData:
    """All that one rank reads, in every epoch.

    Attributes:
        plan: The steps of an epoch, over all shards.
        pieces: The rank's shards and what each consists of.
        validation: The rank's part of the validation rows.
        columns: What to read.
        window: Rows of one shard that are shuffled together at least.
        shuffle: How a shard is shuffled.
        seed: Seed of the order.
        widths: Values per row of each column, for batches without rows.
        threads: Reader threads.
        pin: Put batches into page-locked memory, from which a GPU reads asynchronously.
    """

    plan: ShardPlan
    pieces: Mapping[int, Sequence[Piece]]
    validation: Sequence[Piece]
    columns: Columns
    window: int
    shuffle: Shuffle
    seed: int
    widths: Mapping[str, int]
    threads: int = 1
    pin: bool = False

    @property
    def fields(self) -> list[str]:
        """Names of the columns in staged data."""
        return [column.field for column in self.columns]

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        windows = {
            shard: plan_windows(
                pieces, window=self.window, shuffle=self.shuffle, seed=self.seed, epoch=epoch, shard=shard
            )
            for shard, pieces in self.pieces.items()
        }
        # Windows are read in the order in which the steps need them: by their relative position in the shard.
        order = sorted(
            ((part.offset / self.plan.shard_rows[shard], shard, part) for shard in windows for part in windows[shard]),
            key=lambda entry: entry[:2],
        )
        pieces = [self.pieces[shard][number] for _, shard, part in order for number in part.pieces]
        with PlannedReader(
            pieces,
            columns=self.fields,
            decode=lambda table: decode(table, self.columns),
            threads=self.threads,
            ahead=2 * self.threads + 2,
        ) as reader:
            feeds = {shard: _ShardFeed(self.fields) for shard in self.pieces}
            coming = iter(order)
            for begin, end in self.plan.steps():
                parts: list[Tensors] = []
                for shard, feed in feeds.items():
                    rows = int(end[shard] - begin[shard])
                    while feed.rows < rows:
                        _, owner, window = next(coming)
                        feeds[owner].add(window, reader)
                    parts += feed.take(rows)
                yield self._batch(parts)

    def open_epoch(self, epoch: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The rank's slice of every step of an epoch, in order; empty batches where it has no rows in a step."""
        return prefetched(self._epoch(epoch), pin=self.pin)

    def open_validation(self, rows: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The rank's validation rows in file order, in batches of at most ``rows`` rows."""
        return prefetched(self._validation(rows), pin=self.pin)

    def _validation(self, rows: int) -> Iterator[Batch]:
        with PlannedReader(
            self.validation,
            columns=self.fields,
            decode=lambda table: decode(table, self.columns),
            threads=self.threads,
        ) as reader:
            for tensors in reader:
                yield from self._batch([tensors]).split(rows)

    def _batch(self, parts: Sequence[Tensors]) -> Batch:
        joined = {
            field: parts[0][field] if len(parts) == 1 else torch.cat([part[field] for part in parts])
            for field in (self.fields if parts else ())
        } or self._empty()
        weight = self.columns.weight
        return Batch(
            tuple(joined[column.field] for column in self.columns.inputs),
            tuple(joined[column.field] for column in self.columns.labels),
            joined[weight.field] if weight is not None else None,
        )

    def _empty(self) -> Tensors:
        return {
            column.field: torch.empty(
                (0,) if column.flat else (0, self.widths.get(column.field, 1)), dtype=getattr(torch, column.dtype)
            )
            for column in self.columns
        }


class _ShardFeed:
    """The rows of one shard in the order of the epoch, window by window.

    A window's rows are copied together once, into memory that is used again for the next window (fresh memory costs a
    page fault every 4 KiB); every batch gathers its rows from there.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self._memory: Tensors = {}
        self._parts: list[tuple[Tensors, torch.Tensor]] = []  # rows left of the windows so far, in order
        self.rows = 0

    def add(self, window: Window, reader: PlannedReader) -> None:
        """Take the next window's pieces from the reader."""
        pieces: list[Tensors] = [next(reader) for _ in window.pieces]
        rest = self._left()
        self._parts = [(rest, torch.arange(self.rows))] if self.rows else []
        order = torch.from_numpy(window.order())
        self._parts.append((self._joined(pieces, window.rows), order))
        self.rows += window.rows

    def take(self, rows: int) -> list[Tensors]:
        """The next ``rows`` rows, in one tensor per field and window that they come from."""
        taken = []
        while rows:
            tensors, order = self._parts[0]
            now, later = order[:rows], order[rows:]
            taken.append({field: tensors[field].index_select(0, now) for field in self._fields})
            self._parts[0] = (tensors, later)
            if not len(later):
                self._parts.pop(0)
            rows -= len(now)
            self.rows -= len(now)
        return taken

    def _left(self) -> Tensors:
        """Copy what is left of the window whose memory is about to be used again: less than one batch."""
        parts = [
            {field: tensors[field].index_select(0, order) for field in self._fields} for tensors, order in self._parts
        ]
        return {field: torch.cat([part[field] for part in parts]) for field in self._fields} if parts else {}

    def _joined(self, pieces: Sequence[Tensors], rows: int) -> Tensors:
        joined = {}
        for field in self._fields:
            first = pieces[0][field]
            memory = self._memory.get(field)
            if memory is None or len(memory) < rows:
                memory = self._memory[field] = torch.empty((rows, *first.shape[1:]), dtype=first.dtype)
            joined[field] = torch.cat([piece[field] for piece in pieces], out=memory[:rows])
        return joined


@contextlib.contextmanager
def prefetched(batches: Iterator[Batch], *, depth: int = 8, pin: bool = False) -> Iterator[Iterator[Batch]]:
    """Produce batches in a thread of their own, at most ``depth`` ahead of their use.

    Leaving the block stops the thread and closes ``batches`` in it. An error of the producer is raised by `next`.

    Args:
        batches: A generator of batches.
        depth: Batches that may wait.
        pin: Copy to page-locked memory, from which a GPU reads asynchronously.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            with contextlib.closing(batches):  # type: ignore[type-var]
                for batch in batches:
                    put(_pinned(batch) if pin else batch)
                    if stop.is_set():
                        return
            put(end)
        except BaseException as error:
            put(error)

    def consume() -> Iterator[Batch]:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=produce, name="sparkdl-prefetch", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()


def _pinned(batch: Batch) -> Batch:
    return Batch(
        tuple(tensor.pin_memory() for tensor in batch.inputs),
        tuple(tensor.pin_memory() for tensor in batch.labels),
        batch.weight.pin_memory() if batch.weight is not None else None,
    )
