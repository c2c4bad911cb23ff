"""From Arrow batches to a rank's own Parquet: every row once, nothing left on disk, and file systems by URL."""

import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io import stage, writer
from sparkdl.io.deal import plan_cuts
from sparkdl.io.plan import Piece, RowGroup
from sparkdl.io.schema import decode
from sparkdl.io.stage import Facts, Spool, StagedDataset, open_spool
from sparkdl.io.writer import ROW_GROUP_BYTES, RowGroupFiles
from sparkdl.storage import open_file_system
from tests.unit.staged import COLUMNS, assert_rows, features_of, read_group, spark_batch

pytestmark = pytest.mark.timeout(60)

WITH_VALIDATION = Columns(COLUMNS.inputs, COLUMNS.labels, validation=Column("held", "validation", "scalar", "bool"))
CLASSES = Columns(
    COLUMNS.inputs,
    (Column("clicked", "label_0", "scalar", "int64", flat=True, validity="class"),),
    Column("importance", "weight", "scalar", "float32", flat=True, validity="weight"),
)


def dealt(ids: Iterable[int], num_shards: int, held: Iterable[bool] | None = None) -> pa.RecordBatch:
    """Rows whose shard is their id modulo the number of shards."""
    rows = list(ids)
    others = {} if held is None else {"validation": pa.array(list(held), pa.bool_())}
    return spark_batch(rows, shard=pa.array([row % num_shards for row in rows], pa.int32()), **others)


def ids_in(groups: Sequence[RowGroup], columns: Columns = COLUMNS) -> list[int]:
    """The rows of row groups, checked."""
    ids: list[int] = []
    for group in groups:
        table = read_group(group)
        assert table.num_rows == group.rows
        found = decode(table, columns)
        assert_rows(found["input_0"], found["label_0"], found["label_0"].tolist())
        ids += found["label_0"].tolist()
    return ids


def files_in(folder: Path) -> list[str]:
    """Files of a folder that this process holds open, those without a name included."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(folder))]


@pytest.fixture(autouse=True)
def local_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The disk that Spark gave to the executor; nothing may be left on it."""
    directory = tmp_path / "local"
    directory.mkdir()
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(directory))
    yield directory
    assert os.listdir(directory) == []
    assert files_in(directory) == []


# ---- the spool: which rows, where ------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [(0,), (1,), (0, 1), (1, 3, 5)])
def test_each_shard_holds_its_rows_once_and_in_order(shards: tuple[int, ...]) -> None:
    count = max(shards) + 1
    mine = [[row for row in range(low, low + 40) if row % count in shards] for low in range(0, 200, 40)]
    batches = (dealt(rows, count) for rows in mine)
    with open_spool(batches, COLUMNS, shards) as spool:
        assert list(spool.shards) == list(shards)
        assert spool.validation == ()
        for shard in shards:
            assert ids_in(spool.shards[shard]) == list(range(shard, 200, count))


def test_validation_rows_are_kept_apart_from_every_shard() -> None:
    batches = (dealt(range(low, low + 30), 2, [row % 5 == 0 for row in range(low, low + 30)]) for low in (0, 30, 60))
    with open_spool(batches, WITH_VALIDATION, (0, 1)) as spool:
        assert ids_in(spool.validation) == list(range(0, 90, 5))
        for shard in (0, 1):
            assert ids_in(spool.shards[shard]) == [row for row in range(90) if row % 2 == shard and row % 5]


@pytest.mark.parametrize("held", [True, False])
def test_all_rows_or_none_may_be_for_validation(held: bool) -> None:
    with open_spool(iter([dealt(range(10), 1, [held] * 10)]), WITH_VALIDATION, (0,)) as spool:
        assert ids_in(spool.validation) == (list(range(10)) if held else [])
        assert ids_in(spool.shards[0]) == ([] if held else list(range(10)))


@pytest.mark.parametrize("batches", [[], [dealt([], 2)], [dealt([], 2), dealt([], 2)]])
def test_a_rank_without_rows_has_empty_shards(batches: list[pa.RecordBatch]) -> None:
    with open_spool(iter(batches), COLUMNS, (0, 1)) as spool:
        assert spool == Spool({0: (), 1: ()}, (), Facts())


