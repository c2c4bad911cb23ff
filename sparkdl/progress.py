"""One progress bar on the driver, fed by what the ranks report."""

import logging
import os
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():  # in a notebook without ipywidgets it draws its plain bar; that is no news
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["Progress"]

logger = logging.getLogger(__name__)


class Progress:
    """Shows epochs and steps while the barrier stage runs; use as a context manager.

    On a terminal or in a notebook it is one bar over all steps of the fit: the epoch, the loss, the last validation
    loss, rows per second over all ranks, which part of the time the ranks wait for data and for each other, and when it
    will be over. Elsewhere it stays quiet. Every epoch is one line of the log, shown or not.

    Args:
        shown: False never shows a bar.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and (is_notebook() or is_terminal())
        self._bar: tqdm[Any] | None = None
        self._latest: dict[str, Any] = {}
        self._epochs = 0  # that are over
        self._closed = False
        self._lock = threading.Lock()  # events come from the channel's thread, the end from the fit's
        self.plan: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            if self._bar is None:
                return
            if kind is None:
                self._complete(self._bar)
            self._bar.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of a rank: ``plan``, ``step`` or ``epoch``; others are left alone."""
        with self._lock:
            if self._closed:
                return
            kind = event["event"]
            if kind == "plan":
                self._begin(event)
            elif kind == "step" and self._bar is not None:
                self._advance(event, (event["epoch"] - 1) * self.plan["steps"] + event["step"])
            elif kind == "epoch":
                _log_epoch(event)
                self._epochs = event["epoch"]
                if self._bar is not None:
                    # Not the record's own step: steps that were skipped are no optimizer steps.
                    self._advance(event, event["epoch"] * self.plan["steps"])
                    self._bar.refresh()

    def _begin(self, plan: dict[str, Any]) -> None:
        """Take the plan of the first attempt, or of a restart, which goes on where its checkpoint was written."""
        self.plan = plan
        _log_plan(plan)
        if not self._shown:
            return
        total, resumed = plan["epochs"] * plan["steps"], plan.get("resumed", 0)
        if self._bar is None:
            self._bar = tqdm(total=total, initial=resumed, desc=self._description(), unit="step", dynamic_ncols=True)
        else:
            self._bar.reset(total=total)
            # As the beginning, not as an advance: tqdm would take the steps of the checkpoint for very fast ones.
            self._bar.n = self._bar.last_print_n = self._bar.initial = resumed
            self._bar.set_description(self._description())

    def _description(self) -> str:
        """The epoch in which the plan's attempt begins."""
        plan = self.plan
        epoch = min(plan.get("resumed", 0) // max(1, plan["steps"]) + 1, plan["epochs"])
        return f"epoch {epoch}/{plan['epochs']}"

    def _complete(self, bar: "tqdm[Any]") -> None:
        """Let the bar of a fit that succeeded end where it is: before its last epoch, or where events were lost."""
        if bar.n >= bar.total:
            return
        if bar.n == self._epochs * self.plan["steps"]:
            bar.set_description(f"epoch {self._epochs}/{self.plan['epochs']}, stopped early", refresh=False)
        bar.total = bar.n
        if hasattr(bar, "container"):  # a notebook's bar has a total of its own, and turns red where it is not reached
            bar.container.children[1].max = bar.n
        bar.refresh()

    def _advance(self, event: dict[str, Any], done: int) -> None:
        assert self._bar is not None
        self._bar.set_description(f"epoch {event['epoch']}/{self.plan['epochs']}", refresh=False)
        self._latest |= event  # the validation loss stays, though steps do not know it
        self._bar.set_postfix(_postfix(self._latest), refresh=False)
        self._bar.update(max(0, done - self._bar.n))


def _postfix(values: dict[str, Any]) -> dict[str, str]:
    """What the bar says beside its steps."""
    texts = {
        "loss": ("loss", "{:.4g}"),
        "validation_loss": ("validation", "{:.4g}"),
        "rows_per_second": ("rows/s", "{:.0f}"),
        "data_wait": ("data wait", "{:.0%}"),
        "synchronisation": ("sync", "{:.0%}"),
    }
    return {label: text.format(values[name]) for name, (label, text) in texts.items() if values.get(name) is not None}


def _log_plan(plan: dict[str, Any]) -> None:
    logger.info(
        "%d ranks on %s, %d torch threads each; batchSize %d = %d x %g; %d rows, %d shards, %d steps per epoch",
        plan["world_size"],
        plan["device"],
        plan["threads"],
        plan["batch_size"],
        plan["world_size"],
        plan["batch_size"] / plan["world_size"],
        plan["rows"],
        plan["shards"],
        plan["steps"],
    )
    logger.info("kept for later epochs: %s", plan["cache"])


def _log_epoch(record: dict[str, Any]) -> None:
    metrics = [f", {name.replace('_', ' ')} {value:.6g}" for name, value in _validation(record).items()]
    logger.info(
        "epoch %d: loss %.6g%s, %.0f rows/s",
        record["epoch"],
        record["loss"],
        "".join(metrics),
        record["rows_per_second"],
    )


def _validation(record: dict[str, Any]) -> dict[str, float]:
    """Losses and metrics of the validation rows, as numbers."""
    return {
        name: value
        for name, value in record.items()
        if name.startswith("validation_") and name != "validation_seconds" and isinstance(value, int | float)
    }


def is_notebook() -> bool:
    """True in the kernel of a notebook: with ipywidgets tqdm draws its own bar there, else one of text."""
    if any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__):
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


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
