"""Stores by URL: what Spark users write, with options that no message repeats."""

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector

from sparkdl.errors import ConfigError
from sparkdl.storage import FileSystems, open_file_system, qualify, reason, redact

pytestmark = pytest.mark.timeout(60)

SECRETS = ("AKIDTHATISSECRET", "wordthatissecret")


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and a bucket that is there."""

    endpoint: str
    bucket: str

    @property
    def options(self) -> dict[str, Any]:
        """Storage options that reach it."""
        return {
            "access_key": SECRETS[0],
            "secret_key": SECRETS[1],
            "region": "eu-west-1",
            "endpoint_override": self.endpoint,
            "allow_bucket_creation": True,
        }


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    """A moto server on a free port."""
    pytest.importorskip("moto.server", reason="the S3 tests need the extra sparkdl-torch[test]")
    from sparkdl.storage import open_file_system

    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    drain = threading.Thread(target=lambda: None)
    try:
        assert server.stderr is not None
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stderr)))
        drain = threading.Thread(target=server.stderr.read)  # a full pipe would stop the server
        drain.start()
        running = S3Server(found[0], "bucket")
        file_system, path = open_file_system(f"s3a://{running.bucket}", running.options)
        file_system.create_dir(path)
        yield running
    finally:
        server.kill()
        server.wait(10)
        if drain.ident is not None:
            drain.join(10)
        if server.stderr is not None:
            server.stderr.close()


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on: taken, and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def roundtrip(systems: FileSystems, url: str, text: bytes) -> bytes:
    file_system, path = systems.open(url)
    with file_system.open_output_stream(path) as sink:
        sink.write(text)
    with file_system.open_input_file(path) as source:
        return bytes(source.read())


@pytest.mark.parametrize(
    ("url", "default", "expected"),
    [
        ("/data/table", "file:///", "file:///data/table"),
        ("/data/table", "hdfs://namenode:8020", "hdfs://namenode:8020/data/table"),
        ("/data/table", "hdfs://namenode:8020/", "hdfs://namenode:8020/data/table"),
        ("/data/a b%20c", "s3a://bucket", "s3a://bucket/data/a b%20c"),
        ("hdfs:///data", "hdfs://namenode:8020", "hdfs://namenode:8020/data"),
        ("hdfs:/data", "hdfs://namenode:8020", "hdfs://namenode:8020/data"),
        ("hdfs://other/data", "hdfs://namenode:8020", "hdfs://other/data"),
        ("s3a://bucket/data", "hdfs://namenode:8020", "s3a://bucket/data"),
        ("file:/data", "hdfs://namenode:8020", "file:/data"),
        ("file:/data", "file:///", "file:/data"),
        ("dbfs:/data", "file:///", "dbfs:/data"),
        ("/data/a:b", "file:///", "file:///data/a:b"),
    ],
)
def test_a_url_is_completed_as_spark_would(url: str, default: str, expected: str) -> None:
    assert qualify(url, default) == expected


@pytest.mark.parametrize("url", ["data/table", "table", "./table", "a/b:c"])
def test_a_relative_path_is_refused(url: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^'{re.escape(url)}' is a relative path, but every executor.*absolute path"
    ):
        qualify(url, "file:///")


@pytest.mark.parametrize("url", ["dbfs:/table/part", "dbfs:///table/part"])
def test_dbfs_is_where_databricks_mounts_it(url: str) -> None:
    file_system, path = open_file_system(url)
    assert (file_system.type_name, path) == ("local", "/dbfs/table/part")


# ---- S3 --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["s3", "s3a", "s3n"])
@pytest.mark.parametrize("name", ["plain", "with space", "per%20cent", "ünïcode", "k=a%2Fb/part"])
def test_every_s3_scheme_reaches_the_same_object_by_its_plain_name(s3_server: S3Server, scheme: str, name: str) -> None:
    url = f"{scheme}://{s3_server.bucket}/storage/{name}"
    systems = FileSystems(s3_server.options)
    assert roundtrip(systems, url, name.encode()) == name.encode()
    file_system, path = systems.open(f"s3://{s3_server.bucket}/storage/{name}")
    assert file_system.get_file_info(path).size == len(name.encode())


def test_options_may_be_those_of_pyarrow_or_of_s3fs(s3_server: S3Server) -> None:
    options: list[dict[str, Any]] = [
        {
            "access_key": "AKIDTHATISSECRET",
            "secret_key": "wordthatissecret",
            "region": "eu-west-1",
            "endpoint_override": s3_server.endpoint,
        },
        {
            "key": "AKIDTHATISSECRET",
            "secret": "wordthatissecret",
            "client_kwargs": {"endpoint_url": s3_server.endpoint, "region_name": "eu-west-1"},
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 5},
        },
        {
            "anon": True,
            "use_ssl": False,
            "region": "eu-west-1",
            "endpoint_url": s3_server.endpoint.removeprefix("http://"),
        },
    ]
    url = f"s3a://{s3_server.bucket}/options"
    roundtrip(FileSystems(s3_server.options), url, b"text")
    for given in options:
        file_system, path = open_file_system(url, given)
        with file_system.open_input_file(path) as source:
            assert source.read() == b"text"


def test_an_unknown_option_is_named_but_not_its_value() -> None:
    with pytest.raises(ConfigError, match=r"^'s3a://b/k' is on a file system that.*'secret_kee'.*names are") as caught:
        open_file_system("s3a://b/k", {"secret_kee": "wordthatissecret", "region": "eu-west-1"})
    assert "wordthatissecret" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_system_is_opened_once_for_each_store() -> None:
    systems = FileSystems({"region": "eu-west-1"})
    assert systems.open("s3a://bucket/one")[0] is systems.open("s3a://bucket/two/three")[0]
    assert systems.open("s3a://other/one")[0] is not systems.open("s3a://bucket/one")[0]


def test_threads_share_the_file_system_of_a_store() -> None:
    systems, together = FileSystems({"region": "eu-west-1"}), threading.Barrier(8, timeout=10)

    def open_one(number: int) -> int:
        together.wait()
        return id(systems.open(f"s3a://bucket/{number}")[0])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(open_one, range(8)))) == 1


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_store_that_does_not_answer_ends_within_its_timeout(kind: str) -> None:
    with silent_port() if kind == "silent" else closed_port() as port:
        options = {
            "access_key": "AKIDTHATISSECRET",
            "secret_key": "wordthatissecret",
            "region": "eu-west-1",
            "endpoint_override": f"http://127.0.0.1:{port}",
            "request_timeout": 1,
            "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=1),
        }
        file_system, path = open_file_system("s3a://bucket/table", options)
        started = time.monotonic()
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            file_system.get_file_info(FileSelector(path, recursive=True))
        assert time.monotonic() - started < 5
        del file_system


def test_a_silent_store_is_asked_twice_unless_the_options_say_otherwise() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {
            "access_key": "AKIDTHATISSECRET",
            "secret_key": "wordthatissecret",
            "region": "eu-west-1",
            "endpoint_override": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "request_timeout": 1,
        }
        file_system, path = open_file_system("s3a://bucket/table", options)
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            file_system.get_file_info(path)
        listener.setblocking(False)
        with contextlib.ExitStack() as connections:
            asked = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    connections.enter_context(listener.accept()[0])
                    asked += 1
        assert asked == 2
        del file_system


# ---- other stores ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "options", "package"),
    [
        ("abfss://container@account.dfs.core.windows.net/table", {"account_key": "wordthatissecret"}, "adlfs"),
        ("wasbs://container@account.blob.core.windows.net/table", {"account_key": "wordthatissecret"}, "adlfs"),
        ("gs://bucket/table", {"token": "wordthatissecret"}, "gcsfs"),
    ],
)
def test_a_missing_package_is_named(url: str, options: dict[str, str], package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=rf"^'{re.escape(url)}' is on a file system.*nstall {package}") as caught:
        open_file_system(url, options)
    assert "wordthatissecret" not in str(caught.value)


def test_google_storage_needs_no_package() -> None:
    file_system, path = open_file_system("gs://bucket/table/part", {"anonymous": True})
    assert (file_system.type_name, path) == ("gcs", "bucket/table/part")


def test_hdfs_without_its_library_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARROW_LIBHDFS_DIR", "HADOOP_HOME", "JAVA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for options in ({}, {"user": "somebody"}):
        try:
            open_file_system("hdfs://namenode:8020/table", options)
        except ConfigError as error:
            assert re.search(  # noqa: PT017  with Hadoop at hand it opens
                r"^'hdfs://namenode:8020/table' is on a file system.*libhdfs needs them\.$", str(error)
            )


# ---- secrets ---------------------------------------------------------------------------------------------------------
def test_no_value_of_the_options_is_left_in_a_text() -> None:
    options = {"key": "AKID", "client_kwargs": {"token": "AKIDtoken"}, "region": "eu", "anon": True, "empty": ""}
    assert redact("AKID, AKIDtoken, eu and True", options) == "***, ***, eu and True"
    assert redact("anything", None) == "anything"


def test_the_reason_is_one_line_of_an_error() -> None:
    assert reason(ValueError("AKID is wrong.\nAnd more"), {"key": "AKID"}) == "*** is wrong"
    assert reason(ValueError()) == "ValueError"


def test_nothing_of_an_opened_store_is_left_behind(s3_server: S3Server) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        assert roundtrip(FileSystems(s3_server.options), f"s3a://{s3_server.bucket}/once", b"x") == b"x"

    once()  # the SDK starts with the first
    files, threads = opened(), set(threading.enumerate())
    once()
    assert opened() <= files
    assert set(threading.enumerate()) == threads
