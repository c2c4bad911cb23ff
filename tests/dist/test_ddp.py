"""`DataParallel` and its options on three ranks, and on two that go on where the three stopped."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.checkpoint import flatten_state, unflatten_state
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel, Setting
from sparkdl.parallel.compression import Compression, Half, Int8, Parts, PowerSGD, TopK
from sparkdl.preparation import freeze_parameters, prepare_module
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

FOLDER = "SPARKDL_TEST_DDP"
STEPS, SAVED = 8, 3
# Rows of each of three ranks in a step; some have none.
SLICES = ((5, 3, 4), (12, 0, 0), (0, 7, 5), (4, 4, 4))
SETTLED = PowerSGD(start_step=0, min_compression_rate=1)
COMPRESSIONS: dict[str, Compression] = {
    "fp16": Half("fp16"),
    "bf16": Half("bf16"),
    "int8": Int8(),
    "topk": TopK(0.05),
    "powersgd": SETTLED,
    "powersgd after two steps": PowerSGD(3, 2, 1.5),
}


ADAMW = OptimizerRecipe("adamw", 0.01)


class OwnOptimizer(torch.optim.SGD):
    """Nobody knows what it does."""


def own_optimizer(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [OwnOptimizer(module.parameters(), lr=0.1)]


def mlp(*middle: Callable[[], nn.Module]) -> nn.Module:
    """The same every time; its gradients fill several buckets of 16 KiB."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), *(make() for make in middle)]
        return nn.Sequential(*layers, nn.Linear(48, 3)).double()


