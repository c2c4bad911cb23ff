"""Rows in memory: each once per epoch, in batches that do not depend on the number of processes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.in_memory import InMemoryData, TensorRows, open_rows
from sparkdl.io.plan import RowGroup, batch_row_ids

ROWS = 103


def rows_of(count: int = ROWS, *, weighted: bool = False) -> TensorRows:
    """Rows whose every value is told by their number."""
    ids = torch.arange(count)
    inputs = {"ids": ids[:, None].float(), "twice": 2 * ids}
    return TensorRows(inputs, ids, 1 + ids.double() if weighted else None)


def ids_of(batch: Batch) -> list[int]:
    """The numbers of a batch's rows, which all tensors agree on."""
    ids = batch.labels[0]
    assert batch.inputs[0].shape == (len(ids), 1)
    assert torch.equal(batch.inputs[0][:, 0].long(), ids)
    assert torch.equal(batch.inputs[1], 2 * ids)
    assert batch.weight is None or torch.equal(batch.weight, 1 + ids.double())
    return ids.tolist()


def epoch_of(data: InMemoryData, epoch: int, *, stop: int | None = None) -> list[list[int]]:
    """The rows of each step that is left; only of the first ``stop`` of them where that is set."""
    with data.open_epoch(epoch) as batches:
        return [ids_of(batch) for batch in itertools.islice(batches, stop)]


def opened(config: TrainConfig, *, processes: int, **settings: Any) -> list[InMemoryData]:
    """What each process opens."""
    rows = settings.pop("rows", rows_of())
    return [open_rows(rows, config, rank=rank, world_size=processes, **settings) for rank in range(processes)]


def steps_of(processes: Sequence[InMemoryData], epoch: int = 0) -> list[set[int]]:
    """The rows of each step that is left, of all processes together."""
    parts = [epoch_of(data, epoch) for data in processes]
    for step in zip(*parts, strict=True):
        assert len(set().union(*step)) == sum(map(len, step)), "a row was fed twice"
    return [set().union(*step) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("partitioning", ["sample", "batch"])
@pytest.mark.parametrize("shuffle", ["window", "full", "none"])
def test_every_row_is_fed_once_and_batches_do_not_depend_on_the_processes(shuffle, partitioning):
    config = TrainConfig(batch_size=16, num_shards=4, shuffle=shuffle, partitioning=partitioning, seed=3)
    alone = steps_of(opened(config, processes=1, rows=rows_of(weighted=True)))
    assert len(alone) == math.ceil(ROWS / 16)
    assert set().union(*alone) == set(range(ROWS))
    assert sum(map(len, alone)) == ROWS
    for processes in (2, 3, 4):
        assert steps_of(opened(config, processes=processes)) == alone


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    shards=st.integers(1, 9),
    processes=st.integers(1, 4),
    batch_size=st.integers(9, 64),
    epoch=st.integers(0, 3),
)
def test_every_row_is_fed_once_whatever_the_sizes(count, shards, processes, batch_size, epoch):
    config = TrainConfig(batch_size=batch_size, num_shards=max(shards, processes))
    steps = steps_of(opened(config, processes=processes, rows=rows_of(count)), epoch)
    assert set().union(*steps) == set(range(count))
    assert sum(map(len, steps)) == count
    assert max(map(len, steps)) <= batch_size
    assert max(map(len, steps)) - min(map(len, steps)) <= 1


@pytest.mark.parametrize("shuffle", ["full", "none"])
def test_consecutive_shards_are_those_of_a_file_of_the_same_rows(shuffle):
    groups = [RowGroup("file", 0, ROWS)]
    config = TrainConfig(batch_size=10, num_shards=3, shuffle=shuffle, partitioning="batch", seed=8)
    (data,) = opened(config, processes=1)
    for epoch in (0, 1):
        expected = batch_row_ids(groups, data.plan, window=1, shuffle=shuffle, seed=8, epoch=epoch)
        assert epoch_of(data, epoch) == [ids.tolist() for ids in expected]


def test_shards_take_rows_in_turn_unless_told_otherwise():
    (data,) = opened(TrainConfig(batch_size=2, num_shards=2, shuffle="none"), processes=1, rows=rows_of(6))
    assert epoch_of(data, 0) == [[0, 1], [2, 3], [4, 5]]
    assert [list(shard) for shard in data.shards] == [[0, 2, 4], [1, 3, 5]]


def test_epochs_and_seeds_have_orders_of_their_own_and_repeat_them():
    (first,), (same,), (other,) = (opened(TrainConfig(batch_size=16, seed=seed), processes=1) for seed in (1, 1, 2))
    orders = [epoch_of(first, 0), epoch_of(first, 1), epoch_of(other, 0)]
    assert orders[0] == epoch_of(same, 0)
    assert all(orders[left] != orders[right] for left, right in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_an_epoch_goes_on_where_the_state_was_taken_on_another_number_of_processes(stop):
    config = TrainConfig(batch_size=16, num_shards=4)
    whole = steps_of(opened(config, processes=1))
    before = opened(config, processes=2)
    for data in before:
        epoch_of(data, 0, stop=stop)
    states = [data.state_dict() for data in before]
    assert states[0] == states[1]
    assert before[0].position == ((0, stop) if stop < 7 else (1, 0))
    after = opened(config, processes=4)
    for data in after:
        data.load_state_dict(states[0])
        assert data.position == before[0].position
    if stop < 7:
        assert steps_of(after) == whole[stop:]
    assert steps_of(after, 1) == steps_of(opened(config, processes=1), 1)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"batch_size": 8}, {"num_shards": 2}, {"shuffle": "none"}, {"partitioning": "batch"}]
)
def test_a_state_of_other_settings_is_refused(changed):
    config = TrainConfig(batch_size=16, num_shards=4)
    (data,) = opened(config, processes=1)
    (other,) = opened(replace(config, **changed), processes=1)
    with pytest.raises(ConfigError, match="must be what they were"):
        other.load_state_dict(data.state_dict())


