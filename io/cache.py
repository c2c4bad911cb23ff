"""Decoded rows that are kept for the next epochs: on the GPU, in memory, or on local disk.

*What is kept.* The tensors of every piece, as they came out of the decoder, so that later epochs neither read Parquet
nor decode.

*Where.* `plan_cache` compares what the rank's rows take with what is free. Rows that fit into one tier lie there in one
tensor per shard and column, from which batches are gathered directly. Rows that do not are kept block by block (a block
is one piece) in a `TieredStore`, over all tiers that were allowed.

*How blocks move.* What is read goes to the fastest tier: the reader threads run ahead of the training loop, so that is
a promotion of what is needed next. A block is not released when its rows were used but when its room is needed: then
the one that was used least recently moves one tier down, and from the last tier it is forgotten, to be read from
Parquet again. A tier that turns out to have less room than planned (a full disk, another process's memory) is used as
far as it goes. `TierPolicy` is these rules alone, without tensors.

Files on disk have no names: they vanish with the process, however it ends, and there is nothing to sweep.
"""

import errno
import logging
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from sparkdl.config import CacheTier
from sparkdl.errors import ConfigError

__all__ = [
    "Allocate",
    "Cache",
    "CachePlan",
    "Free",
    "Move",
    "TierPolicy",
    "TieredStore",
    "check_tier",
    "find_free",
    "local_directory",
    "plan_cache",
]

logger = logging.getLogger(__name__)

Tier = Literal["device", "memory", "disk"]
Tensors = dict[str, Tensor]
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
_SHARE = {"device": 0.5, "memory": 0.4, "disk": 0.5}  # of what is free, for all ranks of a host together
_ALLOWED: dict[CacheTier, tuple[Tier, ...]] = {
    "auto": ("device", "memory", "disk"),
    "none": (),
    "memory": ("memory",),
    "disk": ("disk",),
    "device": ("device",),
}


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that this rank may use of each tier; None where there is no such tier."""

    device: int | None
    memory: int | None
    disk: int | None


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Where a rank keeps its decoded rows.

    Attributes:
        tiers: Name and room in bytes of each tier, fastest first.
        resident: True where all rows fit into the first tier.
        reason: The choice in words, for the log.
    """

    tiers: tuple[tuple[Tier, int], ...]
    resident: bool
    reason: str


def check_tier(asked: CacheTier, *, encrypt: bool) -> None:
    """Refuse a tier that would write rows in the clear where they must not be.

    Args:
        asked: ``"auto"``, ``"none"`` or one tier.
        encrypt: What lies on local disks must be encrypted.

    Raises:
        ConfigError: It would.
    """
    if asked == "disk" and encrypt:
        raise ConfigError(
            "cache='disk' would keep rows on the executors' disks in the clear, but spark.io.encryption.enabled=true. "
            "Use cache='auto', which then keeps them in memory or on the GPU, or cache='none'."
        )


def plan_cache(asked: CacheTier, need: int, free: Free, budget: int | None = None) -> CachePlan:
    """Choose the tiers for ``need`` bytes of decoded rows.

    Args:
        asked: ``"auto"``, ``"none"`` or one tier.
        need: Bytes of this rank's rows.
        free: What there is room for.
        budget: Bytes that may be used in all; None: all of ``free``.

    Returns:
        The first single tier that holds everything, fastest first; else all allowed tiers, as far as they go.
    """
    room: list[tuple[Tier, int]] = []
    left = budget
    for tier in _ALLOWED[asked]:
        found = getattr(free, tier)
        if found is None and tier == "device" and asked == "device":
            tier, found = "memory", free.memory  # on the CPU the device's memory is the host's
        if found:
            room.append((tier, found if budget is None else min(found, budget)))
    for number, (tier, size) in enumerate(room):
        if need <= size:
            return CachePlan(tuple(room[number:]), True, f"all {_mib(need)} of this rank's rows on {tier}")
    tiers: list[tuple[Tier, int]] = []
    for tier, size in room:
        size = size if left is None else min(size, left)
        left = None if left is None else left - size
        if size:
            tiers.append((tier, size))
    if not tiers:
        why = "not asked for" if asked == "none" else "no room" if not room else "a budget of 0 bytes"
        return CachePlan((), False, f"nothing ({why})")
    kept = ", ".join(f"{_mib(size)} on {tier}" for tier, size in tiers)
    return CachePlan(tuple(tiers), False, f"{_mib(need)} of this rank's rows in up to {kept}")


