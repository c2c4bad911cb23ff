"""Rows held out for validation: which ones are drawn, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql.types import ArrayType, FloatType, LongType, MapType, StringType, StructField, StructType

from sparkdl.config import Column, Columns, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.dataset import DiscoveredDataset, ParquetDataset, discover_locally
from sparkdl.io.draw import Draw
from sparkdl.io.inspection import inspect_locally
from sparkdl.io.stage import Facts, StagedDataset
from sparkdl.io.validation import (
    DATASET,
    FRACTION,
    NoValidationRows,
    check_ways,
    hold_out,
    needs_validation,
    with_validation,
)
from tests.unit.parquet_files import COLUMNS, ID, discovered, numbers, read_rows, write

pytestmark = pytest.mark.timeout(60)

DRAW = Draw(0.3, 5)


# ---- drawn by place --------------------------------------------------------------------------------------------------
def test_a_draw_is_the_fraction_and_follows_seed_file_and_row_group() -> None:
    rows = 100_000
    first = DRAW.by_place("a.parquet", 0, rows)
    assert first.shape == (rows,)
    assert abs(first.mean() - 0.3) < 4 * (0.21 / rows) ** 0.5
    np.testing.assert_array_equal(first, DRAW.by_place("a.parquet", 0, rows))
    for other in (Draw(0.3, 6).by_place("a.parquet", 0, rows), DRAW.by_place("b.parquet", 0, rows)):
        assert abs((first & other).mean() - 0.09) < 4 * (0.09 * 0.91 / rows) ** 0.5
    assert not np.array_equal(first, DRAW.by_place("a.parquet", 1, rows))


def test_a_larger_fraction_draws_the_same_rows_and_more() -> None:
    some, most = DRAW.by_place("a", 0, 1000), Draw(0.99, 5).by_place("a", 0, 1000)
    assert (some <= most).all()
    assert not Draw(1e-300, 5).by_place("a", 0, 1000).any()
    assert Draw(float(np.nextafter(1, 0)), 5).by_place("a", 0, 1000).all()


def test_a_draw_is_the_same_in_every_release() -> None:
    """Else a model that is trained further would be validated on rows that it was trained on."""
    assert np.flatnonzero(DRAW.by_place("day=1/a.parquet", 2, 20)).tolist() == PINNED


PINNED = [1, 6, 9, 10, 16, 19]


def drawn(folder: Path, columns: Columns = COLUMNS, **options: Any) -> tuple[DiscoveredDataset, Columns]:
    found, columns, second = hold_out(
        discovered(folder, **options), columns, TrainConfig(validation_fraction=0.3, seed=5), None, spooled=False
    )
    assert isinstance(found, DiscoveredDataset)
    assert second is None
    return found, columns


def splits(found: DiscoveredDataset, columns: Columns, shards: int = 1) -> list[set[int]]:
    """The ids of training and of validation rows, after checking that each comes once."""
    staged = inspect_locally(found, columns)
    ids = [[row["id"] for row in read_rows(found, columns, staged, split, shards)] for split in ("train", "validation")]
    assert len(set(ids[0] + ids[1])) == len(ids[0]) + len(ids[1])
    assert [len(part) for part in ids] == [
        sum(group.rows for group in groups) for groups in (staged.train, staged.validation)
    ]
    return [set(part) for part in ids]


def test_parquet_read_in_place_is_split_by_where_rows_lie(tmp_path: Path) -> None:
    for day in (1, 2):
        for part in range(2):
            first = 200 * day + 100 * part
            write(tmp_path / "rows" / f"day={day}" / f"{part}.parquet", numbers(first, first + 100), rows_per_group=17)
    train, held = splits(*drawn(tmp_path / "rows"))
    assert train | held == set(range(200, 600))
    assert abs(len(held) - 120) < 4 * 84**0.5
    for shards in (2, 5):
        assert splits(*drawn(tmp_path / "rows"), shards) == [train, held]
    # The filter leaves out rows, and moves none to the other side.
    for filters in (pc.field("id") >= 333, pc.field("day") == 2):
        kept = set(range(333 if "id" in str(filters) else 400, 600))
        assert splits(*drawn(tmp_path / "rows", filters=filters)) == [train & kept, held & kept]
    # Nor does a file more, or another place.
    write(tmp_path / "rows" / "day=0" / "0.parquet", numbers(0, 100))
    more = splits(*drawn(tmp_path / "rows"))
    assert [part & set(range(200, 600)) for part in more] == [train, held]
    (tmp_path / "rows").rename(tmp_path / "moved")
    assert splits(*drawn(tmp_path / "moved")) == more


def test_rows_with_nulls_are_dropped_on_both_sides(tmp_path: Path) -> None:
    values = [None if row % 7 == 0 else float(row) for row in range(100)]
    write(tmp_path / "a.parquet", {"id": list(range(100)), "x": values}, rows_per_group=30)
    dropping = Columns((replace(COLUMNS.inputs[0], nulls="drop"),), (ID,))
    kept = {row for row in range(100) if row % 7}
    whole = splits(*drawn(tmp_path, Columns((Column("id", "input_0", "scalar", "int64"),), (ID,))))
    assert splits(*drawn(tmp_path, dropping)) == [part & kept for part in whole]


def test_rows_are_counted_without_a_look_at_their_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbers(0, 100), rows_per_group=30)
    before = inspect_locally(*drawn(tmp_path))
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = bytes(len(content) - footer - 4)
    path.write_bytes(bytes(content))
    with pytest.raises(OSError, match=r"thrift|deserialize"):
        pq.read_table(path)
    after = inspect_locally(*drawn(tmp_path))
    assert (after.train, after.validation) == (before.train, before.validation)


def test_files_are_named_from_the_folder_on_that_holds_them_all(tmp_path: Path) -> None:
    for name in ("t/1/a.parquet", "t/2/a.parquet", "u/b.parquet"):
        write(tmp_path / name, numbers(0, 3))

    def names(*urls: str) -> list[str]:
        found = discover_locally(ParquetDataset([f"{tmp_path}/{url}" for url in urls]))
        return list(found.file_names.values())

    assert sorted(names("t/")) == ["1/a.parquet", "2/a.parquet"]
    assert sorted(names("t/1", "t/2/a.parquet")) == ["1/a.parquet", "2/a.parquet"]
    assert names("u/b.parquet") == ["b.parquet"]
    assert sorted(names("t", "u")) == ["t/1/a.parquet", "t/2/a.parquet", "u/b.parquet"]


# ---- what is refused -------------------------------------------------------------------------------------------------
PARQUET = ParquetDataset("/rows")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"indicator": "held", "fraction": 0.2}, r"^validationIndicatorCol='held' and validationFraction=0\.2 are set"),
        ({"fraction": 0.2, "second": PARQUET}, r"^validationFraction=0\.2 and validationDataset are set\. Rows are"),
        ({"fraction": 0.0}, r"^validationFraction=0 is not between 0 and 1\. Use a part of the rows, such as 0\.2\.$"),
        ({"fraction": 1.0}, r"^validationFraction=1 is not between 0 and 1"),
        ({"fraction": float("nan")}, r"^validationFraction=nan is not between 0 and 1"),
        ({"second": "/rows"}, r"^validationDataset is a str\. Give a DataFrame or a ParquetDataset\.$"),
    ],
    ids=str,
)
def test_ways_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"indicator": None, "fraction": None, "second": None, **given}
    with pytest.raises(ConfigError, match=message):
        check_ways(PARQUET, **settings)


def test_one_way_or_none_is_accepted() -> None:
    for given in ({}, {"indicator": "held"}, {"fraction": 0.2}, {"second": PARQUET}):
        check_ways(PARQUET, **{"indicator": None, "fraction": None, "second": None, **given})


class Described:
    """What is asked of a DataFrame before any job."""

    def __init__(self, **kinds: Any) -> None:
        self.schema = StructType([StructField(name, kind) for name, kind in kinds.items()])
        self.columns = list(kinds)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"x": FloatType()},
            r"^validationDataset has no column 'id', but the rows that are trained on have\. It has x",
        ),
        ({"label": FloatType()}, r"^validationDataset has no column 'x', 'id', but"),
        (
            {"x": ArrayType(FloatType()), "id": StringType()},
            r"^validationDataset holds 'x' as array<float>, not float, 'id' as string, not bigint as in the rows",
        ),
    ],
    ids=str,
)
def test_a_second_data_set_of_other_columns_is_refused(second: dict[str, Any], message: str) -> None:
    first: Any = Described(x=FloatType(), id=LongType(), more=StringType())
    with pytest.raises(ConfigError, match=message):
        hold_out(first, COLUMNS, TrainConfig(), Described(**second), spooled=True)  # type: ignore[arg-type]


def test_the_key_must_be_in_the_second_data_set_too() -> None:
    first: Any = Described(x=FloatType(), id=LongType(), user=StringType())
    second: Any = Described(x=FloatType(), id=LongType())
    config = TrainConfig(partitioning="key", partition_key_col="user")
    with pytest.raises(ConfigError, match=r"^validationDataset has no column 'user'"):
        hold_out(first, COLUMNS, config, second, spooled=True)


@pytest.mark.parametrize("nested", [False, True])
def test_rows_with_maps_cannot_be_drawn(nested: bool) -> None:
    kind = MapType(StringType(), LongType())
    rows: Any = Described(tags=ArrayType(kind) if nested else kind, id=LongType())
    columns = Columns((Column("tags", "input_0", "raw", "", validity="any"),), (ID,))
    with pytest.raises(ConfigError, match=r"^validationFraction draws rows by a hash.*'tags' has type .*map<string,"):
        hold_out(rows, columns, TrainConfig(validation_fraction=0.5), None, spooled=True)


@pytest.mark.parametrize("name", ["validationFraction", "validationfraction"])
def test_a_column_named_as_the_flag_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.parquet", {**numbers(0, 3), name: [1, 2, 3]})
    with pytest.raises(ConfigError, match=rf"^There is a column '{name}', but validationFraction marks rows"):
        drawn(tmp_path)


def test_data_sets_decoded_to_other_shapes_are_refused(tmp_path: Path) -> None:
    first = discovered(write(tmp_path / "a.parquet", numbers(0, 3)).parent)
    second = replace(first, coded={"x": type("Coded", (), {"shape": (2, 3)})()})
    with pytest.raises(ConfigError, match=r"^validationDataset holds 'x' in shape \(2, 3\), but the rows that are"):
        hold_out(first, COLUMNS, TrainConfig(), second, spooled=False)


# ---- a second data set -----------------------------------------------------------------------------------------------
def test_the_rows_of_the_second_are_the_validation_rows(tmp_path: Path) -> None:
    for name, rows in (("first", (0, 30)), ("second", (30, 45))):
        write(tmp_path / name / "a.parquet", numbers(*rows))
    first, second = (inspect_locally(discovered(tmp_path / name), COLUMNS) for name in ("first", "second"))
    both = with_validation(first, second, COLUMNS)
    assert both == StagedDataset(
        first.url, first.train, second.train, Facts({"input_0": 1, "label_0": 1}, None, both.facts.row), both.files
    )
    assert both.files == {**first.files, **second.files}
    assert both.pieces(3) == first.pieces(3)


def test_a_second_data_set_of_another_width_is_refused(tmp_path: Path) -> None:
    columns = Columns((Column("x", "input_0", "array", "float32"),), (ID,))
    for width in (2, 3):
        rows = {"id": [1, 2], "x": pa.array([[1.0] * width] * 2)}
        write(tmp_path / str(width) / "a.parquet", rows)
    first, second = (inspect_locally(discovered(tmp_path / name), columns) for name in ("2", "3"))
    with pytest.raises(DataError, match=r"^'x' has 2 values in some rows, .* and 3 in others"):
        with_validation(first, second, columns)


# ---- no validation rows ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "metrics", "expected"),
    [
        ({}, False, []),
        ({"early_stopping_patience": 2}, False, ["earlyStoppingPatience"]),
        ({"restore_best": True}, True, ["restoreBest", "metrics"]),
        ({"early_stopping_patience": 2, "restore_best": True, "monitor": "loss"}, False, []),
        ({"monitor": "validation_accuracy"}, False, ["monitor='validation_accuracy'"]),
    ],
    ids=str,
)
def test_what_needs_validation_rows(settings: dict[str, Any], metrics: bool, expected: list[str]) -> None:
    assert needs_validation(TrainConfig(**settings), metrics=metrics) == expected


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (FRACTION, r"validationFraction=0\.001 drew none of the rows"),
        (DATASET, r"validationDataset has no rows"),
        ("held", r"validationIndicatorCol='held' is true in no row"),
        (None, r"validationDataset has no rows"),
    ],
)
def test_no_validation_rows_are_an_error_where_they_are_needed(name: str | None, found: str) -> None:
    flag = None if name is None else Column(name, "validation", "scalar", "bool", flat=True)
    columns, config = replace(COLUMNS, validation=flag), TrainConfig(validation_fraction=0.001)
    harmless = NoValidationRows(columns, config, [])
    harmless.check()
    assert str(harmless).startswith(found.replace("\\", "") + ": the fit goes without validation. ")
    for needed_by, needs in (
        (["metrics"], "metrics needs"),
        (["restoreBest", "metrics"], "restoreBest and metrics need"),
    ):
        with pytest.raises(DataError, match=rf"^{found}, but {needs} validation rows\. (Use|Check) "):
            NoValidationRows(columns, config, needed_by).check()
