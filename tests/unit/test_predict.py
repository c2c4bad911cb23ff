"""From the module's output to the columns of a model: scores, probabilities, classes, and their Arrow form."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pyspark import cloudpickle
from pyspark.ml.linalg import VectorUDT
from pyspark.sql.pandas.types import to_arrow_type
from torch import Tensor, nn

from sparkdl.config import Column
from sparkdl.errors import ConfigError, DataError, LaunchError
from sparkdl.predict import (
    Kind,
    Outputs,
    Predictor,
    decide,
    is_one_logit,
    pickled_for_transform,
    probabilities,
    raw_scores,
)

FEATURES = 3


# ---- scores and probabilities ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_one_logit_becomes_two_scores_as_mllibs_margins(shape: tuple[int, ...]) -> None:
    logits = np.array([-2.0, 0.0, 0.5, 30.0])
    scores = logits.reshape(shape)
    assert is_one_logit(scores)
    assert raw_scores(scores).tolist() == [[-z, z] for z in logits]
    chance = probabilities(raw_scores(scores), one_logit=True)
    np.testing.assert_allclose(chance[:, 1], [1 / (1 + math.exp(-z)) for z in logits], rtol=1e-12)
    np.testing.assert_allclose(chance.sum(1), 1, rtol=1e-12)


def test_several_scores_are_the_raw_scores_and_their_softmax_the_probabilities() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [-1000.0, 0.0, 1000.0]])
    assert not is_one_logit(scores)
    assert raw_scores(scores) is scores
    expected = torch.from_numpy(scores).softmax(1).numpy()
    np.testing.assert_allclose(probabilities(scores, one_logit=False), expected, rtol=1e-12)


@given(npst.arrays(np.float64, (5, 4), elements=st.floats(-1e300, 1e300)))
@settings(deadline=None)
def test_probabilities_of_any_scores_are_probabilities_and_the_largest_is_that_of_the_best_score(scores: Any) -> None:
    chance = probabilities(scores, one_logit=False)
    assert np.isfinite(chance).all()
    np.testing.assert_allclose(chance.sum(1), 1, rtol=1e-9)
    assert (chance[np.arange(len(scores)), scores.argmax(1)] == chance.max(1)).all()


@given(npst.arrays(np.float64, (5, 1), elements=st.floats(-1e308, 1e308)))
@settings(deadline=None)
def test_probabilities_of_any_logit_are_probabilities_that_grow_with_it(logits: Any) -> None:
    chance = probabilities(raw_scores(logits), one_logit=True)
    np.testing.assert_allclose(chance.sum(1), 1, rtol=1e-9)
    order = np.argsort(logits[:, 0])
    assert (np.diff(chance[order, 1]) >= 0).all()


def test_small_probabilities_of_one_logit_are_not_rounded_to_zero() -> None:
    chance = probabilities(raw_scores(np.array([-50.0, 50.0])), one_logit=True)
    np.testing.assert_allclose([chance[0, 1], chance[1, 0]], math.exp(-50), rtol=1e-9)


# ---- classes ---------------------------------------------------------------------------------------------------------
def as_spark(chance: Sequence[float], thresholds: Sequence[float] | None) -> float:
    """``ProbabilisticClassificationModel.probability2prediction`` of Spark ML, line by line."""
    largest, winner = -math.inf, 0
    for number, probability in enumerate(chance):
        if thresholds is None:
            scaled = probability
        elif thresholds[number] == 0:  # the JVM divides by zero
            scaled = math.nan if probability == 0 else math.inf
        else:
            scaled = probability / thresholds[number]
        if scaled > largest:
            largest, winner = scaled, number
    return float(winner)


@st.composite
def chances(draw: st.DrawFn) -> tuple[list[list[float]], list[float] | None]:
    """Probabilities of some rows and, perhaps, thresholds of which at most one is zero."""
    classes = draw(st.integers(2, 5))
    probability = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
    rows = draw(st.lists(st.lists(probability, min_size=classes, max_size=classes), min_size=1, max_size=5))
    if draw(st.booleans()):
        return rows, None
    thresholds = draw(
        st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0]) | st.floats(0.01, 1), min_size=classes, max_size=classes)
    )
    if draw(st.booleans()):
        thresholds[draw(st.integers(0, classes - 1))] = 0.0
    return rows, thresholds


@given(found=chances())
@settings(deadline=None, max_examples=300)
def test_classes_are_those_that_spark_ml_would_choose(found: tuple[list[list[float]], list[float] | None]) -> None:
    rows, thresholds = found
    assert decide(np.array(rows), thresholds).tolist() == [as_spark(row, thresholds) for row in rows]


@pytest.mark.parametrize(
    ("chance", "thresholds", "winner"),
    [
        ([0.4, 0.6], None, 1),
        ([0.5, 0.5], None, 0),  # the first of equals
        ([0.4, 0.6], (0.5, 0.5), 1),
        ([0.4, 0.6], (0.2, 0.8), 0),
        ([0.01, 0.99], (0.0, 1.0), 0),  # a threshold of 0 wins ...
        ([0.0, 1.0], (0.0, 1.0), 1),  # ... unless the probability is 0
        ([0.0, 0.0], (0.0, 1.0), 1),
        ([0.2, 0.3, 0.5], (0.1, 0.4, 0.9), 0),
    ],
)
def test_thresholds_divide_probabilities(
    chance: list[float], thresholds: tuple[float, ...] | None, winner: int
) -> None:
    found = decide(np.array([chance]), thresholds)
    assert found.dtype == np.float64
    assert found.tolist() == [winner]


def test_probabilities_are_not_changed_by_deciding() -> None:
    chance = np.array([[0.0, 1.0], [np.nan, 0.5]])
    before = chance.copy()
    decide(chance, (0.0, 1.0))
    decide(chance, None)
    np.testing.assert_array_equal(chance, before)


def test_thresholds_for_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"thresholds has 3 values for 2 classes\. Give one per class"):
        decide(np.array([[0.5, 0.5]]), (0.1, 0.2, 0.7))


# ---- the whole way: Arrow in, Arrow out ------------------------------------------------------------------------------
class Twice(nn.Module):
    """Returns several tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.sum(1)


