"""Sharded modules on four ranks, and what they saved on two: against one plain process, and against `ddp`."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from sparkdl.batch import Batch
from sparkdl.checkpoint import flatten_state, unflatten_state
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective, TrainingStep
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import (
    DataParallel,
    FullyShardedDataParallel,
    HybridShardedDataParallel,
    Setting,
    Strategy,
    TensorParallel,
)
from sparkdl.parallel.fsdp import host_groups
from sparkdl.parallel.tensor import apply_plan, resolve_plan, settle_gradients
from sparkdl.preparation import freeze_parameters, prepare_module
from sparkdl.schedule import SchedulerRecipe
from sparkdl.trainer import Trainer
from tests.dist.conftest import Torchrun
from tests.dist.test_loop import (
    COLUMNS,
    DIVERGING,
    RATE,
    SGD,
    OddRow,
    Single,
    assert_same,
    dropping,
    marked_row,
    normed,
    plainly,
    two_losses,
    two_optimizers,
)
from tests.dist.test_trainer import BATCH, EPOCHS, SLICES, Case, HandMade, cut, global_batches, mlp, weights_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]

FOLDER = "SPARKDL_TEST_SHARDED"
# Rows of each replica in each step, by the number of replicas.
DEALT: dict[int, Sequence[Sequence[int]]] = {
    1: ((10,), (10,), (10,), (10,)),
    2: SLICES,
    4: ((3, 0, 5, 2), (10, 0, 0, 0), (2, 2, 3, 3), (0, 0, 10, 0)),
}
SMALL = 20  # parameters of a submodule that is wrapped: every layer of the modules here
PLAN = {"0": "colwise", "2": "rowwise"}
ADAMW = OptimizerRecipe("adamw", 0.01, {"weight_decay": 0.3})
STOPPED, STEPS = 3, 8


def fsdp(**options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(min_parameters=SMALL, **options)


def hsdp(**options: Any) -> HybridShardedDataParallel:
    return HybridShardedDataParallel(min_parameters=SMALL, **options)


def tensor(plan: Mapping[str, str] = PLAN, size: int | None = 2) -> TensorParallel:
    return TensorParallel(plan, size)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().double()


class WithSpare(nn.Module):
    """Has a layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.last(self.used(features).tanh())
        return found


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(self.first(features).tanh()).tanh())
        return found


class InPlace(nn.Module):
    """Adds in place to what a layer returned, which is a view where the input has three dimensions; with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.state = nn.LSTM(8, 8, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features[:, None])
        hidden += 1
        attended, _ = self.attention(hidden, hidden, hidden)
        found: Tensor = self.last(self.state(attended)[0][:, 0])
        return found


class Words(nn.Module):
    """Embeddings of small whole numbers, with a layer norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.more = nn.Embedding(6, 8, padding_idx=0), nn.Embedding(6, 8)
        self.norm, self.wide, self.narrow, self.last = (
            nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        numbers = (features.abs() * 2).long().clamp(max=5)
        found = self.norm((self.words(numbers) + self.more(numbers)).mean(1))
        result: Tensor = self.last(found + self.narrow(self.wide(found).tanh()))
        return result


def dropping_twice() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5)))


def dropping_normed() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)))


# ---- in the ranks ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Dealt(HandMade):
    """The batches of one replica; validation rows are dealt to all ranks."""

    replicas: int = 1

    def _slice(self, batch: Batch, step: int) -> Batch:
        own = DEALT[self.replicas][step]
        start = sum(own[: self.rank])
        return cut(batch, start, start + own[self.rank])

    def open_validation(self, rows: int) -> Any:
        return contextlib.nullcontext(iter([self.case.rows(99, 12).cut(dist.get_world_size())[dist.get_rank()]]))


