"""Rows permuted over the shards of all ranks between epochs."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparkdl.io.exchange import Group, Rows, agree, exchange_rows, fault_of_size, forms_of_fields, gather_texts

__all__ = ["reshuffle"]


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

    A collective of ``group``, as all of `sparkdl.io.exchange`.

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
    fault = fault_of_size("chunk_rows", chunk_rows)
    fault = fault or _fault_of_shards(shards, shard_rows, owned, rank, dist.get_world_size(group))
    # A rank without shards learns from the others what a row is.
    layouts = {name: [str(t.dtype)[6:], *t.shape[1:]] for name, t in next(iter(shards.values()), {}).items()}
    gathered = [json.loads(text) for text in gather_texts(json.dumps(layouts), group)]
    if not shards:
        layouts = next((layout for layout in gathered if layout), {})
    forms = {"seed": str(seed), "epoch": str(epoch), "chunk_rows": str(chunk_rows), "shard_rows": str(list(shard_rows))}
    forms["owned"] = str([list(numbers) for numbers in owned])
    agree("reshuffle", {**forms, **{f"field {name!r}": str(layouts[name]) for name in layouts}}, fault, group)

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
    rows = {}
    for name, (dtype, *shape) in layouts.items():
        none = torch.empty((0, *shape), dtype=getattr(torch, dtype))
        rows[name] = torch.cat([shards[number][name] for number in mine]) if mine else none
    destination = torch.from_numpy(owner[np.searchsorted(ends, target[own], side="right")])
    arrived = exchange_rows(rows, destination, chunk_rows=chunk_rows, group=group)
    # Every rank sends in the order of row numbers, so what arrived k-th is known without being sent along.
    wanted = source[own]
    arrival = np.lexsort((wanted, owner[np.searchsorted(ends, wanted, side="right")]))
    place = np.empty(len(own), np.int64)
    place[arrival] = np.arange(len(own))
    parts = torch.from_numpy(place).split(sizes)
    return {
        number: {name: values.index_select(0, part.to(values.device)) for name, values in arrived.items()}
        for number, part in zip(mine, parts, strict=True)
    }


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
        if forms_of_fields(rows) != (usual := forms_of_fields(next(iter(shards.values())))):
            return f"shard {number} has {forms_of_fields(rows)}, another {usual}. Give all shards the same fields."
    return None
