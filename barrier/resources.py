"""Slots, GPUs and resource profiles, as far as Spark tells of them.

Classic Spark tells all; over Spark Connect the number of slots is known of a ``local`` master only.
"""

import os
import re
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sparkdl.barrier.world import host_of
from sparkdl.config import Device

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

__all__ = [
    "Executors",
    "TaskRequest",
    "await_slots",
    "build_profile",
    "find_executors",
    "find_settings",
    "find_slots",
    "is_classic",
    "is_local",
    "plan_profile",
    "profile_for",
    "settings_of",
    "slots_of_master",
]

_REGISTRATION = timedelta(seconds=30)  # as spark.scheduler.maxRegisteredResourcesWaitingTime
_FIRST_EXECUTOR, _SETTLING = timedelta(minutes=2), timedelta(seconds=10)
_profiles: "weakref.WeakKeyDictionary[SparkSession, dict[TaskRequest, ResourceProfile]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Executors:
    """What Spark's status store knows of the executors now.

    Attributes:
        hosts: Hosts that have one, in Spark's own words for them.
        running: Tasks that run at this moment.
    """

    hosts: tuple[str, ...]
    running: int


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Resources of one task in a stage-level profile.

    Attributes:
        cpus: Cores.
        gpus: GPUs; 0 asks for none.
    """

    cpus: int
    gpus: int


def is_classic(spark: "SparkSession") -> bool:
    """True for a session with a JVM in reach, False over Spark Connect."""
    return hasattr(spark, "_jsparkSession")


def is_local(spark: "SparkSession") -> bool:
    """True where driver and executor are one process (``local-cluster`` is not)."""
    return slots_of_master(spark.conf.get("spark.master", "") or "") is not None


def slots_of_master(master: str) -> int | None:
    """Slots that a master URL spells out.

    >>> slots_of_master("local[4]"), slots_of_master("local[2,3]"), slots_of_master("local"), slots_of_master("yarn")
    (4, 2, 1, None)
    """
    if master == "local":
        return 1
    found = re.fullmatch(r"local\[(\d+|\*)(?:,\s*\d+)?\]", master)
    if found is None:
        return None
    return (os.cpu_count() or 1) if found[1] == "*" else int(found[1])


def find_settings(spark: "SparkSession") -> dict[str, str]:
    """The settings that were made; what is not there has Spark's default. Over Spark Connect, those of the server."""
    if is_classic(spark):
        return dict(spark.sparkContext.getConf().getAll())
    return dict(spark.conf.getAll)


def find_slots(spark: "SparkSession", profile: "ResourceProfile | None" = None) -> int | None:
    """Tasks that the cluster can run at once; None where Spark does not tell.

    Args:
        spark: The session.
        profile: The resource profile that the tasks use; the default one if None.
    """
    if not is_classic(spark):
        return slots_of_master(spark.conf.get("spark.master", "") or "")
    context = spark.sparkContext._jsc.sc()
    manager = context.resourceProfileManager()
    if profile is None:
        return int(context.maxNumConcurrentTasks(manager.defaultResourceProfile()))
    # Spark knows a profile only once a stage has used it.
    manager.addResourceProfile(profile._java_resource_profile)
    return int(context.maxNumConcurrentTasks(profile._java_resource_profile))


def await_slots(spark: "SparkSession", wanted: int, profile: "ResourceProfile | None" = None) -> int | None:
    """As `find_slots`, but a young application gets time until its executors have registered.

    A cluster starts executors after the session; counting them at once would find too few. An application is young
    for 30 seconds after its start, for 2 minutes while it has no executor at all, and for 10 seconds after the last one
    came during this call. Whatever is there then counts.
    """
    slots = find_slots(spark, profile)
    if slots is None or is_local(spark) or not is_classic(spark):
        return slots
    started = spark.sparkContext.startTime / 1000
    grown = 0.0
    while slots < wanted:
        patience = _FIRST_EXECUTOR if slots == 0 else _REGISTRATION
        if time.time() > max(started + patience.total_seconds(), grown + _SETTLING.total_seconds()):
            break
        time.sleep(0.2)
        before, slots = slots, find_slots(spark, profile) or 0
        if slots > before:
            grown = time.time()
    return slots


def find_executors(spark: "SparkSession") -> Executors | None:
    """Executors and their running tasks; None over Spark Connect, which does not tell."""
    if not is_classic(spark):
        return None
    context = spark.sparkContext._jsc.sc()
    running = sum(int(entry.numRunningTasks()) for entry in context.statusTracker().getExecutorInfos())
    listed = context.statusStore().executorList(True)
    entries = [listed.apply(index) for index in range(listed.size())]
    local = is_local(spark)
    hosts = {host_of(str(entry.hostPort())) for entry in entries if local or str(entry.id()) != "driver"}
    return Executors(tuple(sorted(hosts)), running)


