"""What is known of files read in place before the fit: rows, facts, and files that are not what they were."""

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sparkdl.config import Column, Columns
from sparkdl.errors import DataError
from sparkdl.io.inspection import FileReport, inspect_file, inspect_locally
from tests.unit.parquet_files import COLUMNS, ID, discovered, nothing_left, numbers, read_rows, write

pytestmark = pytest.mark.timeout(60)


def test_what_a_footer_tells_is_not_read(tmp_path: Path) -> None:
    """All pages are destroyed, and the inspection does not notice."""
    table = {**numbers(0, 100), "class": np.arange(100) % 7}
    for day in (1, 2):
        path = write(tmp_path / f"day={day}" / "a.parquet", table, rows_per_group=50)
        content = path.read_bytes()
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        path.write_bytes(content[:4] + b"\xff" * (end - 4) + content[end:])
    columns = Columns(COLUMNS.inputs, (Column("class", "label_0", "scalar", "int64", flat=True, validity="class"),))
    for filters, rows in [(None, 200), (pc.field("day") == 2, 100), (pc.field("id") > 100, 0)]:
        staged = inspect_locally(discovered(tmp_path, filters=filters), columns)
        assert sum(group.rows for group in staged.train) == rows
        assert staged.facts.labels == ((0, 6) if rows else None)
        assert staged.facts.widths == ({"input_0": 1, "label_0": 1} if rows else {})
    with pytest.raises(DataError, match=r"day=1/a\.parquet cannot be read as Parquet: .*damaged"):
        inspect_locally(discovered(tmp_path, filters=pc.field("id") > 90), columns)


def test_a_file_that_was_written_again_is_another_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbers(0, 10))
    before = inspect_locally(discovered(tmp_path), COLUMNS).files
    os.utime(path, ns=(1, 1))
    assert inspect_locally(discovered(tmp_path), COLUMNS).files != before


def test_a_report_survives_json(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": [1, 2], "x": pa.array([None, 1.0], pa.float32())})
    found = discovered(tmp_path)
    report = inspect_file(found, found.files[0], COLUMNS)
    assert report.nulls == {"x": 1}
    assert report.train == ((0, 2),)
    assert FileReport.of_json(json.loads(json.dumps(report.to_json()))) == report


# ---- facts -----------------------------------------------------------------------------------------------------------
def labelled(kind: str = "int64") -> Columns:
    return Columns(COLUMNS.inputs, (Column("c", "label_0", "scalar", kind, flat=True, validity="class"),))


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([3, 1, 9, 2], pa.int16()),
        pa.array([3, 1, 9, 2], pa.uint64()),
        pa.array([3, 1, 9, 2], pa.float64()),
        pa.array([Decimal(3), Decimal(1), Decimal(9), Decimal(2)]),
    ],
    ids=lambda array: str(array.type),
)
def test_the_range_of_the_labels_is_that_of_the_kept_rows(tmp_path: Path, labels: pa.Array) -> None:
    write(tmp_path / "a.parquet", {**numbers(0, 4), "c": labels})
    assert inspect_locally(discovered(tmp_path), labelled()).facts.labels == (1, 9)
    assert inspect_locally(discovered(tmp_path, filters=pc.field("id") != 2), labelled()).facts.labels == (1, 3)


def test_a_folder_may_be_the_label(tmp_path: Path) -> None:
    for label in (4, 2):
        write(tmp_path / f"c={label}" / "a.parquet", numbers(0, 4))
    assert inspect_locally(discovered(tmp_path), labelled()).facts.labels == (2, 4)