def test_a_state_of_other_rows_is_refused():
    config = TrainConfig(batch_size=16)
    (data,), (other,) = (opened(config, processes=1, rows=rows) for rows in (rows_of(), rows_of(ROWS + 1)))
    with pytest.raises(ConfigError, match="must be what they were"):
        other.load_state_dict(data.state_dict())


def test_shards_that_are_dealt_anew_are_fed_from_the_next_epoch_on():
    config = TrainConfig(batch_size=16, num_shards=4)
    slow, fast = opened(config, processes=2)
    slow.deal([0])
    fast.deal([1, 2, 3])
    assert steps_of([slow, fast], 1) == steps_of(opened(config, processes=1), 1)
    slow.deal([])
    fast.deal([0, 1, 2, 3])
    assert steps_of([slow, fast], 2) == steps_of(opened(config, processes=1), 2)
    assert epoch_of(slow, 3) == [[] for _ in range(slow.plan.num_steps)]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_validation_row_is_fed_once_and_in_order(processes):
    config = TrainConfig(batch_size=16)
    found: list[int] = []
    for data in opened(config, processes=processes, validation=rows_of(11)):
        with data.open_validation(3) as batches:
            for batch in batches:
                assert 1 <= batch.rows <= 3
                found += ids_of(batch)
    assert found == list(range(11))


@pytest.mark.parametrize("validation", [None, rows_of(0), rows_of(1)])
def test_processes_without_validation_rows_get_no_batches(validation):
    first = opened(TrainConfig(batch_size=16), processes=2, validation=validation)[0]
    with first.open_validation(3) as batches:
        assert list(batches) == []


def test_large_batches_are_gathered_one_by_one():
    rows = TensorRows(torch.arange(64.0)[:, None].repeat(1, 40_000), torch.arange(64))
    (data,) = opened(TrainConfig(batch_size=16), processes=1, rows=rows)
    with data.open_epoch(0) as batches:
        found = list(batches)
    assert [batch.inputs[0].untyped_storage().nbytes() for batch in found] == [16 * 40_000 * 4] * 4
    assert all(torch.equal(batch.inputs[0][:, 0].long(), batch.labels[0]) for batch in found)


def test_rows_without_names_are_numbered():
    rows = TensorRows((torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)), torch.zeros(4), torch.ones(4))
    assert [column.name for column in rows.columns] == ["input_0", "input_1", "label_0", "weight"]
    assert [column.dtype for column in rows.columns] == ["float32", "int64", "float32", "float32"]
    assert len(rows) == 4


def test_a_digest_tells_rows_apart():
    rows = rows_of(5000)
    values = rows.batch.inputs[0].clone()
    values[4992] += 1
    others = [
        TensorRows(values, rows.labels),
        TensorRows(rows.batch.inputs[0].double(), rows.labels),
        TensorRows(rows.batch.inputs[0][:, 0], rows.labels),
        TensorRows(rows.batch.inputs[0], rows.labels, torch.ones(5000)),
        TensorRows(rows.batch.inputs[0].bfloat16(), rows.labels),
    ]
    digests = {one.digest() for one in [TensorRows(rows.batch.inputs[0], rows.labels), *others]}
    assert len(digests) == 1 + len(others)
    assert rows_of(5000).digest() == rows.digest()
    assert rows_of(0).digest() == rows_of(0).digest()


@pytest.mark.parametrize(
    ("inputs", "labels", "weight", "message"),
    [
        (np.zeros((2, 3)), torch.zeros(2), None, "'input_0' is of type ndarray, not a torch.Tensor"),
        (torch.zeros(2), torch.tensor(1.0), None, "'label_0' is a single number"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, None, r"share a name: \['x', 'x'\]"),
        ({"weight": torch.zeros(2)}, torch.zeros(2), torch.zeros(2), "share a name"),
        ((), torch.zeros(2), None, "0 inputs and 1 labels"),
        (torch.zeros(2), {}, None, "1 inputs and 0 labels"),
        (torch.zeros(2), torch.zeros(2, device="meta"), None, "different devices: 'input_0' on cpu, 'label_0' on meta"),
    ],
)
def test_what_is_no_tensor_of_rows_is_refused(inputs, labels, weight, message):
    with pytest.raises(ConfigError, match=message):
        TensorRows(inputs, labels, weight)


@pytest.mark.parametrize(
    ("labels", "weight", "message"),
    [
        (torch.zeros(3), None, "different numbers of rows: 'input_0' 2, 'label_0' 3"),
        (torch.zeros(2), torch.ones(2, 1), r"weight has shape \(2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(labels, weight, message):
    with pytest.raises(DataError, match=message):
        TensorRows(torch.zeros(2), labels, weight)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows to train on"):
        open_rows(rows_of(0), TrainConfig(), rank=0, world_size=1)


def test_another_partitioning_is_refused():
    with pytest.raises(ConfigError, match="partitioning='random' is not for rows in memory"):
        open_rows(rows_of(), TrainConfig(partitioning="random"), rank=0, world_size=1)


def test_more_shards_than_rows_in_a_batch_are_refused():
    with pytest.raises(ConfigError, match="cannot be dealt to numShards=20"):
        open_rows(rows_of(), TrainConfig(batch_size=16, num_shards=20), rank=0, world_size=1)
