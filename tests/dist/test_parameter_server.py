"""The parameter server: synchronous steps against one process, asynchronous ones against arithmetic, and failures."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import Timeouts, TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.in_memory import TensorRows, open_rows
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import ParameterServer, Replicas, Setting, build_strategy
from sparkdl.parallel.parameter_server import deal_parameters, stale_rate_factor
from sparkdl.schedule import SchedulerRecipe
from sparkdl.standalone import FitResult, fit_module
from tests.dist.conftest import ROOT, Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

ROWS, SHARDS, EPOCHS = 40, 3, 2
FOLDER = "SPARKDL_TEST_PARAMETER_SERVER"
SAVED = 7  # steps, in the second epoch of batches of 9 rows
RATE, DECAY = 0.25, 0.5
PATIENCE = timedelta(seconds=100)


# ---- what is trained -------------------------------------------------------------------------------------------------
def rows(*, weighted: bool = False) -> TensorRows:
    random = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    labels = (features.sum(1) > 0).long() + (features[:, 0] > 1).long()
    weight = torch.rand(ROWS, generator=random, dtype=torch.float64) + 0.1
    return TensorRows({"features": features}, {"label": labels}, weight=weight if weighted else None)


def made(*layers: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(*(layer() for layer in layers)).double()


def mlp() -> nn.Module:
    return made(lambda: nn.Linear(3, 8), nn.Tanh, lambda: nn.Linear(8, 8), nn.Tanh, lambda: nn.Linear(8, 3))


def noisy() -> nn.Module:
    """Random numbers and running means."""
    return made(lambda: nn.Linear(3, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Dropout(0.3), lambda: nn.Linear(8, 3))


class Spare(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare = mlp(), mlp()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features)
        return found


class Single(nn.Module):
    """Computes in single precision, whatever it is given: autocast leaves doubles alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp().float()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features.float())
        return found


@dataclass(frozen=True)
class Case:
    """A synchronous fit.

    Attributes:
        num_servers: Of four ranks.
        module: Makes the module.
        recipe: Of the optimizer.
        weighted: True where rows have weights.
        settings: Of `TrainConfig`.
        prepare: What the oracle does to its module first.
        before_step: What the oracle does before a step.
    """

    num_servers: int = 1
    module: Callable[[], nn.Module] = mlp
    recipe: OptimizerRecipe = field(default_factory=lambda: OptimizerRecipe("sgd", 0.2, {"momentum": 0.9}))
    weighted: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], Any] = lambda module: None
    before_step: Callable[[nn.Module], Any] = lambda module: None


ADAM = OptimizerRecipe("adamw", 0.02, weight_decay=0.1)
CASES = {
    "one server": Case(),
    "two servers": Case(2, weighted=True, recipe=ADAM),
    "three servers and one worker": Case(3, settings={"micro_batch_size": 2}),
    "clipped by norm": Case(
        settings={"gradient_clip_norm": 0.1},
        before_step=lambda module: nn.utils.clip_grad_norm_(module.parameters(), 0.1),
    ),
    "clipped by value": Case(
        2,
        settings={"gradient_clip_value": 0.02},
        before_step=lambda module: nn.utils.clip_grad_value_(module.parameters(), 0.02),
    ),
    "an unused layer that would decay": Case(module=Spare, recipe=ADAM),
    "groups, frozen parameters and activations computed again": Case(
        2,
        recipe=OptimizerRecipe("sgd", 0.2, parameter_groups={"bias": {"lr": 0.5}}),
        settings={"frozen_parameters": ("^2",), "activation_checkpointing": ("0",)},
        prepare=lambda module: module[2].requires_grad_(False),
    ),
}


def config(**settings: Any) -> TrainConfig:
    values = {"max_epochs": EPOCHS, "batch_size": 3, "num_shards": SHARDS, "seed": 7, "verbose": False, **settings}
    return TrainConfig(**values)


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def fit(
    strategy: ParameterServer, module: nn.Module, recipe: OptimizerRecipe, *, weighted: bool = False, **settings: Any
) -> FitResult:
    how = config(**{name: value for name, value in settings.items() if name not in ("resume", "scheduler")})
    given = {name: settings[name] for name in ("resume", "scheduler") if name in settings}
    return fit_module(
        module,
        rows(weighted=weighted),
        validation=rows(),
        loss=nn.CrossEntropyLoss(),
        optimizer=recipe,
        strategy=strategy,
        config=how,
        **given,
    )


