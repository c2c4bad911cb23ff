"""Clusters and drivers for tests that break them, and a table of what was measured at the end of the run."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.cluster.clusters import Driver, Host, NotPermittedError, open_driver, spark_home, standalone, two_hosts

RESULTS = "SPARKDL_FAULTS_RESULTS"  # a folder; without it the table is only printed
COMMAND = "make faults"
LOCAL, LOCAL_CLUSTER, STANDALONE, SPARE, NETWORK = "local", "local-cluster", "standalone", "spare", "network"
TITLES = {
    LOCAL: "local[4]",
    LOCAL_CLUSTER: "local-cluster[2,1,1024]",
    STANDALONE: "standalone, 2 workers",
    SPARE: "standalone, 2 workers",
    NETWORK: "standalone, 2 network namespaces",
}


@dataclass(frozen=True)
class Measured:
    """What one failure led to.

    Attributes:
        fault: What happened.
        cluster: Where.
        outcome: "error", "restart", "trained" (without a restart) or "skipped".
        detect: Seconds until the driver knew.
        bar: Seconds within which it should have known.
        resume: Seconds until the next attempt's first step.
        repeated: Steps that were done twice.
        rows_lost: Rows that history misses.
        weights: How they compare with those of a run that nothing happened to.
        cause: What the user was told first.
    """

    fault: str
    cluster: str
    outcome: str
    detect: float | None = None
    bar: float | None = None
    resume: float | None = None
    repeated: int | None = None
    rows_lost: int | None = None
    weights: str = ""
    cause: str = ""


_measured = pytest.StashKey[list[Measured]]()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Measured], None]:
    """Adds a line to the table."""
    return request.config.stash.setdefault(_measured, []).append


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
def _open(name: str, folder: Path) -> Iterator[Cluster]:
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
            conf = {"spark.network.timeout": "12s", "spark.executor.heartbeatInterval": "2s"}
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
            self._open[name] = self._stack.enter_context(_open(name, self._make_folder(name)))
        return self._open[name]

    def close(self) -> None:
        """End what is up."""
        self._open.clear()
        self._stack.close()


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    """What starts clusters."""
    found = Clusters(tmp_path_factory.mktemp)
    yield found
    found.close()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, clusters: Clusters, measured: Callable[[Measured], None]) -> Cluster:
    """The cluster that a test names; tests of one name that follow each other share it."""
    try:
        return clusters.get(request.param)
    except NotPermittedError as refused:
        measured(Measured("all", TITLES[request.param], "skipped", cause=str(refused)))
        pytest.skip(f"{request.param}: {refused}")


# ---- the table -------------------------------------------------------------------------------------------------------
def _table(rows: list[Measured]) -> list[str]:
    names = ("fault", "cluster", "outcome", "detect s", "bar s", "resume s", "steps again", "rows lost", "weights")
    lines = ["| " + " | ".join((*names, "first cause")) + " |"]
    lines.append("| --- | --- | --- |" + " ---: |" * 5 + " --- | --- |")
    for row in rows:
        seconds = ["" if value is None else f"{value:.1f}" for value in (row.detect, row.bar, row.resume)]
        counts = ["" if value is None else str(value) for value in (row.repeated, row.rows_lost)]
        cause = row.cause.partition("\n")[0].replace("|", "/")
        lines.append(
            "| " + " | ".join((row.fault, row.cluster, row.outcome, *seconds, *counts, row.weights, cause)) + " |"
        )
    return lines


def _machine() -> dict[str, str | int | float]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "pyspark", "pyarrow", "petastorm", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _write(folder: Path, rows: list[Measured]) -> None:
    machine, versions = _machine(), _versions()
    stem = folder / f"faults_{datetime.date.today().isoformat()}"
    told = {"command": COMMAND, "machine": machine, "versions": versions, "faults": [asdict(row) for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
    facts = [f"- {title}: " + ", ".join(f"{name} {value}" for name, value in found.items())
             for title, found in (("machine", machine), ("versions", versions))]  # fmt: skip
    lines = [f"`{COMMAND}`", "", *facts, "", *_table(rows)]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where the environment says so."""
    rows = config.stash.get(_measured, [])
    if not rows:
        return
    terminalreporter.section("faults")
    for line in _table(rows):
        terminalreporter.write_line(line)
    folder = os.environ.get(RESULTS)
    if folder:
        _write(Path(folder), rows)
