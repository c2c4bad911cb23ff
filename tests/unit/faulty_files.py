"""A file system on which every operation can be made to fail, to hang, or to be the last thing that a process does."""

import os
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

Hook = Callable[[str, str, int], None]


def no_fault(operation: str, path: str, size: int) -> None:
    """Everything works."""


class FaultyFileSystem(LocalFileSystem):
    """Local files under ``faulty:///path``.

    ``before`` is called with operation (list, info, open, write, close, mkdir, delete, read), path and bytes. A write
    is half done by then, and what comes before a close may be in the buffer still.
    """

    protocol = "faulty"
    cachable = False
    before: ClassVar[Hook] = staticmethod(no_fault)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        self.before("list", path, 0)
        return super().ls(path, detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self.before("info", path, 0)
        return super().info(path, **kwargs)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        self.before("mkdir", path, 0)
        super().mkdir(path, create_parents, **kwargs)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if recursive:
            for entry in os.scandir(path):
                self.rm(entry.path, recursive=entry.is_dir())
            self.before("delete", path, 0)
            os.rmdir(path)
        else:
            self.before("delete", path, 0)
            os.remove(path)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        self.before("read" if "r" in mode else "open", path, 0)
        opened = open(path, mode)  # noqa: SIM115  the caller closes it
        return opened if "r" in mode else _HalfWritten(opened, path)


class _HalfWritten:
    """A file that is being written."""

    def __init__(self, opened: Any, path: str) -> None:
        self._opened = opened
        self._path = path

    @property
    def closed(self) -> bool:
        return bool(self._opened.closed)

    def flush(self) -> None:
        pass

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self._opened.write(data[:half])
        self._opened.flush()
        FaultyFileSystem.before("write", self._path, len(data))
        self._opened.write(data[half:])
        return len(data)

    def close(self) -> None:
        if not self._opened.closed:
            try:
                FaultyFileSystem.before("close", self._path, 0)
            finally:
                self._opened.close()


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
