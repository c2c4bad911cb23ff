"""What a tracker is: a value that the user makes, and what it opens for each fit."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

from sparkdl.errors import ConfigError
from sparkdl.history import numbers_of

__all__ = [
    "RunInfo",
    "TrackedRun",
    "Tracker",
    "as_of_this_thread",
    "check_trackers",
    "flat_params",
    "import_library",
    "step_numbers",
]

_STEP_PREFIX = "step/"
_NO_NUMBERS = ("step", "global_step", "rank", "attempt", "time")  # where an event comes from, and when

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A fit, as trackers see it.

    Attributes:
        run_id: Unique to the fit; also names its directories and its events file.
        params: The Params of the Estimator, flat, as JSON values; see `flat_params`.
        estimator: Class of the Estimator.
        uid: Its uid.
        started: Seconds since 1970.
    """

    run_id: str
    params: Mapping[str, Any] = field(repr=False)
    estimator: str
    uid: str
    started: float


class TrackedRun(Protocol):
    """What a tracker opened for one fit. All calls come from one thread of the driver, one after another."""

    def log_step(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Take what rank 0 reported of a step, some of which come every second.

        Args:
            step: Optimizer steps so far, growing.
            values: Numbers, by the names of the history with ``step/`` before them.
            time: When the driver heard of it, in seconds since 1970.
        """

    def log_epoch(self, record: Mapping[str, Any], time: float) -> None:
        """Take the history's record of an epoch; its ``step`` says how many optimizer steps there were so far.

        Args:
            record: The record.
            time: When the driver heard of it, in seconds since 1970.
        """

    def finish(self, model: Any, error: BaseException | None) -> None:
        """End the run; called once for every run that was started, whatever happened.

        Args:
            model: The fitted model; None where there is none.
            error: What the fit failed with; None where it succeeded.
        """


@runtime_checkable
class Tracker(Protocol):
    """What the Param ``trackers`` holds. Fits of CrossValidator's threads share it: a fit's state is in `TrackedRun`.

    A tracker may also have a method ``check() -> None``, which is called before the first Spark job and raises a
    `sparkdl.errors.ConfigError` where it cannot work, and a method ``bind() -> Tracker``; see `as_of_this_thread`.
    """

    def start(self, run: RunInfo) -> TrackedRun:
        """Begin to track a fit. Called in a thread of its own, where it may be slow."""


def check_trackers(trackers: Sequence[Any] | None) -> None:
    """Check on the driver, before any job, that trackers can work.

    Raises:
        ConfigError: Something in the list is no tracker, or a library is missing.
    """
    if trackers is not None and not isinstance(trackers, list | tuple):
        raise ConfigError(f"trackers={trackers!r} is no list. Give a list of trackers, as in [TensorBoard('/logs')].")
    for tracker in trackers or ():
        if isinstance(tracker, type) or not isinstance(tracker, Tracker):
            raise ConfigError(
                f"trackers holds {tracker!r}, which is no tracker. Give objects with a method start(run), such as "
                "sparkdl.tracking.TensorBoard('/logs')."
            )
        check = getattr(tracker, "check", None)
        if check is not None:
            check()


def as_of_this_thread(trackers: Sequence[T]) -> list[T]:
    """Trackers that know what only the calling thread does, such as MLflow's active run.

    To be called where the user calls fit, and where CrossValidator copies an Estimator for the threads of its pool.
    """
    return [tracker.bind() if hasattr(tracker, "bind") else tracker for tracker in trackers]


def import_library(name: str, what: str, extra: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: The module.
        what: What needs it, for the message.
        extra: The extra of sparkdl-torch that brings it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {name.partition('.')[0]}, which cannot be imported on the driver ({error}). "
            f"Install the extra: pip install 'sparkdl-torch[{extra}]'."
        ) from error


def flat_params(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of Params as trackers can show them: flat, and plain.

    Dicts are flattened with a dot. Classes and functions become their names, and other objects those of their classes:
    they may be large, and the text of a DataFrame may cost a job.

    >>> flat_params({"maxEpochs": 3, "timeouts": {"step": 5.0}, "optimizer": dict, "inputCols": ["a", "b"]})
    {'maxEpochs': 3, 'timeouts.step': 5.0, 'optimizer': 'dict', 'inputCols': ['a', 'b']}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= {
                f"{name}.{key}": entry for key, entry in flat_params({str(k): v for k, v in value.items()}).items()
            }
        else:
            found[name] = _plain(value)
    return found


def step_numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's event, under the names that trackers get."""
    return {_STEP_PREFIX + name: value for name, value in numbers_of(event).items() if name not in _NO_NUMBERS}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return getattr(value, "__qualname__", None) or type(value).__qualname__
