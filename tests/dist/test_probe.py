"""What ranks measure before a strategy is chosen: one rank and three of torchrun, on one host and on made-up ones."""

import json
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel.candidates import Candidate
from sparkdl.parallel.cost import estimate, rank_strategies
from sparkdl.parallel.probe import Measured, measure
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

FIXED, PER_ROW = 0.010, 0.001
BUDGET = 4.0


class Sleeper(nn.Module):
    """Sleeps as long as a module with known costs computes; the last rank three times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, rows: Tensor) -> Tensor:
        slow = 3.0 if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        time.sleep(slow * (FIXED + PER_ROW * len(rows)))
        scores: Tensor = self.linear(self.dropout(self.norm(rows)))
        return scores


def sleeper() -> Sleeper:
    torch.manual_seed(3)
    return Sleeper()


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def probe(hosts: tuple[str, ...], rows: int) -> dict[str, Any]:
    """Measure, and tell what of this rank was changed by it."""
    module, objective = sleeper(), Objective(nn.CrossEntropyLoss())
    config = TrainConfig()
    build = optimization_builder(OptimizerRecipe("adamw", 1e-3), None, config, steps_per_epoch=1)
    own = rows if dist.get_rank() == 0 else 0  # the others have none
    example = Batch((torch.randn(own, 4),), (torch.zeros(own, dtype=torch.int64),))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    began = time.perf_counter()
    found = measure(module, objective, build, example, hosts=hosts, rows=16, budget_seconds=BUDGET)
    seconds = time.perf_counter() - began
    return {
        "found": json.dumps(found.to_json()),
        "seconds": seconds,
        "unchanged": all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        and torch.equal(torch.get_rng_state(), generator)
        and all(value.grad is None for value in module.parameters())
        and module.training,
        "read_again": Measured.of_json(json.loads(json.dumps(found.to_json()))) == found,
    }


def probe_all() -> dict[str, Any]:
    """On one host, then as if each host had some of the ranks."""
    ranks = dist.get_world_size()
    results = {"one host": probe((), 4)}
    if ranks > 2:
        results["two hosts"] = probe(("a", "a", "b"), 4)
        results["a host each"] = probe(("a", "b", "c"), 4)
    return results


def probe_alone() -> dict[str, Any]:
    return probe((), 4)


# ---- what they say ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ranks(torchrun: Torchrun) -> list[dict[str, Any]]:
    return torchrun(probe_all, 3)


PLACES = ("one host", "two hosts", "a host each")


@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_know_the_same_and_nothing_changed(ranks, place):
    assert len({rank[place]["found"] for rank in ranks}) == 1
    assert all(rank[place]["unchanged"] for rank in ranks)
    assert all(rank[place]["read_again"] for rank in ranks)


def test_computing_is_measured(ranks):
    found = Measured.of_json(json.loads(ranks[0]["one host"]["found"]))
    mean = (1 + 1 + 3) / 3
    module = found.module
    assert module.compute_seconds(16) == pytest.approx(mean * (FIXED + 16 * PER_ROW), rel=0.25)
    assert module.seconds_per_row == pytest.approx(mean * PER_ROW, rel=0.5)
    assert module.backward_share < 0.5  # it sleeps in the forward pass
    assert module.optimizer_state_bytes >= 2 * module.trainable_parameter_bytes
    assert module.parameter_bytes == module.trainable_parameter_bytes == 4 * (15 + 8)
    assert module.layer_parameter_bytes == (60, 32)
    assert module.batch_norm
    assert module.buffer_bytes == 2 * 16 + 8
    assert module.activation_bytes_per_row > 0
    assert 0 < module.optimizer_seconds < 0.5


def test_a_rank_that_is_slow_is_seen(ranks):
    cluster = Measured.of_json(json.loads(ranks[0]["one host"]["found"])).cluster
    assert sum(cluster.slowdowns) == pytest.approx(3)
    assert max(cluster.slowdowns) == cluster.slowdowns[2] == pytest.approx(9 / 5, rel=0.2)
    assert cluster.memory_bytes is not None
    assert cluster.memory_bytes > 1 << 20
    assert cluster.copied_bytes_per_second > 1e8
    assert 0 <= cluster.jitter < 1
    assert 0 <= cluster.overlap <= 1


def test_links_are_those_between_and_inside_hosts(ranks):
    found = {place: Measured.of_json(json.loads(ranks[0][place]["found"])).cluster for place in PLACES}
    one, two, each = (found[place] for place in PLACES)
    assert (one.hosts, two.hosts, each.hosts) == (1, 2, 3)
    assert (one.ranks_per_host, two.ranks_per_host, each.ranks_per_host) == (3, 2, 1)
    assert one.inside == one.between
    assert two.inside is not None
    assert two.inside != two.between
    assert each.inside is None
    for cluster in found.values():
        assert 0 <= cluster.between.latency_seconds < 0.1
        assert 1e6 < cluster.between.bytes_per_second < 1e12


def test_measuring_keeps_to_its_budget(ranks):
    # The steps of the slow rank take 0.1 s each; the rest is the load of the machine.
    assert all(rank[place]["seconds"] < 3 * BUDGET for rank in ranks for place in PLACES)


def test_the_prediction_of_a_step_that_computes(ranks):
    found = Measured.of_json(json.loads(ranks[0]["one host"]["found"]))
    step = estimate(Candidate(), found.module, found.cluster, 3 * 16)
    slowest = 3 * (FIXED + 16 * PER_ROW)
    assert step.seconds_per_step == pytest.approx(slowest, rel=0.35)
    assert rank_strategies(found.module, found.cluster, 48)[0].feasible


def test_one_rank_measures_too(torchrun):
    (alone,) = torchrun(probe_alone, 1)
    assert alone["unchanged"]
    found = Measured.of_json(json.loads(alone["found"]))
    assert found.cluster.world_size == 1
    assert rank_strategies(found.module, found.cluster, 48)[0].strategy == "ddp"
