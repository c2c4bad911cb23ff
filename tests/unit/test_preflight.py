"""The rules of the preflight, on values made by hand; the probes, in this process on real directories and sockets."""

import json
import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from sparkdl.barrier.directories import probe_directory, remove_markers
from sparkdl.barrier.findings import ExecutorFacts, Finding, Report, Request
from sparkdl.barrier.ports import connect_all
from sparkdl.barrier.probe import ask_here
from sparkdl.barrier.resources import TaskRequest, plan_profile
from sparkdl.barrier.rules import (
    judge_directories,
    judge_disks,
    judge_dynamic_allocation,
    judge_encryption,
    judge_gpus,
    judge_python,
    judge_settings,
    judge_slots,
)
from sparkdl.errors import ExecutorPythonError, LaunchError, SlotsError

FOUR = Request(num_train_workers=4)
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "pandas": "2.3.3"}
A = ExecutorFacts("a", "/bin/python3", VERSIONS)
B = replace(A, host="b")


def told(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.check, finding.message) for finding in findings]


def only(findings: Iterable[Finding]) -> tuple[str, str]:
    (finding,) = findings
    return finding.severity, finding.message


# ---- the report ------------------------------------------------------------------------------------------------------
def test_one_error_is_its_own_sentence() -> None:
    slots = judge_slots(FOUR, slots=2, running=0, local=False)
    sentence = (
        r"^numTrainWorkers=4 needs 4 slots at once, but this cluster runs 2 tasks at a time\. "
        r"Fit with numTrainWorkers=2, or add executors\.$"
    )
    with pytest.raises(SlotsError, match=sentence):
        Report(tuple(slots)).raise_errors()


def test_several_errors_are_raised_at_once() -> None:
    slots = judge_slots(FOUR, slots=2, running=0, local=True)
    python = judge_python([replace(A, missing=("torch",))], A)
    with pytest.raises(
        LaunchError, match=r"for 2 reasons:\n1\. numTrainWorkers=4 .*\n2\. The executors' Python"
    ) as one:
        Report((*slots, *python)).raise_errors()
    assert type(one.value) is LaunchError


def test_errors_of_the_executors_python_keep_their_class() -> None:
    apart = judge_python([replace(A, missing=("torch",)), replace(B, versions={**VERSIONS, "torch": "2.12.1"})], A)
    with pytest.raises(ExecutorPythonError, match=r"2 reasons:\n1\. .*cannot import torch.*\n2\. Executors have torch"):
        Report(tuple(apart)).raise_errors()


def test_no_error_raises_nothing() -> None:
    report = Report((Finding("disk", "warning", "it is small"), Finding("slots", "ok", "4 slots")))
    report.raise_errors()
    assert [finding.check for finding in report.warnings] == ["disk"]
    assert json.loads(json.dumps(report.as_dict()))["findings"][0]["severity"] == "warning"


def test_credentials_are_not_in_the_text_of_a_request() -> None:
    assert "hush" not in repr(replace(FOUR, storage_options={"secret": "hush"}))


# ---- slots -----------------------------------------------------------------------------------------------------------
def test_busy_slots_are_a_note() -> None:
    (slots, free) = told(judge_slots(FOUR, slots=4, running=3, local=False))
    assert slots == ("ok", "slots", "4 slots for 4 ranks.")
    assert free == ("note", "free slots", "The ranks will wait for some of 3 running tasks of other jobs to end.")
    assert len(told(judge_slots(FOUR, slots=8, running=3, local=False))) == 1


def test_slots_over_connect_cannot_be_told() -> None:
    assert only(judge_slots(FOUR, slots=None, running=None, local=False)) == (
        "note",
        "How many slots the cluster has cannot be told over Spark Connect.",
    )


def test_no_slots_at_all_and_the_ranks_of_a_restart() -> None:
    assert only(judge_slots(FOUR, slots=0, running=0, local=False))[1].endswith(
        "runs 0 tasks at a time. Add executors."
    )
    found = only(judge_slots(replace(FOUR, min_workers=2), slots=4, running=0, local=False))
    assert found == ("ok", "4 slots for 4 ranks; a restart needs 2 of them.")


