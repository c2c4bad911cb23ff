"""Moving data between ranks: weights and rows to all of them, rows to the rank that is to have them.

Every function is a collective of ``group`` (None: the default one): all its ranks call it, in the same order, and the
ranks in arguments and results are those of the group. The ranks first compare what they were given, 32 bytes each, so
that a mismatch is an error on all of them and not a hang. Nothing is pickled: tensors travel as their bytes, whatever
their dtype, and text as JSON. What waits for a peer waits as long as the group's own timeout.

`agree` and what gathers or exchanges bytes is there for `sparkdl.io.reshuffle` and `sparkdl.io.statistics` too.
"""

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sparkdl.errors import ConfigError

__all__ = [
    "Group",
    "Rows",
    "agree",
    "all_gather_rows",
    "all_to_all",
    "broadcast",
    "broadcast_state",
    "chain_broadcast",
    "chain_order",
    "exchange_rows",
    "fault_of_size",
    "forms_of_fields",
    "gather_numbers",
    "gather_rows",
    "gather_texts",
]

Group = dist.ProcessGroup | None
Int64 = NDArray[np.int64]
Rows = dict[str, Tensor]
"""Fields of as many rows each: tensors of shape (rows, ...)."""

BUCKET_BYTES = 32 << 20
"""Size of a message of the flat broadcast, and of what one round of an exchange sends or receives."""

CHUNK_BYTES = 4 << 20
"""Size of a message between neighbours of a chain."""

CHAIN_BYTES = 4 << 20
"""From here on `broadcast_state` prefers the chain: measured by benchmarks/bench_exchange.py, see its results."""

STATE_CHUNK_BYTES = 1 << 20
"""Size of a message of that chain: as fast as larger ones for much data, and faster for a few MiB."""

AHEAD = 2
"""Chunks that a rank of a chain has asked for, and chunks that it is still handing on, beside the one in its hands."""


# One sender, all receive.


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], src: int = 0, *, group: Group = None) -> None:
    """Give all ranks the tensors of rank ``src``, in place; small ones share a message.

    Raises:
        ConfigError: On all ranks, where their tensors differ in number, dtype or shape.
    """
    tensors = list(tensors)
    agree("broadcast", {"src": str(src), **_shapes(tensors)}, _fault_of_src(src, group), group)
    pieces = _Pieces(tensors, BUCKET_BYTES, _device(group))
    own = dist.get_rank(group) == src
    for number in range(pieces.count):
        buffer = pieces.filled(number) if own else pieces.empty(number)
        dist.broadcast(buffer, group_src=src, group=group)
        if not own:
            pieces.put(number, buffer)
    if not own:
        pieces.close()


