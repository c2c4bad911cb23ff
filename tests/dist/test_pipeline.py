"""Pipelines and hybrids on four ranks against one plain process: modules that are no chain, and what a loop can ask."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from sparkdl.batch import Batch
from sparkdl.checkpoint import flatten_state, unflatten_state
from sparkdl.config import Column, Columns, TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective, TrainingStep
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import Hybrid, Pipeline, Setting, Strategy, TensorParallel
from sparkdl.preparation import freeze_parameters, prepare_module
from tests.dist.conftest import Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]

RANKS, BATCH, STEPS = 4, 10, 6
# Rows of every replica in every step, by the number of replicas.
SLICES: dict[int, Sequence[Sequence[int]]] = {
    1: ((10,),) * STEPS,
    2: ((5, 5), (10, 0), (3, 7), (0, 10), (9, 1), (4, 6)),
    4: ((3, 2, 1, 4), (10, 0, 0, 0), (0, 4, 6, 0), (2, 2, 3, 3), (1, 1, 1, 7), (4, 3, 0, 3)),
}


# ---- modules ---------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """Two inputs, one of numbers of words; an input is used late; a count is kept; the output is a dict."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, words: Tensor, values: Tensor) -> dict[str, Any]:
        hidden = self.words(words)
        hidden = hidden + torch.tanh(self.first(hidden))
        hidden = hidden + torch.relu_(self.second(hidden))
        hidden = hidden * values
        self.seen.add_(1)
        hidden = hidden + torch.tanh(self.third(hidden))
        return {"scores": self.head(hidden.view(words.shape[0], -1)), "kind": "logits"}


TANH, IN_PLACE = nn.Tanh(), nn.ELU(inplace=True)


