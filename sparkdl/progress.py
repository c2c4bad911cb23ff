"""One progress bar on the driver, fed by what the ranks report."""

import logging
import os
import sys
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress"]

logger = logging.getLogger(__name__)


class Progress:
    """Shows epochs and steps while the barrier stage runs; use as a context manager.

    On a terminal or in a notebook it is a bar. Elsewhere it stays quiet, and every epoch is one line of the log.

    Args:
        shown: False never shows a bar.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and (is_notebook() or is_terminal())
        self._bar: tqdm[Any] | None = None
        self._steps = 0
        self.plan: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of a rank: ``plan``, ``step`` or ``epoch``."""
        kind = event["event"]
        if kind == "plan":
            self.plan = event
            self._steps = event["steps"]
            logger.info(
                "%d ranks on %s, %d torch threads each; batchSize %d = %d x %g; %d rows, %d shards, %d steps per epoch",
                event["world_size"],
                event["device"],
                event["threads"],
                event["batch_size"],
                event["world_size"],
                event["batch_size"] / event["world_size"],
                event["rows"],
                event["shards"],
                event["steps"],
            )
            logger.info("kept for later epochs: %s", event["cache"])
            if self._shown:
                if self._bar is None:
                    self._bar = tqdm(unit="step", dynamic_ncols=True)
                # A restart goes on where its checkpoint was written.
                self._bar.reset(total=event["epochs"] * event["steps"])
                self._bar.update(event.get("resumed", 0))
        elif kind == "step":
            self._advance((event["epoch"] - 1) * self._steps + event["step"], event["epoch"], event["loss"])
        elif kind == "epoch":
            self._advance(event["step"], event["epoch"], event["loss"], event.get("validation_loss"))
            logger.info(
                "epoch %d: loss %.6g%s, %.0f rows/s",
                event["epoch"],
                event["loss"],
                f", validation loss {event['validation_loss']:.6g}" if "validation_loss" in event else "",
                event["rows_per_second"],
            )

    def _advance(self, step: int, epoch: int, loss: float, validation_loss: float | None = None) -> None:
        if self._bar is None:
            return
        self._bar.set_description(f"epoch {epoch}/{self.plan['epochs']}", refresh=False)
        shown = {"loss": f"{loss:.4g}"}
        if validation_loss is not None:
            shown["validation"] = f"{validation_loss:.4g}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(max(0, step - self._bar.n))


def is_notebook() -> bool:
    """True where tqdm draws its notebook bar."""
    return any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def is_terminal() -> bool:
    """True where what this process prints to stderr ends on a terminal."""
    if sys.stderr.isatty():
        return True
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return False
    # spark-submit runs Python behind a pipe, and copies what it prints to its own output.
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False
