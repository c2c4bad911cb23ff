"""Training state on storage: written so that a crash at any moment leaves a good checkpoint, read only if intact.

A run's checkpoints lie in a directory of their own, each in a directory that is never written twice:

    latest                      name of the newest one, for people; nothing reads it
    step-000000000012/
        state.safetensors       the tensors
        state.json              what they are part of: dicts, lists, numbers
        manifest.json           last: step, facts, size and SHA-256 of both files, and a SHA-256 of its own

Without a whole manifest there is no checkpoint, so no file system needs a rename. Deleting begins with the manifest.
Nothing is pickled, and reading executes no code. There is one writer per run; any number of ranks may read.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import posixpath
import queue
import re
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import urlsplit

import safetensors.torch
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType, PyFileSystem
from torch import Tensor

from sparkdl.errors import CheckpointError, ConfigError
from sparkdl.storage import FileSystems, reason, redact

__all__ = ["AsyncWriter", "Checkpoint", "CheckpointSchedule", "CheckpointStore", "flatten_state", "unflatten_state"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_TENSORS, _STRUCTURE, _MANIFEST, _LATEST = "state.safetensors", "state.json", "manifest.json", "latest"
_NAME = re.compile(r"step-(\d{12,})(?:\.(\d+))?")
_PIECE = 16 << 20  # bytes of one read or write
_GRACE = 1.0  # seconds for the last write when the process is about to die
# Types that safetensors has had from the beginning; tensors of others are stored as their bytes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


# ---- state as tensors and JSON ---------------------------------------------------------------------------------------
def flatten_state(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dicts, lists and tuples, and all the rest as JSON values.

    Floats are kept bit for bit. A tensor that appears twice (tied weights) is there once. Nothing is copied unless it
    has to be: the tensors are detached views, of any strides and on any device.

    Args:
        nested: Dicts (also of a subclass, such as `OrderedDict`; they come back as dict) with str or int keys, lists,
            tuples, dense tensors and parameters, bool, int, float, str and None.

    Returns:
        Tensors by name, all of types that safetensors has, and the structure for `unflatten_state`.

    Raises:
        CheckpointError: Anything else, named by its path.
    """
    flattening = _Flattening()
    structure = flattening.encode(nested, "")
    return flattening.tensors, structure


