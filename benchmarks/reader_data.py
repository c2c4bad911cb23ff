"""The data sets of bench_reader.py: how they are written, and how their rows are decoded by hand.

The label of a row is its number, so that it can be checked that an epoch was made of all rows.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparkdl.config import Columns

FILES = 8
Array = npt.NDArray[Any]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""By name of a tensor: its dtype, and the shape of one row."""


@dataclass(frozen=True)
class DataSet:
    """What is read.

    Attributes:
        rows: Rows at scale 1.
        group_rows: Rows of a row group.
        make: Makes the columns (but the label) of some rows from random numbers.
        layout: The tensors that shall come out.
        place: Decodes a table, as well as we can, into arrays of that layout.
        dictionaries: Columns of few distinct values, written as dictionaries.
        read_dictionary: Columns that are read as dictionaries.
    """

    rows: int
    group_rows: int
    make: Callable[[np.random.Generator, int], dict[str, Any]]
    layout: Layout
    place: Callable[[pa.Table, dict[str, Array]], None]
    dictionaries: tuple[str, ...] = ()
    read_dictionary: tuple[str, ...] = ()


FLOATS = tuple(f"f{number}" for number in range(40))
MIXED_IDS = tuple(f"id{number}" for number in range(26))
MIXED_FLOATS = tuple(f"x{number}" for number in range(13))
WORD_COLUMNS = ("first", "second", "third")
WORDS = tuple(f"word-{number:04d}" for number in range(1000))


def make_tabular(random: np.random.Generator, rows: int) -> dict[str, Any]:
    return {name: random.standard_normal(rows, np.float32) for name in FLOATS}


def make_lists(random: np.random.Generator, rows: int) -> dict[str, Any]:
    return {"values": _list_array(random.standard_normal((rows, 784), np.float32))}


def make_mixed(random: np.random.Generator, rows: int) -> dict[str, Any]:
    columns = {name: random.integers(0, 10 ** (1 + number % 5), rows) for number, name in enumerate(MIXED_IDS)}
    columns |= {name: random.standard_normal(rows, np.float32) for name in MIXED_FLOATS}
    return {name: pa.array(values, mask=random.random(rows) < 0.05) for name, values in columns.items()}


def make_dense(random: np.random.Generator, rows: int) -> dict[str, Any]:
    return {"features": _vectors(_list_array(random.standard_normal((rows, 100))))}


def make_sparse(random: np.random.Generator, rows: int) -> dict[str, Any]:
    indices = np.argpartition(random.random((rows, 200), np.float32), 10)[:, :10].astype(np.int32)
    values = _list_array(random.standard_normal((rows, 10)))
    return {"features": _vectors(values, 200, _list_array(np.sort(indices)))}


def make_strings(random: np.random.Generator, rows: int) -> dict[str, Any]:
    return {name: pa.array(WORDS).take(random.integers(0, len(WORDS), rows)) for name in WORD_COLUMNS}


def make_images(random: np.random.Generator, rows: int) -> dict[str, Any]:
    from PIL import Image

    cells = []
    for coarse in random.integers(0, 256, (rows, 4, 4, 3), np.uint8):
        cell = io.BytesIO()
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(cell, "png")
        cells.append(cell.getvalue())
    return {"image": cells}


def _list_array(values: Array) -> pa.ListArray:
    rows, width = values.shape
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * width, values.reshape(-1))


def _vectors(values: pa.ListArray, size: int | None = None, indices: pa.ListArray | None = None) -> pa.StructArray:
    """ML Vectors as Spark writes them: sparse ones where a size is given, else dense ones."""
    rows = len(values)
    kind = pa.array(np.full(rows, 1 if size is None else 0, np.int8))
    sizes = pa.array([size] * rows, pa.int32())
    indices = indices if indices is not None else pa.nulls(rows, pa.list_(pa.int32()))
    return pa.StructArray.from_arrays([kind, sizes, indices, values], ["type", "size", "indices", "values"])


def place_parts(parts: Sequence[Array], out: Array, block: int = 4096) -> None:
    """Writes columns side by side, by blocks that stay in the processor's cache."""
    for start in range(0, len(out), block):
        np.stack([part[start : start + block] for part in parts], 1, out=out[start : start + block])


