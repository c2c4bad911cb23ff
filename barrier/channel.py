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
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import Any

__all__ = ["ChannelAddress", "RankChannel", "local_address", "open_channel"]

logger = logging.getLogger(__name__)

Event = dict[str, Any]
_HANDSHAKE_SECONDS = 5.0
_BACKLOG = 128


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
    try:
        listener = Listener((host, 0), backlog=_BACKLOG)  # the challenge follows in a thread of each connection
    except OSError as error:
        logger.warning("no progress from ranks: the driver cannot listen on %s (%s)", host, error)
        yield None
        return
    port = listener.address[1]
    inbox = _Inbox(listener, secret, on_event)
    try:
        yield ChannelAddress(host, port, secret)
    finally:
        inbox.close()


class _Inbox:
    """One thread that accepts, one that reads; both end with `close`.

    A connection is read only after it has answered the challenge, which it does in a thread of its own: a stranger who
    connects and stays silent holds up nobody.
    """

    def __init__(self, listener: Listener, secret: bytes, on_event: Callable[[Event], None]) -> None:
        self._listener = listener
        self._secret = secret
        self._on_event = on_event
        self._connections: list[Connection] = []
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"sparkdl-channel-{target.__name__}", daemon=True)
            for target in (self._accept, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection = self._listener.accept()
            except OSError as error:
                logger.debug("a connection was lost before it was accepted: %r", error)
                continue
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        try:
            with _time_limit(connection, _HANDSHAKE_SECONDS):
                deliver_challenge(connection, self._secret)
                answer_challenge(connection, self._secret)
        except Exception as error:  # whatever a stranger sends
            logger.debug("refused a connection: %r", error)
            connection.close()
        else:
            self._connections.append(connection)

    def _read(self) -> None:
        while True:
            closing = self._closing.is_set()
            ready = wait(list(self._connections), timeout=0 if closing else 0.1)
            if not self._connections:
                self._closing.wait(0.1)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    event = json.loads(connection.recv_bytes())
                except (EOFError, OSError, ValueError):
                    self._connections.remove(connection)
                    connection.close()
                    continue
                try:
                    self._on_event(event)
                except Exception:
                    logger.exception("an event of rank %s could not be shown", event.get("rank"))
            if closing and not ready:
                return

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):  # wake accept()
            socket.create_connection(self._listener.address, timeout=1).close()
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()
        for connection in self._connections:
            connection.close()


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
    # Client() waits as long as the system lets it: find out first, within seconds, whether the driver answers at all.
    socket.create_connection((address.host, address.port), timeout=_HANDSHAKE_SECONDS).close()
    connection = Client((address.host, address.port))
    try:
        with _time_limit(connection, _HANDSHAKE_SECONDS):
            answer_challenge(connection, address.secret)
            deliver_challenge(connection, address.secret)
    except BaseException:
        connection.close()
        raise
    return connection


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
