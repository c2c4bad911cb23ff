"""What a stranger on the network reaches while ranks train, and where secrets must not be found."""

import base64
import json
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from pyspark.sql import SparkSession
from torch import nn

import sparkdl
from sparkdl.barrier.process_group import process_group
from sparkdl.barrier.rendezvous import Entry, StoreAddress, agree, bind_store
from sparkdl.barrier.world import World
from sparkdl.errors import LaunchError

pytestmark = [pytest.mark.spark, pytest.mark.timeout(180)]

WAIT = 60.0
STORE_TIMEOUT = timedelta(seconds=20)


def local_addresses() -> list[str]:
    """Every address of this host."""
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    return [address for address in found if not _is_hardware(address)]


def _is_hardware(address: str) -> bool:
    try:
        ip_address(address.partition("%")[0])
    except ValueError:
        return True
    return False


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def refuses(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return True
    return False


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Where a process listens."""
    return [tuple(entry.laddr) for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN]


# ---- the secret ------------------------------------------------------------------------------------------------------
def meet() -> StoreAddress:
    (entry,) = agree(Entry(0, "here", {}, store=("127.0.0.1", 4711)), lambda message: [message])
    assert isinstance(entry.store, StoreAddress)
    assert repr(entry.store) == "('127.0.0.1', 4711)"
    assert entry.store.secret not in repr(entry)
    return entry.store


def test_every_run_draws_128_bits_that_no_text_shows() -> None:
    first, second = meet(), meet()
    assert first.secret != second.secret
    assert len(bytes.fromhex(first.secret)) == 16


def test_a_rank_without_a_store_sends_no_secret() -> None:
    sent: list[str] = []

    def gather(message: str) -> list[str]:
        sent.append(message)
        return sent

    agree(Entry(1, "there", {}), gather)
    assert "secret" not in sent[0]


# ---- the store, alone ------------------------------------------------------------------------------------------------
def alone(listener: socket.socket, store: tuple[str, int]) -> Any:
    """The process group of a run with one rank."""
    return process_group(
        World(0, 1, 0, 1, 0, ("here:1",)),
        store_address=store,
        listener=listener,
        address="127.0.0.1",
        prefix="run",
        device=torch.device("cpu"),
        rendezvous_timeout=STORE_TIMEOUT,
        collective_timeout=STORE_TIMEOUT,
    )


def test_no_other_address_of_the_host_reaches_the_store() -> None:
    others = [address for address in local_addresses() if address != "127.0.0.1"]
    with bind_store("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        assert not refuses("127.0.0.1", port)
        assert [address for address in others if not refuses(address, port)] == []


def test_once_the_group_is_up_the_store_takes_nobody_and_costs_nothing() -> None:
    listener = bind_store("127.0.0.1")
    store = StoreAddress(listener.getsockname(), "0123456789abcdef")
    descriptor = listener.fileno()
    with alone(listener, store):
        assert refuses(*store)
        assert tuple(store) not in listening(psutil.Process())
        found = dist.distributed_c10d._get_default_store()
        found.set("later", "works")
        assert found.get("later") == b"works"
        assert all("run/0123456789abcdef/" in key for key in found._underlying_non_prefix_store.list_keys())
        started = time.process_time()
        time.sleep(1)  # a store whose socket was merely shut down would spin for all of it
        assert time.process_time() - started < 0.5
    del found
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_who_connects_while_ranks_join_and_stays_ends_the_run() -> None:
    listener = bind_store("127.0.0.1")
    store = StoreAddress(listener.getsockname(), "secret")
    program = f"import socket; line = socket.create_connection({tuple(store)}); print('here', flush=True); input()"
    stranger = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"here\n"
        with (
            pytest.raises(
                LaunchError, match=r"ranks have 1 connections to .* but it has 2: .* firewall or network policy"
            ),
            alone(listener, store),
        ):
            raise AssertionError("the run went on with a stranger at its store")
        assert refuses(*store)
    finally:
        stranger.communicate(b"\n", timeout=20)
        dist.destroy_process_group()


def test_who_connects_and_leaves_again_does_not() -> None:
    listener = bind_store("127.0.0.1")
    address = listener.getsockname()
    with socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with alone(listener, StoreAddress(address, "secret")):
        assert refuses(*address)


# ---- ranks at work ---------------------------------------------------------------------------------------------------
def work(folder: str) -> dict[str, Any]:
    """Train until the driver says that it has seen enough; then use all that torch can do without a listening store."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()._underlying_non_prefix_store
    process = psutil.Process()
    facts = {"pid": process.pid, "listening": listening(process), "store": [store.host, store.port]}
    part = Path(folder, f"{rank}.part")
    part.write_text(json.dumps(facts))
    part.rename(Path(folder, f"{rank}.json"))

    module = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    left, waited_until = 5, time.monotonic() + WAIT
    while left:
        go = torch.tensor([float(rank == 0 and Path(folder, "go").exists())])
        dist.broadcast(go, 0)
        module(torch.ones(4, 2)).sum().backward()
        left -= int(go.item())
        assert time.monotonic() < waited_until, "the driver never said go"

    group = dist.new_group(list(range(size)))
    one = torch.ones(1)
    dist.all_reduce(one, group=group)
    dist.monitored_barrier(group, timeout=STORE_TIMEOUT)
    pair = dist.new_group([size - 2, size - 1])
    two = torch.ones(1)
    if rank >= size - 2:
        dist.all_reduce(two, group=pair)
    received = [torch.zeros(1) for _ in range(size)]
    dist.all_to_all(received, [torch.tensor([float(rank)]) for _ in range(size)])
    message = torch.tensor([float(rank)])
    if rank == 0:
        dist.send(message, size - 1)
    elif rank == size - 1:
        dist.recv(message, 0)
    mesh = dist.init_device_mesh("cpu", (size // 2, 2))
    three = torch.ones(1)
    dist.all_reduce(three, group=mesh.get_group(1))
    later = nn.parallel.DistributedDataParallel(nn.Linear(2, 1), process_group=group)
    later(torch.ones(4, 2)).sum().backward()
    return {
        "store_refuses": refuses(*facts["store"]),
        "sums": [one.item(), two.item(), three.item()],
        "received": [value.item() for value in received],
        "message": message.item(),
        "gradient": [value.grad.tolist() for value in later.parameters()],
        "listening": listening(process),
    }


def words_of_a_store() -> bytes:
    """What a client of torch's store sends to set a key: its magic number, then the request."""
    texts = [struct.pack("<Q", len(text)) + text for text in (b"planted", b"by a stranger")]
    return b"\x00" + struct.pack("<I", 0x3C85F7CE) + b"\x01" + b"".join(texts)


def bother(address: tuple[str, int]) -> None:
    """What a stranger might try on a port: silence, garbage, halves of words, and the words of torch's store."""
    for message in (b"", bytes(8), bytes(7), b"\xff" * 4096, b"GET / HTTP/1.0\r\n\r\n", words_of_a_store()):
        with suppress(OSError), socket.create_connection(address, timeout=5) as line:
            line.sendall(message)


class Running:
    """A launch in a thread, whose ranks train until `finish`."""

    def __init__(self, spark: SparkSession, ranks: int, folder: str) -> None:
        self._folder = folder
        self._results: list[Any] = []

        def launch() -> None:
            try:
                self._results.extend(sparkdl.launch(work, folder, num_train_workers=ranks, spark=spark))
            except BaseException as error:
                self._results.append(error)

        self._thread = threading.Thread(target=launch)
        self._thread.start()
        self.ranks = [self._facts(rank) for rank in range(ranks)]

    def _facts(self, rank: int) -> dict[str, Any]:
        path, waited_until = Path(self._folder, f"{rank}.json"), time.monotonic() + WAIT
        while not path.exists():
            assert self._thread.is_alive(), self._results
            assert time.monotonic() < waited_until, f"rank {rank} never began"
            time.sleep(0.05)
        return json.loads(path.read_text())

    def finish(self) -> list[dict[str, Any]]:
        Path(self._folder, "go").touch()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        for result in self._results:
            if isinstance(result, BaseException):
                raise result
        return self._results


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def seen(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """What a stranger saw while ranks were at work, and how they fared."""
    running = Running(spark, request.param, str(tmp_path_factory.mktemp("ranks")))
    ports = {"driver": listening(psutil.Process())}
    for rank in running.ranks:
        ports[f"pid {rank['pid']}"] = listening(psutil.Process(rank["pid"]))
    store = running.ranks[0]["store"]
    seen = {"ranks": request.param, "ports": ports, "store": store, "store_refuses": refuses(*store)}
    others = [address for address in local_addresses() if not is_loopback(address)]
    seen["elsewhere"] = [
        (name, address, port)
        for name, found in ports.items()
        for _, port in found
        for address in others
        if not refuses(address, port)
    ]
    for found in ports.values():
        for address in found:
            bother((address[0].removeprefix("::ffff:"), address[1]))
    seen["results"] = running.finish()
    return seen


def test_all_that_listens_listens_on_one_address(seen: dict[str, Any]) -> None:
    assert all(seen["ports"].values()), "the driver's channel and gloo listen, so this test shows nothing"
    assert [address for found in seen["ports"].values() for address, _ in found if not is_loopback(address)] == []
    assert seen["elsewhere"] == []


def test_the_store_refuses_everybody_while_ranks_train(seen: dict[str, Any]) -> None:
    assert seen["store_refuses"]
    assert all(result["store_refuses"] for result in seen["results"])
    store = tuple(seen["store"])
    assert [found for found in seen["ports"].values() if store in found] == []


def test_ranks_train_on_and_come_to_the_right_end_whatever_strangers_send(seen: dict[str, Any]) -> None:
    size = seen["ranks"]
    for rank, result in enumerate(seen["results"]):
        assert result["sums"] == [size, 2.0 if rank >= size - 2 else 1.0, 2.0]
        assert result["received"] == list(range(size))
        assert result["message"] == (0 if rank == size - 1 else rank)
        assert result["gradient"] == [[[4.0, 4.0]], [4.0]]
        assert [address for address, _ in result["listening"] if not is_loopback(address)] == []


# ---- secrets ---------------------------------------------------------------------------------------------------------
# Two fits that fail, in a Spark of its own: secrets come from a file, as on a cluster, and everything is logged.
LEAK = """
import json, logging, os, secrets, sys
from pathlib import Path

folder = Path(sys.argv[1])
logging.basicConfig(level=logging.DEBUG)
logging.getLogger("py4j").setLevel(logging.WARNING)  # what it logs at DEBUG is every command, closures included
drawn, draw = [], secrets.token_bytes

def noted(size=None):
    drawn.append(draw(size))
    return drawn[-1]

secrets.token_bytes = noted

import psutil
import torch
import torch.distributed as dist
from pyspark.sql import SparkSession, functions as F
from sparkdl import SparkdlError, TorchRegressor
from sparkdl.io import ParquetDataset

class Failing(torch.nn.Linear):
    def forward(self, features):
        if not dist.is_initialized():
            return super().forward(features)
        logging.getLogger().setLevel(logging.DEBUG)
        logging.getLogger("user").warning("a warning of the user's")
        keys = dist.distributed_c10d._get_default_store()._underlying_non_prefix_store.list_keys()
        found = {"auth": os.environ["_SPARK_AUTH_SECRET"], "keys": keys}
        found["commands"] = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        part = folder / f"part-{dist.get_rank()}"
        part.write_text(json.dumps(found))
        part.rename(folder / f"rank-{dist.get_rank()}.json")
        dist.barrier()
        raise RuntimeError("planted failure")

spark = SparkSession.builder.getOrCreate()
settings = dict(batchSize=8, maxEpochs=1, numTrainWorkers=2, verbose=False, maxRestarts=0, allowUnencryptedTraffic=True)
df = spark.range(32).select(F.array(F.col("id").cast("float")).alias("features"), F.col("id").alias("label"))
rows = ParquetDataset("s3://bucket/rows", storage_options=json.loads(Path(sys.argv[2]).read_text()))
told = []
for data in (df, rows):
    try:
        TorchRegressor(module=Failing(1, 1), **settings).fit(data)
    except SparkdlError as error:
        logging.exception("it failed")
        told.append(f"{error} {error!r} {getattr(error, 'failures', '')!r}")
spark.stop()
(folder / "driver.json").write_text(json.dumps({"drawn": [key.hex() for key in drawn], "told": told + [repr(rows)]}))
"""

SETTINGS = """
spark.master local[2]
spark.ui.enabled false
spark.driver.host 127.0.0.1
spark.authenticate true
spark.authenticate.secret {auth}
spark.eventLog.enabled true
spark.eventLog.compress false
spark.eventLog.dir {events}
"""


@pytest.fixture(scope="module")
def leaks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The secrets of two fits that failed, by what they are for; and texts that others may read, by where they are."""
    folder = tmp_path_factory.mktemp("leaks")
    for name in ("conf", "out", "events"):
        (folder / name).mkdir()
    auth = secrets.token_hex(20)
    (folder / "conf" / "spark-defaults.conf").write_text(SETTINGS.format(auth=auth, events=folder / "events"))
    options = {"access_key": f"AKIA{secrets.token_hex(8)}", "secret_key": secrets.token_hex(20)}
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"127.0.0.1:{nobody.getsockname()[1]}"
    options_file = folder / "options.json"
    options_file.write_text(json.dumps({**options, "endpoint_override": closed, "scheme": "http", "region": "here"}))
    script = folder / "leak.py"
    script.write_text(LEAK)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "out"), str(options_file)],
        # In local mode Spark gives the workers no such variable; on a cluster it does.
        env={**os.environ, "SPARK_CONF_DIR": str(folder / "conf"), "_SPARK_AUTH_SECRET": auth},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((folder / "out" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    driver = json.loads((folder / "out" / "driver.json").read_text())
    assert ranks[0]["auth"] == auth, "the workers had no secret, so this test shows nothing"
    hidden = {"_SPARK_AUTH_SECRET": auth, **options}
    for number, key in enumerate(driver["drawn"]):
        hidden[f"channel {number}"] = key
    hidden["store"] = re.findall(r"/([0-9a-f]{32})/", " ".join(ranks[0]["keys"]))[0]
    texts = {
        "output": [done.stdout, done.stderr],
        "errors": driver["told"],
        "command lines": [line for rank in ranks for line in rank["commands"]],
        "event log": [path.read_text() for path in (folder / "events").rglob("*") if path.is_file()],
    }
    return hidden, texts


@pytest.mark.slow
def test_the_fits_failed_and_were_logged(leaks: tuple[dict[str, str], dict[str, list[str]]]) -> None:
    hidden, texts = leaks
    assert {"store", "channel 0", "secret_key"} < set(hidden)
    assert "planted failure" in texts["errors"][0]
    assert "Could not connect" in texts["errors"][1]
    assert "DEBUG:" in texts["output"][1]
    assert any("pyspark.daemon" in line for line in texts["command lines"])
    assert "MapInArrow" in "".join(texts["event log"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["output", "errors", "command lines", "event log"])
def test_no_secret_is_shown(leaks: tuple[dict[str, str], dict[str, list[str]]], where: str) -> None:
    hidden, texts = leaks
    for name, secret in hidden.items():
        forms = [secret]
        if len(secret) % 2 == 0 and re.fullmatch("[0-9a-f]+", secret):
            raw = bytes.fromhex(secret)
            forms += [repr(raw)[2:-1], base64.b64encode(raw).decode().rstrip("=")]
        shown = [form for form in forms if any(form in text for text in texts[where])]
        assert not shown, f"the secret for {name} is in the {where}"