def told(result: FitResult) -> dict[str, Any]:
    return {"weights": dict(result.module.state_dict()), "history": [dict(record) for record in result.history]}


def resume() -> dict[str, Any]:
    """Fits that are interrupted after the same step, and go on with as many servers or another number."""
    folder = Path(os.environ[FOLDER])
    found: dict[str, Any] = {}

    def run(name: str, num_servers: int, make: Callable[[], nn.Module], *, resume: bool = False) -> None:
        cosine = SchedulerRecipe("CosineAnnealingLR", {}, "step")
        found[name] = told(
            fit(
                ParameterServer(num_servers, 0), make(), ADAM, scheduler=cosine, warmup_steps=3, batch_size=9,
                checkpoint_dir=str(folder / name), checkpoint_interval=SAVED, keep_checkpoints=9, resume=resume,
            )
        )  # fmt: skip

    def interrupted(name: str, as_name: str) -> None:
        if dist.get_rank() == 0:
            shutil.copytree(folder / name, folder / as_name)
            for later in (folder / as_name).glob(f"step-*{2 * 5}"):
                shutil.rmtree(later)
        dist.barrier()

    run("calm", 2, noisy)
    interrupted("calm", "resumed")
    run("resumed", 2, noisy, resume=True)
    interrupted("calm", "more workers")
    run("more workers", 1, noisy, resume=True)
    run("even", 1, mlp)
    interrupted("even", "more servers")
    run("more servers", 2, mlp, resume=True)
    return found


def drive(
    strategy: ParameterServer,
    steps: int,
    *,
    pause: Callable[[int], None] = lambda step: None,
    scheduler: SchedulerRecipe | None = None,
    timeouts: Timeouts | None = None,
) -> Tensor:
    """Steps on a loss whose gradient, `slope`, is the same everywhere; the weight that they end with."""
    rank = dist.get_rank()
    linear = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(linear.weight)
    how = config(timeouts=timeouts or Timeouts())
    build = optimization_builder(OptimizerRecipe("sgd", RATE), scheduler, how, steps_per_epoch=steps)
    example = batch_of(0, 0)
    objective = Objective(lambda output, label: output[:, 0])
    strategy.prepare(linear, objective, build, how, Setting(example, False))
    for step in range(steps):
        pause(step)
        works = rank < dist.get_world_size() - strategy.num_servers and rank != 2
        strategy.train_step(batch_of(rank, step) if works else example.part(0, 0), 2.0)
    gathered: Tensor = strategy.gather().weight.detach().clone()
    strategy.close()
    return gathered


def batch_of(rank: int, step: int) -> Batch:
    """Two rows."""
    features = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * rank + step))
    return Batch((features,), (torch.zeros(2),))


def slope(rank: int, step: int) -> Tensor:
    return batch_of(rank, step).inputs[0].sum(0) / 2


def store_of(name: str) -> dist.Store:
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def last_worker_last(name: str, **options: Any) -> Tensor:
    """Rank 1 begins once the other workers have done all four steps; rates halve with every step of the slowest."""
    store, rank = store_of(name), dist.get_rank()

    def pause(step: int) -> None:
        if step == 0 and rank == 1:
            store.wait(["0", "2"], PATIENCE)

    class Told(ParameterServer):
        def train_step(self, batch: Batch, denominator: float) -> Any:
            result = super().train_step(batch, denominator)
            if self.optimization.steps == 4 and rank in (0, 2):
                store.set(str(rank), "done")
            return result

    halved = SchedulerRecipe(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY), {}, "step")
    return drive(Told(1, None, **options), 4, pause=pause, scheduler=halved)


