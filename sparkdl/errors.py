"""Every exception that sparkdl raises on purpose.

    SparkdlError
    ├── ConfigError          (ValueError)    what was asked cannot be: Params, columns, modules, plans
    ├── DataError            (ValueError)    values in the data that cannot be trained on
    ├── LaunchError          (RuntimeError)  the cluster cannot run the barrier stage
    │   ├── SlotsError                       fewer slots than ranks
    │   └── ExecutorPythonError              the executors' Python is not the driver's
    ├── PersistenceError     (ValueError)    a model cannot be written, or a file is not trusted
    ├── CheckpointError      (RuntimeError)  a checkpoint cannot be written, or none can be read
    ├── CallbackError        (RuntimeError)  a callback of the user's raised
    └── TrainingFailedError  (RuntimeError)  a rank failed; ``failures`` holds every rank's own account

Messages say what was asked, what was found and what to do, in that order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CallbackError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExecutorPythonError",
    "Failure",
    "LaunchError",
    "PersistenceError",
    "SlotsError",
    "SparkdlError",
    "TrainingFailedError",
]


class SparkdlError(Exception):
    """Base class of all errors raised on purpose by sparkdl."""


class ConfigError(SparkdlError, ValueError):
    """A setting, column or module that cannot work; found before any rank starts."""


class DataError(SparkdlError, ValueError):
    """Values in the data that cannot be trained on, named by column and row."""


class LaunchError(SparkdlError, RuntimeError):
    """The cluster cannot run the barrier stage as asked."""


class SlotsError(LaunchError):
    """Fewer tasks can run at once than ranks were asked for."""


class ExecutorPythonError(LaunchError):
    """The Python of the executors lacks a package or has another version than the driver's."""


class PersistenceError(SparkdlError, ValueError):
    """A module that cannot be described without code, or a saved file that is not trusted."""


class CheckpointError(SparkdlError, RuntimeError):
    """A checkpoint that cannot be written, or cannot be read although it is needed."""


class CallbackError(SparkdlError, RuntimeError):
    """A callback of the user's that raised; the message names it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What one rank said when it failed."""

    rank: int
    """Rank that failed."""

    host: str
    """Address of the rank's executor, as Spark knows it."""

    kind: str
    """Class name of the exception."""

    message: str
    """Text of the exception."""

    traceback: str
    """The rank's own Python traceback."""

    consequence: bool
    """True where a peer's death explains the failure (a closed connection, say)."""

    attempt: int = 1
    """How often the run had been started, that time included."""

    step: int | None = None
    """Optimizer steps that the rank had finished; None before its training began."""

    time: float = 0.0
    """Seconds since the epoch, by the rank's clock."""


class TrainingFailedError(SparkdlError, RuntimeError):
    """At least one rank failed; the message is the first cause.

    Attributes:
        failures: Every account that reached the driver, by rank.
        lost: True where a rank was lost (its executor or process died, or it hung), so that a restart may help; False
            where a rank raised an error, which would be raised again.
    """

    def __init__(self, message: str, failures: Mapping[int, Failure] | None = None, *, lost: bool = False) -> None:
        super().__init__(message)
        self.failures: dict[int, Failure] = dict(failures or {})
        self.lost = lost
