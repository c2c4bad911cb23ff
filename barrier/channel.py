"""The channel on which ranks tell the driver about progress and failures while the barrier stage runs.

The driver listens on one interface and hands out a secret through Spark; a rank that connects answers an HMAC
challenge (`multiprocessing.connection` does both) and then sends JSON lines, never pickles. Losing the channel never
fails a run and never holds it up: the driver then learns of failures from files in the run's directory, if it has one,
else from Spark alone, later and with less detail.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import Any

from sparkdl.barrier.event_files import Event, EventFiles

__all__ = ["ChannelAddress", "Event", "RankChannel", "local_address", "open_channel"]

logger = logging.getLogger(__name__)

_HANDSHAKE_SECONDS = 5.0
_BACKLOG = 128
_MOST_BYTES = 16 << 20  # of one event
_BYE = "bye"  # of a rank that closes its end, so that the driver knows whom death cut short
_MOST_WAITING = 1000  # events of a rank
_FLUSH_SECONDS = 3.0
_DRAIN_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_FILE_SECONDS = 1.0
_FREQUENT_FILES = 60
_LATER_FILE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """Where the driver listens."""

    host: str
    port: int
    secret: bytes = field(repr=False)


def local_address(peer: str) -> str:
    """The address of this host from which ``peer`` is reached; loopback where the peer is unknown."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket sends nothing on connect
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


@contextlib.contextmanager
def open_channel(host: str, on_event: Callable[[Event], None]) -> Iterator[ChannelAddress | None]:
    """Listen on ``host`` while the block runs, and call ``on_event`` for every event, from one thread.

    Of a rank whose connection ends without a goodbye it makes an event of its own, "gone".

    Yields:
        The address for the ranks; None where the driver cannot listen on ``host``.
    """
    secret = secrets.token_bytes(32)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        logger.warning("no progress from ranks: the driver cannot listen on %s (%s)", host, error)
        yield None
        return
    inbox = _Inbox(listener, secret, on_event)
    try:
        yield ChannelAddress(host, listener.getsockname()[1], secret)
    finally:
        inbox.close()


