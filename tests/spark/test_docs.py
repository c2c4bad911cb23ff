"""The pages execute: what README and guide show is what happens."""

import re
import runpy
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from scripts.parameters import PAGE, page

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.spark
@pytest.mark.parametrize(
    "name", ["README.md", "docs/guide.md", "docs/training.md", "docs/strategies.md", "docs/reliability.md"]
)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    name: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # pages save into build/
    blocks = BLOCK.findall((ROOT / name).read_text())
    assert blocks
    # As a script or a notebook would: its classes are those of __main__, which executors get by value.
    scope = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)


@pytest.mark.spark
def test_linear_regression_shows_that_many_ranks_are_one(
    spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "linear_regression.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"rank (\d): (\d+) rows", printed) == [("0", "501"), ("1", "500")]
    of_gradients, of_weights = map(float, re.findall(r"difference: (\S+)", printed))
    assert of_gradients < 1e-10
    assert of_weights < 1e-13
    by_steps, at_once = re.findall(r"(?:on 2 ranks|one process): +(tensor.*)", printed)
    assert by_steps == at_once


def test_the_readme_example_is_fifteen_lines() -> None:
    (block,) = BLOCK.findall((ROOT / "README.md").read_text())
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_page_of_parameters_is_made_from_the_params() -> None:
    assert PAGE.read_text() == page(), "run: python scripts/parameters.py"
