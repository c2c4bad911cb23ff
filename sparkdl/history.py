"""The history of a fit: one record per epoch, as a list, as a pandas DataFrame, as a picture, and as JSON."""

import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparkdl.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RESERVED", "History", "decode_history", "decode_json", "encode_json", "numbers_of"]

_VALIDATION = "validation_"
_ACCOUNTS = frozenset(  # what a record holds beside losses, metrics and the learning rate
    ("epoch", "step", "rows", "seconds", "rows_per_second", "data_wait", "compute", "synchronisation", "shard_rows_min")
) | frozenset(("shard_rows_max", "skew", "checkpoint", "validation_seconds", "skipped_steps"))
RESERVED = _ACCOUNTS | {"loss", "learning_rate"}
"""Entries of a record that nothing of the user's may be called like."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COLUMNS = 3  # panels beside each other
# Of the palette of Okabe and Ito, which colour-blind readers can tell apart; its yellow is too pale for white paper.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = {"training": (_COLOURS[0], "-"), "validation": (_COLOURS[1], "--")}  # the same in all panels


class History(list[dict[str, Any]]):
    """One record per epoch, in order: a list of dicts.

    A record has epoch (from 1), step (optimizer steps so far), rows, loss, learning_rate, seconds, rows_per_second, and
    more where it applies: validation_loss, validation_<metric>, and what a trainingStep returned.
    """

    def toPandas(self) -> "pd.DataFrame":
        """One row per epoch, one column per entry in the order of first appearance; NaN where an entry is missing."""
        import pandas as pd

        names = list(dict.fromkeys(name for record in self for name in record))
        return pd.DataFrame({name: pd.Series([record.get(name, math.nan) for record in self]) for name in names})

    def plot(self, metrics: Sequence[str] | None = None) -> "Figure":
        """Draw losses, metrics and the learning rate over the epochs, one panel each, as far as they are there.

        A metric of the training rows and the one of that name of the validation rows share a panel. Nothing is shown or
        kept by matplotlib itself: save the figure with ``savefig``, or make it the last value of a notebook's cell.

        Args:
            metrics: The metrics to draw, without ``validation_``; None draws all of them.

        Raises:
            ConfigError: matplotlib is not installed, or a metric is not in the history.
        """
        figure = _new_figure()
        panels = self._panels(metrics)
        columns = 2 if len(panels) == 4 else min(len(panels), _COLUMNS) or 1
        rows = math.ceil(len(panels) / columns) or 1
        figure.set_size_inches(1 + 4.2 * columns, 0.4 + 2.9 * rows)
        if not panels:
            figure.text(0.5, 0.5, "no epochs", ha="center", va="center", color="0.4")
        for number, (title, curves) in enumerate(panels.items(), 1):
            _draw(figure.add_subplot(rows, columns, number), title, curves)
        return figure

    def _panels(self, metrics: Sequence[str] | None) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """By title, the curves of a panel: label, epochs and values."""
        found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for number, record in enumerate(self, 1):
            for name, value in numbers_of(record).items():
                title = "learning rate" if name.startswith("learning_rate") else name.removeprefix(_VALIDATION)
                if name in _ACCOUNTS or title in _ACCOUNTS:
                    continue
                if title == "learning rate":
                    label = name.removeprefix("learning_rate").lstrip("_") or title
                else:
                    label = "validation" if name.startswith(_VALIDATION) else "training"
                epochs, values = found.setdefault(title, {}).setdefault(label, ([], []))
                epochs.append(record.get("epoch", number))
                values.append(value)
        known = [title for title in found if title not in ("loss", "learning rate")]
        for name in metrics or ():
            if name not in known:
                found_ones = ", ".join(known) or "no metrics"
                raise ConfigError(f"metrics names {name!r}, which the history does not have. It has {found_ones}.")
        order = ["loss", *(known if metrics is None else metrics), "learning rate"]
        return {title: found[title] for title in dict.fromkeys(order) if title in found}


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record or event by name; those of a list under ``<name>_0``, ``<name>_1``, ...

    >>> numbers_of({"loss": 0.5, "learning_rate": [0.1, 0.2], "host": "a", "whole": True})
    {'loss': 0.5, 'learning_rate_0': 0.1, 'learning_rate_1': 0.2}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if _is_number(value):
            found[name] = float(value)
        elif isinstance(value, list | tuple) and all(map(_is_number, value)):
            found |= {f"{name}_{place}": float(entry) for place, entry in enumerate(value)}
    return found


def encode_json(value: Any) -> Any:
    """JSON values in which NaN and infinities, which JSON does not have, are strings.

    >>> encode_json({"loss": float("nan"), "rates": [float("-inf"), 1.0]})
    {'loss': 'NaN', 'rates': ['-Infinity', 1.0]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: encode_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode_json(entry) for entry in value]
    return value


def decode_json(value: Any) -> Any:
    """The inverse of `encode_json`, but for tuples, which are lists then.

    >>> decode_json({"loss": "NaN", "rates": ["-Infinity", 1.0]})
    {'loss': nan, 'rates': [-inf, 1.0]}
    """
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {name: decode_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [decode_json(entry) for entry in value]
    return value


def decode_history(records: Iterable[Mapping[str, Any]]) -> History:
    """The history that `encode_json` turned into JSON values."""
    return History(decode_json(record) for record in records)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _new_figure() -> "Figure":
    """A figure of matplotlib that no global state knows of, and that notebooks show."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "A plot needs matplotlib, which is not installed. Install the extra: pip install 'sparkdl-torch[plot]'."
        ) from error
    figure = Figure(layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # IPython shows the figures of pyplot alone, unless they say themselves how.
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw(axes: "Axes", title: str, curves: Mapping[str, tuple[list[float], list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    order = sorted(curves, key=list(_STYLES).index) if curves.keys() <= _STYLES.keys() else list(curves)
    for number, label in enumerate(order):
        epochs, values = curves[label]
        colour, dashes = _STYLES.get(label, (_COLOURS[number % len(_COLOURS)], "-"))
        few = "o" if len(values) <= 30 else ""
        drawn = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(epochs, drawn, dashes, marker=few, markersize=3.5, linewidth=1.6, color=colour, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title != "learning rate" or len(curves) > 1:
        axes.legend(frameon=False)
