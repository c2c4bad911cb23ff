"""The preflight on a standalone master with two workers of two GPUs each, as far as Spark can tell."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyspark
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(280)]

HOME = Path(pyspark.__file__).parent
GPUS = """#!/bin/sh
echo '{"name": "gpu", "addresses": ["0", "1"]}'
"""
SCRIPT = """
import dataclasses, json, sys, time
import pyarrow as pa
from pyspark.sql import SparkSession, functions as F
from sparkdl.barrier.findings import Request
from sparkdl.barrier.preflight import preflight
from sparkdl.barrier.resources import await_slots, build_profile, find_executors, find_slots, profile_for

master, apart, shared, task_gpus = sys.argv[1:]
settings = {
    "spark.ui.enabled": "false", "spark.log.level": "OFF", "spark.driver.host": "127.0.0.1",
    "spark.executor.memory": "600m", "spark.executor.cores": "4", "spark.executor.resource.gpu.amount": "2",
    "spark.task.resource.gpu.amount": task_gpus, "spark.io.encryption.enabled": "true",
}
builder = SparkSession.builder.master(master)
for name, value in settings.items():
    builder = builder.config(name, value)
spark = builder.getOrCreate()

def whereabouts(batches):
    from pyspark import BarrierTaskContext
    task = BarrierTaskContext.get()
    task.barrier()
    for _ in batches:
        pass
    address = task.getTaskInfos()[task.partitionId()].address
    yield pa.RecordBatch.from_pydict({"told": [json.dumps([address, task.cpus(), task.resources()["gpu"].addresses])]})

def run(number, profile):
    source = spark.range(number).repartitionById(number, F.col("id").cast("int"))
    told = source.mapInArrow(whereabouts, "told string", barrier=True, profile=profile).collect()
    return [json.loads(row[0]) for row in told]

if task_gpus == "2":
    await_slots(spark, 2)
    profile = profile_for(spark, "auto")
    report = preflight(spark, Request(num_train_workers=4), profile=profile)
    gpus = [finding for finding in report.as_dict()["findings"] if finding["check"] == "GPUs"]
    print(json.dumps({"all": run(4, profile), "gpus": gpus}))
    sys.exit()

