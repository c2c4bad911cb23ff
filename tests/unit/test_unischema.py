"""Data sets in Petastorm's own format: arrays and images become tensors."""

import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import types as T

from sparkdl.config import Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.convert import convert
from sparkdl.io.in_place import in_place, physical_columns, select_rows
from sparkdl.io.inspection import inspect_locally
from sparkdl.io.plan import Piece
from sparkdl.io.resolve import ColumnRules, resolve_column
from sparkdl.io.unischema import UNISCHEMA_KEY, coded_fields, decode_unischema
from tests.unit.parquet_files import ID, discovered, numbers, write

pytestmark = pytest.mark.timeout(60)


def petastorm_dataset(folder: Path, codecs: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """What materialize_dataset writes, less the Spark session: cells by the codecs, and the pickled Unischema."""
    from petastorm.codecs import ScalarCodec
    from petastorm.etl.dataset_metadata import UNISCHEMA_KEY
    from petastorm.unischema import Unischema, UnischemaField
    from petastorm.utils import add_to_dataset_metadata

    from sparkdl.io.legacy_pyarrow import ParquetDataset as LegacyDataset

    fields = [UnischemaField("id", np.int64, (), ScalarCodec(T.LongType()), False)]
    fields += [UnischemaField(name, *described) for name, described in codecs.items()]
    unischema = Unischema("Described", fields)
    encoded = {
        one.name: [None if row[one.name] is None else one.codec.encode(one, row[one.name]) for row in rows]
        for one in fields
    }
    write(folder / "part.parquet", {name: _cells(column) for name, column in encoded.items()}, rows_per_group=4)
    add_to_dataset_metadata(LegacyDataset(str(folder)), UNISCHEMA_KEY, pickle.dumps(unischema))
    return unischema


def _cells(column: Sequence[Any]) -> list[Any]:
    return [bytes(cell) if isinstance(cell, bytearray) else cell for cell in column]


def pictures(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from petastorm.codecs import CompressedImageCodec, CompressedNdarrayCodec, NdarrayCodec

    codecs = {
        "picture": (np.uint8, (4, 5, 3), CompressedImageCodec("png"), False),
        "gray": (np.uint8, (4, 5), CompressedImageCodec("png"), False),
        "matrix": (np.float32, (2, 3), NdarrayCodec(), False),
        "packed": (np.int64, (3,), CompressedNdarrayCodec(), False),
        "flags": (np.bool_, (2,), NdarrayCodec(), False),
        "cloud": (np.float64, (None, 2), NdarrayCodec(), True),
    }
    random = np.random.default_rng(7)
    rows = [
        {
            "id": number,
            "picture": random.integers(0, 256, (4, 5, 3)).astype(np.uint8),
            "gray": random.integers(0, 256, (4, 5)).astype(np.uint8),
            "matrix": random.normal(size=(2, 3)).astype(np.float32),
            "packed": random.integers(0, 1 << 60, 3),
            "flags": np.array([number % 2 == 0, True]),
            "cloud": random.normal(size=(number + 1, 2)) if number % 2 else None,
        }
        for number in range(count)
    ]
    return codecs, rows


@pytest.mark.parametrize("stored", [True, False])
def test_petastorms_arrays_and_images_become_tensors(tmp_path: Path, stored: bool) -> None:
    codecs, rows = pictures(10)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    found = discovered(tmp_path, unischema="stored" if stored else unischema)
    assert {one.name: one.dataType.simpleString() for one in found.schema} == {
        "id": "bigint",
        "picture": "array<float>",
        "gray": "array<float>",
        "matrix": "array<float>",
        "packed": "array<bigint>",
        "flags": "array<int>",
        "cloud": "binary",
    }
    rules = ColumnRules(shapes=found.shapes)
    names = ["picture", "gray", "matrix", "packed", "flags"]
    inputs = tuple(
        resolve_column(
            found, name, field=f"input_{number}", param="inputCols", floating="float32", role="input", rules=rules
        )
        for number, name in enumerate(names)
    )
    columns = Columns(inputs, (ID,))
    staged = inspect_locally(found, columns)
    assert staged.facts.widths == {"input_0": 60, "input_1": 20, "input_2": 6, "input_3": 3, "input_4": 2, "label_0": 1}
    context = pickle.loads(pickle.dumps(in_place(found, columns)))
    for group in staged.train:
        table = pq.ParquetFile(group.path).read_row_group(group.index, columns=list(physical_columns(context)))
        values = convert(select_rows(table, Piece(group, 0, group.rows), context=context), columns)
        for row, number in enumerate(values["label_0"].tolist()):  # type: ignore[union-attr]
            for place, name in enumerate(names):
                np.testing.assert_array_equal(values[f"input_{place}"][row], rows[number][name])


def test_arrays_of_unknown_shape_are_decoded_one_by_one(tmp_path: Path) -> None:
    codecs, rows = pictures(4)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    decoded = decode_unischema(pq.read_table(tmp_path / "part.parquet"), coded_fields(unischema, ["cloud"]), ["cloud"])
    for value, row in zip(decoded["cloud"], rows, strict=True):
        np.testing.assert_array_equal(value, row["cloud"])


def test_without_opencv_pillow_decodes_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from petastorm import codecs as petastorm_codecs

    codecs, rows = pictures(4)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    monkeypatch.setattr(petastorm_codecs, "OPENCV_AVAILABLE", False)
    table, fields = pq.read_table(tmp_path / "part.parquet"), coded_fields(unischema, ["picture", "gray"])
    for name, values in decode_unischema(table, fields, fields).items():
        np.testing.assert_array_equal(values, [row[name] for row in rows])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ConfigError, match=r"^Images need opencv-python-headless or pillow on all executors\. Install one"
    ):
        decode_unischema(table, fields, fields)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, r"^'matrix' is null in row 1 of a row group, and no number can stand for an array.*is_valid\(\)"),
        (b"nonsense", r"^'matrix' cannot be decoded by NdarrayCodec\(\) in row 1 of a row group: .*Check the file"),
        ((3, 2), r"^'matrix' holds a value of shape \(3, 2\) and type float32 in row 1 .*says \(2, 3\) and float32"),
    ],
)
def test_a_cell_that_is_not_what_the_unischema_says_is_named(tmp_path: Path, cell: Any, message: str) -> None:
    codecs, rows = pictures(3)
    fields = coded_fields(petastorm_dataset(tmp_path, codecs, rows), ["matrix"])
    cells = pq.read_table(tmp_path / "part.parquet").column("matrix").to_pylist()
    if isinstance(cell, tuple):
        cell = _npy(np.zeros(cell, np.float32))
    cells[1] = cell
    with pytest.raises(DataError, match=message):
        decode_unischema(pa.table({"matrix": pa.array(cells, pa.binary())}), fields, ["matrix"])


def _npy(values: Any) -> bytes:
    import io

    sink = io.BytesIO()
    np.save(sink, values)
    return sink.getvalue()


def test_a_unischema_must_be_one_and_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", numbers(0, 3))
    with pytest.raises(ConfigError, match=r"^unischema=7 is neither a petastorm\.unischema\.Unischema nor 'stored'\.$"):
        discovered(tmp_path, unischema=7)
    with pytest.raises(ConfigError, match=r"^unischema='stored', but \S+ has no Unischema in a _common_metadata file"):
        discovered(tmp_path, unischema="stored")
    stored = {UNISCHEMA_KEY: pickle.dumps(Path("a class that is not let pass"))}
    pq.write_metadata(pa.schema([pa.field("id", pa.int64())], stored), tmp_path / "_common_metadata")
    assert discovered(tmp_path).columns == ["id", "x"]  # not unpickled unless asked for
    with pytest.raises(DataError, match=r"^The Unischema in the metadata of \S+ cannot be unpickled: .*forbidden"):
        discovered(tmp_path, unischema="stored")
