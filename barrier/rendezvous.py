"""One message per rank, gathered once: all ranks agree to start, or all fail with the same sentence.

Spark's barrier `allGather` costs about a second whatever it carries, so everything that ranks must know of each other
travels in one entry: address, versions, plan, and the error of a rank that failed before it got here.
"""

import json
import platform
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from sparkdl import errors
from sparkdl.errors import Failure, LaunchError, SparkdlError, TrainingFailedError

__all__ = ["Entry", "StoreAddress", "Versions", "agree", "bind_store", "error_of", "find_versions"]

Versions = dict[str, str]
_SECRET_BYTES = 16
_LOST = ("Hang", "Preempted")  # kinds of failure that a rank's own code does not explain


class StoreAddress(tuple[str, int]):
    """Host and port of rank 0's store. Shown and compared as that pair; its secret is told to nobody but the ranks.

    Args:
        pair: Host and port.
        secret: What the keys of the run begin with.
    """

    secret: str

    def __new__(cls, pair: Iterable[Any], secret: str = "") -> Self:
        """The pair, with its secret."""
        address = super().__new__(cls, pair)
        address.secret = secret
        return address


@dataclass(frozen=True, slots=True)
class Entry:
    """What a rank says to all others before any of them joins the process group.

    Attributes:
        rank: The rank.
        host: Its executor's address, as Spark knows it.
        versions: Its Python and packages.
        executable: Its Python's path.
        fingerprint: Digest of what must be equal on all ranks.
        facts: What the others need to know of it (its rows, say).
        store: ``(address, port)`` of the store; from rank 0 only. As `agree` returns it, a `StoreAddress`.
        failure: Set where the rank failed before it got here.
    """

    rank: int
    host: str
    versions: Versions
    executable: str = sys.executable
    fingerprint: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    failure: Failure | None = None


def find_versions() -> Versions:
    """Versions of this process that must be equal on all ranks."""
    found = {"python": platform.python_version()}
    for package in ("torch", "pyarrow", "numpy", "petastorm", "sparkdl-torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def agree(entry: Entry, all_gather: Callable[[str], Sequence[str]]) -> tuple[Entry, ...]:
    """Exchange entries; return those of all ranks, or raise the same error on every rank.

    Beside the address of a store travels a secret that is drawn here: Spark's all-gather is authenticated, and
    encrypted where Spark is told to, which the store is not.

    Args:
        entry: This rank's own.
        all_gather: Sends a message to all ranks and returns everyone's, in rank order.

    Raises:
        SparkdlError: A rank failed before it got here; the error is that rank's own.
        LaunchError: The ranks differ in versions or fingerprint; the message names the odd one.
    """
    mine = asdict(entry)
    if entry.store is not None:
        mine["secret"] = secrets.token_hex(_SECRET_BYTES)
    entries = tuple(_decode(message) for message in all_gather(json.dumps(mine)))
    failures = {other.rank: other.failure for other in entries if other.failure is not None}
    if failures:
        raise error_of(failures)
    for name in dict.fromkeys(name for other in entries for name in other.versions):
        _check_equal(name, [other.versions.get(name, "missing") for other in entries], entries)
    _check_equal("plan", [other.fingerprint for other in entries], entries)
    return entries


def error_of(failures: dict[int, Failure]) -> SparkdlError:
    """The exception that stands for the failures of some ranks: the first cause, by class where it is one of ours."""
    first = min(failures.values(), key=lambda failure: (failure.consequence, failure.time))
    kind = getattr(errors, first.kind, None)
    if isinstance(kind, type) and issubclass(kind, SparkdlError) and kind is not TrainingFailedError:
        return kind(first.message)
    return TrainingFailedError(
        f"Rank {first.rank} on {first.host} failed: {first.kind}: {first.message}\n\n{first.traceback}",
        failures,
        lost=all(failure.consequence or failure.kind in _LOST for failure in failures.values()),
    )


def bind_store(address: str) -> socket.socket:
    """A listening socket on ``address`` alone, on a port of the system's choice: nothing can take it from the store."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _decode(message: str) -> Entry:
    # A rank of a newer version may have more to say; that its version differs is what must be told then.
    told = json.loads(message)
    values = {name: value for name, value in told.items() if name in Entry.__slots__}
    failure, store = values.pop("failure", None), values.pop("store", None)
    return Entry(
        **values,
        failure=Failure(**{name: failure[name] for name in Failure.__slots__}) if failure else None,
        store=StoreAddress(store, told.get("secret", "")) if store else None,
    )


def _check_equal(name: str, values: Sequence[str], entries: Sequence[Entry]) -> None:
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return
    usual = counts[0][0]
    odd = next(entry for entry, value in zip(entries, values, strict=True) if value != usual)
    found = values[odd.rank]
    if name == "plan":
        raise LaunchError(
            f"Rank {odd.rank} on {odd.host} found other data than the rest (plan {found} instead of {usual}). "
            "All ranks must see the same files; is the staging directory shared by all executors?"
        )
    raise LaunchError(
        f"Rank {odd.rank} on {odd.host} runs {name} {found} ({odd.executable}), the other ranks {usual}. "
        "Install the same versions on all executors."
    )
