"""Moving data between ranks: weights and files to all of them, rows and counts to the rank that owns them.

Every function is a collective of ``group`` (None: the default one): all its ranks call it, in the same order, and the
ranks in arguments and results are those of the group. The ranks first compare what they were given, 32 bytes each, so
that a mismatch is an error on all of them and not a hang. Nothing is pickled: tensors travel as their bytes, whatever
their dtype, and text as JSON. What waits for a peer waits as long as the group's own timeout.
"""

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sparkdl.errors import ConfigError, DataError

__all__ = [
    "Moments",
    "all_gather_rows",
    "broadcast",
    "broadcast_state",
    "chain_broadcast",
    "chain_order",
    "count_by_key",
    "exchange_by_key",
    "exchange_rows",
    "global_moments",
    "global_vocabulary",
    "reshuffle",
    "share_file",
    "splitmix64",
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
    _agree("broadcast", {"src": str(src), **_shapes(tensors)}, _fault_of_src(src, group), group)
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
    fault = fault or _fault_of_size("chunk_bytes", chunk_bytes)
    forms = {"src": str(src), "order": str(order), "chunk_bytes": str(chunk_bytes), **_shapes(tensors)}
    _agree("chain_broadcast", forms, fault, group)
    pieces = _Pieces(tensors, chunk_bytes, _device(group))
    own = dist.get_rank(group) == src
    first, put = (pieces.filled, _leave) if own else (pieces.empty, pieces.put)
    _relay(order or (), first, put, pieces.count, group)
    if not own:
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


def share_file(
    source: BinaryIO | None,
    sink: BinaryIO | None,
    size: int,
    src: int = 0,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    group: Group = None,
) -> None:
    """Hand a file on from rank ``src`` to every other rank by a chain, a few chunks in memory at a time.

    Args:
        source: What ``src`` reads; not looked at elsewhere.
        sink: What the others write, and ``src`` too if it is not None there.
        size: Bytes of the file.
        src: Rank that has the file.
        chunk_bytes: Size of one message.
        group: The ranks that take part: one per host, where a host needs one copy.

    Raises:
        ConfigError: On all ranks, where ``src`` has no source or another rank no sink, or where sizes differ.
        DataError: On all ranks, where the source ends early; what was written is filled up with zeros.
    """
    rank = dist.get_rank(group)
    fault = _fault_of_src(src, group)
    if rank == src and source is None:
        fault = "it is to send the file and has none. Give it a source."
    elif rank != src and sink is None:
        fault = "it is to receive the file and has nothing to write it to. Give it a sink."
    fault = fault or _fault_of_size("chunk_bytes", chunk_bytes)
    _agree("share_file", {"src": str(src), "size": str(size), "chunk_bytes": str(chunk_bytes)}, fault, group)
    device = _device(group)
    have = 0

    def read(number: int) -> Tensor:
        nonlocal have
        wanted = min(chunk_bytes, size - number * chunk_bytes)
        data = bytearray(wanted)
        end = 0
        while rank == src and source is not None and end < wanted and (part := source.read(wanted - end)):
            data[end : end + len(part)] = part
            end += len(part)
        have += end
        return torch.frombuffer(data, dtype=torch.uint8).to(device)

    def write(_number: int, chunk: Tensor) -> None:
        if sink is not None:
            sink.write(chunk.cpu().numpy().data)

    order = chain_order([""] * dist.get_world_size(group), src)
    _relay(order, read, write, -(-size // chunk_bytes), group)
    found = int(_gather_numbers([have], group)[src, 0])
    if found != size:
        raise DataError(f"share_file: the file on rank {src} ended after {found} of {size} bytes. Give its true size.")


# Rows.


def all_gather_rows(tensors: Mapping[str, Tensor], *, group: Group = None) -> Rows:
    """The rows of all ranks on every rank, in rank order; ranks may have different numbers of rows, or none.

    Raises:
        ConfigError: On all ranks, where their fields, dtypes or shapes of one row differ.
    """
    _agree("all_gather_rows", _fields(tensors), _fault_of_rows(tensors), group)
    counts = _gather_numbers([_num_rows(tensors)], group)[:, 0].tolist()
    return {name: _gathered(tensors[name], counts, group) for name in sorted(tensors)}


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
    fault = _fault_of_size("chunk_rows", chunk_rows)
    fault = fault or _fault_of_rows(rows) or _fault_of_index("destination", destination, rows)
    size = dist.get_world_size(group)
    if fault is None and len(destination) and not 0 <= int(destination.min()) <= int(destination.max()) < size:
        low, high = int(destination.min()), int(destination.max())
        fault = f"destinations lie between {low} and {high}, but there are {size} ranks. Use 0 to {size - 1}."
    _agree("exchange_rows", {"chunk_rows": str(chunk_rows), **_fields(rows)}, fault, group)
    names = sorted(rows)
    ranks = destination.cpu().numpy().astype(np.int64)
    return dict(zip(names, _exchange([rows[name] for name in names], ranks, chunk_rows, group), strict=True))


def exchange_by_key(
    keys: Tensor, rows: Mapping[str, Tensor], *, chunk_rows: int | None = None, group: Group = None
) -> tuple[Tensor, Rows]:
    """Send all rows of one key to one rank, which is ``splitmix64(key) % world_size``.

    Args:
        keys: int64 of shape (rows,).
        rows: As in `exchange_rows`.
        chunk_rows: As in `exchange_rows`.
        group: The ranks that take part.

    Returns:
        The keys and the rows that arrived, ordered by source rank, then by position there.

    Raises:
        ConfigError: As in `exchange_rows`.
    """
    fault = _fault_of_size("chunk_rows", chunk_rows)
    fault = fault or _fault_of_rows(rows) or _fault_of_index("keys", keys, rows)
    _agree("exchange_by_key", {"chunk_rows": str(chunk_rows), "keys": _form(keys), **_fields(rows)}, fault, group)
    names = sorted(rows)
    hashes = splitmix64(keys.cpu().numpy().astype(np.int64))
    ranks = (hashes % np.uint64(dist.get_world_size(group))).astype(np.int64)
    keys, *columns = _exchange([keys, *(rows[name] for name in names)], ranks, chunk_rows, group)
    return keys, dict(zip(names, columns, strict=True))


def reshuffle(
    shards: Mapping[int, Mapping[str, Tensor]],
    shard_rows: Sequence[int],
    owned: Sequence[Sequence[int]],
    *,
    seed: int,
    epoch: int,
    chunk_rows: int | None = None,
    group: Group = None,
) -> dict[int, Rows]:
    """Permute the rows of all shards over all shards, whose sizes stay; which rank holds a shard makes no difference.

    Args:
        shards: This rank's shards by number.
        shard_rows: Rows of each shard, of all ranks.
        owned: The shards of each rank.
        seed: With ``epoch`` all that decides the permutation.
        epoch: See ``seed``.
        chunk_rows: As in `exchange_rows`.
        group: The ranks that take part.

    Returns:
        The same shards with other rows: a rank holds its rows up to three times for a while, and two int64 for each
        row of all shards.

    Raises:
        ConfigError: On all ranks, where a rank's shards are not those of ``owned`` and ``shard_rows``, or their fields,
            dtypes or shapes of one row differ.
    """
    rank = dist.get_rank(group)
    fault = _fault_of_size("chunk_rows", chunk_rows)
    fault = fault or _fault_of_shards(shards, shard_rows, owned, rank, dist.get_world_size(group))
    # A rank without shards learns from the others what a row is.
    layouts = {name: [str(t.dtype)[6:], *t.shape[1:]] for name, t in next(iter(shards.values()), {}).items()}
    gathered = [json.loads(text) for text in _gather_texts(json.dumps(layouts), group)]
    if not shards:
        layouts = next((layout for layout in gathered if layout), {})
    forms = {"seed": str(seed), "epoch": str(epoch), "chunk_rows": str(chunk_rows), "shard_rows": str(list(shard_rows))}
    forms["owned"] = str([list(numbers) for numbers in owned])
    _agree("reshuffle", {**forms, **{f"field {name!r}": str(layouts[name]) for name in layouts}}, fault, group)

    ends = np.cumsum(np.asarray(shard_rows, np.int64))
    owner = np.empty(len(shard_rows), np.int64)
    for holder, numbers in enumerate(owned):
        owner[list(numbers)] = holder
    total = int(ends[-1]) if len(ends) else 0
    stream = np.random.SeedSequence(seed, spawn_key=(epoch,))
    source = np.random.Generator(np.random.Philox(stream)).permutation(total)  # place j takes row source[j]
    target = np.empty(total, np.int64)
    target[source] = np.arange(total)

    mine = sorted(shards)
    sizes = [int(shard_rows[number]) for number in mine]
    own = np.concatenate([np.empty(0, np.int64), *(np.arange(ends[n] - shard_rows[n], ends[n]) for n in mine)])
    names = sorted(layouts)
    columns = []
    for name in names:
        dtype, *shape = layouts[name]
        none = torch.empty((0, *shape), dtype=getattr(torch, dtype))
        columns.append(torch.cat([shards[number][name] for number in mine]) if mine else none)
    arrived = _exchange(columns, owner[np.searchsorted(ends, target[own], side="right")], chunk_rows, group)
    # Every rank sends in the order of row numbers, so what arrived k-th is known without being sent along.
    wanted = source[own]
    arrival = np.lexsort((wanted, owner[np.searchsorted(ends, wanted, side="right")]))
    place = np.empty(len(own), np.int64)
    place[arrival] = np.arange(len(own))
    parts = torch.from_numpy(place).split(sizes)
    return {
        number: {name: rows.index_select(0, part.to(rows.device)) for name, rows in zip(names, arrived, strict=True)}
        for number, part in zip(mine, parts, strict=True)
    }


def splitmix64(values: Int64) -> NDArray[np.uint64]:
    """Mixes the bits of each value: the output function of SplitMix64.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's mixer 13.
    """
    mixed = values.astype(np.uint64, copy=False) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return hashes


# Counts and moments.


def count_by_key(local: Mapping[Any, int], *, group: Group = None) -> dict[Any, int]:
    """Counts of all ranks, summed by key: strings in alphabetical order after integers.

    Each key's partial counts are summed on the one rank that owns the key's hash, and only the sums go to all ranks.

    Raises:
        ConfigError: On all ranks, where a key is neither a string nor an integer.
    """
    owned = _owned_counts("count_by_key", local, {}, None, group)
    pairs = [pair for text in _gather_texts(json.dumps(list(owned.items())), group) for pair in json.loads(text)]
    return dict(sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0])))


