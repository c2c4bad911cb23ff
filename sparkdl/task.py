"""What one barrier task does: open its data, meet the others, train, report."""

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparkdl.barrier.context import RankContext
from sparkdl.barrier.device import available_cores, select_device, thread_count
from sparkdl.barrier.launch import chunks
from sparkdl.barrier.rendezvous import Entry, error_of
from sparkdl.config import Column, Columns, RunSpec
from sparkdl.errors import ConfigError, DataError, Failure
from sparkdl.io.batches import RankData
from sparkdl.io.plan import Piece, RowGroup, ShardPlan, plan_pieces, shards_of
from sparkdl.io.schema import decode
from sparkdl.io.stage import Facts, Spool, StagedDataset, open_spool, read_sample, window_rows
from sparkdl.objective import Objective
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import DataParallel
from sparkdl.serialization import dump_weights
from sparkdl.trainer import History, Trainer

__all__ = ["RankResult", "has_lazy_parts", "materialise", "run_rank"]


@dataclass(frozen=True, slots=True)
class RankResult:
    """What comes back to the driver.

    Attributes:
        history: One record per epoch.
        weights: Rank 0's weights as safetensors; empty from other ranks.
        device: Where the rank trained.
        threads: Torch threads of the rank.
        rows: Training rows that the rank read in each epoch.
        widths: Values per row of each input.
        outputs: Values per row of the module's output; 2 where it is the one logit of a classifier.
    """

    history: History
    weights: bytes
    device: str
    threads: int
    rows: int
    widths: list[int]
    outputs: int

    def to_chunks(self) -> Iterator[bytes]:
        """The result in pieces that a Spark row carries easily."""
        facts = asdict(self)
        del facts["weights"]
        yield json.dumps(facts).encode()
        yield from chunks(self.weights)

    @classmethod
    def of_chunks(cls, parts: list[bytes]) -> "RankResult":
        """The inverse of `to_chunks`."""
        return cls(**json.loads(parts[0]), weights=b"".join(parts[1:]))