slots = await_slots(spark, 4)
profile = build_profile(spark)
request = Request(num_train_workers=4, staging_dir="file:" + apart, checkpoint_dir="file:" + shared)
started = time.perf_counter()
report = preflight(spark, request)
first = time.perf_counter() - started
started = time.perf_counter()
again = preflight(spark, dataclasses.replace(request, staging_dir=None))
second = time.perf_counter() - started
print(json.dumps({
    "slots": [slots, find_slots(spark, profile)],
    "same profile": build_profile(spark) is profile,
    "alone": run(2, profile),
    "all": run(4, None),
    "hosts": sorted({facts.host for facts in report.executors}),
    "report": report.as_dict(),
    "again": again.as_dict(),
    "seconds": [first, second],
    "spark hosts": find_executors(spark).hosts,
}))
spark.stop()
"""


def free_port() -> int:
    """A port that was free a moment ago; Spark's master takes the next one if it no longer is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def other_host(folder: Path) -> list[str] | None:
    """A prefix that gives a process another host name and a folder of its own; None where that is not allowed."""
    script = 'hostname other-host && mount -t tmpfs none "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "--uts", "sh", "-c", script, str(folder)]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return None
    return prefix if allowed else None


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a driver found on the cluster."""
    folder = tmp_path_factory.mktemp("standalone")
    apart, shared, script, discover = folder / "apart", folder / "shared", folder / "job.py", folder / "gpus.sh"
    apart.mkdir()
    shared.mkdir()
    script.write_text(SCRIPT)
    discover.write_text(GPUS)
    discover.chmod(0o755)
    prefix = other_host(apart)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYTHONPATH"))}
    local = {**kept, "SPARK_HOME": str(HOME), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_DAEMON_MEMORY": "256m"}
    gpus = f"-Dspark.worker.resource.gpu.amount=2 -Dspark.worker.resource.gpu.discoveryScript={discover}"
    daemons = {**local, "SPARK_WORKER_OPTS": gpus, "PYSPARK_PYTHON": sys.executable}
    place = f"127.0.0.1:{free_port()}"
    here = ("--host", "127.0.0.1", "--webui-port", "0")
    master = ("org.apache.spark.deploy.master.Master", *here, "--port", place.rpartition(":")[2])
    worker = ("org.apache.spark.deploy.worker.Worker", *here, "--cores", "4", "--memory", "700m")
    started = []
    with (folder / "log").open("w") as log:

        def start(*arguments: str) -> None:
            started.append(
                subprocess.Popen(arguments, env=daemons, stdout=log, stderr=log, start_new_session=True, cwd=folder)
            )

        try:
            run = str(HOME / "bin" / "spark-class")
            start(run, *master)
            for name, before in (("a", []), ("b", prefix or [])):
                start(*before, run, *worker, "--work-dir", str(folder / name), f"spark://{place}")
            runs = [
                subprocess.run(
                    [sys.executable, str(script), f"spark://{place}", str(apart), str(shared), task_gpus],
                    env={**local, "PYSPARK_PYTHON": sys.executable},
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=False,
                )
                for task_gpus in ("1", "2")
            ]
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)
    for done in runs:
        assert done.returncode == 0, done.stderr[-6000:] + (folder / "log").read_text()[-4000:]
    one, several = (json.loads(done.stdout.splitlines()[-1]) for done in runs)
    return {**one, "several": several, "two hosts": prefix is not None, "apart": str(apart)}


def test_the_profile_puts_one_trainer_on_each_executor(told: dict[str, Any]) -> None:
    assert told["slots"] == [4, 2]
    assert told["same profile"]
    assert [(cpus, len(gpus)) for _, cpus, gpus in told["alone"]] == [(3, 1), (3, 1)]
    assert len({address for address, _, _ in told["alone"]}) == 2


def test_no_two_tasks_of_an_executor_share_a_gpu(told: dict[str, Any]) -> None:
    assert len({(address, gpu) for address, _, (gpu,) in told["all"]}) == 4
    assert len({address for address, _, _ in told["all"]}) == 2


def test_where_tasks_would_get_several_gpus_each_gpu_gets_a_rank(told: dict[str, Any]) -> None:
    found = told["several"]
    assert [cpus for _, cpus, _ in found["all"]] == [2, 2, 2, 2]
    assert len({(address, gpu) for address, _, (gpu,) in found["all"]}) == 4
    assert [finding["severity"] for finding in found["gpus"]] == ["ok"]


def test_executors_of_both_hosts_are_asked(told: dict[str, Any]) -> None:
    if not told["two hosts"]:
        pytest.skip("this machine does not allow a process another host name (unshare)")
    assert told["hosts"] == sorted({"other-host", socket.gethostname()})


def test_a_directory_that_two_hosts_do_not_share_is_found_out(told: dict[str, Any]) -> None:
    if not told["two hosts"]:
        pytest.skip("this machine does not allow a process a mount of its own (unshare)")
    (error,) = [finding for finding in told["report"]["findings"] if finding["severity"] == "error"]
    assert error["check"] == "stagingDir"
    assert error["asked"] == f"stagingDir='file:{told['apart']}' must be one directory for all executors"
    assert set(re.findall(r"[\w-]+", error["found"])) >= set(told["hosts"])
    shared = [finding for finding in told["report"]["findings"] if finding["check"] == "checkpointDir"]
    assert [finding["severity"] for finding in shared] == ["ok"]
    assert os.listdir(told["apart"]) == []
    assert os.listdir(Path(told["apart"]).parent / "shared") == []


def test_the_preflight_of_a_warm_cluster_is_quick(told: dict[str, Any]) -> None:
    assert [finding for finding in told["again"]["findings"] if finding["severity"] == "error"] == []
    assert told["seconds"][1] < 10, told["seconds"]
    # To Spark both workers have one address, so that gradients would not leave the host.
    assert told["spark hosts"] == ["127.0.0.1"]
    (encryption,) = [finding for finding in told["again"]["findings"] if finding["check"] == "encryption"]
    assert encryption["found"] == "spark.io.encryption.enabled=true, and no gradients leave a host"
