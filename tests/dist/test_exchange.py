"""Exchanges between ranks: four ranks under torchrun, and groups of one and of two of them, against plain Python."""

import itertools
import re
import resource
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sparkdl.errors import ConfigError
from sparkdl.io.exchange import (
    CHAIN_BYTES,
    all_gather_rows,
    broadcast,
    broadcast_state,
    chain_broadcast,
    chain_order,
    exchange_rows,
)
from sparkdl.io.reshuffle import reshuffle
from sparkdl.io.statistics import global_moments, global_vocabulary
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

SIZES = (1, 2, 4)
# Not the first ranks of the world: ranks are those of the group.
MEMBERS = {1: [2], 2: [1, 3], 4: [0, 1, 2, 3]}
MIB = 1 << 20
ROWS = {1: (7,), 2: (0, 9), 4: (5, 0, 11, 2)}
SHARD_ROWS = (5, 0, 3, 7, 1, 4)
OWNED = {1: [[0, 1, 2, 3, 4, 5]], 2: [[5, 0, 2], [1, 3, 4]], 4: [[0, 3], [1], [], [2, 4, 5]]}
WORDS = {1: ("abba",), 2: ("bcca", ""), 4: ("abc", "", "ccd", "ädd")}


# What a rank does. `group` has `size` ranks, and this is number `rank`.


def state(filled: bool) -> list[torch.Tensor]:
    """Tensors of all kinds, the same every time."""
    generator = torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator)
        return drawn if filled else torch.zeros_like(drawn)

    return [
        torch.nn.Parameter(values(7, 3)),
        values(300, 200),
        values(5).to(torch.bfloat16),
        values(4) > 0,
        (values(3) * 100).long().sum(),
        torch.complex(values(2), values(2)),
        torch.empty(0, 3),
        values(4, 6).t(),
        values(9).to(torch.float8_e4m3fn),
        *[values(2) for _ in range(50)],
    ]


def broadcasts(group: Any, rank: int, size: int) -> Any:
    src = size - 1
    hosts = ["b", "a", "b", "c"][:size]
    large = CHAIN_BYTES // 4 + 1
    done = {}
    for name, call in {
        "flat": lambda tensors: broadcast(tensors, src, group=group),
        "chain": lambda tensors: chain_broadcast(tensors, src, hosts=hosts, chunk_bytes=10_000, group=group),
        "one message": lambda tensors: chain_broadcast(tensors, src, group=group),
        "tiny chunks": lambda tensors: chain_broadcast(tensors[-3:], src, chunk_bytes=3, group=group),
        "order": lambda tensors: chain_broadcast(iter(tensors), src, order=range(size)[::-1], group=group),
        "state": lambda tensors: broadcast_state(tensors, src, hosts=hosts, group=group),
    }.items():
        tensors = state(rank == src)
        if name == "state":
            tensors.append(torch.full((large,), float(rank == src)))
        call(tensors)
        expected = [*state(True), torch.ones(large)] if name == "state" else state(True)
        if name == "tiny chunks":
            tensors, expected = tensors[-3:], expected[-3:]
        done[name] = [torch.equal(a, b) for a, b in zip(tensors, expected, strict=True)]
    return done


def messages(group: Any, rank: int, size: int) -> Any:
    """How many broadcasts and receives moved a hundred small tensors and one of 4 MiB."""
    tensors = [*[torch.full((3,), rank) for _ in range(100)], torch.empty(MIB)]
    counts = []
    for call in (
        broadcast,
        chain_broadcast,
        partial(broadcast_state, hosts="abac"),
        partial(broadcast_state, hosts="abab"),
        lambda tensors, group: broadcast_state(tensors[:-1], hosts="abac", group=group),
    ):
        with torch.autograd.profiler.profile() as profile:
            call(tensors, group=group)
        names = Counter(event.name for event in profile.function_events)
        counts.append({name: number for name, number in names.items() if name in ("gloo:broadcast", "gloo:recv")})
    return counts


