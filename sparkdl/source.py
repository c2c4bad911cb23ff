"""Where a rank's rows come from: its own spool, staged Parquet, or Parquet read in place.

This is where the world and the shards meet: what is dealt to a rank is decided here, and nowhere below.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from sparkdl.barrier.world import World
from sparkdl.config import Columns, RunSpec
from sparkdl.errors import DataError
from sparkdl.io.batches import RankData, Reading
from sparkdl.io.cache import Cache, check_tier, find_free, plan_cache
from sparkdl.io.decode import Decoder, Layout, Transform, stacked
from sparkdl.io.feed import Standardise, row_nbytes
from sparkdl.io.in_place import InPlace, Split, narrowed, physical_columns, select_rows
from sparkdl.io.plan import Piece, ShardPlan, plan_pieces
from sparkdl.io.stage import Facts, StagedDataset, open_spool
from sparkdl.io.statistics import global_moments, global_vocabulary
from sparkdl.parallel import Place

__all__ = ["Learnt", "Source", "open_source"]

_SAMPLE_ROWS = 2


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was learnt of all ranks' rows before training; the model needs it as well.

    Attributes:
        vocabularies: Words of text columns, by column.
        moments: Mean and scale of standardised inputs, by field.
    """

    vocabularies: dict[str, list[str]] = field(default_factory=dict)
    moments: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """The rows that one rank reaches.

    Attributes:
        spec: What to train and how.
        world: Who this rank is.
        place: What it is to the data.
        in_place: Set where the rows are the user's own Parquet files.
        pieces: Of every shard that it reaches: its own where it spooled them, else all.
        validation: Its part of the validation rows.
        rows: What is known of the rows.
        decoder: From Arrow to tensors.
        reading: How row groups are read.
        fingerprint: Digest of what all ranks must see alike.
    """

    spec: RunSpec
    world: World
    place: Place
    in_place: InPlace | None
    pieces: Mapping[int, Sequence[Piece]]
    validation: Sequence[Piece]
    rows: Facts
    decoder: Decoder
    reading: Reading
    fingerprint: str

    @property
    def shards(self) -> tuple[int, ...]:
        """The shards that this rank begins with."""
        return tuple(self.place.shards(self.spec.num_shards))

    def sample(self) -> Mapping[str, torch.Tensor] | None:
        """A few decoded training rows; None where the rank has none."""
        first = next((self.pieces[shard][0] for shard in self.shards if self.pieces[shard]), None)
        if first is None:
            return None

        def decode(table: pa.Table, number: int) -> Any:
            rows = table.slice(0, _SAMPLE_ROWS)
            words = {name: rows.column(at).unique().to_pylist() for name, at in self._unknown_words()}
            return dataclasses.replace(self.decoder, columns=_with_words(self.decoder.columns, words))(rows, first)

        try:
            with self.reading.open([first], decode) as reader:
                return stacked(next(reader), self.decoder.columns)
        except DataError as error:
            if self.spec.staging_url is None or self.decoder.native:
                raise
            raise DataError(f"{error} Is stagingDir on storage that all executors share?") from error

    def facts(self) -> dict[str, Any]:
        """What the other ranks need to know of this one's rows."""
        return {
            "shards": {shard: sum(piece.rows for piece in self.pieces[shard]) for shard in self.shards},
            "validation": sum(piece.rows for piece in self.validation),
            "rows": self.rows.to_json(),
        }

    def open_data(
        self, shard_rows: tuple[int, ...], layout: Layout, device: torch.device, threads: int
    ) -> tuple[RankData, Learnt]:
        """The plan over all ranks, and this rank's part of it; the process group is up.

        Args:
            shard_rows: Rows of every shard.
            layout: Of decoded rows.
            device: Where the rank trains.
            threads: Cores of the rank.
        """
        spec, config = self.spec, self.spec.config
        reading = dataclasses.replace(self.reading, threads=config.reader_threads or min(threads, 4))
        vocabularies = self._learn_vocabularies(reading)
        decoder = dataclasses.replace(self.decoder, columns=_with_words(self.decoder.columns, vocabularies))
        standardise = self._learn_moments(reading, decoder, layout) if config.standardization else {}
        own = sum(shard_rows[shard] for shard in self.shards) * row_nbytes(layout)
        # One pass needs no cache, unless its order does; random transforms must not be kept.
        asked = config.cache
        if asked == "auto" and (decoder.is_random or (config.max_epochs == 1 and config.shuffle != "full")):
            asked = "none"
        free = find_free(device, self.world.local_world_size, encrypt=spec.encrypt_spool)
        whole = RankData(
            plan=ShardPlan(shard_rows, config.batch_size),
            pieces=self.pieces,
            validation=self.validation,
            decoder=decoder,
            layout=layout,
            reading=reading,
            window=max(1, spec.window_bytes // max(1, row_nbytes(layout))),
            shuffle=config.shuffle,
            seed=config.seed,
            shards=self.shards,
            cache=Cache(plan_cache(asked, own, free, config.cache_bytes), device),
            standardise=standardise,
            reshuffle_interval=config.reshuffle_interval,
            pin=device.type == "cuda",
            fingerprint=self.fingerprint,
        )
        data = self._narrowed(whole)
        moments = {name: [mean.tolist(), scale.tolist()] for name, (mean, scale) in standardise.items()}
        return data, Learnt(vocabularies, moments)

    def _narrowed(self, whole: RankData) -> RankData:
        """The data with the columns alone that this rank of its replica needs."""
        columns, place = whole.columns, self.place
        if whole.decoder.transform is not None or (place.reads_inputs and place.reads_labels):
            return whole
        needed = dataclasses.replace(
            columns,
            inputs=columns.inputs if place.reads_inputs else (),
            labels=columns.labels if place.reads_labels else (),
        )
        fields = [column.field for column in needed]
        if self.in_place is None:
            reading = dataclasses.replace(whole.reading, columns=fields)
        else:
            threads = whole.reading.threads
            reading = dataclasses.replace(_reading(narrowed(self.in_place, needed), "train"), threads=threads)
        return dataclasses.replace(
            whole,
            decoder=dataclasses.replace(whole.decoder, columns=needed),
            layout={field: whole.layout[field] for field in fields},
            reading=reading,
            standardise={field: found for field, found in whole.standardise.items() if field in fields},
            whole=whole,
        )

    def _own_pieces(self) -> list[Piece]:
        return [piece for shard in self.shards for piece in self.pieces[shard]]

    def _unknown_words(self) -> list[tuple[str, str]]:
        """Names of the columns whose vocabulary has yet to be learnt, for the user and in the tables that are read."""
        return [
            (column.name, column.name if self.decoder.native else column.field)
            for column in self.decoder.columns
            if column.kind == "text" and column.vocabulary is None
        ]

    def _learn_vocabularies(self, reading: Reading) -> dict[str, list[str]]:
        """All words of the columns that came without a vocabulary, over all ranks."""
        found = {}
        for name, at in self._unknown_words():

            def words(table: pa.Table, number: int, at: str = at) -> pa.Array:
                return table.column(at).combine_chunks()

            with reading.open(self._own_pieces(), words) as reader:
                found[name] = list(global_vocabulary(reader))
        return found

    def _learn_moments(self, reading: Reading, decoder: Decoder, layout: Layout) -> Standardise:
        """Mean and scale of every floating input, over all training rows of all ranks."""
        floating = [
            column.field
            for column in decoder.columns.inputs
            if getattr(torch, layout[column.field][0]).is_floating_point
        ]
        if not floating:
            return {}
        pieces = self._own_pieces()

        def values(table: pa.Table, number: int) -> torch.Tensor:
            found = stacked(decoder(table, pieces[number]), decoder.columns)
            return torch.cat([found[name].flatten(1) for name in floating], 1)

        with reading.open(pieces, values) as reader:
            moments = global_moments(reader)
        deviation = moments.variance.sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 1.0)
        widths = [torch.Size(layout[name][1]).numel() for name in floating]
        parts = zip(floating, moments.mean.split(widths), scale.split(widths), strict=True)
        return {
            name: tuple(part.reshape(layout[name][1]).to(getattr(torch, layout[name][0])) for part in (mean, scaled))
            for name, mean, scaled in parts
        }