@torch.no_grad()
def chain_broadcast(
    tensors: Iterable[Tensor],
    src: int = 0,
    *,
    order: Sequence[int] | None = None,
    hosts: Sequence[str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    group: Group = None,
) -> None:
    """Give all ranks the tensors of rank ``src``, in place, each rank handing on what it receives.

    The segmented chain of Open MPI (``ompi_coll_base_bcast_intra_pipeline`` in ompi/mca/coll/base/coll_base_bcast.c,
    which coll/tuned calls "pipeline"): a rank receives chunk k + 1 from its predecessor while it sends chunk k to its
    successor. Every link carries the data once, so that K chunks take W ranks (K + W - 2) / K times as long as one
    link takes. gloo's own broadcast (gloo/broadcast.cc) is a binomial tree whose ranks send to all their children at
    once: d (d + 1) / 2 times as long, with d = log2(W).

    Args:
        tensors: Overwritten, except on ``src``.
        src: Rank that has the data.
        order: All ranks, ``src`` first, as they hand on; None: `chain_order` of ``hosts``.
        hosts: The host of each rank; None: one host.
        chunk_bytes: Size of one message; a rank holds up to five besides its tensors.
        group: The ranks that take part.

    Raises:
        ConfigError: On all ranks, where their arguments or the dtypes or shapes of their tensors differ.
    """
    tensors = list(tensors)
    size = dist.get_world_size(group)
    hosts = [""] * size if hosts is None else list(hosts)
    fault = _fault_of_src(src, group)
    if fault is None and len(hosts) != size:
        fault = f"{len(hosts)} hosts for {size} ranks. Give one host per rank."
    if fault is None:
        order = chain_order(hosts, src) if order is None else tuple(order)
        if sorted(order) != list(range(size)) or order[0] != src:
            fault = f"order={tuple(order)} is not that of a chain. Give each of the {size} ranks once, src={src} first."
    fault = fault or fault_of_size("chunk_bytes", chunk_bytes)
    forms = {"src": str(src), "order": str(order), "chunk_bytes": str(chunk_bytes), **_shapes(tensors)}
    agree("chain_broadcast", forms, fault, group)
    pieces = _Pieces(tensors, chunk_bytes, _device(group))
    _relay(order or (), pieces, group)
    if dist.get_rank(group) != src:
        pieces.close()


def broadcast_state(tensors: Iterable[Tensor], src: int = 0, *, hosts: Sequence[str], group: Group = None) -> None:
    """Give all ranks the tensors of rank ``src``, in place: parameters and buffers of a module, before DDP wraps it.

    By the chain where it pays, which is on gloo, with ranks on more than two hosts and from `CHAIN_BYTES` on; NCCL's
    own broadcast is a pipeline already.

    Raises:
        ConfigError: On all ranks, as in `broadcast` and `chain_broadcast`.
    """
    tensors = list(tensors)
    large = sum(tensor.nbytes for tensor in tensors) >= CHAIN_BYTES
    if large and len(set(hosts)) > 2 and _device(group).type == "cpu":
        chain_broadcast(tensors, src, hosts=hosts, chunk_bytes=STATE_CHUNK_BYTES, group=group)
    else:
        broadcast(tensors, src, group=group)


def chain_order(hosts: Sequence[str], src: int) -> tuple[int, ...]:
    """All ranks from ``src`` on, those of one host in a row, so that the chain enters every other host once.

    Hosts come in the order of their first rank, the host of ``src`` before all others.

    Raises:
        ConfigError: There is no rank ``src``.
    """
    if not 0 <= src < len(hosts):
        raise ConfigError(f"src={src}, but there are {len(hosts)} ranks. Give one of 0 to {len(hosts) - 1}.")
    first_rank = {host: rank for rank, host in reversed(list(enumerate(hosts)))} | {hosts[src]: -1}
    return tuple(sorted(range(len(hosts)), key=lambda rank: (first_rank[hosts[rank]], rank != src, rank)))


# Rows.


def all_gather_rows(tensors: Mapping[str, Tensor], *, group: Group = None) -> Rows:
    """The rows of all ranks on every rank, in rank order; ranks may have different numbers of rows, or none.

    Raises:
        ConfigError: On all ranks, where their fields, dtypes or shapes of one row differ.
    """
    agree("all_gather_rows", forms_of_fields(tensors), _fault_of_rows(tensors), group)
    counts = gather_numbers([_num_rows(tensors)], group)[:, 0].tolist()
    return {name: gather_rows(tensors[name], counts, group) for name in sorted(tensors)}


def exchange_rows(
    rows: Mapping[str, Tensor], destination: Tensor, *, chunk_rows: int | None = None, group: Group = None
) -> Rows:
    """Send row i to rank ``destination[i]``; what arrives is ordered by source rank, then by position there.

    Args:
        rows: Fields of shape (rows, ...); no rows is fine.
        destination: Ranks, integers of shape (rows,).
        chunk_rows: How many rows a rank sends, and receives, in one round; that is all the memory it takes beside input
            and result. None: as many as `BUCKET_BYTES` hold.
        group: The ranks that take part.

    Raises:
        ConfigError: On all ranks, where fields, dtypes or shapes of one row differ between ranks, or a rank's
            destinations are not one rank of the group for each row.
    """
    fault = fault_of_size("chunk_rows", chunk_rows)
    fault = fault or _fault_of_rows(rows) or _fault_of_index("destination", destination, rows)
    size = dist.get_world_size(group)
    if fault is None and len(destination) and not 0 <= int(destination.min()) <= int(destination.max()) < size:
        low, high = int(destination.min()), int(destination.max())
        fault = f"destinations lie between {low} and {high}, but there are {size} ranks. Use 0 to {size - 1}."
    agree("exchange_rows", {"chunk_rows": str(chunk_rows), **forms_of_fields(rows)}, fault, group)
    names = sorted(rows)
    ranks = destination.cpu().numpy().astype(np.int64)
    return dict(zip(names, _exchange([rows[name] for name in names], ranks, chunk_rows, group), strict=True))


# What the ranks were given, and whether it fits.


def agree(call: str, forms: Mapping[str, str], fault: str | None, group: Group) -> None:
    """Raise on all ranks where one has a fault, or another form of anything than most have; else return on all.

    Args:
        call: What the ranks have called, for the message.
        forms: What must be the same on all ranks: text by its label.
        fault: What is wrong with what this rank was given; None: nothing.
        group: The ranks that take part.

    Raises:
        ConfigError: On all ranks: with the fault of the first rank that has one, or with the first label that differs.
    """
    text = json.dumps([fault, forms], sort_keys=True)
    digests = gather_numbers(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int64).tolist(), group)
    if fault is None and bool((digests == digests[0]).all()):
        return
    texts = gather_texts(text, group)
    accounts = [json.loads(text) for text in texts]
    for rank, (found, _) in enumerate(accounts):
        if found is not None:
            raise ConfigError(f"{call}: rank {rank}: {found}")
    usual = texts.index(Counter(texts).most_common(1)[0][0])
    odd = next(rank for rank, text in enumerate(texts) if text != texts[usual])
    theirs, ours = accounts[odd][1], accounts[usual][1]
    label = next(label for label in [*ours, *theirs] if ours.get(label) != theirs.get(label))
    raise ConfigError(
        f"{call}: {label} is {theirs.get(label, 'missing')} on rank {odd}, but {ours.get(label, 'missing')} on rank "
        f"{usual}. All ranks must call it with the same."
    )


