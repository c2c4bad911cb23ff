"""All ranks agree to start, or all fail with the same sentence."""

import functools
import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest

from sparkdl import errors
from sparkdl.barrier.rendezvous import Entry, agree, bind_store, error_of, find_versions
from sparkdl.errors import (
    ConfigError,
    DataError,
    Failure,
    LaunchError,
    PersistenceError,
    SlotsError,
    SparkdlError,
    TrainingFailedError,
)

pytestmark = pytest.mark.timeout(60)

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"}


def entry(rank: int, **changes: Any) -> Entry:
    """The entry of a healthy rank, each on a host of its own."""
    healthy = Entry(
        rank, f"10.0.0.{rank + 1}:40001", VERSIONS, executable=f"/opt/env{rank}/bin/python", fingerprint="same",
        facts={"rows": rank * 10}, store=("10.0.0.1", 50123) if rank == 0 else None,
    )  # fmt: skip
    return replace(healthy, **changes)


def failure(rank: int, kind: str, message: str, *, consequence: bool = False) -> Failure:
    return Failure(rank, f"10.0.0.{rank + 1}:40001", kind, message, f"Traceback of {message}", consequence)


class Gather:
    """Spark's all-gather, among threads: everyone's messages in rank order, once all have come."""

    def __init__(self, ranks: int) -> None:
        self._messages = [""] * ranks
        self._barrier = threading.Barrier(ranks, timeout=20)

    def of_rank(self, rank: int) -> Callable[[str], Sequence[str]]:
        return functools.partial(self._gather, rank)

    def _gather(self, rank: int, message: str) -> Sequence[str]:
        self._messages[rank] = message
        self._barrier.wait()
        return list(self._messages)


def meet(*entries: Entry) -> list[tuple[Entry, ...] | SparkdlError]:
    """What each rank gets out of `agree`: the entries of all, or its error."""
    gather = Gather(len(entries))

    def one(own: Entry) -> tuple[Entry, ...] | SparkdlError:
        try:
            return agree(own, gather.of_rank(own.rank))
        except SparkdlError as error:
            return error

    with ThreadPoolExecutor(len(entries)) as pool:
        return list(pool.map(one, entries))


def common_error(*entries: Entry) -> SparkdlError:
    """The error that all ranks got; the same class and words on each."""
    found = meet(*entries)
    assert all(isinstance(outcome, SparkdlError) for outcome in found)
    assert len({(type(outcome), str(outcome)) for outcome in found}) == 1
    first = found[0]
    assert isinstance(first, SparkdlError)
    return first


# ---- agreement -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rank_gets_the_entries_of_all_in_rank_order(ranks: int) -> None:
    entries = tuple(entry(rank) for rank in range(ranks))
    assert meet(*entries) == [entries] * ranks


def test_facts_and_the_store_arrive_as_they_were_sent() -> None:
    facts = {"rows": {"0": 10, "2": 12}, "labels": [0, 9], "widths": {"input_0": 3}, "name": "Zürich", "none": None}
    first, second = meet(entry(0, facts=facts), entry(1))
    assert isinstance(second, tuple)
    assert second[0].facts == facts
    assert second[0].store == ("10.0.0.1", 50123)
    assert second[1].store is None
    assert first == second


def test_an_entry_of_a_newer_version_with_more_to_say_is_named_by_its_version() -> None:
    newer = {**asdict(entry(1, versions={**VERSIONS, "sparkdl-torch": "9.0"})), "later": "unknown here"}
    mine = entry(0, versions={**VERSIONS, "sparkdl-torch": "0.1.0"})
    with pytest.raises(LaunchError, match=r"Rank 1 .*runs sparkdl-torch 9\.0"):
        agree(mine, lambda message: [message, json.dumps(newer)])


# ---- versions and plans ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("package", ["python", "torch", "numpy"])
def test_a_rank_with_another_version_is_named_on_all_ranks(package: str, odd: int) -> None:
    entries = [entry(rank, versions={**VERSIONS, package: "0.9"} if rank == odd else VERSIONS) for rank in range(3)]
    error = common_error(*entries)
    assert type(error) is LaunchError
    assert str(error) == (
        f"Rank {odd} on 10.0.0.{odd + 1}:40001 runs {package} 0.9 (/opt/env{odd}/bin/python), the other ranks "
        f"{VERSIONS[package]}. Install the same versions on all executors."
    )


def test_of_two_ranks_with_two_versions_the_second_is_the_odd_one() -> None:
    error = common_error(entry(0), entry(1, versions={**VERSIONS, "torch": "2.9.1"}))
    assert "Rank 1 on 10.0.0.2:40001 runs torch 2.9.1" in str(error)


