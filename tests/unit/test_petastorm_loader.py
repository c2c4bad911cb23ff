"""Petastorm as it is, on current pyarrow and numpy: what it reads, and what it leaves alone."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import dill
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from pyspark import cloudpickle
from pyspark.sql import types as spark_types

import sparkdl.io  # noqa: F401  petastorm can be imported only after it

# isort: split
from petastorm import TransformSpec, make_batch_reader, make_reader
from petastorm.codecs import CompressedNdarrayCodec, NdarrayCodec, ScalarCodec
from petastorm.etl import dataset_metadata, legacy
from petastorm.fs_utils import FilesystemResolver
from petastorm.predicates import in_lambda
from petastorm.pytorch import BatchedDataLoader, DataLoader
from petastorm.unischema import Unischema, UnischemaField
from petastorm.utils import add_to_dataset_metadata
from petastorm.workers_pool import EmptyResultError, process_pool, thread_pool, ventilator
from petastorm.workers_pool.tests.stub_workers import CoeffMultiplierWorker

from sparkdl.io import petastorm_loader
from sparkdl.io.legacy_pyarrow import ADAPTERS, ParquetDataset

pytestmark = pytest.mark.timeout(120)

ROWS = 240
ROWS_PER_GROUP = 10
FILES = 4
POOLS = ["dummy", "thread", "process"]


def run_python(code, *arguments, search_path=()):
    """Run code in a fresh interpreter; its assertions are the test's."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([*map(str, search_path), *filter(None, inherited)])
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def url_of(path):
    return Path(path).as_uri()


