"""`torch.distributed` for the time of one run, bound to one network interface.

Torch's store asks nobody who he is, and lists its keys to whoever asks. So it listens no longer than until all ranks
have joined: what comes later (further groups, NCCL's communicators) uses the connections that are there.

Nothing here outlives the block on success. On failure nothing is cleaned up that could wait for a peer: once DDP has
run, neither `abort` nor `destroy_process_group` wakes the others, only the death of this process does.
"""

import contextlib
import gc
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

# Its functions have the default group as default argument: imported while a group is up (and the first optimizer
# imports it), it would keep that group, its sockets included, for the life of the Python worker.
import torch.distributed.nn.functional
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from sparkdl.barrier.rendezvous import StoreAddress
from sparkdl.barrier.world import World
from sparkdl.errors import LaunchError

__all__ = ["environment", "interface_of", "is_communication_error", "process_group"]

logger = logging.getLogger(__name__)

_COMMUNICATION_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "timed out waiting",
    "connection refused",
    "failed to recv",
    "nccl communicator was aborted",
    "remote process exited",
)


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    store_address: tuple[str, int],
    listener: socket.socket | None,
    address: str,
    prefix: str,
    device: torch.device,
    rendezvous_timeout: timedelta,
    collective_timeout: timedelta,
) -> Iterator[None]:
    """Join the default process group, and leave it when the block ends well.

    Args:
        world: This rank's place.
        store_address: Where rank 0's store listens.
        listener: Rank 0's own listening socket (closed once all ranks have joined); None on other ranks.
        address: This host's address that the peers reach; gloo and NCCL are bound to its interface.
        prefix: Put before every key in the store, with the address's secret, so that runs never read each other's.
        device: Where tensors live; decides between NCCL and gloo.
        rendezvous_timeout: How long to wait for the other ranks to join.
        collective_timeout: How long one collective may take.

    Raises:
        LaunchError: On rank 0: somebody who is no rank holds a connection to the store.
    """
    if dist.is_initialized():  # left by other code in a reused Python worker
        logger.warning("leaving the process group that an earlier job left open in this Python worker")
        dist.destroy_process_group()
    with _bound_to(interface_of(address)):
        secret = store_address.secret if isinstance(store_address, StoreAddress) else ""
        listening = listener.detach() if listener is not None else None
        store = PrefixStore(
            f"{prefix}/{secret}",
            TCPStore(
                store_address[0],
                store_address[1],
                world.world_size,
                is_master=world.rank == 0,
                timeout=rendezvous_timeout,
                wait_for_workers=False,
                master_listen_fd=listening,
            ),
        )
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=collective_timeout,
            device_id=device if device.type == "cuda" else None,
        )
        # Not through the store: whom it is about could change it there.
        known = torch.tensor([_count_connections(store_address[1], inbound=False)], device=device)
        dist.all_reduce(known)
        if listening is not None:
            _stop_listening(listening)
            _check_connections(_count_connections(store_address[1], inbound=True), int(known), store_address)
        if device.type == "cuda":
            # With a device, DeviceMesh splits the group, for which torch connects to the store anew; without, it makes
            # groups as everybody does.
            dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]
        yield
        gc.collect()  # a user's own DDP in a cycle must not outlive the group either, see DataParallel.close
        dist.barrier()  # rank 0 holds the store: it must not leave while others still read it
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has ``address``; None where no interface has it."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def is_communication_error(error: BaseException) -> bool:
    """True where the error says that a peer went away, so that the cause is probably elsewhere."""
    if not isinstance(error, RuntimeError | OSError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _COMMUNICATION_WORDS)


def _stop_listening(descriptor: int) -> None:
    """Close a listening socket that the store's thread waits on, whose number the store will close again.

    A socket that was shut down would wake that thread for ever. One that is gone wakes nobody, and in its place the
    number gets a socket without address, to which nothing can come.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as idle:
        os.dup2(idle.fileno(), descriptor, inheritable=False)


def _count_connections(port: int, *, inbound: bool) -> int:
    """This process's open connections to the store at ``port``, or, in the process of the store, those from anybody."""
    return sum(
        entry.status == psutil.CONN_ESTABLISHED and (entry.laddr if inbound else entry.raddr).port == port
        for entry in psutil.Process().net_connections("tcp")
        if entry.raddr
    )


def _check_connections(found: int, known: int, address: tuple[str, int]) -> None:
    """See that nobody holds a connection to the store but the ranks; none can come any more.

    Raises:
        LaunchError: Somebody does.
    """
    if found > known:
        raise LaunchError(
            f"The ranks have {known} connections to the rendezvous store at {address[0]}:{address[1]}, but it has "
            f"{found}: something that is no rank connected while they joined, and might read or change what they tell "
            "each other. Keep the executors' ports from others with a firewall or network policy, then fit again."
        )


@contextlib.contextmanager
def _bound_to(interface: str | None) -> Iterator[None]:
    """Point gloo and NCCL to one interface; left alone, gloo takes whatever the hostname resolves to."""
    if interface is None:
        yield
        return
    with environment({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}):
        yield


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block and put back what was there: Python workers are reused by later jobs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