def memory(group: Any, rank: int, size: int) -> Any:
    """By how many bytes large rows raised this process's peak of memory, beside what arrived."""
    rows = {"x": torch.ones(64 * MIB // 4096, 1024)}
    destination = torch.arange(len(rows["x"])) % size
    exchange_rows({"x": rows["x"][:4]}, destination[:4], group=group)  # the first one sets things up
    before = peak()
    result = exchange_rows(rows, destination, chunk_rows=256, group=group)  # 1 MiB
    return peak() - before - result["x"].nbytes


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(rank: int, count: int) -> dict[str, torch.Tensor]:
    """Rows that tell where they are from."""
    index = torch.arange(count)
    return {
        "x": (rank * 100 + index[:, None, None] + torch.arange(6).view(2, 3) / 8).to(torch.float16),
        "id": rank * 100 + index,
        "flag": index % 2 == 0,
        "none": torch.empty(count, 0),
    }


def destinations(rank: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(rank).integers(0, size, ROWS[size][rank]))


def gathered_rows(group: Any, rank: int, size: int) -> Any:
    return all_gather_rows(rows_of(rank, ROWS[size][rank]), group=group)


def exchanged_rows(group: Any, rank: int, size: int) -> Any:
    rows, destination = rows_of(rank, ROWS[size][rank]), destinations(rank, size)
    transposed = {**rows, "x": rows["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    return [
        exchange_rows(rows, destination, group=group),
        exchange_rows(rows, destination.to(torch.int32), chunk_rows=1, group=group),
        exchange_rows(transposed, destination, chunk_rows=6, group=group),
        exchange_rows({}, destination, group=group),
    ]


def shard(number: int) -> dict[str, torch.Tensor]:
    first = sum(SHARD_ROWS[:number])
    ids = torch.arange(first, first + SHARD_ROWS[number])
    return {"id": ids, "half": ids[:, None].half() / 2}


def reshuffled(group: Any, rank: int, size: int) -> Any:
    owned = OWNED[size]
    shards = {number: shard(number) for number in owned[rank]}
    return {
        (seed, epoch): reshuffle(shards, SHARD_ROWS, owned, seed=seed, epoch=epoch, chunk_rows=chunk_rows, group=group)
        for seed, epoch, chunk_rows in ((1, 0, None), (1, 1, 2), (2, 0, 5))
    } | {"nothing": reshuffle({}, [], [[] for _ in range(size)], seed=0, epoch=0, group=group)}


def vocabulary(group: Any, rank: int, size: int) -> Any:
    arrays = [pa.array([*word, None]) for word in WORDS[size][rank]]
    arrays += [pa.array(["a", "z"], pa.large_string()), pa.array(["z", None]).dictionary_encode()]
    return [global_vocabulary(arrays, max_size=number, group=group) for number in (None, 1, 2, 3, 100)]


def batches(rank: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = ROWS[size][rank]
    return list((1e6 + torch.randn(rows, 3, generator=generator)).split(4)) if rows else []


def moments(group: Any, rank: int, size: int) -> Any:
    found = [global_moments(batches(rank, size), group=group), global_moments([], group=group)]
    found.append(global_moments([torch.empty(0, 2)], group=group))
    return [(m.count, m.mean, m.variance) for m in found]


def mismatches(group: Any, rank: int, size: int) -> Any:
    """What every rank is told where rank 2 of 4 (or another one) is given something else."""
    odd = rank == 2
    x, to = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    shards = {number: shard(number) for number in OWNED[4][rank]}
    cut = {number: {name: values[1:] for name, values in rows.items()} for number, rows in shards.items()}
    renamed = {number: {f"{name}{number}": values for name, values in rows.items()} for number, rows in shards.items()}

    def shuffle(shards: Any = shards, owned: Any = OWNED[4], **changed: Any) -> Any:
        return reshuffle(shards, SHARD_ROWS, owned, **{"seed": 0, "epoch": 0, **changed})

    calls: dict[str, Callable[[], Any]] = {
        "broadcast: dtype": lambda: broadcast([x, x.double() if odd else x]),
        "broadcast: number": lambda: broadcast([x, x][: 1 if odd else 2]),
        "broadcast: src": lambda: broadcast([x], 4),
        "broadcast: two sources": lambda: broadcast([x], 1 if odd else 0),
        "chain: shape": lambda: chain_broadcast([x[:2] if odd else x]),
        "chain: src": lambda: chain_broadcast([x], -1),
        "chain: hosts": lambda: chain_broadcast([x], hosts=["a", "b"]),
        "chain: order": lambda: chain_broadcast([x], 1, order=[0, 1, 2, 3]),
        "chain: other hosts": lambda: chain_broadcast([x], hosts=["a", "b", "c", "a" if odd else "b"]),
        "chain: chunks": lambda: chain_broadcast([x], chunk_bytes=0),
        "gather: names": lambda: all_gather_rows({"y" if odd else "x": x}),
        "gather: rows": lambda: all_gather_rows({"x": x, "y": x[:1] if odd else x}),
        "gather: no rows": lambda: all_gather_rows({"x": torch.tensor(1) if odd else x}),
        "exchange: dtype": lambda: exchange_rows({"x": x.half() if odd else x}, to),
        "exchange: shape": lambda: exchange_rows({"x": x[:, :1] if odd else x}, to),
        "exchange: short": lambda: exchange_rows({"x": x}, to[1:] if odd else to),
        "exchange: float": lambda: exchange_rows({"x": x}, to.float() if odd else to),
        "exchange: rank": lambda: exchange_rows({"x": x}, to + 4 if odd else to),
        "exchange: negative": lambda: exchange_rows({"x": x}, to - 1 if odd else to),
        "exchange: chunks": lambda: exchange_rows({"x": x}, to, chunk_rows=0),
        "reshuffle: owned": lambda: shuffle(owned=[[0, 3], [1], [1], [2, 4, 5]]),
        "reshuffle: ranks": lambda: shuffle(owned=[[0, 1, 2, 3, 4, 5]]),
        "reshuffle: shards": lambda: shuffle(shards | {2: shard(2)}),
        "reshuffle: rows": lambda: shuffle(cut),
        "reshuffle: fields": lambda: shuffle(renamed),
        "reshuffle: seed": lambda: shuffle(seed=int(odd)),
        "reshuffle: chunks": lambda: shuffle(chunk_rows=-1),
        "vocabulary: type": lambda: global_vocabulary([pa.array([1]) if odd else pa.array(["a"])]),
        "vocabulary: size": lambda: global_vocabulary([pa.array(["a"])], max_size=5 + odd),
        "vocabulary: no size": lambda: global_vocabulary([pa.array(["a"])], max_size=0),
        "moments: values": lambda: global_moments([x[:, :1] if odd else x]),
        "moments: shape": lambda: global_moments([x[0] if odd else x]),
        "moments: batches": lambda: global_moments([x, x[:, :1]] if odd else [x]),
    }
    return {name: refused(call) for name, call in calls.items()}


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was wrong"


SCENARIOS = (broadcasts, gathered_rows, exchanged_rows, reshuffled, vocabulary, moments)


def everything() -> Any:
    """All of the above: what this rank got, by name and number of ranks. One start for all: it takes seconds."""
    found: dict[Any, Any] = {"memory": memory(None, dist.get_rank(), 4)}
    groups = {size: dist.new_group(MEMBERS[size]) for size in SIZES}
    for size, group in groups.items():
        if dist.get_rank() in MEMBERS[size]:
            for scenario in SCENARIOS:
                found[scenario.__name__, size] = scenario(group, dist.get_rank(group), size)
    found["messages"] = messages(None, dist.get_rank(), 4)
    found["mismatches"] = mismatches(None, dist.get_rank(), 4)
    return found


# What comes of it.


@pytest.fixture(scope="module")
def world(torchrun: Torchrun) -> list[Any]:
    return torchrun(everything, 4)


@pytest.fixture(params=SIZES, ids="{} ranks".format)
def size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def results(world: list[Any], size: int) -> Callable[[Callable[..., Any]], list[Any]]:
    """What each rank of the group got from a scenario."""
    return lambda scenario: [world[rank][scenario.__name__, size] for rank in MEMBERS[size]]


def assert_rows(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_all_ranks_have_the_tensors_of_the_source(results):
    for rank in results(broadcasts):
        for name, equal in rank.items():
            assert all(equal), (name, equal)


def test_small_tensors_share_a_message(world):
    for rank, found in enumerate(world):
        flat, chain, *_ = found["messages"]
        assert flat == {"gloo:broadcast": 1}
        assert chain == ({"gloo:recv": 2} if rank else {})  # 4 MiB and a bit


def test_the_chain_is_for_much_data_on_more_than_two_hosts(world):
    for rank, found in enumerate(world):
        *_, three_hosts, two_hosts, little = found["messages"]
        assert three_hosts == ({"gloo:recv": 5} if rank else {})  # chunks of 1 MiB
        assert two_hosts == little == {"gloo:broadcast": 1}


def test_rows_pass_in_rounds(world):
    for rank in world:
        assert rank["memory"] < 24 * MIB, "rows of 64 MiB in rounds of 1 MiB"


def test_gathered_rows_come_in_rank_order(results, size):
    expected = joined([rows_of(rank, count) for rank, count in enumerate(ROWS[size])])
    for found in results(gathered_rows):
        assert_rows(found, expected)


def test_rows_go_to_their_destination_in_order(results, size):
    sources = [(rows_of(rank, count), destinations(rank, size)) for rank, count in enumerate(ROWS[size])]
    for rank, (*found, without_fields) in enumerate(results(exchanged_rows)):
        expected = joined([{n: values[to == rank] for n, values in rows.items()} for rows, to in sources])
        for rows in found:
            assert_rows(rows, expected)
        assert without_fields == {}


def test_reshuffle_is_one_permutation_however_many_ranks_hold_the_shards(results, world):
    alone = world[MEMBERS[1][0]][reshuffled.__name__, 1]
    found = results(reshuffled)
    for draw in alone:
        assert_shards(merged(found, draw), alone[draw])


def test_reshuffle_moves_every_row_once_and_draws_anew(world):
    alone = world[MEMBERS[1][0]][reshuffled.__name__, 1]
    assert alone.pop("nothing") == {}
    orders = set()
    for shards in alone.values():
        assert [len(shards[number]["id"]) for number in range(6)] == list(SHARD_ROWS)
        order = torch.cat([shards[number]["id"] for number in range(6)])
        assert sorted(order.tolist()) == list(range(sum(SHARD_ROWS)))
        assert torch.equal(torch.cat([shards[n]["half"] for n in range(6)]), order[:, None].half() / 2)
        orders.add(tuple(order.tolist()))
    assert len(orders) == 3


def merged(ranks: list[Any], draw: Any) -> dict[int, dict[str, torch.Tensor]]:
    owned = OWNED[len(ranks)]
    if draw != "nothing":
        assert [set(rank[draw]) for rank in ranks] == [set(numbers) for numbers in owned]
    return {number: rows for rank in ranks for number, rows in rank[draw].items()}


def assert_shards(found: dict[int, Any], expected: dict[int, Any]) -> None:
    assert found.keys() == expected.keys()
    for number in expected:
        assert_rows(found[number], expected[number])


def test_the_vocabulary_is_exact(results, size):
    expected: Counter[str] = Counter()
    for words in WORDS[size]:
        expected.update([*words, "a", "z", "z"])
    ordered = tuple(sorted(expected, key=lambda word: (-expected[word], word)))
    for found in results(vocabulary):
        assert found == [ordered, ordered[:1], ordered[:2], ordered[:3], ordered]


def test_moments_are_those_of_all_rows_and_bit_equal(results, size):
    rows = torch.cat([torch.empty(0, 3), *(b for rank in range(size) for b in batches(rank, size))]).double().numpy()
    first, *others = results(moments)
    (count, mean, variance), nothing, no_rows = first
    assert count == len(rows)
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance.numpy(), rows.var(0), rtol=1e-9)
    assert [nothing[0], nothing[1].shape, no_rows[0], no_rows[1].shape] == [0, (0,), 0, (2,)]
    for other in others:
        for found, expected in zip(other, first, strict=True):
            assert found[0] == expected[0]
            assert torch.equal(found[1], expected[1])
            assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("broadcast: dtype", r"broadcast: tensor 1 is float64 \(3, 2\) on rank 2, but float32 \(3, 2\) on rank 0"),
        ("broadcast: number", r"tensor 1 is missing on rank 2, but float32 \(3, 2\) on rank 0"),
        ("broadcast: src", r"rank 0: src=4, but there are 4 ranks. Give one of 0 to 3"),
        ("broadcast: two sources", r"src is 1 on rank 2, but 0 on rank 0"),
        ("chain: shape", r"chain_broadcast: tensor 0 is float32 \(2, 2\) on rank 2, but float32 \(3, 2\) on rank 0"),
        ("chain: src", r"src=-1, but there are 4 ranks"),
        ("chain: hosts", r"2 hosts for 4 ranks. Give one host per rank"),
        ("chain: order", r"order=\(0, 1, 2, 3\) is not that of a chain. Give each of the 4 ranks once, src=1 first"),
        ("chain: other hosts", r"order is \(0, 3, 1, 2\) on rank 2, but \(0, 1, 3, 2\) on rank 0"),
        ("chain: chunks", r"chunk_bytes=0. Give at least 1"),
        ("gather: names", r"all_gather_rows: field 'x' is missing on rank 2, but float32 \(2,\) on rank 0"),
        ("gather: rows", r"rank 2: its fields have rows \{'x': 3, 'y': 1\}. Give all fields the same number"),
        ("gather: no rows", r"rank 2: its fields have rows \{'x': None\}"),
        ("exchange: dtype", r"exchange_rows: field 'x' is float16 \(2,\) on rank 2, but float32 \(2,\) on rank 0"),
        ("exchange: shape", r"field 'x' is float32 \(1,\) on rank 2, but float32 \(2,\) on rank 0"),
        ("exchange: short", r"rank 2: destination is int64 \(2,\) for 3 rows. Give one integer per row"),
        ("exchange: float", r"rank 2: destination is float32 \(3,\) for 3 rows"),
        ("exchange: rank", r"rank 2: destinations lie between 4 and 4, but there are 4 ranks. Use 0 to 3"),
        ("exchange: negative", r"rank 2: destinations lie between -1 and -1"),
        ("exchange: chunks", r"chunk_rows=0. Give at least 1"),
        ("reshuffle: owned", r"owned=.* does not deal 6 shards to 4 ranks. Deal each of them once"),
        ("reshuffle: ranks", r"owned=.* does not deal 6 shards to 4 ranks"),
        ("reshuffle: shards", r"rank 0: it has shards \[0, 2, 3\], but owns \[0, 3\]. Give it the shards that it owns"),
        ("reshuffle: rows", r"rank 0: shard 0 has 5 rows, but its fields are \{'id': \(4,\), 'half': \(4, 1\)\}"),
        ("reshuffle: fields", r"rank 0: shard 3 has .*'id3'.*, another .*'id0'.* Give all shards the same fields"),
        ("reshuffle: seed", r"reshuffle: seed is 1 on rank 2, but 0 on rank 0"),
        ("reshuffle: chunks", r"chunk_rows=-1. Give at least 1"),
        ("vocabulary: type", r"global_vocabulary: rank 2: its values are int64. Give strings"),
        ("vocabulary: size", r"max_size is 6 on rank 2, but 5 on rank 0"),
        ("vocabulary: no size", r"max_size=0. Give at least 1"),
        ("moments: values", r"global_moments: the number of values is 1 on rank 2, but 2 on rank 0"),
        ("moments: shape", r"rank 2: it has a batch of shape \(2,\). Give all batches the shape"),
        ("moments: batches", r"rank 2: it has a batch of shape \(3, 1\) after one of 2 values"),
    ],
)
def test_a_mismatch_is_told_on_all_ranks(world, name, match):
    told = {rank["mismatches"][name] for rank in world}
    assert len(told) == 1, told
    assert re.search(match, told.pop())


def test_every_mismatch_has_a_message(world):
    assert "nothing was wrong" not in world[0]["mismatches"].values()


# What needs no ranks.

hosts_and_src = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12).flatmap(
    lambda hosts: st.tuples(st.just(hosts), st.integers(0, len(hosts) - 1))
)


@given(hosts_and_src)
def test_a_chain_enters_every_host_once(case):
    hosts, src = case
    order = chain_order(hosts, src)
    assert order[0] == src
    assert sorted(order) == list(range(len(hosts)))
    visited = [hosts[rank] for rank in order]
    crossings = sum(a != b for a, b in itertools.pairwise(visited))
    assert crossings == len(set(hosts)) - 1


@pytest.mark.parametrize("src", [-1, 2])
def test_a_chain_starts_at_one_of_its_ranks(src):
    with pytest.raises(ConfigError, match=rf"src={src}, but there are 2 ranks. Give one of 0 to 1"):
        chain_order(["a", "b"], src)
