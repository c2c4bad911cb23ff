"""The states of all ranks on rank 0, in three processes; groups of some ranks; and ranks that cannot take part."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparkdl.errors import CheckpointError, ConfigError
from sparkdl.parallel import rank_states
from sparkdl.parallel.rank_states import gather_states, own_state
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

ALL_BUT_ONE = (0, 2)


def state_of_rank(rank: int) -> dict[str, Any]:
    """A state of its own for every rank: types, strides and sizes that need care."""
    random = torch.Generator().manual_seed(rank)
    flags = torch.tensor([True, False, True][: rank + 1])
    state: dict[str, Any] = {
        "flags": flags,
        "wide": torch.randn(3, 4, generator=random, dtype=torch.float64).t(),
        "scalar": torch.tensor(rank, dtype=torch.int64),
        "half": torch.randn(5, generator=random).bfloat16(),
        "complex": torch.randn(2, generator=random, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.randn(7 * rank, generator=random)),
        "nothing": torch.empty(0, 3),
        "counts": {0: {"step": float("nan"), "flag": True}, 1: (rank, "ränk", None)},
        "large": torch.arange(1000, dtype=torch.int32) + rank,
    }
    state["tied"] = state["wide"]
    return state if rank != 1 else {"other": [state["large"][::2]]}


def equal(left: Any, right: Any) -> bool:
    """Whether two states hold the same, types and all."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and (left == right or left != left)


def gather_all() -> dict[str, Any]:
    """What a rank found, as plain values."""
    rank = dist.get_rank()
    own = state_of_rank(rank)
    found: dict[str, Any] = {}
    states = gather_states(own)
    rank_states._PIECE, usual = 700, rank_states._PIECE  # many messages, and tensors across their borders
    in_pieces = gather_states(own)
    rank_states._PIECE = usual
    if rank == 0:
        assert states is not None
        assert in_pieces is not None
        expected = [state_of_rank(number) for number in range(3)]
        found["equal"] = [equal(one, other) for one, other in zip(states, expected, strict=True)]
        found["in pieces"] = [equal(one, other) for one, other in zip(in_pieces, expected, strict=True)]
        found["tied"] = [states[number]["tied"] is states[number]["wide"] for number in ALL_BUT_ONE]
        own["wide"].zero_()
        found["copied"] = equal(states[0], expected[0])
    found["is none"] = states is None
    group = dist.new_group(list(ALL_BUT_ONE))
    if rank in ALL_BUT_ONE:
        some = gather_states({"rank": rank}, group)
        found["group"] = some
        found["own of group"] = own_state(["first", "second"], "local_sgd", group)
    found["own"] = own_state(["a", "b", "c"], "local_sgd")
    for name, wrong in (("refused", 1), ("all refused", None)):
        try:
            gather_states({"hook": print} if wrong in (rank, None) else own)
        except CheckpointError as error:
            found[name] = str(error)
    try:
        own_state(["a", "b"], "local_sgd")
    except ConfigError as error:
        found["too few"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(torchrun: Torchrun) -> list[dict[str, Any]]:
    return torchrun(gather_all, 3)


def test_rank_0_has_what_every_rank_gave(found: list[dict[str, Any]]) -> None:
    assert found[0]["equal"] == [True] * 3
    assert found[0]["in pieces"] == [True] * 3
    assert found[0]["copied"], "its own state is copied as well"
    assert found[0]["tied"] == [True, True]
    assert [one["is none"] for one in found] == [False, True, True]


def test_a_group_of_some_ranks_counts_its_own(found: list[dict[str, Any]]) -> None:
    assert found[0]["group"] == [{"rank": 0}, {"rank": 2}]
    assert found[2]["group"] is None
    assert [one["own"] for one in found] == ["a", "b", "c"]
    assert [found[rank]["own of group"] for rank in ALL_BUT_ONE] == ["first", "second"]


def test_all_ranks_raise_where_one_has_what_cannot_be_stored(found: list[dict[str, Any]]) -> None:
    for one in found:
        with pytest.raises(CheckpointError, match="The state of rank 1 cannot be stored: hook is a builtin"):
            raise CheckpointError(one["refused"])
        assert "The state of rank 0 cannot be stored" in one["all refused"]


def test_states_of_another_number_of_ranks_are_refused(found: list[dict[str, Any]]) -> None:
    with pytest.raises(
        ConfigError, match="cannot go on with 3 ranks from this checkpoint, which holds the states of 2"
    ):
        raise ConfigError(found[1]["too few"])
