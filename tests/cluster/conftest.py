"""Clusters for tests that break them, and a table of what was measured at the end of the run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import TITLES, Cluster, Clusters, NotPermittedError
from tests.cluster.table import Measured, table_of, write

RESULTS = "SPARKDL_FAULTS_RESULTS"  # a folder; without it the table is only printed

_measured = pytest.StashKey[list[Measured]]()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Measured], None]:
    """Adds a line to the table."""
    return request.config.stash.setdefault(_measured, []).append


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where the environment says so."""
    rows = config.stash.get(_measured, [])
    if not rows:
        return
    terminalreporter.section("faults")
    for line in table_of(rows):
        terminalreporter.write_line(line)
    folder = os.environ.get(RESULTS)
    if folder:
        write(Path(folder), rows)
