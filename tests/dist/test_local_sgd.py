"""Local SGD on gloo processes against the same arithmetic by hand, in one process."""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.checkpoint import CheckpointStore
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.parallel import LocalSGD, Setting
from sparkdl.parallel.averaging import average_states, neighbours_of, shares_of
from sparkdl.preparation import freeze_parameters, prepare_module
from sparkdl.schedule import SchedulerRecipe
from sparkdl.trainer import Trainer
from tests.dist.conftest import Torchrun
from tests.dist.test_loop import Single
from tests.dist.test_trainer import BATCH, EPOCHS, Case, HandMade, cut, global_batches, mlp, weights_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

RANKS = 4
# Rows of each rank in each step of an epoch: some have none, one rank has all of them.
SLICES = {4: ((3, 3, 2, 2), (10, 0, 0, 0), (4, 0, 2, 4), (0, 3, 3, 4)), 2: ((5, 5), (10, 0), (3, 7), (0, 10))}
STEPS = EPOCHS * len(SLICES[RANKS])
STOPPED = 7
FOLDER = "SPARKDL_TEST_LOCAL_SGD"
MOMENTUM = ("sgd", 0.1, (("momentum", 0.9),))
PLAIN = ("sgd", 0.3, ())


def normed() -> nn.Module:
    """A module with statistics to average, and a count."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def half() -> nn.Module:
    """A module in which two types of weights meet."""

    class Cast(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values.bfloat16() if values.dtype == torch.float64 else values.double()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(Cast(), nn.Linear(3, 8).bfloat16(), Cast(), nn.Tanh(), nn.Linear(8, 3).double())


@dataclass(frozen=True)
class Trial:
    """What is trained, and how.

    Attributes:
        strategy: With its options.
        case: Module, loss and optimizer.
        settings: Of the config, by name.
        tolerance: Between ranks and what is computed by hand; relative.
    """

    strategy: LocalSGD
    case: Case = dataclasses.field(default_factory=lambda: Case(optimizer=MOMENTUM))
    settings: tuple[tuple[str, Any], ...] = ()
    tolerance: float = 1e-9


SUM = nn.CrossEntropyLoss(reduction="sum")
TRIALS = {
    "synchronous": Trial(LocalSGD(sync_every=1), Case(optimizer=PLAIN, weighted=True)),
    "synchronous sums": Trial(LocalSGD(sync_every=1), Case(optimizer=("sgd", 0.02, ()), loss=SUM)),
    "mean": Trial(LocalSGD(sync_every=3)),
    "weighted rows": Trial(LocalSGD(sync_every=3), Case(optimizer=MOMENTUM, weighted=True, micro_batch_size=2)),
    "adaptive": Trial(LocalSGD(sync_every=3), Case(optimizer=("adamw", 0.02, (("weight_decay", 0.1),)))),
    "nesterov": Trial(LocalSGD(3, outer="nesterov")),
    "slow nesterov": Trial(LocalSGD(2, outer="nesterov", outer_learning_rate=0.3, outer_momentum=0.5)),
    "nesterov without momentum": Trial(LocalSGD(2, outer="nesterov", outer_learning_rate=1, outer_momentum=0)),
    "ring": Trial(LocalSGD(2, outer="ring")),
    "post-local": Trial(LocalSGD(3, start_step=5)),
    "post-local nesterov": Trial(LocalSGD(3, start_step=5, outer="nesterov")),
    "alone": Trial(LocalSGD(sync_every=100)),
    "clipped": Trial(LocalSGD(sync_every=3), settings=(("gradient_clip_norm", 0.1),)),
    "cut": Trial(LocalSGD(sync_every=3), settings=(("gradient_clip_value", 0.02),)),
    "frozen": Trial(LocalSGD(sync_every=3), settings=(("frozen_parameters", ("^0\\.",)),)),
    "recomputed": Trial(LocalSGD(sync_every=3), settings=(("activation_checkpointing", ("0",)),)),
    "two types": Trial(LocalSGD(2), Case(module=half, optimizer=MOMENTUM), tolerance=1e-2),
}
RESUMED = {
    "mean": TRIALS["mean"],
    "nesterov": TRIALS["nesterov"],
    "ring": TRIALS["ring"],
    "in the synchronous part": Trial(LocalSGD(3, start_step=STOPPED + 1), Case(module=normed, optimizer=MOMENTUM)),
    "after the synchronous part": Trial(LocalSGD(3, start_step=STOPPED), Case(module=normed, optimizer=MOMENTUM)),
    "normed": Trial(LocalSGD(4, outer="nesterov"), Case(module=normed, optimizer=("adamw", 0.02, ()))),
}
LEARNING = {name: LocalSGD(3, outer=name) for name in ("mean", "nesterov", "ring")}  # type: ignore[arg-type]


def config_of(trial: Trial) -> TrainConfig:
    """The config of a trial."""
    settings = dict(trial.settings)
    return TrainConfig(
        max_epochs=EPOCHS, batch_size=BATCH, micro_batch_size=trial.case.micro_batch_size, seed=4, **settings
    )


def slices_of(batch: Batch, step: int, ranks: int) -> list[Batch]:
    """The rows of each rank."""
    slices, stop = [], 0
    for rows in SLICES[ranks][step % len(SLICES[ranks])]:
        slices.append(cut(batch, stop, stop + rows))
        stop += rows
    return slices


def batches_of(case: Case) -> list[Batch]:
    """The rows of all steps of the run."""
    return [batch for epoch in range(EPOCHS) for batch in global_batches(case, epoch)]


@dataclass(frozen=True)
class Dealt(HandMade):
    """As it says, for any number of ranks."""

    ranks: int = RANKS

    def _slice(self, batch: Batch, step: int) -> Batch:
        return slices_of(batch, step, self.ranks)[self.rank]


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def prepared(trial: Trial, on_computed: Callable[[], None] = lambda: None) -> LocalSGD:
    """The strategy at work; only rank 0 has the right weights to begin with."""
    module, config = trial.case.module(), config_of(trial)
    freeze_parameters(module, config.frozen_parameters)
    module = prepare_module(module, config)
    if dist.get_rank() == 1:
        with torch.no_grad():
            for value in module.parameters():
                value.add_(1)
    strategy = copy.deepcopy(trial.strategy)
    build = optimization_builder(
        trial.case.recipe(), SchedulerRecipe("ExponentialLR", {"gamma": 0.97}, "step"), config, steps_per_epoch=4
    )
    example = slices_of(batches_of(trial.case)[0], 0, dist.get_world_size())[dist.get_rank()]
    strategy.prepare(
        module, Objective(trial.case.loss), build, config, Setting(example, False, on_computed=on_computed)
    )
    return strategy


def take_steps(strategy: LocalSGD, trial: Trial, first: int, last: int) -> float:
    """Steps with these numbers; the sum of the losses of this rank's rows in them."""
    objective, total = Objective(trial.case.loss), 0.0
    for step, batch in list(enumerate(batches_of(trial.case)))[first:last]:
        torch.manual_seed(step)
        own = slices_of(batch, step, dist.get_world_size())[dist.get_rank()]
        found = strategy.train_step(own, objective.batch_denominator(batch))
        assert found.taken
        total += float(found.loss)
    return total