def test_rows_that_have_nulls_are_left_out_and_counted() -> None:
    columns = replace(WITH_VALIDATION, inputs=(replace(COLUMNS.inputs[0], nulls="drop"),))
    batches = []
    for low, nulls in ((0, {1, 4, 5}), (20, set(range(20, 40))), (40, set())):
        batch = dealt(range(low, low + 20), 2, [row % 5 == 0 for row in range(low, low + 20)])
        cells = [None if row in nulls else cell for row, cell in enumerate(batch.column("input_0").to_pylist(), low)]
        batches.append(batch.set_column(0, "input_0", pa.array(cells, pa.list_(pa.float32()))))
    kept = [row for row in (*range(20), *range(40, 60)) if row not in (1, 4, 5)]
    with open_spool(iter(batches), columns, (0, 1)) as spool:
        assert spool.facts.dropped == 23
        assert ids_in(spool.validation) == [row for row in kept if row % 5 == 0]
        for shard in (0, 1):
            assert ids_in(spool.shards[shard]) == [row for row in kept if row % 2 == shard and row % 5]
    with open_spool(iter(batches[1:2]), columns, (0, 1)) as spool:
        assert spool == Spool({0: (), 1: ()}, (), Facts(dropped=20))


def test_raw_columns_are_spooled_as_they_are() -> None:
    columns = Columns((Column("image", "input_0", "raw", ""),), COLUMNS.labels)
    cells = [bytes([row % 251]) * (1000 + row % 7) for row in range(700)]
    batch = pa.RecordBatch.from_pydict({"input_0": cells, "label_0": range(700), "shard": [0] * 700})
    with open_spool(iter([batch.slice(0, 300), batch.slice(300)]), columns, (0,)) as spool:
        tables = [read_group(group) for group in spool.shards[0]]
        assert [cell for table in tables for cell in table["input_0"].to_pylist()] == cells


def test_ids_above_two_to_the_53_are_spooled_exactly() -> None:
    ids = range(2**53 + 1, 2**53 + 8)
    with open_spool(iter([dealt(ids, 1)]), COLUMNS, (0,)) as spool:
        assert ids_in(spool.shards[0]) == list(ids)


def test_row_groups_have_about_the_size_that_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes, limit = 3 * 4 + 8, 1000
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", limit)
    with open_spool((dealt(range(low, low + 10), 1) for low in range(0, 500, 10)), COLUMNS, (0,)) as spool:
        rows = [group.rows for group in spool.shards[0]]
        assert ids_in(spool.shards[0]) == list(range(500))
        assert [group.index for group in spool.shards[0]] == list(range(len(rows)))
    assert sum(rows) == 500
    assert all(limit <= count * row_bytes < limit + 10 * row_bytes for count in rows[:-1])
    assert 0 < rows[-1] * row_bytes < limit + 10 * row_bytes


def test_a_batch_larger_than_a_row_group_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, row_bytes = 1000, 3 * 4 + 8
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", limit)
    monkeypatch.setattr(stage, "ROW_GROUP_BYTES", limit)
    with open_spool(iter([dealt(range(2000), 2)]), COLUMNS, (0, 1)) as spool:
        for shard in (0, 1):
            assert ids_in(spool.shards[shard]) == list(range(shard, 2000, 2))
            assert all(limit <= group.rows * row_bytes < 2 * limit for group in spool.shards[shard][:-1])


def test_row_groups_of_large_rows_and_a_table_of_odd_rows_stay_small() -> None:
    cells = [b"x" * size for size in [10] * 5000 + [200_000] * 300 + [30 << 20] + [10] * 5000]
    with memory_files("memory://large") as files:
        files.write("part", pa.table({"a": cells}))
        groups = files.close()["part"]
    file_system, path = open_file_system("memory://large/part.parquet")
    with file_system.open_input_file(path) as source:
        metadata = pq.ParquetFile(source).metadata
        sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    file_system.delete_file(path)
    assert sum(group.rows for group in groups) == len(cells)
    small, largest = sorted(sizes)[:-1], max(sizes)
    assert small[-1] < 2 * ROW_GROUP_BYTES < largest < (30 << 20) + ROW_GROUP_BYTES