def test_dynamic_allocation_is_an_error_except_in_local_mode() -> None:
    settings = {"spark.dynamicAllocation.enabled": "true"}
    severity, message = only(judge_dynamic_allocation(FOUR, settings, local=False))
    assert severity == "error"
    assert message == (
        "numTrainWorkers=4 runs in a barrier stage, which Spark does not start while dynamic allocation is on, but "
        "spark.dynamicAllocation.enabled=true. Submit with --conf spark.dynamicAllocation.enabled=false and a fixed "
        "number of executors (--num-executors or spark.cores.max)."
    )
    assert only(judge_dynamic_allocation(FOUR, settings, local=True))[0] == "ok"
    assert only(judge_dynamic_allocation(FOUR, {}, local=False))[0] == "ok"


# ---- Python ----------------------------------------------------------------------------------------------------------
def test_the_hosts_that_lack_a_package_are_named() -> None:
    (found,) = told(judge_python([A, replace(B, missing=("torch", "petastorm"))], A))
    assert found[:2] == ("error", "packages")
    assert "(/bin/python3, 3.11.7 on b) cannot import torch, petastorm" in found[2]


@pytest.mark.parametrize(
    ("package", "severity", "check"),
    [("torch", "error", "packages"), ("python", "error", "Python"), ("pandas", "warning", "packages")],
)
def test_versions_that_differ_between_executors_are_named_with_their_hosts(
    package: str, severity: str, check: str
) -> None:
    (found,) = told(judge_python([A, replace(B, versions={**VERSIONS, package: "1.0"})], A))
    assert found[:2] == (severity, check)
    title = "Python" if package == "python" else package
    assert f"Executors have {title} {VERSIONS[package]} on a and 1.0 on b. Install the same" in found[2]


def test_another_version_on_the_driver_is_a_warning() -> None:
    severity, message = only(judge_python([A, B], replace(A, versions={**VERSIONS, "torch": "2.12.0"})))
    assert severity == "warning"
    assert "Executors have torch 2.13.0 on a, b, the driver has 2.12.0" in message
    assert only(judge_python([A, B], A))[0] == "ok"


# ---- GPUs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "settings", "num_gpus", "severity", "text"),
    [
        ("cpu", {"task": "0.25"}, None, "ok", "Not asked for"),
        ("auto", {"task": "1", "executor": "2"}, None, "ok", "One for each task, 2 for each executor"),
        (
            "cuda",
            {"task": "0.25", "executor": "1"},
            1,
            "error",
            "up to 4 ranks share a GPU, which NCCL refuses. Set spark",
        ),
        ("auto", {"task": "0.5", "executor": "1"}, None, "error", ". Set spark.task.resource.gpu.amount=1."),
        (
            "cuda",
            {"task": "2", "executor": "2"},
            2,
            "error",
            "amount=2 reserves 2 for each. Set spark.task.resource.gpu",
        ),
        ("auto", {"executor": "2"}, 2, "warning", "executors have 2 each, but Spark assigns none to tasks"),
        (
            "cuda",
            {},
            0,
            "error",
            "but Spark has no GPU resources, and torch sees no GPU on a. Fit with device='cpu', or",
        ),
        ("cuda", {}, None, "ok", "None in Spark's resources"),
        ("auto", {}, 0, "ok", "None; the ranks use the CPU"),
        ("auto", {}, 2, "note", "Torch sees GPUs on a that Spark does not know of"),
    ],
)
def test_each_rank_has_one_gpu_of_its_own(device, settings, num_gpus, severity, text) -> None:
    named = {f"spark.{side}.resource.gpu.amount": amount for side, amount in settings.items()}
    found = only(judge_gpus(replace(FOUR, device=device), named, [replace(A, num_gpus=num_gpus)]))
    assert found[0] == severity
    assert text.lower() in found[1].lower()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"executor_cores": None, "executor_gpus": 4, "task_gpus": 1}, None),
        ({"executor_cores": 8, "executor_gpus": 2, "task_gpus": 1}, TaskRequest(5, 1)),
        ({"executor_cores": 8, "executor_gpus": 1, "task_gpus": 0.25}, TaskRequest(5, 1)),
        ({"executor_cores": 8, "executor_gpus": 1, "task_gpus": 1}, None),
        ({"executor_cores": 4, "executor_gpus": 4, "task_gpus": 2}, TaskRequest(1, 1)),
        ({"executor_cores": 2, "executor_gpus": 4, "task_gpus": 4}, TaskRequest(1, 1)),
        ({"executor_cores": 8}, TaskRequest(5, 0)),
        ({"executor_cores": 8, "task_cpus": 5}, None),
        ({"executor_cores": 1}, None),
        ({"executor_cores": 1, "executor_gpus": 1}, TaskRequest(1, 1)),
    ],
)
def test_a_profile_leaves_room_for_one_task_on_an_executor(numbers, expected) -> None:
    assert plan_profile(**numbers) == expected


