"""Executors whose Python is not the driver's: one sentence with the line that fixes it, before anything trains."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.timeout(200)]

# What a newcomer runs: a session, a fit, a launch. Prints what each of the two raised.
SCRIPT = """
import json, sys
from pyspark.sql import SparkSession, functions as F
from torch import nn
import sparkdl

builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.driver.host", "127.0.0.1").config("spark.log.level", "OFF").getOrCreate()
df = spark.range(8).select(F.array(F.col("id").cast("float")).alias("features"), (F.col("id") % 2).alias("label"))

def told(run):
    try:
        return ["nothing", str(run())]
    except Exception as error:
        return [type(error).__name__, str(error)]

print(json.dumps({
    "fit": told(lambda: sparkdl.TorchClassifier(module=nn.Linear(1, 2), maxEpochs=1).fit(df)),
    "launch": told(lambda: sparkdl.launch(abs, -1, num_train_workers=1)),
}))
"""
FIX = (
    rf"Set PYSPARK_PYTHON={re.escape(sys.executable)} before the session starts "
    r"\(or spark\.pyspark\.python in its conf\)"
)


def errors_of(folder: Path, **environment: str) -> dict[str, tuple[str, str]]:
    """What `fit` and `launch` raise in a driver process of its own: class and message."""
    script = folder / "newcomer.py"
    script.write_text(SCRIPT)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK", "SPARK", "PYTHONPATH"))
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**kept, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: tuple(told) for name, told in json.loads(done.stdout.splitlines()[-1]).items()}


def other_python() -> str | None:
    """A Python of another minor version on this machine."""
    candidates = [shutil.which(f"python3.{minor}") for minor in range(9, 15)]
    candidates += sorted(map(str, Path.home().glob(".pyenv/versions/3.*/bin/python3")))
    ask = "import sys; print(*sys.version_info[:2])"
    for candidate in filter(None, candidates):
        answer = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False).stdout.split()
        # pyspark's worker itself needs 3.10.
        if len(answer) == 2 and int(answer[1]) >= 10 and int(answer[1]) != sys.version_info.minor:
            return candidate
    return None


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of the driver's version without a single package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python3"


def test_a_python3_on_the_path_without_packages_is_named_with_the_line_that_fixes_it(
    bare_python: Path, tmp_path: Path
) -> None:
    told = errors_of(tmp_path, PATH=f"{bare_python.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("fit", "launch"):
        kind, message = told[name]
        assert kind == "ExecutorPythonError", message
        assert re.fullmatch(
            rf"The executors' Python \({re.escape(str(bare_python))}, [\d.]+\) cannot import torch, pyarrow, numpy, "
            rf"pandas, petastorm, sparkdl. {FIX}, or install them there: pip install sparkdl-torch.",
            message,
        )


def test_a_python_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    other = other_python()
    if other is None:
        pytest.skip("no Python of another minor version on this machine")
    told = errors_of(tmp_path, PYSPARK_PYTHON=other)
    for name in ("fit", "launch"):
        kind, message = told[name]
        assert kind == "ExecutorPythonError", message
        mine = rf"{sys.version_info.major}\.{sys.version_info.minor}"
        assert re.fullmatch(
            rf"The executors run Python 3\.\d+, the driver {mine}; Spark needs the same minor version. {FIX}.", message
        )


def test_a_python_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "python"
    told = errors_of(tmp_path, PYSPARK_PYTHON=str(missing), PYSPARK_DRIVER_PYTHON=sys.executable)
    for name in ("fit", "launch"):
        kind, message = told[name]
        assert kind == "ExecutorPythonError", message
        assert "\n" not in message
        assert re.search(re.escape(str(missing)), message)
        assert re.search(FIX, message)
