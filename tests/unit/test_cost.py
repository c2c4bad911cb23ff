"""The arithmetic behind the choice of a strategy: cases worked out by hand, and what holds whatever the numbers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparkdl.batch import Batch
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective
from sparkdl.parallel import recommend, strategy_names
from sparkdl.parallel.alpha_beta import (
    Link,
    fit_link,
    halving_doubling_all_reduce,
    hierarchical_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    ring_bytes,
    ring_link,
    ring_reduce_scatter,
    tree_all_reduce,
    tree_broadcast,
)
from sparkdl.parallel.candidates import Candidate, candidates_for
from sparkdl.parallel.cost import estimate, overlapped_all_reduce, rank_strategies, table
from sparkdl.parallel.facts import ClusterFacts, ModuleFacts
from sparkdl.parallel.measuring import count_module, fitting, of_rows
from sparkdl.parallel.recommendation import Recommendation

MIB = 1 << 20
LINK = Link(0.001, 1000.0)
# Round numbers: 10 ms fixed, 1 ms per row, 100 MiB of parameters in four layers.
MODULE = ModuleFacts(
    parameter_bytes=100 * MIB,
    trainable_parameter_bytes=100 * MIB,
    optimizer_state_bytes=200 * MIB,
    buffer_bytes=MIB,
    activation_bytes_per_row=MIB,
    seconds_per_row=1e-3,
    fixed_seconds=10e-3,
    optimizer_seconds=2e-3,
    backward_share=0.5,
    layer_parameter_bytes=(25 * MIB,) * 4,
    boundary_bytes_per_row=1024.0,
    low_rank_bytes=MIB // 2,
    vector_bytes=MIB,
    chain_length=4,
)
FOUR = ClusterFacts(world_size=4, between=Link(0.0, 100.0 * MIB))

links = st.builds(Link, st.floats(0, 1e-2), st.floats(1e5, 1e11))
ranks = st.integers(1, 300)
sizes = st.floats(0, 1e9)


# ---- collectives -----------------------------------------------------------------------------------------------------
def test_collectives_by_hand():
    # 4 ranks, 800 bytes: a fourth takes 1 ms + 200 ms, the whole 1 ms + 800 ms.
    assert ring_reduce_scatter(800, 4, LINK) == pytest.approx(3 * 0.201)
    assert ring_all_gather(800, 4, LINK) == pytest.approx(3 * 0.201)
    assert ring_all_reduce(800, 4, LINK) == pytest.approx(6 * 0.201)
    assert tree_broadcast(800, 4, LINK) == pytest.approx(2 * 0.801)
    assert tree_broadcast(800, 5, LINK) == pytest.approx(3 * 0.801)
    assert tree_all_reduce(800, 4, LINK) == pytest.approx(4 * 0.801)
    assert halving_doubling_all_reduce(800, 4, LINK) == pytest.approx(4 * 0.001 + 1.2)
    assert halving_doubling_all_reduce(800, 5, LINK) == pytest.approx(4 * 0.001 + 1.2 + 2 * 0.801)
    inside = Link(0.0, 1e4)
    expected = 2 * 0.04 + 2 * (0.001 + 0.4)  # 400 of 800 bytes inside, twice; the host's link carries the ring of two
    assert hierarchical_all_reduce(800, 2, 2, inside, LINK) == pytest.approx(expected)


@given(sizes, ranks)
def test_a_ring_sends_the_bytes_that_every_all_reduce_has_to(size, ranks):
    assert ring_bytes(size, ranks) == pytest.approx(2 * (ranks - 1) / ranks * size)
    assert ring_bytes(size, ranks) <= 2 * size
    without_latency = Link(0.0, 1e6)
    assert ring_all_reduce(size, ranks, without_latency) == pytest.approx(ring_bytes(size, ranks) / 1e6)


@given(sizes, ranks, links)
def test_one_rank_sends_nothing_and_more_cost_no_less(size, ranks, link):
    for collective in (ring_all_reduce, tree_all_reduce, ring_all_gather, tree_broadcast):
        assert collective(size, 1, link) == 0
        assert collective(size, ranks + 1, link) >= collective(size, ranks, link) * (1 - 1e-12)


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e10), st.integers(2, 64))
def test_a_link_is_found_again_from_its_times(latency, bandwidth, ranks):
    truth = Link(latency, bandwidth)
    sizes = [2.0**power for power in range(10, 26, 3)]
    measured = fit_link(sizes, [ring_all_reduce(size, ranks, truth) for size in sizes])
    found = ring_link(measured, ranks)
    assert found.latency_seconds == pytest.approx(latency, rel=1e-3)
    assert found.bytes_per_second == pytest.approx(bandwidth, rel=1e-3)


def test_a_fit_has_no_negative_numbers():
    link = fit_link([1024, 2048], [0.02, 0.01])
    assert link.latency_seconds >= 0
    assert 0 < link.bytes_per_second < math.inf


# ---- strategies by hand ----------------------------------------------------------------------------------------------
def test_ddp_by_hand():
    # 8 rows each: forward and backward pass 9 ms each; four buckets of 25 MiB, each 1.5 x 0.25 s by the ring.
    found = estimate(Candidate(), MODULE, FOUR, 32)
    first_ready = 0.009 / 4
    assert found.seconds_per_step == pytest.approx(0.009 + first_ready + 4 * 0.375 + 0.002)
    assert found.compute_seconds == pytest.approx(0.018 + 0.002)
    assert found.rows_per_second == pytest.approx(32 / found.seconds_per_step)
    assert found.memory_bytes == (400 + 1 + 8) * MIB
    assert found.feasible
    assert found.candidate.exact


def test_all_reduces_hide_behind_the_backward_pass():
    # Gradients come from the last layer on; the last bucket is sent when nothing is left to compute.
    layers = [25.0 * MIB] * 4
    assert overlapped_all_reduce(layers, 4.0, lambda size: 0.5) == pytest.approx((4.5, 2.0))
    assert overlapped_all_reduce(layers, 4.0, lambda size: 2.0) == pytest.approx((1.0 + 4 * 2.0, 8.0))
    # Small layers share buckets: 1 MiB, then 25.
    sent = []
    overlapped_all_reduce([10.0 * MIB] * 6, 1.0, lambda size: sent.append(size / MIB) or 0.0)
    assert sent == [10, 30, 20]


def test_exchanging_may_slow_down_computing():
    # Backward pass 9 ms, four exchanges of 375 ms: all one after the other where nothing overlaps.
    found = [
        estimate(Candidate(), MODULE, replace(FOUR, overlap=part), 32).seconds_per_step for part in (1.0, 0.5, 0.0)
    ]
    assert found[0] == estimate(Candidate(), MODULE, FOUR, 32).seconds_per_step
    assert found[2] == pytest.approx(0.018 + 4 * 0.375 + 0.002)
    assert found[1] == pytest.approx((found[0] + found[2]) / 2)


def test_a_compression_sends_its_part():
    half = estimate(Candidate(compression="fp16"), MODULE, FOUR, 32)
    whole = estimate(Candidate(), MODULE, FOUR, 32)
    assert whole.seconds_per_step > half.seconds_per_step > whole.seconds_per_step / 2
    low_rank = estimate(Candidate(compression="powersgd"), MODULE, FOUR, 32)
    assert low_rank.seconds_per_step == pytest.approx(0.009 + 0.009 / 4 + 18 * 0.01048576 + 1.5 * 0.02 + 0.002)
    assert low_rank.seconds_per_step < whole.seconds_per_step / 4
    assert low_rank.memory_bytes == whole.memory_bytes + 100 * MIB  # what was not sent
    many = replace(FOUR, world_size=1024)
    top_k = [estimate(Candidate(compression="topk"), MODULE, one, 32 * one.world_size) for one in (FOUR, many)]
    # What each of 1,024 ranks sends to all others is 20 times the gradients.
    assert top_k[1].seconds_per_step > estimate(Candidate(), MODULE, many, 32 * 1024).seconds_per_step
    assert top_k[1].seconds_per_step > top_k[0].seconds_per_step * 20


def test_sharding_by_hand():
    slow = replace(MODULE, seconds_per_row=0.0, fixed_seconds=0.0, optimizer_seconds=0.0)
    nccl = replace(FOUR, backend="nccl")
    free_copies = replace(FOUR, copied_bytes_per_second=1e15)
    # Two all-gathers and a reduce-scatter of 0.75 s each, on gloo the last one is an all-reduce.
    assert estimate(Candidate(strategy="fsdp"), slow, nccl, 32).seconds_per_step == pytest.approx(3 * 0.75)
    assert estimate(Candidate(strategy="fsdp"), slow, free_copies, 32).seconds_per_step == pytest.approx(4 * 0.75)
    found = estimate(Candidate(strategy="fsdp"), MODULE, FOUR, 32)
    assert found.memory_bytes == (400 / 4 + 75 + 1 + 8) * MIB
    hosts = ClusterFacts(
        world_size=4, between=Link(0.0, 10.0 * MIB), inside=Link(0.0, 100.0 * MIB), ranks_per_host=2, backend="nccl"
    )
    hybrid = estimate(Candidate(strategy="hsdp", shard_size=2), slow, hosts, 32)
    # Inside: three times half of 100 MiB. Between two hosts: both ranks' 50 MiB over one link, by a ring of two.
    assert hybrid.seconds_per_step == pytest.approx(3 * 0.5 + 2 * 5.0)
    assert hybrid.seconds_per_step < estimate(Candidate(strategy="fsdp"), slow, hosts, 32).seconds_per_step
    assert "2 ranks" in str(hybrid.candidate)


def test_local_sgd_sends_a_part_of_the_steps():
    every = {
        steps: estimate(Candidate(strategy="local_sgd", sync_every=steps), MODULE, FOUR, 32).seconds_per_step
        for steps in (1, 8, 10**9)
    }
    exchange = 101 * 1.5 / 100
    assert every[1] == pytest.approx(0.020 + exchange)
    assert every[8] == pytest.approx(0.020 + exchange / 8)
    assert every[10**9] == pytest.approx(0.020)
    outer = estimate(Candidate(strategy="local_sgd", sync_every=8, outer="nesterov"), MODULE, FOUR, 32)
    assert outer.memory_bytes == (409 + 200) * MIB
    ring = estimate(Candidate(strategy="local_sgd", outer="ring"), MODULE, FOUR, 32)
    assert ring.seconds_per_step == pytest.approx(0.020 + 2 * 1.01)


def test_a_pipeline_has_its_bubble():
    module = replace(MODULE, fixed_seconds=0.0, optimizer_seconds=0.0, boundary_bytes_per_row=0.0)
    for stages, pieces in ((2, 4), (4, 4), (4, 16)):
        cluster = replace(FOUR, world_size=stages)
        found = estimate(Candidate(strategy="pipeline", stages=stages, micro_batches=pieces), module, cluster, 64)
        bubble = 1 - found.compute_seconds / found.seconds_per_step
        assert bubble == pytest.approx((stages - 1) / (pieces + stages - 1))
        assert found.seconds_per_step == pytest.approx(0.064 / stages / pieces * (pieces + stages - 1))


def test_the_largest_stage_sets_the_pace_of_a_pipeline():
    module = replace(MODULE, layer_parameter_bytes=(60, 10, 10, 20))
    assert module.largest_stage(1) == 1
    assert module.largest_stage(2) == pytest.approx(0.6)
    assert module.largest_stage(4) == pytest.approx(0.6)
    assert replace(module, layer_parameter_bytes=(1, 2, 3, 4, 5)).largest_stage(2) == pytest.approx(9 / 15)


def test_a_parameter_server_carries_all_workers():
    # Three workers push 100 MiB each over one link, and pull as much.
    waiting = estimate(Candidate(strategy="parameter_server"), MODULE, FOUR, 33)
    assert waiting.seconds_per_step == pytest.approx(0.021 + 2 * 3.0 + 0.002)
    late = estimate(Candidate(strategy="parameter_server", max_staleness=4), MODULE, FOUR, 33)
    assert late.seconds_per_step == pytest.approx(1.6 * 3.0 + 3 * 0.002)
    assert not late.candidate.exact
    none_left = estimate(Candidate(strategy="parameter_server", num_servers=4), MODULE, FOUR, 33)
    assert not none_left.feasible
    assert none_left.reason == "4 servers leave no workers"


def test_ranks_that_vary_are_waited_for_in_every_step_or_in_few():
    uneven = replace(FOUR, slowdowns=(0.5, 0.5, 1.0, 2.0), jitter=0.1)
    assert uneven.pace_together(4) == pytest.approx(2.0 * (1 + 0.1 * math.sqrt(2 * math.log(4))))
    assert 2.0 < uneven.pace_together(4, 100) < uneven.pace_together(4)
    assert uneven.pace_alone == 2.0
    assert FOUR.pace_together(4) == 1.0
    one = replace(uneven, slowdowns=(), jitter=0.5, world_size=1)
    assert one.pace_together(1) == 1.0


def test_tensor_parallelism_adds_up_activations():
    found = estimate(Candidate(strategy="tensor_parallel", tensor_size=4), MODULE, FOUR, 32)
    one = 1.5 * 32 * 1024 / (100 * MIB)
    assert found.seconds_per_step == pytest.approx((0.042 + 0.002) / 4 + 4 * one)
    assert not found.feasible
    assert "a plan of layers" in found.reason


def test_a_candidate_can_be_built():
    for candidate in candidates_for(MODULE, replace(FOUR, world_size=8, ranks_per_host=4, inside=Link(0.0, 1e9))):
        if candidate.strategy in strategy_names() and candidate.strategy != "tensor_parallel":
            strategy = candidate.build()
            assert strategy.name == candidate.strategy
            strategy.replicas(8)


# ---- the choice ------------------------------------------------------------------------------------------------------
modules = st.builds(
    lambda layers, per_row, fixed: replace(
        MODULE,
        parameter_bytes=sum(layers),
        trainable_parameter_bytes=sum(layers),
        layer_parameter_bytes=tuple(layers),
        seconds_per_row=per_row,
        fixed_seconds=fixed,
        chain_length=len(layers),
    ),
    st.lists(st.integers(1, 1 << 30), min_size=1, max_size=12),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
)
clusters = st.builds(
    lambda hosts, per_host, between, inside, jitter, backend: ClusterFacts(
        world_size=hosts * per_host,
        between=between,
        inside=inside if per_host > 1 else None,
        ranks_per_host=per_host,
        jitter=jitter,
        backend=backend,
    ),
    st.integers(1, 64),
    st.integers(1, 8),
    links,
    links,
    st.floats(0, 0.5),
    st.sampled_from(["gloo", "nccl"]),
)


@given(modules, clusters, st.floats(1, 100), st.integers(1, 64))
def test_more_bandwidth_is_never_slower(module, cluster, factor, rows):
    def faster(link):
        return None if link is None else Link(link.latency_seconds / factor, link.bytes_per_second * factor)

    better = replace(cluster, between=faster(cluster.between), inside=faster(cluster.inside))
    batch = rows * cluster.world_size
    for candidate in candidates_for(module, cluster):
        before, after = (estimate(candidate, module, one, batch) for one in (cluster, better))
        assert after.seconds_per_step <= before.seconds_per_step * (1 + 1e-9), candidate


@given(modules, clusters, st.integers(1, 64))
def test_every_step_takes_at_least_its_computing(module, cluster, rows):
    for one in rank_strategies(module, cluster, rows * cluster.world_size):
        assert one.seconds_per_step >= one.compute_seconds * (1 - 1e-9)
        assert one.memory_bytes > 0


@given(modules, clusters, st.integers(1, 64), st.booleans())
def test_the_first_is_the_best_of_those_to_choose_from(module, cluster, rows, exact):
    found = rank_strategies(module, cluster, rows * cluster.world_size, exact=exact)
    eligible = [one for one in found if one.feasible and (one.candidate.exact or not exact)]
    assert found[0] is eligible[0]
    assert found[0].seconds_per_step <= 1.05 * min(one.seconds_per_step for one in eligible)
    assert found[: len(eligible)] == eligible
    assert [one.feasible for one in found] == sorted((one.feasible for one in found), reverse=True)


def test_a_simpler_strategy_is_chosen_where_it_is_as_good():
    nothing_to_send = ClusterFacts(world_size=4, between=Link(0.0, 1e15))
    assert rank_strategies(MODULE, nothing_to_send, 128)[0].strategy == "ddp"


def test_a_module_that_does_not_fit_is_sharded():
    small = replace(FOUR, memory_bytes=300 * MIB)
    found = rank_strategies(replace(MODULE, chain_length=1), small, 32)
    assert found[0].strategy == "fsdp"
    ddp = next(one for one in found if one.candidate == Candidate())
    assert not ddp.feasible
    assert ddp.reason == "needs 409 MiB of 300 MiB per rank"
    rows = replace(MODULE, activation_bytes_per_row=50.0 * MIB)
    many = estimate(Candidate(), rows, replace(FOUR, memory_bytes=610 * MIB), 64)
    assert many.reason == "needs 1.2 GiB of 610 MiB per rank; microBatchSize=4 would fit"
    assert estimate(Candidate(), rows, replace(FOUR, memory_bytes=610 * MIB), 64, 4).feasible


def test_what_a_pipeline_cannot_cut():
    pipeline = Candidate(strategy="pipeline", stages=4, micro_batches=4)
    assert estimate(pipeline, MODULE, FOUR, 32).feasible
    assert "a chain of 3" in estimate(pipeline, replace(MODULE, chain_length=3), FOUR, 32).reason
    assert "BatchNorm" in estimate(pipeline, replace(MODULE, batch_norm=True), FOUR, 32).reason
    odd = replace(FOUR, world_size=6)
    assert estimate(pipeline, MODULE, odd, 32).reason == "4 stages do not divide 6 ranks"
    tensor = Candidate(strategy="tensor_parallel", tensor_size=4)
    assert estimate(tensor, MODULE, odd, 32).reason == "4 ranks do not divide 6"
    assert estimate(Candidate(strategy="hsdp", shard_size=4), MODULE, odd, 32).reason == "4 ranks do not divide 6"


def test_lossy_strategies_compete_only_when_asked():
    slow = replace(FOUR, between=Link(0.0, 1.0 * MIB))
    assert rank_strategies(MODULE, slow, 32)[0].candidate.exact
    best = rank_strategies(replace(MODULE, chain_length=1), slow, 32, exact=False)[0]
    assert not best.candidate.exact
    assert best.reason == "another result than ddp"


def test_micro_batches_cost_their_fixed_seconds():
    assert MODULE.compute_seconds(8) == pytest.approx(0.018)
    assert MODULE.compute_seconds(8, 2) == pytest.approx(0.048)
    assert MODULE.compute_seconds(0) == pytest.approx(0.010)


def test_a_table_has_a_line_for_each():
    found = rank_strategies(MODULE, replace(FOUR, memory_bytes=509 * MIB - 1), 32)
    lines = table(found).splitlines()
    assert len(lines) == len(found) + 1
    assert lines[0].split() == ["strategy", "ms/step", "computing", "rows/s", "memory", "remark"]
    assert any("no: needs 509 MiB of 509 MiB per rank" in line for line in lines)
    assert any("another result than ddp" in line for line in lines)
    assert "parameter_server (4 servers, synchronous)" in table(
        [estimate(Candidate(strategy="parameter_server", num_servers=4), MODULE, FOUR, 32)]
    )


def test_links_between_and_inside_hosts():
    hosts = ClusterFacts(
        world_size=8, between=Link(1e-3, 10.0), inside=Link(1e-5, 100.0), ranks_per_host=4, backend="nccl"
    )
    assert hosts.hosts == 2
    assert hosts.link_of(4) == Link(1e-5, 100.0)
    assert hosts.link_of(8) == Link(1e-3, 10.0)
    assert hosts.link_across(4) == Link(1e-3, 2.5)
    assert replace(hosts, world_size=4).neighbours == Link(1e-5, 100.0)
    small, large = hosts.all_reduce_seconds(1e-6), hosts.all_reduce_seconds(1e6)
    assert small == pytest.approx(2 * 3 * 1e-5 + 2 * 1e-3, rel=1e-3)  # two rounds between hosts instead of fourteen
    assert large == pytest.approx(2 * 0.75e4 + 1e5, rel=1e-3)
    assert replace(hosts, backend="gloo").all_reduce_seconds(1e-6) == pytest.approx(14e-3, rel=1e-3)
    assert replace(hosts, world_size=1).all_reduce_seconds(1e6) == 0
    assert ClusterFacts.of_json(hosts.to_json()) == hosts


# ---- a module --------------------------------------------------------------------------------------------------------
def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Sequential(nn.Linear(100, 50), nn.ReLU()), nn.Linear(50, 2))


def test_a_module_is_weighed():
    facts = count_module(mlp())
    assert facts.layer_parameter_bytes == (2100 * 4, 5050 * 4, 102 * 4)
    assert facts.parameter_bytes == facts.trainable_parameter_bytes == 7252 * 4
    assert facts.chain_length == 3
    assert facts.low_rank_bytes == (120 + 150) * 4  # the last one is too small to gain anything
    assert facts.vector_bytes == (152 + 100) * 4
    assert facts.gradient_bytes == facts.layer_parameter_bytes
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert count_module(frozen).trainable_parameter_bytes == (5050 + 102) * 4
    assert sum(count_module(frozen).gradient_bytes) == pytest.approx((5050 + 102) * 4)
    normed = count_module(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert normed.batch_norm
    assert normed.buffer_bytes == 3 * 4 * 2 + 8


def test_what_rows_leave_behind_is_counted():
    example = of_rows(batch_of(5), 5)
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    facts = count_module(module, Objective(nn.CrossEntropyLoss()), example)
    # Inputs (20), the outputs of both ReLUs (100, 50), log-softmax (2) and its like, labels (8 bytes).
    assert 4 * (20 + 100 + 50) <= facts.activation_bytes_per_row <= 4 * (20 + 2 * 100 + 2 * 50 + 10) + 16
    assert facts.boundary_bytes_per_row == 400
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def batch_of(rows):

    return Batch((torch.randn(rows, 20),), (torch.zeros(rows, dtype=torch.int64),), torch.rand(rows))


def test_rows_are_repeated():
    batch = batch_of(3)
    more = of_rows(batch, 7)
    assert more.rows == 7
    assert torch.equal(more.inputs[0][3:6], batch.inputs[0])
    assert torch.equal(more.weight, torch.ones(7))
    assert of_rows(batch.part(0, 0), 4).inputs[0].shape == (4, 20)


def test_fixed_seconds_and_those_per_row():
    assert fitting((2, 8), (0.010, 0.016)) == pytest.approx((0.008, 0.001))
    assert fitting((2, 8), (0.010, 0.008)) == pytest.approx((0.010, 0.0))
    assert fitting((2, 8), (0.001, 0.016)) == pytest.approx((0.0, 0.002))


# ---- a cluster that one does not have --------------------------------------------------------------------------------
def test_a_thousand_ranks_by_hand_or_by_a_measured_step():
    guessed = recommend(mlp(), num_train_workers=1024, bandwidth=1.25e9, latency=50e-6)
    assert isinstance(guessed, Recommendation)
    assert guessed.batch_size == 32 * 1024
    assert guessed.strategy == guessed.estimates[0].strategy
    assert guessed.module.seconds_per_row == pytest.approx(6 * 7252 / 1e11)
    text = str(guessed)
    assert "compute is taken from 1e+11 operations per second" in text
    assert "ddp" in text
    example = (torch.randn(4, 20), torch.tensor([0, 1, 0, 1]))
    measured = recommend(
        mlp(), 1024, example=example, loss="cross_entropy", batch_size=4096, ranks_per_host=8, budget_seconds=0.1
    )
    assert measured.module.seconds_per_row + measured.module.fixed_seconds > 0
    assert measured.module.optimizer_state_bytes >= 2 * 7252 * 4
    assert measured.cluster.hosts == 128
    assert "compute was measured in this process" in str(measured)


def test_a_large_module_is_recommended_to_be_sharded():
    with torch.device("meta"):
        large = nn.Sequential(*[nn.Linear(8192, 8192) for _ in range(16)])
    answer = recommend(large, 64, memory=8e9, ranks_per_host=8, backend="nccl", batch_size=512)
    assert answer.strategy in ("fsdp", "hsdp", "pipeline")
    nothing = recommend(large, 64, memory=1e3)
    assert nothing.strategy == "ddp"
    assert nothing.reason.startswith("No strategy is feasible")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_train_workers": 0}, r"num_train_workers=0 is too small\. Use a number above 0"),
        ({"bandwidth": -1.0}, r"bandwidth=-1\.0 is too small"),
        ({"example": (torch.ones(2, 20), torch.ones(2))}, r"an example, but no loss\. Give loss="),
        ({"example": torch.ones(2, 20), "loss": "mse"}, r"example is a Tensor\. Give \(input, label\)"),
        ({"example": ("a", "b"), "loss": "mse"}, r"example is a tuple\. Give \(input, label\)"),
    ],
)
def test_questions_that_make_no_sense(arguments, match):
    with pytest.raises(ConfigError, match=match):
        recommend(mlp(), **{"num_train_workers": 4, **arguments})
