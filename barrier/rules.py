"""The rules of the preflight: from what was asked and what was found on the cluster to findings.

No Spark, no files: every rule is a function of values.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from sparkdl.barrier.findings import DirectoryFacts, ExecutorFacts, Finding, Request, Severity

__all__ = [
    "judge_directories",
    "judge_disks",
    "judge_dynamic_allocation",
    "judge_encryption",
    "judge_gpus",
    "judge_python",
    "judge_settings",
    "judge_slots",
    "python_advice",
]

Settings = Mapping[str, str]

_MUST_BE_EQUAL = ("python", "torch", "pyarrow", "numpy", "petastorm", "sparkdl-torch")
_ENCRYPTION = ("spark.authenticate", "spark.network.crypto.enabled", "spark.ssl.enabled", "spark.io.encryption.enabled")
_FULL, _TIGHT = 64 << 20, 1 << 30
_WORKER_MEMORY = 2 << 30
_UNITS = {"b": 1, "": 1 << 20, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


# ---- slots -----------------------------------------------------------------------------------------------------------
def judge_slots(request: Request, *, slots: int | None, running: int | None, local: bool) -> Iterator[Finding]:
    """More ranks than slots is an error; busy slots only mean waiting.

    Args:
        request: What was asked.
        slots: Tasks that the cluster runs at once; None where Spark does not tell.
        running: Tasks that run now; None where Spark does not tell.
        local: The master is ``local[n]``.
    """
    ranks = request.num_train_workers
    if slots is None:
        yield Finding("slots", "note", "how many slots the cluster has cannot be told over Spark Connect")
        return
    if slots < ranks:
        remedy = f"Fit with numTrainWorkers={slots}, or add executors" if slots else "Add executors"
        yield Finding(
            "slots",
            "error",
            f"this cluster runs {slots} {'task' if slots == 1 else 'tasks'} at a time",
            f"numTrainWorkers={ranks} needs {ranks} slots at once",
            remedy + (f" (here: master local[{ranks}])" if local else ""),
        )
        return
    least = request.min_workers or ranks
    restarts = f"; a restart needs {least} of them" if least < ranks else ""
    yield Finding("slots", "ok", f"{slots} slots for {_count(ranks, 'rank')}{restarts}")
    if running is not None and slots - running < ranks:
        tasks = _count(running, "running task")
        yield Finding("free slots", "note", f"the ranks will wait for some of {tasks} of other jobs to end")


def judge_dynamic_allocation(request: Request, settings: Settings, *, local: bool) -> Iterator[Finding]:
    """Spark refuses barrier stages while dynamic allocation is on (SPARK-24942), except in local mode."""
    name = "spark.dynamicAllocation.enabled"
    if local or not _is_on(settings, name):
        yield Finding("dynamic allocation", "ok", "off")
        return
    yield Finding(
        "dynamic allocation",
        "error",
        f"{name}=true",
        f"numTrainWorkers={request.num_train_workers} runs in a barrier stage, which Spark does not start while "
        "dynamic allocation is on",
        f"Submit with --conf {name}=false and a fixed number of executors (--num-executors or spark.cores.max)",
    )


# ---- Python ----------------------------------------------------------------------------------------------------------
def python_advice(executable: str = sys.executable) -> str:
    """How executors get the driver's Python."""
    return f"Set PYSPARK_PYTHON={executable} before the session starts (or spark.pyspark.python in its conf)"


def judge_python(executors: Sequence[ExecutorFacts], driver: ExecutorFacts) -> Iterator[Finding]:
    """Packages that are missing somewhere, and versions that are not the same everywhere."""
    if not executors:
        return
    lacking = [facts for facts in executors if facts.missing]
    for (executable, version, missing), hosts in _by(
        lacking, lambda facts: (facts.executable, facts.versions.get("python", "?"), facts.missing)
    ).items():
        others = len({facts.host for facts in executors}) > len(hosts)
        where = f" on {_listing(hosts)}" if others else ""
        yield Finding(
            "packages",
            "error",
            f"the executors' Python ({executable}, {version}{where}) cannot import {', '.join(missing)}",
            remedy=f"{python_advice()}, or install them there: pip install sparkdl-torch",
        )
    differing = list(_differing_versions(executors, driver))
    yield from differing
    if not lacking and not differing:
        told = ", ".join(f"{name} {version}" for name, version in executors[0].versions.items())
        yield Finding("packages", "ok", f"{told} on {_listing({facts.host for facts in executors})}")