def sparse_batch(rows: int, width: int) -> pa.RecordBatch:
    """ML vectors with one value each, as Spark sends them."""
    vector = {"type": 0, "size": width, "indices": [width - 1], "values": [1.0]}
    kind = pa.struct(
        [
            ("type", pa.int8()),
            ("size", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
    return pa.RecordBatch.from_pydict(
        {"input_0": pa.array([vector] * rows, kind), "label_0": pa.array(range(rows)), "shard": pa.array([0] * rows)}
    )


def test_sparse_vectors_are_never_dense_all_at_once() -> None:
    """10,000 rows of 20,000 values are 2 MB in Spark's batch and 800 MB in staged form."""
    columns = Columns((Column("vector", "input_0", "vector", "float32"),), COLUMNS.labels)
    encoder = stage._Encoder(columns)
    rows = 0
    for part, table in encoder.encode(iter([sparse_batch(10_000, 20_000)])):
        assert part.num_rows == table.num_rows
        assert table.nbytes <= ROW_GROUP_BYTES
        rows += table.num_rows
    assert rows == 10_000
    assert encoder.facts.widths["input_0"] == 20_000


# ---- contiguous shards -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("rows", [{}, {5: 1}, {0: 10, 3: 1, 4: 200}, {2: 7, 1: 7}, {9: 2**32, 4: 2**32 - 1}])
def test_consecutive_rows_are_cut_into_runs_whose_sizes_differ_by_one(rows: dict[int, int], num_shards: int) -> None:
    before, total = {}, 0
    for partition in sorted(rows):
        before[partition] = total
        total += rows[partition]
    cuts = plan_cuts(rows, num_shards)
    assert all(0 <= position < rows[partition] for partition, position in cuts)
    if total:
        places = [0, *(before[partition] + position for partition, position in cuts), total]
        runs = [high - low for low, high in itertools.pairwise(places)]
        assert len(runs) == num_shards
        assert max(runs) - min(runs) <= 1
    else:
        assert cuts == []


# ---- the spool: nothing is left --------------------------------------------------------------------------------------
def test_the_files_have_no_names_and_vanish_with_the_block(local_dir: Path) -> None:
    with open_spool(iter([dealt(range(100), 2)]), COLUMNS, (0, 1)) as spool:
        assert os.listdir(local_dir) == []
        assert len(files_in(local_dir)) == 2
        assert all(name.endswith("(deleted)") for name in files_in(local_dir))
        paths = [group.path for groups in spool.shards.values() for group in groups]
    assert files_in(local_dir) == []
    assert not any(os.path.exists(path) and os.path.realpath(path).startswith(str(local_dir)) for path in paths)


def test_an_error_in_the_block_closes_the_files(local_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_spool(iter([dealt(range(9), 1)]), COLUMNS, (0,)) as spool:
        raise ZeroDivisionError(spool)
    assert files_in(local_dir) == []


def test_an_error_of_spark_in_the_midst_of_the_rows_closes_the_files(local_dir: Path) -> None:
    def interrupted() -> Iterator[pa.RecordBatch]:
        yield dealt(range(9), 1)
        raise OSError("shuffle block lost")

    with pytest.raises(OSError, match="shuffle block lost"), open_spool(interrupted(), COLUMNS, (0,)):
        pass
    assert files_in(local_dir) == []


def test_of_several_local_disks_the_one_with_most_space_is_used(
    local_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.disk_usage("/proc").free >= shutil.disk_usage(local_dir).free:
        pytest.skip("the disk of the tests is full")
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"/proc,{local_dir},{tmp_path / 'missing'}")
    with open_spool(iter([dealt(range(9), 1)]), COLUMNS, (0,)):
        assert len(files_in(local_dir)) == 1


@pytest.mark.parametrize("setting", [None, "", "/no/such/disk"])
def test_without_a_local_disk_of_spark_the_default_directory_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None
) -> None:
    default = tmp_path / "default"
    default.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(default))
    monkeypatch.delenv("SPARK_LOCAL_DIRS")
    if setting is not None:
        monkeypatch.setenv("SPARK_LOCAL_DIRS", setting)
    with open_spool(iter([dealt(range(9), 1)]), COLUMNS, (0,)) as spool:
        assert len(files_in(default)) == 1
        assert ids_in(spool.shards[0]) == list(range(9))
    assert (os.listdir(default), files_in(default)) == ([], [])


# ---- a disk that is full ---------------------------------------------------------------------------------------------
SPOOL_UNTIL_FULL = """
import json, os, resource, signal, sys
import tests.unit.staged as staged
from sparkdl.errors import DataError
from sparkdl.io.stage import open_spool
from tests.unit.test_stage import dealt, files_in

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python does so by itself; a write beyond the limit is then an error
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
local = os.environ["SPARK_LOCAL_DIRS"]
batch = dealt(range(100_000), 1)
try:
    with open_spool((batch for _ in range(20)), staged.COLUMNS, (0,)):
        message = "spooled"
except DataError as error:
    message = str(error)
print(json.dumps([message, files_in(local), os.listdir(local)]))
"""


@pytest.mark.parametrize(("limit", "written"), [(20 << 20, r"20\.0"), (1 << 20, r"0\.0")])
def test_a_disk_that_fills_is_one_sentence_and_closes_the_files(local_dir: Path, limit: int, written: str) -> None:
    """A limit on the size of files stands for the disk: the same call fails in the same way."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", SPOOL_UNTIL_FULL, str(limit)],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    message, still_open, left = json.loads(found.stdout)
    assert re.fullmatch(
        rf"Spooling rows to {local_dir} failed after {written} MB: .*File too large.* Free space there, give the "
        r"executors a larger disk \(SPARK_LOCAL_DIRS\), or set stagingDir to storage that all executors share\.",
        message,
    )
    assert (still_open, left) == ([], [])
    assert found.stderr == ""


@pytest.mark.parametrize("buffered", [False, True], ids=["at the first write", "when the file is closed"])
def test_a_file_that_cannot_be_finished_is_an_error_too(buffered: bool) -> None:
    def create(name: str) -> tuple[pa.NativeFile, str]:
        return (pa.PythonFile(Path(name).open("wb", 1 << 20)) if buffered else pa.OSFile(name, "wb")), name

    with RowGroupFiles(create, action="Staging rows", place="s3://here", remedy="Make room.") as files:
        files.write("/dev/full", pa.table({"a": [1, 2]}))
        with pytest.raises(
            DataError, match=r"^Staging rows to s3://here failed after 0\.0 MB: .*No space left.* Make room\.$"
        ):
            files.close()
    del files
    gc.collect()
    assert files_in(Path("/dev/full")) == []


# ---- facts -----------------------------------------------------------------------------------------------------------
def class_batch(labels: list[float], weights: list[float] | None = None) -> pa.RecordBatch:
    """Rows with class labels as Spark sends them, as doubles."""
    features = pa.array(features_of(np.arange(len(labels))).tolist(), pa.list_(pa.float32()))
    columns = {"input_0": features, "label_0": pa.array(labels), "weight": pa.array(weights or [1.0] * len(labels))}
    return pa.RecordBatch.from_pydict({**columns, "shard": pa.array([0] * len(labels), pa.int32())})


def test_widths_and_the_range_of_labels_are_learnt_over_all_batches() -> None:
    batches = [class_batch([3.0, 5.0]), class_batch([]), class_batch([4.0, 1.0, 2.0])]
    with open_spool(iter(batches), CLASSES, (0,)) as spool:
        facts = spool.facts
    assert (facts.widths, facts.labels) == ({"input_0": 3, "label_0": 1, "weight": 1}, (1, 5))
    assert json.loads(facts.row)["clicked"] == 3.0, "a row to show, should another rank's rows not fit"


def test_facts_know_no_label_range_where_labels_are_not_classes() -> None:
    with open_spool(iter([dealt(range(5), 1)]), COLUMNS, (0,)) as spool:
        assert (spool.facts.widths, spool.facts.labels) == ({"input_0": 3, "label_0": 1}, None)


def test_facts_merge_in_any_order_and_with_nothing() -> None:
    parts = [Facts(), Facts({"input_0": 3}, (2, 4)), Facts({"label_0": 1}, None), Facts({"input_0": 3}, (0, 3))]
    merged = Facts({"input_0": 3, "label_0": 1}, (0, 4))
    for order in (parts, parts[::-1], parts[2:] + parts[:2]):
        found = Facts()
        for part in order:
            found = found.merge(part, COLUMNS)
        assert found == merged


def test_counts_of_rows_add_up() -> None:
    parts = [Facts(dropped=2), Facts({"input_0": 3}), Facts(dropped=5)]
    merged = Facts()
    for part in parts:
        merged = merged.merge(part, COLUMNS)
    assert merged == Facts({"input_0": 3}, dropped=7)


def test_facts_of_another_release_are_understood() -> None:
    assert Facts.of_json({"widths": {"input_0": 3}, "colour": "blue"}) == Facts({"input_0": 3})


@pytest.mark.parametrize("facts", [Facts(), Facts({"input_0": 3}, (2, 4), '{"input_0": [1, 2, 3]}', 3)])
def test_facts_travel_as_json(facts: Facts) -> None:
    assert Facts.of_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_facts_of_ranks_that_differ_in_width_name_the_column_and_a_row_of_each() -> None:
    mine, theirs = Facts({"input_0": 3}, None, "[1, 2, 3]"), Facts({"input_0": 4}, None, "[5, 6, 7, 8]")
    message = (
        "'features' has 3 values in some rows, such as [1, 2, 3], and 4 in others, such as [5, 6, 7, 8]. "
        "Every row needs the same number: pad or cut the column before fit."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        mine.merge(theirs, COLUMNS)


def ragged(width: int) -> pa.RecordBatch:
    values = pa.array([[1.0] * width] * 2, pa.list_(pa.float32()))
    return pa.RecordBatch.from_pydict({"input_0": values, "label_0": pa.array([1, 2]), "shard": pa.array([0, 0])})


def test_rows_that_grow_from_one_batch_to_the_next_are_refused(local_dir: Path) -> None:
    batches = iter([ragged(3), ragged(2)])
    with (
        pytest.raises(DataError, match=r"'features' has 3 values in earlier rows, but 2 in this one: .*pad or cut"),
        open_spool(batches, COLUMNS, (0,)),
    ):
        pass
    assert files_in(local_dir) == []


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (class_batch([0.0, 1.5]), r"'clicked' must hold class numbers.* but is 1\.5"),
        (class_batch([0.0, 1.0], [1.0, -2.0]), "'importance' is negative"),
        (class_batch([0.0, float("nan")]), "'clicked' is NaN or infinite in 1 of 2 rows"),
    ],
)
def test_values_that_cannot_be_trained_on_are_refused_while_spooling(batch: pa.RecordBatch, message: str) -> None:
    with pytest.raises(DataError, match=message), open_spool(iter([batch]), CLASSES, (0,)):
        pass


# ---- pieces of staged rows -------------------------------------------------------------------------------------------
GROUPS = tuple(RowGroup(f"/staged/train/part-{number}", 0, 10) for number in range(4))


def test_rows_that_were_not_placed_are_cut_where_they_lie_in_any_number_of_shards() -> None:
    staged = StagedDataset("/staged", GROUPS, (), Facts(), {})
    assert [sum(piece.rows for piece in pieces) for pieces in staged.pieces(3)] == [13, 13, 14]
    assert staged.pieces(1) == (tuple(Piece(group, 0, 10) for group in GROUPS),)


def test_rows_that_were_placed_stay_in_their_shards() -> None:
    staged = StagedDataset("/staged", GROUPS, (), Facts(), {}, shards=(GROUPS[2:], (), GROUPS[:2]))
    pieces = staged.pieces(3)
    assert [[piece.row_group for piece in found] for found in pieces] == [list(GROUPS[2:]), [], list(GROUPS[:2])]
    assert all(piece.rows == 10 for found in pieces for piece in found)
    with pytest.raises(
        ConfigError, match=r"^numShards=2, but the rows in /staged were placed in 3 shards.*numShards=3, or"
    ):
        staged.pieces(2)


# ---- file systems by URL ---------------------------------------------------------------------------------------------
def put(url: str, text: bytes) -> None:
    file_system, path = open_file_system(url)
    with file_system.open_output_stream(path) as sink:
        sink.write(text)


@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "ünïcode", "a:b", "hash#mark", "what?"])
def test_a_local_path_means_the_file_that_spark_would_mean(tmp_path: Path, scheme: str, name: str) -> None:
    """Spark prints and takes paths as they are, without escapes."""
    put(f"{scheme}{tmp_path}/{name}", name.encode())
    assert (tmp_path / name).read_bytes() == name.encode()


def test_a_scheme_that_fsspec_knows_is_served_by_it() -> None:
    put("memory://folder/file", b"text")
    file_system, path = open_file_system("memory://folder/file")
    with file_system.open_input_file(path) as source:
        assert source.read() == b"text"
    file_system.delete_file(path)


@pytest.mark.parametrize("url", ["nosuch://host/folder", "nosuch:/folder"])
def test_a_scheme_that_nothing_knows_is_an_error_that_says_what_to_do(url: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^'{url}' is on a file system that this Python cannot open.*fsspec package"
    ):
        open_file_system(url)


def test_row_groups_can_be_written_and_read_through_any_file_system() -> None:
    url = "memory://staged/part.parquet"
    file_system, path = open_file_system(url)
    table = pa.table({"a": np.arange(10)})
    with memory_files("memory://staged") as files:
        files.write("part", table)
        files.write("part", table.slice(0, 0))
        files.write("none", table.slice(0, 0))
        files.write("part", table)
        assert files.close() == {"part": (RowGroup(url, 0, 20),)}
    assert read_group(RowGroup(url, 0, 20))["a"].to_pylist() == 2 * list(range(10))
    with file_system.open_input_file(path) as source:
        assert pq.ParquetFile(source).metadata.row_group(0).column(0).compression == "UNCOMPRESSED"
    file_system.delete_file(path)


def memory_files(url: str) -> RowGroupFiles:
    file_system, root = open_file_system(url)

    def create(name: str) -> tuple[pa.NativeFile, str]:
        return file_system.open_output_stream(f"{root}/{name}.parquet"), f"{url}/{name}.parquet"

    return RowGroupFiles(create, action="Staging rows", place=url, remedy="Make room.")
