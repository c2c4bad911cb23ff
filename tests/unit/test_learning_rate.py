"""The learning rate range test: which steps it takes, where it stops, what it suggests and what it draws."""

import io
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import nn

from sparkdl.errors import ConfigError
from sparkdl.learning_rate import LearningRateSearch, plan_rates, search_learning_rate

# Flat, then falling ever faster to its smallest value, then growing without bounds.
VALLEY = [2.0] * 40 + [2.0 - 0.0008 * step**2 for step in range(40)] + [0.8 * 1.5**step for step in range(20)]


def losses_of(*losses: float) -> Callable[[int, float], float]:
    """Steps with these losses."""
    return lambda step, rate: losses[step]


def search(*losses: float) -> LearningRateSearch:
    return search_learning_rate(losses_of(*losses), start=1e-4, end=1.0, num_steps=len(losses))


# ---- the rates -------------------------------------------------------------------------------------------------------
@given(st.floats(1e-12, 1.0), st.floats(1.001, 1e12), st.integers(2, 500))
def test_rates_rise_from_start_to_end_by_one_factor(start: float, ratio: float, steps: int) -> None:
    end = start * ratio
    rates = plan_rates(start, end, steps)
    assert len(rates) == steps
    assert (rates[0], rates[-1]) == (start, end)
    np.testing.assert_allclose(np.diff(np.log(rates)), math.log(end / start) / (steps - 1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("start", "end"),
    [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)],
)
def test_what_is_no_range_is_refused(start: float, end: float) -> None:
    with pytest.raises(ConfigError, match=r"start=.* and end=.* are no range of learning rates\. Use 0 < start < end"):
        plan_rates(start, end, 10)


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_a_range_takes_two_steps(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"numSteps={steps} has no steps between start and end\. Use 2 or more"):
        search_learning_rate(losses_of(), num_steps=steps)


# ---- the steps -------------------------------------------------------------------------------------------------------
def test_every_step_gets_its_number_and_its_rate() -> None:
    asked = []

    def train_step(step: int, rate: float) -> float:
        asked.append((step, rate))
        return 1.0

    found = search_learning_rate(train_step, start=1e-3, end=10.0, num_steps=9)
    assert asked == list(enumerate(plan_rates(1e-3, 10.0, 9)))
    assert found.learning_rates == tuple(rate for _, rate in asked)
    assert found.losses == (1.0,) * 9
    assert not found.stopped


@given(st.lists(st.floats(0.5, 1.0), min_size=2, max_size=60))
def test_the_smoothed_loss_is_a_weighted_mean_of_the_losses_so_far(losses: list[float]) -> None:
    found = search(*losses)
    kept = 1 - 1 / max(1.0, len(losses) / 10)
    for step, value in enumerate(found.smoothed):
        weights = kept ** np.arange(step, -1.0, -1.0)
        assert value == pytest.approx(np.average(losses[: step + 1], weights=weights))


@pytest.mark.parametrize(("best", "limit"), [(1.0, 4.0), (0.25, 1.0), (-1.0, 2.0)])
def test_it_stops_where_the_loss_is_four_times_its_best(best: float, limit: float) -> None:
    found = search(best, limit, limit + 0.01, 0.0, 0.0)  # so few steps are not smoothed
    assert found.losses == found.smoothed == (best, limit, limit + 0.01)
    assert found.learning_rates == tuple(plan_rates(1e-4, 1.0, 5)[:3])
    assert found.stopped


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_it_stops_where_the_loss_is_not_finite_and_leaves_it_out(loss: float, step: int) -> None:
    losses = [3.0, 2.0, 1.0, 1.0]
    losses[step] = loss
    found = search(*losses)
    assert found.losses == tuple(losses[:step])
    assert len(found.learning_rates) == len(found.smoothed) == step
    assert found.stopped
    assert (found.suggestion is None) == (step == 0)
    found.plot()


def test_a_search_is_a_value() -> None:
    found = search(*VALLEY)
    assert pickle.loads(pickle.dumps(found)) == found
    assert (
        LearningRateSearch(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in json.loads(json.dumps(asdict(found))).items()
            }
        )
        == found
    )
    with pytest.raises(FrozenInstanceError):
        found.stopped = False  # type: ignore[misc]


