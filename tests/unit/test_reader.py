"""Petastorm's Reader on a plan: the order of the plan, a bounded buffer, and errors that name the file."""

import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import FileSystem

from sparkdl import storage
from sparkdl.errors import DataError
from sparkdl.io import petastorm as reading
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import Piece, RowGroup
from sparkdl.io.schema import decode
from tests.unit.staged import COLUMNS, FIELDS, assert_rows, consecutive, whole, write_staged

pytestmark = pytest.mark.timeout(60)

SIZES = [5, 1, 9, 4, 2, 7, 3, 6, 8, 5, 5, 1, 2, 2, 10, 4]

Tensors = dict[str, torch.Tensor]


def to_tensors(table: pa.Table, number: int) -> Tensors:
    return decode(table, COLUMNS)


def to_ids(table: pa.Table, number: int = 0) -> list[int]:
    return table.column("label_0").to_pylist()


def read_all(pieces: list[Piece], decode: Callable[[pa.Table, int], Any] = to_ids, **settings: Any) -> list[Any]:
    with PlannedReader(pieces, columns=FIELDS, decode=decode, **settings) as reader:
        return list(reader)


def open_files(folder: Path) -> list[str]:
    """The files in a folder that this process holds open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(folder))]


@pytest.fixture
def groups(tmp_path: Path) -> list[RowGroup]:
    """Rows with ids from 0 in row groups of different sizes, in two files."""
    ids = consecutive(SIZES)
    return write_staged(tmp_path / "a.parquet", ids[:10]) + write_staged(tmp_path / "b.parquet", ids[10:])


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever happens to a reader: no thread, no open file, nothing on the terminal."""
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert open_files(tmp_path) == []
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# ---- what comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 8])
def test_results_come_in_the_order_of_the_plan_whichever_is_ready_first(groups: list[RowGroup], threads: int) -> None:
    finished: list[int] = []

    def slow_at_first(table: pa.Table, number: int) -> list[int]:
        ids = to_ids(table)
        time.sleep(max(0.0, 0.04 - 0.001 * ids[0]))
        finished.append(ids[0])
        return ids

    read = read_all(whole(groups), slow_at_first, threads=threads, ahead=2 * threads)
    assert read == [list(ids) for ids in consecutive(SIZES)]
    assert (finished == sorted(finished)) == (threads == 1), "the delays did not change the order of completion"


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_may_be_parts_of_row_groups_in_any_order_and_repeated(groups: list[RowGroup], threads: int) -> None:
    pieces = [Piece(groups[14], 3, 9), Piece(groups[0], 0, 5), Piece(groups[14], 0, 3), Piece(groups[0], 4, 5)]
    ids = consecutive(SIZES)
    read = read_all(pieces, to_tensors, threads=threads, ahead=2)
    for found, expected in zip(read, [ids[14][3:9], ids[0], ids[14][:3], ids[0][4:]], strict=True):
        assert_rows(found["input_0"], found["label_0"], expected)


def test_only_the_columns_asked_for_are_read(groups: list[RowGroup]) -> None:
    with PlannedReader(whole(groups), columns=["label_0"], decode=lambda table, number: table.column_names) as reader:
        assert list(reader) == [["label_0"]] * len(groups)


@pytest.mark.parametrize("threads", [1, 4])
def test_no_pieces_are_an_empty_pass(threads: int) -> None:
    assert read_all([], threads=threads) == []


def test_the_smallest_buffer_is_enough(groups: list[RowGroup]) -> None:
    for threads in (1, 4):
        assert read_all(whole(groups), threads=threads, ahead=1) == [list(ids) for ids in consecutive(SIZES)]


def test_a_finished_pass_stays_finished(groups: list[RowGroup]) -> None:
    with PlannedReader(whole(groups[:2]), columns=FIELDS, decode=to_ids) as reader:
        assert len(list(reader)) == 2
        assert list(reader) == []


