"""Batches of a rank: every row once, in the order that the plan says, whatever the ranks, shards and threads."""

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkdl.batch import Batch
from sparkdl.config import CacheTier, Column, Columns, Shuffle
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.batches import RankData, Reading, prefetched
from sparkdl.io.cache import Cache, CachePlan, Free, Tier, plan_cache
from sparkdl.io.decode import Decoder, Values
from sparkdl.io.feed import WindowPool
from sparkdl.io.plan import Piece, RowGroup, ShardPlan, batch_row_ids, plan_pieces, shards_of
from sparkdl.io.schema import encode
from tests.unit.staged import COLUMNS, WIDTH, assert_rows, consecutive, features_of, whole, write_staged

pytestmark = pytest.mark.timeout(120)

SIZES = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 1, 0, 40]
LAYOUT = {"input_0": ("float32", (WIDTH,)), "label_0": ("int64", ())}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[RowGroup]:
    """Row groups of very different sizes in three files, ids from 0 in order."""
    folder = tmp_path_factory.mktemp("staged")
    ids = consecutive(SIZES)
    parts = [ids[:5], ids[5:6], ids[6:]]
    return [group for number, part in enumerate(parts) for group in write_staged(folder / f"{number}.parquet", part)]


def rank_data(
    groups: Sequence[RowGroup],
    *,
    num_shards: int = 1,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    window: int = 20,
    shuffle: Shuffle = "window",
    threads: int = 1,
    columns: Columns = COLUMNS,
    validation: Sequence[RowGroup] = (),
    cache: CacheTier = "none",
) -> RankData:
    """What a rank reads of staged row groups."""
    pieces = plan_pieces(groups, num_shards)
    return RankData(
        plan=ShardPlan(tuple(sum(piece.rows for piece in shard) for shard in pieces), batch_size),
        pieces={shard: pieces[shard] for shard in shards_of(rank, world_size, num_shards)},
        validation=plan_pieces(validation, world_size)[rank],
        decoder=Decoder(columns),
        layout=LAYOUT if columns is COLUMNS else MANY_LAYOUT,
        reading=Reading([column.field for column in columns], threads=threads),
        window=window,
        shuffle=shuffle,
        seed=7,
        cache=cache_of(cache, 1 << 20),
    )


def cache_of(tier: CacheTier, room: int) -> Cache:
    """A cache of one tier, in which there is room for all rows."""
    return Cache(plan_cache(tier, 0, Free(None, room, room)))


def epoch_of(data: RankData, epoch: int = 0) -> list[Batch]:
    with data.open_epoch(epoch) as batches:
        return list(batches)


def ids_of(batches: Sequence[Batch]) -> list[list[int]]:
    return [batch.labels[0].tolist() for batch in batches]


