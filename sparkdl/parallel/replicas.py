"""Which ranks hold one replica of the module between them: a value, computed from numbers alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sparkdl.errors import ConfigError
from sparkdl.io.plan import shards_of

__all__ = ["Place", "Replicas", "check_degrees"]


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is to the data.

    Attributes:
        dp_rank: The number of its replica; None where it reads no rows.
        dp_size: Replicas.
        index: Its place in the replica, from 0.
        size: Ranks of the replica.
        reads_inputs: True where it reads the inputs.
        reads_labels: True where it reads the labels. Weights are read by all: ranks agree by them.
    """

    dp_rank: int | None
    dp_size: int
    index: int = 0
    size: int = 1
    reads_inputs: bool = True
    reads_labels: bool = True

    @property
    def leads(self) -> bool:
        """True for the one rank of a replica whose losses and rows are counted: the last one."""
        return self.dp_rank is not None and self.index == self.size - 1

    def shards(self, num_shards: int) -> range:
        """The shards that the rank begins with."""
        return range(0) if self.dp_rank is None else shards_of(self.dp_rank, self.dp_size, num_shards)


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks of every replica.

    Attributes:
        groups: The ranks of each replica, in order. The last one of each leads it; ranks that are in none read no rows.
        pipelined: True where the first rank of a replica needs the inputs alone, and the others labels alone.
    """

    groups: tuple[tuple[int, ...], ...]
    pipelined: bool = False

    @classmethod
    def of_size(cls, world_size: int, size: int = 1, *, pipelined: bool = False) -> "Replicas":
        """Replicas of ``size`` consecutive ranks, which Spark tends to put on one host."""
        groups = tuple(tuple(range(first, first + size)) for first in range(0, world_size, size))
        return cls(groups, pipelined and size > 1)

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return len(self.groups)

    def are_ranks(self, world_size: int) -> bool:
        """True where each of so many ranks is a replica by itself, and reads its own rows."""
        return self.groups == tuple((rank,) for rank in range(world_size))

    def place_of(self, rank: int) -> Place:
        """What a rank is to the data."""
        for replica, ranks in enumerate(self.groups):
            if rank in ranks:
                index, size = ranks.index(rank), len(ranks)
                first = index == 0
                reads = (first, not first) if self.pipelined else (True, True)
                return Place(replica, self.dp_size, index, size, *reads)
        return Place(None, self.dp_size)


def check_degrees(strategy: str, world_size: int, degrees: Mapping[str, int]) -> None:
    """Refuse degrees of parallelism that do not multiply to the number of ranks.

    Args:
        strategy: Its name.
        world_size: Ranks.
        degrees: By name.

    Raises:
        ConfigError: With every factor.
    """
    product = math.prod(degrees.values())
    small = [name for name, degree in degrees.items() if degree < 1]
    if small:
        raise ConfigError(f"strategy={strategy!r}: {small[0]}={degrees[small[0]]} is too small. Use 1 or more.")
    if product != world_size:
        factors = " x ".join(f"{name}={degree}" for name, degree in degrees.items())
        raise ConfigError(
            f"strategy={strategy!r}: {factors} makes {product} ranks, but there are numTrainWorkers={world_size}. Use "
            "degrees whose product is the number of ranks."
        )