def run(trial: Trial) -> dict[str, Any]:
    """All steps."""
    computed: list[int] = []
    strategy = prepared(trial, lambda: computed.append(strategy.optimization.steps))
    loss = take_steps(strategy, trial, 0, STEPS)
    own = {name: value.clone() for name, value in strategy.module.state_dict().items()}
    gathered = strategy.gather()
    assert strategy.busy_seconds > 0
    result = {
        "own": own,
        "gathered": dict(gathered.state_dict()),
        "unchanged": all(torch.equal(own[name], value) for name, value in strategy.module.state_dict().items()),
        "plain": type(gathered) is type(strategy.module) and gathered is not strategy.module,
        "loss": loss,
        "waited": [step for step in computed if step > trial.strategy.start_step],
        "learning_rate": strategy.optimization.learning_rate,
    }
    strategy.close()
    return result


def weights_after(trial: Trial, name: str, *, stop: int | None = None, resume: bool = False) -> dict[str, Tensor]:
    """Own and mean weights at the end, or when it was saved."""
    store = CheckpointStore(str(Path(os.environ[FOLDER]) / name))
    strategy, first = prepared(trial), 0
    if resume:
        newest = store.newest()
        assert newest is not None
        strategy.load_state_dict(store.load(newest))
        first = newest.step
    take_steps(strategy, trial, first, stop or STEPS)
    if stop:
        state = strategy.state_dict()
        if dist.get_rank() == 0:
            store.write(stop, state, {})
        dist.barrier()
    found = {**strategy.module.state_dict(), **{f"mean.{n}": v for n, v in strategy.gather().state_dict().items()}}
    found = {name: value.clone() for name, value in found.items()}
    strategy.close()
    return found