class _Inbox:
    """One thread that accepts, one that reads, and a short-lived one for every connection's handshake.

    A connection is read only after it has answered the challenge, so a stranger who connects and stays silent holds up
    nobody.
    """

    def __init__(self, listener: socket.socket, secret: bytes, on_event: Callable[[Event], None]) -> None:
        self._listener = listener
        self._secret = secret
        self._on_event = on_event
        self._lock = threading.Lock()
        self._pending: dict[Connection, threading.Thread] = {}
        self._connections: list[Connection] = []
        self._origins: dict[Connection, Event] = {}  # rank and host of those that have not said goodbye
        self._closing = threading.Event()
        self._threads = [self._started(self._accept), self._started(self._read)]

    def _started(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        name = f"sparkdl-channel-{target.__name__.strip('_')}"
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                line, _ = self._listener.accept()
            except OSError as error:
                logger.debug("a connection was lost before it was accepted: %r", error)
                continue
            connection = Connection(line.detach())
            with self._lock:
                self._pending[connection] = self._started(self._welcome, connection)

    def _welcome(self, connection: Connection) -> None:
        try:
            # It holds from then on too: a process that is stopped in the middle of an event holds up nobody.
            _limit(connection, _HANDSHAKE_SECONDS)
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            welcome = True
        except Exception as error:  # whatever a stranger sends
            logger.debug("refused a connection: %r", error)
            welcome = False
        with self._lock:
            self._pending.pop(connection, None)
            if welcome:
                self._connections.append(connection)
            else:
                connection.close()

    def _read(self) -> None:
        end = float("inf")
        while True:
            closing = self._closing.is_set()
            if closing:
                end = min(end, time.monotonic() + _DRAIN_SECONDS)
            with self._lock:
                open_now = list(self._connections)
            ready = wait(open_now, timeout=0 if closing else 0.1)
            if not open_now:
                self._closing.wait(0.1)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    self._take(connection, connection.recv_bytes(_MOST_BYTES))
                except (EOFError, OSError):
                    with self._lock:
                        self._connections.remove(connection)
                    connection.close()
                    origin = self._origins.pop(connection, None)
                    if origin is not None:
                        self._tell({"event": "gone", **origin})
            if closing and (not ready or time.monotonic() > end):
                return

    def _take(self, connection: Connection, message: bytes) -> None:
        try:
            event = json.loads(message)
            if not isinstance(event, dict):
                return
        except (ValueError, RecursionError) as error:
            logger.debug("not an event: %r", error)
            return
        if event.get("event") == _BYE:
            self._origins.pop(connection, None)
            return
        if "rank" in event and "host" in event:
            self._origins[connection] = {name: event[name] for name in ("rank", "host")}
        self._tell(event)

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            logger.exception("an event could not be shown: %.200r", event)

    def close(self) -> None:
        """Hear what ranks have sent so far, then close every line and end every thread."""
        with self._lock:
            welcomes = list(self._pending.values())
            for connection in self._pending:
                if self._idle(connection):
                    _hang_up(connection)
        for thread in welcomes:
            thread.join(timeout=2 * _HANDSHAKE_SECONDS)
        self._closing.set()
        with contextlib.suppress(OSError):  # wakes accept()
            socket.create_connection(self._listener.getsockname()[:2], timeout=1).close()
        for thread in self._threads:
            thread.join(timeout=2 * _HANDSHAKE_SECONDS)
        self._listener.close()
        with self._lock:
            late = list(self._pending.items())
        for connection, _ in late:
            _hang_up(connection)
        for _, thread in late:
            thread.join(timeout=2 * _HANDSHAKE_SECONDS)
        for connection in self._connections:
            connection.close()

    @staticmethod
    def _idle(connection: Connection) -> bool:
        """True where the other side has not begun to answer the challenge."""
        try:
            return not connection.poll(0.1)
        except OSError:
            return True


class RankChannel:
    """A rank's end of the channel: events wait in a queue, one thread sends them, and nobody waits for the driver.

    Where the driver cannot be reached, events go to files in ``directory`` if there is one; else the connection is
    tried again now and then. While nothing can be sent, the oldest events are forgotten, failures never.

    Args:
        address: Where the driver listens; None connects to nobody.
        rank: Added to every event.
        host: Added to every event.
        attempt: How often the run was started, this time included; added to every event.
        directory: URL of a directory that the driver reaches as well.
    """

    def __init__(
        self, address: ChannelAddress | None, *, rank: int, host: str, attempt: int = 1, directory: str | None = None
    ) -> None:
        self._address = address
        self._origin = {"rank": rank, "host": host, "attempt": attempt}
        self._files = None if directory is None else EventFiles(directory, attempt=attempt, rank=rank)
        self._connection: Connection | None = None
        # All of these under the condition, also closing the connection.
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._thread: threading.Thread | None = None
        self._busy = self._down = self._urgent = self._closing = False
        self._not_before = 0.0
        self._pause = _FIRST_PAUSE_SECONDS

    def send(self, event: str, **fields: Any) -> None:
        """Send one event soon; any thread may call it, and it returns at once."""
        if self._address is None and self._files is None:
            return
        try:
            line = json.dumps({"event": event, **self._origin, **fields}).encode()
        except (TypeError, ValueError) as error:
            logger.debug("an event is no JSON: %r", error)
            return
        with self._changed:
            if self._closing:
                return
            self._waiting.append(_Waiting(line, event == "failure"))
            self._urgent = self._urgent or event == "failure"
            self._forget()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sparkdl-channel-send", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was sent is out, or cannot get out.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            True where all is out.
        """
        with self._changed:
            self._urgent = self._urgent or bool(self._waiting)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy and not self._urgent, timeout)
            return not self._waiting and not self._busy

    def close(self) -> None:
        """Send what waits, as far as that takes no more than some seconds, and let go of the driver."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            return
        self._thread.join(_FLUSH_SECONDS)
        with self._changed:
            if self._connection is not None:
                _hang_up(self._connection)
        self._thread.join(_HANDSHAKE_SECONDS + 1)

    def _forget(self) -> None:
        while len(self._waiting) > _MOST_WAITING:
            oldest = next((place for place, entry in enumerate(self._waiting) if not entry.kept), None)
            if oldest is None:
                return
            del self._waiting[oldest]

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                if self._files is not None and (self._address is None or self._down):
                    self._write(self._files, batch)
                else:
                    self._transmit(batch)
            except Exception as error:
                logger.debug("the driver cannot be told: %r", error)
                self._hang_on(batch)
        with contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.send_bytes(json.dumps({"event": _BYE, **self._origin}).encode())
        self._disconnect()

    def _next_batch(self) -> "deque[_Waiting] | None":
        """What is to be sent now, once there is something; None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not (self._closing or self._urgent):
                pause = self._not_before - time.monotonic()
                if self._waiting and pause <= 0:
                    break
                self._changed.wait(pause if self._waiting else None)
            hopeless = self._pause > _FIRST_PAUSE_SECONDS and not self._urgent
            if self._closing and (hopeless or not self._waiting):
                return None
            self._urgent, self._busy = False, True
            batch, self._waiting = self._waiting, deque()
            return batch

    def _transmit(self, batch: "deque[_Waiting]") -> None:
        connection = self._connection
        if connection is None:
            connection = self._connect()
        while batch:
            connection.send_bytes(batch[0].line)
            batch.popleft()
        self._not_before, self._pause = 0.0, _FIRST_PAUSE_SECONDS

    def _write(self, files: EventFiles, batch: "deque[_Waiting]") -> None:
        files.write([entry.line for entry in batch])
        seconds = _FILE_SECONDS if files.written < _FREQUENT_FILES else _LATER_FILE_SECONDS
        self._not_before, self._pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS

    def _hang_on(self, batch: "deque[_Waiting]") -> None:
        """Keep what could not be sent, and wait for better times."""
        self._disconnect()
        with self._changed:
            self._waiting.extendleft(reversed(batch))
            self._forget()
            if self._files is not None and not self._down:
                self._down = True  # files from now on, at once
                self._urgent = any(entry.kept for entry in self._waiting)
                return
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def _connect(self) -> Connection:
        assert self._address is not None
        line = socket.create_connection((self._address.host, self._address.port), timeout=_HANDSHAKE_SECONDS)
        line.setblocking(True)
        connection = Connection(line.detach())
        with self._changed:
            self._connection = connection
        with _time_limit(connection, _HANDSHAKE_SECONDS):
            answer_challenge(connection, self._address.secret)
            deliver_challenge(connection, self._address.secret)
        return connection

    def _disconnect(self) -> None:
        with self._changed:
            if self._connection is not None:
                self._connection.close()
            self._connection = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An event that waits: as JSON, and whether it must not be forgotten."""

    line: bytes
    kept: bool


def _hang_up(connection: Connection) -> None:
    """End whatever another thread is waiting for on this connection."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _time_limit(connection: Connection, seconds: float) -> Iterator[None]:
    """Let reads from a connection fail after some seconds; connections have no time limit of their own."""
    _limit(connection, seconds)
    yield
    _limit(connection, 0)


def _limit(connection: Connection, seconds: float) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))