def _differing_versions(executors: Sequence[ExecutorFacts], driver: ExecutorFacts) -> Iterator[Finding]:
    for package in dict.fromkeys(name for facts in executors for name in facts.versions):
        knowing = [facts for facts in executors if package in facts.versions]
        by_version = _by(knowing, lambda facts, package=package: facts.versions[package])
        told = " and ".join(f"{version} on {_listing(hosts)}" for version, hosts in by_version.items())
        if len(by_version) > 1:
            severity: Severity = "error" if package in _MUST_BE_EQUAL else "warning"
            check = "Python" if package == "python" else "packages"
            found = f"executors have {_title(package)} {told}"
            yield Finding(check, severity, found, remedy="Install the same versions on all executors")
        elif driver.versions.get(package, told) not in (*by_version, told):
            found = f"executors have {_title(package)} {told}, the driver has {driver.versions[package]}"
            yield Finding("packages", "warning", found, remedy="Install the same versions on driver and executors")


# ---- GPUs ------------------------------------------------------------------------------------------------------------
def judge_gpus(request: Request, settings: Settings, executors: Sequence[ExecutorFacts]) -> Iterator[Finding]:
    """One GPU of its own for each rank.

    NCCL refuses two ranks on one device, and a rank uses one device only.
    """
    if request.device == "cpu":
        yield Finding("GPUs", "ok", "not asked for (device='cpu')")
        return
    per_executor = _number(settings.get("spark.executor.resource.gpu.amount"))
    per_task = _number(settings.get("spark.task.resource.gpu.amount"))
    seen = {facts.host: facts.num_gpus for facts in executors if facts.num_gpus is not None}
    line = "spark.task.resource.gpu.amount=1"
    asked = f"device={request.device!r} gives each rank one GPU"
    if 0 < per_task < 1:
        ranks = int(1 / per_task)
        found = f"with spark.task.resource.gpu.amount={per_task:g} up to {ranks} ranks share a GPU, which NCCL refuses"
        yield Finding("GPUs", "error", found, asked, f"Set {line}")
    elif per_task > 1:
        found = f"spark.task.resource.gpu.amount={per_task:g} reserves {per_task:g} for each"
        yield Finding("GPUs", "error", found, asked, f"Set {line}")
    elif per_task == 1:
        yield Finding("GPUs", "ok", f"one for each task, {per_executor or 1:g} for each executor")
    elif per_executor:
        found = (
            f"executors have {per_executor:g} each, but Spark assigns none to tasks: ranks count them by their place"
        )
        yield Finding("GPUs", "warning", found, remedy=f"Set {line}")
    elif request.device == "cuda" and seen and not any(seen.values()):
        yield Finding(
            "GPUs",
            "error",
            f"Spark has no GPU resources, and torch sees no GPU on {_listing(seen)}",
            "device='cuda' needs a GPU for each rank",
            f"Fit with device='cpu', or start the executors with spark.executor.resource.gpu.amount=1 and {line}",
        )
    elif any(seen.values()):
        hosts = _listing(host for host, number in seen.items() if number)
        found = (
            f"torch sees GPUs on {hosts} that Spark does not know of: each rank takes the one of its place on the host"
        )
        remedy = f"Set spark.executor.resource.gpu.amount and {line}"
        yield Finding("GPUs", "note", found, remedy=remedy)
    else:
        yield Finding("GPUs", "ok", "none; the ranks use the CPU" if seen else "none in Spark's resources")


