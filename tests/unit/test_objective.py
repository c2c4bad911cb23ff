"""The loss as the mean over the global batch, however the batch is cut: always against torch's own mean."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Objective, build_loss, loss_names
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel, Setting

ROWS, FEATURES, CLASSES, TARGETS = 23, 5, 4, 3
CUTS = [[23], [1, 22], [7, 0, 16], [0, 11, 12, 0], [5, 5, 5, 5, 3]]

Parts = Sequence[int]


def inputs() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classes(count: int = CLASSES) -> Tensor:
    return torch.randint(0, count, (ROWS,), generator=torch.Generator().manual_seed(2))


def targets(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def linear(outputs: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(FEATURES, outputs).double()


def cut(tensor: Tensor | None, parts: Parts) -> list[Tensor | None]:
    return [None] * len(parts) if tensor is None else list(tensor.split(list(parts)))


def gradient_of(value: Tensor, module: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(module.parameters()))
    return torch.cat([part.flatten() for part in found])


def in_parts(
    objective: Objective, module: nn.Module, label: Tensor, parts: Parts, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient as ranks make them: sums over parts by the denominator of all; no forward of no rows."""
    total, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for x, y, w in zip(*(cut(tensor, parts) for tensor in (inputs(), label, weight)), strict=True):
        assert x is not None
        assert y is not None
        denominator += objective.denominator((y,), w)
        if len(x):
            total = total + objective(module(x), (y,), w)
    loss = total / (denominator or 1.0)
    return loss.detach(), gradient_of(loss, module)


def check(
    loss: Callable[..., Tensor], outputs: int, label: Tensor, expected: Callable[[Tensor], Tensor], *, parts: Parts,
    weight: Tensor | None = None, binary: bool = False,
) -> None:  # fmt: skip
    """Cut into parts or not, loss and gradient are those of the whole batch."""
    module = linear(outputs)
    whole = expected(module(inputs()))
    found, gradient = in_parts(Objective(loss, binary=binary), module, label, parts, weight)
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, gradient_of(whole, module), rtol=1e-10, atol=1e-12)


CLASS_WEIGHTS = torch.tensor([1.0, 0.2, 5.0, 2.5], dtype=torch.float64)
CLASS_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "class weights": lambda **more: nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, **more),
    "ignored class": lambda **more: nn.CrossEntropyLoss(ignore_index=2, **more),
    "label smoothing": lambda **more: nn.CrossEntropyLoss(label_smoothing=0.2, **more),
    "all of them": lambda **more: nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=0, label_smoothing=0.1, **more),
    "multi_margin": nn.MultiMarginLoss,
    "multi_margin with weights": lambda **more: nn.MultiMarginLoss(weight=CLASS_WEIGHTS, **more),
    "nll": nn.NLLLoss,
    "nll with weights": lambda **more: nn.NLLLoss(CLASS_WEIGHTS, ignore_index=1, **more),
}
NUMBER_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "huber": lambda **more: nn.HuberLoss(delta=0.3, **more),
    "smooth_l1": nn.SmoothL1Loss,
    "poisson_nll": nn.PoissonNLLLoss,
    "soft_margin": nn.SoftMarginLoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
}


# ---- against torch's own mean ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_class_losses_over_any_parts_are_torchs_mean_over_the_whole(name: str, parts: Parts) -> None:
    loss, label = CLASS_LOSSES[name](), classes()
    check(loss, CLASSES, label, lambda scores: loss(scores, label), parts=parts)


@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_losses_of_one_target_over_any_parts_are_torchs_mean_over_the_whole(name: str, parts: Parts) -> None:
    loss, label = NUMBER_LOSSES[name](), targets()
    check(loss, 1, label, lambda scores: loss(scores[:, 0], label), parts=parts)


@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_losses_of_several_targets_over_any_parts_are_torchs_mean_over_the_whole(name: str, parts: Parts) -> None:
    loss, label = NUMBER_LOSSES[name](), targets(TARGETS)
    check(loss, TARGETS, label, lambda scores: loss(scores, label), parts=parts)


