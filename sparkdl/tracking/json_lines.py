"""The events of a fit as JSON lines, which every fit writes."""

import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from sparkdl.config import RunSpec
from sparkdl.errors import ConfigError
from sparkdl.history import decode_json, encode_json
from sparkdl.storage import open_file_system, reason

__all__ = ["JsonLines", "events_url", "read_events"]

logger = logging.getLogger(__name__)


def events_url(spec: RunSpec) -> str:
    """Where the events of a run are written: as the text of `sparkdl.config.TrainConfig.tracking_dir` says."""
    directory = spec.config.tracking_dir or spec.checkpoint_url or _temporary_directory()
    return f"{directory.rstrip('/')}/{spec.run_id}.jsonl"


def read_events(url: str) -> list[dict[str, Any]]:
    """The events of a fit, in order; "NaN" and infinities are floats again.

    A last line that was not written to its end is left out.

    Args:
        url: Path or URL of the file.

    Raises:
        ConfigError: There is no such file.
    """
    file_system, path = open_file_system(url)
    try:
        with file_system.open_input_stream(path) as stream:
            lines = stream.read().split(b"\n")
    except FileNotFoundError as error:
        raise ConfigError(f"{url} does not exist. The events of a fit are in <run>.jsonl in trackingDir.") from error
    return [decode_json(json.loads(line)) for line in lines[:-1]]


class JsonLines:
    """Writes events to a file, one JSON object per line.

    A local file grows with every event. Elsewhere files cannot grow: they are written as a whole, at every epoch and at
    the end.

    Args:
        url: Path or URL of the file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: BinaryIO | None = None
        self._upload = False
        self._failed = False

    def start(self) -> None:
        """Open the file, and make the directory that it is in."""
        file_system, path = open_file_system(self._url)
        # Databricks' mount of its own store is a local file system that cannot append.
        self._upload = not isinstance(file_system, LocalFileSystem) or self._url.startswith("dbfs:")
        if self._upload:
            self._file = tempfile.TemporaryFile(prefix="sparkdl-")  # noqa: SIM115
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115

    def write(self, event: dict[str, Any]) -> None:
        """Append an event."""
        assert self._file is not None
        self._file.write(json.dumps(encode_json(event), allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._upload and event["event"] == "epoch":
            self._try_upload()

    def close(self) -> None:
        """Write what was not written yet."""
        if self._file is None:
            return
        if self._upload:
            self._try_upload()
        self._file.close()

    def _try_upload(self) -> None:
        """Write the whole file; a failure is logged once, and the next epoch tries again."""
        assert self._file is not None
        try:
            self._file.seek(0)
            file_system, path = open_file_system(self._url)
            file_system.create_dir(os.path.dirname(path), recursive=True)
            with file_system.open_output_stream(path) as sink:
                shutil.copyfileobj(self._file, sink)
        except (OSError, pa.ArrowException, ConfigError) as error:
            if not self._failed:
                logger.warning("events cannot be written to %s: %s", self._url, reason(error))
            self._failed = True
        finally:
            self._file.seek(0, os.SEEK_END)


@functools.cache
def _temporary_directory() -> str:
    """A directory that is removed when this process ends."""
    directory = tempfile.mkdtemp(prefix="sparkdl-events-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