# ---- every row once, in the plan's order -----------------------------------------------------------------------------
@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    num_shards = draw(st.integers(1, 8))
    return {
        "chosen": draw(st.lists(st.sampled_from(range(len(SIZES))), unique=True, max_size=8)),
        "num_shards": num_shards,
        "world_size": draw(st.integers(1, min(4, num_shards))),
        "batch_size": draw(st.sampled_from([num_shards, num_shards + 1, 16, 300])),
        "window": draw(st.sampled_from([1, 4, 20, 1000])),
        "shuffle": draw(st.sampled_from(["window", "none", "full"])),
        "threads": draw(st.sampled_from([1, 3])),
        "cache": draw(st.sampled_from(["none", "memory", "disk"])),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_every_row_comes_once_an_epoch_in_the_steps_and_order_of_the_plan(groups: list[RowGroup], case: dict) -> None:
    chosen, world_size, threads = case.pop("chosen"), case.pop("world_size"), case.pop("threads")
    if case["shuffle"] == "full" and case["cache"] == "none":
        case["cache"] = "memory"
    data = [groups[number] for number in chosen]
    positions = np.array([row for number in chosen for row in consecutive(SIZES)[number]], np.int64)
    ranks = [rank_data(data, rank=rank, world_size=world_size, threads=threads, **case) for rank in range(world_size)]
    plan = ranks[0].plan
    order = {"window": case["window"], "shuffle": case["shuffle"], "seed": 7}
    for epoch in range(2):
        read = [epoch_of(rank, epoch) for rank in ranks]
        assert sorted(row for batches in read for ids in ids_of(batches) for row in ids) == sorted(positions.tolist())
        assert {len(batches) for batches in read} == {plan.num_steps}
        steps = batch_row_ids(data, plan, **order, epoch=epoch)
        for step, (rows, (begin, end)) in enumerate(zip(steps, plan.steps(), strict=True)):
            by_shard = np.split(positions[rows], np.cumsum(end - begin)[:-1])
            for rank, batches in enumerate(read):
                expected = np.concatenate([by_shard[shard] for shard in ranks[rank].pieces])
                assert_rows(batches[step].inputs[0], batches[step].labels[0], expected)


def test_the_order_is_a_new_one_every_epoch_and_the_same_in_every_run(groups: list[RowGroup]) -> None:
    first, again = (epoch_of(rank_data(groups, num_shards=2, threads=threads), 0) for threads in (1, 4))
    second = epoch_of(rank_data(groups, num_shards=2), 1)
    assert ids_of(first) == ids_of(again)
    assert ids_of(first) != ids_of(second)


def test_without_shuffling_each_shard_keeps_its_order(groups: list[RowGroup]) -> None:
    one = [row for ids in ids_of(epoch_of(rank_data(groups, shuffle="none"))) for row in ids]
    assert one == list(range(sum(SIZES)))
    several = rank_data(groups, num_shards=3, shuffle="none")
    rows = [row for ids in ids_of(epoch_of(several)) for row in ids]
    cuts = np.cumsum((0, *several.plan.shard_rows))
    for low, high in itertools.pairwise(cuts):
        assert [row for row in rows if low <= row < high] == list(range(low, high))


def test_a_window_mixes_rows_of_the_row_groups_in_it_only(groups: list[RowGroup]) -> None:
    data = rank_data(groups, batch_size=8, window=1)
    rows = [row for ids in ids_of(epoch_of(data)) for row in ids]
    group_of = np.repeat(np.arange(len(SIZES)), SIZES)[rows]
    changes = np.count_nonzero(np.diff(group_of))
    assert changes == np.count_nonzero(SIZES) - 1, "with the smallest window, the rows of a row group stay together"
    assert rows != sorted(rows)
    wide = [row for ids in ids_of(epoch_of(replace(data, window=10_000))) for row in ids]
    assert np.count_nonzero(np.diff(np.repeat(np.arange(len(SIZES)), SIZES)[wide])) > sum(SIZES) // 3


def test_ids_above_two_to_the_53_survive(tmp_path: Path) -> None:
    first = 2**53 + 1
    ids = range(first, first + 10)
    groups = write_staged(tmp_path / "large.parquet", [ids[:3], ids[3:]])
    read = [row for found in ids_of(epoch_of(rank_data(groups, num_shards=2, batch_size=4))) for row in found]
    assert sorted(read) == list(ids)


# ---- all kinds of columns --------------------------------------------------------------------------------------------
MANY = Columns(
    inputs=(
        Column("wide", "input_0", "array", "float64"),
        Column("age", "input_1", "scalar", "float32"),
        Column("shop", "input_2", "scalar", "int64", flat=True),
        Column("words", "input_3", "array", "int64"),
    ),
    labels=(
        Column("clicked", "label_0", "scalar", "int64", flat=True, validity="class"),
        Column("spent", "label_1", "scalar", "float32", flat=True),
        Column("route", "label_2", "array", "float32"),
    ),
    weight=Column("importance", "weight", "scalar", "float32", flat=True, validity="weight"),
)
MANY_WIDTHS = {
    "input_0": 2,
    "input_1": 1,
    "input_2": 1,
    "input_3": 4,
    "label_0": 1,
    "label_1": 1,
    "label_2": 2,
    "weight": 1,
}


MANY_LAYOUT = {
    "input_0": ("float64", (2,)),
    "input_1": ("float32", (1,)),
    "input_2": ("int64", ()),
    "input_3": ("int64", (4,)),
    "label_0": ("int64", ()),
    "label_1": ("float32", ()),
    "label_2": ("float32", (2,)),
    "weight": ("float32", ()),
}


def many_values(ids: Sequence[int]) -> dict[str, np.ndarray]:
    rows = np.array(ids, np.int64)
    return {
        "input_0": np.stack([rows / 3, -rows / 7], 1),
        "input_1": (rows / 2).astype(np.float32)[:, None],
        "input_2": rows + 2**60,
        "input_3": np.stack([rows, rows + 1, rows * 2**40, -rows], 1),
        "label_0": rows % 5,
        "label_1": np.sqrt(rows).astype(np.float32),
        "label_2": np.stack([rows, -rows], 1).astype(np.float32),
        "weight": (rows % 3).astype(np.float32),
    }


def write_many(path: Path, groups: Sequence[Sequence[int]]) -> list[RowGroup]:
    tables = []
    for ids in groups:
        values = many_values(ids)
        values = {name: value[:, 0] if name == "input_1" else value for name, value in values.items()}
        arrays = {name: pa.array(value.tolist() if value.ndim == 2 else value) for name, value in values.items()}
        tables.append(encode(pa.RecordBatch.from_pydict(arrays), MANY, MANY_WIDTHS)[0])
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return [RowGroup(str(path), index, len(ids)) for index, ids in enumerate(groups)]


def many_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    assert batch.weight is not None
    fields = [column.field for column in MANY]
    return dict(zip(fields, (*batch.inputs, *batch.labels, batch.weight), strict=True))


def test_inputs_labels_and_weights_arrive_in_their_types_and_together(tmp_path: Path) -> None:
    groups = write_many(tmp_path / "many.parquet", consecutive([7, 20, 4]))
    data = rank_data(groups, num_shards=2, batch_size=5, columns=MANY, window=10, validation=groups)
    with data.open_validation(6) as batches:
        validation = list(batches)
    seen = []
    for batch in (*epoch_of(data), *validation):
        tensors = many_tensors(batch)
        ids = (tensors["input_2"] - 2**60).tolist()
        seen += ids
        for name, expected in many_values(ids).items():
            found = tensors[name].numpy()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            np.testing.assert_array_equal(found, expected, err_msg=name)
    assert sorted(seen) == sorted(2 * list(range(31)))


def test_a_rank_without_rows_gets_empty_batches_of_the_right_shapes_and_types(tmp_path: Path) -> None:
    groups = write_many(tmp_path / "few.parquet", [[0], [1]])
    both = [rank_data(groups, num_shards=4, batch_size=4, rank=rank, world_size=2, columns=MANY) for rank in range(2)]
    empty, full = (epoch_of(data)[0] for data in both)  # shards 1 and 3 have a row each
    assert (full.rows, empty.rows) == (2, 0)
    for name, tensor in many_tensors(empty).items():
        like = many_tensors(full)[name]
        assert (tensor.dtype, tensor.shape[1:]) == (like.dtype, like.shape[1:]), name


def test_steps_in_which_a_rank_has_no_rows_are_still_steps(tmp_path: Path) -> None:
    groups = write_staged(tmp_path / "one.parquet", [range(40)])
    pieces = plan_pieces(groups, 1)[0]
    uneven = ShardPlan((40, 2), 8)
    few = write_staged(tmp_path / "two.parquet", [[100, 101]])
    rank = replace(rank_data(few), plan=uneven, pieces={1: whole(few)})
    read = ids_of(epoch_of(rank))
    assert len(read) == uneven.num_steps == 6
    assert sorted(row for ids in read for row in ids) == [100, 101]
    assert [len(ids) for ids in read] == [int(end[1] - begin[1]) for begin, end in uneven.steps()]
    other = ids_of(epoch_of(replace(rank_data(groups), plan=uneven, pieces={0: pieces})))
    assert [len(mine) + len(theirs) for mine, theirs in zip(read, other, strict=True)] == [7] * 6


def test_a_rank_without_any_shard_rows_reads_nothing_and_ends(groups: list[RowGroup]) -> None:
    data = replace(rank_data(groups), plan=ShardPlan((0, 0), 4), pieces={0: (), 1: ()})
    assert epoch_of(data) == []
    with data.open_validation(4) as batches:
        assert list(batches) == []


# ---- validation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_validation_rows_come_once_over_all_ranks_in_file_order(
    groups: list[RowGroup], world_size: int, threads: int
) -> None:
    rows = []
    for rank in range(world_size):
        data = rank_data(groups[:1], rank=rank, num_shards=4, world_size=world_size, threads=threads, validation=groups)
        for _ in range(2):  # every epoch validates anew
            with data.open_validation(8) as batches:
                read = list(batches)
        assert all(0 < batch.rows <= 8 for batch in read)
        for batch in read:
            assert_rows(batch.inputs[0], batch.labels[0], batch.labels[0].tolist())
        rows += [row for ids in ids_of(read) for row in ids]
    assert rows == list(range(sum(SIZES)))


