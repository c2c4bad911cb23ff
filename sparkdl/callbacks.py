"""Code of the user's that is called while a rank trains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparkdl.errors import CallbackError, ConfigError

__all__ = ["Callback", "Callbacks", "RunView", "check_callbacks"]


@dataclass(frozen=True, slots=True)
class RunView:
    """What a callback sees of the run, on its rank."""

    rank: int
    """This rank; 0 is the one to do what is to be done once."""

    world_size: int
    """Ranks that train together."""

    epoch: int
    """The current epoch, from 1."""

    num_epochs: int
    """Epochs of the whole fit."""

    step: int
    """Optimizer steps of the run so far."""

    steps_per_epoch: int
    """Optimizer steps of an epoch."""

    learning_rate: float
    """Of the last step."""

    loss: float
    """Mean loss of this rank's rows of the epoch so far; in `on_epoch_end`, of all ranks' rows."""

    history: Sequence[Mapping[str, Any]]
    """The records of the epochs that are done; not to be changed."""

    module: nn.Module
    """The module that is trained. To be read: changing it on one rank alone spoils the run."""


class Callback:
    """What is called in the course of a fit, on every rank; override what you need.

    Instances travel to the ranks by pickle: what a callback remembers stays in its rank, and the driver's own instance
    is not changed. A callback that raises ends the fit, and the error names it. All ranks wait for the slowest.
    """

    def on_fit_start(self, run: RunView) -> None:
        """Before the first step; after a restart, before the first step of that attempt."""

    def on_step_end(self, run: RunView) -> None:
        """After every optimizer step."""

    def on_validation_end(self, run: RunView, metrics: Mapping[str, float]) -> None:
        """After the validation of an epoch; ``metrics`` holds the new entries of the history."""

    def on_epoch_end(self, run: RunView) -> None:
        """After every epoch, and its validation; its record is the last one of ``run.history``."""

    def on_checkpoint(self, run: RunView) -> None:
        """After the state was handed over to be written; rank 0 writes it in the background."""

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """When the training ends by an error of this rank; that error is raised afterwards, whatever happens here."""

    def on_fit_end(self, run: RunView) -> None:
        """After the last step, unless the training ended by an error."""


class Callbacks:
    """Calls all callbacks of a rank, in order.

    Args:
        callbacks: The user's.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def call(self, name: str, run: RunView, *arguments: Any) -> None:
        """Call a method of all of them.

        Raises:
            CallbackError: One raised.
        """
        for callback in self._callbacks:
            with _named(callback, name, run):
                getattr(callback, name)(run, *arguments)


@contextmanager
def _named(callback: Callback, name: str, run: RunView) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallbackError(
            f"The callback {type(callback).__name__} failed in {name}, on rank {run.rank} after step {run.step}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks, if that is what they are.

    Raises:
        ConfigError: Something else.
    """
    given = list(callbacks or ()) if not isinstance(callbacks, Callback) else [callbacks]
    for callback in given:
        if not isinstance(callback, Callback):
            hint = "an instance, not the class" if isinstance(callback, type) else "an instance of sparkdl.Callback"
            raise ConfigError(f"callbacks holds {callback!r}, which is no callback. Give {hint}.")
    return tuple(given)