def run_rank(
    spec: RunSpec, staged: StagedDataset | None, rank: RankContext, batches: Iterator[pa.RecordBatch]
) -> Iterator[bytes]:
    """Train as one rank, from the first row to the result.

    Args:
        spec: What to train and how.
        staged: The staged rows; None to spool ``batches``.
        rank: Who this is.
        batches: This rank's partition of the DataFrame.

    Yields:
        The chunks of a `RankResult`.

    Raises:
        SparkdlError: What any rank found wrong before joining; the same on every rank.
    """
    config, columns = spec.config, spec.columns
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(config.seed)  # of the weights of lazy modules
        source = _Source(spec, staged, rank.world.rank)

        def prepare() -> tuple[str, dict[str, Any], _Ready]:
            """Everything that may fail alone: read, build, and try one forward."""
            spool = stack.enter_context(source.open(batches))
            module, objective, optimizer = pickle.loads(spec.payload)
            device = select_device(
                config.device,
                gpu_addresses=rank.gpu_addresses,
                local_rank=rank.world.local_rank,
                local_world_size=rank.world.local_world_size,
            )
            unused, outputs, error = False, 0, None
            if spool.sample is not None:
                try:
                    unused, outputs = _try_forward(module, objective, spool.sample, columns)
                except ConfigError as found:
                    # Told to the others beside the widths: rows of different widths explain it better.
                    error = asdict(rank.failure(found))
            facts = {
                "shards": {shard: sum(group.rows for group in groups) for shard, groups in spool.shards.items()},
                "validation": sum(group.rows for group in spool.validation),
                "rows": spool.facts.to_json(),
                "unused": unused,
                "outputs": outputs,
                "error": error,
            }
            fingerprint = json.dumps([spec.run_id, device.type, source.fingerprint()])
            return fingerprint, facts, _Ready(spool, module, objective, optimizer, device)

        entries, ready = rank.agree(prepare)
        facts = _merge_facts(entries, columns)
        outputs = max(entry.facts["outputs"] for entry in entries)
        _check_classes(spec, outputs, facts)
        data = source.rank_data(ready.spool, entries, facts, pin=ready.device.type == "cuda")
        module, objective, device = ready.module, ready.objective, ready.device
        if ready.spool.sample is None:  # a rank without rows still needs a module of the right shape
            materialise(module, columns.inputs, [facts.widths[column.field] for column in columns.inputs])

        threads = thread_count(
            cores=available_cores(), local_world_size=rank.world.local_world_size, task_cpus=rank.task_cpus
        )
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        module.to(device)
        objective.to(device)
        if rank.world.rank == 0:
            _announce(spec, rank, device, threads, data)
        with rank.process_group(
            device,
            rendezvous_timeout=config.rendezvous_timeout,
            collective_timeout=config.collective_timeout,
        ):
            strategy = DataParallel()
            unused = any(entry.facts["unused"] for entry in entries)
            strategy.prepare(module, objective, ready.optimizer, find_unused_parameters=unused)
            trainer = Trainer(
                strategy,
                objective,
                config,
                device=device,
                has_validation=any(entry.facts["validation"] for entry in entries),
                report=_reporter(rank),
            )
            history = trainer.fit(data)
            strategy.close()
        result = RankResult(
            history=history,
            weights=dump_weights(strategy.module) if rank.world.rank == 0 else b"",
            device=str(device),
            threads=threads,
            rows=sum(data.plan.shard_rows[shard] for shard in data.pieces),
            widths=[facts.widths[column.field] for column in columns.inputs],
            outputs=outputs,
        )
        yield from result.to_chunks()


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a rank has in hand when it meets the others."""

    spool: Spool
    module: nn.Module
    objective: Objective
    optimizer: OptimizerRecipe
    device: torch.device


class _Source:
    """Where this rank's rows are: its own spool, or its share of a staged dataset."""

    def __init__(self, spec: RunSpec, staged: StagedDataset | None, rank: int) -> None:
        self._spec = spec
        self._staged = staged
        self._rank = rank
        self._shards = shards_of(rank, spec.config.num_train_workers, spec.num_shards)

    @contextlib.contextmanager
    def open(self, batches: Iterator[pa.RecordBatch]) -> Iterator[Spool]:
        """The rows of this rank's shards, on its disk or on shared storage."""
        if self._staged is None:
            with open_spool(batches, self._spec.columns, self._shards) as spool:
                yield spool
            return
        for _ in batches:  # only carries the rank's number
            pass
        everything = self._staged_pieces()
        pieces = {shard: everything[shard] for shard in self._shards}
        first = next((found[0] for found in pieces.values() if found), None)
        yield Spool(
            {shard: tuple(_as_group(piece) for piece in found) for shard, found in pieces.items()},
            tuple(_as_group(piece) for piece in self._validation_pieces()),
            self._staged.facts,
            read_sample(first.row_group) if first else None,
        )

    def fingerprint(self) -> str:
        """Digest of what all ranks must see alike."""
        spec = self._spec
        files = dict(self._staged.files) if self._staged else {}
        return ShardPlan((0,) * spec.num_shards, spec.config.batch_size).fingerprint(
            files=files, seed=spec.config.seed, shuffle=spec.config.shuffle, window=spec.window_bytes
        )

    def rank_data(self, spool: Spool, entries: tuple[Entry, ...], facts: Facts, *, pin: bool) -> RankData:
        """The plan over all ranks, and this rank's part of it."""
        spec = self._spec
        rows = {int(shard): count for entry in entries for shard, count in entry.facts["shards"].items()}
        if self._staged is None:
            pieces = {shard: _whole(groups) for shard, groups in spool.shards.items()}
            validation = _whole(spool.validation)
        else:
            everything = self._staged_pieces()
            pieces = {shard: everything[shard] for shard in self._shards}
            validation = self._validation_pieces()
        return RankData(
            plan=ShardPlan(tuple(rows[shard] for shard in range(spec.num_shards)), spec.config.batch_size),
            pieces=pieces,
            validation=validation,
            columns=spec.columns,
            window=window_rows(spec.columns, facts, spec.window_bytes),
            shuffle=spec.config.shuffle,
            seed=spec.config.seed,
            widths=facts.widths,
            pin=pin,
        )

    def _staged_pieces(self) -> tuple[tuple[Piece, ...], ...]:
        assert self._staged is not None
        return plan_pieces(self._staged.train, self._spec.num_shards)

    def _validation_pieces(self) -> tuple[Piece, ...]:
        assert self._staged is not None
        return plan_pieces(self._staged.validation, self._spec.config.num_train_workers)[self._rank]


def _whole(groups: tuple[RowGroup, ...]) -> tuple[Piece, ...]:
    return tuple(Piece(group, 0, group.rows) for group in groups)


def _as_group(piece: Piece) -> RowGroup:
    """A row group with the rows of a piece of it, for counting."""
    return RowGroup(piece.row_group.path, piece.row_group.index, piece.rows)


