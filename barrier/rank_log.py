"""What ranks log, in the log of the driver."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["forwarded_logs", "log_of_rank"]

_LOGGER = "sparkdl"
_LINES_PER_SECOND = 100
_MOST_CHARACTERS = 8000  # of one line

Send = Callable[..., None]


@contextlib.contextmanager
def forwarded_logs(send: Send, *, level: int) -> Iterator[None]:
    """Send what the logger "sparkdl" says from this level on, while the block runs.

    Of more than 100 lines in a second, the rest is counted and left out.

    Args:
        send: Called as ``send("log", level=..., logger=..., message=...)``, by any thread.
        level: As in `logging`.
    """
    logger, handler = logging.getLogger(_LOGGER), _Forwarder(send, level)
    before = logger.level
    if not logger.isEnabledFor(level):
        logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


class _Forwarder(logging.Handler):
    def __init__(self, send: Send, level: int) -> None:
        super().__init__(level)
        self._send = send
        self._counting = threading.Lock()
        self._second = 0.0
        self._sent = self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line, or count it."""
        try:
            message = self.format(record)[:_MOST_CHARACTERS]
        except Exception:  # arguments that do not fit the text
            message = str(record.msg)[:_MOST_CHARACTERS]
        with self._counting:
            now = time.monotonic()
            if now - self._second >= 1:
                self._tell_left_out()
                self._second, self._sent = now, 0
            if self._sent >= _LINES_PER_SECOND:
                self._left_out += 1
                return
            self._sent += 1
            self._send("log", level=record.levelno, logger=record.name, message=message)

    def close(self) -> None:
        """Say how much was left out in the end."""
        with self._counting:
            self._tell_left_out()
        super().close()

    def _tell_left_out(self) -> None:
        if self._left_out:
            message = f"{self._left_out} more lines within a second were left out"
            self._send("log", level=logging.WARNING, logger=_LOGGER, message=message)
        self._left_out = 0


def log_of_rank(event: Mapping[str, Any]) -> None:
    """Put a line of a rank into the driver's log, as the logger "sparkdl.rank"."""
    logging.getLogger(f"{_LOGGER}.rank").log(
        int(event["level"]), "rank %s on %s: %s", event["rank"], event["host"], event["message"]
    )