# ---- the suggestion --------------------------------------------------------------------------------------------------
def test_the_suggestion_is_where_the_loss_falls_steepest() -> None:
    found = search(*VALLEY)
    rates = plan_rates(1e-4, 1.0, 100)
    assert found.suggestion is not None
    assert rates[60] <= found.suggestion <= rates[79]
    step = found.learning_rates.index(found.suggestion) + found.lag
    slopes = np.diff(found.smoothed[: int(np.argmin(found.smoothed)) + 1])
    assert int(np.argmin(slopes)) in (step - 1, step)


@given(st.floats(1e-3, 1e3), st.floats(0.0, 1e3))
def test_the_suggestion_does_not_depend_on_the_unit_of_the_loss(factor: float, offset: float) -> None:
    falling = [2.0] * 40 + [2.0 - 0.0008 * step**2 for step in range(40)] + [1.0] * 20
    assert search(*(offset + factor * loss for loss in falling)).suggestion == search(*falling).suggestion


@pytest.mark.parametrize("losses", [[1.0] * 40, [1.0 + 0.01 * step for step in range(40)], [1.0, 5.0], [1.0]], ids=len)
def test_where_the_loss_never_falls_there_is_no_suggestion(losses: list[float]) -> None:
    found = search_learning_rate(losses_of(*losses, *[math.nan] * 40), start=1e-4, end=1.0, num_steps=40)
    assert found.suggestion is None
    assert all(line.get_linestyle() != ":" for line in found.plot().axes[0].lines)


def test_noise_of_the_first_steps_is_no_suggestion() -> None:
    losses = list(VALLEY)
    losses[0] = 2.5  # the mean of so few steps falls at once
    assert search(*losses).suggestion == search(*VALLEY).suggestion


def test_gradient_descent_on_a_parabola_is_stopped_beyond_the_rate_at_which_it_diverges() -> None:
    curvature, position = 4.0, 1.0

    def train_step(step: int, rate: float) -> float:
        nonlocal position
        loss = curvature / 2 * position**2
        position -= rate * curvature * position
        return loss

    found = search_learning_rate(train_step, start=1e-5, end=100.0, num_steps=200)
    assert found.stopped
    assert found.learning_rates[-1] > 2 / curvature  # above it, every step goes farther than it came from
    assert found.suggestion is not None
    assert found.suggestion < 1 / curvature
    assert found.suggestion > 1e-3


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is so small only waits for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_network_learns_with_the_suggestion_and_better_than_far_from_it(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 20, generator=generator)
    labels = (inputs @ torch.randn(20, 5, generator=generator)).argmax(1)

    def begin(seed: int = 0) -> tuple[nn.Module, Callable[[int, float], float]]:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
        optimizer = kind(module.parameters(), lr=1.0)

        def train_step(step: int, rate: float) -> float:
            optimizer.param_groups[0]["lr"] = rate
            rows = torch.randint(0, 2000, (64,))
            loss = nn.functional.cross_entropy(module(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return module, train_step

    found = search_learning_rate(begin()[1])
    assert found.suggestion is not None

    def trained(rate: float) -> float:
        module, train_step = begin(seed=1)
        for step in range(150):
            train_step(step, rate)
        return nn.functional.cross_entropy(module(inputs), labels).item()

    reached = trained(found.suggestion)
    assert reached < 0.5
    assert reached < min(trained(found.suggestion / 50), trained(found.suggestion * 50))


# ---- the picture -----------------------------------------------------------------------------------------------------
def test_the_picture_shows_both_losses_and_the_suggestion() -> None:
    found = search(*VALLEY)
    figure = found.plot()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "loss")
    raw, smoothed, across, mark = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), found.losses)
    np.testing.assert_array_equal(smoothed.get_ydata(), found.smoothed[found.lag :])
    assert list(across.get_xdata()) == [found.suggestion] * 2
    assert list(mark.get_xdata()) == [found.suggestion]
    assert mark.get_ydata()[0] in smoothed.get_ydata()  # type: ignore[index]
    bottom, top = axes.get_ylim()
    assert bottom < min(found.losses)
    assert 2.0 < top < 3.0 < max(found.losses)
    figure.savefig(written := io.BytesIO(), format="png")
    written.seek(0)
    assert imread(written).shape[:2] == (400, 700)


def test_without_matplotlib_the_picture_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"plot\(\) draws with matplotlib, which is missing\. Run: pip install"):
        search(*VALLEY).plot()