# ---- storage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("free", "request_", "severity"),
    [
        (32 << 20, FOUR, "error"),
        (500 << 20, FOUR, "warning"),
        (2 << 30, FOUR, "ok"),
        (32 << 20, replace(FOUR, staging_dir="s3://b/x", cache="memory"), "warning"),
    ],
)
def test_a_full_disk_is_named_with_its_host(free: int, request_: Request, severity: str) -> None:
    found = only(
        judge_disks(request_, [replace(A, disks={"/small": 1, "/spark": free}), replace(B, disks={"/c": 9 << 30})])
    )
    assert found[0] == severity
    assert "/spark on a" in found[1]
    assert ("spark.local.dir" in found[1]) == (severity != "ok")


def test_a_full_file_system_is_found_here() -> None:
    """`/dev/full`'s siblings: the kernel's own file systems have no space at all."""
    facts = ask_here(disks=("/proc",))
    assert only(judge_disks(FOUR, [facts]))[0] == "error"


def marked(path: Path, host: str, index: int, num_tasks: int = 2) -> ExecutorFacts:
    """What a task on ``host`` would find at ``path``."""
    found = probe_directory(
        "stagingDir", f"file:{path}", None, probe_id="p", host=host, index=index, num_tasks=num_tasks
    )
    return replace(A, host=host, directories=(found,))


def test_two_hosts_that_share_a_directory_see_each_other_and_leave_nothing(tmp_path: Path) -> None:
    staging = replace(FOUR, staging_dir=f"file:{tmp_path}/not/yet/there")
    facts = [marked(tmp_path / "not/yet/there", host, index) for index, host in enumerate("ab")]
    assert only(judge_directories(staging, facts)) == ("ok", f"file:{tmp_path}/not/yet/there is writable from a, b.")
    assert os.listdir(tmp_path) == []


def test_two_hosts_with_a_directory_each_are_found_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    facts = [marked(tmp_path / host, host, index) for index, host in enumerate("ab")]
    severity, message = only(judge_directories(replace(FOUR, staging_dir="file:/x"), facts))
    assert severity == "error"
    assert (
        "stagingDir='file:/x' must be one directory for all executors, but a and b do not see each other's" in message
    )
    for host in "ab":
        assert os.listdir(tmp_path / host)
        remove_markers(f"file:{tmp_path / host}", None, probe_id="p")
        assert os.listdir(tmp_path / host) == []


def test_a_directory_that_cannot_be_written_to_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = marked(tmp_path / "file" / "under", "a", 0)
    severity, message = only(judge_directories(replace(FOUR, staging_dir="file:/x"), [facts]))
    assert severity == "error"
    assert (
        "stagingDir='file:/x' must be writable from all executors, but executors on a cannot write there: " in message
    )
    assert "Not a directory" in message


def test_a_scheme_that_nobody_knows_is_a_finding() -> None:
    found = probe_directory("stagingDir", "nope://x/y", None, probe_id="p", host="a", index=0, num_tasks=1)
    assert "'nope://x/y' is on a file system that this Python cannot open" in found.error


def test_a_message_holds_no_credentials() -> None:
    options = {"region": "x", "secret_key": "hush", "access_key": "hush", "unknown_hush": "hush"}
    found = probe_directory("stagingDir", "s3://b/x", options, probe_id="p", host="a", index=0, num_tasks=1)
    assert found.error
    assert "hush'" not in found.error.replace("unknown_hush", "")


# ---- ports -----------------------------------------------------------------------------------------------------------
class Gathering:
    """All-gathers of two threads, as Spark's of two tasks."""

    def __init__(self, replies: int = 2) -> None:
        self._barrier = threading.Barrier(replies, timeout=20)
        self._texts: list[str] = [""] * replies

    def of(self, rank: int):
        def gather(text: str) -> list[str]:
            self._texts[rank] = text
            self._barrier.wait()
            found = list(self._texts)
            self._barrier.wait()
            return found

        return gather


