"""The preflight on real sessions, and `sparkdl doctor` as a user runs it."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from sparkdl.barrier.findings import Request
from sparkdl.barrier.preflight import preflight
from sparkdl.barrier.resources import build_profile, find_executors
from sparkdl.cli import build_parser, main
from sparkdl.errors import LaunchError, SlotsError

pytestmark = [pytest.mark.spark, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]


def test_a_session_that_can_run_the_fit_has_no_errors_and_is_asked_once(spark: SparkSession, tmp_path: Path) -> None:
    request = Request(num_train_workers=4, staging_dir=f"file:{tmp_path}/staging", checkpoint_dir=str(tmp_path))
    report = preflight(spark, request)
    report.raise_errors()
    assert report.warnings == ()
    assert report.slots == 4
    (executor,) = report.executors
    assert executor.executable == sys.executable
    assert executor.missing == ()
    assert [entry.setting for entry in executor.directories] == ["stagingDir", "checkpointDir"]
    assert min(executor.disks.values()) > 0
    assert os.listdir(tmp_path) == []

    jobs = spark.sparkContext.statusTracker().getJobIdsForGroup()
    assert preflight(spark, request).findings == report.findings
    assert spark.sparkContext.statusTracker().getJobIdsForGroup() == jobs, "a local session was asked twice"


def test_all_errors_are_raised_at_once(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    request = Request(num_train_workers=5, device="cuda", staging_dir=f"file:{tmp_path}/file/x", checkpoint_dir="here")
    with pytest.raises(LaunchError, match="for 4 reasons") as error:
        preflight(spark, request).raise_errors()
    for text in (
        "numTrainWorkers=5 needs 5 slots at once, but this cluster runs 4 tasks at a time",
        "master local[5]",
        "device='cuda' needs a GPU for each rank, but Spark has no GPU resources",
        f"stagingDir='file:{tmp_path}/file/x' must be writable from all executors",
        "'here' is a relative path",
    ):
        assert text in str(error.value)


def test_too_few_slots_alone_keep_their_class(spark: SparkSession) -> None:
    with pytest.raises(SlotsError, match=r"^numTrainWorkers=5 needs 5 slots at once, but this cluster runs 4 tasks"):
        preflight(spark, Request(num_train_workers=5)).raise_errors()


@pytest.mark.slow
def test_busy_slots_are_a_note(spark: SparkSession, tmp_path: Path) -> None:
    preflight(spark, Request(num_train_workers=1))  # the session's Python is known from now on
    end = str(tmp_path / "end")

    def wait(_: Any) -> None:
        while not os.path.exists(end):
            time.sleep(0.05)

    job = threading.Thread(target=lambda: spark.sparkContext.parallelize(range(4), 4).foreach(wait))
    job.start()
    try:
        deadline = time.monotonic() + 60
        while (placed := find_executors(spark)) is None or placed.running < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        report = preflight(spark, Request(num_train_workers=2))
    finally:
        Path(end).touch()
        job.join(timeout=60)
    assert report.errors == ()
    assert [finding.found for finding in report.findings if finding.check == "free slots"] == [
        "the ranks will wait for some of 4 running tasks of other jobs to end"
    ]


def test_a_warning_is_logged_once_in_a_session(
    spark: SparkSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver's Python seems to have another torch than the executors'.
    session = spark.newSession()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1" if name == "torch" else "9")
    with caplog.at_level(logging.WARNING, logger="sparkdl"):
        preflight(session, Request(num_train_workers=1))
        preflight(session, Request(num_train_workers=1))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(set(told))
    assert any("Executors have torch" in text and "the driver has 0.1" in text for text in told)


def test_local_mode_has_no_resource_profiles(spark: SparkSession) -> None:
    assert build_profile(spark) is None


def test_four_tasks_connect_to_each_other(spark: SparkSession) -> None:
    report = preflight(spark, Request(num_train_workers=4), ports=True)
    assert [finding.found for finding in report.findings if finding.check == "ports"] == ["4 tasks on 1 host connect"]


# ---- sparkdl doctor --------------------------------------------------------------------------------------------------
def doctor(*arguments: str, command: tuple[str, ...] = (sys.executable, "-m", "sparkdl.cli")) -> tuple[int, str]:
    """Exit status and output of the command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPARK_")}
    done = subprocess.run(
        [*command, "doctor", *arguments],
        env={**environment, "PYSPARK_PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-4000:]
    return done.returncode, done.stdout


@pytest.mark.slow
def test_doctor_prints_each_finding_with_its_remedy(tmp_path: Path) -> None:
    quiet = ("--conf", "spark.ui.enabled=false", "--conf", "spark.log.level=OFF")
    settings = ("--conf", "spark.speculation=true", "--conf", "spark.executor.pyspark.memory=1g")
    status, output = doctor(
        "--master", "local[2]", "--workers", "3", "--staging-dir", f"file:{tmp_path}", *quiet, *settings
    )
    assert status == 1
    lines = output.splitlines()
    assert lines[0] == (
        "error   slots: this cluster runs 2 tasks at a time"
        "  -> Fit with numTrainWorkers=2, or add executors (here: master local[3])"
    )
    assert lines[1].startswith("warning PySpark memory: spark.executor.pyspark.memory=1g leaves")
    assert any(line.startswith("note    speculation: spark.speculation=true") for line in lines)
    assert any(line.startswith(f"ok      stagingDir: file:{tmp_path} is writable from") for line in lines)


@pytest.mark.slow
def test_doctor_under_spark_submit_tells_json() -> None:
    from pyspark.find_spark_home import _find_spark_home

    import sparkdl.cli

    submit = (f"{_find_spark_home()}/bin/spark-submit", "--master", "local[2]", sparkdl.cli.__file__)
    status, output = doctor("--json", command=submit)
    report = json.loads(output.splitlines()[-1])
    assert status == 0
    assert report["slots"] == 2
    assert {finding["check"] for finding in report["findings"]} >= {"slots", "packages", "ports", "local disk"}
    assert report["executors"][0]["executable"] == sys.executable


@pytest.mark.slow
def test_doctor_over_connect() -> None:
    pytest.importorskip("grpc", reason="Spark Connect needs the extra sparkdl-torch[connect]")
    status, output = doctor("--remote", "local[2]")
    assert status == 0
    assert "ok      slots: 2 slots for 2 ranks" in output
    assert "ok      ports: 2 tasks on 1 host connect" in output


def test_doctor_says_why_there_is_no_session() -> None:
    status, output = doctor("--master", "nonsense://x")
    assert status == 1
    assert output.startswith("error   session: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--workers", "0"), "'0' is no number of ranks: use 1 or more"),
        (("--conf", "spark.ui.enabled"), "'spark.ui.enabled' is no setting: use NAME=VALUE"),
        (("--master", "local", "--remote", "sc://x"), "not allowed with argument"),
    ],
)
def test_wrong_arguments_end_with_status_two(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *arguments])
    assert text in capsys.readouterr().err


def test_the_command_is_installed_by_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sparkdl": "sparkdl.cli:main"}
    assert build_parser().prog == "sparkdl"
