"""What can be known before the barrier stage starts, all of it at once.

Each finding is an error now instead of a stage that waits for ten minutes or dies in a worker. The rules are in
`sparkdl.barrier.rules`; this module asks Spark and the executors for the facts.
"""

import logging
import re
import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from sparkdl.barrier.findings import ExecutorFacts, Finding, Report, Request
from sparkdl.barrier.ports import check_ports
from sparkdl.barrier.probe import ask_executors, ask_here
from sparkdl.barrier.resources import (
    await_slots,
    find_executors,
    find_settings,
    find_slots,
    is_classic,
    is_local,
    settings_of,
)
from sparkdl.barrier.rules import (
    judge_directories,
    judge_disks,
    judge_dynamic_allocation,
    judge_encryption,
    judge_gpus,
    judge_python,
    judge_settings,
    judge_slots,
    python_advice,
)
from sparkdl.errors import ConfigError
from sparkdl.storage import qualify

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

__all__ = ["preflight"]

logger = logging.getLogger(__name__)

_WORST_FIRST = ("error", "warning", "note", "ok")
# Python, packages and GPUs of a local session: they cannot change while it lives.
_known: "weakref.WeakKeyDictionary[SparkSession, tuple[ExecutorFacts, ...]]" = weakref.WeakKeyDictionary()
_logged: "weakref.WeakKeyDictionary[SparkSession, set[str]]" = weakref.WeakKeyDictionary()


def preflight(
    spark: "SparkSession", request: Request, *, profile: "ResourceProfile | None" = None, ports: bool = False
) -> Report:
    """Look at all that a fit needs of the cluster, in one quick job at most.

    In local mode the job runs once for each session: afterwards the driver looks at disks and directories by itself.
    On a cluster it runs every time, as executors come and go. Warnings are logged, each once for a session.

    Args:
        spark: The session.
        request: What the fit asks for.
        profile: The resource profile of the barrier stage; the default one if None.
        ports: Let the executors connect to each other as well, in a barrier stage: about two seconds more.

    Returns:
        All findings. Errors are among them and not raised; see `Report.raise_errors`.
    """
    settings, local = find_settings(spark), is_local(spark)
    findings = list(judge_dynamic_allocation(request, settings, local=local))
    if findings[0].severity == "error":
        slots = find_slots(spark)  # too few now says nothing: there would be more
        fewest = 1
    else:
        slots = await_slots(spark, request.num_train_workers, profile)
        fewest = request.num_train_workers
        placed = find_executors(spark)
        running = placed.running if placed else None
        findings += judge_slots(request, slots=slots, running=running, local=local)
        if slots and running and running >= slots:
            logger.info("All %d slots are busy: the preflight waits for one.", slots)
    executors: tuple[ExecutorFacts, ...] = ()
    if slots != 0:
        request, refused = _qualified(request)
        findings += refused
        alone = local and is_classic(spark)
        executors, failed = _ask_local(spark, request) if alone else _ask(spark, request, tasks=slots or fewest)
        findings += failed
        findings += judge_python(executors, ask_here())
        findings += judge_disks(request, executors)
        findings += judge_directories(request, executors)
    given = settings if profile is None else {**settings, **settings_of(profile)}
    findings += judge_gpus(request, given, executors)
    placed = find_executors(spark)
    findings += judge_encryption(request, settings, local=local, num_hosts=len(placed.hosts) if placed else None)
    findings += judge_settings(settings)
    if ports and all(finding.severity != "error" for finding in findings):
        findings += check_ports(spark, request.num_train_workers)
    findings.sort(key=lambda finding: _WORST_FIRST.index(finding.severity))
    report = Report(tuple(findings), slots, executors)
    told = _logged.setdefault(spark, set())
    for finding in report.warnings:
        if finding.message not in told:
            told.add(finding.message)
            logger.warning("%s: %s", finding.check, finding.message)
    return report


def _qualified(request: Request) -> tuple[Request, list[Finding]]:
    """The request with full URLs; a directory that has none is left out, with a finding that says why.

    Ranks take a path without a scheme for a local one, whatever Spark's default file system is: so does the probe.
    """
    urls: dict[str, str] = {}
    refused = []
    for setting, url in request.directories.items():
        try:
            urls[setting] = qualify(url, "file:///")
        except ConfigError as error:
            refused.append(Finding(setting, "error", str(error).rstrip(".")))
    return replace(request, staging_dir=urls.get("stagingDir"), checkpoint_dir=urls.get("checkpointDir")), refused


def _ask(spark: "SparkSession", request: Request, *, tasks: int) -> tuple[tuple[ExecutorFacts, ...], list[Finding]]:
    """Facts of the executors, and a finding where they cannot run Python at all."""
    try:
        found = ask_executors(
            spark,
            num_tasks=tasks,
            directories=request.directories,
            storage_options=request.storage_options,
            count_gpus=request.device != "cpu",
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("pyspark", "py4j"):
            raise
        return (), [_judge_failure(str(error))]
    return found, []


def _ask_local(spark: "SparkSession", request: Request) -> tuple[tuple[ExecutorFacts, ...], list[Finding]]:
    """As `_ask`, where the driver is the only executor: one task for each session, the rest without Spark."""
    if spark not in _known:
        python_only = replace(request, staging_dir=None, checkpoint_dir=None, device="cpu")
        executors, failed = _ask(spark, python_only, tasks=1)
        if failed or executors[0].missing:
            return executors, failed
        _known[spark] = executors
    (known,) = _known[spark]
    here = ask_here(
        disks=tuple(known.disks),
        directories=request.directories,
        storage_options=request.storage_options,
        count_gpus=request.device != "cpu",
    )
    return (replace(known, num_gpus=here.num_gpus, disks=here.disks, directories=here.directories),), []


def _judge_failure(text: str) -> Finding:
    """What it means that not even a function of the standard library ran on the executors."""
    found = re.search(r"PYTHON_VERSION_MISMATCH\][^.]*?(\d+\.\d+)", text)
    if "PYTHON_VERSION_MISMATCH" in text:
        other = found[1] if found else "of another version"
        own = f"{sys.version_info.major}.{sys.version_info.minor}"
        told = f"the executors run Python {other}, the driver {own}; Spark needs the same minor version"
        return Finding("Python", "error", told, remedy=python_advice())
    refused = re.search(r'Cannot run program "[^"]*"[^\n]*', text)
    reason = refused[0] if refused else text.strip().partition("\n")[0]
    return Finding("Python", "error", f"the executors' Python cannot be started: {reason}", remedy=python_advice())
