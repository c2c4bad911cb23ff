"""The channel on which ranks tell the driver about progress and failures while the barrier stage runs.

The driver listens on one interface and hands out a secret through Spark; a rank that connects answers an HMAC
challenge (`multiprocessing.connection` does both) and then sends JSON lines, never pickles. Losing the channel never
fails a run: the driver then learns of failures from Spark alone, later and with less detail.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import Any

__all__ = ["ChannelAddress", "RankChannel", "local_address", "open_channel"]

logger = logging.getLogger(__name__)

Event = dict[str, Any]
_HANDSHAKE_SECONDS = 5.0
_BACKLOG = 128
_MOST_BYTES = 16 << 20  # of one event


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
            with _time_limit(connection, _HANDSHAKE_SECONDS):
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
        while True:
            closing = self._closing.is_set()
            with self._lock:
                open_now = list(self._connections)
            ready = wait(open_now, timeout=0 if closing else 0.1)
            if not open_now:
                self._closing.wait(0.1)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    self._take(connection.recv_bytes(_MOST_BYTES))
                except (EOFError, OSError):
                    with self._lock:
                        self._connections.remove(connection)
                    connection.close()
            if closing and not ready:
                return

    def _take(self, message: bytes) -> None:
        try:
            event = json.loads(message)
            if isinstance(event, dict):
                self._on_event(event)
        except Exception:
            logger.exception("an event could not be shown: %.200r", message)

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
    """A rank's end of the channel; connects on first use and gives up silently.

    Args:
        address: Where the driver listens; None sends nothing.
        rank: Added to every event.
        host: Added to every event.
    """

    def __init__(self, address: ChannelAddress | None, *, rank: int, host: str) -> None:
        self._address = address
        self._origin = {"rank": rank, "host": host}
        self._connection: Connection | None = None

    def send(self, event: str, **fields: Any) -> None:
        """Send one event; returns at once where the driver cannot be reached."""
        if self._address is None:
            return
        try:
            if self._connection is None:
                self._connection = _connect(self._address)
            self._connection.send_bytes(json.dumps({"event": event, **self._origin, **fields}).encode())
        except Exception as error:
            logger.info("the driver cannot be told of progress: %r", error)
            self.close()
            self._address = None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _connect(address: ChannelAddress) -> Connection:
    line = socket.create_connection((address.host, address.port), timeout=_HANDSHAKE_SECONDS)
    line.setblocking(True)
    connection = Connection(line.detach())
    try:
        with _time_limit(connection, _HANDSHAKE_SECONDS):
            answer_challenge(connection, address.secret)
            deliver_challenge(connection, address.secret)
    except BaseException:
        connection.close()
        raise
    return connection


def _hang_up(connection: Connection) -> None:
    """End whatever another thread is waiting for on this connection."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _time_limit(connection: Connection, seconds: float) -> Iterator[None]:
    """Let reads from a connection fail after some seconds; connections have no time limit of their own."""

    def limit(value: float) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            timeval = struct.pack("ll", int(value), 0)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    limit(seconds)
    yield
    limit(0)