def fit(strategy: LocalSGD, **settings: Any) -> dict[str, Any]:
    """The loop, with validation."""
    trial = Trial(strategy, settings=tuple(settings.items()))
    at_work = prepared(trial)
    objective = Objective(trial.case.loss)
    trainer = Trainer(at_work, objective, config_of(trial), device=torch.device("cpu"), has_validation=True)
    history = [dict(record) for record in trainer.fit(Held(trial.case, dist.get_rank()))]
    result = {"history": history, "weights": weights_of(trainer.gather())}
    at_work.close()
    return result


class Held(Dealt):
    """Every rank validates the same rows."""

    def open_validation(self, rows: int) -> Any:
        opened = super().open_validation(rows)
        return opened if self.rank < 2 else dataclasses.replace(self, rank=1).open_validation(rows)


def four_ranks() -> dict[str, Any]:
    """Every trial in turn, in one group of ranks."""
    found: dict[str, Any] = {name: run(trial) for name, trial in TRIALS.items()}
    found["normed"] = run(Trial(LocalSGD(4), Case(module=normed, optimizer=MOMENTUM)))
    found["bf16"] = run(Trial(LocalSGD(3), Case(module=Single, optimizer=MOMENTUM), (("precision", "bf16"),)))
    found["resumed"] = {
        name: [
            weights_after(trial, name),
            weights_after(trial, name, stop=STOPPED),
            weights_after(trial, name, resume=True),
        ]
        for name, trial in RESUMED.items()
    }
    found["fits"] = {name: fit(strategy) for name, strategy in LEARNING.items()}
    found["best"] = fit(LEARNING["mean"], restore_best=True)
    return found


def two_ranks() -> dict[str, Any]:
    """Go on from the checkpoints of four ranks; and rings of two."""
    found: dict[str, Any] = {"ring of two": run(TRIALS["ring"])}
    found["went on"] = {}
    for name in ("mean", "nesterov", "ring", "in the synchronous part"):
        store = CheckpointStore(str(Path(os.environ[FOLDER]) / name))
        strategy, newest = prepared(RESUMED[name]), store.newest()
        assert newest is not None
        strategy.load_state_dict(store.load(newest))
        began = {name: value.clone() for name, value in strategy.module.state_dict().items()}
        take_steps(strategy, RESUMED[name], newest.step, STEPS)
        found["went on"][name] = began, dict(strategy.gather().state_dict())
        strategy.close()
    strategy = prepared(TRIALS["mean"])
    with pytest.raises(ConfigError) as refused:
        strategy.load_state_dict({"outer": "ring", "ranks": [], "common": None})
    found["refused"] = str(refused.value)
    return found


# ---- by hand ---------------------------------------------------------------------------------------------------------
def losses_of(case: Case, module: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """The sum of the losses of some rows, and what they are divided by."""
    losses = nn.functional.cross_entropy(module(batch.inputs[0]), batch.labels[0], reduction="none")
    weight = torch.ones(batch.rows, dtype=torch.float64) if batch.weight is None else batch.weight
    return (weight * losses).sum(), 0.0 if case.loss is SUM else float(weight.sum())


def flat(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().reshape(-1) for value in module.parameters()])


def give(module: nn.Module, vector: Tensor) -> None:
    parameters = list(module.parameters())
    with torch.no_grad():
        for value, part in zip(parameters, vector.split([value.numel() for value in parameters]), strict=True):
            value.copy_(part.view_as(value))


def step_by(case: Case, trial: Trial, optimizer: Any, module: nn.Module, pairs: Sequence[tuple[Batch, float]]) -> None:
    """One step on the sum of some rows' losses, each times a factor."""
    optimizer.zero_grad()
    for batch, factor in pairs:
        (losses_of(case, module, batch)[0] * factor).backward()
    settings = dict(trial.settings)
    if "gradient_clip_norm" in settings:
        nn.utils.clip_grad_norm_(module.parameters(), settings["gradient_clip_norm"])
    if "gradient_clip_value" in settings:
        nn.utils.clip_grad_value_(module.parameters(), settings["gradient_clip_value"])
    optimizer.step()