def bounded() -> list[int]:
    """How many steps rank 0 was ahead of rank 1 at each of its steps, where it may be two."""
    store, rank = store_of("bounded"), dist.get_rank()
    ahead: list[int] = []

    def pause(step: int) -> None:
        if rank == 0:
            ahead.append(step - store.add("begun", 0))
            if step == 2:
                store.set("two ahead", "yes")
        if rank == 1:
            if step == 0:
                store.wait(["two ahead"], PATIENCE)
            store.add("begun", 1)

    drive(ParameterServer(1, 2), 12, pause=pause)
    return ahead


def train_all() -> dict[str, Any]:
    """Everything in one group of four ranks."""
    found: dict[str, Any] = {"sync": {}, "resume": resume()}
    for name, case in CASES.items():
        strategy = ParameterServer(case.num_servers, 0)
        found["sync"][name] = told(fit(strategy, case.module(), case.recipe, weighted=case.weighted, **case.settings))
    plain = OptimizerRecipe("sgd", 0.2)
    found["async"] = told(fit(ParameterServer(2, None), noisy(), plain, batch_size=9, max_epochs=4))
    found["half"] = told(fit(ParameterServer(), Single(), plain, precision="bf16", max_epochs=4))
    found["aware"] = last_worker_last("aware")
    found["unaware"] = last_worker_last("unaware", staleness_aware=False)
    found["bounded"] = bounded()
    return found


@pytest.fixture(scope="module")
def found(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the four ranks found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("parameter_server")))
        return torchrun(train_all, 4)


