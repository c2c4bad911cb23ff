"""Means of tensors over ranks: of all by an all-reduce, or of neighbours in a ring, point to point.

Tensors travel together in messages of some MiB, half precision as float32, so that no bits are lost in the sum.
Integers, such as BatchNorm's count of batches, have no mean: the largest stands for them.

`torch.distributed.algorithms.model_averaging` averages too, but counts all ranks alike, and only parameters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "average_over_ranks",
    "average_states",
    "average_with_neighbours",
    "neighbours_of",
    "shares_of",
    "wide",
]

_MESSAGE = 32 << 20  # bytes; a larger tensor is a message by itself


def wide(tensor: Tensor) -> Tensor:
    """The values in the type in which they are added up; itself where it has that type."""
    return tensor.to(_wide_type(tensor.dtype))


def shares_of(counts: Sequence[float]) -> list[float]:
    """The part of the whole that each count is; equal parts where all are 0."""
    total = math.fsum(counts)
    return [count / total for count in counts] if total else [1 / len(counts)] * len(counts)


@torch.no_grad()
def average_over_ranks(sources: Sequence[Tensor], targets: Sequence[Tensor], share: float) -> None:
    """Write the means of all ranks' sources, weighted by their shares, to the targets; a collective.

    All ranks get the same bits.

    Args:
        sources: Dense tensors, of the same shapes and types on all ranks.
        targets: Of the same shapes; may be the sources.
        share: The weight of this rank; those of all ranks add up to 1.
    """
    for numbers in _messages(sources):
        packed = _packed([sources[number] for number in numbers])
        if packed.is_floating_point():
            dist.all_reduce(packed.mul_(share))
        else:
            dist.all_reduce(packed, dist.ReduceOp.MAX)
        _unpack(packed, [targets[number] for number in numbers])


def neighbours_of(rank: int, size: int) -> list[int]:
    """The ranks before and after one in a ring; two ranks have one neighbour, a single one has none."""
    return list(dict.fromkeys(other % size for other in (rank - 1, rank + 1) if other % size != rank))


@torch.no_grad()
def average_with_neighbours(values: Sequence[Tensor], neighbours: Sequence[int]) -> None:
    """Replace tensors by their means over this rank and its neighbours, who do the same; waits for these alone.

    Args:
        values: Dense tensors, of the same shapes and types on all ranks.
        neighbours: Of `neighbours_of`.
    """
    for numbers in _messages(values) if neighbours else ():
        message = [values[number] for number in numbers]
        own = _packed(message)
        received = [torch.empty_like(own) for _ in neighbours]
        asked = [dist.P2POp(dist.isend, own, other) for other in neighbours]
        asked += [dist.P2POp(dist.irecv, into, other) for into, other in zip(received, neighbours, strict=True)]
        for work in dist.batch_isend_irecv(asked):
            work.wait()
        met = torch.stack([own, *received])
        _unpack(met.mean(0) if met.is_floating_point() else met.amax(0), message)


def average_states(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The means of tensors by name, in their types; of a single state the state itself.

    Args:
        states: One per rank, with the same names.
        shares: Their weights, which add up to 1.
    """
    if len(states) == 1:
        return dict(states[0])
    means = {}
    for name, first in states[0].items():
        values = torch.stack([wide(state[name]) for state in states])
        if first.is_floating_point() or first.is_complex():
            weights = torch.tensor(shares, dtype=torch.float64).to(values.dtype)
            means[name] = torch.tensordot(weights, values, 1).to(first.dtype)
        else:
            means[name] = values.amax(0).to(first.dtype)
    return means


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex or dtype == torch.float64:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of the tensors that travel together: of one type, in order."""
    by_type: dict[torch.dtype, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_type.setdefault(_wide_type(tensor.dtype), []).append(number)
    for numbers in by_type.values():
        message: list[int] = []
        size = 0
        for number in numbers:
            own = tensors[number].numel() * 8
            if message and size + own > _MESSAGE:
                yield message
                message, size = [], 0
            message.append(number)
            size += own
        yield message


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Copies of all values, one after another, as real numbers of the wide type: shape (values,)."""
    return torch.cat([_real(wide(tensor)).reshape(-1) for tensor in tensors])


def _unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    reals = [_real(tensor) for tensor in tensors]
    for real, values in zip(reals, packed.split([real.numel() for real in reals]), strict=True):
        real.copy_(values.view(real.shape))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
