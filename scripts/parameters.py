"""Writes docs/parameters.md from the Params themselves: `python scripts/parameters.py`."""

from collections.abc import Iterable
from pathlib import Path

from pyspark.ml.param import Params

from sparkdl import TorchClassifier, TorchEstimator, TorchRegressor

PAGE = Path(__file__).parent.parent / "docs" / "parameters.md"


def page() -> str:
    """The page: one table per Estimator, after one of what all of them take."""
    estimators: list[Params] = [TorchClassifier(), TorchRegressor(), TorchEstimator()]
    rows = [{param.name: _row(estimator, param.name) for param in estimator.params} for estimator in estimators]
    shared = {name for name in rows[0] if all(row.get(name) == rows[0][name] for row in rows)}
    parts = [
        "# Parameters",
        "Made from the Params by `scripts/parameters.py`; `explainParams()` prints the same texts.",
    ]
    parts.append("## All Estimators\n\n" + _table(rows[0][name] for name in sorted(shared)))
    for estimator, own in zip(estimators, rows, strict=True):
        names = sorted(set(own) - shared)
        parts.append(f"## {type(estimator).__name__}\n\n" + _table(own[name] for name in names))
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[str]) -> str:
    return "\n".join(["| Param | default | |", "|---|---|---|", *rows])


def _row(estimator: Params, name: str) -> str:
    param = estimator.getParam(name)
    default = estimator._defaultParamMap.get(param)
    shown = "" if default is None else f"`{default!r}`"
    return f"| `{name}` | {shown} | {param.doc} |"


if __name__ == "__main__":
    PAGE.write_text(page())
