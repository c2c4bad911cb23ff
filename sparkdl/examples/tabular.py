"""A classifier of table rows, trained without Spark: in this process alone, or under torchrun.

    python -m sparkdl.examples.tabular
    torchrun --nproc-per-node 2 -m sparkdl.examples.tabular

Both print the same losses: what is in a batch does not depend on the number of processes.
"""

import argparse
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sparkdl.config import TrainConfig
from sparkdl.standalone import TensorRows, fit_module, process_group_from_environment

_FEATURES = 20


def make_rows(rows: int, seed: int) -> TensorRows:
    """Rows whose class says which half of the features has the larger norm; no linear module can tell."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, _FEATURES, generator=random)
    first, second = features.square().view(rows, 2, -1).sum(2).unbind(1)
    return TensorRows(features, (first > second).long())


def make_module() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(_FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def main() -> None:
    """Train, and print the history."""
    parser = argparse.ArgumentParser(prog="tabular", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="training rows (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="rows per step, of all processes together")
    parser.add_argument("--shards", type=int, default=4, help="at least as many as processes (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--checkpoints", help="a directory; a run that was stopped goes on from there")
    parser.add_argument("--weights", type=Path, help="a file for the trained weights")
    arguments = parser.parse_args()

    config = TrainConfig(
        max_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        num_shards=arguments.shards,
        warmup_steps=20,
        gradient_clip_norm=1.0,
        checkpoint_dir=arguments.checkpoints,
    )
    with process_group_from_environment():
        rank = dist.get_rank()
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
        result = fit_module(
            make_module,
            make_rows(arguments.rows, seed=1),
            validation=make_rows(5_000, seed=2),
            loss="cross_entropy",
            learning_rate=arguments.learning_rate,
            scheduler="cosineannealing",
            config=config,
            metrics=["accuracy"],
            resume=arguments.checkpoints is not None,
        )
    if rank:
        return
    names = ("epoch", "step", "loss", "validation_loss", "validation_accuracy", "learning_rate")
    print(*names, sep="\t")
    for record in result.history:
        print(*(f"{record[name]:.5g}" for name in names), sep="\t")
    if arguments.weights is not None:
        torch.save(result.module.state_dict(), arguments.weights)


if __name__ == "__main__":
    main()