class Images(nn.Module):
    """Convolutions with a BatchNorm behind them, if asked for, and dense layers, of images made of the values."""

    def __init__(self, activation: nn.Module = TANH, *, norm: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.dense = nn.Sequential(nn.Linear(24, 16), activation, nn.Linear(16, 8), activation, nn.Linear(8, 3))

    def forward(self, words: Tensor, values: Tensor) -> dict[str, Any]:
        features = torch.tanh(self.norm(self.convolution(values[:, None])))
        return {"scores": self.dense(features.flatten(1))}


class Chain(nn.Module):
    """Layers one after the other, with random ones between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layers = [[nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)] for _ in range(4)]
        self.layers = nn.Sequential(*itertools.chain(*layers), nn.Linear(6, 3))

    def forward(self, words: Tensor, values: Tensor) -> dict[str, Any]:
        return {"scores": self.layers(values)}


def loss_of(output: dict[str, Any], label: Tensor) -> Tensor:
    """One value per row."""
    return nn.functional.cross_entropy(output["scores"].double(), label, reduction="none")


def mean_loss(output: dict[str, Any], label: Tensor) -> Tensor:
    """A loss that takes the mean of the rows that it gets: no filled-up row may be among them."""
    assert len(output["scores"]) == len(label)
    return nn.functional.cross_entropy(output["scores"], label)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind().double()


def global_batch(step: int, *, weighted: bool) -> Batch:
    random = torch.Generator().manual_seed(100 + step)
    words = torch.randint(7, (BATCH,), generator=random)
    values = torch.randn(BATCH, 6, generator=random, dtype=torch.float64)
    weight = torch.rand(BATCH, generator=random, dtype=torch.float64) + 0.1
    return Batch((words, values), ((values.sum(1) > 0).long() + (words > 3).long(),), weight if weighted else None)


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        strategy: Makes it.
        module: Makes the module.
        loss: Of (output, label).
        weighted: True where rows have weights.
        recipe: Of the optimizer.
        config: Further settings.
    """

    strategy: Callable[[], Strategy]
    module: Callable[[], nn.Module] = Residual
    loss: Callable[..., Tensor] = loss_of
    weighted: bool = True
    recipe: OptimizerRecipe = field(default_factory=lambda: OptimizerRecipe("sgd", 0.2, {"momentum": 0.9}))
    config: Mapping[str, Any] = field(default_factory=dict)


GROUPS = OptimizerRecipe("adamw", 0.02, weight_decay=0.1, parameter_groups={"^head": {"lr": 0.1}, "bias": {"lr": 0.01}})
DENSE = {"dense.0": "colwise", "dense.2": "rowwise"}
EXACT = {
    "two pipelines": Case(lambda: Pipeline(stages=2)),
    "a stage per rank": Case(Pipeline),
    "gpipe": Case(lambda: Pipeline(schedule="gpipe", num_microbatches=3)),
    "interleaved": Case(lambda: Pipeline(stages=4, schedule="interleaved", stages_per_rank=2)),
    "cut at names": Case(lambda: Pipeline(stages=2, cut_points=["third"], num_microbatches=2)),
    "a mean loss": Case(lambda: Pipeline(stages=2), loss=mean_loss, weighted=False),
    "small micro-batches": Case(lambda: Pipeline(stages=2, num_microbatches=2), config={"micro_batch_size": 2}),
    "clipped norm": Case(lambda: Pipeline(stages=2), config={"gradient_clip_norm": 0.3}),
    "clipped norm and value": Case(Pipeline, config={"gradient_clip_norm": 0.3, "gradient_clip_value": 0.02}),
    "frozen": Case(lambda: Pipeline(stages=2), config={"frozen_parameters": ("^words", "^first")}),
    "groups": Case(Pipeline, recipe=GROUPS),
    "eager state": Case(lambda: Pipeline(stages=2), recipe=OptimizerRecipe("adagrad", 0.1)),
    "own function": Case(
        Pipeline, recipe=OptimizerRecipe(configure=lambda module: torch.optim.SGD(module.head.parameters(), 0.1))
    ),
    "computed again": Case(lambda: Pipeline(stages=2), Chain, config={"activation_checkpointing": (r"layers\.\d",)}),
    "hybrid": Case(Hybrid),
    "hybrid of four stages": Case(lambda: Hybrid(Pipeline(num_microbatches=5), data_parallel=1)),
    "hybrid of cut layers": Case(lambda: Hybrid(TensorParallel(DENSE), data_parallel=2), Images),
    "dense": Case(lambda: Hybrid(dense=DENSE), lambda: Images(IN_PLACE)),
    "dense, in pieces": Case(
        lambda: Hybrid(dense={**DENSE, "dense.4": "rowwise_split"}),
        Images,
        recipe=OptimizerRecipe("adamw", 0.02),
        config={"micro_batch_size": 2, "gradient_clip_norm": 0.3},
    ),
}


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def own_rows(strategy: Strategy, step: int, *, weighted: bool) -> Batch:
    """This rank's part of a batch, as the data would deal it."""
    place = strategy.replicas(dist.get_world_size()).place_of(dist.get_rank())
    assert place.dp_rank is not None
    sizes = SLICES[place.dp_size][step]
    start = sum(sizes[: place.dp_rank])
    batch = global_batch(step, weighted=weighted).part(start, start + sizes[place.dp_rank])
    if not place.reads_inputs:
        return replace(batch, inputs=())
    return batch if place.reads_labels else replace(batch, labels=())


def prepared(case: Case, module: nn.Module | None = None, **settings: Any) -> tuple[Strategy, TrainConfig]:
    strategy = case.strategy()
    config = TrainConfig(batch_size=BATCH, num_train_workers=dist.get_world_size(), **{**case.config, **settings})
    module = made(case.module) if module is None else module
    strategy.check(module, config)
    freeze_parameters(module, config.frozen_parameters)
    if dist.get_rank() == 2:  # rank 0's weights are the ones that count
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    module = prepare_module(module, config)
    build = optimization_builder(case.recipe, None, config, steps_per_epoch=STEPS)
    example = global_batch(0, weighted=case.weighted).part(0, 0 if dist.get_rank() == 1 else 2)
    strategy.prepare(module, Objective(case.loss), build, config, Setting(example, False))
    return strategy, config


def take_steps(strategy: Strategy, case: Case, first: int = 0, last: int = STEPS) -> list[float]:
    """The mean loss of each step, as the leading ranks know it."""
    losses = []
    place = strategy.replicas(dist.get_world_size()).place_of(dist.get_rank())
    strategy.module.train()
    for step in range(first, last):
        torch.manual_seed(1000 * step + (place.dp_rank or 0))
        batch = global_batch(step, weighted=case.weighted)
        denominator = float(BATCH if batch.weight is None else batch.weight.sum())
        result = strategy.train_step(own_rows(strategy, step, weighted=case.weighted), denominator)
        total = result.loss.double() if place.leads else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(float(total) / denominator)
    return losses


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def through_a_file(strategy: Strategy) -> Any:
    """What rank 0 would have saved, on all ranks."""
    tensors, structure = flatten_state(strategy.state_dict())
    copied = copy.deepcopy(unflatten_state({name: value.clone() for name, value in tensors.items()}, structure))
    told = [copied if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, 0)
    return told[0]


def exact(case: Case) -> dict[str, Any]:
    strategy, _ = prepared(case)
    losses = take_steps(strategy, case)
    gathered = strategy.gather()
    found = {
        "weights": state_of(gathered),
        "losses": losses,
        "kind": type(gathered).__name__,
        "plain": all(type(value) in (Tensor, nn.Parameter) for value in gathered.state_dict().values()),
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in gathered.modules()),
        "busy": strategy.busy_seconds,
        "bytes": sum(value.untyped_storage().nbytes() for value in strategy.module.parameters()),
    }
    strategy.close()
    return found


