"""What can be known before the barrier stage starts: slots, dynamic allocation, the executors' Python.

Each finding is an error now instead of a stage that waits for ten minutes or dies in a worker.
"""

import json
import os
import re
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from sparkdl.errors import ExecutorPythonError, LaunchError, SlotsError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["check_executor_python", "check_slots", "find_slots", "is_local"]

_NEEDED = ("torch", "pyarrow", "numpy", "pandas", "petastorm", "sparkdl")
_checked: "weakref.WeakSet[SparkSession]" = weakref.WeakSet()


def find_slots(spark: "SparkSession") -> int | None:
    """Tasks that the cluster can run at once for the default resource profile; None where Spark does not tell.

    Classic Spark tells; over Spark Connect only a ``local`` master does.
    """
    if hasattr(spark, "_jsparkSession"):
        context = spark.sparkContext._jsc.sc()
        profile = context.resourceProfileManager().defaultResourceProfile()
        return int(context.maxNumConcurrentTasks(profile))
    return slots_of_master(spark.conf.get("spark.master", "") or "")


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


def check_slots(spark: "SparkSession", num_train_workers: int) -> int | None:
    """Refuse a barrier stage that Spark could not start.

    Returns:
        The slots found, for the log.

    Raises:
        SlotsError: More ranks than slots; Spark itself would say so after ten silent minutes.
        LaunchError: Dynamic allocation is on, which Spark refuses for barrier stages.
    """
    local = is_local(spark)
    if not local and (spark.conf.get("spark.dynamicAllocation.enabled", "false") or "").lower() == "true":
        raise LaunchError(
            f"numTrainWorkers={num_train_workers} runs in a barrier stage, which Spark does not start while dynamic "
            "allocation is on. Submit with --conf spark.dynamicAllocation.enabled=false and a fixed number of "
            "executors (--num-executors or spark.cores.max)."
        )
    slots = find_slots(spark)
    if slots is not None and slots < num_train_workers:
        raise SlotsError(
            f"numTrainWorkers={num_train_workers} needs {num_train_workers} slots at once, but this cluster runs "
            f"{slots} {'task' if slots == 1 else 'tasks'} at a time. Fit with numTrainWorkers={slots}, or add executors"
            + (f" (here: master local[{num_train_workers}])." if local else ".")
        )
    return slots


def check_executor_python(spark: "SparkSession") -> None:
    """Ask one executor which Python and packages it has, once for each session.

    The question is a plain UDF of the standard library: it runs where torch, pyarrow and sparkdl are missing.

    Raises:
        ExecutorPythonError: A package is missing there, or the Python differs from the driver's.
    """
    if spark in _checked:
        return
    advice = f"Set PYSPARK_PYTHON={sys.executable} before the session starts (or spark.pyspark.python in its conf)"
    try:
        row = spark.range(1).select(F.udf(_probe(), "string", useArrow=False)(F.lit(",".join(_NEEDED)))).first()
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("pyspark", "py4j"):
            raise
        text = str(error)
        found = re.search(r"PYTHON_VERSION_MISMATCH\][^.]*?(\d+\.\d+)", text)
        if "PYTHON_VERSION_MISMATCH" not in text:
            refused = re.search(r'Cannot run program "[^"]*"[^\n]*', text)
            reason = refused[0] if refused else text.strip().partition("\n")[0]
            raise ExecutorPythonError(f"The executors' Python cannot be started: {reason}. {advice}.") from None
        raise ExecutorPythonError(
            f"The executors run Python {found[1] if found else 'of another version'}, the driver "
            f"{sys.version_info.major}.{sys.version_info.minor}; Spark needs the same minor version. {advice}."
        ) from None
    assert row is not None
    answer = json.loads(row[0])
    if answer["missing"]:
        raise ExecutorPythonError(
            f"The executors' Python ({answer['executable']}, {answer['version']}) cannot import "
            f"{', '.join(answer['missing'])}. {advice}, or install them there: pip install sparkdl-torch."
        )
    _checked.add(spark)


def _probe() -> Callable[[str], str]:
    def probe(needed: str) -> str:
        import importlib.util
        import json
        import platform
        import sys

        missing = [name for name in needed.split(",") if importlib.util.find_spec(name) is None]
        facts = {"missing": missing, "executable": sys.executable, "version": platform.python_version()}
        return json.dumps(facts)

    # Pickled by value: an executor without sparkdl could not import it by reference.
    probe.__module__ = "__main__"
    return probe
