"""Ten kinds of clothing, told apart by a small convolutional network on two ranks.

    spark-submit --master 'local[2]' examples/fashion_mnist.py [--output FOLDER]

Fashion-MNIST has 60,000 images to train on and 10,000 to test with, grey, 28 x 28 pixels. Its four
files are in the Debian package `dataset-fashion-mnist`; `--data` names another folder that has them.
The test images are looked at after every epoch, but have no part in the training: nothing is stopped
or chosen by them, and what counts is the last epoch.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.sql import DataFrame, SparkSession
from torch import nn

from sparkdl import TorchClassificationModel, TorchClassifier

DATA = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "test": "t10k"}
SIDE = 28  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four .gz files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/fashion_mnist"))
    parser.add_argument("--results", type=Path, help="folder for what was measured, as JSON and Markdown")
    args = parser.parse_args()
    if not (args.data / f"{FILES['train']}-images-idx3-ubyte.gz").exists():
        sys.exit(f"No data in {args.data}. Run apt-get install dataset-fashion-mnist, or name the folder with --data.")
    spark = SparkSession.builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    train, test = (load(spark, args.data, part) for part in FILES)
    start = time.perf_counter()
    model = classifier(test, epochs=args.epochs, ranks=args.ranks).fit(train)
    seconds = time.perf_counter() - start
    right = accuracy(model, test)
    print(table(model))
    print(f"{seconds:.0f} s in fit, {model.summary.rowsPerSecond:,.0f} images per second in its epochs")
    print(f"{right:.4f} of the test images are told right, by Spark's evaluator")
    output = args.output.absolute()
    model.write().overwrite().save(str(output / "model"))
    model.plot_history().savefig(output / "history.png", dpi=150)
    print(f"Model: {output / 'model'}\nPicture: {output / 'history.png'}")
    if args.results is not None:
        write_results(args.results, model, ranks=args.ranks, seconds=seconds, right=right)
    spark.stop()


def load(spark: SparkSession, folder: Path, part: str) -> DataFrame:
    """Returns the rows of "train" or "test": `image`, 784 numbers from 0 to 1, and `label`."""
    images = read_idx(folder / f"{FILES[part]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{FILES[part]}-labels-idx1-ubyte.gz")
    pixels = pa.array((images / np.float32(255)).ravel())
    table = {"image": pa.FixedSizeListArray.from_arrays(pixels, SIDE * SIDE), "label": labels.astype(np.int32)}
    return spark.createDataFrame(pa.table(table))


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the bytes of an IDX file in their shape: (images, 28, 28), or (labels,)."""
    content = gzip.decompress(path.read_bytes())
    # Two zeros, the type (8: bytes), the number of axes; then the size of each, four bytes, the highest first.
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def network() -> nn.Module:
    """Returns two convolutions and a hidden layer: 421,642 weights, for images of (1, 28, 28)."""
    module = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.4)),
        *(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.4)),
        nn.Linear(128, 10),
    )
    return module.to(memory_format=torch.channels_last)  # the faster order of weights on CPUs


def classifier(test: DataFrame, *, epochs: int, ranks: int) -> TorchClassifier:
    """Returns what trains the network, and counts after every epoch how many test images it knows."""
    return TorchClassifier(
        module=network,
        featuresCol="image",
        shapes={"image": [1, SIDE, SIDE]},
        validationDataset=test,
        metrics=["accuracy"],
        batchSize=128,
        maxEpochs=epochs,
        scheduler="OneCycleLR",  # up to learningRate, and down to almost nothing
        schedulerInterval="step",
        learningRate=0.003,
        numTrainWorkers=ranks,
    )


def accuracy(model: TorchClassificationModel, rows: DataFrame) -> float:
    """Returns the share of rows whose class is predicted right."""
    return MulticlassClassificationEvaluator(metricName="accuracy").evaluate(model.transform(rows))


def table(model: TorchClassificationModel) -> str:
    """Returns one line per epoch, in Markdown."""
    lines = ["| epoch | loss | test loss | test accuracy | seconds |", "| ---: | ---: | ---: | ---: | ---: |"]
    for record in model.history:
        losses = f"{record['loss']:.4f} | {record['validation_loss']:.4f}"
        lines.append(
            f"| {record['epoch']} | {losses} | {record['validation_accuracy']:.4f} | {record['seconds']:.1f} |"
        )
    return "\n".join(lines)


def write_results(folder: Path, model: TorchClassificationModel, *, ranks: int, seconds: float, right: float) -> None:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "load_after": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found = {
        "command": f"spark-submit --master 'local[{ranks}]' examples/fashion_mnist.py --epochs {len(model.history)}",
        "machine": machine,
        "ranks": ranks,
        "device": model.summary.device,
        "seconds": round(seconds, 1),
        "rows_per_second": round(model.summary.rowsPerSecond),
        "test_accuracy": right,
        "history": list(model.history),
    }
    name = f"fashion_mnist_{datetime.date.today()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    text = [
        f"`{found['command']}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in machine.items())}",
        f"- {ranks} ranks on {found['device']}: {seconds:.0f} s in fit, {found['rows_per_second']:,} images per second "
        "in its epochs",
        f"- test accuracy after the last epoch, by Spark's evaluator: {right:.4f}",
        table(model),
    ]
    (folder / f"{name}.md").write_text("\n\n".join([text[0], "\n".join(text[1:4]), text[4]]) + "\n")


if __name__ == "__main__":
    main()