# ---- errors and early ends -------------------------------------------------------------------------------------------
def test_a_file_that_vanished_is_raised_where_the_batches_are_taken(tmp_path: Path) -> None:
    groups = [
        *write_staged(tmp_path / "a.parquet", [range(50)]),
        *write_staged(tmp_path / "b.parquet", [range(50, 100)]),
    ]
    (tmp_path / "b.parquet").unlink()
    data = rank_data(groups, shuffle="none", batch_size=10, validation=groups)
    for opened, whole_batches in ((data.open_epoch(0), 5), (data.open_validation(10), 5)):
        read = []
        with opened as batches, pytest.raises(DataError, match=r"b\.parquet cannot be read.*fit again"):
            read.extend(batches)
        assert ids_of(read) == [list(range(start, start + 10)) for start in range(0, 50, 10)][:whole_batches]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_an_epoch_early_stops_every_thread(groups: list[RowGroup], taken: int) -> None:
    before = set(threading.enumerate())
    with rank_data(groups, batch_size=2, threads=3).open_epoch(0) as batches:
        for _ in range(taken):
            next(batches)
    assert set(threading.enumerate()) <= before


def test_many_passes_leave_no_threads(groups: list[RowGroup]) -> None:
    before = set(threading.enumerate())
    data = rank_data(groups, num_shards=3, threads=2)
    for epoch in range(5):
        epoch_of(data, epoch)
    assert set(threading.enumerate()) <= before


