"""The history: as pandas, as JSON with values that JSON does not have, and as a picture."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkdl.errors import ConfigError
from sparkdl.history import History, decode_history, decode_json, encode_json, numbers_of


def record(epoch: int, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "rows": 100,
        "loss": 1 / epoch,
        "learning_rate": 0.1 * 0.5**epoch,
        "seconds": 2.0,
        "rows_per_second": 50.0,
        "data_wait": 0.1,
        "skew": 1.0,
        **more,
    }


def of_epochs(count: int, **more: Any) -> History:
    return History(record(epoch, **{name: make(epoch) for name, make in more.items()}) for epoch in range(1, count + 1))


# ---- list and pandas -------------------------------------------------------------------------------------------------
def test_a_history_is_a_list_of_dicts() -> None:
    history = of_epochs(3)
    assert isinstance(history, list)
    assert history == [record(1), record(2), record(3)]
    assert history[-1]["loss"] == 1 / 3


def test_pandas_has_a_row_per_epoch_and_nan_where_an_entry_is_missing() -> None:
    history = History([record(1), record(2, validation_loss=0.5), record(3, checkpoint=1.5, validation_loss=0.25)])
    frame = history.toPandas()
    assert list(frame.columns) == [*record(1), "validation_loss", "checkpoint"]
    assert frame["epoch"].tolist() == [1, 2, 3]
    assert frame["epoch"].dtype == np.int64
    np.testing.assert_array_equal(frame["validation_loss"], [math.nan, 0.5, 0.25])
    np.testing.assert_array_equal(frame["checkpoint"], [math.nan, math.nan, 1.5])


def test_pandas_of_no_epochs_is_empty() -> None:
    frame = History().toPandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame.empty


# ---- JSON ------------------------------------------------------------------------------------------------------------
def strict(text: str) -> Any:
    """JSON as everybody but Python reads it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_have_travel_as_strings() -> None:
    history = of_epochs(2, validation_loss=lambda epoch: [math.nan, math.inf][epoch - 1])
    history[1]["loss"] = -math.inf
    text = json.dumps(encode_json(history), allow_nan=False)
    assert '"NaN"' in text
    back = decode_history(strict(text))
    assert isinstance(back, History)
    assert math.isnan(back[0]["validation_loss"])
    assert (back[1]["validation_loss"], back[1]["loss"]) == (math.inf, -math.inf)
    assert back.toPandas().dtypes.equals(history.toPandas().dtypes)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text().filter(lambda text: "N" not in text and "I" not in text),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_any_json_value_comes_back(value: Any) -> None:
    back = decode_json(strict(json.dumps(encode_json(value), allow_nan=False)))
    assert repr(back) == repr(value)  # NaN is not equal to itself


def test_an_empty_history_travels() -> None:
    assert decode_history(strict(json.dumps(encode_json(History())))) == []


def test_numbers_are_found_among_other_values() -> None:
    event = {
        "loss": 1,
        "learning_rate": [0.1, 0.2],
        "device": "cpu",
        "ok": True,
        "cache": None,
        "names": ["a"],
        "nan": math.nan,
    }
    found = numbers_of(event)
    assert math.isnan(found.pop("nan"))
    assert found == {"loss": 1.0, "learning_rate_0": 0.1, "learning_rate_1": 0.2}


# ---- picture ---------------------------------------------------------------------------------------------------------
def panels(figure: Any) -> dict[str, list[str]]:
    """By label of the y axis, the labels of the curves."""
    return {axes.get_ylabel(): [line.get_label() for line in axes.get_lines()] for axes in figure.axes}


def test_a_plot_has_a_panel_for_losses_for_each_metric_and_for_the_learning_rate() -> None:
    history = of_epochs(
        4,
        validation_loss=lambda epoch: 2 / epoch,
        accuracy=lambda epoch: 0.1 * epoch,
        validation_accuracy=lambda epoch: 0.09 * epoch,
        validation_auroc=lambda epoch: 0.2 * epoch,
        validation_seconds=lambda epoch: 1.0,
        skipped_steps=lambda epoch: 0,
    )
    figure = history.plot()
    assert panels(figure) == {
        "loss": ["training", "validation"],
        "accuracy": ["training", "validation"],
        "auroc": ["validation"],
        "learning rate": ["learning rate"],
    }
    for axes in figure.axes:
        assert axes.get_xlabel() == "epoch"
    training, validation = figure.axes[0].get_lines()
    assert training.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 2 / 3, 0.5])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "validation"]


def test_a_plot_shows_only_what_is_there(folder: str) -> None:
    history = History({"epoch": epoch, "step": epoch, "loss": 1.0} for epoch in (1, 2))
    figure = history.plot()
    assert panels(figure) == {"loss": ["training"]}
    path = Path(folder, "history.png")
    figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_validation_that_is_not_run_at_every_epoch_is_drawn_where_it_is() -> None:
    history = History([record(1), record(2, validation_loss=3.0), record(3), record(4, validation_loss=2.0)])
    line = history.plot().axes[0].get_lines()[1]
    assert line.get_xdata().tolist() == [2, 4]


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_plot_of_any_number_of_epochs_can_be_drawn(count: int, folder: str) -> None:
    history = of_epochs(count)
    if count == 100:
        history[3]["loss"], history[4]["loss"] = math.nan, math.inf
    history.plot().savefig(Path(folder, "history.png"))


def test_several_learning_rates_share_a_panel() -> None:
    history = of_epochs(2, learning_rate=lambda epoch: [0.1, 0.01])
    assert panels(history.plot())["learning rate"] == ["0", "1"]


def test_metrics_can_be_chosen() -> None:
    history = of_epochs(2, validation_f1=lambda epoch: 0.5, validation_mae=lambda epoch: 0.5)
    assert list(panels(history.plot(["mae"]))) == ["loss", "mae", "learning rate"]
    assert list(panels(history.plot([]))) == ["loss", "learning rate"]
    with pytest.raises(ConfigError, match=r"metrics names 'auc', which the history does not have. It has f1, mae\."):
        history.plot(["auc"])
    with pytest.raises(ConfigError, match=r"It has no metrics\."):
        History().plot(["auc"])


def test_a_plot_leaves_matplotlibs_global_state_alone() -> None:
    program = (
        "import sys; from sparkdl.history import History\n"
        "assert 'matplotlib' not in sys.modules\n"
        "History([{'epoch': 1, 'loss': 1.0}]).plot()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"needs matplotlib.*sparkdl-torch\[plot\]"):
        of_epochs(1).plot()
