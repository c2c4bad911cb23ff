"""From a URL as Spark users write it to a file system that the executors' Python can use.

| URL | served by |
|---|---|
| ``/path``, ``file:/path`` | pyarrow's local file system |
| ``dbfs:/path`` | the same, under ``/dbfs``, where Databricks mounts it |
| ``s3://``, ``s3a://``, ``s3n://`` | pyarrow's `S3FileSystem` |
| ``gs://`` | pyarrow's `GcsFileSystem`, or gcsfs where the options are gcsfs's |
| ``hdfs://``, ``viewfs://`` | pyarrow's `HadoopFileSystem`, which needs libhdfs and a JVM |
| ``abfs://``, ``abfss://``, ``wasb://``, ``wasbs://`` | adlfs |
| any other | the fsspec package that knows the scheme |

What is in ``storage_options`` may be secret: no message of this module holds any of it.
"""

import contextlib
import os
import posixpath
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow.fs
from pyarrow import ArrowException, ArrowInvalid
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from sparkdl.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["FileSystems", "default_file_system", "open_file_system", "qualify", "reason", "redact"]

Options = Mapping[str, Any]

_IN_URLS = "%/:?#[]@!$&'()*+,;=~"
_ALIASES = {"s3a": "s3", "s3n": "s3", "abfss": "abfs", "wasb": "abfs", "wasbs": "abfs"}
_SECONDS = 10  # for one request to an object store; a silent one ends after _ATTEMPTS times as long
_ATTEMPTS = 2
_S3FS_OPTIONS = {
    "key": "access_key",
    "secret": "secret_key",
    "token": "session_token",
    "anon": "anonymous",
    "endpoint_url": "endpoint_override",
    "region_name": "region",
    "aws_access_key_id": "access_key",
    "aws_secret_access_key": "secret_key",
    "aws_session_token": "session_token",
    "read_timeout": "request_timeout",
}
_GCSFS_OPTIONS = ("token", "project", "cache_timeout", "requester_pays", "session_kwargs", "endpoint_url")
_PUBLIC_OPTIONS = ("scheme", "region", "region_name")


def open_file_system(url: str, storage_options: Options | None = None) -> tuple[FileSystem, str]:
    """The file system of a URL and the path inside it.

    Args:
        url: As Spark users write it. Without a scheme it is a local path; see `qualify`.
        storage_options: Credentials and addresses, under the names of the file system that serves the scheme. For S3,
            those of `pyarrow.fs.S3FileSystem` (``access_key``, ``endpoint_override``, ...) or of s3fs (``key``,
            ``secret``, ``token``, ``client_kwargs``, ...). One request takes 10 seconds at most and is tried twice,
            unless ``request_timeout``, ``connect_timeout`` or ``retry_strategy`` say otherwise.

    Raises:
        ConfigError: Nothing installed knows the scheme, or an option that its file system does not know.
    """
    return FileSystems(storage_options).open(url)


class FileSystems:
    """The file systems behind some URLs, each opened once: they keep their connections while this object lives.

    Threads may share it.

    Args:
        storage_options: As for `open_file_system`.
    """

    def __init__(self, storage_options: Options | None = None) -> None:
        self._options = dict(storage_options or {})
        self._opened: dict[tuple[str, str], FileSystem] = {}
        self._opening = threading.Lock()

    def open(self, url: str) -> tuple[FileSystem, str]:
        """As `open_file_system`.

        Raises:
            ConfigError: As `open_file_system`.
        """
        scheme, authority, path = _split(url)
        try:
            with self._opening:
                found = self._opened.get((scheme, authority))
                if found is None:
                    found = self._opened[scheme, authority] = _make(scheme, authority, self._options)
        except ConfigError:
            raise
        except (ArrowException, ImportError, OSError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{url!r} is on a file system that this Python cannot open: {reason(error, self._options)}. "
                f"{_advice(scheme)}"
            ) from None
        return found, _inner_path(found, scheme, authority, path)


def qualify(url: str, default_file_system: str) -> str:
    """A URL with a scheme, as Spark would complete it.

    Args:
        url: A URL or an absolute path; ``hdfs:///path`` gets the authority of the default file system.
        default_file_system: What `default_file_system` returned.

    Raises:
        ConfigError: A relative path, which means another directory on every machine.
    """
    scheme, separator, _ = url.partition(":")
    default_scheme, _, default_rest = default_file_system.partition(":")
    default_authority = default_rest.removeprefix("//").partition("/")[0]
    if separator and "/" not in scheme:
        if scheme == default_scheme and default_authority and not _split(url)[1]:
            return f"{scheme}://{default_authority}/{_split(url)[2].lstrip('/')}"
        return url
    if not url.startswith("/"):
        raise ConfigError(
            f"{url!r} is a relative path, but every executor has a working directory of its own. Use an absolute path "
            "or a URL that all executors reach."
        )
    return f"{default_scheme}://{default_authority}{url}"