class Source:
    """A generator of batches that records what became of it."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.made = threading.Semaphore(0)
        self.closed_in = ""
        self._count = count
        self._error = error

    def batches(self) -> Iterator[Batch]:
        try:
            for number in range(self._count):
                self.made.release()
                yield Batch((torch.full((2,), number),), ())
            if self._error is not None:
                raise self._error
        finally:
            self.closed_in = threading.current_thread().name


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(batch.inputs[0][0]) for batch in batches]


def test_prefetched_batches_keep_their_order_and_end() -> None:
    source = Source(50)
    with prefetched(source.batches()) as batches:
        assert numbers(batches) == list(range(50))
        assert next(batches, None) is None
    assert source.closed_in == "sparkdl-prefetch"


@pytest.mark.parametrize("error", [ValueError("bad row"), DataError("ragged"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_producer_is_raised_after_the_batches_before_it(error: BaseException) -> None:
    source = Source(3, error)
    read = []
    with prefetched(source.batches()) as batches:
        for _ in range(3):
            read.append(next(batches))
        with pytest.raises(type(error)) as raised:
            next(batches)
    assert raised.value is error
    assert numbers(iter(read)) == [0, 1, 2]


@pytest.mark.parametrize("taken", [0, 2])
def test_leaving_the_block_early_closes_the_generator_in_its_own_thread(taken: int) -> None:
    source = Source(1000)
    with prefetched(source.batches(), depth=4) as batches:
        for _ in range(taken):
            next(batches)
        assert source.made.acquire(timeout=10)
    assert source.closed_in == "sparkdl-prefetch"
    assert not [thread for thread in threading.enumerate() if thread.name == "sparkdl-prefetch"]


def test_an_error_of_the_consumer_closes_the_generator() -> None:
    source = Source(1000)
    with pytest.raises(ZeroDivisionError), prefetched(source.batches()) as batches:
        raise ZeroDivisionError(next(batches))
    assert source.closed_in == "sparkdl-prefetch"


def test_no_more_than_depth_batches_wait() -> None:
    source = Source(1000)
    with prefetched(source.batches(), depth=4) as batches:
        for _ in range(5):  # four in the queue, and one that waits for room
            assert source.made.acquire(timeout=10)
        assert not source.made.acquire(timeout=0.2)
        next(batches)
        assert source.made.acquire(timeout=10)


# ---- kept rows -------------------------------------------------------------------------------------------------------
class CountingDecoder(Decoder):
    """Remembers which pieces it was given."""

    read: ClassVar[list[Piece]] = []

    def __call__(self, table: pa.Table, piece: Piece | None = None, epoch: int = 0) -> Values:
        assert piece is not None
        self.read.append(piece)
        return super().__call__(table, piece, epoch)


@pytest.fixture
def pieces_read() -> list[Piece]:
    CountingDecoder.read.clear()
    return CountingDecoder.read


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("shuffle", ["window", "full", "none"])
def test_kept_rows_come_in_the_same_order_and_are_read_once(
    groups: list[RowGroup], pieces_read: list[Piece], cache: CacheTier, shuffle: Shuffle
) -> None:
    kept = rank_data(groups, num_shards=3, shuffle=shuffle, cache=cache, threads=2)
    read = replace(rank_data(groups, num_shards=3, shuffle=shuffle, cache="memory"), decoder=Decoder(COLUMNS))
    kept = replace(kept, decoder=CountingDecoder(COLUMNS))
    for epoch in range(4):
        fresh = replace(read)  # knows nothing of earlier epochs
        assert ids_of(epoch_of(kept, epoch)) == ids_of(epoch_of(fresh, epoch))
    assert sorted(pieces_read, key=repr) == sorted((p for own in kept.pieces.values() for p in own), key=repr)


@pytest.mark.parametrize("rooms", [(400,), (300, 500), (0, 2000), (150, 150)])
def test_rows_that_fit_nowhere_whole_are_kept_in_parts(
    groups: list[RowGroup], pieces_read: list[Piece], rooms: tuple[int, ...]
) -> None:
    tiers: tuple[tuple[Tier, int], ...] = (("memory", 0), ("disk", 0))
    plan = CachePlan(tuple((name, room) for (name, _), room in zip(tiers, rooms, strict=False)), False, "in parts")
    kept = replace(rank_data(groups, num_shards=2, threads=2), decoder=CountingDecoder(COLUMNS), cache=Cache(plan))
    total = sum(len(own) for own in kept.pieces.values())
    for epoch in range(3):
        assert ids_of(epoch_of(kept, epoch)) == ids_of(epoch_of(rank_data(groups, num_shards=2), epoch))
    assert total <= len(pieces_read) < 3 * total, "something was kept, and not everything had to be"


@pytest.mark.parametrize(
    ("cache", "rows", "threads"),
    [("memory", 16, (1, 0)), ("memory", 40_000, (1, 1)), ("disk", 16, (1, 1)), ("none", 16, (1, 1))],
)
def test_a_thread_gathers_ahead_unless_small_batches_of_kept_rows_are_sooner_gathered_than_it_wakes(
    tmp_path: Path, cache: CacheTier, rows: int, threads: tuple[int, int]
) -> None:
    steps = 64 if rows == 16 else 8  # more than are gathered ahead: the thread cannot have ended
    groups = write_staged(tmp_path / "rows.parquet", consecutive([rows] * steps))
    data = rank_data(groups, batch_size=rows, cache=cache)
    found = []
    for epoch in range(2):
        with data.open_epoch(epoch) as batches:
            found.append(sum(thread.name == "sparkdl-prefetch" for thread in threading.enumerate()))
            assert sorted(row for batch in batches for row in batch.labels[0].tolist()) == list(range(rows * steps))
    assert tuple(found) == threads


def test_a_full_shuffle_without_room_says_what_to_do(groups: list[RowGroup]) -> None:
    small = replace(rank_data(groups, shuffle="full"), cache=Cache(plan_cache("memory", 5000, Free(None, 1000, None))))
    with pytest.raises(ConfigError, match=r"shuffle='full' needs all rows.*do not fit into the cache.*cacheBytes"):
        epoch_of(small)


@pytest.mark.parametrize("below", [(("disk", 1 << 20),), ()])
def test_a_cache_that_gets_no_memory_falls_back(
    groups: list[RowGroup], caplog: pytest.LogCaptureFixture, below: tuple[tuple[Tier, int], ...]
) -> None:
    class Broke(Cache):
        def reserve(self, need: int) -> Any:
            allocate = super().reserve(need)

            def fails(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
                raise MemoryError("no more")

            return fails if allocate is not None and self.plan.tiers[0][0] == "memory" else allocate

    broke = Broke(CachePlan((("memory", 1 << 20), *below), True, "all"))
    data = replace(rank_data(groups), cache=broke)
    assert ids_of(epoch_of(data)) == ids_of(epoch_of(rank_data(groups)))
    assert broke.plan.tiers == below
    assert "no more" in caplog.text


def test_windows_of_one_pass_share_their_memory_and_batches_do_not(tmp_path: Path) -> None:
    groups = write_staged(tmp_path / "even.parquet", consecutive([30] * 40))
    data = rank_data(groups, window=30, batch_size=5)
    addresses = set()
    allocate = WindowPool.allocate

    def seen(pool: WindowPool, name: str, rows: int) -> torch.Tensor:
        tensor = allocate(pool, name, rows)
        addresses.add(tensor.data_ptr())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowPool, "allocate", seen)
        batches = epoch_of(data)
    # Two fields, in the windows that are drained and in those that the reader fills ahead of them; not in all forty.
    assert len(addresses) < 2 * 20
    assert sorted(row for ids in ids_of(batches) for row in ids) == list(range(1200))
    for batch in batches:
        assert_rows(batch.inputs[0], batch.labels[0], batch.labels[0].tolist())


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_window_that_is_nearly_read_serves_the_next_but_one(tmp_path: Path, num_shards: int) -> None:
    groups = write_staged(tmp_path / "even.parquet", consecutive([30] * 120))
    data = rank_data(groups, num_shards=num_shards, window=600, batch_size=7)
    addresses = set()
    allocate = WindowPool.allocate

    def seen(pool: WindowPool, name: str, rows: int) -> torch.Tensor:
        tensor = allocate(pool, name, rows)
        addresses.add(tensor.data_ptr())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowPool, "allocate", seen)
        batches = epoch_of(data)
    assert len(addresses) <= 2 * 2 * num_shards  # of two fields: a window that is read and one that is filled
    assert sorted(row for ids in ids_of(batches) for row in ids) == list(range(3600))
    for batch in batches:
        assert_rows(batch.inputs[0], batch.labels[0], batch.labels[0].tolist())


def test_kept_rows_are_standardised_once(groups: list[RowGroup]) -> None:
    mean, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 1.0])
    data = replace(rank_data(groups, cache="memory"), standardise={"input_0": (mean, scale)})
    for epoch in range(2):
        for batch in epoch_of(data, epoch):
            expected = (torch.from_numpy(features_of(batch.labels[0].numpy())) - mean) * scale
            torch.testing.assert_close(batch.inputs[0], expected)


# ---- dealing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_shards_may_change_their_rank_between_epochs(groups: list[RowGroup], cache: CacheTier) -> None:
    everything = rank_data(groups, num_shards=6)
    ranks = [replace(rank_data(groups, num_shards=6, cache=cache), shards=own) for own in ((0, 2, 4), (1, 3, 5))]
    deals = [((0, 2, 4), (1, 3, 5)), ((0, 1, 2, 3, 5), (4,)), ((), (0, 1, 2, 3, 4, 5)), ((3, 4), (0, 1, 2, 5))]
    for epoch, deal in enumerate(deals):
        for rank, own in zip(ranks, deal, strict=True):
            rank.deal(own)
        parts = [ids_of(epoch_of(rank, epoch)) for rank in ranks]
        for mine, theirs, step in zip(*parts, ids_of(epoch_of(everything, epoch)), strict=True):
            assert sorted(mine + theirs) == sorted(step), "what is in a batch changed"


# ---- state -----------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_shards=st.integers(1, 4),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    epoch=st.integers(0, 2),
    part=st.floats(0, 1),
    shuffle=st.sampled_from(["window", "none", "full"]),
    cache=st.sampled_from(["none", "memory"]),
)
def test_a_fresh_process_goes_on_with_the_next_batch_on_any_number_of_ranks(
    groups: list[RowGroup],
    num_shards: int,
    before: int,
    after: int,
    epoch: int,
    part: float,
    shuffle: Shuffle,
    cache: CacheTier,
) -> None:
    settings_of = {"num_shards": num_shards, "shuffle": shuffle, "cache": "memory" if shuffle == "full" else cache}
    whole_epochs = [ids_of(epoch_of(rank_data(groups, **settings_of), number)) for number in range(epoch, epoch + 2)]
    steps = len(whole_epochs[0])
    stop = int(part * steps)
    states = []
    first_world = min(before, num_shards)
    for rank in range(first_world):
        data = rank_data(groups, rank=rank, world_size=first_world, **settings_of)
        data.load_state_dict({"epoch": epoch, "step": 0, "fingerprint": ""})
        with data.open_epoch(epoch) as batches:
            for _ in range(stop):
                next(batches)
        states.append(json.loads(json.dumps(data.state_dict())))
    assert all(state == states[0] for state in states)
    world = min(after, num_shards)
    resumed = [rank_data(groups, rank=rank, world_size=world, **settings_of) for rank in range(world)]
    for data in resumed:
        data.load_state_dict(states[0])
        assert data.position == ((epoch, stop) if stop < steps else (epoch + 1, 0))
    for number in range(data.position[0], epoch + 2):
        first = stop if number == epoch else 0
        parts = [ids_of(epoch_of(data, number)) for data in resumed]
        for own, step in zip(zip(*parts, strict=True), whole_epochs[number - epoch][first:], strict=True):
            assert sorted(row for ids in own for row in ids) == sorted(step)


@pytest.mark.parametrize("shuffle", ["window", "none"])
def test_to_resume_reads_again_one_window_per_shard_at_most(
    tmp_path: Path, pieces_read: list[Piece], shuffle: Shuffle
) -> None:
    groups = write_staged(tmp_path / "even.parquet", consecutive([10] * 40))
    data = replace(
        rank_data(groups, num_shards=2, batch_size=8, shuffle=shuffle, window=20), decoder=CountingDecoder(COLUMNS)
    )
    data.load_state_dict({"epoch": 0, "step": 31, "fingerprint": ""})
    assert sum(len(ids) for ids in ids_of(epoch_of(data))) == 400 - 31 * 8
    # 248 rows are done, 124 of each shard: 12 of its 20 row groups, or 6 of its windows of two.
    left = {"window": 2 * (20 - 12), "none": 2 * (20 - 12)}[shuffle]
    assert len(pieces_read) == left


def test_the_state_of_another_plan_is_refused(groups: list[RowGroup]) -> None:
    data = replace(rank_data(groups), fingerprint="now")
    with pytest.raises(ConfigError, match=r"belongs to plan then, but this run has plan now.*only the number of ranks"):
        data.load_state_dict({"epoch": 0, "step": 3, "fingerprint": "then"})


# ---- shuffle ---------------------------------------------------------------------------------------------------------
def correlation(order: Sequence[int]) -> float:
    """Rank correlation of the place in the source and the place in the epoch."""
    return float(abs(np.corrcoef(order, np.arange(len(order)))[0, 1]))


def test_rows_sorted_by_label_are_mixed_as_by_a_full_shuffle(tmp_path: Path) -> None:
    """Sorted data is the worst case of a window: labels come in runs as long as row groups."""
    rows, size = 12_000, 100
    groups = write_staged(tmp_path / "sorted.parquet", consecutive([size] * (rows // size)))
    orders: dict[str, list[int]] = {}
    spread: dict[str, float] = {}
    for name, settings_of in {
        "full": {"shuffle": "full", "cache": "memory"},
        "window": {"shuffle": "window", "window": 12 * size},
        "none": {"shuffle": "none"},
    }.items():
        batches = ids_of(epoch_of(rank_data(groups, num_shards=4, batch_size=200, **settings_of)))
        orders[name] = [row for ids in batches for row in ids]
        # Of ten classes of equal size, how far is the share of the first from a tenth?
        shares = [sum(row < rows // 10 for row in ids) / len(ids) for ids in batches]
        spread[name] = float(np.std(shares))
    assert correlation(orders["none"]) > 0.05
    assert correlation(orders["full"]) < 0.04
    assert correlation(orders["window"]) < 0.15
    # A batch of a full shuffle strays by sqrt(0.1 * 0.9 / 200) = 0.02 (0 in every fourth of rows of a shard).
    assert spread["full"] < 0.05
    assert spread["window"] < 3 * spread["full"] + 0.05
    assert spread["none"] > 2 * spread["full"]


# ---- Parquet with columns of its own ---------------------------------------------------------------------------------
ASSEMBLED = Columns(
    inputs=(Column("abc", "input_0", "assembled", "float32", parts=("a", "b", "c")),),
    labels=(Column("id", "label_0", "scalar", "int64", flat=True),),
)


def native_data(path: Path, a: Sequence[float], cache: CacheTier = "none") -> RankData:
    rows = len(a)
    table = pa.table(
        {
            "a": pa.array(a, pa.float64()),
            "b": pa.array(np.arange(rows) / 2, pa.float32()),
            "c": pa.array(np.arange(rows), pa.int32()),
            "id": np.arange(rows),
        }
    )
    pq.write_table(table, path, row_group_size=7)
    groups = [RowGroup(str(path), index, min(7, rows - 7 * index)) for index in range(-(-rows // 7))]
    return replace(
        rank_data(groups, num_shards=2, batch_size=5, window=10, cache=cache, validation=groups),
        decoder=Decoder(ASSEMBLED, native=True),
        layout={"input_0": ("float32", (3,)), "label_0": ("int64", ())},
        reading=Reading(["a", "b", "c", "id"], threads=2),
    )


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_parts_of_a_column_are_put_together(tmp_path: Path, cache: CacheTier) -> None:
    data = native_data(tmp_path / "parts.parquet", np.linspace(-1, 1, 40).tolist(), cache)
    with data.open_validation(6) as batches:
        validation = list(batches)
    for read in (epoch_of(data, 0), epoch_of(data, 1), validation):
        ids = torch.cat([batch.labels[0] for batch in read])
        assert sorted(ids.tolist()) == list(range(40))
        expected = torch.stack([torch.linspace(-1, 1, 40, dtype=torch.float64)[ids], ids / 2, ids], 1).float()
        torch.testing.assert_close(torch.cat([batch.inputs[0] for batch in read]), expected)


def test_a_part_that_is_not_finite_is_named(tmp_path: Path) -> None:
    values = [0.5] * 40
    # Their sum is infinite, and each of them is not.
    assert sum(batch.rows for batch in epoch_of(native_data(tmp_path / "large.parquet", [3e38] * 40))) == 40
    values[17] = float("nan")
    data = native_data(tmp_path / "nan.parquet", values)
    with pytest.raises(DataError, match=r"'a' is NaN or infinite in 1 of \d rows"):
        epoch_of(data)
    with data.open_validation(6) as batches, pytest.raises(DataError, match=r"'a' is NaN or infinite in 1 of \d rows"):
        list(batches)