def global_batch(step: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    features = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Batch((features,), ((features[:, 0] > 0).long() + (features.sum(1) > 1).long(),))


def own_rows(step: int) -> Batch:
    """This rank's rows of a step; on two ranks, those of the third are the second's."""
    counts, rank = SLICES[step % len(SLICES)], dist.get_rank()
    start = sum(counts[:rank])
    last = rank == dist.get_world_size() - 1
    return global_batch(step).part(start, 12 if last else start + counts[rank])


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def copied(state: dict[str, Any]) -> Any:
    """As a checkpoint gives it back, on every rank."""
    told = [flatten_state(state) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    assert told[0] is not None
    tensors, structure = told[0]
    return unflatten_state({name: value.clone() for name, value in tensors.items()}, structure)


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def opened(
    options: dict[str, Any],
    make: Callable[[], nn.Module] = mlp,
    *,
    unused: bool = False,
    recipe: OptimizerRecipe = ADAMW,
    **settings: Any,
) -> DataParallel:
    config = TrainConfig(batch_size=12, num_train_workers=3, **settings)
    module = make()
    freeze_parameters(module, config.frozen_parameters)
    module = prepare_module(module, config)
    strategy = DataParallel(**{"bucket_cap_mb": 16 / 1024, **options})
    strategy.check(module, config)
    build = optimization_builder(recipe, None, config, steps_per_epoch=STEPS)
    strategy.prepare(module, Objective(nn.CrossEntropyLoss()), build, config, Setting(own_rows(0).part(0, 2), unused))
    return strategy


def train(
    options: dict[str, Any], make: Callable[[], nn.Module] = mlp, *, resumed: Any = None, **settings: Any
) -> dict[str, Any]:
    """Some steps of this rank; its state after some of them."""
    strategy = opened(options, make, **settings)
    begun = copied(strategy.state_dict()) if resumed is None else None
    if resumed is not None:
        strategy.load_state_dict(resumed)
    losses, saved = [], None
    for step in range(SAVED if resumed is not None else 0, STEPS):
        strategy.module.train()
        result = strategy.train_step(own_rows(step), 12.0)
        losses.append(float(result.loss))
        if step + 1 == SAVED:
            saved = copied(strategy.state_dict())
    found = {"weights": state_of(strategy.gather()), "losses": losses, "begun": begun, "saved": saved}
    assert strategy.busy_seconds > 0
    strategy.close()
    return found


def repeated_means(compression: Compression) -> dict[str, Any]:
    """What this rank gives, learns and keeps in three steps, one after the other."""
    random = torch.Generator().manual_seed(dist.get_rank())
    parts: Parts = [("wide", torch.Size((9, 70))), ("deep", torch.Size((40, 3, 5))), ("bias", torch.Size((17,)))]
    length = sum(shape.numel() for _, shape in parts)
    shared: dict[str, Tensor] = {}
    kept, lines = torch.zeros(length, dtype=torch.float64), []
    for step in range(3):
        values = torch.randn(length, generator=random, dtype=torch.float64) + kept
        values[: 9 * 70] *= step  # the first gradient of a matrix is zero
        mean, rest = compression.mean(values.clone(), parts, shared, None)
        kept = torch.zeros_like(values) if rest is None else rest.clone()
        lines.append({"values": values, "mean": mean.clone(), "kept": kept})
    return {"lines": lines, "shared": shared}


@dataclass(frozen=True)
class Broken:
    """Fails in the second step."""

    keeps: ClassVar[bool] = True

    def check(self) -> None:
        """Nothing."""

    def compresses(self, step: int) -> bool:
        return step == 1

    def mean(self, *given: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("no space left in the tube")


def failure(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ConfigError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


class Unused(nn.Module):
    """A layer has no part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.idle = mlp(), nn.Linear(2, 2).double()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features)
        return found


def normed() -> nn.Module:
    return mlp(lambda: nn.BatchNorm1d(48))


class Wide(nn.Module):
    """Gradients of several chunks, some of them of one parameter; layers are used in another order than they are there.

    A parameter is used twice, another without the forward of the layer that has it.
    """

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.last, self.middle = nn.Linear(400, 3), nn.Linear(400, 400)
            self.first, self.normed = nn.Linear(6, 400), norm(400)
        self.double()

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.addmm(self.first.bias, features, self.first.weight.T).tanh()
        hidden = self.normed(self.middle(hidden)).tanh()
        found: Tensor = self.last(self.middle(hidden).tanh())
        return found


class Moody(nn.Module):
    """A layer has no part in the output of small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.extra = mlp(), nn.Linear(3, 3).double()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features)
        return self.extra(found) if len(features) > 4 else found


PRIORITY = {"schedule": "priority", "bucket_cap_mb": None}
WIDE: dict[str, dict[str, Any]] = {
    "as it is": {},
    "in micro-batches": {"micro_batch_size": 2},
    "with clipped values": {"gradient_clip_value": 1e-3},
    "with a frozen layer": {"frozen_parameters": ("^first",)},
    "with a warming rate": {"warmup_steps": 5},
    "with shared statistics": {"sync_batch_norm": True},
    "with recomputed layers": {"activation_checkpointing": ("middle",)},
}


def priority() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, settings in WIDE.items():
        make = partial(Wide, nn.BatchNorm1d) if "sync_batch_norm" in settings else Wide
        results[name] = {
            "ready": train({}, make, **settings)["weights"],
            "priority": train(PRIORITY, make, **settings)["weights"],
        }
    calm = train(PRIORITY, Wide)
    results["resumed"] = {"calm": calm, "resumed": train(PRIORITY, Wide, resumed=calm["saved"])}
    results["unused"] = failure(lambda: opened(PRIORITY, Unused, unused=True))
    results["own"] = failure(lambda: opened(PRIORITY, recipe=OptimizerRecipe(configure=own_optimizer)))
    strategy = opened(PRIORITY, Moody)
    for step in range(3):
        strategy.train_step(global_batch(step), 36.0)
    results["moody"] = failure(lambda: strategy.train_step(global_batch(3).part(0, 2), 6.0))
    strategy.close()
    dist.barrier()
    return results


SCENARIOS: dict[str, Callable[[], Any]] = {
    "plain": partial(train, {}),
    "small buckets and a static graph": partial(train, {"static_graph": True}),
    "a static graph of recomputed layers": partial(train, {"static_graph": True}, activation_checkpointing=("2",)),
    "accumulated in a static graph": partial(train, {"static_graph": True}, micro_batch_size=2),
    "everything sent": partial(train, {"compression": TopK(1.0)}),
    "not begun": partial(train, {"compression": PowerSGD()}),
    "rank enough": partial(train, {"compression": PowerSGD(48, 0, 1)}),
    "accumulated": partial(train, {"compression": TopK(1.0)}, micro_batch_size=2),
    "clipped": partial(train, {"compression": TopK(1.0)}, gradient_clip_norm=0.05),
    "clipped, plain": partial(train, {}, gradient_clip_norm=0.05),
    "frozen": partial(train, {"compression": "int8"}, frozen_parameters=("^0",)),
    "averaged": partial(train, {"compression": "int8"}, averaging="ema"),
    "synchronised": partial(train, {"compression": TopK(1.0)}, normed, sync_batch_norm=True),
    "synchronised, plain": partial(train, {}, normed, sync_batch_norm=True),
    "unused": partial(train, {"compression": TopK(1.0)}, Unused, unused=True),
    "single": partial(train, {"compression": "bf16"}, lambda: Cast(), precision="bf16"),
    "scaled": partial(train, {"compression": "fp16"}, lambda: Cast(), precision="16"),
}


class Cast(nn.Module):
    """Computes in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp().float()

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features.float())
        return found


def three_ranks() -> dict[str, Any]:
    results = {name: scenario() for name, scenario in SCENARIOS.items()}
    for name, compression in COMPRESSIONS.items():
        calm = train({"compression": compression})
        resumed = train({"compression": compression}, resumed=calm["saved"])
        results[name] = {"calm": calm, "resumed": resumed, "means": repeated_means(compression)}
        if dist.get_rank() == 0:
            torch.save(calm["saved"], Path(os.environ[FOLDER]) / f"{name}.pt")
    kept = results["topk"]["calm"]["saved"]
    results["refused"] = {
        "static": failure(lambda: opened({"static_graph": True}, Unused, unused=True)),
        "other": failure(lambda: opened({"compression": "int8"}).load_state_dict(kept)),
        "none": failure(lambda: opened({}).load_state_dict(kept)),
    }
    dropped = opened({"compression": "int8"})
    dropped.load_state_dict(results["fp16"]["calm"]["saved"])
    results["begun anew"] = dropped.state_dict()["compressed"]
    results["priority"] = priority()
    results["broken"] = failure(lambda: train({"compression": Broken()}))
    return results


def loaded(name: str) -> dict[str, Any]:
    saved = torch.load(Path(os.environ[FOLDER]) / f"{name}.pt")
    strategy = opened({"compression": COMPRESSIONS[name]})
    strategy.load_state_dict(saved)
    again = strategy.state_dict()["compressed"]
    losses = [float(strategy.train_step(own_rows(step), 12.0).loss) for step in range(SAVED, STEPS)]
    strategy.close()
    return {"saved": saved["compressed"], "again": again, "losses": losses, "weights": state_of(strategy.gather())}


def two_ranks() -> dict[str, Any]:
    return {name: loaded(name) for name in COMPRESSIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("ddp")
        patch.setenv(FOLDER, str(path))
        yield path


@pytest.fixture(scope="module")
def found(torchrun: Torchrun, folder: Path) -> list[dict[str, Any]]:
    """What the three ranks found."""
    return torchrun(three_ranks, 3)


@pytest.fixture(scope="module")
def fewer(torchrun: Torchrun, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two ranks found that went on."""
    return torchrun(two_ranks, 2)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def over_ranks(found: Sequence[dict[str, Any]], name: str, step: int, what: str) -> Tensor:
    return torch.stack([rank[name]["means"]["lines"][step][what] for rank in found])


# ---- tests -----------------------------------------------------------------------------------------------------------
KEEPING = [name for name, compression in COMPRESSIONS.items() if compression.keeps]


def test_it_equals_one_process(found: list[dict[str, Any]]) -> None:
    module = mlp()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = global_batch(step)
        nn.functional.cross_entropy(module(batch.inputs[0]), batch.labels[0]).backward()
        optimizer.step()
    for rank in found:
        assert_close(rank["plain"]["weights"], dict(module.state_dict()), 1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "small buckets and a static graph", "a static graph of recomputed layers", "accumulated in a static graph",
        "everything sent", "not begun", "rank enough", "accumulated",
    ],
)  # fmt: skip
def test_what_loses_nothing_changes_nothing(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert_close(rank[name]["weights"], rank["plain"]["weights"])


@pytest.mark.parametrize("name", ["clipped", "synchronised"])
def test_it_goes_with_other_settings(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert_close(rank[name]["weights"], rank[f"{name}, plain"]["weights"])


def test_it_goes_with_parameters_that_have_no_gradient(found: list[dict[str, Any]]) -> None:
    inner = {name.removeprefix("inner."): value for name, value in found[0]["unused"]["weights"].items()}
    idle = {name: inner.pop(name) for name in list(inner) if name.startswith("idle")}
    assert len(idle) == 2
    assert_close(inner, found[0]["plain"]["weights"])
    start = mlp().state_dict()
    assert {name for name, value in found[0]["frozen"]["weights"].items() if torch.equal(value, start[name])} == {
        "0.weight", "0.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*SCENARIOS, *COMPRESSIONS])
def test_all_ranks_end_with_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    for rank in found[1:]:
        ends = [one[name].get("calm", one[name])["weights"] for one in (found[0], rank)]
        assert [
            key for key, value in ends[0].items() if "running" not in key and not torch.equal(value, ends[1][key])
        ] == []


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_it_learns_as_well_as_without(found: list[dict[str, Any]], name: str) -> None:
    first, plain = (sum(rank["plain"]["losses"][step] for rank in found) for step in (0, -1))
    last = sum(rank[name]["calm"]["losses"][-1] for rank in found)
    if name == "topk":  # most of the gradient is still to come
        assert last < first
    else:
        assert last == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_sends_the_mean_to_its_precision(found: list[dict[str, Any]], name: str) -> None:
    precision = torch.finfo(torch.float16 if name == "fp16" else torch.bfloat16).eps
    for step in range(3):
        values = over_ranks(found, name, step, "values")
        error = (over_ranks(found, name, step, "mean") - values.mean(0)).abs()
        assert (error <= precision * values.abs().mean(0) * 1.5 + 1e-7).all()
        assert error.max() > 0
    assert found[0][name]["calm"]["saved"]["compressed"]["kept"] == [{}, {}, {}]


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_all_ranks_learn_the_same(found: list[dict[str, Any]], name: str) -> None:
    for step in range(3):
        means = over_ranks(found, name, step, "mean")
        assert (means == means[0]).all()
        assert means.isfinite().all()


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_sent_and_what_is_kept_is_all_there_is(found: list[dict[str, Any]], name: str) -> None:
    for step in range(3):
        values, means, kept = (over_ranks(found, name, step, what) for what in ("values", "mean", "kept"))
        torch.testing.assert_close(3 * means[0] + kept.sum(0), values.sum(0), rtol=1e-9, atol=1e-9)


def test_top_k_keeps_what_it_did_not_send(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for line in rank["topk"]["means"]["lines"]:
            sent = line["kept"] == 0
            assert torch.equal(line["kept"][~sent], line["values"][~sent])
            assert line["values"][sent].abs().max() >= line["kept"].abs().max()


def test_a_gradient_that_was_zero_once_is_followed_again(found: list[dict[str, Any]]) -> None:
    first, *others = (found[0]["powersgd"]["means"]["lines"][step]["mean"][: 9 * 70] for step in range(3))
    assert not first.any()
    for mean in others:
        assert torch.linalg.matrix_rank(mean.view(9, 70)) == SETTLED.rank


# ---- priority --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WIDE)
def test_gradients_that_are_sent_by_priority_are_the_same(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        ready, priority = rank["priority"][name]["ready"], rank["priority"][name]["priority"]
        torch.testing.assert_close(priority, ready, rtol=1e-9, atol=1e-12)
        for key, value in priority.items():
            assert "running" in key or torch.equal(value, found[0]["priority"][name]["priority"][key]), key


def test_it_goes_on_to_the_bit_by_priority_too(found: list[dict[str, Any]]) -> None:
    for rank in found:
        calm, resumed = (rank["priority"]["resumed"][name] for name in ("calm", "resumed"))
        assert calm["losses"][SAVED:] == resumed["losses"]
        assert all(torch.equal(value, resumed["weights"][key]) for key, value in calm["weights"].items())


def test_priority_needs_all_gradients(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "all of whose parameters are used, but some parameters have no part" in rank["priority"]["unused"]
        assert "optimizers of torch, but OwnOptimizer is another" in rank["priority"]["own"]
        assert "some parameters had no part in the output of a step. Use schedule='ready'" in rank["priority"]["moody"]


# ---- state -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_resumed_run_is_equal_to_the_bit(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        calm, resumed = rank[name]["calm"], rank[name]["resumed"]
        assert calm["losses"][SAVED:] == resumed["losses"]
        assert [key for key, value in calm["weights"].items() if not torch.equal(value, resumed["weights"][key])] == []


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_first_backward_pass_leaves_no_trace(found: list[dict[str, Any]], name: str) -> None:
    begun, saved = (found[0][name]["calm"][when]["compressed"] for when in ("begun", "saved"))
    assert begun["steps"] == 0
    assert begun["kept"] == [{}, {}, {}]
    assert begun["shared"] == {}
    assert saved["steps"] == SAVED
    assert all(saved["kept"]) == COMPRESSIONS[name].keeps


@pytest.mark.parametrize("name", KEEPING)
def test_fewer_ranks_share_what_was_kept(fewer: list[dict[str, Any]], name: str) -> None:
    saved, again = fewer[0][name]["saved"], fewer[0][name]["again"]
    assert len(saved["kept"]) == 3
    assert len(again["kept"]) == 2
    for key in saved["kept"][0]:
        mean = torch.stack([one[key] for one in saved["kept"]]).mean(0)
        for one in again["kept"]:
            torch.testing.assert_close(one[key], mean, rtol=1e-12, atol=1e-12)
    assert again["steps"] == SAVED
    assert again["shared"].keys() == saved["shared"].keys()


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_fewer_ranks_go_on(fewer: list[dict[str, Any]], found: list[dict[str, Any]], name: str) -> None:
    expected = sum(rank[name]["calm"]["losses"][-1] for rank in found)
    assert sum(rank[name]["losses"][-1] for rank in fewer) == pytest.approx(expected, rel=0.05)
    for key, value in fewer[0][name]["weights"].items():
        assert torch.equal(value, fewer[1][name]["weights"][key])


def test_another_compression_does_not_know_what_was_kept(found: list[dict[str, Any]]) -> None:
    refused = found[1]["refused"]
    assert "compression='Int8' cannot go on from this checkpoint: compression='TopK' wrote it" in refused["other"]
    assert "compression=None cannot go on from this checkpoint: compression='TopK' wrote it" in refused["none"]
    assert found[0]["begun anew"] == {"compression": "Int8", "kept": [{}, {}, {}], "shared": {}, "steps": 0}


def test_a_static_graph_has_all_parameters(found: list[dict[str, Any]]) -> None:
    assert "static_graph=True, but some parameters have no part in the output" in found[0]["refused"]["static"]


def test_what_a_compression_raises_ends_the_step(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "no space left in the tube" in rank["broken"]
