"""Checkpoints: exact, whole or not there at all, and never in the way of the training."""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparkdl.checkpoint import (
    AsyncWriter,
    CheckpointSchedule,
    CheckpointStore,
    flatten_state,
    unflatten_state,
)
from sparkdl.errors import CheckpointError, ConfigError
from tests.unit.faulty_files import FaultyFileSystem, Hook, no_fault
from tests.unit.test_storage import SECRETS, S3Server, closed_port, s3_server

__all__ = ["s3_server"]

pytestmark = pytest.mark.timeout(60)

LIMIT = timedelta(seconds=30)
FILES = ("state.safetensors", "state.json", "manifest.json")
Pair = namedtuple("Pair", "a b")


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in types, order of keys and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, dict):
        return [*map(type, one)] == [*map(type, other)] and same([*one.items()], [*other.items()])
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    return bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def through_json(nested: Any) -> Any:
    tensors, structure = flatten_state(nested)
    return unflatten_state(tensors, json.loads(json.dumps(structure)))


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


DENSE = [
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
]
Faults = Callable[[Hook], None]


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Sets what goes wrong on ``faulty:``."""

    def choose(hook: Hook) -> None:
        FaultyFileSystem.before = staticmethod(hook)

    yield choose
    choose(no_fault)


def fail_at(operation: str, name: str, code: int) -> Hook:
    """One operation on whatever has a certain name in its path fails."""

    def hook(found: str, path: str, size: int) -> None:
        if found == operation and name in path:
            raise OSError(code, os.strerror(code))

    return hook


# ---- state as tensors and JSON ---------------------------------------------------------------------------------------
floats = st.floats() | st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack(">d", raw)[0])
texts = st.text(st.characters(exclude_categories=()), max_size=5) | st.sampled_from(["$tensor", "$x", "a.b", "", "0"])
tensors = st.builds(
    random_bytes,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
states = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(state=states, facts=st.dictionaries(texts, floats | texts | st.tuples(st.integers()), max_size=3))
@settings(max_examples=60, deadline=None)
def test_whatever_is_written_is_read_bit_for_bit(state: Any, facts: dict[str, Any]) -> None:
    store = CheckpointStore("memory://checkpoints/property", keep=1)
    written = store.write(1, state, facts)
    assert same(store.load(written), state)
    newest = store.newest()
    assert newest is not None
    assert same(newest.facts, facts)


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)], ids=str)
def test_tensors_of_all_types_and_shapes(folder: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"byte": torch.ones(1, dtype=torch.uint8), "tensor": random_bytes(dtype, shape)}
    store = CheckpointStore(folder)
    assert same(store.load(store.write(1, state, {})), state)


def test_views_parameters_and_lazy_values_are_stored_as_what_they_show(folder: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    complex_ = torch.view_as_complex(base.reshape(4, 3, 2).contiguous())
    state = {
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "offset": base.view(-1)[7:9],
        "expanded": torch.tensor([1.5]).expand(3, 4),
        "conjugate": complex_.conj(),
        "negative": complex_.conj().imag,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gradient": (base.clone().requires_grad_() * 2),
    }
    store = CheckpointStore(folder)
    found = store.load(store.write(1, state, {}))
    assert same(found, state)
    assert not any(tensor.requires_grad for tensor in found.values())
    parameter = nn.Parameter(base)
    assert same(store.load(store.write(2, {"p": parameter}, {})), {"p": base})


def test_tied_tensors_are_stored_once_and_come_back_as_one(folder: str) -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(1000, 8), "out": nn.Linear(8, 1000, bias=False)})
    module["out"].weight = module["embed"].weight
    store = CheckpointStore(folder)
    written = store.write(1, {"module": module.state_dict(), "again": module.state_dict()}, {})
    assert written.nbytes < 1.1 * 1000 * 8 * 4
    found = store.load(written)
    assert same(found["module"]["embed.weight"], module["embed"].weight.detach())
    assert found["module"]["embed.weight"] is found["module"]["out.weight"] is found["again"]["out.weight"]


def test_overlapping_tensors_are_stored_each_with_its_values(folder: str) -> None:
    base = torch.arange(10)
    state = {"head": base[:6], "tail": base[4:], "all": base, "reshaped": base.view(2, 5)}
    state.update(square=base[:9].view(3, 3), turned=base[:9].view(3, 3).T, bytes=base.view(torch.float64))
    store = CheckpointStore(folder)
    assert same(store.load(store.write(1, state, {})), state)


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"0": torch.ones(1), 0: torch.zeros(1)},
        {"__metadata__": torch.ones(1)},
        {"state": torch.ones(1), "": torch.zeros(1)},
        {"\ud800": torch.ones(1), "\\ud800": torch.zeros(1)},
        torch.ones(2),
        [],
        None,
    ],
)
def test_names_of_tensors_do_not_collide(folder: str, state: Any) -> None:
    store = CheckpointStore(folder)
    assert same(store.load(store.write(1, state, {})), state)


def test_dicts_of_other_classes_come_back_as_dict() -> None:
    assert same(through_json(OrderedDict(b=1, a=OrderedDict())), {"b": 1, "a": {}})


def test_an_optimizer_goes_on_where_it_was(folder: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, amsgrad=True)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        module(torch.full((4, 3), float(number))).square().sum().backward()
        optimizer.step()

    store = CheckpointStore(folder)
    module, optimizer = start()
    step(module, optimizer, 1)
    store.write(1, {"module": module.state_dict(), "optimizer": optimizer.state_dict()}, {})
    step(module, optimizer, 2)
    resumed, other = start()
    found = store.load("step-000000000001")
    resumed.load_state_dict(found["module"])
    other.load_state_dict(found["optimizer"])
    step(resumed, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (np.float64(1.0), "float64"),
        (np.zeros(2), "ndarray"),
        (Pair(1, 2), "Pair"),
        (torch.Size([1]), "Size"),
        (object(), "object"),
        (nn.Linear(1, 1), "Linear"),
    ],
)
def test_what_cannot_be_stored_is_named_by_its_path(leaf: Any, found: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^optimizer\.state\.0\.foo is a {found}, but checkpoints hold.*leave it"
    ):
        flatten_state({"optimizer": {"state": {0: {"foo": leaf}}}})
    with pytest.raises(CheckpointError, match=rf"^the state is a {found},"):
        flatten_state(leaf)


@pytest.mark.parametrize("key", [True, None, (1, 2), 1.5, np.int64(1)])
def test_keys_are_text_or_numbers(key: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^a\.1 has the key .*, a {type(key).__name__}, but.*Convert the key"):
        flatten_state({"a": [0, {key: 1}]})


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: torch.eye(2).to_sparse(), r"torch\.sparse_coo"),
        (lambda: torch.empty(2, device="meta"), "without data"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    ],
    ids=["sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore:.*quantize.*deprecated:UserWarning")
def test_tensors_that_are_not_dense_are_refused(build: Callable[[], torch.Tensor], found: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^a\.b is a tensor that is not dense \({found}\)\. Convert it"):
        flatten_state({"a": {"b": build()}})


def test_facts_hold_no_tensors(folder: str) -> None:
    store = CheckpointStore(folder)
    with pytest.raises(CheckpointError, match=r"^facts\.loss is a tensor\. Facts are plain values: use \.tolist\(\)"):
        store.write(1, {}, {"loss": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"^facts\.names is a set"):
        store.write(1, {}, {"names": set()})
    assert store.newest() is None


@pytest.mark.parametrize(
    "structure",
    [
        {"$tensor": "b"},
        {"$tensor": ["a"]},
        {"$tensor": "a", "dtype": "load", "shape": [1]},
        {"$tensor": "a", "dtype": "float64", "shape": [7]},
        {"$tensor": "a", "dtype": "float64"},
        {"$tensor": "a", "dtype": "nothing", "shape": [1]},
        {"$float": "zz"},
        {"$float": "00"},
        {"$tuple": None},
        {"$items": [1]},
        {"$items": [[[], 1]]},
        {"$code": "print()"},
        {1: 2},
    ],
    ids=str,
)
def test_a_structure_that_is_not_ours_is_refused(structure: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^The structure of a checkpoint does not fit.*another version"):
        unflatten_state({"a": torch.zeros(8, dtype=torch.uint8)}, structure)


# ---- files -----------------------------------------------------------------------------------------------------------
def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((100,), float(step)), "step": step}


def written(folder: Path | str, *steps: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(str(folder), keep=keep)
    for step in steps:
        store.write(step, state_of(step), {"epoch": step // 10})
    return store


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("step-*"))


def test_what_is_on_storage(tmp_path: Path) -> None:
    checkpoint = written(tmp_path).write(12, state_of(12), {"epoch": 1, "scores": (1.0, math.inf)})
    place = tmp_path / checkpoint.name
    assert (checkpoint.name, checkpoint.step) == ("step-000000000012", 12)
    assert {path.name for path in place.iterdir()} == set(FILES)
    assert (tmp_path / "latest").read_text() == checkpoint.name
    manifest = json.loads((place / "manifest.json").read_text())["manifest"]
    assert (manifest["format"], manifest["step"], manifest["facts"]["epoch"]) == (1, 12, 1)
    assert manifest["torch"] == torch.__version__
    for file in FILES[:2]:
        content = (place / file).read_bytes()
        assert manifest["files"][file] == {"size": len(content), "sha256": sha256(content).hexdigest()}
    assert checkpoint.nbytes == sum((place / file).stat().st_size for file in FILES[:2])
    assert 0 < checkpoint.seconds < 30
    assert CheckpointStore(str(tmp_path)).newest() == checkpoint


def test_other_tools_read_the_tensors(tmp_path: Path) -> None:
    state = {"flags": torch.tensor([True]), "big": torch.arange(3.0, dtype=torch.float64), "half": torch.ones(3).half()}
    file = tmp_path / CheckpointStore(str(tmp_path)).write(1, state, {}).name / "state.safetensors"
    assert same(dict(sorted(safetensors.torch.load_file(file).items())), dict(sorted(state.items())))
    with safetensors.safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(state)
    content = file.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:begin])
    assert all((begin + header[name]["data_offsets"][0]) % tensor.element_size() == 0 for name, tensor in state.items())


def test_many_pieces_make_one_file(tmp_path: Path) -> None:
    state = {"a": torch.rand(5 << 20), "b": torch.rand(17)}
    store = CheckpointStore(str(tmp_path))
    assert same(store.load(store.write(1, state, {})), state)


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "step-000000000001").mkdir()
    (tmp_path / "step-000000000001" / "state.json").write_text("half")
    store = CheckpointStore(str(tmp_path))
    found = [store.write(1, state_of(number), {"number": number}) for number in range(3)]
    assert [checkpoint.name for checkpoint in found] == ["step-000000000001" + end for end in (".1", ".2", ".3")]
    assert store.newest() == found[-1]
    assert [store.load(checkpoint)["step"] for checkpoint in found] == [0, 1, 2]


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    store = written(tmp_path, 9, 10, 1_000_000_000_000, 2)
    newest = store.newest()
    assert newest is not None
    assert (newest.name, newest.step) == ("step-1000000000000", 1_000_000_000_000)


def test_without_any_there_is_no_newest(tmp_path: Path) -> None:
    assert CheckpointStore(str(tmp_path / "nowhere" / "run")).newest() is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "model.pt").touch()
    (tmp_path / "latest").write_text("step-000000000007")
    (tmp_path / "step-000000000004").mkdir()
    (tmp_path / "step-000000000005").touch()
    assert CheckpointStore(str(tmp_path)).newest() is None
    with pytest.raises(
        CheckpointError, match=r"^Checkpoint step-000000000007 cannot be read from '.*': manifest\.json is m"
    ):
        CheckpointStore(str(tmp_path)).load("step-000000000007")
    with pytest.raises(CheckpointError, match=r"^'\.\./x' is not the name of a checkpoint at '.*'\. Names look like"):
        CheckpointStore(str(tmp_path)).load("../x")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite_manifest(place: Path, **changes: Any) -> None:
    """A manifest whose own digest is right."""
    body = {**json.loads((place / "manifest.json").read_text())["manifest"], **changes}
    text = {"manifest": body, "sha256": sha256(json.dumps(body).encode()).hexdigest()}
    (place / "manifest.json").write_text(json.dumps(text))


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda place: flip(place / "state.safetensors", -1), "state.safetensors does not have the SHA-256"),
    (lambda place: flip(place / "state.safetensors", 3), "state.safetensors does not have the SHA-256"),
    (lambda place: flip(place / "state.json", 2), "state.json does not have the SHA-256"),
    (lambda place: (place / "state.json").unlink(), "state.json is missing"),
    (lambda place: os.truncate(place / "state.safetensors", 99), r"state.safetensors has 99 bytes instead of \d+"),
    (lambda place: os.truncate(place / "state.safetensors", 9999), "state.safetensors has 9999 bytes"),
    (lambda place: os.truncate(place / "manifest.json", 0), "manifest.json is damaged"),
    (lambda place: os.truncate(place / "manifest.json", 70), "manifest.json is damaged"),
    (lambda place: (place / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    (lambda place: (place / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    (lambda place: (place / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    (lambda place: rewrite_manifest(place, step=19), "manifest.json is damaged"),
    (lambda place: rewrite_manifest(place, files={}), "manifest.json is damaged"),
    (lambda place: rewrite_manifest(place, format=2), "its format is 2, this version of sparkdl reads 1"),
    (lambda place: (place / "manifest.json").unlink(), "manifest.json is missing"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGES, ids=[str(number) for number in range(len(DAMAGES))])
def test_a_damaged_one_is_passed_over_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], why: str
) -> None:
    store = written(tmp_path, 10, 20)
    damage(tmp_path / "step-000000000020")
    with caplog.at_level(logging.INFO, "sparkdl.checkpoint"):
        newest = store.newest()
    assert newest is not None
    assert newest.step == 10
    assert store.load(newest)["step"] == 10
    (record,) = caplog.records
    if "is missing" in why and "manifest" in why:
        assert (record.levelno, record.getMessage().count("is incomplete")) == (logging.INFO, 1)
    else:
        assert record.levelno == logging.WARNING
        assert re.search(rf"^Checkpoint step-0+20 at {tmp_path} is not used: {why}", record.getMessage())
    with pytest.raises(CheckpointError, match=rf"^Checkpoint step-0+20 cannot be read from '.*': {why}.*Use an older"):
        store.load("step-000000000020")


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    intact = store.write(1, {}, {"epoch": 3})
    manifest = tmp_path / intact.name / "manifest.json"
    for position in range(manifest.stat().st_size):
        flip(manifest, position)
        assert store.newest() in (None, intact), position  # intact: a space that became another one
        flip(manifest, position)
    assert store.newest() == intact


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    store = written(tmp_path, 1, 2, 3)
    for step, file in [(2, "state.json"), (3, "state.safetensors")]:
        place = tmp_path / f"step-{step:012d}"
        content = pickle.dumps(Payload())
        (place / file).write_bytes(content)
        (place / "state.pt").write_bytes(content)
        files = json.loads((place / "manifest.json").read_text())["manifest"]["files"]
        files[file] = {"size": len(content), "sha256": sha256(content).hexdigest()}
        rewrite_manifest(place, files=files)
        with pytest.raises(CheckpointError, match=rf"^Checkpoint step-0+{step} cannot be read from"):
            store.load(f"step-{step:012d}")
    assert not (tmp_path / "executed").exists()


# ---- retention -------------------------------------------------------------------------------------------------------
def test_the_newest_are_kept(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert names(tmp_path) == ["step-000000000004", "step-000000000005"]
    assert (tmp_path / "latest").read_text() == "step-000000000005"


def test_what_is_not_complete_is_removed_and_what_is_not_ours_is_left(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    (tmp_path / "step-000000000001" / "manifest.json").unlink()
    (tmp_path / "step-000000000009").mkdir()
    (tmp_path / "step-000000000009" / "state.json").touch()
    os.truncate(tmp_path / "step-000000000002" / "manifest.json", 5)
    (tmp_path / "step-best").mkdir()
    (tmp_path / "notes").write_text("mine")
    written(tmp_path, 3, 4)
    rewrite_manifest(tmp_path / "step-000000000003", format=2)
    written(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000000000003", "step-000000000005", "step-best"]
    assert (tmp_path / "notes").exists()


def test_the_last_good_one_stays_although_newer_ones_are_damaged(tmp_path: Path, faults: Faults) -> None:
    written(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip(tmp_path / f"step-{step:012d}" / "state.safetensors", -1)
    store = CheckpointStore(f"faulty://{tmp_path}", keep=1)
    resumed = store.newest()
    assert resumed is not None
    assert resumed.step == 1
    faults(fail_at("open", "manifest.json", errno.EIO))
    with pytest.raises(CheckpointError, match=r"^The checkpoint of step 2 cannot be written to.*Input/output error"):
        store.write(2, state_of(2), {})
    faults(no_fault)
    assert store.newest() == resumed
    assert store.load(resumed)["step"] == 1
    again = store.write(2, state_of(2), {})
    assert names(tmp_path) == [again.name] == ["step-000000000002.1"]
    assert store.newest() == again


def test_one_just_written_is_kept_although_older_runs_got_further(tmp_path: Path) -> None:
    written(tmp_path, 1, 8, 9)
    store = CheckpointStore(str(tmp_path), keep=2)
    store.write(2, state_of(2), {})
    assert names(tmp_path) == ["step-000000000002", "step-000000000008", "step-000000000009"]


def test_an_old_one_that_cannot_be_judged_now_is_not_removed(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 1, 2, 3)
    store = CheckpointStore(f"faulty://{tmp_path}", keep=1)
    for operation in ("list", "read"):
        faults(fail_at(operation, "step-000000000002", errno.EIO))
        store.write(4, state_of(4), {})
    assert {"step-000000000001", "step-000000000002"} < set(names(tmp_path))
    assert [record.getMessage().count("were not removed: [Errno 5]") for record in caplog.records] == [1, 1]
    faults(no_fault)
    store.write(5, state_of(5), {})
    assert names(tmp_path) == ["step-000000000005"]


@pytest.mark.parametrize("operation", ["delete", "open"])
def test_trouble_after_the_manifest_does_not_matter(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture, operation: str
) -> None:
    written(tmp_path, 1, 2)
    store = CheckpointStore(f"faulty://{tmp_path}", keep=1)
    faults(fail_at(operation, "step-000000000001" if operation == "delete" else "latest", errno.EACCES))
    checkpoint = store.write(3, state_of(3), {})
    assert re.search(r"Old checkpoints at .* were not removed: .*Permission denied", caplog.text)
    assert store.newest() == checkpoint
    faults(no_fault)
    store.write(4, state_of(4), {})
    assert names(tmp_path) == ["step-000000000004"]


def test_a_process_that_is_killed_at_any_operation_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.checkpoint_crashes", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=55,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {operation.split()[0] for operation, _, _ in outcomes} == {"mkdir", "open", "write", "close", "delete"}
    for operation, before, found in outcomes:
        after = operation.startswith("delete") or "latest" in operation
        assert found == before + after, operation


# ---- stores that fail ------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, faults: Faults) -> None:
    intact = written(tmp_path, 1).newest()
    store = CheckpointStore(f"faulty://{tmp_path}", keep=1)
    for number in itertools.count(1):
        writes = itertools.count(1)

        def full(operation: str, path: str, size: int, writes: Iterator[int] = writes, last: int = number) -> None:
            if operation == "write" and next(writes) >= last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        faults(full)
        try:
            store.write(2, state_of(2), {})
        except CheckpointError as error:
            assert re.search(  # noqa: PT017  the writes after the manifest do not raise
                r"^The checkpoint of step 2 cannot be written to 'faulty:.*No space left on device\. Check.*space\.$",
                str(error),
            )
        else:
            break
        assert names(tmp_path) == ["step-000000000001"]
        assert store.newest() == intact
    assert number == 5  # header, tensors, structure and manifest; then `latest`
    assert names(tmp_path) == ["step-000000000001", "step-000000000002"]


def test_a_limit_of_the_operating_system_leaves_what_was_there(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, torch\n"
        "from sparkdl.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1])\n"
        "good = store.write(1, torch.ones(10), {})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    store.write(2, torch.ones(100_000), {})\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "assert store.newest() == good\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^The checkpoint of step 2 cannot be written to .*File too large", done.stdout)
    assert names(tmp_path) == ["step-000000000001"]


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    store = CheckpointStore(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"^The checkpoint of step 1 cannot be written to '.*/run': .*Check that"):
        store.write(1, {}, {})
    with pytest.raises(CheckpointError, match=r"^Checkpoints cannot be looked for at '.*/run': .*Check that"):
        store.newest()


def test_a_checkpoint_that_cannot_be_read_now_is_passed_over_but_not_given_up(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 1, 2)
    store = CheckpointStore(f"faulty://{tmp_path}")
    faults(fail_at("read", "step-000000000002/state.safetensors", errno.EIO))
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    assert re.search(r"step-0+2 at .* is not used: \[Errno 5\] Input/output error\.$", caplog.messages[0])
    faults(no_fault)
    store.write(3, state_of(3), {})
    assert len(names(tmp_path)) == 3


def test_a_store_that_goes_away_is_not_taken_for_an_empty_one(tmp_path: Path, faults: Faults) -> None:
    written(tmp_path, 1, 2)
    store = CheckpointStore(f"faulty://{tmp_path}")

    def silent(operation: str, path: str, size: int) -> None:
        raise TimeoutError("the store does not answer")

    faults(silent)
    expected = r"^Checkpoints cannot be looked for at 'faulty:.*': the store does not answer\. Check that"
    with pytest.raises(CheckpointError, match=expected):
        store.newest()
    gone = False

    def gone_later(operation: str, path: str, size: int) -> None:
        nonlocal gone
        gone = gone or (operation, Path(path).name) == ("read", "state.safetensors")
        if gone:
            raise RuntimeError("no answer")

    faults(gone_later)
    with pytest.raises(CheckpointError, match=r"^Checkpoints cannot be looked for at .*: RuntimeError: no answer"):
        store.newest()


def test_an_error_that_repeats_a_secret_is_told_without_it(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(f"faulty://{tmp_path}", storage_options={"token": SECRETS[1]})
    store.write(1, {}, {})

    def talkative(operation: str, path: str, size: int) -> None:
        if operation in ("read", "delete") or "latest" in path or "000002" in path:
            raise PermissionError(f"token {SECRETS[1]} has expired")

    faults(talkative)
    assert store.newest() is None
    with pytest.raises(CheckpointError, match=r"^The checkpoint of step 2 .*: token \*\*\* has expired\. Check"):
        store.write(2, {}, {})
    store.write(3, {}, {})
    assert [text.count("token *** has expired.") for text in caplog.messages] == [1, 1]
    assert SECRETS[1] not in caplog.text + repr(store)


def test_a_file_system_that_nobody_knows_is_a_matter_of_settings() -> None:
    store = CheckpointStore("nosuch://host/run")
    for use in (lambda: store.newest(), lambda: store.write(1, {}, {})):
        with pytest.raises(ConfigError, match=r"^'nosuch://host/run' is on a file system that"):
            use()


# ---- S3 and other stores ---------------------------------------------------------------------------------------------
def test_checkpoints_on_s3(s3_server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    url = f"s3a://{s3_server.bucket}/checkpoints/run 1"
    store = CheckpointStore(url, storage_options=s3_server.options, keep=2)
    assert store.newest() is None
    for step in (1, 2, 3):
        store.write(step, state_of(step), {"epoch": 0})
    newest = store.newest()
    assert newest is not None
    assert newest.name == "step-000000000003"
    assert same(store.load(newest), state_of(3))
    file_system, root = store._open()
    assert store._names(file_system, root) == ["step-000000000003", "step-000000000002"]
    with file_system.open_output_stream(f"{root}/{newest.name}/state.json") as sink:
        sink.write(b"{}")
    file_system.delete_file(f"{root}/{newest.name}/state.safetensors")
    resumed = CheckpointStore(url, storage_options=s3_server.options, keep=2)
    older = resumed.newest()
    assert older is not None
    assert older.name == "step-000000000002"
    again = resumed.write(3, state_of(3), {})
    assert again.name == "step-000000000003.1"
    assert resumed._names(file_system, root) == ["step-000000000003.1", "step-000000000002"]
    for text in (repr(store), store.url, caplog.text):
        assert not any(secret in text for secret in SECRETS)
    assert "is not used" in caplog.text


def test_an_s3_that_does_not_answer_is_told_in_one_sentence_without_secrets() -> None:
    with closed_port() as port:
        options = {
            "access_key": SECRETS[0],
            "secret_key": SECRETS[1],
            "region": "eu-west-1",
            "endpoint_override": f"http://127.0.0.1:{port}",
        }
        store = CheckpointStore("s3://bucket/run", storage_options=options)
        for use in (store.newest, lambda: store.write(1, {}, {}), lambda: store.load("step-000000000001")):
            with pytest.raises(CheckpointError, match=r"'s3://bucket/run': .*\. Check that the directory") as caught:
                use()
            assert not any(secret in str(caught.value) for secret in SECRETS)
            assert "\n" not in str(caught.value)
            assert caught.value.__cause__ is None


def test_a_password_in_a_url_is_not_shown() -> None:
    store = CheckpointStore("ftp://user:wordthatissecret@host/run", keep=2)
    assert repr(store) == "CheckpointStore('ftp://user:***@host/run', keep=2)"
    assert repr(CheckpointStore("abfss://box@account/run")) == "CheckpointStore('abfss://box@account/run', keep=3)"
    assert repr(CheckpointStore("s3://[x/run")) == "CheckpointStore('s3://[x/run', keep=3)"


@pytest.mark.parametrize("scheme", ["file:", "file://", "memory:/"])
def test_checkpoints_by_url(folder: str, scheme: str) -> None:
    store = CheckpointStore(f"{scheme}{folder}/run/", keep=1)
    for step in (1, 2):
        checkpoint = store.write(step, state_of(step), {})
    assert store.newest() == checkpoint
    assert same(store.load(checkpoint.name), state_of(2))
    with pytest.raises(CheckpointError, match="manifest"):
        store.load("step-000000000001")


# ---- beside the training ---------------------------------------------------------------------------------------------
class Valve:
    """Holds every opening for writing while it is closed; a hook of the faulty file system."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, operation: str, path: str, size: int) -> None:
        if operation == "open":
            self.reached.set()
            assert self.open.wait(50)


