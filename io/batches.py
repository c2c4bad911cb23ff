"""From a plan and Parquet to the batches of one rank: read, shuffle, gather, hand over ahead of need."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from sparkdl.batch import Batch
from sparkdl.config import Columns, Shuffle
from sparkdl.errors import ConfigError
from sparkdl.io.cache import Allocate, Cache, CachePlan
from sparkdl.io.decode import Decoder, Layout
from sparkdl.io.feed import RowMemory, ShardFeed, Standardise, Taken, WindowPool, gather, row_nbytes
from sparkdl.io.petastorm import PlannedReader, select_piece
from sparkdl.io.plan import Piece, ShardPlan, plan_windows, shards_of
from sparkdl.io.reshuffle import reshuffle
from sparkdl.io.windows import Arena, ComingWindow

__all__ = ["RankData", "Reading", "prefetched"]

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
_GROUP_STEPS, _GROUP_BYTES = 16, 2 << 20  # batches that are gathered at once, and their size
_SMALL_BATCH_BYTES = 512 << 10  # gathered in 0.1 ms, about as long as it takes to wake a thread


@dataclass(frozen=True, slots=True)
class Reading:
    """How row groups are read.

    Attributes:
        columns: Names of the Parquet columns.
        select: Takes the rows of a piece out of the table of its row group.
        dictionaries: Columns read as dictionaries.
        storage_options: For the file system.
        threads: Reader threads.
        timeout: How long to wait for one row group.
        validation: How validation rows are read, where it is not in the same way.
    """

    columns: Sequence[str]
    select: Callable[[pa.Table, Piece], pa.Table] = select_piece
    dictionaries: Sequence[str] = ()
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    threads: int = 1
    timeout: timedelta = timedelta(minutes=10)
    validation: "Reading | None" = None

    def open(
        self,
        pieces: Sequence[Piece],
        decode: Callable[[pa.Table, int], Any],
        *,
        recall: Callable[[int], bool] | None = None,
    ) -> PlannedReader:
        """A reader of pieces; see `PlannedReader`."""
        return PlannedReader(
            pieces,
            columns=self.columns,
            decode=decode,
            select=self.select,
            recall=recall,
            threads=self.threads,
            ahead=2 * self.threads + 2,
            read_timeout=self.timeout,
            storage_options=self.storage_options,
            dictionaries=self.dictionaries,
        )


@dataclass(slots=True)
class RankData:
    """All that one rank reads, in every epoch.

    Attributes:
        plan: The steps of an epoch, over all shards.
        pieces: What each shard consists of: at least those dealt to this rank.
        validation: The rank's part of the validation rows.
        decoder: From Arrow to tensors.
        layout: What the decoder gives, and so the shapes of batches without rows.
        reading: How row groups are read.
        window: Rows of one shard that are shuffled together at least.
        shuffle: How a shard is shuffled.
        seed: Seed of the order.
        shards: The shards dealt to this rank; all in ``pieces`` if None.
        cache: Keeps decoded rows for later epochs.
        standardise: Applied to the values of each field, before they are kept.
        reshuffle_interval: Epochs after which all rows are permuted over all shards, with the other ranks.
        pin: Put batches into page-locked memory, from which a GPU reads asynchronously.
        fingerprint: Of the plan and all that decides the order; goes into the state.
        whole: Reads the validation rows, where these are read with further columns.
    """

    plan: ShardPlan
    pieces: Mapping[int, Sequence[Piece]]
    validation: Sequence[Piece]
    decoder: Decoder
    layout: Layout
    reading: Reading
    window: int
    shuffle: Shuffle
    seed: int
    shards: Sequence[int] | None = None
    cache: Cache = field(default_factory=lambda: Cache(CachePlan((), False, "nothing")))
    standardise: Standardise = field(default_factory=dict)
    reshuffle_interval: int | None = None
    pin: bool = False
    fingerprint: str = ""
    whole: "RankData | None" = None
    _arenas: dict[int, Arena] = field(default_factory=dict, init=False, repr=False)
    _position: tuple[int, int] = field(default=(0, 0), init=False)
    _reshuffled: int = field(default=0, init=False)
    _pool: WindowPool | None = field(default=None, init=False, repr=False)

    @property
    def columns(self) -> Columns:
        """What is read, by role."""
        return self.decoder.columns

    @property
    def dealt(self) -> tuple[int, ...]:
        """The shards that this rank reads."""
        return tuple(self.pieces) if self.shards is None else tuple(self.shards)

    @property
    def rows(self) -> int:
        """Rows that this rank reads in an epoch."""
        return sum(self.plan.shard_rows[shard] for shard in self.dealt)

    # ---- state -------------------------------------------------------------------------------------------------------
    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step of the batch that comes next."""
        return self._position

    def state_dict(self) -> dict[str, Any]:
        """Where in the data this rank is; equal on all ranks that took the same steps."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batches that were handed out when ``state`` was taken, on as many ranks as there are now.

        Raises:
            ConfigError: The state belongs to other data, or to another plan for them.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"The reader's state belongs to plan {state['fingerprint']}, but this run has plan {self.fingerprint}. "
                "Files, numShards, batchSize, seed and shuffle must be what they were; only the number of ranks may "
                "change."
            )
        self._position = (int(state["epoch"]), int(state["step"]))

    def deal(self, shards: Sequence[int]) -> None:
        """Read these shards from the next epoch on. What is kept of others is let go."""
        self.shards = tuple(shards)
        before = {id(arena.memory): arena.memory for arena in self._arenas.values()}
        self._arenas = {shard: arena for shard, arena in self._arenas.items() if shard in self.shards}
        after = {id(arena.memory) for arena in self._arenas.values()}
        for memory in [memory for key, memory in before.items() if key not in after]:
            self.cache.release(memory.rows * row_nbytes(self.layout))

    # ---- training rows -----------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def open_epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        """The rank's slice of the steps of an epoch, in order; empty batches where it has no rows in a step.

        Begins with step 0, or where `load_state_dict` said.
        """
        first = self._position[1] if self._position[0] == epoch else 0
        self._reshuffle(epoch)

        def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
            last = self.plan.num_steps - 1
            for step, batch in enumerate(batches, first):
                self._position = (epoch, step + 1) if step < last else (epoch + 1, 0)
                yield batch

        coming = self._coming(epoch, first)
        produced = self._epoch(epoch, first, coming)
        at_hand = self.cache.is_host_memory and not self.pin and not any(window.items for window in coming)
        small = self._batch_bytes() <= _SMALL_BATCH_BYTES
        with contextlib.closing(produced) if at_hand and small else prefetched(produced, depth=2) as groups:
            yield counted(itertools.chain.from_iterable(groups))

    def _epoch(self, epoch: int, first: int, coming: Sequence[ComingWindow]) -> Generator[list[Batch], None, None]:
        """The batches of an epoch, some at a time: gathered and handed over at once, small ones cost less."""
        dealt, group_steps = self.dealt, self._group_steps()
        feeds = {shard: ShardFeed() for shard in dealt}
        group = _Group()
        largest = max((window.window.rows for window in coming if window.pool is not None), default=0)
        crowded = largest > 2 * group_steps * self.plan.batch_size  # memory that the next window can use, for a copy
        with contextlib.ExitStack() as stack:
            for window in coming:  # however the epoch ends, its memory serves the next one
                stack.callback(window.release)
            reader = stack.enter_context(self._open_windows(coming, epoch))
            windows = iter(coming)
            for counts in self.plan.counts(dealt, first):
                if crowded and any(0 < feed.rows < rows for feed, rows in zip(feeds.values(), counts, strict=True)):
                    yield self._gathered(group)  # before what waits in their windows is copied out
                    group = _Group()
                try:
                    for feed, rows in zip(feeds.values(), counts, strict=True):
                        if crowded and 0 < feed.rows < rows:
                            feed.settle()
                        while feed.rows < rows:
                            window = next(windows)
                            window.fill(reader)
                            window.add_to(feeds[window.shard])
                except BaseException:
                    yield self._gathered(group)  # what came before the error
                    raise
                for feed, rows in zip(feeds.values(), counts, strict=True):
                    feed.take(rows, group.taken, group.finished)
                group.sizes.append(sum(counts))
                if len(group.sizes) == group_steps:
                    yield self._gathered(group)
                    group = _Group()
            yield self._gathered(group)

    def _gathered(self, group: "_Group") -> list[Batch]:
        batches = self._batches(gather(group.taken, self.layout), group.sizes)
        for done in group.finished:
            done()
        return batches

    def _open_windows(
        self, coming: Sequence[ComingWindow], epoch: int
    ) -> contextlib.AbstractContextManager[Iterator[None]]:
        """A reader that brings the rows of windows to their places, one piece at a time."""
        items = [item for window in coming for item in window.items]
        store = self.cache.store
        if not items:
            return contextlib.nullcontext(iter(()))

        def place(table: pa.Table, number: int) -> None:
            item = items[number]
            item.memory.write(item.start, self.decoder(table, item.piece, epoch))
            self.decoder.check(table, item.rows())
            if store is not None:
                store.put(item.key, item.rows())

        def recall(number: int) -> bool:
            item = items[number]
            assert store is not None
            with store.use(item.key) as found:
                if found is None:
                    return False
                for name, rows in item.rows().items():
                    rows.copy_(found[name])
            return True

        return self.reading.open([item.piece for item in items], place, recall=None if store is None else recall)

    def _group_steps(self) -> int:
        """Batches that are gathered at once."""
        return max(1, min(_GROUP_STEPS, _GROUP_BYTES // (self._batch_bytes() or 1)))

    def _batch_bytes(self) -> int:
        """Size of this rank's part of a batch."""
        share = max(1, self.plan.batch_size * len(self.dealt) // len(self.plan.shard_rows))
        return share * row_nbytes(self.layout)

    def _coming(self, epoch: int, first: int) -> list[ComingWindow]:
        """The windows of all dealt shards that steps from ``first`` on need, in the order in which they need them."""
        begin = self.plan.bounds(first, first)[0]
        found = []
        for shard in self.dealt:
            pieces, rows = self.pieces[shard], self.plan.shard_rows[shard]
            windows = plan_windows(
                pieces, window=self.window, shuffle=self.shuffle, seed=self.seed, epoch=epoch, shard=shard
            )
            for window in windows:
                skipped = max(0, int(begin[shard]) - window.offset)
                if skipped < window.rows:
                    found.append(ComingWindow(window.offset / rows, shard, window, skipped))
        found.sort(key=lambda one: (one.position, one.shard))
        if self._pool is None:
            largest = max((piece.rows for own in self.pieces.values() for piece in own), default=0)
            self._pool = WindowPool(self.layout, min(self.window + largest, max(self.plan.shard_rows)))
        names = {column.field: column.name for column in self.columns}
        self._keep_shards(names)
        for one in found:
            arena = self._arenas.get(one.shard)
            if arena is None:
                one.memory = RowMemory(one.window.rows, self.layout, self._pool.allocate, names, self.standardise)
                one.pool = self._pool
            else:
                one.memory, one.arena = arena.memory, arena
            one.find_items(self.pieces[one.shard])
        return found

    def _keep_shards(self, names: Mapping[str, str]) -> None:
        """Reserve memory for all rows of the dealt shards, where the cache has room for them."""
        missing = [shard for shard in self.dealt if shard not in self._arenas]
        rows = sum(self.plan.shard_rows[shard] for shard in missing)
        memory: RowMemory | None = None
        while missing and memory is None:
            allocate = self.cache.reserve(rows * row_nbytes(self.layout))
            if allocate is None:
                if self.shuffle == "full":
                    raise ConfigError(
                        f"shuffle='full' needs all rows of a shard at once, but the "
                        f"{rows * row_nbytes(self.layout) / 2**20:.1f} MiB of this rank's shards do not fit into the "
                        f"cache ({self.cache.plan.reason}). Use shuffle='window', cache='disk' or a larger cacheBytes."
                    )
                return
            kept = partial(_allocate_field, allocate, self.layout)
            memory = RowMemory(rows, self.layout, kept, names, self.standardise)
            try:
                memory.prepare()
            except (MemoryError, OSError, RuntimeError) as error:
                self.cache.shrink(error)
                memory = None
        start = 0
        for shard in missing:
            assert memory is not None
            starts = np.cumsum([start] + [piece.rows for piece in self.pieces[shard]])
            self._arenas[shard] = Arena(memory, starts)
            start = int(starts[-1])

    # ---- between ranks -----------------------------------------------------------------------------------------------
    def _reshuffle(self, epoch: int) -> None:
        """Exchange rows with the other ranks as often as it is due by ``epoch``; every rank calls it."""
        if self.reshuffle_interval is None:
            return
        ranks = dist.get_world_size()
        owned = [shards_of(rank, ranks, len(self.plan.shard_rows)) for rank in range(ranks)]
        for due in range(self._reshuffled + self.reshuffle_interval, epoch + 1, self.reshuffle_interval):
            shards = self._whole_shards()
            for shard, rows in reshuffle(shards, self.plan.shard_rows, owned, seed=self.seed, epoch=due).items():
                for name, tensor in shards[shard].items():
                    tensor.copy_(rows[name])
            self._reshuffled = due

    def _whole_shards(self) -> dict[int, Tensors]:
        """All rows of the dealt shards, where they lie in the cache.

        Raises:
            ConfigError: The cache has no room for them.
        """
        coming = self._coming(0, 0)
        if len(self._arenas) < len(self.dealt):
            raise ConfigError(
                f"reshuffleInterval={self.reshuffle_interval} needs all of this rank's rows in the cache, which has no "
                f"room for them ({self.cache.plan.reason}). Use cache='disk', a larger cacheBytes, or no reshuffling."
            )
        with self._open_windows(coming, 0) as reader:
            for window in coming:
                window.fill(reader)
        return {shard: self._arenas[shard].rows() for shard in self.dealt}

    # ---- validation rows ---------------------------------------------------------------------------------------------
    def open_validation(self, rows: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The rank's validation rows in file order, in batches of at most ``rows`` rows."""
        return prefetched((self.whole or self)._validation(rows))

    def _validation(self, rows: int) -> Iterator[Batch]:
        names = {column.field: column.name for column in self.columns}

        def place(table: pa.Table, number: int) -> Tensors:
            pool = WindowPool(self.layout, 0)
            memory = RowMemory(table.num_rows, self.layout, pool.allocate, names, self.standardise)
            memory.write(0, self.decoder(table, self.validation[number]))
            self.decoder.check(table, memory.tensors)
            return memory.tensors

        reading = replace(self.reading.validation or self.reading, threads=self.reading.threads)
        with reading.open(self.validation, place) as reader:
            for tensors in reader:
                total = len(next(iter(tensors.values())))
                parts = -(-total // rows)
                yield from self._batches(tensors, [(n + 1) * total // parts - n * total // parts for n in range(parts)])

    def _batches(self, tensors: Tensors, counts: Sequence[int]) -> list[Batch]:
        """Cut rows into batches of the given sizes."""
        if self.pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        columns = self.columns
        cut = {name: tensor.split(counts) for name, tensor in tensors.items()}
        inputs, labels = (
            zip(*(cut[column.field] for column in own), strict=True) if own else [()] * len(counts)
            for own in (columns.inputs, columns.labels)
        )
        weights: Sequence[torch.Tensor | None] = [None] * len(counts)
        if columns.weight is not None:
            weights = cut[columns.weight.field]
        return [Batch(*parts) for parts in zip(inputs, labels, weights, strict=True)]


def _allocate_field(allocate: Allocate, layout: Layout, name: str, rows: int) -> torch.Tensor:
    dtype, shape = layout[name]
    return allocate((rows, *shape), getattr(torch, dtype))


@dataclass(slots=True)
class _Group:
    """Batches that are gathered at once.

    Attributes:
        sizes: Rows of each batch.
        taken: Where the rows lie, batch after batch.
        finished: What to call when they were gathered.
    """

    sizes: list[int] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    finished: list[Callable[[], None]] = field(default_factory=list)


@contextlib.contextmanager
def prefetched(items: Iterator[T], *, depth: int = 8) -> Iterator[Iterator[T]]:
    """Produce items in a thread of their own, at most ``depth`` ahead of their use.

    Leaving the block stops the thread and closes ``items`` in it. An error of the producer is raised by `next`.

    Args:
        items: A generator.
        depth: Items that may wait.
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
            with contextlib.closing(items):  # type: ignore[type-var]
                for item in items:
                    put(item)
                    if stop.is_set():
                        return
            put(end)
        except BaseException as error:
            put(error)

    def consume() -> Iterator[T]:
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