def resumed(first: Case, second: Case) -> dict[str, Any]:
    """Saved in the middle by one strategy, gone on with by another; and never interrupted."""
    strategy, _ = prepared(first)
    take_steps(strategy, first, 0, 3)
    state = through_a_file(strategy)
    take_steps(strategy, first, 3)
    calm = state_of(strategy.gather())
    strategy.close()
    strategy, _ = prepared(second)
    strategy.load_state_dict(state)
    take_steps(strategy, second, 3)
    found = state_of(strategy.gather())
    strategy.close()
    return {"calm": calm, "resumed": found}


def refused(case: Case, objective: Objective | None = None) -> str:
    """What is said when it is prepared."""
    strategy = case.strategy()
    config = TrainConfig(batch_size=BATCH, num_train_workers=RANKS)
    build = optimization_builder(case.recipe, None, config, steps_per_epoch=STEPS)
    setting = Setting(global_batch(0, weighted=True).part(0, 2), False)
    try:
        strategy.prepare(made(case.module), objective or Objective(case.loss), build, config, setting)
    except ConfigError as error:
        return str(error)
    return ""


COLUMNS = Columns(
    (Column("words", "input_0", "scalar", "int64"), Column("values", "input_1", "array", "float64")),
    (Column("label", "label_0", "scalar", "int64"),),
)
NOISY = Case(lambda: Pipeline(stages=2), lambda: Chain(0.3), recipe=OptimizerRecipe("adam", 0.02))


def train_all() -> dict[str, Any]:
    results: dict[str, Any] = {name: exact(case) for name, case in EXACT.items()}
    results["noisy"] = resumed(NOISY, NOISY)
    four = Case(Pipeline, Chain, recipe=GROUPS_OF_CHAIN)
    results["other stages"] = resumed(four, replace(four, strategy=lambda: Pipeline(stages=2)))
    norm = Case(lambda: Hybrid(dense=DENSE), lambda: Images(norm=True), recipe=OptimizerRecipe("adam", 0.02))
    results["dense, with statistics"] = resumed(norm, norm)
    single = made(lambda: Chain()).float()
    half = Case(Pipeline, Chain, loss=lambda output, label: loss_of(output, label))
    strategy, _ = prepared(half, _Single(single), precision="bf16")
    results["bf16"] = take_steps(strategy, half)
    strategy.close()
    step = TrainingStep(lambda module, batch: module(batch["words"], batch["values"]), COLUMNS)
    results["own step"] = refused(EXACT["hybrid"], step)
    results["too many"] = refused(Case(lambda: Pipeline(stages=4), lambda: _Whole()))
    return results