def test_a_package_that_one_rank_lacks_is_missing_there() -> None:
    error = common_error(entry(0), entry(1), entry(2, versions={**VERSIONS, "numpy": "missing"}))
    assert "Rank 2 on 10.0.0.3:40001 runs numpy missing" in str(error)


def test_a_package_that_only_one_rank_knows_of_is_named_on_all_ranks() -> None:
    error = common_error(entry(0), entry(1), entry(2, versions={**VERSIONS, "brandnew": "1.0"}))
    assert "Rank 2 on 10.0.0.3:40001 runs brandnew 1.0" in str(error)


def test_a_rank_that_sees_other_data_is_named_on_all_ranks() -> None:
    error = common_error(entry(0), entry(1, fingerprint="other"), entry(2))
    assert type(error) is LaunchError
    assert "Rank 1 on 10.0.0.2:40001 found other data than the rest (plan other instead of same)" in str(error)
    assert "is the staging directory shared by all executors?" in str(error)


def test_the_versions_of_this_process_are_those_that_ranks_compare() -> None:
    import torch

    found = find_versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert found["petastorm"] == "0.12.1"
    assert {"pyarrow", "numpy", "sparkdl-torch"} < set(found)
    assert "missing" not in found.values()
    assert Entry(0, "here", found).executable == sys.executable


# ---- failures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [ConfigError, DataError, LaunchError, SlotsError, PersistenceError])
@pytest.mark.parametrize("failed", [0, 1, 2])
def test_an_error_of_one_rank_is_raised_with_its_class_and_words_on_all(kind: type[SparkdlError], failed: int) -> None:
    entries = [
        entry(rank, failure=failure(rank, kind.__name__, "'price' is null in a row") if rank == failed else None)
        for rank in range(3)
    ]
    error = common_error(*entries)
    assert type(error) is kind
    assert str(error) == "'price' is null in a row"


@pytest.mark.parametrize(
    "kind", ["ValueError", "Failure", "Mapping", "TrainingFailedError", "dataclass", "no_such_name"]
)
def test_another_error_of_one_rank_comes_with_rank_host_and_traceback_on_all(kind: str) -> None:
    error = common_error(entry(0), entry(1, failure=failure(1, kind, "planted failure of rank one")))
    assert type(error) is TrainingFailedError
    assert str(error).startswith(f"Rank 1 on 10.0.0.2:40001 failed: {kind}: planted failure of rank one")
    assert "Traceback of planted failure of rank one" in str(error)
    assert error.failures == {1: failure(1, kind, "planted failure of rank one")}


def test_a_failure_goes_before_differences_which_may_come_of_it() -> None:
    error = common_error(
        entry(0, fingerprint="", failure=failure(0, "DataError", "no rows"), store=None), entry(1, versions={})
    )
    assert (type(error), str(error)) == (DataError, "no rows")


def test_the_cause_is_told_and_not_its_consequence() -> None:
    broken = failure(0, "RuntimeError", "Connection closed by peer", consequence=True)
    error = error_of({0: broken, 2: failure(2, "DataError", "the cause")})
    assert (type(error), str(error)) == (DataError, "the cause")
    assert "Connection closed by peer" in str(error_of({0: broken}))


def test_of_several_causes_the_lowest_rank_speaks_and_all_are_kept() -> None:
    both = {1: failure(1, "KeyError", "first"), 3: failure(3, "OSError", "second")}
    error = error_of(both)
    assert isinstance(error, TrainingFailedError)
    assert "Rank 1" in str(error)
    assert error.failures == both


def test_every_error_of_ours_can_be_told_by_its_name() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if issubclass(kind, SparkdlError) and kind is not TrainingFailedError:
            assert type(error_of({0: failure(0, name, "words")})) is kind


# ---- the store's socket ----------------------------------------------------------------------------------------------
def reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_the_store_listens_on_its_address_alone() -> None:
    with bind_store("127.0.0.2") as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.2"
        assert reachable("127.0.0.2", port)
        assert not reachable("127.0.0.1", port)


def test_two_stores_never_get_one_port() -> None:
    with bind_store("127.0.0.1") as first, bind_store("127.0.0.1") as second:
        assert first.getsockname()[1] != second.getsockname()[1]
        assert 0 not in (first.getsockname()[1], second.getsockname()[1])


def test_the_store_listens_on_an_ipv6_address_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = bind_store("::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert listener.getsockname()[0] == "::1"
        assert reachable("::1", listener.getsockname()[1])


def test_an_address_of_another_host_cannot_be_bound() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        bind_store("203.0.113.7")