def by_hand(trial: Trial, ranks: int = RANKS) -> dict[str, Any]:
    """What every rank ends with, and the mean."""
    case, strategy = trial.case, trial.strategy
    modules = [case.module() for _ in range(ranks)]
    for module in modules:
        freeze_parameters(module, config_of(trial).frozen_parameters)
    name, rate, params = case.optimizer
    kind: Callable[..., torch.optim.Optimizer] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizers = [kind([p for p in m.parameters() if p.requires_grad], lr=rate, **dict(params)) for m in modules]
    common, velocity = flat(modules[0]), torch.zeros(())
    outer_rate, momentum = strategy._outer_options
    consumed = [0.0] * ranks
    for number, batch in enumerate(batches_of(case)):
        slices = slices_of(batch, number, ranks)
        for module, optimizer, own in zip(modules, optimizers, slices, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.97**number
            if number < strategy.start_step:
                step_by(case, trial, optimizer, module, [(batch, 1 / losses_of(case, module, batch)[1])])
                common = flat(module)
            elif own.rows:
                divisor = losses_of(case, module, own)[1]
                step_by(case, trial, optimizer, module, [(own, 1 / divisor if divisor else float(ranks))])
        if number < strategy.start_step:
            continue
        consumed = [
            before + losses_of(case, module, own)[1]
            for before, module, own in zip(consumed, modules, slices, strict=True)
        ]
        if (number + 1 - strategy.start_step) % strategy.sync_every == 0:
            if strategy.outer == "ring":
                mixing = torch.zeros(ranks, ranks, dtype=torch.float64)
                for rank in range(ranks):
                    near = {rank, (rank + 1) % ranks, (rank - 1) % ranks}
                    mixing[rank, list(near)] = 1 / len(near)
                for module, vector in zip(modules, mixing @ torch.stack([flat(m) for m in modules]), strict=True):
                    give(module, vector)
            else:
                mean = weighted_mean(modules, consumed)
                if strategy.outer == "nesterov":
                    moved = common - mean
                    velocity = momentum * velocity + moved
                    mean = common = common - outer_rate * (moved + momentum * velocity)
                for module in modules:
                    give(module, mean)
            consumed = [0.0] * ranks
    plain = strategy.outer == "ring"
    return {"own": [flat(module) for module in modules], "mean": weighted_mean(modules, [0.0] if plain else consumed)}


def weighted_mean(modules: Sequence[nn.Module], consumed: Sequence[float]) -> Tensor:
    weights = torch.tensor(consumed if sum(consumed) else [1.0] * len(modules), dtype=torch.float64)
    return (weights / weights.sum()) @ torch.stack([flat(module) for module in modules])


def joined(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().reshape(-1) for value in state.values()])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder_of_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("local_sgd"))
        patch.setenv(FOLDER, folder)
        yield folder


@pytest.fixture(scope="module")
def found(torchrun: Torchrun, folder_of_checkpoints: str) -> list[dict[str, Any]]:
    """What the four ranks found."""
    return torchrun(four_ranks, RANKS)