def _form(rows: Tensor) -> str:
    return f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape[1:])}"


def forms_of_fields(rows: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype of each field and the shape of one row of it, as `agree` compares them."""
    return {f"field {name!r}": _form(tensor) for name, tensor in rows.items()}


def _shapes(tensors: Sequence[Tensor]) -> dict[str, str]:
    return {f"tensor {number}": _form(tensor[None]) for number, tensor in enumerate(tensors)}


def _fault_of_src(src: int, group: Group) -> str | None:
    size = dist.get_world_size(group)
    return None if 0 <= src < size else f"src={src}, but there are {size} ranks. Give one of 0 to {size - 1}."


def fault_of_size(name: str, value: int | None) -> str | None:
    """What is wrong with a size: it is below 1."""
    return None if value is None or value > 0 else f"{name}={value}. Give at least 1."


def _fault_of_rows(rows: Mapping[str, Tensor]) -> str | None:
    lengths = {name: len(tensor) if tensor.dim() else None for name, tensor in rows.items()}
    if len(set(lengths.values())) <= 1 and None not in lengths.values():
        return None
    return f"its fields have rows {lengths}. Give all fields the same number of rows."


def _fault_of_index(name: str, index: Tensor, rows: Mapping[str, Tensor]) -> str | None:
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if whole and index.dim() == 1 and (not rows or len(index) == _num_rows(rows)):
        return None
    shape = f"{str(index.dtype).removeprefix('torch.')} {tuple(index.shape)}"
    return f"{name} is {shape} for {_num_rows(rows)} rows. Give one integer per row."


# Below: bytes.


class _Pieces:
    """The bytes of many tensors one after another, cut into pieces of one size."""

    def __init__(self, tensors: Sequence[Tensor], piece_bytes: int, device: torch.device) -> None:
        self._device = device
        self._copies = [(tensor, tensor.contiguous()) for tensor in tensors if not tensor.is_contiguous()]
        copies = {id(tensor): copy for tensor, copy in self._copies}
        self._pieces: list[list[Tensor]] = []
        room = 0
        for tensor in tensors:
            rest = copies.get(id(tensor), tensor).detach().view(-1).view(torch.uint8)
            while rest.numel():
                if not room:
                    self._pieces.append([])
                    room = piece_bytes
                part, rest = rest[:room], rest[room:]
                self._pieces[-1].append(part)
                room -= part.numel()

    @property
    def count(self) -> int:
        return len(self._pieces)

    def empty(self, number: int) -> Tensor:
        """What piece ``number`` is received into: the tensor itself where it can be."""
        parts = self._pieces[number]
        if len(parts) == 1 and parts[0].device == self._device:
            return parts[0]
        return torch.empty(sum(part.numel() for part in parts), dtype=torch.uint8, device=self._device)

    def filled(self, number: int) -> Tensor:
        """Piece ``number`` to send."""
        buffer = self.empty(number)
        start = 0
        for part in self._pieces[number]:
            if buffer is not part:
                buffer[start : start + part.numel()] = part
            start += part.numel()
        return buffer

    def put(self, number: int, buffer: Tensor) -> None:
        """Take piece ``number`` over from what was received."""
        start = 0
        for part in self._pieces[number]:
            if buffer is not part:
                part.copy_(buffer[start : start + part.numel()])
            start += part.numel()

    def close(self) -> None:
        """Write what was received into tensors that are not contiguous."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)


def _relay(order: Sequence[int], pieces: _Pieces, group: Group) -> None:
    """Hand the pieces of the first rank of ``order`` along it."""
    place = order.index(dist.get_rank(group))
    receiving: deque[tuple[Tensor, Any]] = deque()
    sending: deque[Any] = deque()
    asked = 0
    for number in range(pieces.count):
        if place:
            while asked < min(pieces.count, number + AHEAD):
                buffer = pieces.empty(asked)
                receiving.append((buffer, dist.irecv(buffer, group=group, group_src=order[place - 1])))
                asked += 1
            buffer, work = receiving.popleft()
            work.wait()
        else:
            buffer = pieces.filled(number)
        if place + 1 < len(order):
            sending.append(dist.isend(buffer, group=group, group_dst=order[place + 1]))
            if len(sending) > AHEAD:
                sending.popleft().wait()
        if place:
            pieces.put(number, buffer)
    for work in sending:
        work.wait()


def _exchange(columns: Sequence[Tensor], ranks: Int64, chunk_rows: int | None, group: Group) -> list[Tensor]:
    """Row i of every column goes to ``ranks[i]``; see `exchange_rows`."""
    columns = [column.detach().contiguous() for column in columns]
    size = dist.get_world_size(group)
    order = np.argsort(ranks, kind="stable")
    table = gather_numbers(np.bincount(ranks, minlength=size).tolist(), group).numpy()  # [source, destination]
    sent, received = table[dist.get_rank(group)], table[:, dist.get_rank(group)]
    first_sent, first_received = np.cumsum(sent) - sent, np.cumsum(received) - received
    width = sum(_bytes(column).shape[1] for column in columns)
    most = int(table.max()) if width else 0
    quota = max((chunk_rows or BUCKET_BYTES // max(width, 1)) // size, 1)  # rows per round from one rank to another
    results = [column.new_empty((int(received.sum()), *column.shape[1:])) for column in columns]
    for done in range(0, most, quota):
        outgoing, incoming = (np.clip(rows - done, 0, quota).tolist() for rows in (sent, received))
        spans = zip(first_sent + done, outgoing, strict=True)
        picked = torch.from_numpy(np.concatenate([order[start : start + rows] for start, rows in spans]))
        packed = torch.cat([_bytes(column)[picked.to(column.device)].to(_device(group)) for column in columns], 1)
        arrived = all_to_all(packed, outgoing, incoming, group)
        for start, part in zip(first_received + done, arrived.split(incoming), strict=True):
            begin = 0
            for result in results:
                values = _bytes(result)
                values[start : start + len(part)] = part[:, begin : begin + values.shape[1]].to(values.device)
                begin += values.shape[1]
    return results


def all_to_all(data: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Rows of bytes to and from every rank r, ``sent[r]`` and ``received[r]`` of them, in rank order.

    Args:
        data: uint8 of shape (rows, bytes of one row), as is the result, which lies where tensors travel from.
        sent: Rows to each rank.
        received: Rows from each rank.
        group: The ranks that take part.
    """
    device = _device(group)
    result = torch.empty((sum(received), data.shape[1]), dtype=torch.uint8, device=device)
    dist.all_to_all_single(result, data.to(device), received, sent, group=group)
    return result


def gather_rows(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, ``counts[r]`` of rank r; without padding, so the result is all the memory it takes."""
    result = torch.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype, device=_device(group))
    works = []
    for rank, part in enumerate(result.split(list(counts))):
        if rank == dist.get_rank(group):
            part.copy_(rows.detach())
        if part.numel():
            works.append(dist.broadcast(_bytes(part), group_src=rank, group=group, async_op=True))
    for work in works:
        work.wait()
    return result.to(rows.device)


def gather_texts(text: str, group: Group) -> list[str]:
    """The texts of all ranks, in rank order."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    counts = gather_numbers([len(data)], group)[:, 0].tolist()
    return [part.numpy().tobytes().decode() for part in gather_rows(data, counts, group).split(counts)]


def gather_numbers(numbers: Sequence[int], group: Group) -> Tensor:
    """The numbers of all ranks, as many of each: int64 of shape (ranks, numbers), on the CPU."""
    own = torch.tensor(numbers, dtype=torch.int64, device=_device(group))
    each = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, own, group=group)
    return torch.stack(each).cpu()


def _bytes(rows: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 of shape (rows, bytes of one row)."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _num_rows(rows: Mapping[str, Tensor]) -> int:
    return next((len(tensor) for tensor in rows.values() if tensor.dim()), 0)


def _device(group: Group) -> torch.device:
    """Where tensors must lie to travel."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
