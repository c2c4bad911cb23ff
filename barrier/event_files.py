"""Events of ranks as small files in a directory that ranks and driver share, where no connection comes about.

A rank writes ``events/<attempt>-<rank>-<number>.jsonl``, numbered from 0, each in one piece and never again: object
stores cannot append. The last line says that the file is complete, which on other file systems a reader cannot see. The
driver looks for the next number of every rank, so that it need not list what was there before.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileType

from sparkdl.errors import ConfigError
from sparkdl.storage import FileSystems

__all__ = ["EventFiles", "poll_event_files"]

logger = logging.getLogger(__name__)

Event = dict[str, Any]
_END = b'{"event": "end"}'
_POLL_SECONDS = 1.0
_MOST_BYTES = 64 << 20  # of one file


def _name(attempt: int, rank: int, number: int) -> str:
    return f"events/{attempt}-{rank}-{number}.jsonl"


class EventFiles:
    """Where a rank leaves its events.

    Args:
        directory: URL of the run's directory.
        attempt: How often the run was started, this time included.
        rank: The rank.
    """

    def __init__(self, directory: str, *, attempt: int, rank: int) -> None:
        self._systems = FileSystems()
        self._directory = directory
        self._attempt = attempt
        self._rank = rank
        self.written = 0

    def write(self, lines: Sequence[bytes]) -> None:
        """Write the next file.

        Args:
            lines: Events as JSON, without line ends.

        Raises:
            OSError: It cannot be written; the next call writes the same file.
            ConfigError: Nothing installed knows the URL.
        """
        system, root = self._systems.open(self._directory)
        if not self.written:
            system.create_dir(f"{root}/events", recursive=True)
        with system.open_output_stream(f"{root}/{_name(self._attempt, self._rank, self.written)}") as stream:
            stream.write(b"\n".join([*lines, _END, b""]))
        self.written += 1


@contextlib.contextmanager
def poll_event_files(
    directory: str,
    *,
    attempt: int,
    world_size: int,
    on_event: Callable[[Event], None],
    is_silent: Callable[[int], bool],
) -> Iterator[None]:
    """Call ``on_event`` for what ranks write while the block runs, from one thread; remove what was read.

    Args:
        directory: URL of the run's directory.
        attempt: Events of other attempts are not read.
        world_size: Ranks.
        on_event: Called for every event, in the order of its rank.
        is_silent: True for a rank whose files are worth a look, because it is not heard otherwise.
    """
    poller = _Poller(directory, attempt, world_size, on_event)
    closing = threading.Event()

    def poll() -> None:
        while not closing.wait(_POLL_SECONDS):
            poller.poll(is_silent)
        poller.poll(lambda rank: True)

    thread = threading.Thread(target=poll, name="sparkdl-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()
        poller.remove()


class _Poller:
    def __init__(self, directory: str, attempt: int, world_size: int, on_event: Callable[[Event], None]) -> None:
        self._systems = FileSystems()
        self._directory = directory
        self._attempt = attempt
        self._next = [0] * world_size
        self._on_event = on_event
        self._complained = False

    def poll(self, wanted: Callable[[int], bool]) -> None:
        """Read what is new."""
        try:
            ranks = [rank for rank in range(len(self._next)) if wanted(rank)]
            while ranks:
                ranks = self._read_next(ranks)
        except (OSError, ArrowException, ConfigError) as error:
            if not self._complained:
                logger.warning("events of ranks cannot be read from %s: %s", self._directory, error)
            self._complained = True

    def remove(self) -> None:
        """Remove the events, if there were any."""
        if any(self._next):
            with contextlib.suppress(OSError, ArrowException, ConfigError):
                system, root = self._systems.open(self._directory)
                system.delete_dir(f"{root}/events")

    def _read_next(self, ranks: Sequence[int]) -> list[int]:
        """Read one file of every rank; returns the ranks that had one."""
        system, root = self._systems.open(self._directory)
        paths = [f"{root}/{_name(self._attempt, rank, self._next[rank])}" for rank in ranks]
        had = []
        for rank, path, info in zip(ranks, paths, system.get_file_info(paths), strict=True):
            if info.type != FileType.File:
                continue
            with system.open_input_stream(path) as stream:
                lines = stream.read(_MOST_BYTES).splitlines()
            if not lines or lines[-1] != _END:  # is being written
                continue
            self._next[rank] += 1
            had.append(rank)
            for line in lines[:-1]:
                self._take(line)
        return had

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            if isinstance(event, dict):
                self._on_event(event)
        except Exception:
            logger.exception("an event could not be shown: %.200r", line)