def place_tabular(table: pa.Table, out: dict[str, Array]) -> None:
    place_parts([table[name].chunk(0).to_numpy() for name in FLOATS], out["features"])


def place_lists(table: pa.Table, out: dict[str, Array]) -> None:
    np.copyto(out["values"], _chunk(table, "values").flatten().to_numpy().reshape(-1, 784))


def place_mixed(table: pa.Table, out: dict[str, Array]) -> None:
    for names, key in ((MIXED_IDS, "ids"), (MIXED_FLOATS, "floats")):
        place_parts([_chunk(table, name).fill_null(0).to_numpy() for name in names], out[key])


def place_dense(table: pa.Table, out: dict[str, Array]) -> None:
    values = _chunk(table, "features").field("values").flatten().to_numpy()
    np.copyto(out["features"], values.reshape(-1, 100), casting="same_kind")


def place_sparse(table: pa.Table, out: dict[str, Array]) -> None:
    vectors = _chunk(table, "features")
    first = np.arange(len(vectors)) * 200  # place of each row's first value
    lengths = vectors.field("indices").value_lengths().to_numpy()
    out["features"].fill(0)
    places = np.repeat(first, lengths) + vectors.field("indices").flatten().to_numpy()
    out["features"].reshape(-1)[places] = vectors.field("values").flatten().to_numpy()


def place_strings(table: pa.Table, out: dict[str, Array]) -> None:
    for name in WORD_COLUMNS:
        words = _chunk(table.select([name]), name)
        if not pa.types.is_dictionary(words.type):
            words = words.dictionary_encode()
        numbers = pc.index_in(words.dictionary, pa.array(WORDS)).to_numpy().astype(np.int64)
        np.take(numbers, words.indices.to_numpy(), out=out[name])


def place_images(table: pa.Table, out: dict[str, Array]) -> None:
    for row, cell in enumerate(_chunk(table, "image").to_pylist()):
        out["image"][row] = decode_image(cell)


def decode_image(cell: bytes) -> Array:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(cell)))


def _chunk(table: pa.Table, name: str) -> Any:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


LABEL: Layout = {"label": ("int64", ())}
DATA_SETS = {
    "tabular": DataSet(2_000_000, 65_536, make_tabular, LABEL | {"features": ("float32", (40,))}, place_tabular),
    "lists": DataSet(200_000, 4096, make_lists, LABEL | {"values": ("float32", (784,))}, place_lists),
    "mixed": DataSet(
        1_000_000,
        49_152,
        make_mixed,
        LABEL | {"ids": ("int64", (26,)), "floats": ("float32", (13,))},
        place_mixed,
        dictionaries=MIXED_IDS,
    ),
    "dense": DataSet(200_000, 16_384, make_dense, LABEL | {"features": ("float32", (100,))}, place_dense),
    "sparse": DataSet(200_000, 16_384, make_sparse, LABEL | {"features": ("float32", (200,))}, place_sparse),
    "strings": DataSet(
        1_000_000,
        65_536,
        make_strings,
        LABEL | dict.fromkeys(WORD_COLUMNS, ("int64", ())),
        place_strings,
        dictionaries=WORD_COLUMNS,
        read_dictionary=WORD_COLUMNS,
    ),
    "images": DataSet(20_000, 2048, make_images, LABEL | {"image": ("uint8", (32, 32, 3))}, place_images),
}


def our_columns(name: str) -> Columns:
    """What the columns of a data set are to the library."""
    from sparkdl.config import Column, Columns

    inputs = {
        "tabular": (Column("features", "input_0", "assembled", "float32", parts=FLOATS),),
        "lists": (Column("values", "input_0", "array", "float32"),),
        "mixed": (
            Column("ids", "input_0", "assembled", "int64", nulls=0.0, parts=MIXED_IDS),
            Column("floats", "input_1", "assembled", "float32", nulls=0.0, parts=MIXED_FLOATS),
        ),
        "dense": (Column("features", "input_0", "vector", "float32"),),
        "sparse": (Column("features", "input_0", "vector", "float32"),),
        "strings": tuple(
            Column(word, f"input_{number}", "text", "int64", flat=True, vocabulary=WORDS)
            for number, word in enumerate(WORD_COLUMNS)
        ),
        "images": (Column("image", "input_0", "raw", ""),),
    }[name]
    return Columns(inputs, (Column("label", "label_0", "scalar", "int64", flat=True),))


