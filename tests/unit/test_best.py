"""Which epoch was the best, and when to stop: from numbers alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkdl.best import Best, monitor_mode

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@given(VALUES)
def test_without_a_delta_the_best_is_the_first_smallest_or_largest(values: list[float]) -> None:
    for mode, choose in (("min", min), ("max", max)):
        best = Best(mode)  # type: ignore[arg-type]
        for epoch, value in enumerate(values, 1):
            best = best.after(value, epoch)
        assert best.value == choose(values)
        assert best.epoch == values.index(choose(values)) + 1


@given(VALUES, st.integers(1, 5))
def test_the_fit_ends_after_as_many_epochs_without_a_better_one(values: list[float], patience: int) -> None:
    best, since = Best("min"), 0
    for epoch, value in enumerate(values, 1):
        before = best
        best = best.after(value, epoch)
        since = 0 if best is not before else since + 1
        assert best.is_over(epoch, patience) == (since >= patience)
        assert not best.is_over(epoch, None)


def test_a_value_has_to_be_better_by_the_delta() -> None:
    best = Best("min", 0.1).after(1.0, 1).after(0.95, 2)
    assert (best.value, best.epoch) == (1.0, 1)
    assert best.after(0.89, 3).epoch == 3


def test_what_is_no_number_is_never_the_best() -> None:
    best = Best("max").after(math.nan, 1)
    assert (best.value, best.epoch) == (None, 0)
    assert best.is_over(1, 1)
    assert best.after(0.0, 2).after(math.nan, 3).epoch == 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("validation_loss", "min"), ("validation_rmse", "min"), ("validation_hamming_loss", "min"),
        ("validation_accuracy", "max"), ("validation_r2", "max"), ("rows_per_second", "max"),
    ],
)  # fmt: skip
def test_the_mode_follows_from_the_name(name: str, mode: str) -> None:
    assert monitor_mode(name, "auto") == mode
    assert monitor_mode(name, "min") == "min"