class Scores(nn.Module):
    """Its input is its output."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Halves(nn.Module):
    """As under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class Loads(nn.Linear):
    """Counts how often it is unpickled."""

    count = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Loads.count += 1


def predictor(module: nn.Module, kinds: Sequence[Kind], *inputs: Column, **settings: Any) -> Predictor:
    names = tuple(f"{kind}_{number}" for number, kind in enumerate(kinds))
    columns = inputs or (Column("features", "input_0", "array", "float32", validity="any"),)
    thresholds = settings.pop("thresholds", None)
    return Predictor(pickled_for_transform(module, None), columns, Outputs(names, tuple(kinds), thresholds), **settings)


def rows_of(values: Any) -> pa.StructArray:
    """A batch whose only column is an array of numbers."""
    return pa.StructArray.from_arrays([pa.array(list(values), pa.list_(pa.float32()))], ["input_0"])


def predict(given_predictor: Predictor, *batches: pa.StructArray) -> list[list[dict[str, Any]]]:
    return [found.to_pylist() for found in given_predictor(iter(batches))]


CLASSIFIER: tuple[Kind, ...] = ("raw", "probability", "prediction")


def test_a_classifier_returns_raw_scores_probabilities_and_the_class() -> None:
    ((row,),) = predict(predictor(Scores(), CLASSIFIER), rows_of([[1.0, 3.0, 2.0]]))
    assert row["raw_0"] == {"type": 1, "size": None, "indices": None, "values": [1, 3, 2]}
    np.testing.assert_allclose(row["probability_1"]["values"], torch.tensor([1.0, 3.0, 2.0]).softmax(0), rtol=1e-6)
    assert row["prediction_2"] == 1


