"""Kills a process at each operation of writing checkpoints, and looks at what another process finds then.

A program, because its processes are forked ones, which must come before any thread: they share one import of torch.
It prints one line of JSON: what was found after each death.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sparkdl.checkpoint import CheckpointStore
from sparkdl.errors import CheckpointError
from tests.unit.faulty_files import FaultyFileSystem

KEEP = 2


def state(step: int) -> dict[str, object]:
    return {"weight": torch.full((1000,), float(step)), "step": step}


def in_fork(task: Callable[[], None]) -> int:
    """The status of a process that did a task."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def write_and_die(folder: Path, last_operation: int) -> None:
    """Two good checkpoints, an incomplete one and a damaged one; then two more, until death."""
    store = CheckpointStore(str(folder), keep=KEEP)
    for step in (1, 2):
        store.write(step, state(step), {"at": step})
    (folder / "step-000000000003").mkdir()
    (folder / "step-000000000003" / "state.json").write_text("{")
    (folder / "done").write_text("2")
    count = 0

    def die(operation: str, path: str, size: int) -> None:
        nonlocal count
        count += operation not in ("list", "info", "read")
        if count == last_operation:
            (folder / "operation").write_text(f"{operation} {Path(path).name}")
            os.kill(os.getpid(), signal.SIGKILL)

    FaultyFileSystem.before = staticmethod(die)
    store = CheckpointStore(f"faulty://{folder}", keep=KEEP)
    for step in (3, 4):
        store.write(step, state(step), {"at": step})
        (folder / "done").write_text(str(step))


def look(folder: Path) -> None:
    """What a process that starts afterwards finds and can do."""
    done = int((folder / "done").read_text())
    store = CheckpointStore(str(folder), keep=KEEP)
    newest = store.newest()
    assert newest is not None, "no checkpoint is left"
    assert newest.step in (done, done + 1), f"step {newest.step} after {done} were written"
    assert newest.facts == {"at": newest.step}
    found = store.load(newest)
    assert found["step"] == newest.step
    assert torch.equal(found["weight"], torch.full((1000,), float(newest.step)))
    (folder / "found").write_text(str(newest.step))
    for path in folder.glob("step-*"):
        try:
            store.load(path.name)
        except CheckpointError as error:
            complete = "manifest.json is" not in str(error)
            assert not complete, str(error)  # noqa: PT017  it may be read or not, but not by half

    again = store.write(newest.step + 1, state(newest.step + 1), {})
    assert store.newest() == again
    left = {path.name for path in folder.glob("step-*")}
    assert left == {newest.name, again.name}, left
    assert all((folder / name / "manifest.json").exists() for name in left)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    outcomes = []
    for number in range(1, 200):
        place = folder / str(number)
        place.mkdir()
        status = in_fork(lambda place=place, number=number: write_and_die(place, number))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"at operation {number}"
        assert in_fork(lambda place=place: look(place)) == 0, f"after operation {number}"
        if not killed:
            break
        texts = [(place / name).read_text() for name in ("operation", "done", "found")]
        outcomes.append([texts[0], int(texts[1]), int(texts[2])])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
