"""Executors whose Python is not the driver's: one sentence with the line that fixes it, before anything trains."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(200)]

# What a newcomer runs: a session, a fit, a launch; here once for each Python that executors are given (None: Spark's
# choice), in sessions one after the other. Prints what each of the two raised.
SCRIPT = """
import json, os, sys
from pyspark.sql import SparkSession, functions as F
from torch import nn
import sparkdl

def told(run):
    try:
        return ["nothing", str(run())]
    except Exception as error:
        return [type(error).__name__, str(error)]

def run_with(python):
    os.environ.pop("PYSPARK_PYTHON", None)
    if python is not None:
        os.environ["PYSPARK_PYTHON"] = python
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").config("spark.log.level", "OFF").getOrCreate()
    df = spark.range(8).select(F.array(F.col("id").cast("float")).alias("features"), (F.col("id") % 2).alias("label"))
    try:
        return [
            told(lambda: sparkdl.TorchClassifier(module=nn.Linear(1, 2), maxEpochs=1).fit(df)),
            told(lambda: sparkdl.launch(abs, -1, num_train_workers=1)),
        ]
    finally:
        spark.stop()

print(json.dumps([run_with(python) for python in json.loads(sys.argv[1])]))
"""
FIX = (
    rf"Set PYSPARK_PYTHON={re.escape(sys.executable)} before the session starts "
    r"\(or spark\.pyspark\.python in its conf\)"
)


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


@dataclass(frozen=True)
class Told:
    """What `fit` and `launch` raised, as (class, message), for each executors' Python."""

    bare: Path
    missing: Path
    by_python: dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A driver in the tests' environment whose PATH begins with a Python of the same version without a package."""
    folder = tmp_path_factory.mktemp("newcomer")
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    bare, missing = folder / "bare" / "bin" / "python3", folder / "no" / "such" / "python"
    script = folder / "newcomer.py"
    script.write_text(SCRIPT)
    ours = ("PYSPARK", "SPARK", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    pythons = {"path": None, "missing": str(missing), "other": other_python()}
    asked = {name: python for name, python in pythons.items() if name == "path" or python is not None}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(asked.values()))],
        env={**kept, "PATH": f"{bare.parent}{os.pathsep}{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return Told(
        bare, missing, {name: [tuple(entry) for entry in answer] for name, answer in zip(asked, answers, strict=True)}
    )


def test_a_python3_on_the_path_without_packages_is_named_with_the_line_that_fixes_it(told: Told) -> None:
    sentence = (
        rf"The executors' Python \({re.escape(str(told.bare))}, [\d.]+\) cannot import torch, pyarrow, numpy, pandas, "
        rf"petastorm, sparkdl. {FIX}, or install them there: pip install sparkdl-torch."
    )
    for kind, message in told.by_python["path"]:
        assert kind == "ExecutorPythonError", message
        assert re.fullmatch(sentence, message)


def test_a_python_of_another_version_is_one_sentence(told: Told) -> None:
    if "other" not in told.by_python:
        pytest.skip("no Python of another minor version on this machine")
    mine = rf"{sys.version_info.major}\.{sys.version_info.minor}"
    sentence = rf"The executors run Python 3\.\d+, the driver {mine}; Spark needs the same minor version. {FIX}."
    for kind, message in told.by_python["other"]:
        assert kind == "ExecutorPythonError", message
        assert re.fullmatch(sentence, message)


def test_a_python_that_does_not_exist_is_one_sentence(told: Told) -> None:
    for kind, message in told.by_python["missing"]:
        assert kind == "ExecutorPythonError", message
        assert "\n" not in message
        assert str(told.missing) in message
        assert re.search(FIX, message)