def prepared(
    strategy: Strategy,
    make: Callable[[], nn.Module],
    recipe: OptimizerRecipe,
    config: TrainConfig,
    *,
    objective: Objective,
    scheduler: SchedulerRecipe | None = None,
    example_rows: int = 2,
    unused: bool = False,
    hosts: Sequence[str] = (),
) -> None:
    module = make()
    freeze_parameters(module, config.frozen_parameters)
    module = prepare_module(module, config)
    strategy.check(module, config)
    if dist.get_rank() == 1:  # rank 0's weights are the ones that count
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    build = optimization_builder(recipe, scheduler, config, steps_per_epoch=len(SLICES))
    strategy.prepare(module, objective, build, config, Setting(Case().rows(0, example_rows), unused, hosts))


def train(
    strategy: Strategy,
    make: Callable[[], nn.Module] = mlp,
    recipe: OptimizerRecipe = SGD,
    *,
    objective: Callable[[], Objective] = lambda: Objective(nn.CrossEntropyLoss()),
    logged: tuple[str, ...] = (),
    weighted: bool = False,
    scheduler: SchedulerRecipe | None = None,
    example_rows: int = 2,
    unused: bool = False,
    hosts: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """One fit of this rank."""
    ranks = dist.get_world_size()
    config = TrainConfig(max_epochs=EPOCHS, batch_size=BATCH, seed=4, num_train_workers=ranks, **settings)
    loss, place = objective(), strategy.replicas(ranks).place_of(dist.get_rank())
    assert place.dp_rank is not None
    prepared(
        strategy, make, recipe, config, objective=loss, scheduler=scheduler, example_rows=example_rows, unused=unused,
        hosts=hosts,
    )  # fmt: skip
    trainer = Trainer(strategy, loss, config, device=torch.device("cpu"), has_validation=True, logged=logged)
    history = list(trainer.fit(Dealt(Case(weighted=weighted), place.dp_rank, replicas=place.dp_size)))
    parameters = list(strategy.module.parameters())
    found = {
        "weights": {name: value.clone() for name, value in trainer.gather().state_dict().items()},
        "history": [dict(record) for record in history],
        "kind": type(trainer.gather()).__name__,
        "plain": all(type(value) in (Tensor, nn.Parameter) for value in trainer.gather().state_dict().values()),
        "own": {
            name: value.detach().clone()
            for name, value in strategy.module.named_parameters()
            if not isinstance(value, DTensor)
        },
        "held": sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in parameters),
        "dtypes": sorted({str(value.dtype) for value in parameters}),
        "best": trainer.best_epoch,
        "busy": strategy.busy_seconds,
    }
    strategy.close()
    return found


