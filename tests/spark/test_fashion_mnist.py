"""The example on Fashion-MNIST reaches what such networks reach there, through the Estimator, on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}: apt-get install dataset-fashion-mnist")
def test_a_small_network_tells_91_of_100_garments_right_after_10_epochs(tmp_path: Path) -> None:
    # As a user starts it: in a Spark of its own, whose ranks share this machine with nothing else of this test.
    command = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]"]
    command += [str(ROOT / "examples" / "fashion_mnist.py"), "--epochs", "10", "--ranks", "2"]
    command += ["--output", str(tmp_path / "output"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    (path,) = tmp_path.glob("fashion_mnist_*.json")
    found = json.loads(path.read_text())
    history = found["history"]
    assert [record["rows"] for record in history] == [60_000] * 10
    assert found["test_accuracy"] >= 0.91
    # What the ranks counted after the last epoch is what Spark's evaluator counts in what the model predicts.
    assert history[-1]["validation_accuracy"] == pytest.approx(found["test_accuracy"], abs=2e-4)
    assert path.with_suffix(".md").read_text().count("\n|") == 12
    assert (tmp_path / "output" / "history.png").stat().st_size > 10_000
