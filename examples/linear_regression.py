"""Why training on many ranks is training on all rows: linear regression, straight from the mathematics.

    spark-submit --master 'local[2]' examples/linear_regression.py

The loss of y = X w + b over n rows is L(w) = |A v - y|^2 / 2n, with A = [X 1] and v = [w b]. Its gradient is a sum over
rows, and so a sum over ranks, whatever rows each of them has:

    n L'(v)  =  A^T (A v - y)  =  sum over ranks r of  A_r^T (A_r v - y_r)

Each rank computes its own term; `all_reduce` adds them up. So all ranks know the gradient of the whole data, take the
same step, and arrive where one machine with all rows would: at the solution of A^T A v = A^T y.
"""

from typing import Any

import torch
import torch.distributed as dist
from pyspark.sql import SparkSession
from torch import Tensor

import sparkdl
from sparkdl.barrier import all_reduce

ROWS, RANKS, STEPS = 1001, 2, 100
TRUTH = torch.tensor([2.0, -3.0, 0.5, 4.0], dtype=torch.float64)  # w and, last, b


def data() -> tuple[Tensor, Tensor]:
    """Returns A of shape (rows, 4), its last column ones, and y of shape (rows,); the same wherever it is drawn."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(ROWS, len(TRUTH), dtype=torch.float64, generator=generator)
    a[:, -1] = 1
    return a, a @ TRUTH + 0.1 * torch.randn(ROWS, dtype=torch.float64, generator=generator)


def gradient(a: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Returns n L'(v) of these rows."""
    return a.T @ (a @ v - y)


def train(steps: int) -> dict[str, Any]:
    """What every rank does: returns its own terms of the first gradient, their sums, and the v that it arrives at."""
    a, y = (all_rows[dist.get_rank() :: dist.get_world_size()] for all_rows in data())
    v = torch.zeros(len(TRUTH), dtype=torch.float64)
    terms = {"rows": torch.tensor(len(a)), "gradient": gradient(a, y, v)}
    sums = all_reduce(terms)
    for _ in range(steps):
        v -= 0.5 * all_reduce(gradient(a, y, v)) / sums["rows"]
    return {"own": terms, "sums": sums, "v": v}


def main() -> None:
    spark = SparkSession.builder.getOrCreate()
    ranks = sparkdl.launch(train, STEPS, num_train_workers=RANKS, spark=spark)
    a, y = data()
    whole = gradient(a, y, torch.zeros_like(TRUTH))
    closed_form = torch.linalg.solve(a.T @ a, a.T @ y)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)
    for number, rank in enumerate(ranks):
        print(f"rank {number}: {rank['own']['rows']} rows, gradient {rank['own']['gradient']}")
    print(f"their sum, by AllReduce:   {ranks[0]['sums']['gradient']}")
    print(f"gradient of all {ROWS} rows: {whole}")
    print(f"difference: {(ranks[0]['sums']['gradient'] - whole).abs().max():.1e}")
    print(f"after {STEPS} steps on {RANKS} ranks: {ranks[0]['v']}")
    print(f"closed form, one process:   {closed_form}")
    print(f"difference: {(ranks[0]['v'] - closed_form).abs().max():.1e}")


if __name__ == "__main__":
    main()