def global_vocabulary(
    values: Iterable[pa.Array], *, max_size: int | None = None, group: Group = None
) -> tuple[str, ...]:
    """The strings of all ranks, the most frequent first, those of one frequency in alphabetical order; nulls left out.

    Args:
        values: Arrays of strings, dictionaries of strings included, one in memory at a time.
        max_size: How many to return at most; None: all.
        group: The ranks that take part.

    Raises:
        ConfigError: On all ranks, where a rank's values are not strings, or ``max_size`` differs or is below 1.
    """
    counts: Counter[str] = Counter()
    fault = _fault_of_size("max_size", max_size)
    for array in values if fault is None else ():
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            fault = f"its values are {array.type}. Give strings."
            break
        pairs = pc.value_counts(array)
        counts.update(dict(zip(pairs.field("values").to_pylist(), pairs.field("counts").to_pylist(), strict=True)))
    del counts[None]
    owned = _owned_counts("global_vocabulary", counts, {"max_size": str(max_size)}, fault, group)
    # Keys have one owner each: what is not among the first of its owner is not among the first of all.
    texts = _gather_texts(json.dumps(_most_frequent(owned.items(), max_size)), group)
    pairs = _most_frequent([pair for text in texts for pair in json.loads(text)], max_size)
    return tuple(key for key, _ in pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """How many rows there were, and of each value the mean and the variance (of the rows: divided by their count).

    Attributes:
        count: Rows.
        mean: float64 of shape (values,).
        variance: float64 of shape (values,).
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Those of the rows of a tensor of shape (rows, values), in float64; zeros of no rows."""
        if not len(rows):
            return cls(0, rows.new_zeros(rows.shape[1:], dtype=torch.float64), rows.new_zeros(rows.shape[1:]).double())
        variance, mean = torch.var_mean(rows.double(), 0, correction=0)
        return cls(len(rows), mean, variance)

    def merge(self, other: "Moments") -> "Moments":
        """Those of the rows of both.

        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        variance = self.variance * (1 - share) + other.variance * share + delta.square() * (share * (1 - share))
        return Moments(count, self.mean + delta * share, variance)


def global_moments(batches: Iterable[Tensor], *, group: Group = None) -> Moments:
    """Moments of the rows of all ranks, equal to the last bit on all of them.

    Every rank merges those of its batches, of shape (rows, values), and then those of all ranks in rank order.

    Raises:
        ConfigError: On all ranks, where the numbers of values differ, or a batch has not two dimensions.
    """
    own: Moments | None = None
    fault = None
    for batch in batches:
        if batch.dim() != 2 or (own is not None and len(own.mean) != batch.shape[1]):
            before = "" if own is None else f" after one of {len(own.mean)} values"
            fault = f"it has a batch of shape {tuple(batch.shape)}{before}. Give all batches the shape (rows, values)."
            break
        moments = Moments.of(batch.detach().cpu())
        own = moments if own is None else own.merge(moments)
    num_values = -1 if own is None else len(own.mean)
    widths: list[int] = _gather_numbers([num_values], group)[:, 0].tolist()
    if num_values < 0:  # no batches: as many as on the others
        num_values = next((width for width in widths if width >= 0), 0)  # no batches: takes that of the others
    _agree("global_moments", {"the number of values": str(num_values)}, fault, group)
    own = own or Moments.of(torch.empty(0, num_values))
    counts = _gather_numbers([own.count], group)[:, 0].tolist()
    each = _gathered(torch.stack([own.mean, own.variance])[None], [1] * len(counts), group)
    merged = Moments(counts[0], each[0, 0], each[0, 1])
    for count, (mean, variance) in zip(counts[1:], each[1:], strict=True):
        merged = merged.merge(Moments(count, mean, variance))
    return merged


def _most_frequent(pairs: Iterable[tuple[str, int]], number: int | None) -> list[tuple[str, int]]:
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:number]


def _owned_counts(
    call: str, local: Mapping[Any, int], forms: Mapping[str, str], fault: str | None, group: Group
) -> Counter[Any]:
    """Send every key's count to the key's owner; the sums of the keys that this rank owns."""
    for key in local:
        if not isinstance(key, str | int) or isinstance(key, bool):
            fault = f"it counts {key!r}, of {type(key).__name__}. Count strings or integers."
            break
    _agree(call, forms, fault, group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts: list[list[tuple[Any, int]]] = [[] for _ in range(size)]
    for key, count in local.items():
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "little") % size].append((key, int(count)))
    data = [json.dumps(part).encode() for part in parts]
    sent = [len(part) for part in data]
    received: list[int] = _gather_numbers(sent, group)[:, rank].tolist()
    arrived = _all_to_all(
        torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)[:, None], sent, received, group
    )
    owned: Counter[Any] = Counter()
    for part in arrived.cpu().split(received):
        for key, count in json.loads(part.numpy().tobytes()):
            owned[key] += count
    return owned


# What the ranks were given, and whether it fits.


def _agree(call: str, forms: Mapping[str, str], fault: str | None, group: Group) -> None:
    """Raise on all ranks where one has a fault, or another form of anything than most have; else return on all."""
    text = json.dumps([fault, forms], sort_keys=True)
    digests = _gather_numbers(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int64).tolist(), group)
    if fault is None and bool((digests == digests[0]).all()):
        return
    texts = _gather_texts(text, group)
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


def _fields(rows: Mapping[str, Tensor]) -> dict[str, str]:
    return {f"field {name!r}": _form(tensor) for name, tensor in rows.items()}


def _shapes(tensors: Sequence[Tensor]) -> dict[str, str]:
    return {f"tensor {number}": _form(tensor[None]) for number, tensor in enumerate(tensors)}


def _fault_of_src(src: int, group: Group) -> str | None:
    size = dist.get_world_size(group)
    return None if 0 <= src < size else f"src={src}, but there are {size} ranks. Give one of 0 to {size - 1}."


def _fault_of_size(name: str, value: int | None) -> str | None:
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


def _fault_of_shards(
    shards: Mapping[int, Mapping[str, Tensor]],
    shard_rows: Sequence[int],
    owned: Sequence[Sequence[int]],
    rank: int,
    size: int,
) -> str | None:
    if len(owned) != size or sorted(n for numbers in owned for n in numbers) != list(range(len(shard_rows))):
        return f"owned={owned} does not deal {len(shard_rows)} shards to {size} ranks. Deal each of them once."
    if set(shards) != set(owned[rank]):
        return f"it has shards {sorted(shards)}, but owns {sorted(owned[rank])}. Give it the shards that it owns."
    for number, rows in shards.items():
        if any(not tensor.dim() or len(tensor) != shard_rows[number] for tensor in rows.values()):
            found = {name: tuple(tensor.shape) for name, tensor in rows.items()}
            return f"shard {number} has {shard_rows[number]} rows, but its fields are {found}. Give it all its rows."
        if _fields(rows) != (usual := _fields(next(iter(shards.values())))):
            return f"shard {number} has {_fields(rows)}, another {usual}. Give all shards the same fields."
    return None


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


def _leave(_number: int, _buffer: Tensor) -> None:
    """The first of a chain has what it sends."""


def _relay(
    order: Sequence[int],
    buffer_of: Callable[[int], Tensor],
    put: Callable[[int, Tensor], None],
    count: int,
    group: Group,
) -> None:
    """Hand ``count`` chunks along ``order``.

    Args:
        order: Ranks, the one that has the chunks first.
        buffer_of: Gives the chunk of a number on the first rank, on the others the memory that it is received into.
        put: Called with each number and its chunk.
        count: Number of chunks.
        group: The ranks that take part.
    """
    place = order.index(dist.get_rank(group))
    receiving: deque[tuple[Tensor, Any]] = deque()
    sending: deque[Any] = deque()
    asked = 0
    for number in range(count):
        if place:
            while asked < min(count, number + AHEAD):
                buffer = buffer_of(asked)
                receiving.append((buffer, dist.irecv(buffer, group=group, group_src=order[place - 1])))
                asked += 1
            buffer, work = receiving.popleft()
            work.wait()
        else:
            buffer = buffer_of(number)
        if place + 1 < len(order):
            sending.append(dist.isend(buffer, group=group, group_dst=order[place + 1]))
            if len(sending) > AHEAD:
                sending.popleft().wait()
        put(number, buffer)
    for work in sending:
        work.wait()


def _exchange(columns: Sequence[Tensor], ranks: Int64, chunk_rows: int | None, group: Group) -> list[Tensor]:
    """Row i of every column goes to ``ranks[i]``; see `exchange_rows`."""
    columns = [column.detach().contiguous() for column in columns]
    size = dist.get_world_size(group)
    order = np.argsort(ranks, kind="stable")
    table = _gather_numbers(np.bincount(ranks, minlength=size).tolist(), group).numpy()  # [source, destination]
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
        arrived = _all_to_all(packed, outgoing, incoming, group)
        for start, part in zip(first_received + done, arrived.split(incoming), strict=True):
            begin = 0
            for result in results:
                values = _bytes(result)
                values[start : start + len(part)] = part[:, begin : begin + values.shape[1]].to(values.device)
                begin += values.shape[1]
    return results


def _all_to_all(data: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Rows of bytes to and from every rank, ``sent[r]`` and ``received[r]`` of them, in rank order."""
    device = _device(group)
    result = torch.empty((sum(received), data.shape[1]), dtype=torch.uint8, device=device)
    dist.all_to_all_single(result, data.to(device), received, sent, group=group)
    return result


def _gathered(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, ``counts[r]`` of each; without padding, so the result is all the memory it takes."""
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


def _gather_texts(text: str, group: Group) -> list[str]:
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    counts = _gather_numbers([len(data)], group)[:, 0].tolist()
    return [part.numpy().tobytes().decode() for part in _gathered(data, counts, group).split(counts)]


def _gather_numbers(numbers: Sequence[int], group: Group) -> Tensor:
    """As many numbers of each rank, int64 of shape (ranks, numbers), on the CPU."""
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
