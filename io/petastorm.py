"""Reading through Petastorm: its `Reader`, its ventilator and its thread pool, on a plan and without pandas.

Petastorm's own reader lists the files, deals row groups to shards by index and hands results out as they complete. This
one is told what to read and in which order, and keeps that order: results carry their place in the plan and wait in a
bounded buffer until their turn, so that 1 and 8 threads give the same sequence, and a result that never comes is an
error with a name instead of a shorter epoch.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from petastorm.reader import Reader
from petastorm.workers_pool import EmptyResultError, VentilatedItemProcessedMessage, thread_pool
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator
from petastorm.workers_pool.worker_base import WorkerBase

from sparkdl.errors import DataError
from sparkdl.io.encryption import decryption_of
from sparkdl.io.plan import Piece
from sparkdl.storage import FileSystems, reason

__all__ = ["PlannedReader", "select_piece"]

thread_pool.random = random.Random(0)  # it draws a seed for every pool; not from the generator of the user's module

Select = Callable[[pa.Table, Piece], pa.Table]
Decode = Callable[[pa.Table, int], Any]
_VENTILATION_SECONDS = 0.001
_POLL_SECONDS = 0.1
_JOIN_SECONDS = 5.0
_OPEN_FILES = 16  # per thread
_BUFFER_BYTES = 64 << 10  # of a column, while it is decoded


def select_piece(table: pa.Table, piece: Piece) -> pa.Table:
    """The rows of a piece out of those of its row group.

    Raises:
        ValueError: The row group has not as many rows as were planned; one of Arrow's, as of a file that is broken.
    """
    if table.num_rows != piece.row_group.rows:
        raise pa.ArrowInvalid(f"it has {table.num_rows} rows, {piece.row_group.rows} were planned")
    return table.slice(piece.start, piece.rows)


class PlannedReader(Reader):
    """One pass over the pieces of a plan, in the order of the plan.

    Iterating yields what ``decode`` made of each piece. Use as a context manager: leaving it stops the threads and
    closes the files.

    Args:
        pieces: What to read, in order.
        columns: Names of the columns to read.
        decode: Turns the Arrow table of a piece and its place in ``pieces`` into what is handed out; runs in the reader
            threads.
        select: Takes the rows of a piece out of the table of its row group; runs in the reader threads.
        recall: Asked before a piece is read, in the reader threads: True where its rows are at hand already, so that
            nothing is read and None is handed out.
        threads: Reader threads.
        ahead: Pieces that may be in the works or wait for their turn at any time.
        read_timeout: How long to wait for a piece.
        storage_options: For the file system of the pieces' paths.
        dictionaries: Columns to read as dictionaries: text that repeats itself.

    Raises:
        DataError: While iterating, where a file cannot be read or a piece is missing; names the file and row group.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        columns: Sequence[str],
        decode: Decode,
        select: Select = select_piece,
        recall: Callable[[int], bool] | None = None,
        threads: int = 1,
        ahead: int = 4,
        read_timeout: timedelta = timedelta(minutes=10),
        storage_options: Mapping[str, Any] | None = None,
        dictionaries: Sequence[str] = (),
    ) -> None:
        # Petastorm's constructor lists files and loads footers to build its own plan; ours is complete. What follows
        # sets the attributes that Reader's iteration, stop() and join() work on.
        self.num_epochs = 1
        self.is_batched_reader = True
        self.ngram = None
        self.schema = None
        self.last_row_consumed = False
        self.stopped = False
        self._pieces = tuple(pieces)
        self._files = _OpenFiles(storage_options, dictionaries)
        self._timeout = read_timeout
        self._waiting: dict[int, Any] = {}
        self._delivered = 0
        self._results_queue_reader = _InOrder(self)
        self._workers_pool = _TimedPool(threads, results_queue_size=0)  # bounded by the ventilator
        self._workers_pool.timeout = read_timeout
        items = [{"number": number, "piece": piece} for number, piece in enumerate(self._pieces)]
        self.ventilator = _InOrderVentilator(
            self._workers_pool.ventilate,
            items,
            max_ventilation_queue_size=ahead,
            ventilation_interval=_VENTILATION_SECONDS,
        )
        arguments = (self._files, tuple(columns), select, decode, recall)
        self._workers_pool.start(_PieceWorker, arguments, ventilator=self.ventilator)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if not self._workers_pool.alive:
            self._files.close()

    def next_in_order(self, pool: ThreadPool) -> Any:
        """The next piece of the plan.

        Raises:
            StopIteration: All pieces were handed out.
            DataError: A file cannot be read, or the pool ended with this piece missing.
        """
        number = self._delivered
        if number == len(self._pieces):
            raise StopIteration
        while number not in self._waiting:
            group = self._pieces[number].row_group
            try:
                done, result = pool.get_results()
            except queue.Empty:
                raise DataError(
                    f"Row group {group.index} of {group.path} did not arrive within {self._timeout.total_seconds():g} "
                    "seconds. Is its storage reachable from this executor? Check the network and the storage options, "
                    "then fit again."
                ) from None
            except EmptyResultError:
                raise DataError(
                    f"The reader ended without row group {group.index} of {group.path} ({len(self._waiting)} later "
                    "ones had arrived). This is a defect of the reader; the epoch was not completed."
                ) from None
            self._waiting[done] = result
        result = self._waiting[number]
        if isinstance(result, BaseException):
            raise result
        del self._waiting[number]
        self._delivered += 1
        self.ventilator.delivered()
        return result