MLP = {"inner.0": "colwise", "inner.2": "rowwise"}
CUT_DROPOUT = {"0.0": "colwise", "0.1": "sharded", "1": "rowwise"}
FITS: dict[str, Callable[[], dict[str, Any]]] = {
    "fsdp, by name": lambda: train(FullyShardedDataParallel(wrap=["[02]"], reshard_after_forward=False)),
    "tensor, norm": lambda: train(tensor({"0": "colwise_gather"}), gradient_clip_norm=0.1),
    "fsdp, micro-batches": lambda: train(fsdp(), micro_batch_size=2, example_rows=0),
    "fsdp, value": lambda: train(fsdp(), recipe=OptimizerRecipe(configure=two_optimizers), gradient_clip_value=0.02),
    "fsdp, frozen": lambda: train(fsdp(), frozen_parameters=("^0\\.",)),
    "fsdp, synchronised": lambda: train(fsdp(), normed, sync_batch_norm=True),
    "fsdp, recomputed": lambda: train(fsdp(), dropping, activation_checkpointing=("0",)),
    "fsdp, skipped": lambda: train(fsdp(), lambda: OddRow(marked_row()), non_finite="skip"),
    "fsdp, 32": lambda: train(fsdp(), Single),
    "fsdp, bf16": lambda: train(fsdp(), Single, precision="bf16"),
    "fsdp, 16": lambda: train(fsdp(), Single, precision="16"),
    "fsdp, tied": lambda: train(
        FullyShardedDataParallel(min_parameters=1), partial(seeded, Tied), gradient_clip_norm=0.1
    ),
    "fsdp, in place": lambda: train(fsdp(), partial(seeded, InPlace)),
    "fsdp, two losses": lambda: train(
        fsdp(), objective=lambda: TrainingStep(two_losses, COLUMNS), logged=("size", "entropy"), micro_batch_size=2
    ),
    "fsdp, stopped": lambda: train(fsdp(), scheduler=DIVERGING, early_stopping_patience=1, restore_best=True),
    "tensor, value": lambda: train(
        tensor(), recipe=OptimizerRecipe(configure=two_optimizers), gradient_clip_value=0.02
    ),
    "tensor, skipped": lambda: train(
        tensor({"inner.0": "colwise_gather"}), lambda: OddRow(marked_row()), non_finite="skip"
    ),
    "tensor, bf16": lambda: train(tensor(MLP), Single, precision="bf16"),
    "tensor, words": lambda: train(
        tensor({"words": "rowwise", "more": "colwise_gather", "w.*": "colwise", "narrow": "rowwise"}),
        partial(seeded, Words),
    ),
    "tensor, dropping": lambda: train(tensor(CUT_DROPOUT), dropping),
    "tensor, recomputed": lambda: train(tensor(CUT_DROPOUT), dropping, activation_checkpointing=("0",)),
    "tensor, stopped": lambda: train(tensor(), scheduler=DIVERGING, early_stopping_patience=1, restore_best=True),
    "ddp, dropping": lambda: train(DataParallel(), dropping),
    "ddp, two losses": lambda: train(
        DataParallel(), objective=lambda: TrainingStep(two_losses, COLUMNS), logged=("size", "entropy")
    ),
}
FITS_OF_FOUR: dict[str, Callable[[], dict[str, Any]]] = {
    "fsdp": lambda: train(fsdp()),
    "fsdp, spare": lambda: train(
        fsdp(), partial(seeded, WithSpare), ADAMW, unused=True, example_rows=2 if dist.get_rank() == 2 else 0
    ),
    "hsdp": lambda: train(hsdp(shard_size=2)),
    "hsdp, hosts": lambda: train(hsdp(), recipe=ADAMW, hosts=("a", "b", "a", "b"), gradient_clip_norm=0.1),
    "tensor": lambda: train(tensor()),
    "tensor, all ranks": lambda: train(tensor({"0": "colwise_gather", "2": "rowwise_split"}, None)),
    "tensor, frozen": lambda: train(tensor(), micro_batch_size=2, frozen_parameters=("^0\\.",)),
    "tensor, spare": lambda: train(
        tensor({"used": "colwise", "last": "rowwise"}), partial(seeded, WithSpare), ADAMW, unused=True
    ),
}
RESUMED: dict[str, Callable[[], Strategy]] = {
    "fsdp": fsdp,
    "hsdp": lambda: hsdp(shard_size=2),
    "tensor": lambda: tensor({"0": "colwise", "3": "rowwise"}),
}