def test_a_classifier_of_one_logit_returns_two_classes() -> None:
    ((first, second),) = predict(predictor(Scores(), CLASSIFIER), rows_of([[-1.5], [1.5]]))
    assert (first["raw_0"]["values"], first["prediction_2"]) == ([1.5, -1.5], 0)
    assert (second["raw_0"]["values"], second["prediction_2"]) == ([-1.5, 1.5], 1)
    ((first, second),) = predict(predictor(Scores(), CLASSIFIER, thresholds=(0.9, 0.1)), rows_of([[-1.5], [-3.0]]))
    assert (first["prediction_2"], second["prediction_2"]) == (1, 0)


@pytest.mark.parametrize("kinds", [("prediction",), ("probability",), ("prediction", "raw")], ids=str)
def test_columns_that_are_switched_off_are_not_made(kinds: tuple[Kind, ...]) -> None:
    ((row,),) = predict(predictor(Scores(), kinds), rows_of([[1.0, 3.0]]))
    assert list(row) == [f"{kind}_{number}" for number, kind in enumerate(kinds)]


def test_a_regressor_returns_a_number_or_an_array() -> None:
    assert predict(predictor(nn.Flatten(0), ["number"]), rows_of([[1.5], [2.5]])) == [
        [{"number_0": 1.5}, {"number_0": 2.5}]
    ]
    assert predict(predictor(Scores(), ["targets"]), rows_of([[1.5, 2.5]])) == [[{"targets_0": [1.5, 2.5]}]]


def test_several_outputs_go_to_several_columns() -> None:
    assert predict(predictor(Twice(), ["output", "output"]), rows_of([[1.0, 2.0]])) == [
        [{"output_0": [2, 4], "output_1": [3]}]
    ]


def test_outputs_of_more_dimensions_are_flattened_row_by_row() -> None:
    ((row,),) = predict(predictor(nn.Unflatten(1, (2, 2)), ["output"]), rows_of([[1.0, 2.0, 3.0, 4.0]]))
    assert row["output_0"] == [1, 2, 3, 4]


@pytest.mark.parametrize("kinds", [("output",), CLASSIFIER, ("targets",)], ids=str)
def test_outputs_in_half_precision_are_widened(kinds: tuple[Kind, ...]) -> None:
    ((row,),) = predict(predictor(Halves(), kinds), rows_of([[1.5, 2.5]]))
    found = row[f"{kinds[0]}_0"]
    assert (found["values"] if kinds is CLASSIFIER else found) == [1.5, 2.5]


def test_another_number_of_outputs_than_columns_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returned 2 outputs, but 1 output columns are named\. .*outputCols"):
        predict(predictor(Twice(), ["output"]), rows_of([[1.0, 2.0]]))


def test_inputs_are_given_by_position_in_the_module_s_types() -> None:
    class Mixed(nn.Module):
        def forward(self, vector: Tensor, ids: Tensor, number: Tensor, sets: Tensor) -> Tensor:
            assert (vector.dtype, ids.dtype, number.dtype, sets.dtype) == (
                torch.float64, torch.int64, torch.float64, torch.int64,
            )  # fmt: skip
            assert (ids.shape, number.shape, sets.shape) == ((2,), (2, 1), (2, 2))
            return vector + number + ids[:, None] + sets

    vector = {"type": 1, "size": None, "indices": None, "values": [1.0, 2.0]}
    sparse = {"type": 0, "size": 2, "indices": [1], "values": [5.0]}
    batch = pa.StructArray.from_arrays(
        [
            pa.array([vector, sparse], to_arrow_type(VectorUDT().sqlType())),
            pa.array([10, 2**53 + 1], pa.int64()),
            pa.array([0.5, 0.0]),
            pa.array([[1, 2], [3, 4]], pa.list_(pa.int64())),
        ],
        ["input_0", "input_1", "input_2", "input_3"],
    )
    columns = (
        Column("v", "input_0", "vector", "float64", validity="any"),
        Column("i", "input_1", "scalar", "int64", flat=True, validity="any"),
        Column("n", "input_2", "scalar", "float64", validity="any"),
        Column("s", "input_3", "array", "int64", validity="any"),
    )
    ((first, _),) = predict(predictor(Mixed(), ["targets"], *columns), batch)
    assert first["targets_0"] == [1 + 0.5 + 10 + 1, 2 + 0.5 + 10 + 2]


