"""The states of all ranks on rank 0, which alone saves, and each rank's own out of what was saved.

For strategies whose ranks do not all hold the same. Nothing is pickled: a rank sends its tensors as bytes, and the
structure around them as JSON.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparkdl.checkpoint import flatten_state, unflatten_state
from sparkdl.errors import CheckpointError, ConfigError
from sparkdl.io.exchange import Group, gather_numbers, gather_texts

__all__ = ["gather_states", "own_state"]

_PIECE = 32 << 20  # bytes of one message


@torch.no_grad()
def gather_states(state: Any, group: Group = None) -> list[Any] | None:
    """The states of all ranks of a group on its rank 0; a collective, on gloo and on NCCL.

    The ranks send one after the other. Rank 0 holds all states on the CPU in the end, another rank no more than one
    message beside its own.

    Args:
        state: As `sparkdl.checkpoint.flatten_state` takes it. Ranks may differ in everything.
        group: The ranks that take part; None: all.

    Returns:
        On rank 0 of the group the states in the order of its ranks, all of them copies on the CPU in which tied tensors
        are still one; None on the others.

    Raises:
        CheckpointError: On all ranks, where a rank's state holds what cannot be stored.
    """
    named, structure, fault = _taken_apart(state)
    # Large types first, so that every tensor lies aligned where it arrives.
    named = dict(sorted(named.items(), key=lambda item: -item[1].element_size()))
    head = _head(named, structure)
    sizes = gather_numbers([len(head), sum(value.nbytes for value in named.values()), fault is not None], group)
    if bool(sizes[:, 2].any()):
        faults = [json.loads(text) for text in gather_texts(json.dumps(fault), group)]
        failed = int(sizes[:, 2].nonzero()[0])
        raise CheckpointError(f"The state of rank {failed} cannot be stored: {faults[failed]}")
    device = _device(group)
    if dist.get_rank(group) != 0:
        _send(head, device, group)
        for piece in _pieces(named.values()):
            _send(piece, device, group)
        return None
    own = {name: value.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, value in named.items()}
    states = [unflatten_state(own, structure)]
    for source, (head_bytes, data_bytes, _) in enumerate(sizes[1:].tolist(), 1):
        head = _receive(head_bytes, source, device, group)
        states.append(_put_together(head, _receive(data_bytes, source, device, group)))
    return states


def own_state(states: Sequence[Any], strategy: str, group: Group = None) -> Any:
    """This rank's entry of what `gather_states` returned, where nothing but its own will do.

    Args:
        states: One per rank, as rank 0 saved them.
        strategy: Its name, for the message.
        group: The ranks that took part; None: all.

    Raises:
        ConfigError: They are of another number of ranks.
    """
    found = dist.get_world_size(group)
    if len(states) != found:
        raise ConfigError(
            f"strategy={strategy!r} cannot go on with {found} ranks from this checkpoint, which holds the states of "
            f"{len(states)}: use as many ranks as wrote it."
        )
    return states[dist.get_rank(group)]


def _taken_apart(state: Any) -> tuple[dict[str, Tensor], Any, str | None]:
    """Tensors by name, the structure around them, and what is wrong with the state."""
    try:
        named, structure = flatten_state(state)
    except CheckpointError as error:
        return {}, None, str(error)
    return named, structure, None


def _head(named: Mapping[str, Tensor], structure: Any) -> Tensor:
    """What there is to know of a state besides the bytes of its tensors, as bytes."""
    forms = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in named.items()]
    return torch.frombuffer(bytearray(json.dumps([structure, forms]).encode()), dtype=torch.uint8)


def _put_together(head: Tensor, data: Tensor) -> Any:
    """The state whose tensors have these bytes."""
    structure, forms = json.loads(head.numpy().tobytes())
    named: dict[str, Tensor] = {}
    start = 0
    for name, type_name, shape in forms:
        dtype: torch.dtype = getattr(torch, type_name)
        stop = start + math.prod(shape) * dtype.itemsize
        named[name] = data[start:stop].view(dtype).view(shape)
        start = stop
    return unflatten_state(named, structure)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bytes of all tensors one after another, in messages that are all full but for the last."""
    parts: list[Tensor] = []
    room = _PIECE
    for tensor in tensors:
        rest = _bytes(tensor)
        while rest.numel():
            part, rest = rest[:room], rest[room:]
            parts.append(part)
            room -= part.numel()
            if not room:
                yield _joined(parts)
                parts, room = [], _PIECE
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _send(data: Tensor, device: torch.device, group: Group) -> None:
    for piece in data.split(_PIECE):
        dist.send(piece.to(device), group=group, group_dst=0)


def _receive(size: int, source: int, device: torch.device, group: Group) -> Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    for piece in data.split(_PIECE):
        if piece.numel():
            arrived = piece if device == piece.device else torch.empty_like(piece, device=device)
            dist.recv(arrived, group=group, group_src=source)
            if arrived is not piece:
                piece.copy_(arrived)
    return data


def _device(group: Group) -> torch.device:
    """Where tensors must lie to travel."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
