"""From Arrow batches to a rank's own Parquet: every row once, nothing left on disk, and file systems by URL."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io import stage
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import RowGroup
from sparkdl.io.schema import decode
from sparkdl.io.stage import Facts, Spool, open_spool, read_sample, window_rows
from sparkdl.storage import open_file_system
from tests.unit.staged import COLUMNS, FIELDS, assert_rows, features_of, spark_batch, whole, write_staged

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
    """The rows of row groups, read as a rank reads them, and checked."""
    with PlannedReader(whole(groups), columns=FIELDS, decode=lambda table: decode(table, columns)) as reader:
        read = list(reader)
    for found in read:
        assert_rows(found["input_0"], found["label_0"], found["label_0"].tolist())
    return [row for found in read for row in found["label_0"].tolist()]


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
        assert (spool.sample is None) == held


@pytest.mark.parametrize("batches", [[], [dealt([], 2)], [dealt([], 2), dealt([], 2)]])
def test_a_rank_without_rows_has_empty_shards(batches: list[pa.RecordBatch]) -> None:
    with open_spool(iter(batches), COLUMNS, (0, 1)) as spool:
        assert spool == Spool({0: (), 1: ()}, (), Facts(), None)


def test_ids_above_two_to_the_53_are_spooled_exactly() -> None:
    ids = range(2**53 + 1, 2**53 + 8)
    with open_spool(iter([dealt(ids, 1)]), COLUMNS, (0,)) as spool:
        assert ids_in(spool.shards[0]) == list(ids)


def test_row_groups_have_about_the_size_that_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes, limit = 3 * 4 + 8, 1000
    monkeypatch.setattr(stage, "_ROW_GROUP_BYTES", limit)
    with open_spool((dealt(range(low, low + 10), 1) for low in range(0, 500, 10)), COLUMNS, (0,)) as spool:
        rows = [group.rows for group in spool.shards[0]]
        assert ids_in(spool.shards[0]) == list(range(500))
        assert [group.index for group in spool.shards[0]] == list(range(len(rows)))
    assert sum(rows) == 500
    assert all(limit <= count * row_bytes < limit + 10 * row_bytes for count in rows[:-1])
    assert 0 < rows[-1] * row_bytes < limit + 10 * row_bytes


def test_the_sample_is_a_few_training_rows_in_staged_form() -> None:
    batches = [dealt([8, 9], 1, [True, True]), dealt(range(3), 1, [True, False, False])]
    with open_spool(iter(batches), WITH_VALIDATION, (0,)) as spool:
        assert spool.sample is not None
        tensors = decode(spool.sample, COLUMNS)
    assert_rows(tensors["input_0"], tensors["label_0"], [1, 2])


# ---- the spool: nothing is left --------------------------------------------------------------------------------------
def test_the_files_have_no_names_and_vanish_with_the_block(local_dir: Path) -> None:
    with open_spool(iter([dealt(range(100), 2)]), COLUMNS, (0, 1)) as spool:
        assert os.listdir(local_dir) == []
        assert len(files_in(local_dir)) == 3
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


def test_several_local_disks_mean_the_first(local_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"{local_dir},{tmp_path / 'second'}")
    with open_spool(iter([dealt(range(9), 1)]), COLUMNS, (0,)):
        assert len(files_in(local_dir)) == 2


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
        assert len(files_in(default)) == 2
        assert ids_in(spool.shards[0]) == list(range(9))
    assert (os.listdir(default), files_in(default)) == ([], [])


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


@pytest.mark.parametrize("facts", [Facts(), Facts({"input_0": 3}, (2, 4), '{"input_0": [1, 2, 3]}')])
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


def test_the_window_is_as_many_rows_as_fit_its_bytes_and_at_least_one() -> None:
    facts = Facts({"input_0": 3, "label_0": 1})  # 12 and 8 bytes
    assert window_rows(COLUMNS, facts, 2000) == 100
    assert window_rows(COLUMNS, facts, 1) == 1


# ---- a sample of staged files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
def test_a_sample_is_the_first_rows_of_a_row_group(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "staged.parquet"
    write_staged(path, [range(5), range(5, 9)])
    table = read_sample(RowGroup(f"{scheme}{path}", 1, 4), rows=3)
    tensors = decode(table, COLUMNS)
    assert_rows(tensors["input_0"], tensors["label_0"], [5, 6, 7])


def test_a_sample_from_storage_that_this_executor_does_not_see_says_so(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.parquet"
    with pytest.raises(DataError, match=rf"^{path} cannot be read by this executor: .*all executors share"):
        read_sample(RowGroup(str(path), 0, 4))


@pytest.mark.parametrize("damage", ["no parquet", "fewer row groups"])
def test_a_sample_of_a_file_that_changed_is_an_error_with_its_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "changed.parquet"
    write_staged(path, [range(5)])
    if damage == "no parquet":
        path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=rf"^{path} cannot be read by this executor"):
        read_sample(RowGroup(str(path), 1, 4))


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


def test_staged_files_can_be_written_and_read_through_any_file_system() -> None:
    url = "memory://staged/part.parquet"
    file_system, path = open_file_system(url)
    with file_system.open_output_stream(path) as sink:
        writer = stage._Writer(sink, url)
        table = pa.table(dict.fromkeys(["a"], np.arange(10)))
        writer.write(table)
        writer.write(table.slice(0, 0))
        writer.write(table)
        groups = writer.close()
    assert groups == (RowGroup(url, 0, 20),)
    with PlannedReader(whole(groups), columns=["a"], decode=to_list) as reader:
        assert list(reader) == [2 * list(range(10))]
    with file_system.open_input_file(path) as source:
        assert pq.ParquetFile(source).metadata.row_group(0).column(0).compression == "UNCOMPRESSED"
    file_system.delete_file(path)


def to_list(table: pa.Table) -> list[Any]:
    return table.column("a").to_pylist()
