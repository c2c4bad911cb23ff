"""Collective operators on trees: four ranks under torchrun, and groups of one and of two, against plain torch."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sparkdl.barrier import Pending, all_gather, all_reduce, broadcast, reduce_scatter
from sparkdl.errors import ConfigError
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

SIZES = (1, 2, 4)
# Not the first ranks of the world: ranks are those of the group.
MEMBERS = {1: [2], 2: [1, 3], 4: [0, 1, 2, 3]}
WEIGHTS = (0.5, 0.0, 3.0, 1e6)
OPS = ("sum", "mean", "product", "min", "max")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
LARGE = (5 << 20) // 4
"""As float32, more than one message holds beside others."""


class Pair(NamedTuple):
    """As a user would group his tensors."""

    first: Any
    second: Any


@cache
def values(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values of one rank, the same every time."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randint(0, 100, shape, generator=generator)
    if dtype == torch.bool:
        return drawn % 2 == 0
    return drawn.to(dtype) if not dtype.is_floating_point else (drawn / 16 - 2).to(dtype)


def floats(rank: int) -> Any:
    """A tree of one dtype and another, of all shapes; its dict is filled in another order on every second rank."""
    leaves = {
        "weight": torch.nn.Parameter(values(rank, torch.float32, 4, 3)),
        "scalar": values(rank, torch.float64),
        "transposed": values(rank, torch.float32, 6, 4).t(),
        "empty": torch.empty(0, 3),
        "large": values(rank, torch.float32, LARGE),
        "many": [values(rank + i, torch.float32, 2) for i in range(12)],
    }
    ordered = dict(reversed(leaves.items())) if rank % 2 else leaves
    return [ordered, (Pair(values(rank, torch.float64, 5), {}),)]


def divisible(rank: int) -> dict[str, Any]:
    """Leading dimensions that 1, 2 and 4 divide."""
    return {
        "float": values(rank, torch.float32, 4, 3),
        "half": values(rank, torch.bfloat16, 8),
        "integers": values(rank, torch.int16, 12, 2) % 3,
        "empty": torch.empty(4, 0),
        "large": values(rank, torch.float32, LARGE // 4 * 4),
        "nothing": torch.empty(0, 3),
    }


# What a rank does. `group` has `size` ranks, and this is number `rank`.


def reduced(group: Any, rank: int, size: int) -> Any:
    tree = floats(rank)
    before = tree_map(torch.clone, tree)
    found = {op: all_reduce(tree, op, group=group) for op in OPS}
    same = [torch.equal(a, b) for a, b in zip(tree_leaves(tree), tree_leaves(before), strict=True)]
    # A rank of weight 0 had no rows, so that its mean is none.
    odd = tree_map(lambda leaf: torch.full_like(leaf, math.nan), tree) if WEIGHTS[rank] == 0 else tree
    return {
        **found,
        "weighted": all_reduce(odd, "mean", weight=WEIGHTS[rank], group=group),
        "unchanged": all(same),
        "plain": all(type(leaf) is Tensor and not leaf.requires_grad for leaf in tree_leaves(found["sum"])),
    }


def of_dtypes(group: Any, rank: int, size: int) -> Any:
    """By dtype and operator, one small tensor reduced."""
    found = {(dtype, op): all_reduce(values(rank, dtype, 9), op, group=group) for dtype in FLOATS for op in OPS}
    for dtype in INTEGERS:
        found |= {(dtype, op): all_reduce(values(rank, dtype, 9), op, group=group) for op in OPS if op != "mean"}
    found |= {(torch.bool, op): all_reduce(values(rank, torch.bool, 9), op, group=group) for op in ("min", "max")}
    number = torch.complex(values(rank, torch.float32, 3), values(rank + 1, torch.float32, 3)).conj()
    return found | {(torch.complex64, op): all_reduce(number, op, group=group) for op in ("sum", "mean")}


def of_extremes(group: Any, rank: int, size: int) -> Any:
    """For each source of a NaN, the least and the largest of floats with infinities and both zeros."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for src in range(size):
            row = torch.tensor([rank - 1.5, math.inf, -math.inf, -0.0, 0.0, 1e-40, 0.0], dtype=dtype)
            row[-1] = -math.nan if rank == src else rank
            found[dtype, src] = [all_reduce(row, op, group=group) for op in ("min", "max")]
    return found