class _TimedPool(ThreadPool):
    """Does not wait for a result for ever, nor at the end for a thread that waits for storage."""

    timeout: timedelta

    def get_results(self) -> Any:
        """The next result.

        Raises:
            EmptyResultError: There is no more work, and no result.
            queue.Empty: None came within ``timeout``.
        """
        waited_until = time.monotonic() + self.timeout.total_seconds()
        while True:
            # In this order: what is queued between the two looks must not be lost.
            over = self._ventilator.completed() and self._ventilated_items == self._ventilated_items_processed
            try:
                result = self._results_queue.get(block=not over, timeout=_POLL_SECONDS)
            except queue.Empty:
                if over:
                    raise EmptyResultError from None
                if time.monotonic() > waited_until:
                    raise
                continue
            if not isinstance(result, VentilatedItemProcessedMessage):
                return result
            self._ventilated_items_processed += 1
            self._ventilator.processed_item()

    @property
    def alive(self) -> bool:
        """True while a thread runs."""
        return any(worker.is_alive() for worker in self._workers)

    def join(self) -> None:
        """Wait for the threads; one that hangs in a read is a daemon, and ends with the read or with the process."""
        patience = time.monotonic() + _JOIN_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, patience - time.monotonic()))


class _InOrder:
    """Petastorm's protocol between `Reader` and the pool's results."""

    batched_output = True

    def __init__(self, reader: PlannedReader) -> None:
        self._reader = reader

    def read_next(self, workers_pool: ThreadPool, schema: Any, ngram: Any) -> Any:
        return self._reader.next_in_order(workers_pool)


class _InOrderVentilator(ConcurrentVentilator):
    """Counts a piece as processed when it is handed out, not when a thread is done with it.

    Petastorm's count would let the buffer of results that wait for their turn grow without bound behind a slow piece.
    """

    _processed = 0

    def processed_item(self) -> None:
        """Called by the pool in the reader's own thread, after it took out what the piece gave; see `delivered`.

        Raises:
            EmptyResultError: All pieces that there is room for are done, and still the reader waits for one of them.
        """
        self._processed += 1
        if self._processed - self._processed_items_count >= self._max_ventilation_queue_size:
            raise EmptyResultError

    def delivered(self) -> None:
        """Make room for one more piece."""
        super().processed_item()


class _PieceWorker(WorkerBase):
    """Reads a piece and publishes ``(number, decoded)``, or ``(number, error)``."""

    def process(self, number: int, piece: Piece) -> None:
        files, columns, select, decode, recall = self.args
        group = piece.row_group
        result: Any = None
        try:
            if recall is None or not recall(number):
                table = files.get(group.path).read_row_group(group.index, columns=list(columns), use_threads=False)
                result = decode(select(table, piece), number)
        except (OSError, pa.ArrowException, KeyError, IndexError) as error:
            result = DataError(
                f"Row group {group.index} of {group.path} cannot be read: {reason(error)}. The file was changed, cut "
                "short or removed since the fit began; fit again."
            )
        except BaseException as error:  # a thread that dies silently would leave the reader waiting
            result = error
        self.publish_func((number, result))


class _OpenFiles:
    """Parquet files that the reader threads hold open: of each thread, the few that it used last.

    The threads share the file systems, and with them the connections to the stores.
    """

    def __init__(self, storage_options: Mapping[str, Any] | None, dictionaries: Sequence[str]) -> None:
        self._systems = FileSystems(storage_options)
        self._dictionaries = list(dictionaries) or None
        self._threads: dict[int, dict[str, pq.ParquetFile]] = {}

    def get(self, path: str) -> pq.ParquetFile:
        mine = self._threads.setdefault(threading.get_ident(), {})
        found = mine.pop(path, None)
        if found is None:
            if len(mine) >= _OPEN_FILES:
                mine.pop(next(iter(mine))).close(force=True)
            file_system, inner = self._systems.open(path)
            # Only a spool file, which nobody else can reach, is mapped: reading behind the end of a file that was cut
            # short while it is mapped ends the process with SIGBUS.
            local, mapped = file_system.type_name == "local", inner.startswith("/dev/fd/")
            source = inner if local else file_system.open_input_file(inner)
            found = pq.ParquetFile(
                source,
                memory_map=mapped,
                pre_buffer=not local,
                # Bytes that stay in the processor's cache until they are decoded; else a whole row group lies in memory
                # twice, packed and unpacked.
                buffer_size=_BUFFER_BYTES if local and not mapped else 0,
                read_dictionary=self._dictionaries,
                coerce_int96_timestamp_unit="us",  # in nanoseconds, years before 1677 overflow
                decryption_properties=decryption_of(path),
            )
        mine[path] = found
        return found

    def close(self) -> None:
        """Close all; the threads have ended."""
        for files in self._threads.values():
            for file in files.values():
                file.close(force=True)
        self._threads.clear()
