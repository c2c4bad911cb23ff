"""Who reads which rows, and when: a pure function of numbers.

Nothing here opens a file or knows a rank. Row groups are cut into shards, the rows of all shards are interleaved into
one sequence, and the sequence is cut into steps. A rank obeys the plan for the shards it was dealt; the rows of a step
are therefore the same whatever the number of ranks.

Interleaving: row i of a shard of n rows has the key (2i + 1) / 2n, its relative position in the shard. Rows are taken
in the order of their keys, ties by shard, so every stretch of the sequence holds the shards in proportion to their
sizes. (This is the Webster/Sainte-Laguë apportionment, taken one seat at a time.)
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparkdl.config import Shuffle
from sparkdl.errors import ConfigError

__all__ = [
    "Piece",
    "RowGroup",
    "ShardPlan",
    "Window",
    "batch_row_ids",
    "plan_deal",
    "plan_pieces",
    "plan_windows",
    "shards_of",
]

Int64 = npt.NDArray[np.int64]
_BLOCK = 4096  # steps whose bounds are computed at once


@dataclass(frozen=True, slots=True, order=True)
class RowGroup:
    """One row group of one Parquet file."""

    path: str
    """File that holds it."""

    index: int
    """Its position in the file."""

    rows: int
    """Rows in it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start`` to ``stop`` of a row group."""

    row_group: RowGroup
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows in the piece."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Window:
    """Pieces whose rows are shuffled together.

    Attributes:
        offset: Rows of the shard that come before this window in the epoch.
        pieces: Indices into the shard's pieces, in reading order.
        rows: Rows of all pieces.
        seed: Entropy of the permutation; None keeps the order.
    """

    offset: int
    pieces: tuple[int, ...]
    rows: int
    seed: tuple[int, ...] | None

    def order(self, places: Int64 | None = None) -> Int64:
        """Where the window's rows lie, in the order in which the epoch takes them.

        Args:
            places: Where they lie in reading order, shape (rows,); shuffled in place. None: 0, 1, 2, ...
        """
        if places is None:
            places = np.arange(self.rows)
        if self.seed is not None:
            _generator(*self.seed).shuffle(places)
        return places


def plan_pieces(row_groups: Sequence[RowGroup], num_shards: int) -> tuple[tuple[Piece, ...], ...]:
    """Cut row groups, in the order given, into shards whose sizes differ by at most one row.

    A row group that crosses a cut appears in both shards, each with its part.

    Args:
        row_groups: All row groups, sorted by path; empty ones are skipped.
        num_shards: Shards to make; more shards than rows leaves some empty.

    Returns:
        The pieces of each shard, in file order.
    """
    starts = np.concatenate([[0], np.cumsum([group.rows for group in row_groups], dtype=np.int64)])
    total = int(starts[-1])
    cuts = [shard * total // num_shards for shard in range(num_shards + 1)]
    shards = []
    for low, high in itertools.pairwise(cuts):
        pieces = []
        first = int(np.searchsorted(starts, low, side="right")) - 1
        for number in range(first, len(row_groups)):
            begin = int(starts[number])
            if begin >= high:
                break
            start, stop = max(low - begin, 0), min(high - begin, row_groups[number].rows)
            if stop > start:
                pieces.append(Piece(row_groups[number], start, stop))
        shards.append(tuple(pieces))
    return tuple(shards)


def plan_windows(
    pieces: Sequence[Piece],
    *,
    window: int,
    shuffle: Shuffle,
    seed: int,
    epoch: int,
    shard: int,
) -> tuple[Window, ...]:
    """The order of one shard in one epoch, a function of (seed, epoch, shard) alone.

    With ``"window"`` the pieces are permuted, then grouped in that order into windows of at least ``window`` rows;
    inside a window the rows are permuted. With ``"full"`` the whole shard is one window. With ``"none"`` every piece
    is a window of its own, in file order and unpermuted.

    Args:
        pieces: The shard's pieces.
        window: Rows that are shuffled together at least (a row group is never torn apart for it).
        shuffle: ``"window"``, ``"full"`` or ``"none"``.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shard: Number of the shard.

    Returns:
        The windows of the epoch, in reading order; their rows sum up to the shard's.
    """
    shuffled = shuffle != "none"
    order = np.arange(len(pieces))
    if shuffle == "window":
        order = _generator(seed, epoch, shard, 0).permutation(len(pieces))
    window = {"window": window, "full": sum(piece.rows for piece in pieces), "none": 1}[shuffle]
    windows: list[Window] = []
    group: list[int] = []
    offset = rows = 0
    for number in order.tolist():
        group.append(number)
        rows += pieces[number].rows
        if rows >= window:
            entropy = (seed, epoch, shard, 1 + len(windows)) if shuffled else None
            windows.append(Window(offset, tuple(group), rows, entropy))
            group, offset, rows = [], offset + rows, 0
    if group:
        entropy = (seed, epoch, shard, 1 + len(windows)) if shuffled else None
        windows.append(Window(offset, tuple(group), rows, entropy))
    return tuple(windows)


def shards_of(rank: int, world_size: int, num_shards: int) -> range:
    """Shards dealt to a rank: those with ``shard % world_size == rank``."""
    return range(rank, num_shards, world_size)


def plan_deal(seconds_per_row: Sequence[float], shard_rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Deal whole shards to ranks of different speed, so that the slowest rank is done as early as can be.

    The longest-processing-time rule for related machines (Graham 1969; Gonzalez, Ibarra and Sahni 1977): the largest
    shard first, each to the rank that would finish it first. What a rank was dealt decides only who computes, never
    what is in a batch.

    Args:
        seconds_per_row: Of each rank, measured.
        shard_rows: Rows of each shard.

    Returns:
        The shards of each rank, ascending. A very slow rank may get none.
    """
    rows = [0] * len(seconds_per_row)
    dealt: list[list[int]] = [[] for _ in seconds_per_row]
    for shard in sorted(range(len(shard_rows)), key=lambda number: (-shard_rows[number], number)):
        rank = min(range(len(rows)), key=lambda one: ((rows[one] + shard_rows[shard]) * seconds_per_row[one], one))
        rows[rank] += shard_rows[shard]
        dealt[rank].append(shard)
    return tuple(tuple(sorted(shards)) for shards in dealt)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How the rows of one epoch fall into steps.

    Attributes:
        shard_rows: Rows of each shard.
        batch_size: Rows per step at most, over all shards.

    Raises:
        ConfigError: ``batch_size`` is smaller than the number of shards.
    """

    shard_rows: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < len(self.shard_rows):
            raise ConfigError(
                f"batchSize={self.batch_size} cannot be dealt to numShards={len(self.shard_rows)} shards: every shard "
                f"takes part in a batch. Use batchSize >= {len(self.shard_rows)}, or fewer shards."
            )

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return sum(self.shard_rows)

    @property
    def num_steps(self) -> int:
        """Steps of the epoch: the fewest that keep every batch within ``batch_size``."""
        return -(-self.num_rows // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows of all shards in step ``step``; two steps differ by at most one row."""
        return (step + 1) * self.num_rows // self.num_steps - step * self.num_rows // self.num_steps

    def bounds(self, start: int, stop: int) -> Int64:
        """Where steps ``start`` to ``stop`` begin and end in each shard.

        Returns:
            Array of shape (stop - start + 1, shards). Step ``start + k`` takes rows ``bounds[k, s]`` to
            ``bounds[k + 1, s]`` of shard s, counted in the shard's order of the epoch.
        """
        return _bounds(self, start, stop).copy()

    def steps(self) -> Iterator[Int64]:
        """The bounds of every step in turn: arrays of shape (2, shards)."""
        for start in range(0, self.num_steps, _BLOCK):
            bounds = _bounds(self, start, min(start + _BLOCK, self.num_steps))
            for step in range(len(bounds) - 1):
                yield bounds[step : step + 2]

    def counts(self, shards: Sequence[int], first: int = 0) -> Iterator[list[int]]:
        """How many rows each step from ``first`` on takes from each of ``shards``."""
        for start in range(first - first % _BLOCK, self.num_steps, _BLOCK):
            bounds = _bounds(self, start, min(start + _BLOCK, self.num_steps))[max(0, first - start) :, list(shards)]
            yield from np.diff(bounds, axis=0).tolist()

    def fingerprint(self, **settings: object) -> str:
        """Digest of the plan and of the settings that decide the order; equal on all ranks or none may start."""
        facts = {"rows": self.shard_rows, "batch_size": self.batch_size, **settings}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=16)  # the same in every epoch
