"""The rows of files read in place: those of a loop over all rows, whatever the readers are."""

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.convert import convert
from sparkdl.io.dataset import ParquetDataset, discover_locally
from sparkdl.io.in_place import in_place, physical_columns, select_rows
from sparkdl.io.inspection import inspect_file, inspect_locally
from sparkdl.io.plan import Piece
from tests.unit.parquet_files import COLUMNS, ID, discovered, numbers, read_rows, write
from tests.unit.test_storage import SECRETS, S3Server, s3_server

__all__ = ["s3_server"]

pytestmark = pytest.mark.timeout(60)


def test_the_files_columns_that_a_filter_looks_at_are_read(tmp_path: Path) -> None:
    columns = {name: [1.0] for name in "abcdefgh"} | {"id": [1], "x": [1.0]}
    write(tmp_path / "day=1" / "a.parquet", columns)
    for filters, expected in [
        (None, {"id", "x"}),
        (pc.field("day") == 1, {"id", "x"}),
        (((pc.field("a") > 1) | (pc.field("g") > pc.field("c"))) & (pc.field("day") == 1), {"id", "x", "a", "c", "g"}),
        (pc.scalar(True), {"id", "x"}),
    ]:
        context = in_place(discovered(tmp_path, filters=filters), COLUMNS)
        assert set(physical_columns(context)) == expected


VALIDATED = Columns(
    (
        Column("x", "input_0", "scalar", "float32", nulls="drop"),
        Column("v", "input_1", "assembled", "float32", parts=("p", "day"), nulls="drop"),
        Column("a", "input_2", "array", "float64", nulls="drop"),
    ),
    (ID,),
    validation=Column("held", "validation", "scalar", "bool", flat=True),
)
FILTERS: list[tuple[Any, Callable[[dict[str, Any]], bool]]] = [
    (None, lambda row: True),
    (pc.field("day") > 1, lambda row: row["day"] is not None and row["day"] > 1),
    (pc.field("day").is_null(), lambda row: row["day"] is None),
    (pc.field("id") < 40, lambda row: row["id"] < 40),
    ([("id", ">=", 35), ("day", "in", {0, 2})], lambda row: row["id"] >= 35 and row["day"] in (0, 2)),
    ((pc.field("x") > 10) | (pc.field("day") == 1), lambda row: (row["x"] or 0) > 10 or row["day"] == 1),
    (
        pc.field("p") > 3,
        lambda row: (row["p"] or 0) > 3,
    ),
    (pc.field("id") > 1000, lambda row: False),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), which=st.integers(0, len(FILTERS) - 1), shards=st.integers(1, 4))
def test_the_rows_are_those_of_a_loop_over_all_rows(
    tmp_path_factory: pytest.TempPathFactory, seed: int, which: int, shards: int
) -> None:
    filters, keeps = FILTERS[which]
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(seed)
    expected: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    first = 0
    for day in (None, 0, 1, 2):
        for number in range(2):
            count = int(random.integers(1, 30))
            ids = list(range(first, first + count))
            first += count
            some = random.random() < 0.5  # files without nulls are counted from their footers

            def holes(values: Sequence[Any], some: bool = some) -> list[Any]:
                return [None if some and random.random() < 0.2 else value for value in values]

            columns = {
                "id": pa.array(ids),
                "x": pa.array(holes([float(id_) / 2 for id_ in ids]), pa.float32()),
                "p": pa.array(holes([id_ % 7 for id_ in ids]), pa.int32()),
                "a": pa.array(holes([holes([1.0 * id_, 2.0]) for id_ in ids]), pa.list_(pa.float64())),
                "held": pa.array(holes([bool(random.random() < 0.3) for _ in ids]), pa.bool_()),
            }
            text = "__HIVE_DEFAULT_PARTITION__" if day is None else day
            write(folder / f"day={text}" / f"{number}.parquet", columns, rows_per_group=int(random.integers(1, 12)))
    found = discovered(folder, filters=filters)
    for file in found.files:
        for row in pq.ParquetFile(file.path).read().to_pylist():
            row = {**row, **file.partitions}
            whole = None not in (row["x"], row["p"], row["day"], row["a"]) and None not in row["a"]
            if keeps(row) and whole:
                kept = {name: row[name] for name in ("x", "p", "day", "a", "id")}
                expected["validation" if row["held"] else "train"].append(kept)
    staged = inspect_locally(found, VALIDATED)
    for split, rows in expected.items():
        assert read_rows(found, VALIDATED, staged, split, shards) == rows
    assert all(group.rows for group in (*staged.train, *staged.validation))
    if filters is None:
        assert staged.facts.dropped == first - sum(map(len, expected.values()))