def scattered(group: Any, rank: int, size: int) -> Any:
    return {op: reduce_scatter(divisible(rank), op, group=group) for op in ("sum", "product", "min", "max")} | {
        "mean": reduce_scatter(divisible(rank)["half"], "mean", group=group)
    }


def mixed(rank: int) -> Any:
    """Tensors of any dtype."""
    kinds = [*FLOATS, *INTEGERS, torch.bool]
    tree = {str(dtype): values(rank, dtype, 3, 5) for dtype in kinds}
    number = torch.complex(values(rank, torch.float32, 3), values(rank, torch.float32, 3))
    return [tree, number.conj(), Pair(floats(rank), torch.tensor(rank))]


def copied(group: Any, rank: int, size: int) -> Any:
    tree = mixed(rank)
    before = tree_map(torch.clone, tree)
    result = broadcast(tree, size - 1, group=group)
    gathered = all_gather(tree, group=group)
    lone = all_gather(torch.tensor(rank == 0), group=group), broadcast({}, group=group), all_gather([], group=group)
    same = all(torch.equal(a, b) for a, b in zip(tree_leaves(tree), tree_leaves(before), strict=True))
    return {"broadcast": result, "all_gather": gathered, "lone": lone, "unchanged": same}


def at_once(group: Any, rank: int, size: int) -> Any:
    """Many asynchronous calls, waited for in another order by every rank."""
    calls: dict[str, Callable[..., Any]] = {
        "all_reduce": partial(all_reduce, floats(rank), "mean", weight=rank + 1),
        "broadcast": partial(broadcast, mixed(rank)),
        "all_gather": partial(all_gather, mixed(rank)),
        "reduce_scatter": partial(reduce_scatter, divisible(rank), "max"),
    }
    pending = {name: call(group=group, async_op=True) for name, call in calls.items()}
    kinds = {type(one) for one in pending.values()}
    deadline = time.monotonic() + 60
    while not all(one.done() for one in pending.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    names = list(pending)[rank:] + list(pending)[:rank]
    found = {name: pending[name].wait() for name in names}
    again = all(pending[name].wait() is found[name] for name in names)
    expected = {name: call(group=group) for name, call in calls.items()}
    equal = [
        torch.equal(a, b)
        for name in names
        for a, b in zip(tree_leaves(found[name]), tree_leaves(expected[name]), strict=True)
    ]
    return kinds == {Pending} and again and all(equal)


def messages() -> Any:
    """How many reductions moved a hundred small tensors of two dtypes and a large one, and what a kept leaf weighs."""
    tree = [*[torch.full((3,), 1.0) for _ in range(100)], *[torch.ones(2, dtype=torch.int16) for _ in range(100)]]
    tree.append(torch.ones(LARGE))
    with torch.autograd.profiler.profile() as profile:
        result = all_reduce(tree)
    names = Counter(event.name for event in profile.function_events)
    return names["gloo:all_reduce"], max(leaf.untyped_storage().nbytes() for leaf in result[:100])


class Opaque(torch.nn.Module):
    """No tensor."""


def mismatches() -> Any:
    """What every rank is told where rank 2 of 4 (or each of them) is given something else."""
    rank = dist.get_rank()
    odd = rank == 2
    x, n = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "dtype": lambda: all_reduce({"a": x, "b": [x.double() if odd else x]}),
        "shape": lambda: all_gather(x[:3] if odd else x),
        "path": lambda: broadcast({"c" if odd else "b": x, "a": x}),
        "number": lambda: reduce_scatter([x, x][: 1 if odd else 2]),
        "call": lambda: all_gather(x) if odd else all_reduce(x),
        "op": lambda: all_reduce(x, "max" if odd else "min"),
        "unknown op": lambda: all_reduce(x, "average"),  # type: ignore[call-overload]
        "src": lambda: broadcast(x, 4),
        "two sources": lambda: broadcast(x, int(odd)),
        "weights of some": lambda: all_reduce(x, "mean", weight=None if odd else 1.0),
        "weight of a sum": lambda: all_reduce(x, weight=2.0),
        "negative weight": lambda: all_reduce(x, "mean", weight=-1.0 if odd else 1.0),
        "weight is none": lambda: all_reduce(x, "mean", weight=math.nan if odd else 1.0),
        "no weights": lambda: all_reduce(x, "mean", weight=0.0, async_op=True),
        "division": lambda: reduce_scatter({"a": x, "b": torch.zeros(6, 4)}),
        "no dimension": lambda: reduce_scatter(torch.tensor(1.0), async_op=True),
        "mean of integers": lambda: all_reduce({"n": n}, "mean"),
        "sum of booleans": lambda: all_reduce(x > 0),
        "complex product": lambda: reduce_scatter(torch.complex(x, x), "product"),
        "uint64": lambda: all_reduce(n.to(torch.uint64)),
        "none": lambda: all_reduce([x, None if odd else x]),
        "number as leaf": lambda: all_reduce({"loss": 3.0}),
        "module": lambda: broadcast(Opaque() if odd else x),
        "sparse": lambda: all_gather([x.to_sparse()]),
        "distributed": lambda: all_gather(local_part(x)),
    }
    return {name: refused(call) for name, call in calls.items()}