@contextlib.contextmanager
def open_source(
    spec: RunSpec,
    staged: StagedDataset | None,
    in_place: InPlace | None,
    world: World,
    place: Place,
    batches: Iterator[pa.RecordBatch],
    transform: Transform | None,
) -> Iterator[Source]:
    """The rows of this rank's shards, on its own disk for the time of the block, or on storage that all ranks reach.

    Args:
        spec: What to train and how.
        staged: The rows that all ranks reach; None to spool ``batches``.
        in_place: Set where these are the user's own Parquet files.
        world: Who this rank is.
        place: What it is to the data.
        batches: Its partition of the DataFrame; carries only the rank's number where rows are staged.
        transform: The user's function on columns.

    Raises:
        ConfigError: Rows would lie on a local disk in the clear where they must not.
    """
    config, columns = spec.config, spec.columns
    check_tier(config.cache, encrypt=spec.encrypt_spool)
    decoder = Decoder(columns, transform, native=in_place is not None, seed=config.seed)
    settings: dict[str, Any] = {
        "seed": config.seed,
        "shuffle": config.shuffle,
        "window": spec.window_bytes,
        "files": dict(staged.files) if staged else {},
    }
    fingerprint = ShardPlan((0,) * spec.num_shards, config.batch_size).fingerprint(**settings)
    if staged is None:
        with open_spool(batches, columns, place.shards(spec.num_shards), encrypt=spec.encrypt_spool) as spool:
            whole = {shard: [Piece(group, 0, group.rows) for group in groups] for shard, groups in spool.shards.items()}
            validation: Sequence[Piece] = plan_pieces(spool.validation, place.size)[
                place.index
            ]  # all ranks of the replica have them
            reading = Reading([column.field for column in columns])
            facts = spool.facts if place.leads else dataclasses.replace(spool.facts, dropped=0)
            yield Source(spec, world, place, None, whole, validation, facts, decoder, reading, fingerprint)
        return
    for _ in batches:
        pass
    reading = Reading([column.field for column in columns])
    if in_place is not None:
        second = in_place.validation
        held = _reading(in_place, "validation") if second is None else _reading(second, "train")
        reading = dataclasses.replace(_reading(in_place, "train"), validation=held)
    # What is known of all rows is told by one rank, so that it is counted once.
    facts = staged.facts if world.rank == 0 else dataclasses.replace(staged.facts, dropped=0)
    pieces = dict(enumerate(staged.pieces(spec.num_shards)))
    validation = plan_pieces(staged.validation, world.world_size)[world.rank]
    yield Source(spec, world, place, in_place, pieces, validation, facts, decoder, reading, fingerprint)


def _reading(context: InPlace, split: Split) -> Reading:
    """How rows of a split are read in place."""
    return Reading(
        physical_columns(context),
        select=partial(select_rows, context=context, split=split),
        dictionaries=[column.name for column in context.columns if column.kind == "text"],
        storage_options=context.storage_options,
    )


def _with_words(columns: Columns, vocabularies: Mapping[str, Sequence[str]]) -> Columns:
    """The columns with these vocabularies."""

    def known(column: Any) -> Any:
        words = vocabularies.get(column.name)
        return column if words is None else dataclasses.replace(column, vocabulary=tuple(words))

    return dataclasses.replace(columns, inputs=tuple(map(known, columns.inputs)))