GROUPS_OF_CHAIN = OptimizerRecipe("adamw", 0.02, parameter_groups={r"layers\.12": {"lr": 0.1}})


class _Single(nn.Module):
    """Takes the double values that the other modules take."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: Tensor, values: Tensor) -> dict[str, Any]:
        return self.inner(words, values.float())


class _Whole(Chain):
    """Its way depends on the numbers."""

    def forward(self, words: Tensor, values: Tensor) -> dict[str, Any]:
        return super().forward(words, values * 2 if bool(values.sum() > 0) else values)


# ---- the oracle ------------------------------------------------------------------------------------------------------
def plainly(case: Case) -> tuple[dict[str, Tensor], list[float]]:
    """One process, whole batches, no part of sparkdl but what makes the optimizer of names."""
    module = made(case.module)
    freeze_parameters(module, case.config.get("frozen_parameters", ()))
    trained = [value for value in module.parameters() if value.requires_grad]
    optimizer = case.recipe.build(module)[0][0]
    losses = []
    for step in range(STEPS):
        batch = global_batch(step, weighted=case.weighted)
        module.zero_grad()
        output = module(*batch.inputs)
        weight = torch.ones(BATCH, dtype=torch.float64) if batch.weight is None else batch.weight
        loss = (loss_of(output, batch.labels[0]) * weight).sum() / weight.sum()
        loss.backward()
        if "gradient_clip_norm" in case.config:
            clip_grad_norm_(trained, case.config["gradient_clip_norm"])
        if "gradient_clip_value" in case.config:
            clip_grad_value_(trained, case.config["gradient_clip_value"])
        optimizer.step()
        losses.append(loss.item())
    return state_of(module), losses


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found(torchrun: Torchrun) -> list[dict[str, Any]]:
    return torchrun(train_all, RANKS)


@pytest.mark.parametrize("name", EXACT)
def test_it_equals_one_process(found: list[dict[str, Any]], name: str) -> None:
    weights, losses = plainly(EXACT[name])
    start = state_of(made(EXACT[name].module))
    trained = 0
    for key, value in weights.items():
        if key != "seen":
            error = float((found[0][name]["weights"][key] - value).norm() / value.norm())
            assert error <= 1e-5, f"{key}: {error}"
            trained += float((start[key] - value).norm()) > 1e-3
    assert trained >= 2
    for rank in found:
        assert rank[name]["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_every_rank_gathers_the_same_plain_module(found: list[dict[str, Any]], name: str) -> None:
    expected = made(EXACT[name].module)
    for rank in found:
        one = rank[name]
        assert one["kind"] == type(expected).__name__
        assert one["plain"]
        assert one["hooks"] == 0
        assert list(one["weights"]) == list(expected.state_dict())
        assert all(torch.equal(value, found[0][name]["weights"][key]) for key, value in one["weights"].items())
        assert one["busy"] > 0


def test_a_rank_keeps_the_parameters_of_its_stages_alone(found: list[dict[str, Any]]) -> None:
    module = made(Residual)
    tensors, whole = len(list(module.parameters())), sum(value.nbytes for value in module.parameters())
    held = [rank["a stage per rank"]["bytes"] for rank in found]
    assert whole < sum(held) <= whole + RANKS * tensors * 8, "but for one number in the place of each"


@pytest.mark.parametrize("name", ["noisy", "dense, with statistics"])
def test_a_resumed_run_is_equal_to_the_bit(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        for key, value in rank[name]["calm"].items():
            assert torch.equal(value, rank[name]["resumed"][key]), key
            assert torch.equal(value, found[0][name]["calm"][key]), key


def test_a_run_goes_on_with_another_number_of_stages(found: list[dict[str, Any]]) -> None:
    for key, value in found[3]["other stages"]["calm"].items():
        assert torch.allclose(value, found[3]["other stages"]["resumed"][key], rtol=1e-9), key


def test_mixed_precision_learns(found: list[dict[str, Any]]) -> None:
    losses = found[0]["bf16"]
    assert losses[-1] < losses[0]
    expected = plainly(Case(Pipeline, Chain))[1]
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != pytest.approx(expected, rel=1e-6)


def test_what_ranks_find_out_is_said_in_a_sentence(found: list[dict[str, Any]]) -> None:
    for rank in found:
        with pytest.raises(ConfigError, match="calls the module in parts, and a trainingStep calls the whole of it"):
            raise ConfigError(rank["own step"])
        with pytest.raises(ConfigError, match=r"_Whole cannot be cut into 4 pipeline stages: the forward of _Whole"):
            raise ConfigError(rank["too many"])


@pytest.mark.parametrize(
    ("strategy", "settings", "match"),
    [
        (Pipeline(stages=3), {}, "pipeline ranks=3 x data_parallel=1 makes 3 ranks, but there are numTrainWorkers=4"),
        (Pipeline(stages=3, schedule="interleaved", stages_per_rank=2), {}, "stages=3 cannot be dealt to ranks"),
        (Pipeline(stages_per_rank=2), {}, "stages_per_rank=2 does not go with schedule='1f1b'"),
        (Pipeline(schedule="zero"), {}, "schedule='zero' is not known. Use one of gpipe, 1f1b, interleaved"),  # type: ignore[arg-type]
        (Pipeline(num_microbatches=3), {}, "num_microbatches=3 .* leaves some of the 4 stages without work"),
        (
            Pipeline(stages=4, schedule="interleaved", stages_per_rank=2, num_microbatches=5),
            {},
            "num_microbatches=5 cannot be dealt in equal rounds to 2 ranks. Use a multiple of 2",
        ),
        (Pipeline(), {"averaging": "ema"}, "averaging='ema' does not go with strategy='pipeline'"),
        (Pipeline(), {"non_finite": "skip"}, "nonFinite='skip' does not go with strategy='pipeline'"),
        (Pipeline(), {"torch_compile": True}, "torchCompile=True does not go with strategy='pipeline'"),
        (Pipeline(), {"precision": "16"}, "precision='16' does not go with strategy='pipeline'"),
        (Pipeline(), {"frozen_parameters": ("words", "first")}, "4 pipeline stages need .* Residual has 3"),
        (Pipeline(cut_points=["head"]), {}, "make 2 pipeline stages, but there are to be 4"),
        (Hybrid(data_parallel=3), {}, "data_parallel=3 x pipeline ranks=2 makes 6 ranks, but there are"),
        (Hybrid(TensorParallel(size=3)), {}, "data_parallel=1 x tensor ranks=3 makes 3 ranks"),
        (Hybrid(Hybrid()), {}, "does not share out a module inside a group. Use a Pipeline or a"),  # type: ignore[arg-type]
        (Hybrid(dense={"head": "colwise"}, data_parallel=2), {}, "Use either dense, or the other two"),
        (Hybrid(dense={"body": "colwise"}), {}, "dense has 'body', which matches no submodule"),
        (Hybrid(dense={"first": "colwise"}), {"precision": "16"}, "precision='16' does not go with dense layers"),
        (Hybrid(dense={"first": "colwise"}), {"non_finite": "skip"}, "nonFinite='skip' does not go with dense"),
        (Hybrid(dense={"first": "colwise"}), {"sync_batch_norm": True}, "syncBatchNorm=True does not go with dense"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_job(
    strategy: Strategy, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        strategy.check(made(Residual), TrainConfig(num_train_workers=RANKS, **settings))


def test_batch_norm_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the BatchNorm layer 'norm' would take for those of the batch"):
        Pipeline(stages=2).check(Images(norm=True), TrainConfig(num_train_workers=2))


def test_ranks_of_a_pipeline_read_what_they_need() -> None:
    replicas = Hybrid(Pipeline(stages=2)).replicas(RANKS)
    assert replicas.groups == ((0, 1), (2, 3))
    places = [replicas.place_of(rank) for rank in range(RANKS)]
    assert [place.reads_inputs for place in places] == [True, False, True, False]
    assert [place.leads for place in places] == [False, True, False, True]
    assert Hybrid(dense={"first": "colwise"}).replicas(RANKS).dp_size == RANKS