def test_a_data_set_may_have_none_of_its_columns_in_files(tmp_path: Path) -> None:
    for day in (1, 2):
        write(tmp_path / f"day={day}" / "a.parquet", numbers(0, 3))
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (Column("day", "label_0", "scalar", "int64"),))
    found = discovered(tmp_path)
    assert physical_columns(in_place(found, columns)) == ()
    assert read_rows(found, columns, inspect_locally(found, columns)) == 3 * [{"day": 1}] + 3 * [{"day": 2}]


def test_the_deepest_folder_of_a_key_counts(tmp_path: Path) -> None:
    folder = tmp_path / "day=7" / "table"
    write(folder / "day=1" / "a.parquet", numbers(0, 1))
    found = discovered(folder)
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (ID,))
    assert read_rows(found, columns, inspect_locally(found, columns)) == [{"day": 1, "id": 0}]


def test_a_row_group_with_other_rows_than_planned_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbers(0, 20), rows_per_group=20)
    found = discovered(tmp_path, filters=pc.field("id") >= 5)
    staged = inspect_locally(found, COLUMNS)
    write(path, numbers(1, 21), rows_per_group=20)
    context = in_place(found, COLUMNS)
    table = pq.read_table(path).select(physical_columns(context))
    (group,) = staged.train
    with pytest.raises(DataError, match=rf"^Row group 0 of {path} has 16 rows to train on, but 15 were planned\. The"):
        select_rows(table, Piece(group, 0, 15), context=context)


def test_what_was_read_becomes_tensors(tmp_path: Path) -> None:
    write(tmp_path / "day=3" / "a.parquet", numbers(0, 5))
    found = discovered(tmp_path, assemble={"v": ["x", "day"]})
    columns = Columns((Column("v", "input_0", "assembled", "float32", parts=("x", "day")),), (ID,))
    staged = inspect_locally(found, columns)
    context = in_place(found, columns)
    (group,) = staged.train
    table = pq.ParquetFile(group.path).read_row_group(0, columns=list(physical_columns(context)))
    values = convert(select_rows(table, Piece(group, 1, 4), context=context), columns)
    x, day = values["input_0"]
    assert (x.tolist(), day.tolist(), values["label_0"].tolist()) == ([0.5, 1.0, 1.5], [3, 3, 3], [1, 2, 3])  # type: ignore[union-attr]


def test_folders_on_s3_are_read_in_place_and_the_options_stay_secret(tmp_path: Path, s3_server: S3Server) -> None:
    from sparkdl.storage import open_file_system

    url = f"s3a://{s3_server.bucket}/{tmp_path.name}/table"
    file_system, path = open_file_system(url, s3_server.options)
    ids = np.arange(60)
    table = pa.table({**numbers(0, 60), "day": ids % 3, "place": np.where(ids < 30, "a/b", "c")})
    pq.write_to_dataset(table, path, filesystem=file_system, partition_cols=["day", "place"])
    dataset = ParquetDataset(
        url,
        filters=(pc.field("day") > 0) & (pc.field("id") < 50),
        assemble={"v": ["x", "day"]},
        storage_options=s3_server.options,
    )
    found = discover_locally(dataset)
    assert [file.partitions for file in found.files[:2]] == [{"day": 0, "place": "a/b"}, {"day": 0, "place": "c"}]
    columns = Columns((Column("v", "input_0", "assembled", "float32", parts=("x", "day")),), (ID,))
    staged = inspect_locally(found, columns)
    rows = read_rows(found, columns, staged, shards=2)
    assert sorted(rows, key=lambda row: row["id"]) == [
        {"x": number / 2, "day": number % 3, "id": number} for number in range(50) if number % 3
    ]
    texts = [repr(value) for value in (dataset, found, in_place(found, columns), staged)]
    texts.append(pickle.dumps(staged).decode("latin-1"))
    for asked, error in [
        (ParquetDataset(f"{url}/nothing", storage_options=s3_server.options), ConfigError),
        (ParquetDataset("s3a://nobucket/x", storage_options=s3_server.options), ConfigError),
        (ParquetDataset(url, filters=pc.field("y") > 1, storage_options=s3_server.options), ConfigError),
    ]:
        with pytest.raises(error) as caught:
            discover_locally(asked)
        texts += [str(caught.value), repr(caught.value)]
    file_system.delete_file(found.files[-1].path.removeprefix("s3a://"))
    with pytest.raises(DataError, match=rf"^{re.escape(found.files[-1].path)} cannot be read as Parquet") as gone:
        inspect_file(found, found.files[-1], columns)
    texts.append(str(gone.value))
    assert not [text for text in texts if any(secret in text for secret in SECRETS)]