def _merge_facts(entries: tuple[Entry, ...], columns: Columns) -> Facts:
    """What is true of all ranks' rows together; the same, or the same error, on every rank."""
    facts, rows = Facts(), 0
    for entry in entries:
        facts = facts.merge(Facts.of_json(entry.facts["rows"]), columns)
        rows += sum(entry.facts["shards"].values())
    if rows == 0:
        hint = " All rows are marked for validation." if any(entry.facts["validation"] for entry in entries) else ""
        raise DataError(f"The DataFrame has no rows to train on.{hint} Check the filters and joins before fit.")
    errors = {entry.rank: Failure(**entry.facts["error"]) for entry in entries if entry.facts["error"]}
    if errors:
        raise error_of(errors)
    return facts


def _try_forward(module: nn.Module, objective: Objective, sample: pa.Table, columns: Columns) -> tuple[bool, int]:
    """One forward and backward of two rows, before any other rank depends on this one.

    Lazy modules get their shapes; nothing else of the module changes.

    Returns:
        True where some parameters had no part in the output; and the values per row of the output (a classifier's
        one logit counts as two classes, several outputs as 0).

    Raises:
        ConfigError: The module cannot take the inputs, or its output does not fit the loss.
    """
    tensors = decode(sample, columns)
    inputs = tuple(tensors[column.field] for column in columns.inputs)
    targets = tuple(tensors[column.field] for column in columns.labels)
    weight = tensors[columns.weight.field] if columns.weight is not None else None
    if has_lazy_parts(module):
        _forward(module.eval(), inputs)
        module.train()
    trial = copy.deepcopy(module).eval()
    outputs = _forward(trial, inputs)
    width = 0
    if isinstance(outputs, torch.Tensor):
        width = outputs.shape[1:].numel()
        width = 2 if objective.binary and width == 1 else width
    if objective.binary and (not isinstance(outputs, torch.Tensor) or outputs.ndim > 2):
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ConfigError(
            f"A classifier's module must return one score per class, shape (rows, classes), or one logit per row; this "
            f"one returned {found}. Use TorchEstimator for other outputs."
        )
    objective.try_on(outputs, targets, weight).backward()
    return any(value.grad is None for value in trial.parameters() if value.requires_grad), width


def _forward(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    try:
        return module(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in inputs)
        raise ConfigError(
            f"The module failed on its first forward, with {len(inputs)} positional inputs of shape {shapes} "
            f"(rows first): {type(error).__name__}: {error}"
        ) from error


def _check_classes(spec: RunSpec, classes: int, facts: Facts) -> None:
    """Compare a classifier's classes with the labels of all ranks and with the thresholds; the same on every rank."""
    label = spec.columns.labels[0]
    if label.validity == "class" and facts.labels is not None and classes and facts.labels[1] >= classes:
        raise DataError(
            f"{label.name!r} holds class {facts.labels[1]}, but the module tells {classes} classes apart: labels must "
            f"lie in 0..{classes - 1}. Give the module {facts.labels[1] + 1} outputs, or re-index the labels."
        )
    if spec.thresholds not in (None, classes):
        raise ConfigError(f"thresholds has {spec.thresholds} values for {classes} classes. Give one per class.")


def has_lazy_parts(module: nn.Module) -> bool:
    """True where some part of a module waits for its first input to learn its shapes."""
    return any(isinstance(part, LazyModuleMixin) for part in module.modules())


def materialise(module: nn.Module, inputs: Sequence[Column], widths: Sequence[int]) -> None:
    """Give lazy modules their shapes where there is no row to show them."""
    zeros = tuple(
        torch.zeros((2,) if column.flat else (2, width), dtype=getattr(torch, column.dtype))
        for column, width in zip(inputs, widths, strict=True)
    )
    with torch.no_grad():
        _forward(module.eval(), zeros)


def _announce(spec: RunSpec, rank: RankContext, device: torch.device, threads: int, data: RankData) -> None:
    """Tell the driver what was chosen."""
    rank.channel.send(
        "plan",
        epochs=spec.config.max_epochs,
        steps=data.plan.num_steps,
        rows=data.plan.num_rows,
        shards=spec.num_shards,
        batch_size=spec.config.batch_size,
        world_size=rank.world.world_size,
        device=str(device),
        threads=threads,
    )


def _reporter(rank: RankContext) -> Any:
    def report(event: dict[str, Any]) -> None:
        if rank.world.rank == 0:
            rank.channel.send(event["event"], **{name: value for name, value in event.items() if name != "event"})

    return report
