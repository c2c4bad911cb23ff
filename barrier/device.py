"""From Spark's GPU addresses to a torch device, and from the host's cores to torch threads.

Knows nothing of Spark: it is given what the task was assigned.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparkdl.config import Device
from sparkdl.errors import ConfigError, LaunchError

__all__ = ["available_cores", "cuda_index", "select_device", "thread_count"]

logger = logging.getLogger(__name__)


def select_device(
    asked: Device, *, gpu_addresses: Sequence[str], local_rank: int, local_world_size: int
) -> torch.device:
    """The device of one rank, without touching CUDA unless it is used.

    Args:
        asked: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        gpu_addresses: GPU addresses that Spark assigned to the barrier task; empty where it assigned none.
        local_rank: Rank among those of the host.
        local_world_size: Ranks on the host.

    Returns:
        The CPU, or one GPU: the one that Spark assigned, else the one of the local rank's number.

    Raises:
        LaunchError: ``"cuda"`` was asked and this rank has no GPU of its own.
    """
    if asked == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_addresses and visible:
        return torch.device("cuda", cuda_index(gpu_addresses[0], os.environ))
    if visible >= local_world_size:
        return torch.device("cuda", local_rank)
    if asked == "cuda":
        raise LaunchError(
            f"device='cuda' needs a GPU for each of the {local_world_size} ranks on this host, but torch sees "
            f"{visible}. Fit with device='cpu', with fewer ranks per host, or request GPUs from Spark "
            "(spark.executor.resource.gpu.amount and spark.task.resource.gpu.amount)."
        )
    return torch.device("cpu")


def cuda_index(address: str, environ: Mapping[str, str]) -> int:
    """The index by which torch knows Spark's GPU ``address``.

    Where ``CUDA_VISIBLE_DEVICES`` hides GPUs, torch counts only the visible ones.

    >>> cuda_index("3", {}), cuda_index("3", {"CUDA_VISIBLE_DEVICES": "2,3"})
    (3, 1)

    Raises:
        ConfigError: The address is neither visible nor an index.
    """
    visible = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if address in visible:
        return visible.index(address)
    if address.isdigit() and (not visible or int(address) < len(visible)):
        return int(address)
    raise ConfigError(
        f"Spark assigned GPU {address!r} to this task, but CUDA_VISIBLE_DEVICES={','.join(visible)!r} hides it. "
        "Unset CUDA_VISIBLE_DEVICES on the executors, or make the discovery script list the visible GPUs."
    )


def thread_count(*, cores: int, local_world_size: int, task_cpus: int) -> int:
    """Torch threads of one rank: an equal share of the host's cores, and no fewer than Spark gave the task.

    Spark sets ``OMP_NUM_THREADS=1`` in its Python workers, which leaves a lone rank on one core.
    A task's cpus count only as far as the host really has them.
    """
    return max(1, cores // local_world_size, min(task_cpus, cores))


def available_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may really use: its CPU affinity, bounded by the container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or quota "max"
        return cores
