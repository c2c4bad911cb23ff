"""Times the way from Parquet to shuffled batches of torch tensors: limits, other loaders and ours, on the same files.

* limits: ``decode`` (row groups to Arrow, nothing else), ``by_hand`` (one copy into a reused shuffle window, files
  mapped into memory), ``by_hand_read`` (the same with plain reads), ``gather`` (all rows in memory already);
* others: ``petastorm``, ``loader_0`` and ``loader_2`` (torch's DataLoader with 0 and 2 processes), ``mosaic``;
* ``ours`` keeps nothing between epochs, ``ours_spooled`` neither, but reads files as a rank reads those that it spooled
  itself: mapped; ``ours_kept_1`` and ``ours_kept_8`` keep the rows, in 1 and in 8 shards.

The limit of ``ours_spooled`` is ``by_hand``, that of ``ours`` is ``by_hand_read``: files of others are not mapped (see
docs/decisions/0009).

Every measurement runs in a fresh process. The script reports, whatever the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from reader_data import (
    DATA_SETS,
    MIXED_FLOATS,
    MIXED_IDS,
    WORD_COLUMNS,
    WORDS,
    Files,
    Group,
    Job,
    allocate,
    decode_image,
    find_job,
    open_images,
    our_columns,
    place,
    samples,
    ten_times,
    write_data,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

if TYPE_CHECKING:
    from sparkdl.config import CacheTier
    from sparkdl.io.batches import RankData

BATCH = 1024
WINDOW_BYTES = 64 << 20
BUFFER_ROWS = 100_000  # of the loaders that shuffle in a buffer of rows
MOSAIC_ROWS = 200_000  # as many as are converted to its format at most
EPOCHS = 4  # of the contenders that are fast enough for several
TIMEOUT = 600  # seconds, of one measurement

Epoch = Iterator[Tensor]
"""The labels of each batch; the rest of the batch was made beside them."""


# Limits.


def shuffled(groups: Sequence[Group]) -> list[Group]:
    return [groups[number] for number in torch.randperm(len(groups)).tolist()]


def decode(job: Job) -> Iterator[Epoch]:
    """Only reads the row groups and lets them go."""
    files = Files(job.data, mapped=True)

    def epoch() -> Epoch:
        def read(group: Group) -> Tensor:
            return torch.from_numpy(np.array(files.read(group)["label"]))

        with ThreadPoolExecutor(job.threads) as pool:
            yield from pool.map(read, shuffled(job.groups))

    for _ in range(EPOCHS):
        yield epoch()


def by_hand(job: Job, *, mapped: bool) -> Iterator[Epoch]:
    """Fills one window of rows in threads while batches are gathered out of the other.

    The two windows are allocated in the first epoch and used again ever after.
    """
    size = WINDOW_BYTES // job.row_bytes
    capacity = size + max(group.rows for group in job.groups)
    files = Files(job.data, mapped)
    memory: list[dict[str, Tensor]] = []

    def fill(window: dict[str, Tensor], start: int, group: Group) -> None:
        place(job.data, files.read(group), window, start)

    def epoch() -> Epoch:
        if not memory:
            memory.extend(allocate(job.data, capacity) for _ in range(2))
        windows = list(_windows(shuffled(job.groups), size))

        with ThreadPoolExecutor(job.threads) as pool:

            def submit(number: int) -> list[Any]:
                starts = np.cumsum([0] + [group.rows for group in windows[number]]).tolist()
                groups = zip(starts, windows[number], strict=False)
                return [pool.submit(fill, memory[number % 2], start, group) for start, group in groups]

            filling = [submit(number) for number in range(min(2, len(windows)))]
            for number, groups in enumerate(windows):
                for future in filling[number]:
                    future.result()
                window = memory[number % 2]
                for chosen in torch.randperm(sum(group.rows for group in groups)).split(BATCH):
                    yield {name: tensor.index_select(0, chosen) for name, tensor in window.items()}["label"]
                if number + 2 < len(windows):
                    filling.append(submit(number + 2))

    for _ in range(EPOCHS):
        yield epoch()


def _windows(groups: Iterable[Group], size: int) -> Iterator[list[Group]]:
    window: list[Group] = []
    for group in groups:
        window.append(group)
        if sum(one.rows for one in window) >= size:
            yield window
            window = []
    if window:
        yield window


def gather(job: Job) -> Iterator[Epoch]:
    """Batches of rows that lie in memory, all of them, in one tensor per field."""
    files = Files(job.data, mapped=True)
    whole, start = allocate(job.data, job.rows), 0
    for group in job.groups:
        place(job.data, files.read(group), whole, start)
        start += group.rows

    def epoch() -> Epoch:
        for chosen in torch.randperm(job.rows).split(BATCH):
            yield {name: tensor.index_select(0, chosen) for name, tensor in whole.items()}["label"]

    for _ in range(EPOCHS):
        yield epoch()


# Other loaders, for one epoch, of which the first seconds count.


def petastorm(job: Job) -> Iterator[Epoch]:
    """Petastorm's batch reader and its batched loader; what they cannot take as it is, through a TransformSpec."""
    import sparkdl.io  # noqa: F401, I001  (lets petastorm load)
    from petastorm import TransformSpec, make_batch_reader
    from petastorm.pytorch import BatchedDataLoader

    if job.name in ("dense", "sparse"):
        raise NotSupported("Petastorm drops struct columns, and so the ML Vectors")
    spec = None
    if job.name == "mixed":
        kinds = dict.fromkeys(MIXED_IDS, np.int64) | dict.fromkeys(MIXED_FLOATS, np.float32)
        edited = [(name, kind, (), False) for name, kind in kinds.items()]
        spec = TransformSpec(lambda frame: frame.fillna(0).astype(kinds), edit_fields=edited)
    elif job.name == "strings":
        numbers = {word: number for number, word in enumerate(WORDS)}

        def look_up(frame: Any) -> Any:
            return frame.assign(**{name: frame[name].map(numbers) for name in WORD_COLUMNS})

        spec = TransformSpec(look_up, edit_fields=[(name, np.int64, (), False) for name in WORD_COLUMNS])
    elif job.name == "images":

        def open_images(frame: Any) -> Any:
            return frame.assign(image=frame["image"].map(decode_image))

        spec = TransformSpec(open_images, edit_fields=[("image", np.uint8, (32, 32, 3), False)])

    def epoch() -> Epoch:
        urls = [f"file://{path}" for path in job.paths]
        with make_batch_reader(urls, workers_count=job.threads, transform_spec=spec) as reader:
            for batch in BatchedDataLoader(reader, BATCH, shuffling_queue_capacity=BUFFER_ROWS):
                yield batch["label"]

    yield epoch()