# ---- resource profiles -----------------------------------------------------------------------------------------------
def plan_profile(
    *, executor_cores: int | None, executor_gpus: float = 0, task_cpus: int = 1, task_gpus: float = 0
) -> TaskRequest | None:
    """What a task must ask for so that an executor has room for one only, or for one per GPU where tasks take several.

    Where a task would get several GPUs, each of them is to have a rank: a task then asks for one, and for its share of
    the cores. Elsewhere, more than half of the executor's cores keep a second task off, whatever the GPUs are. (xgboost
    and spark-rapids-ml do the same, see SPARK-45527.)

    Args:
        executor_cores: Cores of one executor; None where they are not known.
        executor_gpus: GPUs of one executor.
        task_cpus: Cores that tasks ask for by default.
        task_gpus: GPUs that tasks ask for by default.

    Returns:
        The request, or None where tasks are alone without one or the executor's cores are not known.

    >>> plan_profile(executor_cores=8, executor_gpus=2, task_gpus=0.25)
    TaskRequest(cpus=5, gpus=1)
    >>> plan_profile(executor_cores=8, executor_gpus=1, task_gpus=1) is None
    True
    >>> plan_profile(executor_cores=8, executor_gpus=4, task_gpus=4)
    TaskRequest(cpus=2, gpus=1)
    """
    if executor_cores is None:
        return None
    if task_gpus > 1:
        return TaskRequest(max(1, executor_cores // max(1, int(executor_gpus))), 1)
    alone = 2 * task_cpus > executor_cores
    if executor_gpus < 1:
        return None if alone else TaskRequest(executor_cores // 2 + 1, 0)
    alone = alone or 2 * task_gpus > executor_gpus
    if alone and task_gpus == 1:
        return None
    return TaskRequest(max(task_cpus, executor_cores // 2 + 1), 1)


def build_profile(spark: "SparkSession") -> "ResourceProfile | None":
    """The resource profile that keeps two trainers off one executor, for ``mapInArrow(..., profile=...)``.

    It holds task requests only, so the executors that are there serve it.

    Returns:
        The profile, one for each session and request; None where tasks are alone without one, or where Spark supports
        none: in local mode (SPARK-61035), with dynamic allocation, or if ``spark.executor.cores`` is not set.
    """
    settings = find_settings(spark)
    master = settings.get("spark.master", "")
    supported = master.startswith(("spark://", "local-cluster", "yarn", "k8s://"))
    if not supported or settings.get("spark.dynamicAllocation.enabled", "false").lower() == "true":
        return None
    cores = settings.get("spark.executor.cores")
    request = plan_profile(
        executor_cores=None if cores is None else int(cores),
        executor_gpus=float(settings.get("spark.executor.resource.gpu.amount", 0)),
        task_cpus=int(settings.get("spark.task.cpus", 1)),
        task_gpus=float(settings.get("spark.task.resource.gpu.amount", 0)),
    )
    if request is None:
        return None
    known = _profiles.setdefault(spark, {})
    if request not in known:
        known[request] = _build(request)
    return known[request]


def profile_for(spark: "SparkSession", device: Device) -> "ResourceProfile | None":
    """The resource profile of the ranks: where executors have GPUs, each rank gets one of its own.

    Args:
        spark: The session.
        device: As in `sparkdl.config.TrainConfig`.

    Returns:
        None where the session's own settings do, or Spark supports no other.
    """
    settings = find_settings(spark)
    if device == "cpu" or not float(settings.get("spark.executor.resource.gpu.amount", 0)):
        return None
    if float(settings.get("spark.task.resource.gpu.amount", 0)) == 1:
        return None
    return build_profile(spark)


def settings_of(profile: "ResourceProfile") -> dict[str, str]:
    """What a profile asks for each task, as settings of a session that would ask for the same."""
    requests = profile.taskResources
    names = {"cpus": "spark.task.cpus", "gpu": "spark.task.resource.gpu.amount"}
    return {names[name]: f"{request.amount:g}" for name, request in requests.items() if name in names}


def _build(request: TaskRequest) -> Any:
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    tasks = TaskResourceRequests().cpus(request.cpus)
    if request.gpus:
        tasks = tasks.resource("gpu", request.gpus)
    return ResourceProfileBuilder().require(tasks).build