# ---- synchronous -----------------------------------------------------------------------------------------------------
def oracle(case: Case) -> dict[str, Tensor]:
    """One process, whole batches."""
    module = case.module()
    case.prepare(module)
    (optimizer,), _ = case.recipe.build(module)
    data = open_rows(rows(weighted=case.weighted), config(), rank=0, world_size=1)
    for epoch in range(EPOCHS):
        with data.open_epoch(epoch) as batches:
            for batch in batches:
                optimizer.zero_grad()
                losses = nn.functional.cross_entropy(module(batch.inputs[0]), batch.labels[0], reduction="none")
                weight = torch.ones(batch.rows, dtype=torch.float64) if batch.weight is None else batch.weight
                ((losses * weight).sum() / weight.sum()).backward()
                case.before_step(module)
                optimizer.step()
    return {name: value.detach() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_synchronous_steps_are_those_of_one_process(found: list[dict[str, Any]], name: str) -> None:
    for key, value in oracle(CASES[name]).items():
        weights = found[0]["sync"][name]["weights"][key]
        assert float((weights - value).norm() / value.norm()) <= 1e-5, key


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_all_ranks_end_with_the_same_module_and_count_every_row(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        one, first = ((it["sync"]["two servers"] if kind == "sync" else it["async"]) for it in (rank, found[0]))
        assert {record["rows"] for record in one["history"]} == {ROWS}
        assert [record["loss"] for record in one["history"]] == [record["loss"] for record in first["history"]]
        for key, value in one["weights"].items():
            assert torch.equal(value, first["weights"][key]), key


# ---- states ----------------------------------------------------------------------------------------------------------
def test_a_resumed_synchronous_run_is_the_same_to_the_bit(found: list[dict[str, Any]]) -> None:
    calm, resumed = found[0]["resume"]["calm"], found[0]["resume"]["resumed"]
    assert [name for name, value in calm["weights"].items() if not torch.equal(value, resumed["weights"][name])] == []
    assert resumed["history"][-1]["loss"] == pytest.approx(calm["history"][-1]["loss"], rel=1e-12)
    assert resumed["history"][-1]["learning_rate"] == calm["history"][-1]["learning_rate"]


def test_it_goes_on_with_other_numbers_of_servers_and_workers(found: list[dict[str, Any]]) -> None:
    even, other = found[0]["resume"]["even"], found[0]["resume"]["more servers"]
    for name, value in even["weights"].items():
        torch.testing.assert_close(other["weights"][name], value, rtol=1e-9, atol=1e-12)
    assert found[0]["resume"]["more workers"]["history"][-1]["step"] == 10


# ---- asynchronous ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["async", "half"])
def test_asynchronous_fits_learn(found: list[dict[str, Any]], kind: str) -> None:
    history = found[0][kind]["history"]
    assert history[-1]["validation_loss"] < 0.9 * history[0]["validation_loss"]
    assert all(0 < record["compute"] < 1 for record in history)


@pytest.mark.parametrize("kind", ["aware", "unaware"])
def test_rates_follow_the_slowest_worker_and_staleness(found: list[dict[str, Any]], kind: str) -> None:
    """The first gradient of rank 1 has missed four of a world of three workers, the others none."""
    factor = stale_rate_factor(4 / 3) if kind == "aware" else 1.0
    moved = sum(slope(0, step) for step in range(4)) + factor * slope(1, 0)
    moved = moved + sum(DECAY**step * slope(1, step) for step in range(1, 4))
    for rank in found:
        torch.testing.assert_close(rank[kind][0], -RATE * moved, rtol=1e-12, atol=1e-12)


def test_no_worker_is_further_ahead_than_it_may_be(found: list[dict[str, Any]]) -> None:
    ahead = found[0]["bounded"]
    assert ahead[:3] == [0, 1, 2], "it does not wait before"
    assert max(ahead) == 2


# ---- ranks that fail -------------------------------------------------------------------------------------------------
FAULTS = ("a worker is killed", "a server is killed", "a worker raises", "a worker hangs")
VICTIMS = {"a worker is killed": 1, "a server is killed": 2, "a worker raises": 1, "a worker hangs": 1}


def fail_all(folder: str) -> None:
    """Two workers and a server for every fault, all at once; the processes are forked, so that torch is loaded once."""
    context = multiprocessing.get_context("fork")
    processes = {
        (fault, rank): context.Process(target=fail, args=(fault, rank, folder)) for fault in FAULTS for rank in range(3)
    }
    for process in processes.values():
        process.start()
    hanging = processes.pop(("a worker hangs", VICTIMS["a worker hangs"]))
    for process in processes.values():
        process.join(60)
        process.kill()
    hanging.kill()


def fail(fault: str, rank: int, folder: str) -> None:
    """One rank: what it raised, and when after the fault."""
    here = Path(folder) / fault.replace(" ", "_")
    dist.init_process_group("gloo", init_method=f"file://{here}", rank=rank, world_size=3)
    store, is_victim = store_of("fault"), rank == VICTIMS[fault]

    def pause(step: int) -> None:
        if step == 5 and is_victim:
            store.set("at", str(time.time()))
            if fault == "a worker raises":
                raise ArithmeticError("no more of this")
            if fault == "a worker hangs":
                store.wait(["never"], PATIENCE)
            os.kill(os.getpid(), signal.SIGKILL)

    limits = Timeouts(collective=timedelta(seconds=2 if fault == "a worker hangs" else 60))
    try:
        drive(ParameterServer(1, 4), 10_000, pause=pause, timeouts=limits)
    except Exception as error:
        seconds = time.time() - float(store.get("at"))
        kind = type(error).__name__
        here.with_name(f"{here.name}-{rank}.json").write_text(json.dumps([kind, str(error), seconds]))
        os._exit(1)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[Any]]]:
    """By fault and rank, the error, its text and how long after the fault it was raised."""
    folder = tmp_path_factory.mktemp("faults")
    call = f"from tests.dist.test_parameter_server import fail_all; fail_all({str(folder)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment, timeout=120, check=True)
    return {
        fault: {
            rank: json.loads(path.read_text())
            for rank in range(3)
            if (path := folder / f"{fault.replace(' ', '_')}-{rank}.json").exists()
        }
        for fault in FAULTS
    }


@pytest.mark.parametrize("fault", FAULTS[:3])
def test_all_ranks_fail_soon_after_one_does(failures: dict[str, dict[int, list[Any]]], fault: str) -> None:
    victim, by_rank = VICTIMS[fault], failures[fault]
    assert by_rank.keys() >= {0, 1, 2} - {victim}
    for rank, (kind, text, seconds) in by_rank.items():
        if rank == victim:
            assert (kind, text) == ("ArithmeticError", "no more of this")
        else:
            assert kind == "RuntimeError"
            assert re.search(r"Connection (closed|reset) by peer|Broken pipe", text), text
        assert seconds < 20


