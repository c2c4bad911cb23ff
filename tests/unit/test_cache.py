"""Where decoded rows are kept: the choice of a tier, the moves between tiers, and tensors that come back unchanged."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdl.io.cache import (
    Cache,
    CachePlan,
    Free,
    Move,
    TieredStore,
    TierPolicy,
    _allocator,
    find_free,
    local_directory,
    plan_cache,
)

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
FREE = Free(device=10 * MIB, memory=100 * MIB, disk=1000 * MIB)
ON_CPU = Free(device=None, memory=100 * MIB, disk=1000 * MIB)


# ---- the choice ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "need", "free", "tiers", "resident"),
    [
        ("auto", 5, FREE, ["device", "memory", "disk"], True),
        ("auto", 50, FREE, ["memory", "disk"], True),
        ("auto", 500, FREE, ["disk"], True),
        ("auto", 5000, FREE, ["device", "memory", "disk"], False),
        ("auto", 50, ON_CPU, ["memory", "disk"], True),
        ("memory", 50, FREE, ["memory"], True),
        ("memory", 500, FREE, ["memory"], False),
        ("disk", 5, FREE, ["disk"], True),
        ("device", 5, FREE, ["device"], True),
        ("device", 50, FREE, ["device"], False),
        ("device", 50, ON_CPU, ["memory"], True),  # the CPU's device memory is the host's
        ("none", 5, FREE, [], False),
    ],
)
def test_everything_lies_in_the_fastest_tier_that_holds_it(
    asked: str, need: int, free: Free, tiers: list[str], resident: bool
) -> None:
    plan = plan_cache(asked, need * MIB, free)  # type: ignore[arg-type]
    assert [name for name, _ in plan.tiers] == tiers
    assert plan.resident == resident
    assert all(name in plan.reason for name in tiers[:1])


def test_a_budget_is_for_all_tiers_together() -> None:
    plan = plan_cache("auto", 500 * MIB, FREE, budget=130 * MIB)
    assert plan.tiers == (("device", 10 * MIB), ("memory", 100 * MIB), ("disk", 20 * MIB))
    assert plan_cache("auto", 50 * MIB, FREE, budget=60 * MIB).tiers[0] == ("memory", 60 * MIB)
    nothing = plan_cache("auto", 50, FREE, budget=0)
    assert (nothing.tiers, nothing.reason) == ((), "nothing (a budget of 0 bytes)")


def test_the_choice_is_told_in_words() -> None:
    assert plan_cache("auto", 50 * MIB, FREE).reason == "all 50.0 MiB of this rank's rows on memory"
    assert plan_cache("none", 50 * MIB, FREE).reason == "nothing (not asked for)"
    assert plan_cache("memory", 500 * MIB, FREE).reason == "500.0 MiB of this rank's rows in up to 100.0 MiB on memory"
    assert plan_cache("memory", 5, Free(None, 0, None)).reason == "nothing (no room)"


def test_ranks_of_one_host_share_what_is_free() -> None:
    one, four = (find_free(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert one.device is None
    assert four.memory is not None
    assert one.memory is not None
    assert four.memory == pytest.approx(one.memory / 4, rel=0.2)


def test_the_local_directory_is_the_one_with_most_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"/nowhere,{tmp_path}")
    assert local_directory() == str(tmp_path)
    monkeypatch.setenv("SPARK_LOCAL_DIRS", "")
    assert local_directory() is None


# ---- the policy ------------------------------------------------------------------------------------------------------
def test_the_least_recently_used_block_goes_down_one_tier_at_a_time() -> None:
    policy = TierPolicy([2, 2])
    assert policy.place("a", 1) == [Move("a", None, 0)]
    assert policy.place("b", 1) == [Move("b", None, 0)]
    assert policy.place("c", 1) == [Move("a", 0, 1), Move("c", None, 0)]
    assert policy.touch("b") == []
    assert policy.place("d", 1) == [Move("c", 0, 1), Move("d", None, 0)]
    # a is used again: it comes up, b (used before d) goes down.
    assert policy.touch("a") == [Move("b", 0, 1), Move("a", 1, 0)]
    assert policy.place("e", 1) == [Move("c", 1, None), Move("d", 0, 1), Move("e", None, 0)]
    assert [policy.find(key) for key in "abcde"] == [0, 1, None, 1, 0]


def test_blocks_in_use_do_not_move() -> None:
    policy = TierPolicy([2], pinned={"a": 1})
    policy.place("a", 1)
    policy.place("b", 1)
    assert policy.place("c", 1) == [Move("b", 0, None), Move("c", None, 0)]
    assert policy.place("d", 2) == [], "there is no room beside the block in use"


def test_a_block_larger_than_the_fastest_tier_goes_to_the_next() -> None:
    policy = TierPolicy([2, 10])
    assert policy.place("large", 5) == [Move("large", None, 1)]
    assert policy.touch("large") == []
    assert policy.place("huge", 11) == []


@settings(max_examples=150, deadline=None)
@given(
    rooms=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.booleans()), max_size=40),
)
def test_no_tier_is_overfull_and_the_moves_tell_where_everything_is(
    rooms: list[int], steps: list[tuple[int, int, bool]]
) -> None:
    policy = TierPolicy(list(rooms))
    where: dict[object, int] = {}
    sizes: dict[object, int] = {}
    for key, size, pin in steps:
        known = policy.find(key) is not None
        before = dict(where)
        moves = policy.touch(key) if known else policy.place(key, sizes.setdefault(key, size))
        for move in moves:
            assert where.get(move.key) == move.source
            assert move.target is None or move.source is None or move.key == key or move.target == move.source + 1
            if move.target is None:
                del where[move.key]
            else:
                where[move.key] = move.target
        assert {number: policy.find(number) for number in range(10) if policy.find(number) is not None} == where
        assert all(policy.used(tier) <= room for tier, room in enumerate(rooms))
        assert all(where.get(held) == before.get(held) for held in policy.pinned if held in before)
        if pin and policy.find(key) is not None and len(policy.pinned) < 2:
            policy.pinned[key] = 1
        elif not pin:
            policy.pinned.clear()


# ---- tensors ---------------------------------------------------------------------------------------------------------
def block(number: int, rows: int = 100) -> dict[str, torch.Tensor]:
    return {"x": torch.full((rows, 2), float(number)), "y": torch.arange(rows) + 1000 * number}


SIZE = 100 * 2 * 4 + 100 * 8


def store_of(*rooms: int) -> TieredStore:
    """Memory, and disk below it."""
    allocators = [_allocator("memory", None), _allocator("disk", None)]
    return TieredStore(list(zip((room * SIZE for room in rooms), allocators, strict=False)))


def assert_kept(store: TieredStore, number: int) -> bool:
    with store.use(number) as found:
        if found is not None:
            for name, tensor in block(number).items():
                assert torch.equal(found[name], tensor)
        return found is not None


@pytest.mark.parametrize(("rooms", "kept"), [((10,), 6), ((3,), 3), ((3, 2), 5), ((0, 4), 4), ((2, 10), 6)])
def test_blocks_come_back_as_they_were_from_whatever_tier(rooms: tuple[int, ...], kept: int) -> None:
    store = store_of(*rooms)
    for number in range(6):
        given_block = block(number)
        store.put(number, given_block)
        given_block["x"].zero_()  # what is kept is a copy
    assert sum(assert_kept(store, number) for number in range(6)) == kept
    assert sum(assert_kept(store, number) for number in reversed(range(6))) == kept


def test_a_block_in_use_stays_where_it_is_while_others_come() -> None:
    store = store_of(1, 1)
    store.put(0, block(0))
    with store.use(0) as held:
        assert held is not None
        address = held["x"].data_ptr()
        for number in range(1, 5):
            store.put(number, block(number))
        assert held["x"].data_ptr() == address
        assert torch.equal(held["x"], block(0)["x"])
    assert assert_kept(store, 0)


def test_threads_may_use_one_store() -> None:
    store = store_of(3, 4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        try:
            for _ in range(200):
                number = int(torch.randint(10, (), generator=random))
                if not assert_kept(store, number):
                    store.put(number, block(number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_tier_without_room_is_used_as_far_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def full(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:  # two blocks of two tensors
            raise OSError(28, "No space left on device")
        return torch.empty(shape, dtype=dtype)

    store = TieredStore([(10 * SIZE, full)])
    for number in range(5):
        store.put(number, block(number))
    assert [assert_kept(store, number) for number in range(5)] == [True, True, False, False, False]
    assert "No space left on device" in caplog.text


# ---- disk ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    return tmp_path


def test_tensors_on_disk_have_no_name_and_hold_no_descriptor(local: Path) -> None:
    before = os.listdir("/proc/self/fd")
    allocate = _allocator("disk", None)
    tensor = allocate((1000, 3), torch.float32)
    tensor.copy_(torch.arange(3000).reshape(1000, 3))
    assert list(local.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert str(local) in Path("/proc/self/maps").read_text()
    assert float(tensor.sum()) == 2999 * 3000 / 2
    del tensor
    assert str(local) not in Path("/proc/self/maps").read_text()
    assert allocate((0, 3), torch.int64).shape == (0, 3)


def test_a_disk_without_room_is_an_error_before_the_first_write(local: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large"):
        _allocator("disk", None)((1 << 45,), torch.uint8)


# ---- a rank's cache --------------------------------------------------------------------------------------------------
def test_room_is_reserved_and_given_back() -> None:
    cache = Cache(CachePlan((("memory", 100),), True, "all"))
    assert cache.reserve(80) is not None
    assert cache.reserve(80) is None
    cache.release(80)
    assert cache.reserve(80) is not None
    assert cache.store is None


def test_where_memory_is_short_the_next_tier_is_used(caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(CachePlan((("memory", 100), ("disk", 200)), True, "all"))
    cache.shrink(MemoryError("no more"))
    assert cache.reserve(150) is not None
    cache.shrink(OSError("no more"))
    assert cache.reserve(1) is None
    assert "does not get the room" in caplog.text


def test_rows_that_do_not_fit_anywhere_whole_are_kept_in_blocks() -> None:
    cache = Cache(plan_cache("auto", 5000 * MIB, ON_CPU))
    assert cache.store is not None
    assert cache.reserve(1) is None
    assert cache.store.policy.room == [100 * MIB, 1000 * MIB]