@pytest.fixture
def valve(faults: Faults) -> Iterator[Valve]:
    made = Valve()
    faults(made)
    yield made
    made.open.set()
    for thread in threading.enumerate():
        if thread.name == "sparkdl-checkpoint":
            thread.join(30)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sparkdl-checkpoint"]


def test_what_changes_after_save_is_not_written(tmp_path: Path, valve: Valve) -> None:
    store = CheckpointStore(f"faulty://{tmp_path}")
    shared = torch.arange(6.0)
    state = {"a": shared, "turned": shared.view(2, 3).T, "rates": [0.1], "wide": torch.ones(2, dtype=torch.complex128)}
    facts = {"losses": [1.0]}
    expected = through_json(state)
    expected = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in expected.items()}
    with AsyncWriter(store, timeout=LIMIT) as writer:
        assert writer.save(1, state, facts)
        assert valve.reached.wait(30)
        shared.fill_(-1)
        state["wide"].zero_()
        state["rates"].append(0.2)
        facts["losses"].append(2.0)
        valve.open.set()
    (checkpoint,) = writer.written
    assert same(store.load(checkpoint), expected)
    assert checkpoint.facts == {"losses": [1.0]}


def test_one_at_a_time_and_the_memory_is_used_again(tmp_path: Path, valve: Valve) -> None:
    store = CheckpointStore(f"faulty://{tmp_path}")
    assert threads() == []
    with AsyncWriter(store, timeout=LIMIT) as writer:
        assert (threads(), writer.busy) == ([], False)
        assert writer.save(1, state_of(1), {})
        assert (threads(), writer.busy) == (["sparkdl-checkpoint"], True)
        assert not writer.save(2, {"not even": {"looked at"}}, {})
        valve.open.set()
        writer.wait()
        assert not writer.busy
        first = writer._buffers["weight"]
        assert writer.save(3, state_of(3), {})
        writer.wait()
        assert writer._buffers["weight"] is first
        assert writer.save(4, {"weight": torch.ones(2, 2)}, {})
        assert 0 < writer.stalled_seconds < 50
    assert threads() == []
    assert [checkpoint.step for checkpoint in writer.written] == [1, 3, 4]
    assert [store.load(checkpoint)["weight"].flatten()[0].item() for checkpoint in writer.written] == [1, 3, 1]
    assert writer.failures == []