def _bounds(plan: ShardPlan, start: int, stop: int) -> Int64:
    # Python integers: step * rows may pass 2**63.
    positions = [step * plan.num_rows // max(plan.num_steps, 1) for step in range(start, stop + 1)]
    return _rows_before(np.array(positions, np.int64), np.array(plan.shard_rows, np.int64))


def batch_row_ids(
    row_groups: Sequence[RowGroup],
    plan: ShardPlan,
    *,
    window: int,
    shuffle: Shuffle,
    seed: int,
    epoch: int,
) -> Iterator[Int64]:
    """The plan spelt out: for each step of an epoch the ids of its rows, shard after shard.

    The id of a row is its position in the data, row groups in the order given. Holds one epoch's ids in memory; for
    looking at a plan and for checking one.
    """
    starts: Mapping[RowGroup, int] = dict(
        zip(row_groups, np.cumsum([0] + [group.rows for group in row_groups]).tolist(), strict=False)
    )
    order = []
    for shard, pieces in enumerate(plan_pieces(row_groups, len(plan.shard_rows))):
        ids = [np.arange(piece.start, piece.stop) + starts[piece.row_group] for piece in pieces]
        parts = [
            np.concatenate([ids[number] for number in part.pieces])[part.order()]
            for part in plan_windows(pieces, window=window, shuffle=shuffle, seed=seed, epoch=epoch, shard=shard)
        ]
        order.append(np.concatenate([np.empty(0, np.int64), *parts]))
    for begin, end in plan.steps():
        yield np.concatenate([ids[low:high] for ids, low, high in zip(order, begin, end, strict=True)])


def _generator(seed: int, *stream: int) -> np.random.Generator:
    # As spawn key the numbers of the stream are kept apart from the seed, whatever its size; as entropy they are not.
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=stream)))