# ---- storage ---------------------------------------------------------------------------------------------------------
def judge_disks(request: Request, executors: Sequence[ExecutorFacts]) -> Iterator[Finding]:
    """Free space where ranks spool and cache: the roomiest of Spark's local directories counts, as they use that."""
    roomiest = []
    for facts in executors:
        if facts.disks:
            directory, free = max(facts.disks.items(), key=lambda entry: entry[1])
            roomiest.append((free, facts.host, directory))
    for free, host, directory in sorted(set(roomiest)):
        if free < _TIGHT:
            severity: Severity = "error" if free < _FULL and request.needs_local_disk else "warning"
            found = f"{_size(free)} are free in {directory} on {host}, where ranks keep rows"
            remedy = (
                "Free space there, or give the executors a larger disk: spark.local.dir (SPARK_LOCAL_DIRS on a cluster)"
            )
            yield Finding("local disk", severity, found, remedy=remedy)
    if roomiest and min(roomiest)[0] >= _TIGHT:
        free, host, directory = min(roomiest)
        yield Finding("local disk", "ok", f"{_size(free)} free in {directory} on {host}, or more")


def judge_directories(request: Request, executors: Sequence[ExecutorFacts]) -> Iterator[Finding]:
    """Directories that an executor cannot write to, and those that two hosts do not share.

    Every probe task leaves a marker and looks for those of the others. On shared storage the later of two tasks sees
    the marker of the earlier one; where neither sees the other's, they wrote to different places.
    """
    for setting, url in request.directories.items():
        found = [(facts.host, entry) for facts in executors for entry in facts.directories if entry.setting == setting]
        failed = _by([pair for pair in found if pair[1].error], lambda pair: pair[1].error, lambda pair: pair[0])
        for error, hosts in failed.items():
            yield Finding(
                setting,
                "error",
                f"executors on {_listing(hosts)} cannot write there: {error}",
                f"{setting}={url!r} must be writable from all executors",
                "Grant them access, or use a directory that all of them reach",
            )
        written = [pair for pair in found if not pair[1].error]
        apart = _apart(written)
        if apart is not None:
            yield Finding(
                setting,
                "error",
                f"{apart[0]} and {apart[1]} do not see each other's files there: it is a local directory of each",
                f"{setting}={url!r} must be one directory for all executors",
                "Use a shared mount or a URL (s3a://, gs://, abfss://, hdfs://)",
            )
        elif written and not failed:
            yield Finding(setting, "ok", f"{url} is writable from {_listing(host for host, _ in written)}")


def _apart(written: Sequence[tuple[str, DirectoryFacts]]) -> tuple[str, str] | None:
    """Two hosts of which neither saw a marker of the other."""
    seen = {(host, peer) for host, entry in written for peer in entry.peers}
    hosts = sorted({host for host, _ in written})
    pairs = combinations(hosts, 2)
    return next(((a, b) for a, b in pairs if (a, b) not in seen and (b, a) not in seen), None)


# ---- Spark's settings ------------------------------------------------------------------------------------------------
def judge_encryption(request: Request, settings: Settings, *, local: bool, num_hosts: int | None) -> Iterator[Finding]:
    """Gradients are plain text on the wire, whatever Spark's own traffic is.

    Args:
        request: What was asked.
        settings: Spark's.
        local: The master is ``local[n]``.
        num_hosts: Hosts of the executors; None, where Spark does not tell, counts as several.
    """
    on = [name for name in _ENCRYPTION if _is_on(settings, name)]
    if not on:
        yield Finding("encryption", "ok", "Spark does not ask for it")
    elif local or num_hosts == 1 or request.num_train_workers == 1:
        yield Finding("encryption", "ok", f"{on[0]}=true, and no gradients leave a host")
    elif request.allow_unencrypted_traffic:
        found = f"{on[0]}=true, but ranks exchange gradients in the clear, as allowUnencryptedTraffic=True allows"
        yield Finding("encryption", "note", found)
    else:
        yield Finding(
            "encryption",
            "error",
            "ranks exchange gradients in the clear: neither gloo nor NCCL can encrypt",
            f"{'=true and '.join(on)}=true {'asks' if len(on) == 1 else 'ask'} for protected traffic",
            "Protect the network between the hosts (WireGuard or IPsec between them, or a network policy that keeps "
            "others out), then fit with allowUnencryptedTraffic=True",
        )


