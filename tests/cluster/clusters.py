"""Clusters of real processes on this machine, and drivers on them, for tests that break parts of both.

Everything is bound to loopback, or to addresses that only this machine has, and ends with the test process.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyspark
import torch
from torch import Tensor

from tests.faults import FailAt

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
START_SECONDS = 180.0
FIT_SECONDS = 180.0
_POLL_SECONDS = 0.02
_DEATH = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()  # nothing outlives the test process

LOCAL, LOCAL_CLUSTER, STANDALONE, SPARE, NETWORK = "local", "local-cluster", "standalone", "spare", "network"
TITLES = {
    LOCAL: "local[4]",
    LOCAL_CLUSTER: "local-cluster[2,1,1024]",
    STANDALONE: "standalone, 2 workers",
    SPARE: "standalone, 2 workers",
    NETWORK: "standalone, 2 network namespaces",
}

T = TypeVar("T")


def await_value(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """What ``look`` finds, as soon as it is not None.

    Raises:
        TimeoutError: Nothing was found in time.
    """
    end = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)
    return found


class NotPermittedError(Exception):
    """This machine, or this user, cannot do what a test needs."""


def command(*words: str) -> None:
    """Run an administrator's command.

    Raises:
        NotPermittedError: It is not there, or was refused.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError as error:
        raise NotPermittedError(str(error)) from error
    if done.returncode:
        raise NotPermittedError(f"{shlex.join(words)}: {done.stderr.strip()}")


# ---- processes -------------------------------------------------------------------------------------------------------
def spark_home(folder: Path) -> Path:
    """A Spark installation whose work folder is ours: the entries of the installed package, by links."""
    home = folder / "spark"
    home.mkdir()
    for entry in Path(pyspark.__file__).parent.iterdir():
        if entry.name not in ("work", "logs"):
            (home / entry.name).symlink_to(entry)
    return home