def find_free(device: torch.device, local_world_size: int, *, encrypt: bool = False) -> Free:
    """What one of ``local_world_size`` ranks of this host may use now: a part of what is free.

    No disk with ``encrypt``: rows that are kept there are mapped into memory as they are, which none can decrypt.
    """
    on_device = None
    if device.type == "cuda":
        on_device = int(torch.cuda.mem_get_info(device)[0] * _SHARE["device"])
    memory = int(psutil.virtual_memory().available * _SHARE["memory"]) // local_world_size
    disk = int(shutil.disk_usage(local_directory() or tempfile.gettempdir()).free * _SHARE["disk"]) // local_world_size
    return Free(on_device, memory, None if encrypt else disk)


def local_directory() -> str | None:
    """The one of Spark's local directories with the most free space; None outside Spark."""
    found = [path for path in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if os.path.isdir(path)]
    return max(found, key=lambda path: shutil.disk_usage(path).free, default=None)


class Cache:
    """The decoded rows that one rank keeps.

    Args:
        plan: Where.
        device: The rank's device.
    """

    def __init__(self, plan: CachePlan, device: torch.device | None = None) -> None:
        self.plan = plan
        self._room = plan.tiers[0][1] if plan.tiers else 0
        self._allocate = {tier: _allocator(tier, device) for tier, _ in plan.tiers}
        levels = [(room, self._allocate[tier]) for tier, room in plan.tiers]
        self.store = TieredStore(levels) if levels and not plan.resident else None

    @property
    def is_host_memory(self) -> bool:
        """True where rows that are kept in one piece lie in the host's memory, and not on a GPU or a disk."""
        return self.plan.resident and self.plan.tiers[0][0] == "memory"

    def reserve(self, need: int) -> Allocate | None:
        """An allocator for all rows of a shard, or None where it cannot be held in one piece."""
        if not self.plan.resident or need > self._room:
            return None
        self._room -= need
        return self._allocate[self.plan.tiers[0][0]]

    def shrink(self, error: BaseException) -> None:
        """The tier has less room than was planned: go on with the next one, or with what is there."""
        logger.warning("the cache does not get the room that it planned with: %s", error)
        tiers = self.plan.tiers[1:]
        self.plan = CachePlan(tiers, bool(tiers), self.plan.reason if tiers else "nothing (no room)")
        self._room = tiers[0][1] if tiers else 0

    def release(self, need: int) -> None:
        """Give back what was reserved for a shard."""
        self._room += need


@dataclass(frozen=True, slots=True)
class Move:
    """A block changes its tier: from ``source`` (None: it is new) to ``target`` (None: it is forgotten)."""

    key: Hashable
    source: int | None
    target: int | None


@dataclass(slots=True)
class TierPolicy:
    """Which block lies in which tier: least recently used first out, one tier down at a time.

    Attributes:
        room: Bytes of each tier, fastest first.
        pinned: Blocks in use, which do not move.
    """

    room: list[int]
    pinned: dict[Hashable, int] = field(default_factory=dict)
    _tiers: list["OrderedDict[Hashable, int]"] = field(init=False)

    def __post_init__(self) -> None:
        self._tiers = [OrderedDict() for _ in self.room]

    def find(self, key: Hashable) -> int | None:
        """The tier of a block."""
        return next((tier for tier, blocks in enumerate(self._tiers) if key in blocks), None)

    def used(self, tier: int) -> int:
        """Bytes in a tier."""
        return sum(self._tiers[tier].values())

    def place(self, key: Hashable, size: int) -> list[Move]:
        """Take in a new block; returns the moves in the order in which they must be made."""
        return self._settle(key, size, None)

    def touch(self, key: Hashable) -> list[Move]:
        """A block is about to be used: it becomes the most recent one, in the fastest tier that can hold it."""
        tier = self.find(key)
        assert tier is not None
        size = self._tiers[tier][key]
        if tier == 0 or self.pinned.get(key):
            self._tiers[tier].move_to_end(key)
            return []
        return self._settle(key, size, tier)

    def forget(self, key: Hashable) -> None:
        """A block is gone."""
        for blocks in self._tiers:
            blocks.pop(key, None)

    def _settle(self, key: Hashable, size: int, source: int | None) -> list[Move]:
        """The first tier that can make room; blocks that stand in the way go down before."""
        if source is not None:
            del self._tiers[source][key]
        for target in range(len(self.room) if source is None else source):
            moves = self._make_room(target, size)
            if moves is not None:
                self._tiers[target][key] = size
                return [*moves, Move(key, source, target)]
        if source is not None:
            self._tiers[source][key] = size
        return []

    def _make_room(self, tier: int, size: int) -> list[Move] | None:
        """Moves after which ``size`` bytes are free in a tier; None where that cannot be."""
        loose = [key for key in self._tiers[tier] if not self.pinned.get(key)]
        free = self.room[tier] - self.used(tier)
        if free + sum(self._tiers[tier][key] for key in loose) < size:
            return None
        moves: list[Move] = []
        for key in loose:
            if free >= size:
                break
            block = self._tiers[tier][key]
            free += block
            below = self._make_room(tier + 1, block) if tier + 1 < len(self.room) else None
            del self._tiers[tier][key]
            if below is None:
                moves.append(Move(key, tier, None))
            else:
                self._tiers[tier + 1][key] = block
                moves += [*below, Move(key, tier, tier + 1)]
        return moves


