"""One quick job that asks the executors what they are: Python, packages, GPUs, local disks, shared directories.

It is a plain UDF of the standard library, pickled by value: it runs where torch, pyarrow and sparkdl are missing.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparkdl.barrier.findings import DirectoryFacts, ExecutorFacts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["ask_executors", "ask_here"]

_NEEDED = ("torch", "pyarrow", "numpy", "pandas", "petastorm", "sparkdl")
_MOST_TASKS = 256


def ask_executors(
    spark: "SparkSession",
    *,
    num_tasks: int,
    directories: Mapping[str, str],
    storage_options: Mapping[str, Any] | None = None,
    count_gpus: bool = False,
) -> tuple[ExecutorFacts, ...]:
    """Run the probe in ``num_tasks`` tasks at once, one job.

    Spark deals tasks to executors in turn, so as many tasks as slots reach all executors that have a slot free.

    Args:
        spark: The session.
        num_tasks: Tasks; 256 at most are started.
        directories: URLs by setting.
        storage_options: For the directories.
        count_gpus: Ask torch for GPUs, where the host has any.

    Returns:
        What was found, one entry for each Python on each host. Where the executors cannot run Python at all,
        Spark's own error comes through.
    """
    tasks, probe_id = min(num_tasks, _MOST_TASKS), uuid.uuid4().hex[:12]
    ask = _probe(_NEEDED, dict(directories), storage_options, probe_id, tasks, count_gpus)
    answers = [_facts(answer) for answer in _run(spark, ask, tasks)]
    for setting, url in directories.items():
        found = [entry for facts in answers for entry in facts.directories if entry.setting == setting]
        if any(entry.peers for entry in found) and not any(entry.removed for entry in found):
            _run(spark, _remove(url, storage_options, probe_id), tasks)
    return _merged(answers)


def ask_here(
    *,
    disks: Sequence[str] = (),
    directories: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    count_gpus: bool = False,
) -> ExecutorFacts:
    """What the probe finds in this process: all that a driver in local mode needs to know after the first time.

    Args:
        disks: Local directories; a UDF is told them by Spark.
        directories: URLs by setting.
        storage_options: For the directories.
        count_gpus: Ask torch for GPUs, where the host has any.
    """
    probe_id = uuid.uuid4().hex[:12]
    ask = _probe(_NEEDED, dict(directories or {}), storage_options, probe_id, 1, count_gpus, tuple(disks))
    return _facts(ask(0))


def _run(spark: "SparkSession", ask: Callable[[int], str], tasks: int) -> list[str]:
    from pyspark.sql import functions as F

    asked = F.udf(ask, "string", useArrow=False)
    return [row[0] for row in spark.range(0, tasks, 1, tasks).select(asked(F.col("id"))).collect()]


def _facts(answer: str) -> ExecutorFacts:
    found = json.loads(answer)
    directories = tuple(DirectoryFacts(**{**entry, "peers": tuple(entry["peers"])}) for entry in found["directories"])
    return ExecutorFacts(**{**found, "missing": tuple(found["missing"]), "directories": directories})


def _merged(answers: Sequence[ExecutorFacts]) -> tuple[ExecutorFacts, ...]:
    """One entry for each Python on each host."""
    merged: dict[tuple[str, str], ExecutorFacts] = {}
    for facts in answers:
        key = (facts.host, facts.executable)
        known = merged.setdefault(key, facts)
        if known is not facts:
            merged[key] = ExecutorFacts(
                host=known.host,
                executable=known.executable,
                versions=known.versions,
                missing=known.missing,
                num_gpus=known.num_gpus if facts.num_gpus is None else max(known.num_gpus or 0, facts.num_gpus),
                disks={**known.disks, **facts.disks},
                directories=tuple(dict.fromkeys((*known.directories, *facts.directories))),
            )
    return tuple(merged.values())


def _probe(
    needed: Sequence[str],
    directories: Mapping[str, str],
    storage_options: Mapping[str, Any] | None,
    probe_id: str,
    num_tasks: int,
    count_gpus: bool,
    local_directories: Sequence[str] = (),
) -> Callable[[int], str]:
    def probe(index: int) -> str:
        import dataclasses
        import glob
        import importlib.metadata
        import importlib.util
        import json
        import os
        import platform
        import shutil
        import socket
        import sys

        def has(package: str) -> bool:
            try:  # another distribution bears the name sparkdl as well, and has no errors
                return importlib.util.find_spec("sparkdl.errors" if package == "sparkdl" else package) is not None
            except Exception:
                return False

        def count() -> int:
            # Importing torch takes seconds: only where there is something to count.
            if "+cpu" in versions.get("torch", "") or not any(
                map(glob.glob, ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))
            ):
                return 0
            import torch

            return int(torch.cuda.device_count())

        versions = {"python": platform.python_version()}
        for package in needed:
            try:
                distribution = "sparkdl-torch" if package == "sparkdl" else package
                versions[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                pass
        host, missing, found = socket.gethostname(), [name for name in needed if not has(name)], []
        if directories and not missing:
            try:
                from sparkdl.barrier.directories import probe_directory
            except ImportError:  # an older sparkdl, which the versions tell
                pass
            else:
                for setting, url in directories.items():
                    told = probe_directory(
                        setting, url, storage_options, probe_id=probe_id, host=host, index=index, num_tasks=num_tasks
                    )
                    found.append(dataclasses.asdict(told))
        disks = local_directories or os.environ.get("SPARK_LOCAL_DIRS", "").split(",")
        return json.dumps(
            {
                "host": host,
                "executable": sys.executable,
                "versions": versions,
                "missing": missing,
                "num_gpus": count() if count_gpus and "torch" not in missing else None,
                "disks": {path: shutil.disk_usage(path).free for path in disks if os.path.isdir(path)},
                "directories": found,
            }
        )

    # Pickled by value: an executor without sparkdl could not import it by reference.
    probe.__module__ = "__main__"
    return probe


def _remove(url: str, storage_options: Mapping[str, Any] | None, probe_id: str) -> Callable[[int], str]:
    def remove(index: int) -> str:
        from sparkdl.barrier.directories import remove_markers

        try:
            remove_markers(url, storage_options, probe_id=probe_id)
        except Exception as error:  # the probe told already what is wrong there
            return type(error).__name__
        return ""

    remove.__module__ = "__main__"
    return remove