class BufferedRows(IterableDataset[dict[str, Tensor]]):
    """Batches out of a shuffled buffer of rows, filled from Arrow batches; each process reads files of its own."""

    def __init__(self, job: Job) -> None:
        self._data = job.data
        self._paths = job.paths

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        mine = self._paths[worker.id :: worker.num_workers] if worker is not None else self._paths
        parts: list[dict[str, Tensor]] = []
        for number in torch.randperm(len(mine)).tolist():
            file = pq.ParquetFile(mine[number], read_dictionary=list(self._data.read_dictionary) or None)
            for rows in file.iter_batches(8192, use_threads=False):
                part = allocate(self._data, rows.num_rows)
                place(self._data, pa.Table.from_batches([rows]), part)
                parts.append(part)
                if sum(len(part["label"]) for part in parts) >= BUFFER_ROWS:
                    yield from self._batches(parts)
                    parts = []
        if parts:
            yield from self._batches(parts)

    @staticmethod
    def _batches(parts: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for chosen in torch.randperm(len(rows["label"])).split(BATCH):
            yield {name: tensor[chosen] for name, tensor in rows.items()}


def loader(job: Job, *, processes: int) -> Iterator[Epoch]:
    """PyTorch's DataLoader over Arrow batches."""
    batches = DataLoader(BufferedRows(job), batch_size=None, num_workers=processes)
    yield (batch["label"] for batch in batches)


def mosaic(job: Job) -> Iterator[Epoch]:
    """MosaicML Streaming, on its own format: decoded rows, but text and images as they are in the Parquet files."""
    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError as error:
        raise NotSupported(f"mosaicml-streaming is not installed: {error}") from None

    encoded = {"strings": dict.fromkeys(WORD_COLUMNS, "str"), "images": {"image": "bytes"}}.get(job.name)
    folder = job.folder / "mosaic"
    if not (folder / "index.json").exists():  # is written last
        fields = {
            name: f"ndarray:{kind}:{','.join(map(str, shape))}" for name, (kind, shape) in job.data.layout.items()
        }
        columns = (encoded or fields) | {"label": "int"}
        with MDSWriter(out=str(folder), columns=columns, exist_ok=True) as writer:
            for sample in samples(job, MOSAIC_ROWS, decoded=encoded is None):
                writer.write(sample)
    numbers = {word: number for number, word in enumerate(WORDS)}

    class Rows(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            row = super().__getitem__(at)
            if job.name == "images":
                return row | {"image": decode_image(row["image"])}
            return row | {name: numbers[row[name]] for name in WORD_COLUMNS} if encoded else row

    def epoch() -> Epoch:
        rows = Rows(local=str(folder), shuffle=True, batch_size=BATCH)
        for batch in DataLoader(rows, BATCH, num_workers=job.threads):
            yield batch["label"]

    yield epoch()


# Ours.


def open_ours(job: Job, *, cache: CacheTier, shards: int, spooled: bool = False) -> RankData:
    """What one rank reads, all row groups in place: the seam between this benchmark and the library.

    With ``spooled`` the files are open ones without names, which stay open as long as the process.
    """
    from sparkdl.io.batches import RankData, Reading
    from sparkdl.io.cache import Cache, Free, plan_cache
    from sparkdl.io.decode import Decoder, layout_of
    from sparkdl.io.plan import RowGroup, ShardPlan, plan_pieces

    columns = our_columns(job.name)
    decoder = Decoder(columns, open_images if job.name == "images" else None, native=True)
    first = Files(job.data, mapped=False).read(job.groups[0])
    layout = layout_of(decoder(first.slice(0, 8)), columns)
    paths = {path: f"/dev/fd/{os.open(path, os.O_RDONLY)}" if spooled else path for path in job.paths}
    groups = [RowGroup(paths[group.path], group.index, group.rows) for group in job.groups]
    pieces = plan_pieces(groups, shards)
    rows = tuple(sum(piece.rows for piece in shard) for shard in pieces)
    names = [name for column in columns for name in (column.parts or (column.name,))]
    need = sum(rows) * job.row_bytes
    return RankData(
        plan=ShardPlan(rows, BATCH),
        pieces=dict(enumerate(pieces)),
        validation=(),
        decoder=decoder,
        layout=layout,
        reading=Reading(names, threads=job.threads, dictionaries=job.data.read_dictionary),
        window=WINDOW_BYTES // job.row_bytes,
        shuffle="window",
        seed=0,
        cache=Cache(plan_cache(cache, need, Free(None, 2 * need, None))),
    )


def ours(job: Job, *, cache: CacheTier, shards: int, spooled: bool = False) -> Iterator[Epoch]:
    """The library's reader."""
    data = open_ours(job, cache=cache, shards=shards, spooled=spooled)

    def epoch(number: int) -> Epoch:
        with data.open_epoch(number) as batches:
            for batch in batches:
                yield batch.labels[0]

    for number in range(EPOCHS):
        yield epoch(number)


# Measuring.


class NotSupported(Exception):
    """A contender cannot read a data set; says why."""


CONTENDERS: dict[str, Callable[[Job], Iterator[Epoch]]] = {
    "decode": decode,
    "by_hand": functools.partial(by_hand, mapped=True),
    "by_hand_read": functools.partial(by_hand, mapped=False),
    "gather": gather,
    "petastorm": petastorm,
    "loader_0": functools.partial(loader, processes=0),
    "loader_2": functools.partial(loader, processes=2),
    "mosaic": mosaic,
    "ours": functools.partial(ours, cache="none", shards=1),
    "ours_spooled": functools.partial(ours, cache="none", shards=1, spooled=True),
    "ours_kept_1": functools.partial(ours, cache="memory", shards=1),
    "ours_kept_8": functools.partial(ours, cache="memory", shards=8),
}
"""Each prepares itself, then yields its epochs, whose work begins when their first batch is asked for."""


def measure(contender: str, job: Job, seconds: float) -> dict[str, Any]:
    """Runs one contender in this process.

    Args:
        contender: Its name.
        job: What it reads.
        seconds: After so many an epoch is broken off.

    Returns:
        The rows and seconds of each epoch; or why there are none.

    Raises:
        ValueError: An epoch was not made of the rows of the data set.
    """
    # What Python, Arrow and Pillow load on their first use is no contender's fault.
    place(job.data, Files(job.data, mapped=False).read(job.groups[0]).slice(0, 8), allocate(job.data, 8))
    expected = min(job.rows, MOSAIC_ROWS) if contender == "mosaic" else job.rows
    epochs = []
    try:
        for epoch in CONTENDERS[contender](job):
            start, rows, total, whole = time.perf_counter(), 0, 0, True
            for labels in epoch:
                rows += len(labels)
                total += int(labels.sum())
                if time.perf_counter() - start > seconds:
                    whole = False
                    break
            epochs.append({"rows": rows, "seconds": time.perf_counter() - start})
            if whole and (rows, total) != (expected, expected * (expected - 1) // 2):
                raise ValueError(f"The {rows} rows of an epoch of {contender} are not those of the data set.")
            if not whole:
                break
    except NotSupported as reason:
        return {"skipped": str(reason)}
    return {"epochs": epochs}


def measure_memory(job: Job) -> dict[str, float]:
    """The peak of this process's memory over the epochs of ours, above what it had after its imports, in MiB."""
    import sparkdl.io.batches  # noqa: F401

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    for epoch in ours(job, cache="none", shards=1):
        for _ in epoch:
            pass
    return {"rows": job.rows, "peak_mib": status("VmHWM") - before, "bound_mib": memory_bound(job) / 2**20}


def memory_bound(job: Job) -> float:
    """What an epoch without a cache may take, in bytes: nothing in it grows with the data.

    Three windows (one is emptied while two are filled, as the reader runs ahead over the end of a window), each with
    the row group by which it may be too long; per thread a row group in Arrow and the pages that it comes from; and
    the batches that wait for their use.
    """
    group = max(group.rows for group in job.groups) * job.row_bytes
    return 3 * (WINDOW_BYTES + group) + job.threads * 2 * group + 10 * BATCH * job.row_bytes


# Running and reporting.


def run(python: str, mode: Sequence[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in a fresh process; what goes wrong there becomes a note."""
    script = [python, "-W", "ignore", __file__, *mode, "--data", str(folder)]
    script += ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done within {TIMEOUT} seconds"}
    if done.returncode:
        return {"skipped": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@dataclass(frozen=True)
class Result:
    """What the runs of one contender on one data set gave.

    Attributes:
        first: Median rows per second of the first epoch; None without any.
        later: Median rows per second of all later epochs; None without any.
        spread: Largest less smallest rate of the first epoch, over the median.
        note: Why there are none.
    """

    first: float | None
    later: float | None
    spread: float | None
    note: str = ""

    @classmethod
    def of(cls, contender: str, records: Sequence[dict[str, Any]]) -> Result:
        """What the records of `measure` come to."""
        rates = [[epoch["rows"] / epoch["seconds"] for epoch in record.get("epochs", ())] for record in records]
        first = [epochs[0] for epochs in rates if epochs and contender != "gather"]  # that one has no first epoch
        later = [rate for epochs in rates for rate in epochs[1:]]
        note = next((record["skipped"] for record in records if "skipped" in record), "")
        middle = statistics.median(first) if first else None
        spread = (max(first) - min(first)) / middle if middle else None
        return cls(middle, statistics.median(later) if later else None, spread, note)


Results = dict[str, dict[str, Result]]


def ratios(results: Results) -> dict[str, dict[str, float]]:
    """Returns, by data set, what our rates are to those of the others, as far as these were run.

    Beside ours to Petastorm stands what the hand-written loops reach of it, which are the limit. Eight times Petastorm
    on tabular was hoped for, and is more than the mapped loop reaches: 7.5 times.
    """
    found: dict[str, dict[str, float]] = {}
    nothing = Result(None, None, None)
    pairs = [("ours", other, "first") for other in CONTENDERS if not other.startswith("ours") and other != "gather"]
    pairs += [
        ("ours_spooled", "by_hand", "first"),
        ("by_hand", "petastorm", "first"),
        ("by_hand_read", "petastorm", "first"),
    ]
    pairs += [("ours", "by_hand", "later"), ("ours_kept_1", "gather", "later"), ("ours_kept_8", "gather", "later")]
    for name, by_contender in results.items():
        found[name] = {}
        for mine, other, epoch in pairs:
            rate = getattr(by_contender.get(mine, nothing), epoch)
            against = getattr(by_contender.get(other, nothing), epoch)
            if rate and against:
                found[name][f"{mine} / {other}, {epoch}"] = rate / against
    return found


def tables(results: Results, found: dict[str, dict[str, float]]) -> str:
    """Returns the rates and the ratios as Markdown tables."""
    lines = [
        "| data | contender | first rows/s | spread | later rows/s | note |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name, by_contender in results.items():
        for contender, result in by_contender.items():
            first = f"{result.first:,.0f} | {result.spread:.0%}" if result.first else " | "
            later = f"{result.later:,.0f}" if result.later else ""
            lines.append(f"| {name} | {contender} | {first} | {later} | {result.note} |")
    kinds = list(dict.fromkeys(kind for by_kind in found.values() for kind in by_kind))
    lines += ["", f"| ratio | {' | '.join(found)} |", "| --- |" + " ---: |" * len(found)]
    for kind in kinds:
        values = [f"{by_kind[kind]:.2f}" if kind in by_kind else "" for by_kind in found.values()]
        lines.append(f"| {kind} | {' | '.join(values)} |")
    return "\n".join(lines)


def memory_table(records: Mapping[str, dict[str, Any]]) -> str:
    """Returns what memory ours took as a Markdown table."""
    lines = ["| memory of ours | rows | peak MiB | bound MiB |", "| --- | ---: | ---: | ---: |"]
    for size, record in records.items():
        if "skipped" in record:
            lines.append(f"| {size}: {record['skipped']} | | | |")
        else:
            lines.append(f"| {size} | {record['rows']:,} | {record['peak_mib']:.0f} | {record['bound_mib']:.0f} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-sets", default=",".join(DATA_SETS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--data", type=Path, help="folder for the data, which is kept and used again")
    parser.add_argument("--scale", type=float, default=1.0, help="times the rows of each data set")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="reader threads, or reader processes")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which an epoch is broken off")
    parser.add_argument(
        "--memory", action="store_true", help="also measure the memory of ours, at 1 and 10 times tabular"
    )
    parser.add_argument("--mosaic-python", default=sys.executable, help="interpreter that has mosaicml-streaming")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "DATA_SET"), help="once, in this process")
    parser.add_argument("--measure-memory", action="store_true", help="once, in this process, on tabular")
    arguments = parser.parse_args()
    for chosen, known in ((arguments.data_sets, DATA_SETS), (arguments.contenders, CONTENDERS)):
        if unknown := set(chosen.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return arguments


def main() -> None:
    """Measures the chosen contenders in turn, several times over, prints and writes what they took."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.measure or arguments.measure_memory:
        name = arguments.measure[1] if arguments.measure else "tabular"
        job = find_job(name, arguments.data, arguments.threads)
        record = measure(arguments.measure[0], job, arguments.seconds) if arguments.measure else measure_memory(job)
        print(json.dumps(record))
        return

    from bench_fit import describe_machine

    packages = ("torch", "pyarrow", "petastorm", "numpy", "pandas", "pillow")
    setting: dict[str, dict[str, Any]] = {
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "config": {name: getattr(arguments, name) for name in ("scale", "repeat", "threads", "seconds")}
        | {"batch": BATCH, "window_bytes": WINDOW_BYTES, "buffer_rows": BUFFER_ROWS},
    }
    chosen = arguments.contenders.split(",")
    records: dict[str, dict[str, list[dict[str, Any]]]] = {}
    memory: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        parent = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_reader_")))
        for name in arguments.data_sets.split(","):
            folder = write_data(name, parent, arguments.scale)
            records[name] = {contender: [] for contender in chosen}
            for _ in range(arguments.repeat):
                for contender in chosen:
                    python = arguments.mosaic_python if contender == "mosaic" else sys.executable
                    record = run(python, ["--measure", contender, name], folder, arguments)
                    records[name][contender].append(record)
                    print(name, contender, record, file=sys.stderr)
        if arguments.memory:
            folder = write_data("tabular", parent, arguments.scale)
            memory["1x"] = run(sys.executable, ["--measure-memory"], folder, arguments)
            memory["10x"] = run(sys.executable, ["--measure-memory"], ten_times(folder), arguments)
    results = {
        name: {contender: Result.of(contender, found) for contender, found in by_contender.items()}
        for name, by_contender in records.items()
    }
    found = ratios(results)
    report = "\n\n".join([tables(results, found)] + ([memory_table(memory)] if memory else []))
    print(report)

    command = shlex.join(["python", "benchmarks/bench_reader.py", *sys.argv[1:]])
    summary = {name: {key: asdict(one) for key, one in by_key.items()} for name, by_key in results.items()}
    record = {"command": command, **setting, "results": summary, "ratios": found, "memory": memory, "runs": records}
    lines = [f"`{command}`", ""]
    for title, values in setting.items():
        lines.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"reader_{datetime.date.today().isoformat()}"
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    target.with_suffix(".md").write_text("\n".join([*lines, "", report, ""]))
    print(f"\nWrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