def environment(home: Path, address: str = LOOPBACK) -> dict[str, str]:
    """Of every process of a cluster, without what another Spark on this machine may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYTHONPATH"))}
    own = {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": address, "SPARK_DAEMON_MEMORY": "256m"}
    own["SPARK_MASTER_OPTS"] = "-Dspark.master.rest.enabled=false"  # it has a port of its own, not one that is free
    return {**kept, **own, "PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}


@contextlib.contextmanager
def process(words: Sequence[str], *, env: dict[str, str], cwd: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block, together with all that it started."""
    with log.open("w") as out:
        started = subprocess.Popen(
            [*_DEATH, *words], env=env, cwd=cwd, stdin=subprocess.PIPE, stdout=out, stderr=out, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield started
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(started.pid).children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        assert started.stdin is not None
        with contextlib.suppress(OSError):
            started.stdin.close()
        started.wait(timeout=20)
        psutil.wait_procs(family, timeout=20)


def await_line(log: Path, pattern: str, running: subprocess.Popen[str]) -> re.Match[str]:
    """The first line of a log that matches."""

    def look() -> re.Match[str] | None:
        if running.poll() is not None:
            raise RuntimeError(f"it ended: {log.read_text()[-3000:]}")
        return re.search(pattern, log.read_text())

    return await_value(look, START_SECONDS, f"{pattern!r} in {log}")


# ---- hosts with a network between them -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Host:
    """A place where processes of a cluster run.

    Attributes:
        address: Where the others reach it.
        prefix: Words before a command that is to run there.
        port: Its port of the bridge; "" on this machine's own loopback.
    """

    address: str = LOOPBACK
    prefix: tuple[str, ...] = ()
    port: str = ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Host]]:
    """The driver's host and two others, each of them a network namespace with one link to a bridge.

    Raises:
        NotPermittedError: This machine or user cannot make namespaces.
    """
    number = os.getpid()
    bridge, subnet = f"sdl{number % 10**7}", f"10.203.{number % 250 + 1}"
    names = [f"{bridge}-{letter}" for letter in "ab"]
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["ip", "link", "delete", bridge], check=False, capture_output=True)
        command("ip", "link", "add", bridge, "type", "bridge")
        command("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
        command("ip", "link", "set", bridge, "up")
        hosts = [Host(f"{subnet}.1")]
        for index, name in enumerate(names):
            port, address = f"{bridge}{index}", f"{subnet}.{index + 2}"
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False, capture_output=True)
            command("ip", "netns", "add", name)
            command("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            command("ip", "link", "set", port, "master", bridge, "up")
            inside = ("ip", "netns", "exec", name)
            command(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            command(*inside, "ip", "link", "set", "lo", "up")
            command(*inside, "ip", "link", "set", "eth0", "up")
            hosts.append(Host(address, inside, port))
        yield hosts[0], hosts[1], hosts[2]


def set_link(host: Host, *, up: bool) -> None:
    """Cut a host off from all others, or connect it again."""
    command("ip", "link", "set", host.port, "up" if up else "down")


def set_isolated(hosts: Sequence[Host], *, isolated: bool) -> None:
    """Cut the hosts off from each other, or connect them again; the driver's host reaches all of them."""
    for host in hosts:
        command("bridge", "link", "set", "dev", host.port, "isolated", "on" if isolated else "off")


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        NotPermittedError: This user may not mount any.
    """
    path.mkdir()
    command("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path))
    try:
        yield path
    finally:
        command("umount", "-l", str(path))


# ---- clusters --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def standalone(
    folder: Path, home: Path, *, cores: int, driver: Host = Host(), hosts: Sequence[Host] = (Host(), Host())
) -> Iterator[str]:
    """A master and one worker for each host.

    Yields:
        The master's URL.
    """
    with contextlib.ExitStack() as stack:

        def start(name: str, host: Host, *words: str) -> tuple[Path, subprocess.Popen[str]]:
            log, (java_class, *more) = folder / f"{name}.log", words
            options = ("--host", host.address, "--port", "0", "--webui-port", "0", *more)
            spark_class = (str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{java_class}")
            context = process(
                [*host.prefix, *spark_class, *options], env=environment(home, host.address), cwd=folder, log=log
            )
            return log, stack.enter_context(context)

        log, master = start("master", driver, "master.Master")
        url = await_line(log, r"Starting Spark master at (spark://\S+)", master)[1]
        offer = ("--cores", str(cores), "--memory", "4g")
        workers = [
            start(f"worker-{number}", host, "worker.Worker", *offer, "--work-dir", str(folder / f"work-{number}"), url)
            for number, host in enumerate(hosts)
        ]
        for log, worker in workers:
            await_line(log, "Successfully registered with master", worker)
        yield url


@dataclass(frozen=True)
class Record:
    """A line of the driver's log."""

    time: float
    level: str
    name: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """How a fit ended.

    Attributes:
        ended: When, in seconds since the epoch.
        error: Class of what it raised; "" where it returned.
        message: Its text.
        lost: Whether a restart could have helped.
        history: One record per epoch.
        restarts: What is said about every restart.
        checkpoints: Where they are.
        folder: Of the event.
    """

    ended: float
    folder: str
    error: str = ""
    message: str = ""
    lost: bool = False
    history: Sequence[dict[str, Any]] = ()
    restarts: Sequence[str] = ()
    checkpoints: str | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """What was trained."""
        found: dict[str, Tensor] = torch.load(Path(self.folder) / "weights.pt", weights_only=True)
        return found


def log_of(folder: str | Path) -> list[Record]:
    """What the driver logged during the fit with this folder, so far."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Record(**json.loads(line)) for line in lines]


class Driver:
    """A driver of its own process, which fits as it is told."""

    def __init__(self, running: subprocess.Popen[str], log: Path, folder: Path) -> None:
        self._running = running
        self._log = log
        self._folder = folder
        self._calm: dict[tuple[int, float], Outcome] = {}

    def start(self, event: FailAt, workers: int, *, dropout: float = 0.2, **params: Any) -> Callable[[], Outcome]:
        """Begin a fit. Without dropout, its weights do not depend on the number of ranks.

        Returns:
            What waits for its end.
        """
        request = {
            "event": {field.name: getattr(event, field.name) for field in dataclasses.fields(event) if field.init}
        }
        assert self._running.stdin is not None
        self._running.stdin.write(
            json.dumps({**request, "workers": workers, "dropout": dropout, "params": params}) + "\n"
        )
        self._running.stdin.flush()
        answer = Path(event.folder) / "outcome.json"

        def look() -> Outcome | None:
            if self._running.poll() is not None:
                raise RuntimeError(f"the driver ended: {self._log.read_text()[-3000:]}")
            return Outcome(**json.loads(answer.read_text())) if answer.exists() else None

        return lambda: await_value(look, FIT_SECONDS, f"the end of a fit with {event}")

    def calm(self, ranks: int, *, dropout: float = 0.2) -> Outcome:
        """A fit to which nothing happens."""
        key = (ranks, dropout)
        if key not in self._calm:
            folder = self._folder / f"calm-{ranks}-{dropout}"
            folder.mkdir()
            self._calm[key] = self.start(FailAt(0, 1, "none", str(folder)), ranks, dropout=dropout)()
        return self._calm[key]


@contextlib.contextmanager
def open_driver(
    folder: Path, home: Path, master: str, *, host: Host = Host(), conf: dict[str, str] | None = None
) -> Iterator[Driver]:
    """A driver with a session on ``master``."""
    log = folder / "driver.log"
    settings = {
        "spark.master": master,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": host.address,
        "spark.driver.bindAddress": host.address,
        "spark.executor.memory": "512m",
        "spark.executor.cores": "1",
        "spark.sql.shuffle.partitions": "4",
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        **(conf or {}),
    }
    words = [sys.executable, "-m", "tests.cluster.driver", json.dumps(settings)]
    with process(words, env=environment(home, host.address), cwd=ROOT, log=log) as running:
        await_line(log, "READY", running)
        yield Driver(running, log, folder)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up, and a driver on it.

    Attributes:
        name: What it is, in the table.
        driver: Fits as it is told.
        hosts: Those of its workers that can be cut off.
    """

    name: str
    driver: Driver
    hosts: tuple[Host, ...] = ()


@contextlib.contextmanager
def open_cluster(name: str, folder: Path) -> Iterator[Cluster]:
    home = spark_home(folder)
    with contextlib.ExitStack() as stack:
        if name in (LOCAL, LOCAL_CLUSTER):
            yield Cluster(TITLES[name], stack.enter_context(open_driver(folder, home, TITLES[name])))
        elif name in (STANDALONE, SPARE):
            url = stack.enter_context(standalone(folder, home, cores=2))
            yield Cluster(TITLES[name], stack.enter_context(open_driver(folder, home, url)))
        else:
            here, *others = stack.enter_context(two_hosts())
            url = stack.enter_context(standalone(folder, home, cores=1, driver=here, hosts=others))
            conf = {
                "spark.network.timeout": "12s",
                "spark.network.timeoutInterval": "2s",
                "spark.executor.heartbeatInterval": "2s",
            }
            driver = stack.enter_context(open_driver(folder, home, url, host=here, conf=conf))
            yield Cluster(TITLES[name], driver, tuple(others))


class Clusters:
    """The one cluster that is up: asking for another one ends it."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Cluster] = {}

    def get(self, name: str) -> Cluster:
        """The cluster of this name."""
        if name not in self._open:
            self.close()
            self._open[name] = self._stack.enter_context(open_cluster(name, self._make_folder(name)))
        return self._open[name]

    def close(self) -> None:
        """End what is up."""
        self._open.clear()
        self._stack.close()