@given(parts=st.lists(st.integers(0, ROWS), max_size=6).map(sorted))
@settings(deadline=None, max_examples=15)
def test_no_cut_of_the_batch_changes_the_loss(parts: list[int]) -> None:
    sizes = [high - low for low, high in itertools.pairwise([0, *parts, ROWS])]
    loss, label = CLASS_LOSSES["all of them"](), classes()
    check(loss, CLASSES, label, lambda scores: loss(scores, label), parts=sizes)


def test_the_mean_of_means_would_be_something_else() -> None:
    loss, label, module = nn.CrossEntropyLoss(), classes(), linear(CLASSES)
    scores = module(inputs())
    means = torch.stack([loss(s, y) for s, y in zip(scores.split([1, 22]), label.split([1, 22]), strict=True)]).mean()
    assert abs(float((means - loss(scores, label)).detach())) > 1e-3


@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_soft_class_labels_are_averaged_over_rows(parts: Parts) -> None:
    loss, label = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), targets(CLASSES).softmax(1)
    check(loss, CLASSES, label, lambda scores: loss(scores, label), parts=parts)


@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS[:3]], ids=["plain", "class weights"])
def test_labels_of_several_positions_per_row_are_averaged_over_all_that_are_not_ignored(
    parts: Parts, weight: Tensor | None
) -> None:
    loss = nn.CrossEntropyLoss(weight=weight, ignore_index=1)
    label = torch.randint(0, 3, (ROWS, 2), generator=torch.Generator().manual_seed(4))

    module = linear(6)
    objective = Objective(loss)
    total, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for x, y in zip(inputs().split(list(parts)), label.split(list(parts)), strict=True):
        denominator += objective.denominator((y,), None)
        if len(x):
            total = total + objective(module(x).reshape(-1, 3, 2), (y,), None)
    expected = loss(module(inputs()).reshape(-1, 3, 2), label)
    torch.testing.assert_close(total / denominator, expected, rtol=1e-12, atol=1e-12)


# ---- row weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "class weights", "ignored class", "label smoothing", "all of them"])
def test_row_weights_count_a_row_as_often_as_they_say(name: str, parts: Parts) -> None:
    """A weight of three is the row three times, a weight of zero is no row: the oracle repeats rows."""
    times = torch.arange(ROWS) % 4
    loss, label = CLASS_LOSSES[name](), classes()

    def repeated(scores: Tensor) -> Tensor:
        return loss(scores.repeat_interleave(times, 0), label.repeat_interleave(times, 0))  # type: ignore[no-any-return]

    check(loss, CLASSES, label, repeated, parts=parts, weight=times.double())


@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("outputs", [1, TARGETS])
def test_row_weights_of_regressions_count_rows_too(outputs: int, parts: Parts) -> None:
    times = torch.arange(ROWS) % 3
    loss, label = nn.MSELoss(), targets(outputs)
    check(
        loss, outputs, label,
        lambda scores: loss(scores.repeat_interleave(times, 0), label.repeat_interleave(times, 0)),
        parts=parts, weight=times.double(),
    )  # fmt: skip


def test_a_batch_whose_weights_are_all_zero_teaches_nothing() -> None:
    _, gradient = in_parts(Objective(nn.MSELoss()), linear(1), targets(), [10, 13], torch.zeros(ROWS).double())
    assert not gradient.any()


def test_row_weights_and_a_loss_that_returns_one_number_contradict_each_other() -> None:
    objective = Objective(lambda output, label: nn.functional.mse_loss(output, label))
    with pytest.raises(ConfigError, match=r"weightCol is set, but the loss .*lambda.* returned one number for 4 rows"):
        objective(torch.zeros(4, 1), (torch.zeros(4),), torch.ones(4))


# ---- callables and reductions ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_a_callable_that_returns_the_mean_is_brought_back_to_a_sum(parts: Parts) -> None:
    label = targets()
    check(
        lambda output, y: ((output - y) ** 2).mean(), 1, label,
        lambda scores: nn.functional.mse_loss(scores[:, 0], label), parts=parts,
    )  # fmt: skip


@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_a_callable_that_returns_one_value_per_row_is_averaged_and_can_be_weighted(parts: Parts) -> None:
    label, times = classes(), torch.arange(ROWS) % 4

    def focal(scores: Tensor, y: Tensor) -> Tensor:
        entropy = nn.functional.cross_entropy(scores, y, reduction="none")
        return (1 - (-entropy).exp()) ** 2 * entropy

    check(focal, CLASSES, label, lambda scores: focal(scores, label).mean(), parts=parts)
    check(
        focal, CLASSES, label, lambda scores: focal(scores, label).repeat_interleave(times).mean(), parts=parts,
        weight=times.double(),
    )  # fmt: skip


def test_a_callable_that_returns_values_per_row_and_target_is_averaged_over_both() -> None:
    label = targets(TARGETS)
    check(
        lambda output, y: (output - y).abs(), TARGETS, label, lambda scores: (scores - label).abs().mean(),
        parts=[9, 14],
    )  # fmt: skip


@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_a_loss_that_is_to_be_summed_is_the_sum_over_all_rows(parts: Parts) -> None:
    label = targets(TARGETS)
    loss = nn.MSELoss(reduction="sum")
    check(loss, TARGETS, label, lambda scores: loss(scores, label) / TARGETS, parts=parts)
    entropy, number = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="sum"), classes()
    check(entropy, CLASSES, number, lambda scores: entropy(scores, number), parts=parts)


def test_a_summed_loss_has_no_denominator_and_says_so() -> None:
    objective = Objective(nn.L1Loss(reduction="sum"))
    assert objective.denominator((targets(),), None) == 0
    assert not objective.counts_rows


def test_a_loss_without_reduction_is_averaged_over_rows() -> None:
    label = targets()
    check(
        nn.MSELoss(reduction="none"), 1, label, lambda scores: nn.functional.mse_loss(scores[:, 0], label),
        parts=[9, 14],
    )  # fmt: skip


@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_a_divergence_by_batch_is_the_sum_by_rows(parts: Parts) -> None:
    label = targets(CLASSES).softmax(1)
    loss = nn.KLDivLoss(reduction="batchmean")
    check(loss, CLASSES, label, lambda scores: loss(scores, label), parts=parts)


@pytest.mark.parametrize("name", [*CLASS_LOSSES, *NUMBER_LOSSES])
def test_ranks_know_the_denominator_unasked_only_where_it_is_the_number_of_rows(name: str) -> None:
    make = CLASS_LOSSES.get(name) or NUMBER_LOSSES[name]
    objective = Objective(make())
    label = classes() if name in CLASS_LOSSES else targets()
    if objective.counts_rows:
        assert objective.denominator((label,), None) == ROWS
    else:
        assert name in ("class weights", "ignored class", "all of them", "nll with weights")


def test_the_callers_loss_is_never_changed() -> None:
    mine = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    objective = Objective(build_loss(mine))
    objective(torch.zeros(2, CLASSES, dtype=torch.float64), (torch.tensor([0, 1]),), None)
    objective.float()
    assert mine.reduction == "mean"
    assert mine.weight.dtype == torch.float64


def test_several_labels_reach_the_loss_as_a_tuple() -> None:
    def loss(outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(labels, tuple)
        return (outputs[0] - labels[0]) ** 2 + nn.functional.cross_entropy(outputs[1], labels[1], reduction="none")

    first, second = torch.randn(6), torch.randn(6, 3)
    labels = (torch.randn(6), torch.tensor([0, 1, 2, 0, 1, 2]))
    objective = Objective(loss)
    assert objective.denominator(labels, None) == 6
    whole = nn.functional.mse_loss(first, labels[0]) + nn.functional.cross_entropy(second, labels[1])
    torch.testing.assert_close(objective((first, second), labels, None) / 6, whole)


# ---- shapes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label_shape", [(ROWS,), (ROWS, 1)], ids=str)
@pytest.mark.parametrize("output_shape", [(ROWS,), (ROWS, 1)], ids=str)
@pytest.mark.parametrize("loss", [nn.MSELoss(), lambda output, label: (output - label) ** 2], ids=["torch", "callable"])
def test_one_target_never_broadcasts_whatever_the_shapes(
    loss: Any, output_shape: tuple[int, ...], label_shape: tuple[int, ...]
) -> None:
    output, label = targets(1) + 1, targets(1)
    found = Objective(loss)(output.reshape(output_shape), (label.reshape(label_shape),), None)
    torch.testing.assert_close(found, ((output - label) ** 2).sum())


@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_an_integer_target_is_a_number_and_never_broadcasts(name: str) -> None:
    label, output = torch.arange(ROWS) % 2, targets(1)
    expected = NUMBER_LOSSES[name](reduction="sum")(output[:, 0], label.double())
    torch.testing.assert_close(Objective(NUMBER_LOSSES[name]())(output, (label,), None), expected)


def test_losses_of_class_sets_keep_their_integer_targets() -> None:
    output, label = targets(CLASSES), torch.tensor([[3, 0, -1, 1]] * ROWS)
    loss = nn.MultiLabelMarginLoss()
    torch.testing.assert_close(Objective(loss)(output, (label,), None) / ROWS, loss(output, label))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", NUMBER_LOSSES)
def test_outputs_that_are_not_one_per_target_are_refused_with_both_shapes(name: str, binary: bool) -> None:
    with pytest.raises(ConfigError, match=r"output has shape \(6, 3\), the label \(6, 2\).*one output per target"):
        Objective(NUMBER_LOSSES[name](), binary=binary)(torch.zeros(6, 3), (torch.zeros(6, 2),), None)
    with pytest.raises(ConfigError, match=r"output has shape \(6, 3\), the label \(6,\)"):
        Objective(NUMBER_LOSSES[name](), binary=binary)(torch.zeros(6, 3), (torch.zeros(6),), None)


def test_what_the_loss_cannot_take_is_shown_with_shapes_and_types() -> None:
    with pytest.raises(
        ConfigError,
        match=r"CrossEntropyLoss cannot take .*shape \(6, 3\), float32 with labels of shape \(6, 2\), int64",
    ):
        Objective(nn.CrossEntropyLoss()).try_on(torch.zeros(6, 3), (torch.zeros(6, 2, dtype=torch.int64),), None)


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        ((torch.zeros(6, 2), torch.zeros(6)), r"\(of shape \(6, 2\), float32, of shape \(6,\), float32\)"),
        ({"logits": torch.zeros(6, 2)}, r"\{'logits': of shape \(6, 2\), float32\}"),
        (None, "of type NoneType"),
    ],
    ids=["tuple", "dict", "nothing"],
)
def test_outputs_that_are_no_tensors_are_shown(outputs: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"MSELoss cannot take the module's output {shown} with labels of shape"):
        Objective(nn.MSELoss()).try_on(outputs, (torch.zeros(6),), None)


def test_a_loss_that_returns_neither_one_value_per_row_nor_the_mean_is_refused() -> None:
    def per_class(output: Tensor, label: Tensor) -> Tensor:
        return output.mean(0)

    with pytest.raises(ConfigError, match=r"per_class returned shape \(3,\) for 6 rows.*\. Return one value per row"):
        Objective(per_class)(torch.zeros(6, 3), (torch.zeros(6),), None)


def test_an_error_of_the_callers_loss_is_about_shapes_on_the_first_rows_and_its_own_later() -> None:
    def broken(output: Tensor, label: Tensor) -> Tensor:
        raise KeyError("planted")

    arguments = torch.zeros(6, 3), (torch.zeros(6),), None
    with pytest.raises(ConfigError, match=r"broken cannot take .*shape \(6, 3\).*: 'planted'") as caught:
        Objective(broken).try_on(*arguments)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(KeyError, match="planted"):
        Objective(broken)(*arguments)


def test_the_loss_of_the_first_rows_is_that_of_any_rows() -> None:
    output, label = targets(1), targets()
    objective = Objective(nn.MSELoss())
    assert torch.equal(objective.try_on(output, (label,), None), objective(output, (label,), None))
    with pytest.raises(ConfigError, match=r"^The module's output has shape \(23, 1\), the label \(23, 3\)"):
        objective.try_on(output, (targets(3),), None)


def test_a_callable_that_broadcasts_rows_against_rows_is_refused() -> None:
    """Integer labels come as (rows,); beside an output of (rows, 1) a difference is (rows, rows)."""
    with pytest.raises(ConfigError, match=r"shape \(6, 6\) for 6 rows.*shape \(6, 1\).*shape \(6,\)"):
        Objective(lambda output, label: (output - label) ** 2)(torch.zeros(6, 1), (torch.arange(6),), None)


# ---- one logit -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", CUTS, ids=str)
@pytest.mark.parametrize("times", [None, torch.arange(ROWS) % 4], ids=["rows", "weighted rows"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 7.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.3),
        nn.CrossEntropyLoss(ignore_index=0),
    ],
    ids=["plain", "class weights", "label smoothing", "ignored class"],
)
def test_one_logit_is_the_score_of_class_one_against_zero(loss: nn.Module, parts: Parts, times: Tensor | None) -> None:
    label = classes(2)
    repeats = torch.ones(ROWS, dtype=torch.int64) if times is None else times

    def two_scores(logit: Tensor) -> Tensor:
        scores = torch.hstack([torch.zeros_like(logit), logit])
        return loss(scores.repeat_interleave(repeats, 0), label.repeat_interleave(repeats))  # type: ignore[no-any-return]

    weight = None if times is None else times.double()
    check(loss, 1, label, two_scores, parts=parts, weight=weight, binary=True)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)], ids=str)
def test_one_logit_is_binary_cross_entropy(shape: tuple[int, ...]) -> None:
    logit, label = targets(1), classes(2)
    expected = nn.functional.binary_cross_entropy_with_logits(logit[:, 0], label.double(), reduction="sum")
    for loss in ("cross_entropy", "binary_cross_entropy_with_logits"):
        found = Objective(build_loss(loss), binary=True)(logit.reshape(shape), (label,), None)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("parts", CUTS, ids=str)
def test_one_logit_keeps_the_weight_of_the_positive_class(parts: Parts) -> None:
    loss, label = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7.0, dtype=torch.float64)), classes(2)
    check(loss, 1, label, lambda logit: loss(logit[:, 0], label.double()), parts=parts, binary=True)


def test_one_logit_goes_to_the_callers_own_loss() -> None:
    label = classes(2)

    def hinge(output: Tensor, y: Tensor) -> Tensor:
        return (1 - (2.0 * y.reshape(-1) - 1) * output.reshape(-1)).clamp(min=0)

    check(hinge, 1, label, lambda logit: hinge(logit, label).mean(), parts=[9, 14], binary=True)


def test_two_logits_are_an_ordinary_classifier() -> None:
    loss, label = nn.CrossEntropyLoss(), classes(2)
    check(loss, 2, label, lambda scores: loss(scores, label), parts=[9, 14], binary=True)


def test_a_loss_of_one_logit_refuses_two() -> None:
    with pytest.raises(ConfigError, match=r"output has shape \(6, 2\), the label \(6,\); BCEWithLogitsLoss needs one"):
        Objective(nn.BCEWithLogitsLoss(), binary=True)(torch.zeros(6, 2), (torch.zeros(6, dtype=torch.int64),), None)


# ---- names -----------------------------------------------------------------------------------------------------------
def test_losses_have_the_names_of_torchs_functions() -> None:
    for name in loss_names():
        functional = getattr(nn.functional, name, None) or getattr(nn.functional, f"{name}_loss")
        assert callable(functional)
        assert isinstance(build_loss(name), nn.Module)
        assert type(build_loss(f"{name}_loss")) is type(build_loss(name.upper())) is type(build_loss(name))


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"loss='log_loss' is not known\. Use one of .*cross_entropy.*mse.*callable"):
        build_loss("log_loss")


@pytest.mark.parametrize("loss", [nn.MSELoss, 3, ["mse"]], ids=["class", "number", "list"])
def test_what_cannot_be_called_as_a_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot be called with \(output, label\)\. Pass an instance, not a class"):
        build_loss(loss)


# ---- in the step of data parallel training ---------------------------------------------------------------------------
@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group in which this process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


NO_ROWS = Batch((torch.zeros(0, FEATURES),), (torch.zeros(0),))


def strategy_of(
    module: nn.Module, loss: Callable[..., Tensor], rate: float = 0.1, micro_batch_size: int | None = None
) -> DataParallel:
    """A strategy that takes plain gradient steps."""
    strategy = DataParallel()
    config = TrainConfig(micro_batch_size=micro_batch_size)
    build = optimization_builder(OptimizerRecipe("sgd", rate), None, config, steps_per_epoch=1)
    strategy.prepare(module, Objective(loss), build, config, Setting(NO_ROWS, False))
    return strategy


@pytest.mark.parametrize("micro_batch_size", [None, 1, 4, 23, 100])
@pytest.mark.parametrize("name", ["cross_entropy", "all of them"])
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(
    group_of_one: None, name: str, micro_batch_size: int | None
) -> None:
    loss, label = CLASS_LOSSES[name](), classes()
    expected = linear(CLASSES)
    whole = loss(expected(inputs()), label)
    gradients = torch.autograd.grad(whole, list(expected.parameters()))
    module = linear(CLASSES)
    strategy = strategy_of(module, loss, micro_batch_size=micro_batch_size)
    denominator = Objective(loss).denominator((label,), None)
    total = strategy.train_step(Batch((inputs(),), (label,)), denominator).loss
    torch.testing.assert_close(total / denominator, whole.detach())
    for value, before, gradient in zip(module.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(value.detach(), before.detach() - 0.1 * gradient, rtol=1e-9, atol=1e-12)


def test_a_rank_without_rows_takes_part_with_a_gradient_of_zero_and_no_forward(group_of_one: None) -> None:
    class Forward(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Forward.calls += 1
            return super().forward(x)

    module = Forward(FEATURES, CLASSES)
    before = [value.detach().clone() for value in module.parameters()]
    strategy = strategy_of(module, nn.CrossEntropyLoss())
    empty = Batch((torch.zeros(0, FEATURES),), (torch.zeros(0, dtype=torch.int64),))
    assert float(strategy.train_step(empty, 8.0).loss) == 0
    assert Forward.calls == 0
    assert all(value.grad is not None and not value.grad.any() for value in module.parameters())
    for value, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(value, old)


def test_a_step_whose_denominator_is_zero_is_that_of_the_sum(group_of_one: None) -> None:
    module, label = linear(1), targets(1)
    expected = [
        value - 0.01 * gradient
        for value, gradient in zip(
            module.parameters(),
            torch.autograd.grad(((module(inputs()) - label) ** 2).sum(), list(module.parameters())),
            strict=True,
        )
    ]
    strategy_of(module, nn.MSELoss(reduction="sum"), 0.01, 5).train_step(Batch((inputs(),), (label,)), 0.0)
    for value, wanted in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted.detach(), rtol=1e-9, atol=1e-12)


def test_micro_batches_keep_labels_and_weights_beside_their_rows() -> None:
    rows = torch.arange(7)
    batch = Batch((rows[:, None].float(), rows), (rows, rows * 10), rows / 2)
    parts = list(batch.split(3))
    assert [part.rows for part in parts] == [2, 2, 3], "as even as can be"
    for part in parts:
        ids = part.inputs[1]
        assert part.inputs[0][:, 0].tolist() == ids.tolist() == part.labels[0].tolist()
        assert part.labels[1].tolist() == (ids * 10).tolist()
        assert part.weight is not None
        assert part.weight.tolist() == (ids / 2).tolist()
    assert list(batch.split(None)) == [batch]
    empty = Batch((torch.zeros(0, 2),), (torch.zeros(0),))
    assert list(empty.split(3)) == [empty]