def go(name: str, first: int, last: int, *, load: bool = False, save: str = "") -> dict[str, Any]:
    """Some steps of a run, on whatever number of ranks, with random layers and running means."""
    strategy, ranks = RESUMED[name](), dist.get_world_size()
    config = TrainConfig(batch_size=BATCH, num_train_workers=ranks, gradient_clip_norm=0.5)
    make = dropping_normed if name != "tensor" else partial(seeded, dropping_flat)
    objective = Objective(nn.CrossEntropyLoss())
    prepared(strategy, make, ADAMW, config, objective=objective)
    strategy.module.train()
    path = Path(os.environ[FOLDER]) / f"{name}.pt"
    if load:
        strategy.load_state_dict(unflatten_state(*torch.load(path)))
    place = strategy.replicas(ranks).place_of(dist.get_rank())
    assert place.dp_rank is not None
    for step in range(first, last):
        batch = global_batches(Case(), step // 4)[step % 4]
        own = Dealt(Case(), place.dp_rank, replicas=place.dp_size)._slice(batch, step % 4)
        torch.manual_seed(step * 10 + place.dp_rank)
        strategy.train_step(own, float(batch.rows))
    state = strategy.state_dict()
    if save:
        if dist.get_rank() == 0:
            torch.save(flatten_state(state), path)
        else:
            assert all(value is None for key, value in state["module"].items() if key == "0.weight")
        dist.barrier()
    weights = {key: value.clone() for key, value in strategy.gather().state_dict().items()}
    strategy.close()
    return weights


def dropping_flat() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def resumed(name: str) -> list[dict[str, Any]]:
    """A run that goes through, and one that is saved and goes on."""
    calm = go(name, 0, STEPS)
    saved = go(name, 0, STOPPED, save="yes")
    return [calm, saved, go(name, STOPPED, STEPS, load=True)]


def without_rows() -> dict[str, bool]:
    """What a step without rows does to buffers and random numbers."""
    strategy = fsdp()
    config = TrainConfig(batch_size=BATCH, num_train_workers=dist.get_world_size())
    prepared(strategy, dropping_normed, SGD, config, objective=Objective(nn.CrossEntropyLoss()))
    strategy.module.train()
    buffers, drawn = [value.clone() for value in strategy.module.buffers()], torch.get_rng_state()
    rows = Case().rows(0, 4)
    result = strategy.train_step(rows if dist.get_rank() == 0 else rows.part(0, 0), 4.0)
    found = {
        "buffers": all(map(torch.equal, buffers, strategy.module.buffers())),
        "drawn": torch.equal(drawn, torch.get_rng_state()),
        "loss": bool(result.loss),
    }
    strategy.close()
    return found


def drawn(plan: Mapping[str, str]) -> dict[str, Tensor]:
    """What two dropouts let through: between layers that are cut, and after them."""
    strategy, found = tensor(plan), {}
    config = TrainConfig(num_train_workers=dist.get_world_size())
    prepared(strategy, dropping_twice, SGD, config, objective=Objective(nn.MSELoss()))
    for name in ("1", "3"):
        part = strategy.module.get_submodule(name)
        part.register_forward_hook(lambda part, inputs, output, name=name: found.update({name: output == 0}))
    torch.manual_seed(5)
    strategy.module.train()(torch.ones(4, 3, dtype=torch.float64))
    strategy.close()
    return found


def rows_sharded() -> list[float]:
    """Largest differences of gradients from those of one process, where each rank has rows of its own."""
    found = []
    for plan in ({"0": "colwise", "2": "rowwise"}, {"0": "colwise_gather"}, {"2": "rowwise_split"}):
        module, plain = mlp(), mlp()
        apply_plan(module, plan, DeviceMesh("cpu", torch.arange(4)), rows_sharded=True)
        rows = Case().rows(0, 8)
        own = rows.cut(4)[dist.get_rank()]
        nn.functional.cross_entropy(module(own.inputs[0]), own.labels[0], reduction="sum").backward()
        nn.functional.cross_entropy(plain(rows.inputs[0]), rows.labels[0], reduction="sum").backward()
        settle_gradients(module)
        for value, expected in zip(module.parameters(), plain.parameters(), strict=True):
            assert value.grad is not None
            if isinstance(value.grad, DTensor):
                gradient = value.grad.full_tensor()
            else:
                gradient = value.grad.clone()
                dist.all_reduce(gradient)
            found.append(float((gradient - expected.grad).abs().max()))
    return found


def refused(strategy: Strategy) -> str:
    """What is said of an optimizer that needs whole parameters."""
    try:
        train(strategy, recipe=OptimizerRecipe("adafactor", 0.01))
    except ConfigError as error:
        strategy.close()
        return str(error)
    return ""


def on_four_ranks() -> dict[str, Any]:
    return {
        "fits": {name: fit() for name, fit in FITS_OF_FOUR.items()},
        "resumed": {name: resumed(name) for name in RESUMED},
        "without rows": without_rows(),
        "drawn": [drawn({"0": "colwise", "1": "sharded", "2": "rowwise"}), drawn({"0": "colwise", "2": "rowwise"})],
        "rows sharded": rows_sharded(),
    }


def on_two_ranks() -> dict[str, Any]:
    """Fits, and the runs of four ranks from where they were saved."""
    return {
        "fits": {name: fit() for name, fit in FITS.items()},
        "refused": [refused(fsdp()), refused(tensor())],
        "resumed": {
            name: [go(name, STOPPED, STOPPED, load=True), go(name, STOPPED, STEPS, load=True)] for name in RESUMED
        },
    }


@pytest.fixture(scope="module")
def found(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ranks found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("sharded")))
        four, two = torchrun(on_four_ranks, 4), torchrun(on_two_ranks, 2)
    fits = {name: [rank["fits"][name] for rank in four] for name in FITS_OF_FOUR}
    fits |= {name: [rank["fits"][name] for rank in two] for name in FITS}
    return {**four[0], "ranks": four, "two": two[0], "each": fits, "fits": {name: own[0] for name, own in fits.items()}}


