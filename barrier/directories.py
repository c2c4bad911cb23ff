"""A shared directory as one process sees it: whether it can write there and sees what the others wrote.

Every task of a probe leaves a marker in one folder and then lists the folder. No task waits for another: of two tasks
on shared storage, the later one sees the marker of the earlier one. The one that sees all of them removes the folder.
"""

import posixpath
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType

from sparkdl.barrier.findings import DirectoryFacts
from sparkdl.storage import open_file_system, reason

__all__ = ["probe_directory", "remove_markers"]

_PATIENCE = timedelta(seconds=30)


def probe_directory(
    setting: str,
    url: str,
    storage_options: Mapping[str, Any] | None,
    *,
    probe_id: str,
    host: str,
    index: int,
    num_tasks: int,
) -> DirectoryFacts:
    """Leave a marker, look for those of the others, and remove all if they are complete.

    Args:
        setting: The Param that names the directory.
        url: The directory, as a full URL. It need not exist: on file systems with real directories the nearest
            one above it that does is tried.
        storage_options: See `sparkdl.storage`.
        probe_id: Names this probe.
        host: Name of this host.
        index: This task.
        num_tasks: Tasks that leave a marker.

    Returns:
        What was found; a failure is one of the findings, and so is a file system that is silent for 30 seconds.
    """

    def probe() -> DirectoryFacts:
        file_system, folder = _marker_folder(url, storage_options, probe_id)
        if _has_directories(file_system):
            file_system.create_dir(folder)
        with file_system.open_output_stream(f"{folder}/{index}@{host}") as marker:
            marker.write(b"sparkdl")
        markers = file_system.get_file_info(FileSelector(folder, allow_not_found=True))
        names = [posixpath.basename(info.path) for info in markers]
        complete = len(names) == num_tasks
        if complete:
            file_system.delete_dir(folder)
        peers = {name.partition("@")[2] for name in names} | {host}
        return DirectoryFacts(setting, url, "", tuple(sorted(peers)), complete)

    done: Future[DirectoryFacts] = Future()

    def run() -> None:
        try:
            done.set_result(probe())
        except Exception as error:
            done.set_result(DirectoryFacts(setting, url, reason(error, storage_options)))

    # A mount whose server is gone blocks for ever, and cannot be interrupted.
    thread = threading.Thread(target=run, name="sparkdl-directory", daemon=True)
    thread.start()
    thread.join(_PATIENCE.total_seconds())
    if not done.done():
        return DirectoryFacts(setting, url, f"no answer within {_PATIENCE.total_seconds():.0f} seconds")
    return done.result()


def remove_markers(url: str, storage_options: Mapping[str, Any] | None, *, probe_id: str) -> None:
    """Remove what a probe left that did not end well; nothing where it left nothing."""
    file_system, folder = _marker_folder(url, storage_options, probe_id)
    if file_system.get_file_info(folder).type == FileType.Directory:
        file_system.delete_dir(folder)


def _marker_folder(url: str, storage_options: Mapping[str, Any] | None, probe_id: str) -> tuple[FileSystem, str]:
    file_system, path = open_file_system(url, storage_options)
    while _has_directories(file_system) and file_system.get_file_info(path).type == FileType.NotFound:
        path = posixpath.dirname(path)
    return file_system, posixpath.join(path, f".sparkdl-preflight-{probe_id}")


def _has_directories(file_system: FileSystem) -> bool:
    """True where a folder must exist before a file in it; stores of objects know none, and may forbid to look above."""
    return file_system.type_name in ("local", "hdfs")