def test_many_rows_are_predicted_in_pieces_as_if_at_once() -> None:
    module = nn.Linear(FEATURES, 2).eval()
    values = torch.randn(2500, FEATURES, generator=torch.Generator().manual_seed(0))
    (found,) = predict(predictor(module, ["targets"]), rows_of(values.numpy()))
    with torch.inference_mode():
        expected = module(values).double().numpy()
    np.testing.assert_allclose([row["targets_0"] for row in found], expected, rtol=1e-5, atol=1e-7)


def test_batches_come_back_one_by_one_in_their_order_empty_ones_included() -> None:
    batches = [rows_of(values) for values in ([[1.0, 2.0]], [], [[3.0, 4.0], [5.0, 6.0]], [])]
    found = predict(predictor(Scores(), ["targets"]), *batches)
    assert [[row["targets_0"] for row in rows] for rows in found] == [[[1, 2]], [], [[3, 4], [5, 6]], []]


@pytest.mark.parametrize("kinds", [CLASSIFIER, ("number",), ("targets",), ("output", "output")], ids=str)
def test_an_empty_batch_has_the_types_of_a_full_one(kinds: tuple[Kind, ...]) -> None:
    module: nn.Module = Twice() if kinds[0] == "output" else nn.Linear(2, 1 if kinds == ("number",) else 2)
    full, empty = predictor(module, kinds)(iter([rows_of([[1.0, 2.0]]), rows_of([])]))
    assert empty.type == full.type
    assert len(empty) == 0


def shape_of(kind: pa.DataType) -> list[tuple[str, str]]:
    """Names and types of a struct's fields; what lists call their elements does not matter."""
    return [(f.name, f"list of {f.type.value_type}" if pa.types.is_list(f.type) else str(f.type)) for f in kind]


def test_vectors_have_the_form_that_spark_reads() -> None:
    (found,) = predictor(Scores(), CLASSIFIER)(iter([rows_of([[1.0, 2.0]])]))
    wanted = to_arrow_type(VectorUDT().sqlType())
    for name in ("raw_0", "probability_1"):
        assert shape_of(found.type.field(name).type) == shape_of(wanted)
    assert found.type.field("prediction_2").type == pa.float64()


def test_the_module_is_in_eval_mode_and_needs_no_gradient() -> None:
    class Modes(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            return super().forward(x) + (1 if self.training else 0)

    assert predict(predictor(Modes().train(), ["targets"]), rows_of([[1.0, 2.0]])) == [[{"targets_0": [1, 2]}]]


def test_the_module_is_loaded_once_per_process() -> None:
    made = predictor(Loads(2, 2), ["targets"])
    Loads.count = 0
    for _ in range(3):
        predict(cloudpickle.loads(cloudpickle.dumps(made)), rows_of([[1.0, 2.0]]), rows_of([[1.0, 2.0]]))
    assert Loads.count == 1


def test_nan_goes_through_the_module_and_null_is_refused() -> None:
    ((row,),) = predict(predictor(Scores(), ["targets"]), rows_of([[math.nan, 1.0]]))
    assert math.isnan(row["targets_0"][0])
    with pytest.raises(DataError, match="'features' is null in 1 of 2 rows"):
        predict(predictor(Scores(), ["targets"]), rows_of([[1.0], None]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(LaunchError, match=r"device='cuda' was asked for transform, but torch sees no GPU"):
        predict(predictor(Scores(), ["targets"], device="cuda"), rows_of([[1.0]]))
