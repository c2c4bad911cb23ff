"""The windows that an epoch will need: what must be read for them, where its rows go, and in which order they leave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sparkdl.io.feed import RowMemory, ShardFeed, WindowPool
from sparkdl.io.plan import Int64, Piece, Window

__all__ = ["Arena", "ComingWindow", "Item"]

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Arena:
    """All rows of one shard, kept for every epoch.

    Attributes:
        memory: Where they lie, in file order; shared with the other shards that were dealt at the same time.
        starts: Place of the first row of each piece.
        filled: Pieces that are there.
    """

    memory: RowMemory
    starts: Int64
    filled: set[int] = field(default_factory=set)

    def rows(self) -> Tensors:
        """The rows of the shard, by field."""
        part = slice(int(self.starts[0]), int(self.starts[-1]))
        return {name: tensor[part] for name, tensor in self.memory.prepare().items()}


@dataclass(frozen=True, slots=True)
class Item:
    """A piece that must be read, and where its rows go."""

    key: tuple[int, int]
    piece: Piece
    memory: RowMemory
    start: int

    @property
    def number(self) -> int:
        """Which of its shard's pieces it is."""
        return self.key[1]

    def rows(self) -> Tensors:
        """Where its rows lie."""
        part = slice(self.start, self.start + self.piece.rows)
        return {name: tensor[part] for name, tensor in self.memory.prepare().items()}


@dataclass(slots=True)
class ComingWindow:
    """A window of one shard that the epoch will need.

    Attributes:
        position: Relative place of its first row in the shard: windows are read in this order.
        shard: The shard.
        window: The window.
        skipped: Rows at its begin that were handed out in an earlier process.
        memory: Where its rows go.
        arena: Set where that is the shard's arena.
        pool: Set where that memory is to be used again.
        items: What must be read for it.
    """

    position: float
    shard: int
    window: Window
    skipped: int
    memory: RowMemory = field(init=False)
    arena: Arena | None = None
    pool: WindowPool | None = None
    items: list[Item] = field(default_factory=list)

    def find_items(self, pieces: Sequence[Piece]) -> None:
        """The pieces to read, in order."""
        start = 0
        for number in self.window.pieces:
            if self.arena is None or number not in self.arena.filled:
                place = start if self.arena is None else int(self.arena.starts[number])
                self.items.append(Item((self.shard, number), pieces[number], self.memory, place))
            start += pieces[number].rows

    def fill(self, reader: Iterator[None]) -> None:
        """Wait until all pieces are there."""
        for item in self.items:
            next(reader)
            if self.arena is not None:
                self.arena.filled.add(item.number)

    def add_to(self, feed: ShardFeed) -> None:
        """Hand the rows to their shard's feed."""
        tensors = self.memory.prepare()
        order = torch.from_numpy(self.order()).to(next(iter(tensors.values())).device)
        feed.add(tensors, order, self.release)

    def release(self) -> None:
        """Let go of the memory, unless it is kept."""
        if self.pool is not None:
            self.pool.give_back(self.memory.tensors)

    def order(self) -> Int64:
        """Places of the window's rows in its memory, in the order of the epoch; shape (rows - skipped,)."""
        places: Int64 | None = None
        if self.arena is not None:
            starts = self.arena.starts
            runs = [np.arange(starts[number], starts[number + 1]) for number in self.window.pieces]
            places = np.concatenate(runs) if len(runs) > 1 else runs[0]
        return self.window.order(places)[self.skipped :]