def test_a_write_that_fails_does_not_stop_the_training(
    tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(f"faulty://{tmp_path}", keep=1)
    with AsyncWriter(store, timeout=LIMIT) as writer:
        writer.save(1, state_of(1), {})
        writer.wait()
        faults(fail_at("close", "state.safetensors", errno.ENOSPC))
        assert writer.save(2, state_of(2), {})
        writer.wait()
        assert names(tmp_path) == ["step-000000000001"]
        assert store.newest() == writer.written[0]
        faults(no_fault)
        assert writer.save(3, state_of(3), {})
    assert names(tmp_path) == ["step-000000000003"]
    assert [checkpoint.step for checkpoint in writer.written] == [1, 3]
    (failure,) = writer.failures
    assert re.search(
        r"^The checkpoint of step 2 cannot be written to 'faulty:.*': .*No space left.* The training goes on\.$",
        failure,
    )
    assert caplog.messages == [failure]


def test_a_store_that_does_not_exist_does_not_stop_the_training() -> None:
    with AsyncWriter(CheckpointStore("nosuch://host/run"), timeout=LIMIT) as writer:
        writer.save(1, state_of(1), {})
    assert re.search(r"^'nosuch://host/run' is on a file system", writer.failures[0])


def test_state_that_cannot_be_stored_is_told_at_once(folder: str) -> None:
    with AsyncWriter(CheckpointStore(folder), timeout=LIMIT) as writer:
        with pytest.raises(CheckpointError, match=r"^module\.extra is a set"):
            writer.save(1, {"module": {"extra": set()}}, {})
        assert writer.save(1, {}, {})
    assert len(writer.written) == 1


def test_a_state_for_which_memory_does_not_suffice_does_not_stop_the_training(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with AsyncWriter(CheckpointStore(folder), timeout=LIMIT) as writer:
        assert not writer.save(1, {"huge": torch.ones(1).expand(1 << 45)}, {})
        assert not writer.busy
        assert writer.save(2, state_of(2), {})
    (failure,) = writer.failures
    assert re.search(
        r"^The checkpoint of step 1 cannot be copied to host memory: .*alloc.*\. The training goes on", failure
    )
    assert caplog.messages == [failure]
    assert [checkpoint.step for checkpoint in writer.written] == [2]


def test_a_write_that_takes_too_long_is_told(tmp_path: Path, valve: Valve, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(f"faulty://{tmp_path}")
    expected = rf"^The checkpoint of step 7 was not written to 'faulty://{tmp_path}' in 0\.2 seconds\. Allow more for"
    with AsyncWriter(store, timeout=timedelta(seconds=0.2)) as writer:
        writer.save(7, state_of(7), {})
        with pytest.raises(CheckpointError, match=expected):
            writer.wait()
        with pytest.raises(CheckpointError, match=r"in 0\.3 seconds"):
            writer.wait(timedelta(seconds=0.3))
        assert not writer.save(8, state_of(8), {})
        assert not writer.save(9, state_of(9), {})
        (failure,) = writer.failures
        assert re.search(expected, failure)
        assert len(caplog.messages) == 1
        valve.open.set()
        writer.wait(LIMIT)
        assert writer.save(10, state_of(10), {})
        writer.wait(LIMIT)
    assert [checkpoint.step for checkpoint in writer.written] == [7, 10]


def test_leaving_with_a_write_that_takes_too_long_raises(tmp_path: Path, valve: Valve) -> None:
    writer = AsyncWriter(CheckpointStore(f"faulty://{tmp_path}"), timeout=timedelta(seconds=0.1))
    with pytest.raises(CheckpointError, match=r"step 1 was not written to .* in 0\.1 seconds"), writer:
        writer.save(1, state_of(1), {})
    valve.open.set()


def test_an_exception_does_not_wait_for_a_slow_store(tmp_path: Path, valve: Valve) -> None:
    writer = AsyncWriter(CheckpointStore(f"faulty://{tmp_path}"), timeout=LIMIT)
    began = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), writer:
        writer.save(1, state_of(1), {})
        raise ZeroDivisionError
    assert time.monotonic() - began < 10
    assert writer.busy


def test_an_exception_lets_a_quick_write_end(folder: str) -> None:
    with contextlib.suppress(ZeroDivisionError), AsyncWriter(CheckpointStore(folder), timeout=LIMIT) as writer:
        writer.save(1, state_of(1), {})
        writer.wait()
        raise ZeroDivisionError
    assert (len(writer.written), threads()) == (1, [])


# ---- when ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("interval", "seconds", "due"),
    [(None, None, [5, 10]), (3, None, [3, 6, 9]), (3, 60.0, [3, 6, 9]), (None, 60.0, []), (20, None, [])],
)
def test_steps_after_which_a_checkpoint_is_due(interval: int | None, seconds: float | None, due: list[int]) -> None:
    schedule = CheckpointSchedule(interval, seconds, steps_per_epoch=5)
    assert [step for step in range(11) if schedule.by_step(step)] == due


def test_seconds_after_which_a_checkpoint_is_due() -> None:
    schedule = CheckpointSchedule(None, 60.0, 5)
    assert [schedule.by_time(now, 100.0) for now in (100.0, 159.9, 160.0, 1e9)] == [False, False, True, True]
    assert not CheckpointSchedule(3, None, 5).by_time(1e9, 0.0)
