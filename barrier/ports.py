"""Whether executors can connect to each other: only a barrier stage has listeners and callers at the same time."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import pyarrow as pa

from sparkdl.barrier.channel import local_address
from sparkdl.barrier.findings import Finding
from sparkdl.barrier.world import world_of

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["check_ports", "connect_all"]

_PATIENCE = timedelta(seconds=5)


def check_ports(spark: "SparkSession", num_tasks: int) -> Iterator[Finding]:
    """Let ``num_tasks`` barrier tasks connect to each other, on ports that the system gives them, as ranks do.

    Takes about two seconds, for two barriers.

    Yields:
        One finding for each pair of hosts that cannot connect, or one that all can.
    """
    from pyspark.sql import functions as F

    source = spark.range(num_tasks).repartitionById(num_tasks, F.col("id").cast("int"))
    told = [json.loads(row[0]) for row in source.mapInArrow(_meet, "told string", barrier=True).collect()]
    failed = sorted({(entry["host"], peer, error) for entry in told for peer, error in entry["failed"]})
    for host, peer, error in failed:
        yield Finding(
            "ports",
            "error",
            f"{host} cannot connect to {peer}: {error}",
            "ranks connect to each other on ports that the system chooses",
            "Open all ports between the executors (security group, firewall, NetworkPolicy)",
        )
    if not failed:
        hosts = sorted({entry["host"] for entry in told})
        yield Finding(
            "ports", "ok", f"{num_tasks} tasks on {len(hosts)} {'host' if len(hosts) == 1 else 'hosts'} connect"
        )


def _meet(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    from pyspark import BarrierTaskContext

    for _ in batches:
        pass
    task = BarrierTaskContext.get()
    addresses = [info.address for info in task.getTaskInfos()]
    world = world_of(task.partitionId(), addresses)
    mine = world.hosts[world.rank]
    others = [host for host in world.hosts if host != mine]
    failed = connect_all(local_address(others[0]) if others else "127.0.0.1", world.rank, task.allGather)
    told = json.dumps({"host": mine, "failed": [(world.hosts[rank], error) for rank, error in failed]})
    yield pa.RecordBatch.from_pydict({"told": [told]})


def connect_all(
    address: str, rank: int, all_gather: Callable[[str], Sequence[str]], timeout: timedelta = _PATIENCE
) -> list[tuple[int, str]]:
    """Listen at one's own address and connect to all others.

    Args:
        address: Of this host, as the others reach it.
        rank: This task.
        all_gather: Sends a text to all tasks and returns everyone's, in order; called twice.
        timeout: For one connection.

    Returns:
        The ranks that could not be reached, and why.
    """
    failed: list[tuple[int, str]] = []
    failing = threading.Lock()

    def connect(peer: int, host: str, port: int) -> None:
        try:
            socket.create_connection((host, port), timeout.total_seconds()).close()
        except OSError as error:
            with failing:
                failed.append((peer, f"{error} ({host}:{port})"))

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as listener:
        listener.bind((address, 0))
        listener.listen(1024)  # the system takes connections up to this number without an accept
        places = [json.loads(text) for text in all_gather(json.dumps([address, listener.getsockname()[1]]))]
        peers = [(peer, *place) for peer, place in enumerate(places) if peer != rank]
        threads = [threading.Thread(target=connect, args=peer, name="sparkdl-ports") for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        all_gather("done")  # nobody stops to listen before all have called
    return sorted(failed)