def judge_settings(settings: Settings) -> Iterator[Finding]:
    """Settings of Spark that keep nothing from running, and yet matter."""
    if _is_on(settings, "spark.speculation"):
        found = "spark.speculation=true: barrier stages are never speculated, but the tasks that stage rows are"
        yield Finding("speculation", "note", found)
    else:
        yield Finding("speculation", "ok", "off")
    yield Finding("adaptive execution", "ok", "rows are placed by repartitionById, which it leaves alone")

    if "spark.barrier.sync.timeout" in settings:
        yield Finding("barrier timeout", "ok", f"spark.barrier.sync.timeout={settings['spark.barrier.sync.timeout']}")
    else:
        found = "Spark lets a barrier wait for 365 days; sparkdl ends a rendezvous by its own timeout"
        remedy = "For barriers in functions of your own: spark.barrier.sync.timeout=600"
        yield Finding("barrier timeout", "note", found, remedy=remedy)

    prefix = "spark.scheduler.barrier.maxConcurrentTasksCheck"
    interval, times = settings.get(f"{prefix}.interval", "15s"), settings.get(f"{prefix}.maxFailures", "40")
    found = f"if slots vanish before the stage starts, Spark looks {times} times, every {interval}, before it gives up"
    yield Finding("slots check", "note", found, remedy=f"To give up sooner: {prefix}.maxFailures=4")

    if settings.get("spark.python.worker.reuse", "true").lower() == "false":
        found = "spark.python.worker.reuse=false: every task starts a Python and imports torch again"
        yield Finding("worker reuse", "note", found, remedy="Set spark.python.worker.reuse=true")

    limit = settings.get("spark.executor.pyspark.memory")
    if limit is not None:
        cores = max(1, int(_number(settings.get("spark.executor.cores")) or 1))
        each = _bytes(limit) // cores
        if each < _WORKER_MEMORY:
            name = "spark.executor.pyspark.memory"
            found = (
                f"{name}={limit} leaves {_size(each)} of address space for each Python worker; torch alone takes more"
            )
            remedy = f"Leave it unset, or set {name}={2 * cores}g or more"
            yield Finding("PySpark memory", "warning", found, remedy=remedy)


# ---- words -----------------------------------------------------------------------------------------------------------
def _is_on(settings: Settings, name: str) -> bool:
    return settings.get(name, "false").strip().lower() == "true"


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _bytes(text: str) -> int:
    """Bytes of a memory setting of Spark; a bare number is MiB.

    >>> _bytes("512m") == _bytes("512") == 512 << 20, _bytes("2g") == 2 << 30
    (True, True)
    """
    found = re.fullmatch(r"\s*(\d+)\s*([bkmgtp]?)b?\s*", text.lower())
    return int(found[1]) * _UNITS[found[2]] if found else _WORKER_MEMORY


def _size(number: int) -> str:
    return f"{number / (1 << 30):.1f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):.0f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(package: str) -> str:
    return "Python" if package == "python" else package


def _listing(hosts: Iterable[str], most: int = 4) -> str:
    names = sorted(set(hosts))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more hosts" if len(names) > most else "")


def _by(facts: Iterable[Any], key: Any, host: Any = lambda entry: entry.host) -> dict[Any, list[str]]:
    """Hosts by what was found there."""
    found: dict[Any, list[str]] = {}
    for entry in facts:
        found.setdefault(key(entry), []).append(host(entry))
    return {value: sorted(set(hosts)) for value, hosts in found.items()}