@pytest.fixture(scope="module")
def fewer(torchrun: Torchrun, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two ranks found after them."""
    return torchrun(two_ranks, 2)


@pytest.mark.parametrize("name", TRIALS)
def test_ranks_end_with_the_weights_that_are_computed_by_hand(found: list[dict[str, Any]], name: str) -> None:
    trial, expected = TRIALS[name], by_hand(TRIALS[name])
    for rank in range(RANKS):
        assert distance(joined(found[rank][name]["own"]), expected["own"][rank]) <= trial.tolerance
        assert distance(joined(found[rank][name]["gathered"]), expected["mean"]) <= trial.tolerance
        assert found[rank][name]["unchanged"], "gather changed what is trained"
        assert found[rank][name]["plain"]
        assert found[rank][name]["learning_rate"] == pytest.approx(trial.case.optimizer[1] * 0.97 ** (STEPS - 1))
    assert distance(expected["mean"], flat(trial.case.module())) > 1e-2, "nothing was trained"


@pytest.mark.parametrize("name", ["synchronous", "synchronous sums"])
def test_averages_after_every_step_of_plain_sgd_are_synchronous_training(
    found: list[dict[str, Any]], name: str
) -> None:
    case = TRIALS[name].case
    module = case.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=case.optimizer[1])
    for number, batch in enumerate(batches_of(case)):
        optimizer.param_groups[0]["lr"] = case.optimizer[1] * 0.97**number
        step_by(case, TRIALS[name], optimizer, module, [(batch, 1 / (losses_of(case, module, batch)[1] or 1))])
    for rank in range(RANKS):
        assert distance(joined(found[rank][name]["own"]), flat(module)) <= 1e-9


def test_ranks_have_equal_weights_where_all_have_met_last_and_their_own_elsewhere(found: list[dict[str, Any]]) -> None:
    for name, equal in {"mean": True, "nesterov": True, "ring": False, "alone": False, "post-local": False}.items():
        first, last = (joined(found[rank][name]["own"]) for rank in (0, RANKS - 1))
        assert bool(torch.equal(first, last)) == equal, name
        gathered = [joined(found[rank][name]["gathered"]) for rank in range(RANKS)]
        assert all(torch.equal(gathered[0], other) for other in gathered), name


def test_frozen_weights_keep_their_bits(found: list[dict[str, Any]]) -> None:
    before = mlp().state_dict()
    for rank in range(RANKS):
        for part in ("own", "gathered"):
            assert torch.equal(found[rank]["frozen"][part]["0.weight"], before["0.weight"])


def test_statistics_are_averaged_and_of_counts_the_largest_is_taken(found: list[dict[str, Any]]) -> None:
    states = [found[rank]["normed"]["own"] for rank in range(RANKS)]
    assert list(found[0]["normed"]["gathered"]) == list(normed().state_dict())
    for state in states:
        assert all(torch.equal(state[name], value) for name, value in states[0].items()), "buffers are averaged as well"
    # The count of a rank after every fourth step is the largest of all: three of the first four, and so on.
    counts = [0] * RANKS
    for step in range(STEPS):
        counts = [count + (rows > 0) for count, rows in zip(counts, SLICES[RANKS][step % 4], strict=True)]
        if step % 4 == 3:
            counts = [max(counts)] * RANKS
    assert int(states[0]["1.num_batches_tracked"]) == counts[0]
    assert not torch.equal(states[0]["1.running_mean"], normed().state_dict()["1.running_mean"])


def test_ranks_say_when_they_begin_to_wait(found: list[dict[str, Any]]) -> None:
    for name, steps in {
        "mean": [3, 6, 9, 12],
        "ring": [2, 4, 6, 8, 10, 12],
        "post-local": [8, 11],
        "alone": [],
    }.items():
        assert [found[rank][name]["waited"] for rank in range(RANKS)] == [steps] * RANKS, name


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    for rank in range(RANKS):
        calm, saved, resumed = found[rank]["resumed"][name]
        for key, value in calm.items():
            assert torch.equal(value, resumed[key]), key
        assert not torch.equal(saved["0.weight"], calm["0.weight"])


@pytest.mark.parametrize("name", ["mean", "nesterov", "ring", "in the synchronous part"])
def test_fewer_ranks_go_on_from_the_mean(found: list[dict[str, Any]], fewer: list[dict[str, Any]], name: str) -> None:
    saved = found[0]["resumed"][name][1]
    for rank in range(2):
        began, ended = fewer[rank]["went on"][name]
        for key, value in began.items():
            torch.testing.assert_close(value, saved[f"mean.{key}"], rtol=1e-12, atol=1e-14)
        assert all(bool(value.isfinite().all()) for value in ended.values())
        assert not torch.equal(began["0.weight"], ended["0.weight"])


def test_two_ranks_in_a_ring_have_one_neighbour(fewer: list[dict[str, Any]]) -> None:
    expected = by_hand(TRIALS["ring"], 2)
    for rank in range(2):
        assert distance(joined(fewer[rank]["ring of two"]["own"]), expected["own"][rank]) <= 1e-9
    assert [neighbours_of(0, size) for size in (1, 2, 3, 4)] == [[], [1], [2, 1], [3, 1]]
    assert neighbours_of(3, 4) == [2, 0]


def test_checkpoints_of_another_outer_step_are_refused(fewer: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="outer='mean' cannot go on from this checkpoint, which outer='ring' wrote"):
        raise ConfigError(fewer[0]["refused"])


@pytest.mark.parametrize("name", LEARNING)
def test_it_learns_and_counts_every_row_once(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        history = rank["fits"][name]["history"]
        assert [record["rows"] for record in history] == [40] * EPOCHS
        assert history[-1]["loss"] < 0.9 * history[0]["loss"]
        assert history[-1]["validation_loss"] < history[0]["validation_loss"]
        assert history[-1]["loss"] == found[0]["fits"][name]["history"][-1]["loss"]


def test_mixed_precision_computes_nearly_the_same(found: list[dict[str, Any]]) -> None:
    exact, mixed = (joined(found[0][name]["gathered"]) for name in ("mean", "bf16"))
    assert 0 < distance(mixed, exact) < 0.1


def test_the_best_weights_are_those_of_the_mean_over_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for key, value in rank["best"]["weights"].items():
            assert torch.equal(value, found[0]["best"]["weights"][key])


@pytest.mark.parametrize(
    ("strategy", "met"),
    [
        (LocalSGD(3), [3, 6]),
        (LocalSGD(3, outer="nesterov"), [3, 6]),
        (LocalSGD(3, outer="ring"), []),
        (LocalSGD(2, start_step=3), [1, 2, 3, 5, 7]),
        (LocalSGD(2, start_step=3, outer="ring"), [1, 2, 3]),
        (LocalSGD(1), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_ranks_meet_where_all_average(strategy: LocalSGD, met: list[int]) -> None:
    assert [step for step in range(1, 8) if strategy.meets(step)] == met


def test_states_of_ranks_are_averaged_by_their_shares() -> None:
    first = {"weight": torch.tensor([1.0, 2.0]).bfloat16(), "count": torch.tensor(3), "wave": torch.tensor([1j])}
    second = {"weight": torch.tensor([3.0, 6.0]).bfloat16(), "count": torch.tensor(5), "wave": torch.tensor([3.0 + 0j])}
    mean = average_states([first, second], shares_of([3.0, 1.0]))
    assert mean["weight"].tolist() == [1.5, 3.0]
    assert mean["weight"].dtype == torch.bfloat16
    assert mean["count"].item() == 5
    assert mean["wave"].tolist() == [0.75 + 0.75j]
    assert shares_of([0.0, 0.0]) == [0.5, 0.5]


REFUSED = [
    (LocalSGD(sync_every=0), {}, "sync_every=0 is too small. Use 1 step or more"),
    (LocalSGD(start_step=-1), {}, "start_step=-1 is no number of steps"),
    (LocalSGD(outer="star"), {}, "outer='star' is not known. Use one of mean, nesterov, ring"),  # type: ignore[arg-type]
    (LocalSGD(outer_momentum=0.9), {}, "outer_momentum=0.9 is set, but outer='mean' has no outer optimizer"),
    (LocalSGD(outer="ring", outer_learning_rate=1), {}, "outer_learning_rate=1 is set, but outer='ring' has no outer"),
    (LocalSGD(outer="nesterov", outer_learning_rate=0), {}, "outer_learning_rate=0 is no learning rate"),
    (LocalSGD(outer="nesterov", outer_momentum=1), {}, "outer_momentum=1 is no momentum. Use a number from 0 to below"),
    (LocalSGD(), {"averaging": "ema"}, "averaging='ema' does not work with strategy='local_sgd'"),
    (LocalSGD(), {"sync_batch_norm": True}, "syncBatchNorm=True does not work with strategy='local_sgd'"),
    (LocalSGD(), {"non_finite": "skip"}, "nonFinite='skip' does not work with strategy='local_sgd'"),
    (LocalSGD(), {"precision": "16"}, "precision='16' does not work with strategy='local_sgd'.* use precision='bf16'"),
]


@pytest.mark.parametrize(("strategy", "settings", "message"), REFUSED)
def test_what_cannot_work_is_refused(strategy: LocalSGD, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy.check(mlp(), TrainConfig(**settings))


def test_what_works_is_not_refused() -> None:
    LocalSGD(4, outer="nesterov", outer_momentum=0).check(mlp(), TrainConfig(precision="bf16", gradient_clip_norm=1.0))
    assert LocalSGD().replicas(3).groups == ((0,), (1,), (2,))
