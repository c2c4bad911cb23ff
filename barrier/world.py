"""Who is who among the ranks: a value computed from the addresses of the barrier tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["World", "host_of", "world_of"]


@dataclass(frozen=True, slots=True)
class World:
    """The place of one rank among all ranks.

    Attributes:
        rank: This process, from 0.
        world_size: Processes in all.
        local_rank: This process among those of its host.
        local_world_size: Processes on its host.
        node_rank: Its host among the hosts, in order of their first rank.
        hosts: Host of every rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    hosts: tuple[str, ...]

    @property
    def one_host(self) -> bool:
        """True where all ranks share a host."""
        return len(set(self.hosts)) == 1


def world_of(rank: int, addresses: Sequence[str]) -> World:
    """Derive a rank's place from the addresses of all barrier tasks.

    Args:
        rank: The rank, which is the barrier task's partition.
        addresses: ``host:port`` of each rank's executor, in rank order. IPv6 hosts may stand in brackets.
    """
    hosts = tuple(host_of(address) for address in addresses)
    peers = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    nodes = list(dict.fromkeys(hosts))
    return World(
        rank=rank,
        world_size=len(hosts),
        local_rank=peers.index(rank),
        local_world_size=len(peers),
        node_rank=nodes.index(hosts[rank]),
        hosts=hosts,
    )


def host_of(address: str) -> str:
    """Host part of ``host:port``, ``[v6]:port`` or a bare host.

    >>> host_of("10.0.0.1:7077"), host_of("[fe80::1]:7077"), host_of("fe80::1")
    ('10.0.0.1', 'fe80::1', 'fe80::1')
    """
    if address.startswith("["):
        return address[1 : address.index("]")]
    return address.rsplit(":", 1)[0] if address.count(":") == 1 else address
