"""From a URL as Spark users write it to a file system that the executors' Python can use."""

from urllib.parse import quote

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from sparkdl.errors import ConfigError

__all__ = ["open_file_system"]

_IN_URLS = "%/:?#[]@!$&'()*+,;=~"
_ARROW_SCHEMES = {"file": "file", "s3": "s3", "s3a": "s3", "s3n": "s3", "hdfs": "hdfs", "gs": "gs"}


def open_file_system(url: str) -> tuple[FileSystem, str]:
    """The file system of a URL and the path inside it.

    Local paths and ``file``, ``s3``/``s3a``, ``hdfs`` and ``gs`` URLs are served by pyarrow, every other scheme by the
    fsspec package that knows it.

    Raises:
        ConfigError: Nothing installed knows the scheme.
    """
    scheme, separator, rest = url.partition(":")
    if not separator or "/" in scheme:
        return LocalFileSystem(), url
    try:
        if scheme == "file" and (path := rest.removeprefix("//")).startswith("/"):
            return LocalFileSystem(), path  # as it is: neither Spark nor we escape anything in it
        address = _slashes(rest)
        if scheme in _ARROW_SCHEMES:
            file_system, path = FileSystem.from_uri(f"{_ARROW_SCHEMES[scheme]}:{quote(address, safe=_IN_URLS)}")
            return file_system, path
        import fsspec

        # Without the two slashes, fsspec takes it for a local path.
        fs, path = fsspec.core.url_to_fs(f"{scheme}:{address}")
        return PyFileSystem(FSSpecHandler(fs)), path
    except (ArrowInvalid, ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"{url!r} is on a file system that this Python cannot open: {error}. Use a path that all executors share, "
            "or install the fsspec package for its scheme."
        ) from error


def _slashes(rest: str) -> str:
    """``file:/tmp`` as Hadoop prints it, in the form that pyarrow wants."""
    return rest if rest.startswith("//") else f"//{rest}"