def unflatten_state(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """What `flatten_state` was given; parameters come back as tensors.

    Args:
        tensors: Tensors by name.
        structure: As `flatten_state` returned it, or after a round trip through JSON.

    Raises:
        CheckpointError: The two do not belong together, or are not from `flatten_state`.
    """
    try:
        return _decode(structure, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"The structure of a checkpoint does not fit its tensors: {type(error).__name__}: {reason(error)}. "
            "Was it written by another version of sparkdl?"
        ) from error


class _Flattening:
    """Collects tensors on the way through nested values."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._encoded: dict[tuple[Any, ...], dict[str, Any]] = {}

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind in (list, tuple):
            items = [self.encode(item, _join(path, index)) for index, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if isinstance(value, dict):
            for key in value:
                if type(key) not in (str, int):
                    raise CheckpointError(
                        f"{path or 'the state'} has the key {key!r}, a {type(key).__name__}, but checkpoints hold "
                        "dicts with str or int keys. Convert the key."
                    )
            encoded = [[key, self.encode(item, _join(path, key))] for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(encoded) if plain else {"$items": encoded}
        if kind in (Tensor, torch.nn.Parameter):
            return self._tensor(value, path)
        raise CheckpointError(
            f"{path or 'the state'} is a {kind.__name__}, but checkpoints hold dicts, lists, tuples, tensors, numbers, "
            "text and None. Convert it, or leave it out of the state."
        )

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            found = "without data" if tensor.is_meta else "quantized" if tensor.is_quantized else f"{tensor.layout}"
            raise CheckpointError(
                f"{path or 'the state'} is a tensor that is not dense ({found}). Convert it to a plain one."
            )
        # Not id(): two calls of state_dict(), or two names in it, give two objects for one tensor.
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), *view)
        if place not in self._encoded:
            # A name for people and other tools; text that UTF-8 cannot hold is escaped.
            name = (path or "state").encode("utf-8", "backslashreplace").decode()
            while name in self.tensors or name == "__metadata__":
                name += "'"
            values = tensor.detach().resolve_conj().resolve_neg()
            encoded: dict[str, Any] = {"$tensor": name}
            if values.dtype not in _DTYPES:
                encoded.update(dtype=str(values.dtype).removeprefix("torch."), shape=list(values.shape))
                values = values.contiguous().reshape(-1).view(torch.uint8)
            self.tensors[name] = values
            self._encoded[place] = encoded
        return self._encoded[place]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    match tag:
        case None:
            return {key: _decode(item, tensors) for key, item in value.items()}
        case "$float":
            return struct.unpack(">d", bytes.fromhex(value[tag]))[0]
        case "$tuple":
            return tuple(_decode(item, tensors) for item in value[tag])
        case "$items":
            return {key: _decode(item, tensors) for key, item in value[tag]}
        case "$tensor":
            tensor = tensors[value[tag]]
            if "dtype" not in value:
                return tensor
            dtype = getattr(torch, value["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{value['dtype']!r} is no type of tensors")
            # A clone, because the bytes may lie where no element of this type can begin.
            return tensor.clone().view(dtype).reshape(value["shape"])
        case _:
            raise ValueError(f"{tag!r} is not known")


def _encode_facts(facts: Mapping[str, Any]) -> Any:
    flattening = _Flattening()
    encoded = flattening.encode(dict(facts), "facts")
    if flattening.tensors:
        raise CheckpointError(f"{next(iter(flattening.tensors))} is a tensor. Facts are plain values: use .tolist().")
    return encoded


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The pieces of a file as https://huggingface.co/docs/safetensors lays it out; contiguous CPU tensors not copied.

    The library's own ``save`` copies everything while it holds the interpreter's lock: the training would stand still.
    """
    ordered = sorted(tensors.items(), key=lambda named: -named[1].element_size())  # so that every tensor lies aligned
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            for piece in tensor.cpu().contiguous().reshape(-1).view(torch.uint8).split(_PIECE):
                yield piece.numpy()


# ---- checkpoints in a directory --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete checkpoint."""

    name: str
    """Its directory."""

    step: int
    """Optimizer steps that had been finished."""

    facts: Mapping[str, Any]
    """What the writer told about it, besides the state."""

    nbytes: int
    """Size of the state."""

    seconds: float
    """How long its state took to write."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    checkpoint: Checkpoint
    files: Mapping[str, tuple[int, str]]  # size and SHA-256


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


class _IncompleteError(_DamagedError):
    """There is no manifest: its writer died."""


class _ForeignError(_DamagedError):
    """A whole one, of another version of sparkdl."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        url: A directory of the run's own, on any file system of `sparkdl.storage`.
        storage_options: As for `sparkdl.storage.open_file_system`.
        keep: Complete checkpoints that are kept, the newest ones; at least 1.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None, keep: int = 3) -> None:
        self._url = url
        self._keep = keep
        self._systems = FileSystems(storage_options)
        self._damaged: set[str] = set()
        self._secrets = {**(storage_options or {}), "password in the URL": _password(url)}

    def __repr__(self) -> str:
        return f"CheckpointStore({self.url!r}, keep={self._keep})"

    @property
    def url(self) -> str:
        """The directory, without a password."""
        return redact(self._url, self._secrets)

    def write(self, step: int, state: Any, facts: Mapping[str, Any]) -> Checkpoint:
        """Write a checkpoint, then remove those that are not kept any more and what dead writers left.

        Dense CPU tensors are written from where they are; others pass through host memory one by one.

        Args:
            step: Optimizer steps finished.
            state: As for `flatten_state`.
            facts: Plain values, as `flatten_state` takes them, but no tensors.

        Raises:
            CheckpointError: The state holds what cannot be stored, or the store cannot be written to. What was half
                written is removed where possible; the checkpoints before are untouched.
            ConfigError: The URL's file system cannot be opened.
        """
        tensors, structure = flatten_state(state)
        return self._write(step, tensors, structure, _encode_facts(facts))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files all have the size and SHA-256 that its manifest says; None without any.

        Every newer one that is damaged is logged as a warning.

        Raises:
            CheckpointError: The store cannot be reached.
            ConfigError: The URL's file system cannot be opened.
        """
        task = "Checkpoints cannot be looked for at"
        with self._reporting(task):
            file_system, root = self._open()
            names = self._names(file_system, root)
        for name in names:
            try:
                manifest = _read_manifest(file_system, root, name)
                for file in manifest.files:
                    _read_file(file_system, f"{root}/{name}", file, manifest)
            except _IncompleteError:
                logger.info("Checkpoint %s at %s is incomplete: its writer died.", name, self.url)
            except _DamagedError as damage:
                self._damaged.add(name)
                logger.warning("Checkpoint %s at %s is not used: %s.", name, self.url, damage)
            except Exception as error:
                # Either this checkpoint cannot be read or the whole store is gone, which asking for the names tells.
                with self._reporting(task):
                    self._names(file_system, root)
                logger.warning("Checkpoint %s at %s is not used: %s.", name, self.url, self._reason(error))
            else:
                return manifest.checkpoint
        return None

    def load(self, checkpoint: Checkpoint | str) -> Any:
        """The state of a checkpoint, with its tensors on the CPU; files are verified as they are read, once.

        Args:
            checkpoint: It or its name.

        Raises:
            CheckpointError: It is not there, is damaged, or the store cannot be reached.
            ConfigError: The URL's file system cannot be opened.
        """
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{name!r} is not the name of a checkpoint at {self.url!r}. Names look like 'step-000000000012'."
            )
        with self._reporting(f"Checkpoint {name} cannot be read from"):
            file_system, root = self._open()
            manifest = _read_manifest(file_system, root, name)
            found: dict[str, bytes] = {}
            for file in manifest.files:
                kept = io.BytesIO()
                _read_file(file_system, f"{root}/{name}", file, manifest, kept)
                found[file] = kept.getvalue()
            structure = json.loads(found.pop(_STRUCTURE))
            return unflatten_state(safetensors.torch.load(found.pop(_TENSORS)), structure)

    def _write(self, step: int, tensors: Mapping[str, Tensor], structure: Any, facts: Any) -> Checkpoint:
        started = time.monotonic()
        with self._reporting(f"The checkpoint of step {step} cannot be written to"):
            file_system, root = self._open()
            name = _free_name(step, self._names(file_system, root))
            put = functools.partial(_put, file_system, f"{root}/{name}")
            try:
                file_system.create_dir(f"{root}/{name}", recursive=True)
                files = {
                    _TENSORS: put(_TENSORS, _safetensors(tensors)),
                    _STRUCTURE: put(_STRUCTURE, [json.dumps(structure).encode()]),
                }
                checkpoint = Checkpoint(
                    name, step, _decode(facts, {}), sum(size for size, _ in files.values()), time.monotonic() - started
                )
                put(_MANIFEST, [_manifest_text(checkpoint, facts, files)])
            except BaseException:
                with contextlib.suppress(Exception):
                    _remove(file_system, root, name)
                raise
        try:
            _put(file_system, root, _LATEST, [name.encode()])
            self._retire(file_system, root, name)
        except Exception as error:
            logger.warning("Old checkpoints at %s were not removed: %s.", self.url, self._reason(error))
        return checkpoint

    def _retire(self, file_system: FileSystem, root: str, just_written: str) -> None:
        """Remove what is not kept. Stops at the first checkpoint that it cannot judge."""
        complete: list[str] = []
        garbage: list[str] = []
        for name in self._names(file_system, root):
            try:
                _read_manifest(file_system, root, name)
            except _ForeignError:
                continue
            except _DamagedError:
                garbage.append(name)
            else:
                (garbage if name in self._damaged else complete).append(name)
        for name in garbage + complete[self._keep :]:
            # After a resume from an older checkpoint, names of higher steps may still be there.
            if name != just_written:
                _remove(file_system, root, name)

    def _open(self) -> tuple[FileSystem, str]:
        file_system, root = self._systems.open(self._url)
        return file_system, root.rstrip("/")

    def _names(self, file_system: FileSystem, root: str) -> list[str]:
        """Names of all checkpoints and beginnings of such, the newest first."""
        found = [match for name in _list(file_system, root) if (match := _NAME.fullmatch(name))]
        return [match[0] for match in sorted(found, key=lambda m: (int(m[1]), int(m[2] or 0)), reverse=True)]

    @contextlib.contextmanager
    def _reporting(self, task: str) -> Iterator[None]:
        """File systems raise errors of many kinds; from here on they are of one, in one sentence without secrets."""
        try:
            yield
        except (CheckpointError, ConfigError):
            raise
        except _DamagedError as damage:
            raise CheckpointError(
                f"{task} {self.url!r}: {damage}. Use an older checkpoint; the newest that is intact can be asked for."
            ) from None
        except Exception as error:
            raise CheckpointError(
                f"{task} {self.url!r}: {self._reason(error)}. Check that the directory can be reached and written to "
                "from here, and that it has space."
            ) from None

    def _reason(self, error: Exception) -> str:
        text = reason(error, self._secrets)
        return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


def _free_name(step: int, newest_first: Iterable[str]) -> str:
    """A name for a step that comes after all others of that step."""
    same_step = (match for name in newest_first if (match := _NAME.fullmatch(name)) and int(match[1]) == step)
    last = next(same_step, None)
    return f"step-{step:012d}" if last is None else f"step-{step:012d}.{int(last[2] or 0) + 1}"


def _list(file_system: FileSystem, path: str) -> set[str]:
    """The names in a directory; none where there is no such directory, an error where that cannot be told."""
    try:
        if not isinstance(file_system, PyFileSystem):
            return {info.base_name for info in file_system.get_file_info(FileSelector(path))}
        # Past pyarrow's handler, which takes a store that does not answer for an empty one.
        inner = file_system.handler.fs
        inner.invalidate_cache()  # others write here as well
        names = [str(name).rstrip("/") for name in inner.ls(path, detail=False)]
        return {posixpath.basename(name) for name in names if name.strip("/") != path.strip("/")}
    except FileNotFoundError:
        return set()


def _put(file_system: FileSystem, folder: str, file: str, pieces: Iterable[Any]) -> tuple[int, str]:
    """Write a file; its size and SHA-256."""
    size, digest = 0, hashlib.sha256()
    with file_system.open_output_stream(f"{folder}/{file}") as sink:
        for piece in pieces:
            size += len(piece)
            digest.update(piece)
            sink.write(piece)
    if file_system.type_name == "local":
        # A power cut must not take a checkpoint whose predecessors were removed on its account. Some mounts of object
        # stores know no fsync; what they lost, the SHA-256 will tell.
        with contextlib.suppress(OSError), open(f"{folder}/{file}", "rb") as written:
            os.fsync(written.fileno())
    return size, digest.hexdigest()


def _remove(file_system: FileSystem, root: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        file_system.delete_file(f"{root}/{name}/{_MANIFEST}")
    file_system.delete_dir(f"{root}/{name}")


def _manifest_text(checkpoint: Checkpoint, facts: Any, files: Mapping[str, tuple[int, str]]) -> bytes:
    body = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "facts": facts,
        "seconds": checkpoint.seconds,
        "files": {file: {"size": size, "sha256": sha256} for file, (size, sha256) in files.items()},
        "torch": str(torch.__version__),
    }
    return json.dumps({"manifest": body, "sha256": _digest(body)}, indent=1).encode()


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _read_manifest(file_system: FileSystem, root: str, name: str) -> _Manifest:
    if _MANIFEST not in _list(file_system, f"{root}/{name}"):
        raise _IncompleteError(f"{_MANIFEST} is missing")
    with file_system.open_input_stream(f"{root}/{name}/{_MANIFEST}") as source:
        text = source.read()
    try:
        found = json.loads(text)
        body = found["manifest"]
        intact = found["sha256"] == _digest(body)
        if intact and body["format"] != _FORMAT:
            raise _ForeignError(f"its format is {body['format']}, this version of sparkdl reads {_FORMAT}")
        if not intact or f"{body['step']:012d}" != name.removeprefix("step-").partition(".")[0]:
            raise _DamagedError(f"{_MANIFEST} is damaged")
        files = {file: (body["files"][file]["size"], body["files"][file]["sha256"]) for file in (_TENSORS, _STRUCTURE)}
        size = sum(size for size, _ in files.values())
        return _Manifest(Checkpoint(name, body["step"], _decode(body["facts"], {}), size, body["seconds"]), files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _DamagedError(f"{_MANIFEST} is damaged") from None


def _read_file(
    file_system: FileSystem, folder: str, file: str, manifest: _Manifest, kept: BinaryIO | None = None
) -> None:
    """Read a file, into memory if it shall be kept, and compare it with the manifest."""
    size, sha256 = manifest.files[file]
    info = file_system.get_file_info(f"{folder}/{file}")
    if info.type != FileType.File:
        raise _DamagedError(f"{file} is missing")
    if info.size != size:
        raise _DamagedError(f"{file} has {info.size} bytes instead of {size}")
    digest = hashlib.sha256()
    with file_system.open_input_stream(f"{folder}/{file}") as source:
        while piece := source.read(_PIECE):
            digest.update(piece)
            if kept is not None:
                kept.write(piece)
    if digest.hexdigest() != sha256:
        raise _DamagedError(f"{file} does not have the SHA-256 that {_MANIFEST} says")


# ---- beside the training ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    tensors: Mapping[str, Tensor]
    structure: Any
    facts: Any


class AsyncWriter:
    """Writes checkpoints in a thread while the training goes on; a context manager.

    Leaving the block waits for the last write; leaving it by an exception gives it a second. A write that fails is
    logged and kept in ``failures``, and never disturbs the training.

    Args:
        store: Where to.
        timeout: For one write, from its beginning.

    Attributes:
        written: The checkpoints that are complete.
        failures: One sentence for each that failed or was overdue.
        stalled_seconds: How long `save` and `wait` have held up their callers.
    """

    def __init__(self, store: CheckpointStore, *, timeout: timedelta) -> None:
        self.written: list[Checkpoint] = []
        self.failures: list[str] = []
        self.stalled_seconds = 0.0
        self._store = store
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._began = 0.0
        self._step = 0
        self._told = False
        self._buffers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
            else:
                self._idle.wait(_GRACE)
        finally:
            if self._thread is not None:
                self._jobs.put(None)
                if not self.busy:
                    self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return not self._idle.is_set()

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> bool:
        """Copy the state to host memory and begin to write it; what is changed afterwards is not written.

        It is one copy, into memory that the next one uses again.

        Args:
            step: Optimizer steps finished.
            state: As for `flatten_state`.
            facts: As for `CheckpointStore.write`.

        Returns:
            False, and nothing is copied, while the one before is still being written; False also where memory does not
            suffice for the copy, which is a failure like others.

        Raises:
            CheckpointError: State or facts hold what cannot be stored.
        """
        began = time.monotonic()
        if self.busy:
            self._tell_overdue(began)
            return False
        try:
            tensors, structure = flatten_state(state)
            encoded = _encode_facts(facts)
            job = _Job(step, self._copy(tensors), structure, encoded)
        except CheckpointError:
            raise
        except (MemoryError, RuntimeError) as error:  # torch has no other for a lack of host memory
            self._fail(f"The checkpoint of step {step} cannot be copied to host memory: {reason(error)}.")
            return False
        finally:
            self.stalled_seconds += time.monotonic() - began
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sparkdl-checkpoint", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._began, self._step, self._told = time.monotonic(), step, False
        self._jobs.put(job)
        return True

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until the last checkpoint is on storage, or its write has failed.

        Args:
            timeout: For the write, from its beginning; None: the writer's own.

        Raises:
            CheckpointError: The write has taken longer than the timeout. It is not stopped.
        """
        limit = (self._timeout if timeout is None else timeout).total_seconds()
        began = time.monotonic()
        finished = self._idle.wait(max(0.0, self._began + limit - began))
        self.stalled_seconds += time.monotonic() - began
        if not finished:
            raise CheckpointError(self._overdue(limit))

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return buffers

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self.written.append(self._store._write(job.step, job.tensors, job.structure, job.facts))
            except Exception as error:
                self._fail(str(error))
            finally:
                self._idle.set()

    def _fail(self, why: str) -> None:
        self.failures.append(f"{why} The training goes on.")
        logger.warning("%s", self.failures[-1])

    def _overdue(self, limit: float) -> str:
        return (
            f"The checkpoint of step {self._step} was not written to {self._store.url!r} in {limit:g} seconds. "
            "Allow more for 'checkpoint' in the timeouts, or use a faster store."
        )

    def _tell_overdue(self, now: float) -> None:
        limit = self._timeout.total_seconds()
        if not self._told and now - self._began > limit:
            self._told = True
            self._fail(self._overdue(limit))


# ---- when ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class CheckpointSchedule:
    """When checkpoints are due: a pure function of steps and seconds. With neither, at the end of every epoch."""

    interval: int | None
    """Optimizer steps from one checkpoint to the next."""

    seconds: float | None
    """Seconds from one checkpoint to the next."""

    steps_per_epoch: int
    """Optimizer steps of an epoch."""

    def by_step(self, step: int) -> bool:
        """Whether one is due after this many optimizer steps; equal on all ranks."""
        if self.interval is None and self.seconds is not None:
            return False
        return step > 0 and step % (self.interval or self.steps_per_epoch) == 0

    def by_time(self, now: float, last: float) -> bool:
        """Whether one is due by the clock: one rank decides, and tells the others.

        Args:
            now: Seconds, of any clock that only goes forward.
            last: The same when the last checkpoint began, or the training.
        """
        return self.seconds is not None and now - last >= self.seconds
