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
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import safetensors.torch
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType, PyFileSystem
from torch import Tensor

from sparkdl.checkpoint.state import encode_facts, flatten_state, safetensors_pieces, unflatten_state
from sparkdl.errors import CheckpointError, ConfigError
from sparkdl.storage import FileSystems, reason, redact

__all__ = ["Checkpoint", "CheckpointStore"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_TENSORS, _STRUCTURE, _MANIFEST, _LATEST = "state.safetensors", "state.json", "manifest.json", "latest"
_NAME = re.compile(r"step-(\d{12,})(?:\.(\d+))?")
_PIECE = 16 << 20  # bytes of one read or write


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
        return self.write_flat(step, tensors, structure, encode_facts(facts))

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

    def write_flat(self, step: int, tensors: Mapping[str, Tensor], structure: Any, facts: Any) -> Checkpoint:
        """As `write`, of what `flatten_state` and `encode_facts` returned.

        Raises:
            CheckpointError: The store cannot be written to.
            ConfigError: The URL's file system cannot be opened.
        """
        started = time.monotonic()
        with self._reporting(f"The checkpoint of step {step} cannot be written to"):
            file_system, root = self._open()
            name = _free_name(step, self._names(file_system, root))
            put = functools.partial(_put, file_system, f"{root}/{name}")
            try:
                file_system.create_dir(f"{root}/{name}", recursive=True)
                files = {
                    _TENSORS: put(_TENSORS, safetensors_pieces(tensors)),
                    _STRUCTURE: put(_STRUCTURE, [json.dumps(structure).encode()]),
                }
                checkpoint = Checkpoint(
                    name,
                    step,
                    unflatten_state({}, facts),
                    sum(size for size, _ in files.values()),
                    time.monotonic() - started,
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
        return _Manifest(
            Checkpoint(name, body["step"], unflatten_state({}, body["facts"]), size, body["seconds"]), files
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, CheckpointError):
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