# ---- against one process ---------------------------------------------------------------------------------------------
def adamw(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.3)]


def frozen(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(list(module.parameters())[2:], lr=RATE, momentum=0.9)]


def by_norm(module: nn.Module) -> Any:
    return clip_grad_norm_(module.parameters(), 0.1)


def by_value(module: nn.Module) -> Any:
    return clip_grad_value_(module.parameters(), 0.02)


ORACLES: dict[str, Callable[[], nn.Module]] = {
    "fsdp": plainly,
    "fsdp, by name": plainly,
    "fsdp, micro-batches": plainly,
    "fsdp, value": partial(plainly, optimizers=two_optimizers, before_step=by_value),
    "fsdp, frozen": partial(plainly, optimizers=frozen),
    "fsdp, synchronised": partial(plainly, normed),
    "fsdp, spare": partial(plainly, partial(seeded, WithSpare), optimizers=adamw),
    "fsdp, tied": partial(plainly, partial(seeded, Tied), before_step=by_norm),
    "fsdp, in place": partial(plainly, partial(seeded, InPlace)),
    "hsdp": plainly,
    "hsdp, hosts": partial(plainly, optimizers=adamw, before_step=by_norm),
    "tensor": plainly,
    "tensor, all ranks": plainly,
    "tensor, frozen": partial(plainly, optimizers=frozen),
    "tensor, norm": partial(plainly, before_step=by_norm),
    "tensor, value": partial(plainly, optimizers=two_optimizers, before_step=by_value),
    "tensor, spare": partial(plainly, partial(seeded, WithSpare), optimizers=adamw),
    "tensor, words": partial(plainly, partial(seeded, Words)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_ranks_end_with_the_weights_of_one_plain_process(found: dict[str, Any], name: str) -> None:
    assert_same(found["fits"][name]["weights"], ORACLES[name](), 1e-6)


@pytest.mark.parametrize("name", [*FITS, *FITS_OF_FOUR])
def test_all_ranks_gather_the_same_plain_module(found: dict[str, Any], name: str) -> None:
    first = found["fits"][name]["weights"]
    for own in found["each"][name]:
        assert own["plain"]
        assert not own["kind"].startswith("FSDP")
        assert own["busy"] > 0
        assert [record["rows"] for record in own["history"]] == [40] * len(own["history"])
        assert list(own["weights"]) == list(first)
        for key, value in own["weights"].items():
            if "running" not in key and "num_batches" not in key:
                assert torch.equal(value, first[key]), key


def test_a_rank_holds_its_slice_alone(found: dict[str, Any]) -> None:
    whole = sum(value.numel() for value in mlp().parameters())
    held = [rank["held"] for rank in found["each"]["fsdp"]]
    assert sum(held) == whole
    assert max(held) < whole / 2
    assert sum(rank["held"] for rank in found["each"]["hsdp"]) == 2 * whole
    assert all(rank["held"] < whole for rank in found["each"]["tensor"])


def test_what_is_not_in_the_plan_is_equal_to_the_bit(found: dict[str, Any]) -> None:
    for name in ("tensor, words", "tensor, norm", "tensor, dropping"):
        own = [rank["own"] for rank in found["each"][name]]
        for key, value in own[0].items():
            assert all(torch.equal(value, other[key]) for other in own), (name, key)
    assert set(found["fits"]["tensor, words"]["own"]) == {"norm.weight", "norm.bias", "last.weight", "last.bias"}


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_a_step_without_a_finite_gradient_is_left_out(found: dict[str, Any], kind: str) -> None:
    fit = found["fits"][f"{kind}, skipped"]
    assert [record["skipped_steps"] for record in fit["history"]] == [0, 1, 0]
    assert all(torch.isfinite(value).all() for value in fit["weights"].values())


@pytest.mark.parametrize("name", ["fsdp, bf16", "fsdp, 16", "tensor, bf16"])
def test_mixed_precision_comes_close_and_weights_stay_single(found: dict[str, Any], name: str) -> None:
    mixed, full = found["fits"][name], found["fits"]["fsdp, 32"]
    assert mixed["history"][-1]["loss"] == pytest.approx(full["history"][-1]["loss"], rel=0.05)
    assert mixed["history"][-1]["loss"] != full["history"][-1]["loss"]
    assert mixed["dtypes"] == ["torch.float32"]


def test_random_layers_draw_what_they_draw_under_ddp(found: dict[str, Any]) -> None:
    expected = found["fits"]["ddp, dropping"]["weights"]
    torch.testing.assert_close(found["fits"]["fsdp, recomputed"]["weights"], expected, rtol=1e-9, atol=1e-9)


def test_recomputed_activations_change_nothing(found: dict[str, Any]) -> None:
    for key, value in found["fits"]["tensor, dropping"]["weights"].items():
        assert torch.equal(value, found["fits"]["tensor, recomputed"]["weights"][key])


def test_what_a_training_step_logs_is_that_of_ddp(found: dict[str, Any]) -> None:
    own, expected = (found["fits"][f"{kind}, two losses"]["history"] for kind in ("fsdp", "ddp"))
    for key in ("loss", "size", "entropy", "validation_loss", "validation_size"):
        assert [record[key] for record in own] == pytest.approx([record[key] for record in expected])


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_the_best_weights_are_restored(found: dict[str, Any], kind: str) -> None:
    fit = found["fits"][f"{kind}, stopped"]
    losses = [record["validation_loss"] for record in fit["history"]]
    assert fit["best"] == losses.index(min(losses)) + 1 < len(losses)
    module, rows = mlp(), Case().rows(99, 12)
    module.load_state_dict(fit["weights"])
    loss = nn.functional.cross_entropy(module(rows.inputs[0]), rows.labels[0])
    assert loss.item() == pytest.approx(min(losses))


def test_a_step_without_rows_leaves_no_trace(found: dict[str, Any]) -> None:
    first, *others = (rank["without rows"] for rank in found["ranks"])
    assert first == {"buffers": False, "drawn": False, "loss": True}
    assert others == [{"buffers": True, "drawn": True, "loss": False}] * 3


def test_cut_features_are_dropped_apart_and_whole_ones_together(found: dict[str, Any]) -> None:
    apart, same = zip(*(rank["drawn"] for rank in found["ranks"]), strict=True)
    assert not torch.equal(apart[0]["1"], apart[1]["1"])
    assert torch.equal(apart[0]["3"], apart[1]["3"])
    assert torch.equal(same[0]["1"], same[1]["1"])
    assert 0.3 < apart[1]["1"].double().mean() < 0.7


def test_a_plan_whose_inputs_are_cut_by_rows_has_the_gradients_of_all_rows(found: dict[str, Any]) -> None:
    assert len(found["rows sharded"]) == 12
    assert max(found["rows sharded"]) < 1e-12


# ---- state -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_equal_to_the_bit(found: dict[str, Any], name: str) -> None:
    for rank in found["ranks"]:
        calm, _, after = rank["resumed"][name]
        differ = [key for key, value in calm.items() if not torch.equal(value, after[key])]
        # Running means are each rank's own between steps; those of rank 0 are what counts.
        assert [key for key in differ if rank is found["ranks"][0] or key.endswith(("weight", "bias"))] == []
    _, saved, after = found["resumed"][name]
    assert not torch.equal(saved["0.weight"], after["0.weight"])


@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_go_on_from_what_four_saved(found: dict[str, Any], name: str) -> None:
    loaded, after = found["two"]["resumed"][name]
    _, saved, expected = found["resumed"][name]
    assert all(torch.equal(value, loaded[key]) for key, value in saved.items())
    for key, value in after.items():  # random layers draw other numbers
        assert torch.isfinite(value).all()
        assert not torch.equal(value, saved[key]) or key.startswith("num")
        if "running" not in key and "num" not in key:
            assert (value - expected[key]).norm() < 0.2 * expected[key].norm() + 0.1


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_optimizers_that_need_whole_parameters_are_refused(found: dict[str, Any]) -> None:
    of_fsdp, of_tensor = found["two"]["refused"]
    assert of_fsdp == (
        "strategy='fsdp' updates each part of a parameter where it is, but Adafactor needs the whole. Use another "
        "optimizer, such as 'adamw'."
    )
    assert "strategy='tensor_parallel'" in of_tensor


def test_hosts_of_equal_size_make_groups() -> None:
    assert host_groups(["a", "b", "a", "b"]).tolist() == [[0, 2], [1, 3]]
    assert host_groups(["a", "a", "b"]).tolist() == [[0, 1, 2]]
    assert host_groups(["a", "b"]).tolist() == [[0, 1]]
    assert host_groups(["", "", ""]).tolist() == [[0, 1, 2]]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = mlp(), nn.Parameter(torch.ones(()))


def nested() -> nn.Module:
    parts = {"inner": nn.ModuleList([mlp()]), "attention": nn.MultiheadAttention(8, 2), "tied": Tied()}
    return nn.ModuleDict(parts).double()


@pytest.mark.parametrize(
    ("strategy", "make", "settings", "message"),
    [
        (fsdp(), mlp, {"averaging": "ema"}, "averaging='ema' keeps a second copy of the whole module"),
        (fsdp(), mlp, {"torch_compile": True}, "torchCompile=True compiles the module before strategy='fsdp'"),
        (FullyShardedDataParallel(min_parameters=0), mlp, {}, "min_parameters=0 is too small"),
        (FullyShardedDataParallel(["layer.*"]), mlp, {}, "'layer.*', which matches no submodule. There are 0, 1, 2."),
        (FullyShardedDataParallel(["("]), mlp, {}, "is no regular expression"),
        (FullyShardedDataParallel(["inner"]), nested, {}, "'inner', which is a container that is never called"),
        (FullyShardedDataParallel(["inner.0.1"]), nested, {}, "'inner.0.1', which has no parameters"),
        (FullyShardedDataParallel(["attention.out_proj"]), nested, {}, "never calls. Match 'attention'"),
        (FullyShardedDataParallel(["out_proj"]), lambda: nn.MultiheadAttention(8, 2), {}, "never calls. Leave wrap"),
        (FullyShardedDataParallel(["tied.last"]), nested, {}, "shares 'weight' with 'tied.first.weight'"),
        (fsdp(), Scalar, {}, "but scale has none. Give it the shape"),
        (fsdp(), lambda: nn.Sequential(mlp(), mlp().float()), {}, "are of several types: .* is torch.float64 and"),
        (tensor(), mlp, {"averaging": "swa"}, "averaging='swa'.* strategy='tensor_parallel'"),
        (tensor(), mlp, {"sync_batch_norm": True}, "syncBatchNorm=True counts the rows of every rank"),
        (tensor(), mlp, {"precision": "16"}, "precision='16' scales the loss"),
        (TensorParallel(), mlp, {}, "plan={} cuts no layer"),
        (tensor({"1": "sharded"}), mlp, {}, "cuts no layer. Name Linear and Embedding layers"),
        (tensor({"0": "diagonal"}), mlp, {}, "'diagonal', which is no style. Use one of colwise"),
        (tensor({"layer": "colwise"}), mlp, {}, "'layer', which matches no submodule. There are 0, 1, 2."),
        (tensor({"(": "colwise"}), mlp, {}, "is no regular expression"),
        (tensor({"1": "colwise"}), mlp, {}, "'1' as 'colwise', but that is a Tanh"),
        (tensor({"0": "colwise", "2": "sharded"}), mlp, {}, "'2' as 'sharded', but that Linear has parameters"),
        (tensor({"2": "colwise"}), mlp, {}, "out_features=3 is not divisible by size=2"),
        (tensor({"0": "rowwise"}), mlp, {}, "in_features=3 is not divisible by size=2"),
        (tensor({"0": "rowwise"}), lambda: nn.Sequential(nn.Embedding(5, 4)), {}, "num_embeddings=5 is not divisible"),
        (tensor({"0": "colwise"}), lambda: nn.Sequential(nn.Embedding(4, 5)), {}, "embedding_dim=5 is not divisible"),
        (tensor({"0": "colwise"}), lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1)), {}, "max_norm=1"),
        (tensor({"attention.out_proj": "rowwise"}), nested, {}, "which MultiheadAttention uses without calling it"),
        (TensorParallel({"tied.last": "rowwise"}, 1), nested, {}, "which shares its weights with 'tied.first'"),
    ],
)  # fmt: skip
def test_what_does_not_suit_is_refused(
    strategy: Strategy, make: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy.check(make(), TrainConfig(num_train_workers=4, **settings))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (HybridShardedDataParallel(shard_size=3), "shard_size=3 x groups=1 makes 3 ranks, .* numTrainWorkers=4"),
        (HybridShardedDataParallel(shard_size=0), "shard_size=0 is too small"),
        (tensor(size=3), "size=3 x replicas=1 makes 3 ranks, but there are numTrainWorkers=4"),
        (tensor(size=0), "size=0 is too small"),
    ],
)
def test_degrees_that_do_not_multiply_are_refused(strategy: Strategy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy.replicas(4)


def test_ranks_of_a_replica_follow_each_other() -> None:
    assert tensor(size=2).replicas(4).groups == ((0, 1), (2, 3))
    assert tensor(size=None).replicas(4).groups == ((0, 1, 2, 3),)
    assert fsdp().replicas(4).are_ranks(4)


def test_the_first_pattern_of_a_plan_counts() -> None:
    assert resolve_plan(
        {"0": "colwise", ".*": "rowwise_split"}, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2
    ) == {
        "0": "colwise",
        "1": "rowwise_split",
    }


def test_weights_differ_from_where_they_began(found: dict[str, Any]) -> None:
    start = weights_of(mlp())
    for name in ("fsdp", "hsdp", "tensor"):
        assert all(not torch.equal(value, found["fits"][name]["weights"][key]) for key, value in start.items())