@pytest.mark.parametrize("labels", [[0, -1], [0, 1 << 31], [0.0, 0.5]])
def test_a_bad_label_is_shown_with_its_file(tmp_path: Path, labels: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", {**numbers(0, 2), "c": labels})
    with pytest.raises(DataError, match=rf"^{path}: 'c' must hold class numbers 0, 1, .*\"c\": {labels[1]}"):
        inspect_locally(discovered(tmp_path), labelled())


def test_widths_come_from_the_first_rows(tmp_path: Path) -> None:
    columns = Columns(
        (
            Column("a", "input_0", "array", "float32", nulls=0.0),
            Column("v", "input_1", "assembled", "float32", parts=("x", "id", "x")),
        ),
        (ID,),
    )
    write(tmp_path / "a.parquet", {**numbers(0, 3), "a": [None, [1.0, 2.0], [3.0, 4.0]]})
    facts = inspect_locally(discovered(tmp_path), columns).facts
    assert facts.widths == {"input_0": 2, "input_1": 3, "label_0": 1}
    assert json.loads(facts.row) == {"id": 0, "x": 0.0, "a": None}
    write(tmp_path / "b.parquet", {**numbers(3, 5), "a": [[1.0], [2.0]]})
    with pytest.raises(DataError, match=r"'a' has 2 values in some rows, .* and 1 in others"):
        inspect_locally(discovered(tmp_path), columns)


@pytest.mark.parametrize("statistics", [True, False])
def test_nulls_are_counted_over_all_files(tmp_path: Path, statistics: bool) -> None:
    holes = pa.array([None, 1.0, None, 2.0], pa.float32())
    for name in ("b", "c"):
        write(tmp_path / f"{name}.parquet", {"id": np.arange(4), "x": holes}, 2, write_statistics=statistics)
    write(tmp_path / "a.parquet", numbers(0, 4), write_statistics=statistics)
    with pytest.raises(
        DataError, match=rf"^'x' is null in 4 rows of {tmp_path}, in 2 of 3 files; the first is \S+/b\.parquet\. Leave"
    ):
        inspect_locally(discovered(tmp_path), COLUMNS)
    found = discovered(tmp_path, filters=pc.field("x").is_valid())
    assert len(read_rows(found, COLUMNS, inspect_locally(found, COLUMNS))) == 8


@pytest.mark.parametrize(
    "item", [pa.int64(), pa.struct([("a", pa.int64()), ("b", pa.int64())]), pa.map_(pa.string(), pa.int64())]
)
def test_nulls_are_found_behind_columns_of_many_leaves(tmp_path: Path, item: pa.DataType) -> None:
    """Statistics are kept by leaf: a map of structs before the column must not shift the count."""
    full = {"x": pa.array([1.0, 2.0], pa.float32()), "id": [1, 2]}
    maps = pa.array([[], []], pa.map_(pa.string(), item))
    write(tmp_path / "a.parquet", {"maps": maps, **full})
    assert sum(group.rows for group in inspect_locally(discovered(tmp_path), COLUMNS).train) == 2
    write(tmp_path / "a.parquet", {"maps": maps, **full, "x": pa.array([1.0, None], pa.float32())})
    with pytest.raises(DataError, match=r"'x' is null in 1 rows"):
        inspect_locally(discovered(tmp_path), COLUMNS)


def test_a_null_folder_is_a_null(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "a.parquet", numbers(0, 4))
    write(tmp_path / "day=__HIVE_DEFAULT_PARTITION__" / "a.parquet", numbers(0, 4))
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (ID,))
    with pytest.raises(DataError, match=r"^'day' is null in 4 rows of"):
        inspect_locally(discovered(tmp_path), columns)


# ---- files that are not what they were -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"id": [1]}, r"/b\.parquet has no column 'x', but the first file has one, of type float\. All files need"),
        ({"id": [1], "x": ["a"]}, r"/b\.parquet holds 'x' as string, but the first file as float\. All files need the"),
    ],
)
def test_files_of_different_schemas_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", numbers(0, 3))
    write(tmp_path / "b.parquet", other)
    write(tmp_path / "c.parquet", other)
    with nothing_left(), pytest.raises(DataError, match=message):
        inspect_locally(discovered(tmp_path), COLUMNS)


def test_columns_that_nobody_needs_may_differ_and_so_may_the_encoding(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**numbers(0, 3), "s": ["a", "b", "c"], "y": [1, 2, 3]})
    write(tmp_path / "b.parquet", {**numbers(0, 3), "s": pa.array(["a", "b", "c"]).dictionary_encode()})
    columns = Columns((*COLUMNS.inputs, Column("s", "input_1", "raw", "")), (ID,))
    assert len(inspect_locally(discovered(tmp_path), columns).train) == 2


@pytest.mark.parametrize("damage", ["cut short", "replaced", "removed", "page"])
def test_a_file_that_changes_after_it_was_listed_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a.parquet", numbers(0, 100))
    path = write(tmp_path / "b.parquet", numbers(100, 200), compression="snappy", use_dictionary=False)
    found = discovered(tmp_path, filters=pc.field("x") > 3)
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:-40])
    elif damage == "replaced":
        write(path, numbers(0, 7))
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:4] + b"\xff" * 300 + content[304:])
    with nothing_left(), pytest.raises(DataError, match=rf"^{path} cannot be read as Parquet: .*fit again"):
        inspect_locally(found, COLUMNS)
