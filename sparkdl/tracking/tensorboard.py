"""TensorBoard: event files in a directory."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyarrow.fs import LocalFileSystem

from sparkdl.history import encode_json, numbers_of
from sparkdl.storage import open_file_system
from sparkdl.tracking.base import RunInfo, import_library

__all__ = ["TensorBoard"]


@dataclass(frozen=True, slots=True)
class TensorBoard:
    """Writes what TensorBoard reads, each fit to a folder of its own in ``directory``, named by its run.

    Entries of the history keep their names; what is reported between epochs is under ``step/``.

    Attributes:
        directory: A local path, or a URL. Event files grow, which object stores do not allow: for a URL they are
            written locally and copied at every epoch and at the end.
    """

    directory: str

    def check(self) -> None:
        """Import what is needed.

        Raises:
            ConfigError: tensorboard is not installed, or nothing installed knows the URL.
        """
        import_library("tensorboard", "TensorBoard", "tensorboard")
        open_file_system(self.directory)

    def start(self, run: RunInfo) -> "_TensorBoardRun":
        """Open the event file of a fit."""
        return _TensorBoardRun(f"{self.directory.rstrip('/')}/{run.run_id}", run)


class _TensorBoardRun:
    def __init__(self, url: str, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._system, self._target = open_file_system(url)
        self._upload = not isinstance(self._system, LocalFileSystem) or url.startswith("dbfs:")
        self._local = tempfile.mkdtemp(prefix="sparkdl-tensorboard-") if self._upload else self._target
        self._writer: Any = SummaryWriter(self._local)
        params = json.dumps(encode_json(dict(run.params)), indent=1)
        self._writer.add_text("params", f"```json\n{params}\n```", 0, run.started)

    def log_step(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._add(step, values, time)

    def log_epoch(self, record: Mapping[str, Any], time: float) -> None:
        self._add(int(record["step"]), numbers_of(record), time)
        self._writer.flush()
        self._copy()

    def finish(self, model: Any, error: BaseException | None) -> None:
        try:
            self._writer.close()
            self._copy()
        finally:
            if self._upload:
                shutil.rmtree(self._local, ignore_errors=True)

    def _add(self, step: int, values: Mapping[str, float], time: float) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, step, time)

    def _copy(self) -> None:
        """Copy the event files to where they were asked for."""
        if not self._upload:
            return
        self._system.create_dir(self._target, recursive=True)
        for name in os.listdir(self._local):
            with (
                open(os.path.join(self._local, name), "rb") as source,
                self._system.open_output_stream(f"{self._target}/{name}") as sink,
            ):
                shutil.copyfileobj(source, sink)