def test_a_server_says_who_did_not_come_in_time(failures: dict[str, dict[int, list[Any]]]) -> None:
    kind, text, seconds = failures["a worker hangs"][2]
    assert kind == "TimeoutError"
    assert re.match(r"Timed out waiting 2 s for step 6 of rank 1\. See what holds it up, or allow more", text)
    assert seconds < 20
    assert "RuntimeError" in failures["a worker hangs"][0]


# ---- before there are ranks ------------------------------------------------------------------------------------------
def test_the_last_ranks_are_servers() -> None:
    assert ParameterServer().replicas(3) == Replicas(((0,), (1,)))
    assert ParameterServer(2).replicas(3).place_of(1).dp_rank is None
    assert build_strategy("parameter_server") == ParameterServer(1, 4, True)


@pytest.mark.parametrize(
    ("strategy", "ranks", "message"),
    [
        (ParameterServer(), 1, "num_servers=1 of numTrainWorkers=1 leave no rank .* Use numTrainWorkers=2 or more"),
        (ParameterServer(4), 4, "num_servers=4 of numTrainWorkers=4 leave no rank"),
        (ParameterServer(0), 4, "num_servers=0 keep no parameters. Use 1 or more"),
    ],
)
def test_there_must_be_servers_and_workers(strategy: ParameterServer, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy.replicas(ranks)


REFUSED: list[tuple[ParameterServer, dict[str, Any], str]] = [
    (ParameterServer(1, -1), {}, "max_staleness=-1: .* Use 0 or more, or None"),
    (ParameterServer(5), {"frozen_parameters": ("bias",)}, "num_servers=5: .* 3 are trained"),
    (ParameterServer(), {"averaging": "ema"}, "averaging='ema': .* Use averaging='none'"),
    (ParameterServer(), {"non_finite": "skip"}, "nonFinite='skip': .* Use nonFinite='stop'"),
    (ParameterServer(), {"precision": "16"}, "precision='16': .* Use precision='bf16'"),
    (ParameterServer(), {"sync_batch_norm": True}, "syncBatchNorm=True: .* Leave it out"),
    (ParameterServer(), {"balance_shards": True}, "balanceShards=True: .* Leave it out"),
    (ParameterServer(), {"reshuffle_interval": 2}, "reshuffleInterval=2: .* Leave it out"),
    (ParameterServer(), {"gradient_clip_norm": 1.0}, "gradientClipNorm=1 and max_staleness=4: .* Use max_staleness=0"),
    (ParameterServer(1, None), {"gradient_clip_value": 0.5}, "gradientClipValue=0.5 and max_staleness=None"),
    (ParameterServer(2, 0), {"gradient_clip_norm": 1.0}, "gradientClipNorm=1 and num_servers=2: .* Use num_servers=1"),
]


@pytest.mark.parametrize(("strategy", "settings", "message"), REFUSED)
def test_what_cannot_be_is_refused_on_the_driver(
    strategy: ParameterServer, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"strategy='parameter_server' cannot be had with {message}"):
        strategy.check(mlp(), replace(config(), **settings))


def test_ranks_wait_for_each_other_in_synchronous_steps_alone() -> None:
    assert ParameterServer(max_staleness=0).meets(1)
    assert not ParameterServer().meets(1)
    assert not ParameterServer(max_staleness=None).meets(1)


@pytest.mark.parametrize(
    ("sizes", "servers", "expected"),
    [
        ([10, 80, 30, 30, 10], 2, [[1], [0, 2, 3, 4]]),
        ([5, 5, 5], 1, [[0, 1, 2]]),
        ([4, 9, 2, 7], 3, [[1], [3], [0, 2]]),
        ([1], 2, [[0], []]),
    ],
)
def test_parameters_are_dealt_by_size(sizes: list[int], servers: int, expected: list[list[int]]) -> None:
    assert deal_parameters(sizes, servers) == expected


@pytest.mark.parametrize(("staleness", "factor"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (2.5, 0.4)])
def test_older_gradients_have_smaller_rates(staleness: float, factor: float) -> None:
    assert stale_rate_factor(staleness) == pytest.approx(factor)