class TieredStore:
    """Blocks of tensors over several tiers; safe to use from several threads.

    Args:
        levels: Room in bytes and allocator of each tier, fastest first.
    """

    def __init__(self, levels: Sequence[tuple[int, Allocate]]) -> None:
        self.policy = TierPolicy([room for room, _ in levels])
        self._allocate = [allocate for _, allocate in levels]
        self._blocks: dict[Hashable, Tensors] = {}
        self._lock = threading.Lock()

    def put(self, key: Hashable, block: Mapping[str, Tensor]) -> None:
        """Keep a copy of a block, if there is room for it anywhere."""
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = dict(block)
                self._make(self.policy.place(key, _bytes(block)))
                if self.policy.find(key) is None:
                    self._blocks.pop(key, None)

    @contextmanager
    def use(self, key: Hashable) -> Iterator[Tensors | None]:
        """A block, promoted to the fastest tier and kept there for the time of the block; None where it is not kept."""
        pinned = self.policy.pinned
        with self._lock:
            found = key in self._blocks
            if found:
                self._make(self.policy.touch(key))
                found = key in self._blocks
            block = self._blocks.get(key)
            if found:
                pinned[key] = pinned.get(key, 0) + 1
        try:
            yield block
        finally:
            if found:
                with self._lock:
                    pinned[key] -= 1
                    if not pinned[key]:
                        del pinned[key]

    def _make(self, moves: Sequence[Move]) -> None:
        for move in moves:
            if move.target is None:
                del self._blocks[move.key]
                continue
            try:
                allocate = self._allocate[move.target]
                self._blocks[move.key] = {
                    name: allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)
                    for name, tensor in self._blocks[move.key].items()
                }
            except (OSError, MemoryError, RuntimeError) as error:
                # The tier has less room than was planned. What is there stays; what does not fit is read again.
                logger.warning("the cache uses no more room on tier %d: %s", move.target, error)
                self.policy.room[move.target] = self.policy.used(move.target)
                self.policy.forget(move.key)
                del self._blocks[move.key]


def _allocator(tier: Tier, device: torch.device | None) -> Allocate:
    if tier == "disk":
        directory = local_directory()
        return lambda shape, dtype: _on_disk(shape, dtype, directory)
    if tier == "memory" or device is None or device.type == "cpu":
        return _in_memory
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def _in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for rows that are gathered in random order, epoch after epoch.

    NumPy asks the kernel for huge pages, torch does not. They take longer to get, and gathering from them takes half
    to nine tenths of the time.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    return (
        torch.from_numpy(np.empty(size, np.uint8)).view(dtype).reshape(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, directory: str | None) -> Tensor:
    """A tensor over a nameless file.

    Raises:
        OSError: No space is left. Reserved at once, because a write to a mapped page for which there is no room on the
            disk would end the process with SIGBUS.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            file.truncate(size)
        flat = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size // dtype.itemsize, dtype=dtype)
    return flat.reshape(shape)


def _bytes(block: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in block.values())


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
