"""From the events of the ranks to the trackers: nothing twice, nothing that waits, nothing that fails a fit."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

from sparkdl.storage import reason
from sparkdl.tracking.base import RunInfo, TrackedRun, Tracker, as_of_this_thread, step_numbers
from sparkdl.tracking.json_lines import JsonLines

__all__ = ["Tracking"]

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_MOST_WAITING = 20  # events of a tracker that is behind; of further steps it gets the last one only


class Tracking:
    """Hands the events of a fit to its trackers and to its events file; use as a context manager.

    Every tracker has a thread of its own, so that a slow server holds up nothing but itself. One that falls behind gets
    fewer steps, and all epochs. One that raises is logged with its name, gets nothing more but its end, and never fails
    the fit. After a restart, steps and epochs that were logged before are left out.

    Args:
        trackers: What the user asked for.
        run: The fit.
        events: Path or URL of the events file, from `sparkdl.tracking.events_url`.
        patience: How long the end waits for all trackers together to write what they have, and to log the model.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        run: RunInfo,
        events: str,
        *,
        patience: timedelta = timedelta(minutes=10),
    ) -> None:
        self.events = events
        self._run = run
        self._patience = patience.total_seconds()
        bound = as_of_this_thread(trackers)
        self._feeds = [
            _Feed(f"The events file {events}", _EventsSink(JsonLines(events))),
            *(_Feed(type(tracker).__name__, _TrackerSink(tracker, run), _MOST_WAITING) for tracker in bound),
        ]
        self._lock = threading.Lock()
        self._ended = False
        self._model: Any = None
        self._last_step = self._last_epoch = 0

    def __enter__(self) -> "Tracking":
        self({"event": "start", "run": self._run.run_id, "estimator": self._run.estimator, "params": self._run.params})
        for feed in self._feeds:
            feed.start()
        return self

    def __call__(self, event: Event) -> None:
        """Take one event of a rank, from any thread; returns at once."""
        event = {**event, "time": time.time()}
        with self._lock:
            if self._ended or not self._is_new(event):
                return
            for feed in self._feeds:
                feed.put(event)

    def fitted(self, model: Any) -> None:
        """Hand over the model, for trackers that log it at the end."""
        self._model = model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self({"event": "end", **({} if error is None else {"error": f"{type(error).__name__}: {error}"})})
        with self._lock:
            self._ended = True
        deadline = time.monotonic() + self._patience
        for feed in self._feeds:
            feed.end(self._model if error is None else None, error)
        for feed in self._feeds:
            feed.wait(deadline)

    def _is_new(self, event: Event) -> bool:
        """False for a step or epoch that was logged before; notes the last ones."""
        if event["event"] == "step":
            if event["global_step"] <= self._last_step:
                return False
            self._last_step = event["global_step"]
        elif event["event"] == "epoch":
            if event["epoch"] <= self._last_epoch:
                return False
            self._last_epoch = event["epoch"]
            self._last_step = max(self._last_step, event["step"])
        return True


class _Sink(Protocol):
    """What a feed writes to."""

    def start(self) -> None: ...

    def take(self, event: Event) -> None: ...

    def finish(self, model: Any, error: BaseException | None) -> None: ...


class _EventsSink:
    def __init__(self, lines: JsonLines) -> None:
        self._lines = lines

    def start(self) -> None:
        self._lines.start()

    def take(self, event: Event) -> None:
        self._lines.write(event)

    def finish(self, model: Any, error: BaseException | None) -> None:
        self._lines.close()


class _TrackerSink:
    def __init__(self, tracker: Tracker, run: RunInfo) -> None:
        self._tracker = tracker
        self._run = run
        self._tracked: TrackedRun | None = None

    def start(self) -> None:
        self._tracked = self._tracker.start(self._run)

    def take(self, event: Event) -> None:
        assert self._tracked is not None
        if event["event"] == "step":
            self._tracked.log_step(event["global_step"], step_numbers(event), event["time"])
        elif event["event"] == "epoch":
            record = {
                name: value for name, value in event.items() if name not in ("event", "rank", "host", "attempt", "time")
            }
            self._tracked.log_epoch(record, event["time"])

    def finish(self, model: Any, error: BaseException | None) -> None:
        if self._tracked is not None:
            self._tracked.finish(model, error)


class _Feed:
    """One sink, and the thread that writes to it."""

    def __init__(self, name: str, sink: _Sink, most_waiting: int | None = None) -> None:
        self._name = name
        self._sink = sink
        self._most_waiting = most_waiting
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._end: tuple[Any, BaseException | None] | None = None
        self._failed = False
        # A daemon: a server that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"sparkdl-tracking-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, event: Event) -> None:
        with self._changed:
            behind = self._most_waiting is not None and len(self._waiting) >= self._most_waiting
            if behind and event["event"] == self._waiting[-1]["event"] == "step":
                self._waiting.pop()
            self._waiting.append(event)
            self._changed.notify()

    def end(self, model: Any, error: BaseException | None) -> None:
        with self._changed:
            self._end = (model, error)
            self._changed.notify()

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s is not finished in time; the fit does not wait for it any longer.", self._name)

    def _work(self) -> None:
        self._try(self._sink.start)
        while (event := self._next()) is not None:
            if not self._failed:
                self._try(self._sink.take, event)
        model, error = self._end or (None, None)
        self._try(self._sink.finish, model, error)

    def _next(self) -> Event | None:
        """The next event; None once there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end is not None)
            return self._waiting.popleft() if self._waiting else None

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever a tracker raises, the fit goes on
            if not self._failed:
                logger.warning(
                    "%s failed and is left alone from now on; the fit goes on. %s: %s",
                    self._name, type(error).__name__, reason(error),
                )  # fmt: skip
            logger.debug("%s failed", self._name, exc_info=True)
            self._failed = True
