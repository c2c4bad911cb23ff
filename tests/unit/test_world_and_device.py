"""Who is who among the ranks, on which device, with how many threads."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkdl.barrier.device import available_cores, cuda_index, select_device, thread_count
from sparkdl.barrier.world import World, host_of, world_of
from sparkdl.errors import ConfigError, LaunchError

TWO_HOSTS = ["10.0.0.1:40001", "10.0.0.10:40001", "10.0.0.1:40002", "10.0.0.10:40002", "10.0.0.1:40001"]


# ---- world -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.0.0.1:7077", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("worker-3.example.com:40123", "worker-3.example.com"),
        ("localhost", "localhost"),
        ("[fe80::1]:7077", "fe80::1"),
        ("[2001:db8::a:1]", "2001:db8::a:1"),
        ("2001:db8::a:1", "2001:db8::a:1"),
        ("::1", "::1"),
    ],
)
def test_the_host_of_an_address_is_found_in_every_form(address: str, host: str) -> None:
    assert host_of(address) == host


def test_ranks_on_two_hosts_are_counted_on_each() -> None:
    worlds = [world_of(rank, TWO_HOSTS) for rank in range(5)]
    assert [world.local_rank for world in worlds] == [0, 0, 1, 1, 2]
    assert [world.local_world_size for world in worlds] == [3, 2, 3, 2, 3]
    assert [world.node_rank for world in worlds] == [0, 1, 0, 1, 0]
    assert {world.hosts for world in worlds} == {("10.0.0.1", "10.0.0.10", "10.0.0.1", "10.0.0.10", "10.0.0.1")}
    assert not any(world.one_host for world in worlds)


def test_a_lone_rank_is_a_world() -> None:
    assert world_of(0, ["driver:0"]) == World(0, 1, 0, 1, 0, ("driver",))
    assert world_of(0, ["driver:0"]).one_host


def test_the_executors_of_one_ipv6_host_are_on_one_host() -> None:
    world = world_of(1, ["[2001:db8::1]:40001", "[2001:db8::1]:40002", "[2001:db8::2]:40001"])
    assert (world.local_rank, world.local_world_size, world.node_rank) == (1, 2, 0)
    assert world.hosts == ("2001:db8::1", "2001:db8::1", "2001:db8::2")


@given(st.lists(st.sampled_from(["a:1", "a:2", "b:1", "[::1]:1", "[::1]:2", "10.0.0.1:1", "10.0.0.11:1"]), min_size=1))
def test_local_ranks_and_node_ranks_number_without_gaps(addresses: Sequence[str]) -> None:
    worlds = [world_of(rank, addresses) for rank in range(len(addresses))]
    of_host: dict[str, list[World]] = defaultdict(list)
    for rank, world in enumerate(worlds):
        assert world.rank == rank
        assert world.world_size == len(addresses)
        of_host[world.hosts[rank]].append(world)
    for members in of_host.values():
        assert [world.local_rank for world in members] == list(range(len(members)))
        assert {world.local_world_size for world in members} == {len(members)}
    assert [members[0].node_rank for members in of_host.values()] == list(range(len(of_host)))
    assert {world.one_host for world in worlds} == {len(of_host) == 1}


# ---- device ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "visible", "index"),
    [
        ("0", None, 0),
        ("3", None, 3),
        ("3", "", 3),
        ("3", "2,3", 1),
        ("2", "2,3", 0),
        ("2", " 2 , 3 ", 0),
        ("0", "2,3", 0),
        ("1", "2,3", 1),
        ("1", "1,0", 0),
        ("GPU-5a", "GPU-17,GPU-5a", 1),
        ("1", "GPU-17,GPU-5a", 1),
        ("MIG-7", "MIG-7", 0),
    ],
)
def test_spark_addresses_become_indices_among_the_visible_gpus(address: str, visible: str | None, index: int) -> None:
    """An address may name a GPU of the host or, where CUDA_VISIBLE_DEVICES hides some, count the visible ones."""
    assert cuda_index(address, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == index


@pytest.mark.parametrize(("address", "visible"), [("5", "2,3"), ("GPU-5a", "GPU-17"), ("GPU-5a", "0,1")])
def test_an_address_that_is_hidden_is_refused_with_the_way_out(address: str, visible: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"Spark assigned GPU '{address}'.*CUDA_VISIBLE_DEVICES='{visible}' hides it.*Unset"
    ):
        cuda_index(address, {"CUDA_VISIBLE_DEVICES": visible})


def choose(asked: str, *gpus: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    return select_device(
        asked,  # type: ignore[arg-type]
        gpu_addresses=gpus, local_rank=local_rank, local_world_size=local_world_size,
    )  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with two GPUs, as far as torch's count of them goes; no test here uses one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_gpu_that_spark_assigned_comes_first(two_gpus: None) -> None:
    assert choose("auto", "1") == choose("cuda", "1") == torch.device("cuda:1")
    assert choose("auto", "1", local_rank=0, local_world_size=2) == torch.device("cuda:1")
    assert choose("auto", "1", local_world_size=9) == torch.device("cuda:1")


def test_without_an_assignment_it_is_the_gpu_of_the_local_rank_where_there_are_enough(two_gpus: None) -> None:
    assert choose("auto", local_rank=1, local_world_size=2) == torch.device("cuda:1")
    assert choose("cuda", local_rank=0, local_world_size=2) == torch.device("cuda:0")


def test_auto_is_the_cpu_for_all_where_there_are_too_few(two_gpus: None) -> None:
    devices = [choose("auto", local_rank=rank, local_world_size=3) for rank in range(3)]
    assert devices == [torch.device("cpu")] * 3


def test_cuda_is_refused_where_ranks_would_share_a_gpu(two_gpus: None) -> None:
    with pytest.raises(
        LaunchError,
        match=r"device='cuda' needs a GPU for each of the 3 ranks on this host, but torch sees 2\. Fit with",
    ):
        choose("cuda", local_world_size=3)


def test_the_cpu_is_the_cpu_even_where_there_are_gpus(two_gpus: None) -> None:
    assert choose("cpu", "1") == torch.device("cpu")


def test_without_gpus_auto_is_the_cpu_and_cuda_is_refused(no_gpus: None) -> None:
    assert choose("auto") == choose("auto", "0") == torch.device("cpu")
    with pytest.raises(LaunchError, match=r"torch sees 0\. .*spark\.executor\.resource\.gpu\.amount"):
        choose("cuda")


# ---- cores and threads -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cores", "ranks", "task_cpus", "threads"),
    [
        (8, 1, 1, 8),  # a lone rank has the host for itself
        (8, 4, 1, 2),
        (8, 3, 1, 2),
        (2, 4, 1, 1),  # never none
        (8, 4, 4, 4),  # never less than Spark gave the task
        (2, 1, 16, 2),  # but never more than there are
        (1, 1, 1, 1),
    ],
)
def test_a_rank_has_its_share_of_the_cores(cores: int, ranks: int, task_cpus: int, threads: int) -> None:
    assert thread_count(cores=cores, local_world_size=ranks, task_cpus=task_cpus) == threads


@given(cores=st.integers(1, 256), ranks=st.integers(1, 300), task_cpus=st.integers(1, 300))
def test_there_are_never_fewer_threads_than_one_nor_more_than_cores(cores: int, ranks: int, task_cpus: int) -> None:
    assert 1 <= thread_count(cores=cores, local_world_size=ranks, task_cpus=task_cpus) <= cores


@pytest.mark.parametrize("quota", ["100000 100000", "50000 100000", "1000 100000", "199999 100000", "25000 20000"])
def test_the_quota_of_a_container_bounds_its_cores(tmp_path: Path, quota: str) -> None:
    """Parts of a core do not count, but there is always one."""
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert available_cores(tmp_path / "cpu.max") == 1


@pytest.mark.parametrize("text", ["max 100000\n", "100000000 100000\n", "", "nonsense\n", None])
def test_without_a_quota_all_cores_of_the_affinity_count(tmp_path: Path, text: str | None) -> None:
    everything = available_cores(tmp_path / "missing")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert available_cores(tmp_path / "cpu.max") == everything >= 1


def test_this_process_has_cores() -> None:
    assert available_cores() >= 1