def open_images(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The transform that decodes images, in the reader threads."""
    return {"image": np.stack([decode_image(cell) for cell in columns["image"].to_pylist()])}


@dataclass(frozen=True)
class Group:
    """A row group."""

    path: str
    index: int
    rows: int


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    name: str
    folder: Path
    groups: tuple[Group, ...]
    threads: int

    @property
    def data(self) -> DataSet:
        """The data set."""
        return DATA_SETS[self.name]

    @property
    def paths(self) -> list[str]:
        """Its files."""
        return sorted({group.path for group in self.groups})

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(group.rows for group in self.groups)

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in self.data.layout.values())


def find_job(name: str, folder: Path, threads: int) -> Job:
    groups = []
    for path in sorted(folder.glob("*.parquet")):
        footer = pq.read_metadata(path)
        groups += [Group(str(path), index, footer.row_group(index).num_rows) for index in range(footer.num_row_groups)]
    return Job(name, folder, tuple(groups), threads)


def write_data(name: str, parent: Path, scale: float) -> Path:
    """Writes a data set, unless that was done before, and reads it once, so that it lies in the page cache."""
    data = DATA_SETS[name]
    rows = max(1, round(data.rows * scale))
    folder = parent / f"{name}-{rows}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        groups = [range(start, min(start + data.group_rows, rows)) for start in range(0, rows, data.group_rows)]
        per_file = -(-len(groups) // FILES)
        random = np.random.default_rng(0)
        for number in range(0, len(groups), per_file):
            _write_file(unfinished / f"part-{number // per_file:05d}.parquet", data, random, groups[number:][:per_file])
        unfinished.rename(folder)
    for path in folder.glob("*.parquet"):
        path.read_bytes()
    return folder


def _write_file(path: Path, data: DataSet, random: np.random.Generator, groups: Sequence[range]) -> None:
    tables = [pa.table(data.make(random, len(ids)) | {"label": np.array(ids)}) for ids in groups]
    dictionaries = list(data.dictionaries) or False  # Spark's writer uses none where values hardly repeat
    with pq.ParquetWriter(path, tables[0].schema, compression="snappy", use_dictionary=dictionaries) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)


class Files:
    """The Parquet files that each thread holds open."""

    def __init__(self, data: DataSet, mapped: bool) -> None:
        self._settings = {"memory_map": mapped, "read_dictionary": list(data.read_dictionary) or None}
        self._own = threading.local()

    def read(self, group: Group) -> pa.Table:
        """All columns of a row group."""
        files = vars(self._own)
        if group.path not in files:
            files[group.path] = pq.ParquetFile(group.path, **self._settings)
        return files[group.path].read_row_group(group.index, use_threads=False)


def place(data: DataSet, table: pa.Table, out: Mapping[str, Tensor], start: int = 0) -> None:
    """Decodes a table into tensors, from row ``start`` on."""
    arrays = {name: tensor.numpy()[start : start + table.num_rows] for name, tensor in out.items()}
    arrays["label"][:] = table["label"].to_numpy()
    data.place(table, arrays)


def allocate(data: DataSet, rows: int) -> dict[str, Tensor]:
    return {
        name: torch.empty((rows, *shape), dtype=getattr(torch, kind)) for name, (kind, shape) in data.layout.items()
    }


def samples(job: Job, limit: int, *, decoded: bool) -> Iterator[dict[str, Any]]:
    """The first ``limit`` rows one by one, in order: as they are in the Parquet files, or decoded."""
    files = Files(job.data, mapped=True)
    for group in job.groups:
        table = files.read(group).slice(0, limit)
        limit -= table.num_rows
        if not decoded:
            yield from table.to_pylist()
            continue
        out = allocate(job.data, table.num_rows)
        place(job.data, table, out)
        for row in range(table.num_rows):
            yield {name: tensor[row].numpy() for name, tensor in out.items()} | {"label": int(out["label"][row])}


def ten_times(folder: Path) -> Path:
    """The same files under ten names each."""
    target = folder.with_name(f"{folder.name}-ten")
    target.mkdir(exist_ok=True)
    for path in folder.glob("*.parquet"):
        for number in range(10):
            with contextlib.suppress(FileExistsError):
                os.link(path, target / f"{number}-{path.name}")
    return target