def test_more_files_than_descriptors_can_be_read(tmp_path: Path) -> None:
    files = 80
    ids = consecutive([2] * files)
    pieces = [
        piece for number in range(files) for piece in whole(write_staged(tmp_path / f"{number:03}", [ids[number]]))
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        read = read_all(pieces, threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read == [list(group) for group in ids]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_store_is_opened_once_however_many_files_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    ids = consecutive([2] * 12)
    pieces = [piece for number in range(12) for piece in whole(write_staged(tmp_path / f"{number:02}", [ids[number]]))]
    opened: list[str] = []
    make = storage._make

    def counted(scheme: str, authority: str, options: dict[str, Any]) -> FileSystem:
        opened.append(scheme)
        return make(scheme, authority, options)

    monkeypatch.setattr(storage, "_make", counted)
    assert read_all(pieces, threads=threads) == [list(group) for group in ids]
    assert opened == ["file"]


# ---- how much waits --------------------------------------------------------------------------------------------------
def test_behind_a_slow_piece_no_more_than_the_buffer_is_decoded(groups: list[RowGroup]) -> None:
    ahead, begun, excess = 4, 0, 0
    started = 0
    lock, others = threading.Lock(), threading.Semaphore(0)

    def stalled(table: pa.Table, place: int) -> int:
        nonlocal started, excess
        number = to_ids(table)[0]
        with lock:
            started += 1
            excess = max(excess, started - begun - ahead)
        if number == 0:
            for _ in range(ahead - 1):
                assert others.acquire(timeout=10)
            assert not others.acquire(timeout=0.2), "a piece was decoded for which there was no room"
        others.release()
        return number

    with PlannedReader(whole(groups), columns=FIELDS, decode=stalled, threads=8, ahead=ahead) as reader:
        for number in range(len(groups)):
            # Counted before the call: what is being handed out makes room for one more.
            begun = number + 1
            next(reader)
    assert excess <= 0


def test_a_consumer_that_waits_holds_the_reader_back(groups: list[RowGroup]) -> None:
    decoded = threading.Semaphore(0)

    def counted(table: pa.Table, number: int) -> list[int]:
        decoded.release()
        return to_ids(table)

    with PlannedReader(whole(groups), columns=FIELDS, decode=counted, threads=2, ahead=3) as reader:
        for _ in range(3):
            assert decoded.acquire(timeout=10)
        assert not decoded.acquire(timeout=0.2)
        for _ in range(4):
            next(reader)
            assert decoded.acquire(timeout=5), "room was made, but nothing was decoded ahead of the next call"


# ---- what must never be lost -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [0, 2, len(SIZES) - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_result_that_never_comes_is_an_error_that_names_it(
    groups: list[RowGroup], monkeypatch: pytest.MonkeyPatch, lost: int, threads: int
) -> None:
    class Losing(reading._TimedPool):
        def get_results(self) -> Any:
            number, result = super().get_results()
            return (number, result) if number != lost else super().get_results()

    monkeypatch.setattr(reading, "_TimedPool", Losing)
    read: list[list[int]] = []
    with PlannedReader(whole(groups), columns=FIELDS, decode=to_ids, threads=threads) as reader:
        missing = groups[lost]
        with pytest.raises(DataError, match=rf"ended without row group {missing.index} of {missing.path}"):
            read.extend(reader)
    assert read == [list(ids) for ids in consecutive(SIZES[:lost])]


def test_a_pass_does_not_end_while_pieces_are_still_being_handed_to_the_threads(
    groups: list[RowGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Petastorm's pool compares its counts before it asks the ventilator; in between, the rest may be queued."""
    completed = reading._InOrderVentilator.completed
    raced = 0

    def late(ventilator: Any) -> bool:
        nonlocal raced
        if threading.current_thread() is ventilator._ventilation_thread:
            time.sleep(0.002)
            return completed(ventilator)
        nothing_yet = ventilator._ventilated_items_count == 0
        time.sleep(0.03)
        ended = completed(ventilator)
        raced += nothing_yet and ended
        return ended

    monkeypatch.setattr(reading._InOrderVentilator, "completed", late)
    for _ in range(30):
        assert read_all(whole(groups[:3]), threads=2) == [list(ids) for ids in consecutive(SIZES[:3])]
    assert raced > 0, "the delays did not produce the race"


# ---- files that changed ----------------------------------------------------------------------------------------------
def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 200)


def lose_column(path: Path) -> None:
    source = pq.ParquetFile(path)
    tables = [source.read_row_group(index).drop_columns("label_0") for index in range(source.num_row_groups)]
    source.close()
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def lose_rows(path: Path) -> None:
    write_staged(path, [range(3)])


DAMAGES = {
    "vanished": (os.unlink, "No such file"),
    "emptied": (lambda path: os.truncate(path, 0), "Parquet file size is 0 bytes"),
    "cut short": (truncate, "Parquet magic bytes not found"),
    "overwritten": (overwrite_pages, ""),
    "shrunk": (lose_rows, "it has 3 rows, 5 were planned"),
    "without the column": (lose_column, "label_0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_changed_is_an_error_with_its_name(groups: list[RowGroup], damage: str, threads: int) -> None:
    change, reason = DAMAGES[damage]
    path = Path(groups[0].path)
    change(path)
    with (
        PlannedReader(whole(groups), columns=FIELDS, decode=to_tensors, threads=threads) as reader,
        pytest.raises(DataError, match=rf"(?s)^Row group 0 of {path} cannot be read: .*{reason}.*fit again\.$"),
    ):
        next(reader)


def test_a_file_with_fewer_row_groups_is_an_error_with_its_name(groups: list[RowGroup]) -> None:
    lose_rows(Path(groups[0].path))
    with pytest.raises(DataError, match=rf"^Row group 7 of {groups[7].path} cannot be read: .*fit again"):
        read_all(whole(groups[7:]))


def test_pieces_before_the_damaged_file_are_handed_out_and_the_error_stays(groups: list[RowGroup]) -> None:
    os.unlink(groups[10].path)
    read: list[list[int]] = []
    with PlannedReader(whole(groups), columns=FIELDS, decode=to_ids, threads=4) as reader:
        for _ in range(2):
            with pytest.raises(DataError, match=rf"Row group 0 of {groups[10].path} cannot be read"):
                read.extend(reader)
    assert read == [list(ids) for ids in consecutive(SIZES[:10])]


def test_a_file_cut_short_while_it_is_open_does_not_kill_the_process(tmp_path: Path) -> None:
    code = """
        import os, sys, threading
        from sparkdl.errors import DataError
        from sparkdl.io.petastorm import PlannedReader
        from sparkdl.io.plan import Piece, RowGroup

        path, rows = sys.argv[1], int(sys.argv[2])
        pieces = [Piece(RowGroup(path, index, rows), 0, 1) for index in range(3)]
        with PlannedReader(pieces, columns=["number"], decode=lambda table, number: 0, ahead=1) as reader:
            next(reader)
            os.truncate(path, 100)
            try:
                list(reader)
            except DataError as error:
                print(error)
    """
    path, rows = tmp_path / "open.parquet", 200_000
    table = pa.table({"number": np.arange(3 * rows)})
    pq.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
    command = [sys.executable, "-c", textwrap.dedent(code), str(path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"of {path} cannot be read" in done.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_storage_that_does_not_answer_is_an_error_within_its_time(groups: list[RowGroup], threads: int) -> None:
    answers = threading.Event()

    def stuck(table: pa.Table, number: int) -> int:
        if number == 3:
            assert answers.wait(timeout=30)
        return number

    read: list[int] = []
    with PlannedReader(
        whole(groups), columns=FIELDS, decode=stuck, threads=threads, read_timeout=timedelta(seconds=0.5)
    ) as reader:
        where = f"Row group 3 of {groups[3].path}"
        with pytest.raises(DataError, match=rf"{where} did not arrive within 0\.5 seconds\. Is its storage reachable"):
            read.extend(reader)
        answers.set()
    assert read == [0, 1, 2]


# ---- errors and early ends -------------------------------------------------------------------------------------------
class Interrupt(BaseException):
    """Not an Exception, like KeyboardInterrupt and what extensions written in Rust raise."""


@pytest.mark.parametrize("error", [ValueError("odd row"), DataError("ragged"), Interrupt("now")], ids=repr)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.timeout(15)
def test_errors_of_decode_come_out_as_they_are(
    groups: list[RowGroup], error: BaseException, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda details: None)

    def failing(table: pa.Table, number: int) -> list[int]:
        ids = to_ids(table)
        if ids[0] >= 10:
            raise error
        return ids

    with (
        PlannedReader(whole(groups), columns=FIELDS, decode=failing, threads=threads) as reader,
        pytest.raises(type(error)) as raised,
    ):
        list(reader)
    assert raised.value is error


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("threads", [1, 8])
def test_leaving_early_stops_the_threads(groups: list[RowGroup], taken: int, threads: int) -> None:
    with PlannedReader(whole(groups), columns=FIELDS, decode=to_tensors, threads=threads, ahead=3) as reader:
        for _ in range(taken):
            next(reader)
        assert threading.active_count() > threads
        assert taken == 0 or open_files(Path(groups[0].path).parent)


def test_an_error_of_the_consumer_stops_the_threads(groups: list[RowGroup]) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        PlannedReader(whole(groups), columns=FIELDS, decode=to_tensors, threads=4) as reader,
    ):
        raise ZeroDivisionError(next(reader))


def test_what_was_read_outlives_the_reader_and_the_file(groups: list[RowGroup]) -> None:
    read = read_all(whole(groups[:10]), to_tensors, threads=2)
    os.unlink(groups[0].path)
    for found, expected in zip(read, consecutive(SIZES[:10]), strict=True):
        assert_rows(found["input_0"], found["label_0"], expected)
