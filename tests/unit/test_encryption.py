"""Rows on a rank's disk under ``spark.io.encryption.enabled``: all there for the rank, noise for everybody else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparkdl.barrier.world import World
from sparkdl.config import CacheTier, Column, Columns, RunSpec, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.cache import check_tier, find_free, plan_cache
from sparkdl.io.encryption import decryption_of, encryption_of
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import RowGroup
from sparkdl.io.stage import Spool, open_spool
from sparkdl.io.writer import ROW_GROUP_BYTES
from sparkdl.parallel import Place
from sparkdl.source import open_source
from tests.unit.staged import whole

pytestmark = pytest.mark.timeout(60)

WIDTH = 30
ROWS = 2 * ROW_GROUP_BYTES // (4 * WIDTH)
SECRET = "planted: account 4711"
VALIDATION_SECRET = "planted: account 0815"
COLUMNS = Columns(
    inputs=(
        Column("v", "input_0", "vector", "float32"),
        Column("comment", "input_1", "raw", ""),
        Column("age", "input_2", "scalar", "float32", nulls=-1.0),
    ),
    labels=(Column("id", "label_0", "scalar", "int64", flat=True),),
    validation=Column("held", "validation", "scalar", "bool"),
)
FIELDS = [column.field for column in COLUMNS]
VALUES = np.random.default_rng(0).random((ROWS, WIDTH))


def rows() -> pa.RecordBatch:
    """Dense vectors, text, numbers of which every third is null, ids; the last ten rows are held out."""
    number = np.arange(ROWS)
    held = number >= ROWS - 10
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, ROWS * WIDTH + 1, WIDTH, dtype=np.int32)), VALUES.ravel())
    vectors = pa.StructArray.from_arrays(
        [
            pa.array(np.ones(ROWS, np.int8)),
            pa.nulls(ROWS, pa.int32()),
            pa.nulls(ROWS, pa.list_(pa.int32())),
            lists,
        ],
        ["type", "size", "indices", "values"],
    )
    return pa.RecordBatch.from_pydict(
        {
            "input_0": vectors,
            "input_1": pa.array(np.where(held, VALIDATION_SECRET, SECRET)),
            "input_2": pa.array(number.astype(np.float32), mask=number % 3 == 0),
            "label_0": pa.array(number),
            "validation": pa.array(held),
            "shard": pa.array(np.zeros(ROWS, np.int32)),
        }
    )


@pytest.fixture(scope="module")
def batch() -> pa.RecordBatch:
    return rows()


@pytest.fixture(params=[True, False], ids=["encrypted", "in the clear"])
def spool(batch: pa.RecordBatch, request: pytest.FixtureRequest) -> Iterator[tuple[Spool, bool]]:
    with open_spool(iter([batch]), COLUMNS, [0], encrypt=request.param) as found:
        yield found, request.param


@pytest.fixture
def hidden(batch: pa.RecordBatch) -> Iterator[Spool]:
    """A small spool that is encrypted."""
    with open_spool(iter([batch.slice(0, 100), batch.slice(ROWS - 5)]), COLUMNS, [0], encrypt=True) as found:
        yield found


def tables(groups: tuple[RowGroup, ...], threads: int = 1) -> list[pa.Table]:
    with PlannedReader(
        whole(groups), columns=FIELDS, decode=lambda table, number: table, threads=threads, ahead=2 * threads
    ) as reader:
        return list(reader)


# ---- what the rank reads ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 3])
def test_the_rank_reads_every_row_as_it_was(spool: tuple[Spool, bool], threads: int) -> None:
    found, _ = spool
    groups = found.shards[0]
    assert len(groups) > 1, "one row group alone would show little"
    read = tables(groups, threads)
    assert [table.num_rows for table in read] == [group.rows for group in groups]
    table = pa.concat_tables(read)
    ids = table.column("label_0").to_numpy()
    np.testing.assert_array_equal(ids, np.arange(ROWS - 10))
    ages = table.column("input_2").to_numpy()
    np.testing.assert_array_equal(ages, np.where(ids % 3 == 0, -1, ids).astype(np.float32))
    assert set(table.column("input_1").to_pylist()) == {SECRET}
    (held,) = tables(found.validation, threads)
    assert set(held.column("input_1").to_pylist()) == {VALIDATION_SECRET}


def test_row_groups_are_read_alone_and_in_any_order(hidden: Spool) -> None:
    assert [table.num_rows for table in tables(hidden.shards[0] * 3 + hidden.validation)] == [100, 100, 100, 5]


# ---- what lies on the disk -------------------------------------------------------------------------------------------
def test_nothing_of_the_rows_can_be_found_in_the_files(spool: tuple[Spool, bool]) -> None:
    found, encrypt = spool
    planted = [SECRET.encode(), VALUES[7, :3].astype(np.float32).tobytes(), np.arange(40, 43).tobytes(), b"input_1"]
    for path, words in ((found.shards[0][0].path, planted), (found.validation[0].path, [VALIDATION_SECRET.encode()])):
        with open(path, "rb") as file:
            content = file.read()
        assert len(content) > 500
        assert [word in content for word in words] == [not encrypt] * len(words)


def test_every_file_has_a_key_of_its_own(hidden: Spool) -> None:
    train, validation = hidden.shards[0][0].path, hidden.validation[0].path
    with pytest.raises(OSError, match="decryption"):
        pq.ParquetFile(train, decryption_properties=decryption_of(validation))


def test_without_the_key_nothing_can_be_read(hidden: Spool) -> None:
    path = hidden.shards[0][0].path
    assert pq.ParquetFile(path, decryption_properties=decryption_of(path)).metadata.num_rows == 100
    with pytest.raises(OSError, match="Could not read encrypted metadata, no decryption found"):
        pq.ParquetFile(path)


def test_another_process_does_not_get_the_key_with_the_file(hidden: Spool) -> None:
    path = hidden.shards[0][0].path
    descriptor = int(path.rpartition("/")[2])
    program = (
        "from sparkdl.io.petastorm import PlannedReader\n"
        "from sparkdl.io.plan import Piece, RowGroup\n"
        f"piece = Piece(RowGroup({path!r}, 0, 100), 0, 100)\n"
        "with PlannedReader([piece], columns=['label_0'], decode=print) as reader:\n    next(reader)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], pass_fds=[descriptor], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert f"Row group 0 of {path} cannot be read: Could not read encrypted metadata" in done.stderr


def test_a_file_that_was_changed_is_an_error(hidden: Spool) -> None:
    path = hidden.shards[0][0].path
    descriptor = int(path.rpartition("/")[2])
    (byte,) = os.pread(descriptor, 1, 200)
    os.pwrite(descriptor, bytes([byte ^ 1]), 200)
    with pytest.raises(DataError, match=rf"Row group 0 of {path} cannot be read: .*ecrypt.* fit again"):
        tables(hidden.shards[0])


def test_the_keys_are_gone_with_the_block(batch: pa.RecordBatch) -> None:
    with open_spool(iter([batch.slice(0, 10)]), COLUMNS, [0], encrypt=True) as found:
        path = found.shards[0][0].path
        assert encryption_of(path) is not None
        assert decryption_of(path) is not None
    assert encryption_of(path) is None
    assert decryption_of(path) is None


def test_a_pyarrow_that_cannot_encrypt_is_refused(batch: pa.RecordBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet.encryption

    monkeypatch.delattr(pyarrow.parquet.encryption, "create_encryption_properties")  # as in pyarrow 24
    with (
        pytest.raises(
            ConfigError, match=r"spark\.io\.encryption\.enabled=true.* cannot: .*Install pyarrow 25 or later"
        ),
        open_spool(iter([batch.slice(0, 10)]), COLUMNS, [0], encrypt=True),
    ):
        pass


# ---- what else would lie on the disk ---------------------------------------------------------------------------------
def source_of(cache: CacheTier, batch: pa.RecordBatch, *, encrypt: bool) -> Any:
    spec = RunSpec(run_id="run", config=TrainConfig(cache=cache), columns=COLUMNS, payload=b"", encrypt_spool=encrypt)
    world = World(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, hosts=("here:1",))
    return open_source(spec, None, None, world, Place(0, 1), iter([batch.slice(0, 10)]), None)


def test_a_cache_on_disk_is_refused_before_any_rank_joins(batch: pa.RecordBatch) -> None:
    with (
        pytest.raises(ConfigError, match=r"cache='disk' would keep rows .*spark\.io\.encryption\.enabled=true.*auto"),
        source_of("disk", batch, encrypt=True),
    ):
        pass
    with source_of("disk", batch, encrypt=False) as source:
        assert encryption_of(source.pieces[0][0].row_group.path) is None


def test_the_spec_decides_whether_a_source_is_encrypted(batch: pa.RecordBatch) -> None:
    with source_of("auto", batch, encrypt=True) as source:
        assert encryption_of(source.pieces[0][0].row_group.path) is not None
        sample = source.sample()
        assert sample is not None
        assert sample["label_0"].tolist() == [0, 1]


@pytest.mark.parametrize("asked", ["auto", "none", "memory", "device"])
def test_other_tiers_are_as_good_as_ever(asked: CacheTier) -> None:
    check_tier(asked, encrypt=True)
    free = find_free(torch.device("cpu"), 1, encrypt=True)
    assert free.disk is None
    plan = plan_cache(asked, 1 << 50, free)
    assert [tier for tier, _ in plan.tiers] == ([] if asked == "none" else ["memory"])
    assert find_free(torch.device("cpu"), 1).disk