def ids_of(reader):
    return sorted(int(id_) for batch in reader for id_ in batch.id)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    table = pa.table(
        {
            "id": np.arange(ROWS),
            "half": np.arange(ROWS, dtype=np.float32) / 2,
            "name": [f"row {id_}" for id_ in range(ROWS)],
            "pair": pa.array(np.arange(2 * ROWS).reshape(ROWS, 2).tolist(), pa.list_(pa.int64())),
        }
    )
    rows_per_file = ROWS // FILES
    for file in range(FILES):
        part = table.slice(file * rows_per_file, rows_per_file)
        pq.write_table(part, folder / f"{file}.parquet", row_group_size=ROWS_PER_GROUP)
    (folder / "_SUCCESS").touch()
    (folder / ".0.parquet.crc").write_bytes(b"crc")
    return folder


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """Rows 0 to 239 in folders day=0 ... day=3, and in each of them place=a%2Fb and place=c."""
    folder = tmp_path_factory.mktemp("partitioned")
    ids = np.arange(ROWS)
    table = pa.table({"id": ids, "day": ids % 4, "place": np.where(ids < 120, "a/b", "c")})
    pq.write_to_dataset(table, folder, partition_cols=["day", "place"])
    return folder


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A data set with a Unischema: what materialize_dataset writes, less the Spark session."""
    folder = tmp_path_factory.mktemp("described")
    schema = Unischema(
        "Described",
        [
            UnischemaField("id", np.int64, (), ScalarCodec(spark_types.LongType()), False),
            UnischemaField("name", np.str_, (), ScalarCodec(spark_types.StringType()), True),
            UnischemaField("matrix", np.float32, (2, 3), NdarrayCodec(), False),
            UnischemaField("packed", np.uint8, (4,), CompressedNdarrayCodec(), False),
        ],
    )
    rows = [
        {
            "id": id_,
            "name": f"row {id_}" if id_ % 5 else None,
            "matrix": np.full((2, 3), id_, np.float32),
            "packed": np.full(4, id_, np.uint8),
        }
        for id_ in range(40)
    ]
    encoded = [
        {
            name: None if value is None else schema.fields[name].codec.encode(field, value)
            for name, value in row.items()
            for field in [schema.fields[name]]
        }
        for row in rows
    ]
    pq.write_table(
        pa.Table.from_pylist([{k: bytes(v) if isinstance(v, bytearray) else v for k, v in e.items()} for e in encoded]),
        folder / "part.parquet",
        row_group_size=ROWS_PER_GROUP,
    )
    dataset = ParquetDataset(str(folder))
    add_to_dataset_metadata(dataset, dataset_metadata.UNISCHEMA_KEY, pickle.dumps(schema))
    row_groups = json.dumps({"part.parquet": len(rows) // ROWS_PER_GROUP})
    add_to_dataset_metadata(dataset, dataset_metadata.ROW_GROUPS_PER_FILE_KEY, row_groups)
    return folder, rows


# What importing it changes elsewhere: nothing.


def test_no_module_but_petastorm_is_changed_or_made_up():
    run_python(
        """
        import importlib.util
        import sys
        import numpy, pandas, pyarrow, pyarrow.fs, pyarrow.parquet

        watched = ["numpy", "pandas", "pyarrow", "pyarrow.parquet", "pyarrow.types", "builtins"]
        before = {name: {k: id(v) for k, v in vars(sys.modules[name]).items()} for name in watched}
        known = set(sys.modules)

        import sparkdl.io
        import petastorm
        import petastorm.etl.dataset_metadata, petastorm.hdfs.namenode, petastorm.tools
        from sparkdl.io.legacy_pyarrow import Adapter

        for name in watched:
            old, new = before[name], {k: id(v) for k, v in vars(sys.modules[name]).items()}
            changed = {k for k in old.keys() | new if old.get(k) != new.get(k)}
            submodules = {k for k in new if f"{name}.{k}" in sys.modules}
            assert changed <= submodules, (name, changed)

        assert not [n for n, module in sys.modules.items() if isinstance(module, Adapter)]
        for name in set(sys.modules) - known:
            if name.partition(".")[0] in {"numpy", "pandas", "pyarrow", "distutils"}:
                assert importlib.util.find_spec(name).origin, name
        """
    )


@pytest.mark.parametrize("name", ["pyarrow.filesystem", "pyarrow.hdfs", "pyarrow.localfs"])
def test_the_stand_ins_cannot_be_imported_by_others(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        __import__(name)
    assert not hasattr(pa, name.partition(".")[2])


def test_import_statements_inside_petastorm_mean_what_they_mean_elsewhere():
    import_ = petastorm_loader._import
    assert import_("os.path") is os
    assert import_("pyarrow.lib") is ADAPTERS["pyarrow"]
    assert import_("pyarrow.lib", fromlist=("Table",)) is pa.lib
    assert import_("pyarrow", fromlist=("parquet",)).parquet is ADAPTERS["pyarrow.parquet"]
    assert import_("numpy").random is np.random
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = import_("pyarrow").no_such_name


# Installing it.


def test_installing_again_or_from_many_threads_leaves_one_finder():
    run_python(
        """
        import sys, threading
        import sparkdl.io
        from sparkdl.io.petastorm_loader import _Finder, install

        def finders():
            return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]

        install()
        assert len(finders()) == 1
        sys.meta_path.remove(finders()[0])
        together = threading.Barrier(8)
        threads = [threading.Thread(target=lambda: (together.wait(), install())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(finders()) == 1
        """
    )


def test_petastorm_that_failed_to_import_earlier_is_imported_anew():
    run_python(
        """
        import sys
        try:
            import petastorm
        except ImportError:
            pass
        else:
            raise AssertionError("this pyarrow does not need the loader")
        left_over = sys.modules["petastorm.errors"]

        import sparkdl.io
        assert "petastorm.errors" not in sys.modules
        import petastorm
        assert petastorm.make_batch_reader
        assert sys.modules["petastorm.errors"] is not left_over
        """
    )


def test_petastorm_that_somebody_else_made_importable_stays():
    errors = run_python(
        """
        import sys
        import sparkdl.io
        from sparkdl.io import petastorm_loader
        from sparkdl.io.legacy_pyarrow import ADAPTERS

        sys.meta_path[:] = [f for f in sys.meta_path if type(f) is not petastorm_loader._Finder]
        real = {name: sys.modules[name] for name in ADAPTERS if name in sys.modules}
        sys.modules.update(ADAPTERS)  # what a shim does that changes everything for everybody
        import petastorm
        for name in ADAPTERS:
            del sys.modules[name]
        sys.modules.update(real)

        import logging
        logging.basicConfig(stream=sys.stdout)
        petastorm_loader.install()
        assert sys.modules["petastorm"] is petastorm
        assert not any(type(f) is petastorm_loader._Finder for f in sys.meta_path)
        """
    )
    assert "petastorm was imported before sparkdl.io" in errors


def copy_of_petastorm(folder, version):
    import petastorm

    source = Path(petastorm.__file__).parent
    copy = shutil.copytree(source, folder / "petastorm", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    init = copy / "__init__.py"
    init.write_text(init.read_text().replace(petastorm.__version__, version))


def test_another_version_is_refused_with_the_command_that_helps(tmp_path):
    copy_of_petastorm(tmp_path, "0.13.1")
    run_python(
        """
        import sparkdl.io
        try:
            import petastorm
        except ImportError as error:
            assert "petastorm 0.12.1, but petastorm 0.13.1 is installed" in str(error), error
            assert "pip install petastorm==0.12.1" in str(error), error
        else:
            raise AssertionError("petastorm 0.13.1 was accepted")
        """,
        search_path=[tmp_path],
    )


def test_petastorm_can_come_from_a_zip_file(tmp_path, numbers):
    copy_of_petastorm(tmp_path / "files", "0.12.1")
    archive = shutil.make_archive(str(tmp_path / "petastorm"), "zip", tmp_path / "files")
    run_python(
        """
        import sys
        import sparkdl.io
        import petastorm
        assert petastorm.__file__.startswith(sys.argv[1])
        with petastorm.make_batch_reader(sys.argv[2], workers_count=2) as reader:
            assert sum(len(batch.id) for batch in reader) == 240
        """,
        archive,
        url_of(numbers),
        search_path=[archive],
    )


# What it reads.


@pytest.mark.parametrize("pool", POOLS)
def test_batch_reader_reads_every_row_once(numbers, pool):
    with make_batch_reader(url_of(numbers), reader_pool_type=pool, workers_count=2) as reader:
        batches = list(reader)
    assert ids_of(batches) == list(range(ROWS))
    assert len(batches) == ROWS // ROWS_PER_GROUP
    for batch in batches:
        np.testing.assert_array_equal(batch.half, batch.id / np.float32(2))
        np.testing.assert_array_equal(batch.pair, np.stack([2 * batch.id, 2 * batch.id + 1], 1))
        assert batch.name.tolist() == [f"row {id_}" for id_ in batch.id]


def test_two_shards_read_every_row_once(numbers):
    shards = []
    for shard in range(2):
        with make_batch_reader(url_of(numbers), cur_shard=shard, shard_count=2) as reader:
            shards.append(ids_of(reader))
    assert sorted(shards[0] + shards[1]) == list(range(ROWS))


def test_row_groups_come_in_another_order_in_each_epoch(numbers):
    with make_batch_reader(url_of(numbers), reader_pool_type="dummy", num_epochs=2, seed=1) as reader:
        firsts = [int(batch.id[0]) for batch in reader]
    half = len(firsts) // 2
    assert sorted(firsts[:half]) == sorted(firsts[half:])
    assert firsts[:half] != firsts[half:]


def test_files_can_be_listed_one_by_one(numbers):
    urls = [url_of(numbers / f"{file}.parquet") for file in (0, 2)]
    with make_batch_reader(urls, reader_pool_type="dummy") as reader:
        assert ids_of(reader) == [*range(60), *range(120, 180)]


def test_a_missing_file_is_named(tmp_path):
    missing = tmp_path / "absent.parquet"
    with pytest.raises(FileNotFoundError, match=r"at '.*absent\.parquet'.*no such file"):
        make_batch_reader(url_of(missing))


@pytest.mark.parametrize("pool", POOLS)
def test_partition_folders_become_columns(partitioned, pool):
    with make_batch_reader(url_of(partitioned), reader_pool_type=pool, workers_count=2) as reader:
        batches = list(reader)
    assert ids_of(batches) == list(range(ROWS))
    for batch in batches:
        assert batch.day.dtype == np.int64
        np.testing.assert_array_equal(batch.day, batch.id % 4)
        np.testing.assert_array_equal(batch.place, np.where(batch.id < 120, "a/b", "c"))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([("day", "=", 1)], lambda id_: id_ % 4 == 1),
        ([("day", "!=", 1), ("place", "==", "c")], lambda id_: id_ % 4 != 1 and id_ >= 120),
        ([("day", "in", {0, 3})], lambda id_: id_ % 4 in {0, 3}),
        ([("day", "not in", [0, 3])], lambda id_: id_ % 4 in {1, 2}),
        ([("day", ">=", 1), ("day", "<", 3)], lambda id_: 1 <= id_ % 4 < 3),
        ([[("day", "<=", 0)], [("day", ">", 2)]], lambda id_: id_ % 4 in {0, 3}),
        ([("id", "=", 1)], lambda id_: True),
    ],
)
def test_filters_drop_partitions(partitioned, filters, expected):
    with make_batch_reader(url_of(partitioned), reader_pool_type="dummy", filters=filters) as reader:
        assert ids_of(reader) == [id_ for id_ in range(ROWS) if expected(id_)]


def test_predicates_choose_rows(partitioned):
    some_rows = in_lambda(["day", "id"], lambda day, id_: (day == 2) & (id_ < 50))
    with make_batch_reader(url_of(partitioned), predicate=some_rows, workers_count=2) as reader:
        assert ids_of(reader) == list(range(2, 50, 4))


def test_a_predicate_on_the_only_partition_drops_its_files(tmp_path):
    table = pa.table({"id": np.arange(12), "day": np.arange(12) % 3})
    pq.write_to_dataset(table, tmp_path, partition_cols=["day"])
    one_day = in_lambda(["day"], lambda day: day == 2)
    with make_batch_reader(url_of(tmp_path), predicate=one_day, workers_count=2) as reader:
        assert ids_of(reader) == [2, 5, 8, 11]


def test_folders_that_disagree_about_partitions_are_refused(tmp_path):
    for folder in ["day=1", "place=c"]:
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"id": [1]}), tmp_path / folder / "0.parquet")
    with pytest.raises(ValueError, match=r"same partition folders.*\('day',\).*\('place',\)"):
        ParquetDataset(str(tmp_path))


def test_hidden_files_and_folders_are_left_out(numbers, tmp_path):
    shutil.copytree(numbers, tmp_path / "data")
    for folder in ["_temporary", ".staging"]:
        (tmp_path / "data" / folder).mkdir()
        (tmp_path / "data" / folder / "0.parquet").write_text("no Parquet")
    dataset = ParquetDataset(f"{tmp_path}//data/")
    assert [os.path.relpath(piece.path, tmp_path / "data") for piece in dataset.pieces] == [
        f"{file}.parquet" for file in range(FILES)
    ]


def test_other_file_systems(numbers):
    memory = fsspec.filesystem("memory")
    memory.put(str(numbers), "/loader/numbers", recursive=True)
    with make_batch_reader("memory://loader/numbers", workers_count=2) as reader:
        assert ids_of(reader) == list(range(ROWS))
    memory.rm("/loader", recursive=True)
    with make_batch_reader(url_of(numbers), filesystem=pyarrow.fs.LocalFileSystem(), workers_count=2) as reader:
        assert ids_of(reader) == list(range(ROWS))


# Arrow's buffers are read-only; petastorm hands them to torch without a copy.
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("loader", [DataLoader, BatchedDataLoader])
def test_petastorm_loaders_make_tensors(numbers, loader):
    reader = make_batch_reader(url_of(numbers), schema_fields=["id", "half"], workers_count=2)
    with loader(reader, batch_size=32) as batches:
        batches = list(batches)
    ids = np.concatenate([batch["id"].numpy() for batch in batches])
    halves = np.concatenate([batch["half"].numpy() for batch in batches])
    assert sorted(ids) == list(range(ROWS))
    np.testing.assert_array_equal(halves, ids / np.float32(2))


@pytest.mark.parametrize("pool", POOLS)
def test_reader_decodes_a_unischema(described, pool):
    folder, expected = described
    with make_reader(url_of(folder), reader_pool_type=pool, workers_count=2) as reader:
        rows = sorted(reader, key=lambda row: row.id)
    assert [row.id for row in rows] == [row["id"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row.name == wanted["name"]
        np.testing.assert_array_equal(row.matrix, wanted["matrix"])
        np.testing.assert_array_equal(row.packed, wanted["packed"])


def test_names_in_old_pickles_are_found():
    field = b"cpyspark.serializers\n_restore\n(VUnischemaField\n(Vname\nVnumpy_dtype\nt(Vid\ncnumpy\nunicode_\nttR."
    restored = legacy.depickle_legacy_package_name_compatible(field)
    assert type(restored).__name__ == "UnischemaField"
    assert (restored.name, restored.numpy_dtype) == ("id", np.str_)
    assert legacy.restricted_loads(b"cnumpy\nstring_\n.") is np.bytes_
    assert legacy.restricted_loads(b"cnumpy\nfloat32\n.") is np.float32
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        legacy.restricted_loads(b"cos\nsystem\n.")


# Reading to the end.


class LastMinuteVentilator(ventilator.Ventilator):
    """Queues its only item while it is being asked, for the nth time, whether it has done so."""

    def __init__(self, ventilate, at_question):
        super().__init__(ventilate)
        self.questions_left = at_question

    def completed(self):
        self.questions_left -= 1
        if self.questions_left == 0:
            self._ventilate_fn(message="the last one", value=14)
        return self.questions_left <= 0

    def start(self):
        pass

    def processed_item(self):
        pass

    def stop(self):
        pass


@contextlib.contextmanager
def pool_with_a_last_minute_item(pool_class):
    # A ProcessPool asks once for its log, before it compares the counts.
    at_question = {thread_pool.ThreadPool: 1, process_pool.ProcessPool: 2}[pool_class]
    pool = pool_class(1)
    pool.start(CoeffMultiplierWorker, {"coeff": 3}, LastMinuteVentilator(pool.ventilate, at_question))
    yield pool
    pool.stop()
    pool.join()


@pytest.mark.parametrize("pool_class", [thread_pool.ThreadPool, process_pool.ProcessPool])
def test_what_is_queued_at_the_last_minute_is_read(pool_class):
    with pool_with_a_last_minute_item(pool_class) as pool:
        assert pool.get_results() == 42
        with pytest.raises(EmptyResultError):
            pool.get_results()


@pytest.mark.parametrize("pool_class", [thread_pool.ThreadPool, process_pool.ProcessPool])
def test_without_the_correction_it_would_be_dropped(pool_class, monkeypatch):
    monkeypatch.setattr(pool_class, "get_results", pool_class.get_results.__wrapped__)
    with pool_with_a_last_minute_item(pool_class) as pool, pytest.raises(EmptyResultError):
        pool.get_results()


def test_sixty_reads_return_every_row_however_late_the_ventilator_answers(numbers, monkeypatch):
    completed = ventilator.ConcurrentVentilator.completed

    def late(self):
        time.sleep(0.002)
        return completed(self)

    monkeypatch.setattr(ventilator.ConcurrentVentilator, "completed", late)
    with make_batch_reader(url_of(numbers), workers_count=2) as reader:
        for _ in range(60):
            assert ids_of(reader) == list(range(ROWS))
            reader.reset()


# In other processes.


@pytest.mark.parametrize("pickler", [pickle, cloudpickle, dill], ids=lambda module: module.__name__)
def test_stand_ins_pickle_by_name(pickler, partitioned):
    for stand_in in ADAPTERS.values():
        assert pickler.loads(pickler.dumps(stand_in)) is stand_in
    dataset = ParquetDataset(str(partitioned))
    pieces, partitions = pickler.loads(pickler.dumps((dataset.pieces, dataset.partitions)))
    assert pieces == dataset.pieces
    assert partitions == dataset.partitions
    assert pieces[0].read(partitions=partitions) == dataset.pieces[0].read(partitions=partitions)


def test_a_function_of_petastorm_arrives_in_a_worker_that_imported_nothing(tmp_path):
    factory = FilesystemResolver(url_of(tmp_path)).filesystem_factory()
    (tmp_path / "factory").write_bytes(cloudpickle.dumps(factory))
    run_python(
        """
        import pickle, sys
        with open(sys.argv[1], "rb") as pickled:
            factory = pickle.load(pickled)
        assert factory().exists(sys.argv[1])
        """,
        tmp_path / "factory",
    )


def test_worker_processes_search_where_their_parent_does(tmp_path, numbers, monkeypatch):
    (tmp_path / "only_here.py").write_text("def double(frame):\n    frame['id'] = 2 * frame['id']\n    return frame\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with make_batch_reader(
        url_of(numbers),
        schema_fields=["id"],
        transform_spec=TransformSpec(only_here.double),
        reader_pool_type="process",
        workers_count=1,
    ) as reader:
        assert ids_of(reader) == list(range(0, 2 * ROWS, 2))
