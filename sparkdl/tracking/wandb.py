"""Weights & Biases: one run per fit."""

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparkdl.errors import ConfigError
from sparkdl.history import encode_json, numbers_of
from sparkdl.storage import reason
from sparkdl.tracking.base import RunInfo, import_library

__all__ = ["WeightsAndBiases"]

logger = logging.getLogger(__name__)

_SERVICE = "WANDB_SERVICE"  # where wandb leaves the address of its service process


@dataclass(frozen=True, slots=True)
class WeightsAndBiases:
    """Writes a run of Weights & Biases for every fit; the Params are its config.

    Entries of the history keep their names; what is reported between epochs is under ``step/``. The run is closed when
    the fit ends, with exit code 1 where it failed. The service process that wandb starts ends with the last fit that
    uses it, unless the program had one running before, or has a run of its own.

    Attributes:
        project: The project.
        entity: User or team; None takes the account's default.
        name: Name of the run; None lets wandb invent one.
        group: Runs that belong together, as those of a CrossValidator do.
        tags: Tags of the run.
        mode: "online", "offline", or "disabled"; None takes ``WANDB_MODE``, else "online". What was written offline is
            sent by ``wandb sync``.
        directory: Local directory for the run's files; None takes ``WANDB_DIR``, else the working directory.
    """

    project: str
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] | None = None
    directory: str | None = None

    def check(self) -> None:
        """Import wandb, and log in where runs are sent at once; asks for a key where somebody can answer.

        Raises:
            ConfigError: wandb is not installed, or there is no key.
        """
        wandb: Any = import_library("wandb", "WeightsAndBiases", "wandb")
        if (self.mode or os.environ.get("WANDB_MODE") or "online") != "online":
            return
        advice = "Run `wandb login` or set WANDB_API_KEY, or use mode='offline' and `wandb sync` later."
        try:
            known = wandb.login(verify=False)
        except wandb.Error as error:
            raise ConfigError(f"WeightsAndBiases cannot log in: {reason(error)}. {advice}") from error
        if not known:
            raise ConfigError(f"WeightsAndBiases has no key of an account. {advice}")

    def start(self, run: RunInfo) -> "_WandbRun":
        """Begin a run."""
        return _WandbRun(self, run)


class _WandbRun:
    def __init__(self, tracker: WeightsAndBiases, run: RunInfo) -> None:
        import wandb

        _services.enter()
        try:
            self._run: Any = wandb.init(
                project=tracker.project,
                entity=tracker.entity,
                name=tracker.name,
                group=tracker.group,
                tags=list(tracker.tags),
                mode=tracker.mode,
                dir=tracker.directory,
                config={**encode_json(dict(run.params)), "estimator": run.estimator, "run_id": run.run_id},
                reinit="create_new",  # several fits at a time, and the user's own run, do not know each other
                settings=wandb.Settings(console="off", silent=True),
            )
        except BaseException:
            _services.leave()
            raise
        if not self._run.offline and self._run.url:
            logger.info("Weights & Biases: %s", self._run.url)

    def log_step(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._run.log(dict(values), step=step)

    def log_epoch(self, record: Mapping[str, Any], time: float) -> None:
        values = {name: value for name, value in numbers_of(record).items() if name != "step"}
        self._run.log(values, step=int(record["step"]))

    def finish(self, model: Any, error: BaseException | None) -> None:
        try:
            self._run.finish(exit_code=0 if error is None else 1)
        finally:
            _services.leave()


class _Services:
    """Counts the fits that use wandb's service process, and ends it after the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._ours = _SERVICE not in os.environ
            self._users += 1

    def leave(self) -> None:
        import wandb

        with self._lock:
            self._users -= 1
            if not self._users and self._ours and wandb.setup().most_recent_active_run is None:
                wandb.teardown()


_services = _Services()