def test_tasks_connect_to_each_other() -> None:
    gathering, found = Gathering(), [None, None]

    def run(rank: int) -> None:
        found[rank] = connect_all("127.0.0.1", rank, gathering.of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == [[], []]


def test_a_peer_that_cannot_be_reached_is_named() -> None:
    def gather(text: str) -> list[str]:
        return [text, json.dumps(["127.0.0.1", 9])]  # the discard port, where nobody listens

    ((rank, error),) = connect_all("127.0.0.1", 0, gather, timedelta(seconds=5))
    assert rank == 1
    assert "refused" in error
    assert "127.0.0.1:9" in error


# ---- Spark's settings ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    ["spark.authenticate", "spark.network.crypto.enabled", "spark.ssl.enabled", "spark.io.encryption.enabled"],
)
def test_gradients_in_the_clear_are_refused_where_spark_encrypts(name: str) -> None:
    settings = {name: "true"}
    severity, message = only(judge_encryption(FOUR, settings, local=False, num_hosts=None))
    assert severity == "error"
    assert message == (
        f"{name}=true asks for protected traffic, but ranks exchange gradients in the clear: neither gloo nor NCCL can "
        "encrypt. Protect the network between the hosts (WireGuard or IPsec between them, or a network policy that "
        "keeps others out), then fit with allowUnencryptedTraffic=True."
    )
    allowed = replace(FOUR, allow_unencrypted_traffic=True)
    assert only(judge_encryption(allowed, settings, local=False, num_hosts=2))[0] == "note"


def test_traffic_that_leaves_no_host_may_be_plain() -> None:
    settings = {"spark.authenticate": "true"}
    assert only(judge_encryption(FOUR, settings, local=True, num_hosts=None))[0] == "ok"
    assert only(judge_encryption(FOUR, settings, local=False, num_hosts=1))[0] == "ok"
    assert only(judge_encryption(Request(num_train_workers=1), settings, local=False, num_hosts=3))[0] == "ok"
    assert only(judge_encryption(FOUR, {}, local=False, num_hosts=3))[0] == "ok"


@pytest.mark.parametrize(
    ("settings", "severity", "check", "text"),
    [
        ({"spark.speculation": "true"}, "note", "speculation", "never speculated"),
        ({}, "ok", "speculation", "Off"),
        ({}, "ok", "adaptive execution", "repartitionById"),
        ({}, "note", "barrier timeout", "365 days"),
        ({"spark.barrier.sync.timeout": "60"}, "ok", "barrier timeout", "spark.barrier.sync.timeout=60"),
        ({}, "note", "slots check", "looks 40 times, every 15s"),
        ({"spark.python.worker.reuse": "false"}, "note", "worker reuse", "Set spark.python.worker.reuse=true"),
        (
            {"spark.executor.pyspark.memory": "2g", "spark.executor.cores": "4"},
            "warning",
            "PySpark memory",
            "leaves 512 MiB of address space for each Python worker; torch alone takes more. Leave it unset, or set "
            "spark.executor.pyspark.memory=8g",
        ),
    ],
)
def test_settings_worth_knowing(settings: dict[str, str], severity: str, check: str, text: str) -> None:
    found = [entry for entry in told(judge_settings(settings)) if entry[1] == check]
    assert [(entry[0], text in entry[2]) for entry in found] == [(severity, True)]


def test_settings_that_do_no_harm_are_not_mentioned() -> None:
    checks = {finding.check for finding in judge_settings({"spark.executor.pyspark.memory": "16g"})}
    assert checks.isdisjoint({"PySpark memory", "worker reuse"})


def test_the_probe_tells_of_this_process() -> None:
    facts = ask_here(disks=(os.getcwd(), "/no/such"))
    assert facts.missing == ()
    assert {"python", "torch", "pyarrow", "numpy", "pandas", "petastorm", "sparkdl-torch"} == set(facts.versions)
    assert facts.disks[os.getcwd()] == pytest.approx(shutil.disk_usage(os.getcwd()).free, rel=0.2)
    assert facts.directories == ()
