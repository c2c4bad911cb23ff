"""The plan: every row once per epoch, batches of one size, and nothing in it that knows a rank."""

import itertools
import time
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkdl.io.plan as planning
from sparkdl.errors import ConfigError
from sparkdl.io.plan import (
    Piece,
    RowGroup,
    ShardPlan,
    Window,
    batch_row_ids,
    plan_deal,
    plan_pieces,
    plan_windows,
    shards_of,
)

Ids = npt.NDArray[np.int64]

# Row groups as data has them: none, empty ones, many small ones, one giant beside crumbs.
SIZES = st.one_of(
    st.lists(st.integers(0, 12), max_size=12),
    st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(100, 400)), max_size=6),
)


def groups_of(sizes: Sequence[int]) -> list[RowGroup]:
    """Row groups of these sizes, three to a file."""
    return [RowGroup(f"part-{number // 3}.parquet", number % 3, rows) for number, rows in enumerate(sizes)]


def plan_of(groups: Sequence[RowGroup], num_shards: int, batch_size: int) -> ShardPlan:
    """The plan as a run makes it: from the rows of the shards that the row groups are cut into."""
    shards = plan_pieces(groups, num_shards)
    return ShardPlan(tuple(sum(piece.rows for piece in pieces) for pieces in shards), batch_size)


def epoch_ids(
    sizes: Sequence[int], *, num_shards: int = 1, batch_size: int = 8, window: int = 10, shuffle: str = "window",
    seed: int = 0, epoch: int = 0,
) -> list[Ids]:  # fmt: skip
    """Row ids of every batch of an epoch."""
    groups = groups_of(sizes)
    plan = plan_of(groups, num_shards, batch_size)
    return list(batch_row_ids(groups, plan, window=window, shuffle=shuffle, seed=seed, epoch=epoch))  # type: ignore[arg-type]


def order_of(pieces: Sequence[Piece], *, seed: int, epoch: int, shard: int, window: int = 10) -> list[tuple[int, int]]:
    """(row group, row) in the order in which one shard gives its rows in one epoch."""
    rows = []
    for part in plan_windows(pieces, window=window, shuffle="window", seed=seed, epoch=epoch, shard=shard):
        members = [(number, row) for number in part.pieces for row in range(pieces[number].start, pieces[number].stop)]
        rows += [members[row] for row in part.order()]
    return rows


def naive_order(shard_rows: Sequence[int]) -> list[int]:
    """The shard of every row of the interleaved sequence: all keys, sorted."""
    keys = [((2 * i + 1) / (2 * rows), shard) for shard, rows in enumerate(shard_rows) for i in range(rows)]
    return [shard for _, shard in sorted(keys)]


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[RowGroup], ShardPlan]:
    """Row groups and a plan for them."""
    groups = groups_of(draw(SIZES))
    num_shards = draw(st.integers(1, 9))
    batch_size = draw(st.integers(num_shards, num_shards + 40))
    return groups, plan_of(groups, num_shards, batch_size)


# ---- pieces ----------------------------------------------------------------------------------------------------------
@given(sizes=SIZES, num_shards=st.integers(1, 20))
@settings(deadline=None)
def test_shards_hold_every_row_once_in_file_order_and_differ_by_at_most_one_row(
    sizes: list[int], num_shards: int
) -> None:
    groups = groups_of(sizes)
    shards = plan_pieces(groups, num_shards)
    rows = [(piece.row_group, row) for pieces in shards for piece in pieces for row in range(piece.start, piece.stop)]
    assert rows == [(group, row) for group in groups for row in range(group.rows)]
    counts = [sum(piece.rows for piece in pieces) for pieces in shards]
    assert len(shards) == num_shards
    assert max(counts) - min(counts) <= 1
    assert all(piece.rows for pieces in shards for piece in pieces)


@given(sizes=SIZES, num_shards=st.integers(1, 20))
@settings(deadline=None)
def test_at_most_one_row_group_is_torn_apart_per_cut(sizes: list[int], num_shards: int) -> None:
    groups = groups_of(sizes)
    pieces = sum(len(found) for found in plan_pieces(groups, num_shards))
    assert pieces <= len([size for size in sizes if size]) + num_shards - 1


def test_one_giant_row_group_feeds_all_shards() -> None:
    (giant,) = groups_of([10])
    assert plan_pieces([giant], 4) == (
        (Piece(giant, 0, 2),),
        (Piece(giant, 2, 5),),
        (Piece(giant, 5, 7),),
        (Piece(giant, 7, 10),),
    )