def local_part(x: Tensor) -> Tensor:
    """A DTensor of one rank, made of this one's values."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    return DTensor.from_local(x, init_device_mesh("cpu", (4,)), [Replicate()])


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was wrong"


SCENARIOS = (reduced, of_dtypes, of_extremes, scattered, copied, at_once)


def everything() -> Any:
    """All of the above: what this rank got, by name and number of ranks. One start for all: it takes seconds."""
    found: dict[Any, Any] = {}
    groups = {size: dist.new_group(MEMBERS[size]) for size in SIZES}
    for size, group in groups.items():
        if dist.get_rank() in MEMBERS[size]:
            for scenario in SCENARIOS:
                result = scenario(group, dist.get_rank(group), size)
                found[scenario.__name__, size] = result if isinstance(result, bool) else plain(result)
    return found | {"messages": messages(), "mismatches": mismatches()}


def plain(tree: Any) -> Any:
    """Lists and tuples by their type's name, and of large tensors the head and the sum: small, and safe to load."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [plain(value) for value in tree]}
    if isinstance(tree, Tensor) and tree.numel() > 1000:
        return [tree.shape[0], tree[:9].clone(), tree.double().sum()]
    return tree.detach() if isinstance(tree, Tensor) else tree


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


def assert_equal(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Same structure, dtypes and shapes, and values to a relative tolerance; NaN equals NaN."""
    torch.testing.assert_close(found, plain(expected), rtol=tolerance, atol=tolerance / 100, equal_nan=True)


def reference(leaves: tuple[Tensor, ...], op: str) -> Tensor:
    """What plain torch says of the leaves of all ranks: in 64 bits, then in their own dtype."""
    dtype = leaves[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    stacked = torch.stack([leaf.detach().to(torch.complex128 if dtype.is_complex else wide) for leaf in leaves])
    calls: dict[str, Callable[[], Tensor]] = {
        "sum": lambda: stacked.sum(0),
        "mean": lambda: stacked.mean(0),
        "product": lambda: stacked.prod(0),
        "min": lambda: stacked.amin(0),
        "max": lambda: stacked.amax(0),
    }
    return calls[op]().to(dtype)


def by_leaf(trees: list[Any], call: Callable[..., Tensor]) -> Any:
    """The tree of what ``call`` makes of the trees' leaves at the same place, in the order of the first."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: by_leaf([tree[key] for tree in trees], call) for key in first}
    if isinstance(first, list | tuple):
        parts = [by_leaf(list(parts), call) for parts in zip(*trees, strict=True)]
        return Pair(*parts) if isinstance(first, Pair) else type(first)(parts)
    return call(tuple(trees))


@pytest.mark.parametrize("op", OPS)
def test_a_tree_is_reduced_leaf_by_leaf(results, size, op):
    expected = by_leaf([floats(rank) for rank in range(size)], partial(reference, op=op))
    for found in results(reduced):
        assert_equal(found[op], expected, 1e-6)
        assert found["unchanged"]
        assert found["plain"]


def test_all_ranks_get_the_same_bits(results):
    first, *others = results(reduced)
    for other in others:
        torch.testing.assert_close(other["weighted"], first["weighted"], rtol=0, atol=0)


def test_each_rank_keeps_its_own_order_of_keys(results):
    for rank, found in enumerate(results(reduced)):
        assert list(found["sum"]["list"][0]) == list(floats(rank)[0])


def test_a_weighted_mean_is_that_of_the_weights(results, size):
    def mean(leaves: tuple[Tensor, ...]) -> Tensor:
        pairs = [(leaf.detach().double(), w) for leaf, w in zip(leaves, WEIGHTS, strict=False) if w]
        return (sum(leaf * w for leaf, w in pairs) / sum(w for _, w in pairs)).to(leaves[0].dtype)

    expected = by_leaf([floats(rank) for rank in range(size)], mean)
    for found in results(reduced):
        assert_equal(found["weighted"], expected, 1e-6)


def test_every_dtype_is_reduced_as_torch_would(results, size):
    for found in results(of_dtypes):
        for (dtype, op), result in found.items():
            if dtype == torch.complex64:
                leaves = [
                    torch.complex(values(r, torch.float32, 3), -values(r + 1, torch.float32, 3)) for r in range(size)
                ]
            else:
                leaves = [values(rank, dtype, 9) for rank in range(size)]
            # Rounded once, to the bit: 32 bits hold these sums exactly, but not the products of four floats.
            close = op in ("product", "mean") and dtype.itemsize >= 4
            torch.testing.assert_close(
                result.float() if dtype == torch.float8_e4m3fn else result,
                reference(tuple(leaves), op).float() if dtype == torch.float8_e4m3fn else reference(tuple(leaves), op),
                rtol=1e-6 if close else 0,
                atol=1e-6 if close and dtype.is_floating_point else 0,
                equal_nan=True,
                msg=lambda text, dtype=dtype, op=op: f"{op} of {dtype}: {text}",
            )


def test_a_nan_of_any_rank_is_seen_by_min_and_max(results, size):
    for found in results(of_extremes):
        for (dtype, _), extremes in found.items():
            least, largest = extremes["list"]
            tiny = torch.tensor(1e-40, dtype=dtype).item()
            assert least.tolist()[:-1] == [-1.5, math.inf, -math.inf, 0.0, 0.0, tiny]
            assert largest.tolist()[:-1] == [size - 2.5, math.inf, -math.inf, 0.0, 0.0, tiny]
            assert math.isnan(least[-1])
            assert math.isnan(largest[-1])


@pytest.mark.parametrize("op", ["sum", "product", "min", "max"])
def test_every_rank_gets_its_part(results, size, op):
    whole = by_leaf([divisible(rank) for rank in range(size)], partial(reference, op=op))
    for rank, found in enumerate(results(scattered)):
        assert_equal(found[op], {name: leaf.chunk(size)[rank] for name, leaf in whole.items()}, 1e-6)


def test_the_parts_of_a_mean(results, size):
    whole = reference(tuple(divisible(rank)["half"] for rank in range(size)), "mean")
    assert torch.equal(torch.cat([found["mean"] for found in results(scattered)]), whole)


def test_what_is_copied_is_equal_to_the_bit(results, size):
    trees = [mixed(rank) for rank in range(size)]
    for rank, found in enumerate(results(copied)):
        own = [by_leaf([trees[rank], tree], lambda leaves: leaves[1]) for tree in trees]
        assert_equal(found["broadcast"], own[-1])
        assert_equal(found["all_gather"], own)
        assert found["unchanged"]
        flags = [torch.tensor(source == 0) for source in range(size)]
        assert_equal(found["lone"], (flags, {}, [[]] * size))


def test_asynchronous_calls_give_the_same(results):
    assert all(results(at_once))


def test_small_leaves_of_one_dtype_share_a_message_and_let_go_of_it(world):
    for found in world:
        assert found["messages"] == (3, 12)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "dtype",
            r"^all_reduce: the leaf at \['b'\]\[0\] is float64 \(4, 2\) on rank 2, but float32 \(4, 2\) on rank 0",
        ),
        (
            "shape",
            r"^all_gather: the tensor is float32 \(3, 2\) on rank 2, but float32 \(4, 2\) on rank 0. All ranks must",
        ),
        ("path", r"^broadcast: the leaf at \['b'\] is missing on rank 2, but float32 \(4, 2\) on rank 0"),
        ("number", r"^reduce_scatter: the leaf at \[1\] is missing on rank 2, but float32"),
        ("op", r"op is max on rank 2, but min on rank 0"),
        ("unknown op", r"rank 0: op='average' is none of 'sum', 'mean', 'product', 'min', 'max'. Use one of them"),
        ("src", r"rank 0: src=4, but there are 4 ranks. Give one of 0 to 3"),
        ("two sources", r"src is 1 on rank 2, but 0 on rank 0"),
        ("weights of some", r"weight is none on rank 2, but given on rank 0"),
        (
            "weight of a sum",
            r"weight=2.0 with op='sum'. Weights make a weighted mean: use op='mean', or leave weight out",
        ),
        ("negative weight", r"rank 2: weight=-1.0. Give a finite number of at least 0"),
        ("weight is none", r"rank 2: weight=nan. Give a finite number"),
        ("no weights", r"the weights of all 4 ranks are 0, so that there is no mean. Give at least one rank a weight"),
        (
            "division",
            r"the leaf at \['b'\] has shape \(6, 4\), whose leading .* among 4 ranks. Pad it to a multiple of 4",
        ),
        ("no dimension", r"the tensor has shape \(\), whose leading dimension cannot be divided"),
        ("mean of integers", r"there is no mean of int64. Convert it to floats first, with .float\(\) or .double\(\)"),
        ("sum of booleans", r"the sum of bool is not defined. Use op='min' \(all ranks\), op='max' \(any rank\), or"),
        ("complex product", r"the product of complex64 is not supported. Use op='sum' or op='mean', or real tensors"),
        ("uint64", r"uint64 cannot be reduced. Convert it to another dtype first"),
        ("none", r"rank 2: the leaf at \[1\] is None. Give tensors"),
        ("number as leaf", r"the leaf at \['loss'\] is of type float. Give tensors"),
        ("module", r"rank 2: the tensor is of type Opaque. Give tensors"),
        (
            "sparse",
            r"the leaf at \[0\] is no plain tensor \(sparse_coo\). Give dense ones: to_dense\(\), full_tensor\(\)",
        ),
        ("distributed", r"the tensor is no plain tensor \(DTensor\)"),
    ],
)
def test_a_mismatch_is_told_on_all_ranks(world, name, match):
    told = {rank["mismatches"][name] for rank in world}
    assert len(told) == 1, told
    assert re.search(match, told.pop()), world[0]["mismatches"][name]


def test_ranks_that_call_another_operator_are_told(world):
    told = [rank["mismatches"]["call"] for rank in world]
    names = ["all_reduce", "all_reduce", "all_gather", "all_reduce"]
    said = "the call is all_gather on rank 2, but all_reduce on rank 0. All ranks must call it with the same."
    assert told == [f"{name}: {said}" for name in names]


@pytest.mark.parametrize("call", [all_reduce, broadcast, all_gather, reduce_scatter])
def test_without_a_process_group_there_is_nobody_to_talk_to(call):
    with pytest.raises(
        ConfigError, match=rf"{call.__name__} needs a process group, and there is none. Call it in a func"
    ):
        call(torch.zeros(2))