def _rows_before(positions: Int64, shard_rows: Int64) -> Int64:
    """How many rows of each shard are among the first ``positions[k]`` of the interleaved sequence.

    The key of the position-th row is found by bisection over the bit patterns of the doubles between 0 and 1 (positive
    doubles sort like their bits), so that ties are exact ties.

    Returns:
        Array of shape (positions, shards) whose rows sum up to ``positions``.
    """
    low = np.zeros(len(positions), np.int64)  # as bits: at most positions rows have a key <= low
    high = np.full(len(positions), np.float64(1).view(np.int64))
    while True:
        middle = (low + high) // 2
        if (middle == low).all():
            break
        enough = _rows_up_to(middle, shard_rows).sum(1) >= positions
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    sure = _rows_up_to(low, shard_rows)
    tied = _rows_up_to(high, shard_rows) - sure  # shape (positions, shards), 0 or 1 each
    room = (positions - sure.sum(1))[:, None]
    return sure + np.where(np.cumsum(tied, 1) <= room, tied, 0)


def _rows_up_to(key_bits: Int64, shard_rows: Int64) -> Int64:
    """Rows of each shard whose key is at most the given one; shape (keys, shards)."""
    key = key_bits.view(np.float64)[:, None]
    rows = np.maximum(shard_rows, 1)[None, :]
    count = np.minimum((key * rows + 0.5).astype(np.int64), shard_rows)
    # The product is rounded: compare with the keys themselves, as doubles, one row up and one row down.
    count = count + ((count < shard_rows) & ((2 * count + 1) / (2 * rows) <= key))
    down: Int64 = count - ((count > 0) & ((2 * count - 1) / (2 * rows) > key))
    return down
