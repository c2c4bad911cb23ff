"""Ranks without Spark: `torchrun` starts a function of a test module in every rank."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
Torchrun = Callable[[Callable[[], Any], int], list[Any]]


# What they say of one strategy each in detail; `test_strategies.py` holds all of them to their contract in every run.
IN_DETAIL = {"test_ddp", "test_sharded", "test_pipeline", "test_local_sgd", "test_parameter_server", "test_probe"}


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one strategy in detail are slow where they start ranks."""
    for item in items:
        if item.path.stem in IN_DETAIL and "torchrun" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    """Call a function in ``ranks`` processes under torchrun, with a gloo group; what each returned, in rank order."""

    def run(function: Callable[[], Any], ranks: int) -> list[Any]:
        folder = tmp_path_factory.mktemp("torchrun")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["--module", __name__, function.__module__, function.__qualname__, str(folder)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]

    return run


def main(module: str, name: str, folder: str) -> None:
    """One rank."""
    dist.init_process_group("gloo")
    try:
        result = getattr(importlib.import_module(module), name)()
        torch.save(result, Path(folder) / f"{dist.get_rank()}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
