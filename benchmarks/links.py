"""Ranks in network namespaces of their own, whose links are as slow as a real network's.

Each namespace is a "host": a network with one link, which leads to a bridge that has a namespace too, and a hostname of
its own. A link passes as much per second as its rate says, in either direction, and may have a latency. That needs
Linux, root, and ``ip`` and ``tc`` of iproute2; nothing outside these namespaces is changed, and they go in the end.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BURST_SECONDS = 0.004
"""As much as a link carries in this time passes at once."""
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Place:
    """Where one rank runs: what comes before its command, and its network interface and address."""

    prefix: tuple[str, ...]
    interface: str
    address: str


def bits_per_second(rate: str) -> float:
    """The number of a rate as tc writes it: ``"100mbit"``.

    Raises:
        ValueError: It is not written so.
    """
    found = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)", rate)
    if found is None:
        raise ValueError(f"rate {rate!r} is not known. Write it as 100mbit or 1gbit.")
    return float(found[1]) * _UNITS[found[2]]


@contextlib.contextmanager
def open_hosts(number: int, rate: str, latency_seconds: float = 0.0) -> Iterator[list[Place]]:
    """Makes namespaces linked by a bridge, and removes them.

    Args:
        number: Of hosts.
        rate: Of every host's link, in each direction.
        latency_seconds: Of a message from one host to another.

    Raises:
        OSError: ``ip`` or ``tc`` is missing, or refused.
    """
    names = [f"sparkdl{os.getpid()}-{host}" for host in range(number)]
    switch = f"sparkdl{os.getpid()}-switch"
    made: list[str] = []
    burst = max(32_000, int(BURST_SECONDS * bits_per_second(rate) / 8))
    try:
        for name in [switch, *names]:
            command("ip", "netns", "add", name)
            made.append(name)
            command("ip", "-n", name, "link", "set", "lo", "up")
        command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        command("ip", "-n", switch, "link", "set", "bridge", "up")
        shape = ("tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
        places = []
        for host, name in enumerate(names):
            port, address = f"port{host}", f"10.213.0.{host + 1}"
            peer = ("peer", "name", "eth0", "netns", name)
            command("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
            command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            command("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            command("ip", "-n", name, "link", "set", "eth0", "up")
            # What the host sends, and at the other end of the link what it receives.
            command("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", *shape)
            command("tc", "-n", switch, "qdisc", "add", "dev", port, "root", *shape)
            if latency_seconds:
                delay = ("netem", "delay", f"{latency_seconds * 1e6:.0f}us", "limit", "100000")
                command("tc", "-n", name, "qdisc", "add", "dev", "eth0", "parent", "1:", "handle", "2:", *delay)
            # The hostname tells ranks that they are on different hosts.
            named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)
            places.append(Place(("ip", "netns", "exec", name, *named), "eth0", address))
        yield places
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)


def command(*words: str) -> None:
    """Runs a command of iproute2.

    Raises:
        OSError: It is missing, or it failed; with what it said.
    """
    if shutil.which(words[0]) is None:
        raise OSError(f"{words[0]} is missing: install iproute2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(words)}: {done.stderr.strip()}")


def loopback(number: int) -> list[Place]:
    """The places of so many ranks on this host, whose links nothing limits."""
    return [Place((), "lo", "127.0.0.1")] * number


@contextlib.contextmanager
def open_places(number: int, rate: str, latency_seconds: float = 0.0) -> Iterator[tuple[list[Place], str]]:
    """The places of so many ranks, and in words what kind of network they have: loopback where no other is allowed."""
    with contextlib.ExitStack() as stack:
        try:
            places = stack.enter_context(open_hosts(number, rate, latency_seconds))
            network = f"{number} namespaces, {rate} each"
        except OSError as error:
            print(f"No namespaces with limited links here ({error}): all ranks run on loopback.")
            places = loopback(number)
            network = "loopback, no limit"
        yield places, network


def run_ranks(
    places: Sequence[Place], words: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None
) -> None:
    """Runs a command as one rank in each place, and ends those that are left when one fails or time is up.

    The ranks find in their environment what torchrun would set.

    Args:
        places: Of the ranks.
        words: The command.
        seconds: After so long the ranks are ended.
        environment: Further variables.

    Raises:
        RuntimeError: A rank failed, or time was up; with what it said last.
    """
    port = "29500"
    if places[0].interface == "lo":  # shared with all that runs here, unlike a namespace
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    apart = places[0].interface != "lo"
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        ranks: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for rank, place in enumerate(places):
                log = Path(f"{folder}/{rank}.log")
                variables = {
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(places)),
                    "LOCAL_RANK": "0" if apart else str(rank),
                    "LOCAL_WORLD_SIZE": "1" if apart else str(len(places)),
                    "MASTER_ADDR": places[0].address,
                    "MASTER_PORT": port,
                    "GLOO_SOCKET_IFNAME": place.interface,
                    "OMP_NUM_THREADS": "1",
                    **(environment or {}),
                }
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        [*place.prefix, *words], env=variables, stdout=output, stderr=subprocess.STDOUT
                    )
                ranks.append((process, log))
            _wait(ranks, seconds)
        finally:
            for process, _ in ranks:
                process.kill()
                process.wait()


def _wait(ranks: Sequence[tuple[subprocess.Popen[bytes], Path]], seconds: float) -> None:
    """Until all have ended, or one has failed.

    Raises:
        RuntimeError: A rank failed, or time was up.
    """
    end = time.monotonic() + seconds
    left = list(ranks)
    while left:
        for process, log in left:
            code = process.poll()
            if code or time.monotonic() > end:
                found = f"failed with {code}" if code else f"was not done after {seconds:.0f} s"
                raise RuntimeError(f"A rank {found}:\n{log.read_text(errors='replace')[-3000:]}")
        left = [(process, log) for process, log in left if process.returncode is None]
        time.sleep(0.05)


def describe_machine() -> dict[str, str | int | float]:
    """Returns the processor, the memory, and how busy the machine is."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }
