"""Metrics in one process: names against arithmetic in NumPy, what objects are given, and what is refused."""

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchmetrics
import torchmetrics.classification as tc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.wrappers import ClasswiseWrapper, MetricInputTransformer, MinMaxMetric, MultioutputWrapper

from sparkdl.errors import ConfigError
from sparkdl.metrics import Kind, Metrics, check_metrics, higher_is_better, metric_names
from sparkdl.predict import is_one_logit, probabilities, raw_scores

Array = npt.NDArray[Any]


def value_of(metrics: Any, outputs: Tensor, labels: Tensor, kind: Kind = "class", pieces: int = 3) -> dict[str, float]:
    """What the metrics say of rows that come in several updates."""
    counted = Metrics(metrics, kind=kind)
    for number in range(pieces):
        counted.update(outputs[number::pieces], labels[number::pieces])
    return counted.compute()


def drawn(classes: int, rows: int, seed: int, *, ties: bool = True) -> tuple[Tensor, Tensor]:
    """Scores of which many rows are equal, and labels of which some classes have none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, max(classes, 1), generator=generator)
    labels = torch.randint(0, max(classes - 1, 2), (rows,), generator=generator)
    return (scores[torch.randint(0, (rows + 4) // 5, (rows,), generator=generator)] if ties else scores), labels


# ---- oracles: one line of a textbook each ----------------------------------------------------------------------------
def weighted(chance: Array, labels: Array, measure: Callable[[int, int, int], float]) -> float:
    """Mean over classes by their rows of a measure of hits, predicted rows and rows."""
    predicted = chance.argmax(1)
    total = 0.0
    for label in np.unique(labels):
        rows = int((labels == label).sum())
        hits = int(((labels == label) & (predicted == label)).sum())
        total += rows / len(labels) * measure(hits, int((predicted == label).sum()), rows)
    return total


def pairs_in_order(scores: Array, positive: Array) -> float:
    """Part of the pairs of a positive and another row that are in order, equal ones by half: the area under ROC."""
    if positive.all() or not positive.any():
        return math.nan
    above, below = scores[positive][:, None], scores[~positive][None]
    return float(((above > below) + 0.5 * (above == below)).mean())


def average_precision(scores: Array, positive: Array) -> float:
    """Mean over the positive rows of the precision from their score upwards."""
    if not positive.any():
        return math.nan
    return float(np.mean([positive[scores >= score].mean() for score in scores[positive]]))


def over_classes(measure: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    def mean(chance: Array, labels: Array) -> float:
        if chance.shape[1] == 2:
            return measure(chance[:, 1], labels == 1)
        found = [measure(chance[:, label], labels == label) for label in range(chance.shape[1])]
        return float(np.nanmean(found)) if not np.isnan(found).all() else math.nan

    return mean


CLASS_ORACLES: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda chance, labels: float((chance.argmax(1) == labels).mean()),
    "hamming_loss": lambda chance, labels: float((chance.argmax(1) != labels).mean()),
    "f1": lambda chance, labels: weighted(chance, labels, lambda hits, said, rows: 2 * hits / (said + rows)),
    "precision": lambda chance, labels: weighted(chance, labels, lambda hits, said, rows: hits / said if said else 0),
    "recall": lambda chance, labels: weighted(chance, labels, lambda hits, said, rows: hits / rows),
    "log_loss": lambda chance, labels: float(
        -np.log(np.clip(chance[np.arange(len(labels)), labels], 1e-15, 1 - 1e-15)).mean()
    ),
    "auroc": over_classes(pairs_in_order),
    "average_precision": over_classes(average_precision),
}
NUMBER_ORACLES: dict[str, Callable[[Array, Array], Any]] = {
    "mae": lambda y, t: np.abs(y - t).mean(),
    "mse": lambda y, t: ((y - t) ** 2).mean(),
    "rmse": lambda y, t: math.sqrt(((y - t) ** 2).mean()),
    "mape": lambda y, t: (np.abs(y - t) / np.abs(t)).mean(),
    "r2": lambda y, t: (1 - ((y - t) ** 2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)).mean(),
    "explained_variance": lambda y, t: (1 - (t - y).var(0) / t.var(0)).mean(),
}


def test_every_name_has_an_oracle() -> None:
    assert {*CLASS_ORACLES, "top5_accuracy"} == set(metric_names("class"))
    assert set(NUMBER_ORACLES) == set(metric_names("number"))
    assert metric_names() == sorted(metric_names("class") + metric_names("number"))


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 200])
def test_names_of_classes_equal_arithmetic_on_what_transform_returns(classes: int, rows: int) -> None:
    scores, labels = drawn(classes, rows, seed=classes * 1000 + rows)
    exact = scores.double().numpy()
    chance = probabilities(raw_scores(exact), one_logit=is_one_logit(exact))
    expected = {name: oracle(chance, labels.numpy()) for name, oracle in CLASS_ORACLES.items()}
    assert value_of(list(expected), scores, labels) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("shape", [(200,), (200, 1)], ids=str)
def test_one_logit_may_have_either_shape_and_labels_any_type(shape: tuple[int, ...]) -> None:
    scores, labels = drawn(1, 200, seed=5)
    expected = value_of(["auroc", "f1"], scores, labels)
    assert value_of(["auroc", "f1"], scores.reshape(shape), labels.float().reshape(shape)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 2)), min_size=1, max_size=20), st.integers(2, 4))
def test_names_of_classes_hold_for_any_rows(rows: list[tuple[int, int]], classes: int) -> None:
    scores = torch.tensor([[float(score * (number + 1) % 3) for number in range(classes)] for score, _ in rows])
    labels = torch.tensor([label % classes for _, label in rows])
    chance = probabilities(scores.double().numpy(), one_logit=False)
    expected = {name: oracle(chance, labels.numpy()) for name, oracle in CLASS_ORACLES.items()}
    assert value_of(list(expected), scores, labels) == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_the_label_is_among_the_k_most_probable(k: int) -> None:
    scores, labels = drawn(6, 300, seed=k, ties=False)
    best = scores.argsort(1, descending=True)[:, :k]
    expected = (best == labels[:, None]).any(1).double().mean().item()
    assert value_of([f"top{k}_accuracy"], scores, labels) == {f"top{k}_accuracy": pytest.approx(expected, rel=1e-12)}


def test_certain_scores_have_a_finite_log_loss() -> None:
    scores, labels = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 1])
    expected = (-math.log(1 - 1e-15) - math.log(1e-15)) / 2
    assert value_of(["log_loss"], scores, labels)["log_loss"] == pytest.approx(expected, rel=1e-12)


def test_scores_that_are_nan_are_not_ranked() -> None:
    scores, labels = torch.tensor([[0.0, math.nan], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    found = value_of(["auroc", "average_precision", "log_loss"], scores, labels)
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("targets", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_names_of_numbers_equal_arithmetic(targets: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(targets)
    shape = (101, targets) if targets else (101,)
    labels = (torch.randn(shape, generator=generator) + 30) * scale
    outputs = labels + torch.randn(shape, generator=generator) * 0.3 * scale
    expected = {
        name: oracle(outputs.double().numpy(), labels.double().numpy()) for name, oracle in NUMBER_ORACLES.items()
    }
    if scale < 1:
        del expected["mape"]  # torchmetrics divides by 1e-6 at least
    assert value_of(list(expected), outputs, labels, "number") == pytest.approx(expected, rel=1e-9)


def test_a_column_of_outputs_meets_plain_labels() -> None:
    labels = torch.arange(5.0)
    assert value_of(["mae"], labels[:, None] + 2, labels, "number") == {"mae": 2.0}
    assert value_of(["mae"], labels + 2, labels[:, None], "number") == {"mae": 2.0}


def test_labels_without_variance_are_not_explained() -> None:
    labels = torch.full((7,), 0.1)
    assert value_of(["r2"], labels + torch.arange(7), labels, "number") == {"r2": -math.inf}
    assert math.isnan(value_of(["r2"], labels, labels, "number")["r2"])
    assert math.isnan(value_of(["explained_variance"], labels[:1] + 1, labels[:1], "number", 1)["explained_variance"])


def test_r2_is_exact_where_the_mean_is_large() -> None:
    labels = torch.arange(1000.0, dtype=torch.float64) + 1e9
    outputs = labels + torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(500)
    expected = NUMBER_ORACLES["r2"]((outputs - 1e9).numpy(), (labels - 1e9).numpy())
    assert value_of(["r2"], outputs, labels, "number")["r2"] == pytest.approx(expected, rel=1e-12)


def test_names_are_kept_in_any_case_and_bear_the_names_of_a_dict() -> None:
    scores, labels = drawn(3, 20, seed=1)
    found = value_of({"first": "Accuracy", "second": "TOP2_accuracy"}, scores, labels)
    assert list(found) == ["first", "second"]
    assert list(value_of(["AUROC"], scores, labels)) == ["auroc"]


# ---- labels of any kind ----------------------------------------------------------------------------------------------
def test_names_of_both_kinds_follow_output_and_labels() -> None:
    scores, labels = drawn(3, 50, seed=2)
    names = ["accuracy", "auroc", "f1"]
    assert value_of(names, scores, labels, "any") == value_of(names, scores, labels)
    numbers = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert value_of(["mse"], numbers, numbers + 1, "any") == {"mse": pytest.approx(1.0, rel=1e-6)}


class Given(torchmetrics.Metric):
    """Keeps the form of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.zeros((), dtype=torch.int64), "sum")
        self.seen: list[tuple[Any, Any]] = SEEN

    def update(self, outputs: Any, labels: Any) -> None:
        self.rows += 1
        SEEN.append((outputs, labels))

    def compute(self) -> Tensor:
        return self.rows


SEEN: list[tuple[Any, Any]] = []


class BinaryGiven(Given):
    pass


def forms(metric: torchmetrics.Metric, outputs: Any, labels: Any, kind: Kind) -> list[Any]:
    SEEN.clear()
    counted = Metrics([metric], kind=kind)
    counted.update(outputs, labels)
    return [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value) for value in SEEN[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_objects_of_a_classifier_get_probabilities(dtype: torch.dtype) -> None:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.tensor([0, 1, 1, 0])
    for width, metric, shape in [
        (1, Given(), (4, 2)),
        (2, Given(), (4, 2)),
        (3, Given(), (4, 3)),
        (1, BinaryGiven(), (4,)),
        (2, BinaryGiven(), (4,)),
        (2, BinaryGiven() + 1.0, (4,)),
    ]:
        scores = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert forms(metric, scores, labels, "class") == [(shape, kept), ((4,), torch.int64)]
        chance = torch.sigmoid(scores[:, 0].double()) if width == 1 else scores.double().softmax(1)
        got = SEEN[0][0]
        expected = chance if width == 1 else chance[:, 1] if got.ndim == 1 else chance
        torch.testing.assert_close(got[:, 1] if width == 1 and got.ndim == 2 else got, expected.to(kept))


def test_objects_of_a_regressor_get_numbers_of_one_shape_and_type() -> None:
    half = torch.zeros(4, 1, dtype=torch.float16)
    assert forms(Given(), half, torch.zeros(4, dtype=torch.float64), "number") == [((4,), torch.float32)] * 2
    assert forms(Given(), torch.zeros(4, 2), torch.zeros(4, 2), "number") == [((4, 2), torch.float32)] * 2


def test_objects_of_an_estimator_get_what_there_is() -> None:
    outputs, labels = (torch.zeros(4, 3, 2), torch.zeros(4)), (torch.zeros(4), torch.zeros(4, 2))
    assert forms(Given(), outputs, labels, "any") == [tuple, tuple]
    assert SEEN[0][0] is outputs
    assert forms(Given(), torch.zeros(4, 3, 2).half(), labels[:1], "any") == [
        ((4, 3, 2), torch.float16),
        ((4,), torch.float32),
    ]
    assert forms(Given(), {"a": torch.zeros(4, 3)}, (), "any") == [dict, tuple]


# ---- objects ---------------------------------------------------------------------------------------------------------
def test_objects_equal_themselves_on_all_rows() -> None:
    scores, labels = drawn(4, 100, seed=3)
    chance = scores.softmax(1)
    metrics = {
        "kappa": tc.MulticlassCohenKappa(4),
        "error": tc.MulticlassCalibrationError(4, n_bins=5),
        "curve": tc.MulticlassAUROC(4, thresholds=20),
    }
    expected = {name: metric(chance, labels).item() for name, metric in metrics.items()}
    assert value_of(metrics, scores, labels) == pytest.approx(expected, abs=1e-6)


def test_wrappers_reach_the_metrics_inside() -> None:
    scores, labels = drawn(3, 60, seed=4)
    chance = scores.softmax(1)
    accuracy = tc.MulticlassAccuracy(3, average="micro")(chance, labels).item()
    each = tc.MulticlassAccuracy(3, average=None)(chance, labels).tolist()
    found = value_of(
        {
            "range": MinMaxMetric(tc.MulticlassAccuracy(3, average="micro")),
            "by": ClasswiseWrapper(tc.MulticlassAccuracy(3, average=None), labels=["a", "b", "c"]),
            "twice": tc.MulticlassAccuracy(3, average="micro") * 2,
        },
        scores,
        labels,
    )
    assert found == pytest.approx(
        {
            **{f"range_{key}": accuracy for key in ("raw", "max", "min")},
            **{f"by_multiclassaccuracy_{label}": value for label, value in zip("abc", each, strict=True)},
            "twice": 2 * accuracy,
        }
    )


def test_each_number_of_a_metric_has_an_entry() -> None:
    scores, labels = torch.eye(2), torch.tensor([0, 1])
    found = value_of([tc.MulticlassConfusionMatrix(2), tc.MulticlassRecall(2, average=None)], scores, labels, pieces=1)
    assert found == {
        "multiclass_confusion_matrix_0_0": 1,
        "multiclass_confusion_matrix_0_1": 0,
        "multiclass_confusion_matrix_1_0": 0,
        "multiclass_confusion_matrix_1_1": 1,
        "multiclass_recall_0": 1,
        "multiclass_recall_1": 1,
    }
    targets = torch.arange(6.0).reshape(3, 2)
    wrapped = MultioutputWrapper(torchmetrics.MeanSquaredError(), 2)
    assert value_of({"error": wrapped}, targets + 1, targets, "number") == {"error_0": 1, "error_1": 1}


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (tc.BinaryAUROC(), "binary_auroc"),
        (tc.BinaryF1Score(), "binary_f1_score"),
        (torchmetrics.R2Score(), "r2_score"),
        (torchmetrics.MeanSquaredError(), "mean_squared_error"),
    ],
)
def test_an_object_in_a_list_bears_the_name_of_its_class(metric: torchmetrics.Metric, name: str) -> None:
    assert list(higher_is_better([metric])) == [name]


class Halved(MetricInputTransformer):
    def transform_pred(self, pred: Tensor) -> Tensor:
        return pred / 2


def test_collections_give_the_entries_of_their_metrics() -> None:
    scores, labels = drawn(3, 60, seed=6)[0], torch.arange(60) % 3
    chance = scores.softmax(1)

    def collection() -> torchmetrics.MetricCollection:
        made = [tc.MulticlassPrecision(3), tc.MulticlassRecall(3), tc.MulticlassAUROC(3)]
        return torchmetrics.MetricCollection(made, prefix="m/")

    grouped = collection()
    grouped.update(chance, labels)
    expected = {name: value.item() for name, value in grouped.compute().items()}
    assert value_of([grouped], scores, labels) == pytest.approx(expected, abs=1e-6)
    inside = {f"x_{name}": value for name, value in expected.items()}
    assert value_of({"x": grouped}, scores, labels) == pytest.approx(inside, abs=1e-6)
    wrapped = Halved(collection())
    wrapped.update(chance, labels)
    halved = {f"h_{name}": value.item() for name, value in wrapped.compute().items()}
    assert value_of({"h": wrapped}, scores, labels) == pytest.approx(halved, abs=1e-6)


def test_the_callers_objects_stay_as_they_are() -> None:
    scores, labels = drawn(3, 60, seed=7)
    used = tc.MulticlassAccuracy(3, average="micro")
    used.update(torch.eye(3), torch.tensor([0, 1, 2]))
    kept = {name: value.clone() for name, value in used.metric_state.items()}
    check_metrics([used], "class")
    expected = value_of(["accuracy"], scores, labels)["accuracy"]
    assert value_of({"it": used}, scores, labels) == {"it": pytest.approx(expected)}
    assert all(torch.equal(value, kept[name]) for name, value in used.metric_state.items())
    assert used.update_count == 1
    assert used.distributed_available_fn is not None
    assert used.distributed_available_fn() is False


def test_every_call_of_compute_begins_again() -> None:
    metrics = Metrics(["auroc", "accuracy", tc.MulticlassAUROC(2), tc.BinaryAveragePrecision()], kind="class")
    scores, labels = drawn(2, 60, seed=8)
    whole = []
    for _ in range(2):
        metrics.update(scores[:30], labels[:30])
        metrics.update(scores[30:], labels[30:])
        whole.append(metrics.compute())
    assert whole[0] == whole[1]
    assert all(math.isnan(value) for value in metrics.compute().values())
    metrics.update(scores[:0], labels[:0])
    assert set(metrics.compute()) == {"auroc", "accuracy", "multiclass_auroc", "binary_average_precision"}


def test_updates_inside_and_outside_of_inference_mode_add_up() -> None:
    metrics = Metrics(["accuracy", "log_loss", "auroc", tc.MulticlassAccuracy(2)], kind="class")
    scores, labels = drawn(2, 60, seed=9)
    module = nn.Linear(2, 2)
    with torch.no_grad():
        expected = value_of(["accuracy", "log_loss", "auroc", tc.MulticlassAccuracy(2)], module(scores), labels)
    for _ in range(2):
        with torch.inference_mode():
            metrics.update(module(scores[:20]), labels[:20])
        metrics.update(module(scores[20:]), labels[20:])
        with torch.inference_mode():
            assert metrics.compute() == pytest.approx(expected)


def test_without_metrics_there_is_nothing() -> None:
    check_metrics(None)
    metrics = Metrics(None, kind="class")
    metrics.update(torch.zeros(2, 2), torch.zeros(2))
    assert metrics.compute() == {}


def test_what_is_better_is_known() -> None:
    better = higher_is_better(["accuracy", "log_loss", "top3_accuracy", "rmse", tc.BinaryAUROC(), Given()])
    assert better == {"accuracy": True, "log_loss": False, "top3_accuracy": True, "rmse": False, "binary_auroc": True}
    known = {"explained_variance", "r2"} | set(metric_names("class")) - {"hamming_loss", "log_loss"}
    assert {name for name, better in higher_is_better(metric_names()).items() if better} == known


# ---- what is refused -------------------------------------------------------------------------------------------------
class Locked(Given):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Hiding(Given):
    def __init__(self) -> None:
        super().__init__()
        self.inner = {"a": Given()}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("accuracy", "neither a list nor a dict"),
        (tc.BinaryAUROC(), "neither a list nor a dict"),
        (3, "metrics=3 is neither"),
        (["acuracy"], "'acuracy' is not known. Use one of accuracy, auroc, average_precision, .*top<k>_accuracy, or a"),
        (["top0_accuracy"], "'top0_accuracy' is not known"),
        (["mae"], "'mae' compares numbers. Use one of accuracy"),
        (["f1", "F1"], "two entries named 'f1'. Give a dict"),
        ([tc.BinaryAUROC(), tc.BinaryAUROC(thresholds=5)], "two entries named 'binary_auroc'"),
        ({"loss": "f1"}, "'loss', but the history's validation_loss is another"),
        ({3: "f1"}, "has the name 3"),
        ({"": "f1"}, "has the name ''"),
        ([tc.BinaryAUROC], "holds the class BinaryAUROC. Pass an instance"),
        ([nn.MSELoss()], "which is neither a name nor"),
        ([Locked()], "Locked cannot be copied: cannot pickle"),
        ([Hiding()], "Hiding keeps metrics in 'inner', a plain dict"),
    ],
)
def test_metrics_that_cannot_be(metrics: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metrics(metrics, "class")
    with pytest.raises(ConfigError, match=message):
        Metrics(metrics, kind="class")


def test_names_of_classes_are_not_for_regressors() -> None:
    with pytest.raises(
        ConfigError, match=r"'accuracy' compares classes\. Use one of explained_variance, mae, mape, mse"
    ):
        check_metrics(["accuracy"], "number")
    check_metrics(["accuracy", "mae"], "any")


Z, L = torch.zeros, torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "metrics", "outputs", "labels", "message"),
    [
        ("class", ["f1"], Z(4, 3, 2), L, r"f1 compare \(rows, classes\).*output is of shape \(4, 3, 2\), float32"),
        ("class", ["f1"], Z(3, 2), L, r"output is of shape \(3, 2\)"),
        ("class", [Given()], (Z(4, 2), Z(4)), L, r"given compare .*output is \(of shape \(4, 2\), float32, of shape"),
        ("class", ["f1"], Z(4, 3), L + 3, "lie between 3 and 3, but the module tells 3 classes apart"),
        ("class", ["f1"], Z(4, 3), L - 1, "lie between -1 and -1"),
        ("class", ["top5_accuracy"], Z(4, 3), L, "top5_accuracy needs 5 classes, but the module's output has 3"),
        (
            "class",
            [tc.MulticlassAUROC(5)],
            Z(4, 3),
            L,
            r"'multiclass_auroc' \(MulticlassAUROC\) cannot take outputs of",
        ),
        ("class", [tc.BinaryAUROC()], Z(4, 3), L, r"shape \(4, 3\), float32 and labels of shape \(4,\), int64: "),
        ("number", ["mae", "r2"], Z(4, 3), Z(4), r"mae, r2 compare numbers of one shape.*labels are of shape \(4,\)"),
        ("number", ["mae"], {"a": Z(4)}, Z(4), "output is of type dict"),
        ("any", ["f1", "mae"], Z(4), L, r"The metrics f1 compare \(rows, classes\)"),
        ("any", ["f1"], Z(4, 3), Z(4), r"The metrics f1 compare .*labels are of shape \(4,\), float32"),
        ("any", ["mae"], Z(4), (Z(4), Z(4)), r"labels are \(of shape \(4,\), float32, of shape"),
    ],
)
def test_rows_that_metrics_cannot_take(kind: Kind, metrics: Any, outputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Metrics(metrics, kind=kind).update(outputs, labels)


def test_the_number_of_classes_stays() -> None:
    metrics = Metrics(["f1"], kind="class")
    metrics.update(Z(4, 3), L)
    with pytest.raises(ConfigError, match="output had 3 columns, and now 4"):
        metrics.update(Z(4, 4), L)


class Gives(torchmetrics.Metric):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def update(self, outputs: Any, labels: Any) -> None:
        pass

    def compute(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([Gives("text")], r"'gives' \(Gives\) cannot be computed: it gives 'text', which is no number"),
        ([Gives(ValueError("no rows"))], r"'gives' \(Gives\) cannot be computed: no rows"),
        ([Gives(Z(1001))], "gives 1001 numbers, but the history holds at most 1000"),
        ({"a": Gives(Z(2)), "a_1": Gives(1.0)}, "Two metrics give the entry 'a_1'"),
    ],
)
def test_results_that_the_history_cannot_hold(metrics: Any, message: str) -> None:
    counted = Metrics(metrics, kind="any")
    counted.update(Z(4), L)
    with pytest.raises(ConfigError, match=message):
        counted.compute()


class Uneven(Gives):
    def __init__(self) -> None:
        super().__init__(0)
        self.add_state("values", [], "cat")

    def update(self, outputs: Any, labels: Any) -> None:
        self.values += [Z(2, 3), Z(2, 4)]


def test_states_that_cannot_be_one() -> None:
    counted = Metrics([Uneven()], kind="any")
    counted.update(Z(4), L)
    with pytest.raises(ConfigError, match="What the metrics hold cannot travel between ranks: Sizes of tensors must"):
        counted.compute()


def test_results_may_be_of_any_plain_type() -> None:
    metrics = {"a": Gives(True), "b": Gives(2), "c": Gives((1.5, {"x": Z(1, 1)})), "d": Gives(torch.tensor(True))}
    assert value_of(metrics, Z(4), L, "any") == {"a": 1.0, "b": 2.0, "c_0": 1.5, "c_1_x": 0.0, "d": 1.0}


def test_names_take_the_rows_in_any_pieces() -> None:
    scores, labels = drawn(3, 24, seed=10)
    found = [value_of(metric_names("class")[:-1], scores, labels, pieces=pieces) for pieces in (1, 5, 24)]
    for first, second in itertools.pairwise(found):
        assert first == pytest.approx(second, rel=1e-12)