def test_more_shards_than_rows_leave_some_empty() -> None:
    assert sorted(sum(piece.rows for piece in pieces) for pieces in plan_pieces(groups_of([1, 0, 1]), 5)) == [
        0,
        0,
        0,
        1,
        1,
    ]


def test_no_row_groups_are_shards_without_pieces() -> None:
    assert plan_pieces([], 3) == ((), (), ())


# ---- steps -----------------------------------------------------------------------------------------------------------
@given(found=plans(), window=st.integers(1, 60), shuffle=st.sampled_from(["window", "none"]), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_the_batches_of_an_epoch_hold_every_row_exactly_once(
    found: tuple[list[RowGroup], ShardPlan], window: int, shuffle: str, epoch: int
) -> None:
    groups, plan = found
    batches = list(batch_row_ids(groups, plan, window=window, shuffle=shuffle, seed=7, epoch=epoch))  # type: ignore[arg-type]
    ids = np.concatenate([np.empty(0, np.int64), *batches])
    assert sorted(ids.tolist()) == list(range(sum(group.rows for group in groups)))


@given(found=plans())
@settings(deadline=None)
def test_batches_have_one_size_but_for_one_row_and_never_more_than_asked(
    found: tuple[list[RowGroup], ShardPlan],
) -> None:
    _, plan = found
    sizes = [plan.batch_rows(step) for step in range(plan.num_steps)]
    assert plan.num_steps == -(-plan.num_rows // plan.batch_size)
    assert sum(sizes) == plan.num_rows
    if sizes:
        assert max(sizes) <= plan.batch_size
        assert max(sizes) - min(sizes) <= 1
    assert [int((end - begin).sum()) for begin, end in plan.steps()] == sizes


@given(found=plans())
@settings(deadline=None)
def test_steps_take_the_rows_in_the_order_of_their_keys(found: tuple[list[RowGroup], ShardPlan]) -> None:
    _, plan = found
    sequence = naive_order(plan.shard_rows)
    for step, (begin, end) in enumerate(plan.steps()):
        first = step * plan.num_rows // plan.num_steps
        expected = sequence[first : first + plan.batch_rows(step)]
        assert (end - begin).tolist() == np.bincount(expected, minlength=len(plan.shard_rows)).tolist()


@given(shard_rows=st.lists(st.integers(0, 300), min_size=1, max_size=6), batch_size=st.integers(6, 50))
@settings(deadline=None)
def test_shards_of_any_sizes_are_interleaved_by_their_keys(shard_rows: list[int], batch_size: int) -> None:
    plan = ShardPlan(tuple(shard_rows), batch_size)
    sequence = naive_order(shard_rows)
    bounds = plan.bounds(0, plan.num_steps)
    for step in range(plan.num_steps + 1):
        taken = sequence[: step * plan.num_rows // max(plan.num_steps, 1)]
        assert bounds[step].tolist() == np.bincount(taken, minlength=len(shard_rows)).tolist()


def test_ties_go_to_the_shard_of_the_lower_number() -> None:
    bounds = ShardPlan((2, 2, 2), 3).bounds(0, 2)
    assert bounds.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert ShardPlan((3, 3), 4).bounds(0, 2).tolist() == [[0, 0], [2, 1], [3, 3]]


@given(found=plans(), block=st.integers(1, 5))
@settings(deadline=None, max_examples=10)
def test_steps_do_not_depend_on_how_many_are_computed_at_a_time(
    found: tuple[list[RowGroup], ShardPlan], block: int
) -> None:
    _, plan = found
    one = [bounds.tolist() for bounds in plan.steps()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_BLOCK", block)
        assert [bounds.tolist() for bounds in plan.steps()] == one
        for first in range(plan.num_steps):
            shards = range(0, len(plan.shard_rows), 2)
            counts = list(plan.counts(shards, first))
            assert counts == [[end[s] - begin[s] for s in shards] for begin, end in one[first:]]
    assert [plan.bounds(step, step + 1).tolist() for step in range(plan.num_steps)] == one


# ---- dealing by speed ------------------------------------------------------------------------------------------------
def finish(seconds: Sequence[float], rows: Sequence[int], dealt: Sequence[Sequence[int]]) -> float:
    """When the last rank is done."""
    return max(pace * sum(rows[shard] for shard in own) for pace, own in zip(seconds, dealt, strict=True))


@given(
    seconds=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    rows=st.lists(st.integers(0, 1000), min_size=1, max_size=7),
)
@settings(deadline=None)
def test_every_shard_is_dealt_once_and_near_the_best_deal(seconds: list[float], rows: list[int]) -> None:
    dealt = plan_deal(seconds, rows)
    assert sorted(shard for own in dealt for shard in own) == list(range(len(rows)))
    deals = itertools.product(range(len(seconds)), repeat=len(rows)) if len(seconds) ** len(rows) <= 3000 else []
    best = min(
        (finish(seconds, rows, [[s for s, r in enumerate(deal) if r == rank] for rank in range(len(seconds))]))
        for deal in (*deals, [min(range(len(seconds)), key=seconds.__getitem__)] * len(rows))
    )
    # The bound of the rule for machines of different speed: twice the best.
    assert finish(seconds, rows, dealt) <= 2 * best + 1e-9


def test_a_rank_three_times_slower_gets_a_third() -> None:
    assert plan_deal([1.0, 3.0], [10] * 8) == ((0, 1, 2, 4, 5, 6), (3, 7))
    assert plan_deal([1.0, 1.0], [10] * 4) == ((0, 2), (1, 3))
    assert plan_deal([1.0, 1000.0], [10, 10]) == ((0, 1), ())


@given(found=plans(), window=st.integers(1, 60), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_the_rows_of_a_step_do_not_depend_on_how_shards_are_dealt_to_ranks(
    found: tuple[list[RowGroup], ShardPlan], window: int, epoch: int
) -> None:
    groups, plan = found
    num_shards = len(plan.shard_rows)
    starts = dict(zip(groups, itertools.accumulate((group.rows for group in groups), initial=0), strict=False))
    shards, steps = plan_pieces(groups, num_shards), list(plan.steps())
    expected = [
        sorted(ids.tolist())
        for ids in batch_row_ids(groups, plan, window=window, shuffle="window", seed=3, epoch=epoch)
    ]
    for world_size in range(1, num_shards + 1):
        union: list[list[int]] = [[] for _ in expected]
        for rank in range(world_size):
            for shard in shards_of(rank, world_size, num_shards):
                pieces = shards[shard]
                order = order_of(pieces, seed=3, epoch=epoch, shard=shard, window=window)
                ids = [starts[pieces[number].row_group] + row for number, row in order]
                for step, (begin, end) in enumerate(steps):
                    union[step] += ids[begin[shard] : end[shard]]
        assert [sorted(ids) for ids in union] == expected


@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 1), (1, 5), (3, 4), (4, 4), (4, 12)])
def test_every_shard_is_dealt_to_one_rank_and_loads_differ_by_one(world_size: int, num_shards: int) -> None:
    dealt = [list(shards_of(rank, world_size, num_shards)) for rank in range(world_size)]
    assert sorted(itertools.chain(*dealt)) == list(range(num_shards))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_batch_smaller_than_the_number_of_shards_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batchSize=3 cannot be dealt to numShards=4.*Use batchSize >= 4"):
        ShardPlan((5, 5, 5, 5), 3)
    assert ShardPlan((5, 5, 5, 5), 4).num_steps == 5


def test_an_epoch_without_rows_has_no_steps() -> None:
    plan = ShardPlan((0, 0), 4)
    assert (plan.num_rows, plan.num_steps, list(plan.steps())) == (0, 0, [])
    assert plan.bounds(0, 0).tolist() == [[0, 0]]


# ---- windows and the order of a shard --------------------------------------------------------------------------------
@given(
    sizes=SIZES, window=st.integers(1, 60), shuffle=st.sampled_from(["window", "full", "none"]), epoch=st.integers(0, 3)
)
@settings(deadline=None)
def test_windows_cover_a_shard_and_all_but_the_last_are_full(
    sizes: list[int], window: int, shuffle: str, epoch: int
) -> None:
    (pieces,) = plan_pieces(groups_of(sizes), 1)
    windows = plan_windows(pieces, window=window, shuffle=shuffle, seed=0, epoch=epoch, shard=0)  # type: ignore[arg-type]
    assert sorted(number for part in windows for number in part.pieces) == list(range(len(pieces)))
    assert [part.rows for part in windows] == [sum(pieces[number].rows for number in part.pieces) for part in windows]
    assert [part.offset for part in windows] == list(itertools.accumulate((p.rows for p in windows), initial=0))[:-1]
    if shuffle == "window":
        assert all(part.rows >= window for part in windows[:-1])
    elif shuffle == "full":
        assert len(windows) == min(1, len(pieces))
    else:
        assert [part.pieces for part in windows] == [(number,) for number in range(len(pieces))]
    for part in windows:
        assert sorted(part.order().tolist()) == list(range(part.rows))
        # No more pieces than it takes: without its last piece a window was not full.
        assert shuffle == "full" or part.rows - pieces[part.pieces[-1]].rows < window


@given(sizes=SIZES, window=st.integers(1, 60), epoch=st.integers(0, 3), num_shards=st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_without_shuffling_a_shard_keeps_its_order(sizes: list[int], window: int, epoch: int, num_shards: int) -> None:
    groups = groups_of(sizes)
    cuts = np.cumsum([0, *plan_of(groups, num_shards, 8).shard_rows])
    ids = epoch_ids(sizes, num_shards=num_shards, window=window, shuffle="none", epoch=epoch)
    everything = np.concatenate([np.empty(0, np.int64), *ids])
    for low, high in itertools.pairwise(cuts):
        of_shard = everything[(everything >= low) & (everything < high)]
        assert of_shard.tolist() == list(range(low, high))


def test_the_order_of_a_shard_changes_with_seed_epoch_and_shard_and_with_nothing_else() -> None:
    (pieces,) = plan_pieces(groups_of([7, 11, 5, 13, 9]), 1)
    keys = list(itertools.product([0, 1, 2**40], [0, 1, 2], [0, 1, 2]))
    orders = {key: tuple(order_of(pieces, seed=key[0], epoch=key[1], shard=key[2])) for key in keys}
    assert len(set(orders.values())) == len(keys), "two of (seed, epoch, shard) give one order"
    again = {key: tuple(order_of(pieces, seed=key[0], epoch=key[1], shard=key[2])) for key in reversed(keys)}
    assert again == orders
    np.random.default_rng(0).random(3)
    np.random.seed(1)
    assert tuple(order_of(pieces, seed=1, epoch=1, shard=1)) == orders[1, 1, 1]


def test_the_order_of_a_shard_does_not_depend_on_the_number_of_the_other_shards() -> None:
    few, many = plan_pieces(groups_of([10, 10]), 2), plan_pieces(groups_of([10, 10, 10, 10]), 4)
    assert few[1] == many[1]
    assert order_of(few[1], seed=4, epoch=2, shard=1) == order_of(many[1], seed=4, epoch=2, shard=1)


@pytest.mark.parametrize("sizes", [[1, 1], [2]], ids=["two pieces of one row", "one piece of two rows"])
def test_two_rows_are_swapped_in_about_half_of_the_epochs(sizes: list[int]) -> None:
    first = [int(epoch_ids(sizes, epoch=epoch)[0][0]) for epoch in range(200)]
    assert 70 <= sum(first) <= 130


def test_every_order_of_four_rows_in_pieces_of_their_own_comes_up_equally_often() -> None:
    (pieces,) = plan_pieces(groups_of([1, 1, 1, 1]), 1)
    orders = [tuple(number for number, _ in order_of(pieces, seed=0, epoch=epoch, shard=0)) for epoch in range(2400)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == 2400
    assert min(counts) >= 60, "100 are expected of each of 24 orders"
    assert max(counts) <= 145


@pytest.mark.parametrize("num_shards", [1, 4])
def test_data_sorted_by_label_is_mixed_in_every_batch(num_shards: int) -> None:
    groups, rows, batch_size = 80, 50, 100
    half = groups * rows // 2
    for epoch in range(3):
        ids = epoch_ids(
            [rows] * groups, num_shards=num_shards, batch_size=batch_size, window=rows * groups // 4, epoch=epoch
        )
        share = np.array([np.mean(batch >= half) for batch in ids])
        assert share.min() > 0.15
        assert share.max() < 0.85
        # And the rows of one group are not neighbours any more.
        order = np.concatenate(ids)
        assert np.mean(np.diff(order) == 1) < 0.02


def test_sorted_data_that_is_not_shuffled_is_still_taken_from_all_shards() -> None:
    for batch in epoch_ids([40], num_shards=4, batch_size=8, shuffle="none"):
        assert np.bincount(batch // 10).tolist() == [2, 2, 2, 2]


def test_a_window_without_seed_keeps_its_order() -> None:
    assert Window(offset=0, pieces=(0,), rows=4, seed=None).order().tolist() == [0, 1, 2, 3]


# ---- the plan spelt out ----------------------------------------------------------------------------------------------
@given(found=plans(), window=st.integers(1, 60), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_the_plan_spelt_out_says_what_bounds_and_windows_say(
    found: tuple[list[RowGroup], ShardPlan], window: int, epoch: int
) -> None:
    groups, plan = found
    names = [(group, row) for group in groups for row in range(group.rows)]
    spelt = [
        [names[id_] for id_ in batch]
        for batch in batch_row_ids(groups, plan, window=window, shuffle="window", seed=5, epoch=epoch)
    ]
    expected: list[list[tuple[RowGroup, int]]] = [[] for _ in range(plan.num_steps)]
    for shard, pieces in enumerate(plan_pieces(groups, len(plan.shard_rows))):
        order = order_of(pieces, seed=5, epoch=epoch, shard=shard, window=window)
        rows = [(pieces[number].row_group, row) for number, row in order]
        for step, (begin, end) in enumerate(plan.steps()):
            expected[step] += rows[begin[shard] : end[shard]]
    assert spelt == expected


def test_the_fingerprint_changes_with_everything_that_decides_the_order_and_with_nothing_else() -> None:
    def fingerprint(rows: tuple[int, ...] = (3, 4), batch_size: int = 4, **settings: object) -> str:
        return ShardPlan(rows, batch_size).fingerprint(**{"seed": 1, "window": 10, **settings})

    different = [
        fingerprint(), fingerprint((4, 3)), fingerprint((3, 4, 0)), fingerprint(batch_size=5), fingerprint(seed=2),
        fingerprint(window=11), fingerprint(files={"a": 1}), fingerprint(files={"a": 2}),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    plan = ShardPlan((3, 4), 4)
    assert plan.fingerprint(window=10, seed=1) == plan.fingerprint(seed=1, window=10) == fingerprint()


# ---- big numbers -----------------------------------------------------------------------------------------------------
def check_taken(taken: npt.NDArray[np.int64], shard_rows: Sequence[int]) -> None:
    """The rows taken are the first of the sequence: none left out comes before one that was taken."""
    last = max(
        ((2 * n - 1) / (2 * rows), s) for s, (n, rows) in enumerate(zip(taken.tolist(), shard_rows, strict=True)) if n
    )
    rest = enumerate(zip(taken.tolist(), shard_rows, strict=True))
    following = min(((2 * n + 1) / (2 * rows), s) for s, (n, rows) in rest if n < rows)
    assert last < following


@pytest.mark.parametrize(
    "shard_rows",
    [
        (10**9,) * 8,
        (10**9, 10**9 + 1, 10**9 - 1),
        (10**9, 1, 0, 3, 10**9 // 7),
        (10**12, 10**12 + 1),
    ],
    ids=["equal", "one row apart", "skewed", "a trillion"],
)
def test_steps_deep_in_a_billion_rows_are_exact_and_take_milliseconds(shard_rows: tuple[int, ...]) -> None:
    plan = ShardPlan(shard_rows, 256)
    for start in (0, 1, plan.num_steps // 3, plan.num_steps - 5):
        started = time.perf_counter()
        bounds = plan.bounds(start, start + 4)
        seconds = time.perf_counter() - started
        assert seconds < 0.5, "a few milliseconds are usual; all keys would take minutes"
        for step, taken in enumerate(bounds, start):
            assert int(taken.sum()) == step * plan.num_rows // plan.num_steps
            assert (taken >= 0).all()
            assert (taken <= shard_rows).all()
            if step:
                check_taken(taken, shard_rows)
    assert plan.bounds(plan.num_steps, plan.num_steps)[0].tolist() == list(shard_rows)


def test_positions_beyond_64_bits_do_not_overflow() -> None:
    plan = ShardPlan((2**40, 2**40), 2)
    step = plan.num_steps - 1
    assert step * plan.num_rows > 2**63
    assert plan.bounds(step, step + 1).tolist() == [[2**40 - 1] * 2, [2**40] * 2]
    assert plan.batch_rows(step) == 2


def test_a_big_shard_is_cut_without_counting_its_rows() -> None:
    giants = groups_of([10**12, 1, 10**12])
    shards = plan_pieces(giants, 3)
    ends = [sum(piece.rows for piece in pieces) for pieces in shards]
    assert sum(ends) == 2 * 10**12 + 1
    assert max(ends) - min(ends) <= 1
    assert bisect_right(list(itertools.accumulate(ends)), 10**12) == 1