def default_file_system(spark: "SparkSession") -> str:
    """Where Spark looks for paths without a scheme: Hadoop's ``fs.defaultFS``.

    Over Spark Connect a client cannot see Hadoop's configuration; the second best is the setting
    ``spark.hadoop.fs.defaultFS`` where the server has it, else ``file:///``.
    """
    found: str | None
    if hasattr(spark, "_jsparkSession"):
        found = spark.sparkContext._jsc.hadoopConfiguration().get("fs.defaultFS")
    else:
        found = spark.conf.get("spark.hadoop.fs.defaultFS", None)
    return found or "file:///"


def redact(text: str, storage_options: Options | None) -> str:
    """A text without any value of ``storage_options``, for messages."""
    for value in sorted(_texts(storage_options or {}), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def reason(error: BaseException, storage_options: Options | None = None) -> str:
    """The first line of an error's text, without any value of ``storage_options`` and without a final stop."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return redact(text, storage_options).rstrip(". ")


def _texts(options: Options) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _texts(value)
        elif isinstance(value, str) and value and name not in _PUBLIC_OPTIONS:
            yield value


def _split(url: str) -> tuple[str, str, str]:
    """Scheme ("file" where there is none), authority and path of a URL, unescaped as neither Spark nor we escape."""
    scheme, separator, rest = url.partition(":")
    if not separator or "/" in scheme:
        return "file", "", url
    if scheme in ("file", "dbfs"):
        path = "/" + rest.lstrip("/")
        return "file", "", path if scheme == "file" else f"/dbfs{path}"
    authority, slash, path = rest.removeprefix("//").partition("/") if rest.startswith("//") else ("", "", rest)
    return scheme, authority, slash + path


def _make(scheme: str, authority: str, options: dict[str, Any]) -> FileSystem:
    if scheme == "file":
        return LocalFileSystem()
    kind = _ALIASES.get(scheme, scheme)
    if kind == "s3":
        return _s3(authority, options)
    if kind == "gs" and options.keys().isdisjoint(_GCSFS_OPTIONS):
        return pyarrow.fs.GcsFileSystem(
            **{"retry_time_limit": timedelta(seconds=_SECONDS * _ATTEMPTS), **options},
        )
    if kind in ("hdfs", "viewfs"):
        if not options:
            return FileSystem.from_uri(f"{kind}://{quote(authority, safe=_IN_URLS)}/")[0]
        host, _, port = authority.partition(":")
        return pyarrow.fs.HadoopFileSystem(host or "default", int(port or 0), **options)
    import fsspec

    # adlfs takes the account from the host, and knows the hosts of Data Lake Storage only.
    host = authority.replace(".blob.core.", ".dfs.core.") if kind == "abfs" else authority
    fs, _ = fsspec.core.url_to_fs(f"{kind}://{host}/", **options)
    return PyFileSystem(FSSpecHandler(fs))


def _inner_path(file_system: FileSystem, scheme: str, authority: str, path: str) -> str:
    if scheme in ("file", "hdfs", "viewfs"):
        return path
    kind = _ALIASES.get(scheme, scheme)
    if isinstance(file_system, PyFileSystem):
        host = authority.replace(".blob.core.", ".dfs.core.") if kind == "abfs" else authority
        inner: str = file_system.handler.fs._strip_protocol(f"{kind}://{host}{path}")
        return inner
    return posixpath.join(authority, path.lstrip("/")).rstrip("/")


def _s3(bucket: str, options: dict[str, Any]) -> FileSystem:
    given = _s3_options(options)
    if "region" not in given and "endpoint_override" not in given and not _s3_environment():
        with contextlib.suppress(ArrowInvalid, OSError):  # what is wrong will be said by the first request
            given["region"] = pyarrow.fs.resolve_s3_region(bucket)
    return pyarrow.fs.S3FileSystem(
        **{
            "request_timeout": _SECONDS,
            "connect_timeout": _SECONDS,
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            **given,
        }
    )


def _s3_environment() -> bool:
    return any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"))


def _s3_options(options: Options) -> dict[str, Any]:
    """Options of s3fs under the names of pyarrow."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("client_kwargs", "config_kwargs"):
            found.update(_s3_options(value))
        elif name == "use_ssl":
            found["scheme"] = "https" if value else "http"
        else:
            found[_S3FS_OPTIONS.get(name, name)] = value
    return found


def _advice(scheme: str) -> str:
    from fsspec.registry import known_implementations

    kind = _ALIASES.get(scheme, scheme)
    if kind in ("hdfs", "viewfs"):
        return "Set JAVA_HOME, HADOOP_HOME and CLASSPATH on all executors, as libhdfs needs them."
    package = known_implementations.get(kind, {}).get("class", "fsspec").partition(".")[0]
    if kind in ("s3", "gs"):
        return "Check storage_options: their names are those of pyarrow.fs or of s3fs and gcsfs."
    if package != "fsspec":
        return f"Check storage_options, and that the package {package} is installed on all executors."
    return "Use a path that all executors share, or install the fsspec package for its scheme."
