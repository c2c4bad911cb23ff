"""How long messages and collectives take: pure functions of sizes, ranks and links.

The model is Hockney's ("The communication challenge for MPP", 1994): a message of n bytes takes alpha + n / beta. The
collectives are those of Thakur, Rabenseifner and Gropp ("Optimization of collective communication operations in MPICH",
2005) and of Patarasuk and Yuan ("Bandwidth optimal all-reduce algorithms", 2009), without the time for adding numbers,
which is part of the measured beta. All sizes are those of the whole tensor, in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

__all__ = [
    "Link",
    "fit_link",
    "halving_doubling_all_reduce",
    "hierarchical_all_reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_bytes",
    "ring_link",
    "ring_reduce_scatter",
    "tree_all_reduce",
    "tree_broadcast",
]


@dataclass(frozen=True, slots=True)
class Link:
    """What connects two ranks, in either direction at the same time.

    Attributes:
        latency_seconds: Alpha: what a message takes however small it is.
        bytes_per_second: Beta: the bandwidth.
    """

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, size: float) -> float:
        """Of one message of so many bytes."""
        return self.latency_seconds + size / self.bytes_per_second


def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends, and receives, in an all-reduce by a ring: 2 (W - 1) / W of the tensor."""
    return 2 * (ranks - 1) / ranks * size


def ring_reduce_scatter(size: float, ranks: int, link: Link) -> float:
    """Seconds of W - 1 rounds in which every rank hands on a W-th of the tensor."""
    return (ranks - 1) * link.seconds(size / ranks) if ranks > 1 else 0.0


def ring_all_gather(size: float, ranks: int, link: Link) -> float:
    """Seconds; as many rounds of as many bytes as `ring_reduce_scatter`."""
    return ring_reduce_scatter(size, ranks, link)


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of a reduce-scatter and an all-gather: what gloo does, and NCCL for large tensors."""
    return ring_reduce_scatter(size, ranks, link) + ring_all_gather(size, ranks, link)


def tree_broadcast(size: float, ranks: int, link: Link) -> float:
    """Seconds of a binomial tree, whose depth is the logarithm of the ranks."""
    return ceil(log2(ranks)) * link.seconds(size)


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of a reduce to one rank and a broadcast, both by a binomial tree: for small tensors."""
    return 2 * tree_broadcast(size, ranks, link)


def halving_doubling_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of Rabenseifner's algorithm: the bytes of a ring, in as many rounds as a tree has levels.

    Ranks beyond a power of two first hand their tensor to another one, and get the result from it.
    """
    power = 1 << (ranks.bit_length() - 1)
    rounds = power.bit_length() - 1
    folded = 2 * link.seconds(size) if power < ranks else 0.0
    return 2 * rounds * link.latency_seconds + ring_bytes(size, power) / link.bytes_per_second + folded


def hierarchical_all_reduce(size: float, hosts: int, ranks_per_host: int, inside: Link, between: Link) -> float:
    """Seconds of a reduce-scatter inside every host, rings between hosts, and an all-gather inside every host.

    Each rank of a host reduces its share with those of the other hosts. All of them use the host's one link.
    """
    own = ring_reduce_scatter(size, ranks_per_host, inside) + ring_all_gather(size, ranks_per_host, inside)
    return own + ring_all_reduce(size, hosts, between)


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link whose messages come closest to what was measured.

    Least squares of the relative error of alpha + n / beta, so that small messages count as much as large ones; neither
    is negative.

    Args:
        sizes: Bytes of each message; two different ones at least.
        seconds: What each took; more than 0.
    """
    weights = [1 / value**2 for value in seconds]
    total = sum(weights)
    mean_size = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
    mean_seconds = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (n - mean_size) ** 2 for w, n in zip(weights, sizes, strict=True))
    both = sum(w * (n - mean_size) * (t - mean_seconds) for w, n, t in zip(weights, sizes, seconds, strict=True))
    # Where small messages take as long as large ones, the largest says that the link is at least so fast.
    slope = max(both / spread, 1e-3 * min(t / n for n, t in zip(sizes, seconds, strict=True)))
    return Link(max(mean_seconds - slope * mean_size, 0.0), 1 / slope)


def ring_link(measured: Link, ranks: int) -> Link:
    """The link between neighbours, from all-reduces by a ring that were taken for single messages.

    Args:
        measured: `fit_link` of whole all-reduces.
        ranks: How many took part; 2 at least.
    """
    return Link(measured.latency_seconds / (2 * (ranks - 1)), measured.bytes_per_second * ring_bytes(1, ranks))
