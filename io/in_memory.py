"""Batches of rows that lie in memory as tensors, by the plan that readers of files obey too.

Every process holds all rows, and feeds those of the shards that were dealt to it: each row is met exactly once per
epoch. What is in a batch follows from (seed, epoch, shard) and the plan, not from the number of processes.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparkdl.batch import Batch
from sparkdl.config import Column, Columns, Shuffle, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.plan import Int64, Piece, RowGroup, ShardPlan, plan_windows, shards_of

__all__ = ["InMemoryData", "TensorRows", "open_rows"]

Given = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
_GROUP_STEPS, _GROUP_BYTES = 16, 2 << 20  # batches that are gathered at once, and their size
_DIGESTED_ROWS = 1024


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows as tensors whose first dimension counts them.

    Attributes:
        inputs: What the module is called with: a tensor, several in order, or a dict from names to tensors, in order.
            Without names they are called ``input_0``, ``input_1``, ...
        labels: What the loss compares the output with, likewise; ``label_0``, ...
        weight: Row weights of shape (rows,); None: every row counts once.

    Raises:
        ConfigError: Something else than tensors, two of one name, or tensors on different devices.
        DataError: Tensors of different numbers of rows.
    """

    inputs: Given
    labels: Given
    weight: torch.Tensor | None = None

    def __post_init__(self) -> None:
        inputs, labels = _named(self.inputs, "input"), _named(self.labels, "label")
        weight = {} if self.weight is None else {"weight": self.weight}
        tensors = {**inputs, **labels, **weight}
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"{name!r} is of type {type(value).__name__}, not a torch.Tensor. Convert it: torch.as_tensor(...)."
                )
            if value.dim() == 0:
                raise ConfigError(f"{name!r} is a single number. Its first dimension has to count the rows.")
        if len(tensors) < len(inputs) + len(labels) + len(weight):
            raise ConfigError(f"Inputs, labels and weight share a name: {[*inputs, *labels, *weight]}. Use others.")
        if not inputs or not labels:
            raise ConfigError(f"There are {len(inputs)} inputs and {len(labels)} labels. Give at least one of each.")
        counts = {name: len(value) for name, value in tensors.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise DataError(f"The tensors have different numbers of rows: {found}. Every row needs a part of each.")
        devices = {name: value.device for name, value in tensors.items()}
        if len(set(devices.values())) > 1:
            found = ", ".join(f"{name!r} on {device}" for name, device in devices.items())
            raise ConfigError(f"The tensors are on different devices: {found}. Move all of them to one.")
        if self.weight is not None and self.weight.dim() != 1:
            raise DataError(f"weight has shape {tuple(self.weight.shape)}. Give one number per row, shape (rows,).")

    @property
    def batch(self) -> Batch:
        """All rows, not copied."""
        inputs, labels = _named(self.inputs, "input"), _named(self.labels, "label")
        return Batch(tuple(inputs.values()), tuple(labels.values()), self.weight)

    @property
    def columns(self) -> Columns:
        """Names and types of the tensors."""

        def column(name: str, tensor: torch.Tensor) -> Column:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return Column(name, name, "array", dtype, validity="any", shape=tuple(tensor.shape[1:]))

        inputs, labels = _named(self.inputs, "input"), _named(self.labels, "label")
        return Columns(
            inputs=tuple(itertools.starmap(column, inputs.items())),
            labels=tuple(itertools.starmap(column, labels.items())),
            weight=None if self.weight is None else column("weight", self.weight),
        )

    def __len__(self) -> int:
        return self.batch.rows

    def digest(self) -> str:
        """Of types, shapes and about a thousand rows: equal where two processes hold the same rows, by all odds."""
        found = hashlib.sha256()
        batch, stride = self.batch, max(1, len(self) // _DIGESTED_ROWS)
        for tensor in (*batch.inputs, *batch.labels, *(() if batch.weight is None else (batch.weight,))):
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel():
                found.update(tensor[::stride].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]


def _named(given: Given, prefix: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    tensors = [given] if isinstance(given, torch.Tensor) or not isinstance(given, Sequence) else given
    return {f"{prefix}_{number}": tensor for number, tensor in enumerate(tensors)}


@dataclass(slots=True)
class InMemoryData:
    """What one process feeds, in every epoch; `sparkdl.trainer.EpochData` of rows in memory.

    Batches are on the device of the rows.

    Attributes:
        rows: All rows, of all processes.
        plan: The steps of an epoch.
        dealt: The shards of this process.
        shards: Places of the rows of each shard, in its own order.
        shuffle: ``"none"`` keeps that order; the others permute each shard in every epoch.
        seed: Of the permutations.
        validation: This process's part of the validation rows; None where there are none.
        pin: Put batches into page-locked memory ahead of need, from which a GPU reads while it computes.
        fingerprint: Of the rows, the plan, and all that decides the order; goes into the state.
    """

    rows: Batch
    plan: ShardPlan
    dealt: Sequence[int]
    shards: Sequence[range]
    shuffle: Shuffle
    seed: int
    validation: Batch | None = None
    pin: bool = False
    fingerprint: str = ""
    _position: tuple[int, int] = field(default=(0, 0), init=False)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step of the batch that comes next."""
        return self._position

    def state_dict(self) -> dict[str, Any]:
        """Where in the data this process is; equal on all that took the same steps."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batches that were handed out when ``state`` was taken.

        Raises:
            ConfigError: The state belongs to other rows, or to another plan for them.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"The checkpoint belongs to rows and settings of fingerprint {state['fingerprint']}, but this run has "
                f"{self.fingerprint}. Rows, num_shards, batch_size, seed, shuffle and partitioning must be what they "
                "were; only the number of processes may change."
            )
        self._position = (int(state["epoch"]), int(state["step"]))

    def deal(self, shards: Sequence[int]) -> None:
        """Feed these shards from the next epoch on."""
        self.dealt = tuple(shards)

    @contextlib.contextmanager
    def open_epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        """This process's slice of the steps of an epoch, in order; empty batches where it has no rows in a step.

        Begins with step 0, or where `load_state_dict` said.
        """
        first = self._position[1] if self._position[0] == epoch else 0
        groups = self._groups(epoch, first)
        with self._ahead(groups) if self.pin else contextlib.closing(groups) as produced:
            yield self._counted(itertools.chain.from_iterable(produced), epoch, first)

    def open_validation(self, rows: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """This process's validation rows in order, in batches of at most ``rows`` rows."""
        own = self.validation
        return contextlib.nullcontext(iter(own.split(rows) if own is not None and own.rows else ()))

    @staticmethod
    def _ahead(groups: Iterator[list[Batch]]) -> contextlib.AbstractContextManager[Iterator[list[Batch]]]:
        from sparkdl.io.batches import prefetched  # brings Petastorm along

        return prefetched(groups, depth=2)

    def _counted(self, batches: Iterator[Batch], epoch: int, first: int) -> Iterator[Batch]:
        last = self.plan.num_steps - 1
        for step, batch in enumerate(batches, first):
            self._position = (epoch, step + 1) if step < last else (epoch + 1, 0)
            yield batch

    def _groups(self, epoch: int, first: int) -> Generator[list[Batch], None, None]:
        """The batches of an epoch, some at a time: gathered at once, small ones cost less."""
        dealt, group_steps = list(self.dealt), self._group_steps()
        orders = [self._order(epoch, shard) for shard in dealt]
        begins = self.plan.bounds(first, first)[0, dealt].tolist()
        counts = self.plan.counts(dealt, first)
        while group := list(itertools.islice(counts, group_steps)):
            places = [np.empty(0, np.int64)]
            for step in group:
                for number, rows in enumerate(step):
                    places.append(orders[number][begins[number] : begins[number] + rows])
                    begins[number] += rows
            yield self._gathered(np.concatenate(places), [sum(step) for step in group])

    def _order(self, epoch: int, shard: int) -> Int64:
        """Places of the rows of a shard in the order in which the epoch takes them."""
        rows = self.shards[shard]
        places = np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
        whole = [Piece(RowGroup("", 0, len(places)), 0, len(places))] if len(places) else []
        settings = {"seed": self.seed, "epoch": epoch, "shard": shard}
        if self.shuffle == "none":
            return places
        for window in plan_windows(whole, window=len(places), shuffle="full", **settings):
            window.order(places)
        return places

    def _gathered(self, places: Int64, sizes: list[int]) -> list[Batch]:
        chosen = torch.from_numpy(places).to(self.rows.inputs[0].device)

        def gather(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
            found = tensor.index_select(0, chosen)
            parts: Sequence[torch.Tensor] = (found.pin_memory() if self.pin else found).split(sizes)
            return parts

        inputs = zip(*map(gather, self.rows.inputs), strict=True)
        labels = zip(*map(gather, self.rows.labels), strict=True)
        weights = [None] * len(sizes) if self.rows.weight is None else gather(self.rows.weight)
        return list(itertools.starmap(Batch, zip(inputs, labels, weights, strict=True)))

    def _group_steps(self) -> int:
        rows, tensors = self.rows.rows, (*self.rows.inputs, *self.rows.labels)
        row_bytes = sum(tensor.nbytes for tensor in tensors) // max(rows, 1)
        share = self.plan.batch_size * len(self.dealt) // len(self.plan.shard_rows)
        return max(1, min(_GROUP_STEPS, _GROUP_BYTES // max(1, share * row_bytes)))


def open_rows(
    rows: TensorRows,
    config: TrainConfig,
    *,
    rank: int,
    world_size: int,
    dealt: Sequence[int] | None = None,
    validation: TensorRows | None = None,
    pin: bool = False,
) -> InMemoryData:
    """This process's part of rows that all processes hold.

    Args:
        rows: The training rows.
        config: Of it counts batch_size, num_shards, partitioning ("sample", if None, or "batch"), shuffle and seed.
        rank: This process.
        world_size: Processes in all.
        dealt: The shards that this process trains on; None: its part of them.
        validation: Validation rows.
        pin: For a GPU; see `InMemoryData`.

    Raises:
        ConfigError: Another partitioning, or fewer rows in a batch than shards.
        DataError: No rows.
    """
    count, num_shards = len(rows), config.num_shards or world_size
    if not count:
        raise DataError("There are no rows to train on.")
    partitioning = config.partitioning or "sample"
    if partitioning == "sample":
        shards = [range(shard, count, num_shards) for shard in range(num_shards)]
    elif partitioning == "batch":
        cuts = [shard * count // num_shards for shard in range(num_shards + 1)]
        shards = list(itertools.starmap(range, itertools.pairwise(cuts)))
    else:
        raise ConfigError(f"partitioning={partitioning!r} is not for rows in memory. Use 'sample' or 'batch'.")
    held = None
    if validation is not None and len(validation):
        every = len(validation)
        held = validation.batch.part(rank * every // world_size, (rank + 1) * every // world_size)
    plan = ShardPlan(tuple(map(len, shards)), config.batch_size)
    shuffle = "none" if config.shuffle == "none" else "full"  # a window is all of a shard here
    return InMemoryData(
        rows=rows.batch,
        plan=plan,
        dealt=tuple(shards_of(rank, world_size, num_shards) if dealt is None else dealt),
        shards=shards,
        shuffle=config.shuffle,
        seed=config.seed,
        validation=held,
        pin=pin,
        fingerprint=plan.fingerprint(
            digest=rows.digest(), partitioning=partitioning, shuffle=shuffle, seed=config.seed
        ),
    )
