"""What a run is: frozen values that travel from the driver to the ranks.

The text under a field of `TrainConfig` is also the doc of the Spark Param of that name (in camelCase) and of the
generated reference table, so that each setting is described once.
"""

from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal

__all__ = [
    "Averaging",
    "CacheTier",
    "Column",
    "Columns",
    "Device",
    "Interval",
    "MonitorMode",
    "NonFinite",
    "Nulls",
    "Padding",
    "Partitioning",
    "Precision",
    "RateScaling",
    "RunSpec",
    "Shuffle",
    "Timeouts",
    "TrainConfig",
    "Validity",
    "config_values",
]

Shuffle = Literal["window", "full", "none"]
CacheTier = Literal["auto", "none", "memory", "disk", "device"]
Partitioning = Literal["sample", "batch", "random", "key"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["32", "bf16", "16"]
RateScaling = Literal["none", "linear", "sqrt"]
Interval = Literal["step", "epoch"]
Averaging = Literal["none", "ema", "swa"]
NonFinite = Literal["stop", "skip"]
MonitorMode = Literal["auto", "min", "max"]
Validity = Literal["finite", "class", "weight", "any"]
Nulls = Literal["error", "drop"] | float


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows of an array column become equally long.

    Attributes:
        length: Values that every row gets.
        value: What shorter rows are filled up with, at the end.
        truncate: Cut longer rows; False refuses them.
    """

    length: int
    value: float = 0
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """One DataFrame column on its way to a tensor.

    Attributes:
        name: The column's name in the user's DataFrame, for messages.
        field: The column's name in staged data: ``input_0``, ``label_0``, ``weight``, ``validation``.
        kind: What it is: an ML vector, an array, a number, text that a vocabulary turns into numbers, bytes or text
            that only a transform can read ("raw"), or numbers of several columns put together ("assembled").
        dtype: Name of the torch dtype that the tensor gets; "" for raw columns.
        flat: True where a number becomes shape (rows,) instead of (rows, 1).
        validity: What its values must be, apart from not null.
        shape: Declared shape of one row; () leaves it one-dimensional.
        nulls: ``"error"`` refuses nulls, ``"drop"`` leaves out the rows that have one here, a number replaces them.
        padding: How rows of different lengths become equal; None refuses them.
        vocabulary: Of a text column, the words; their places are the numbers. None where it has yet to be learnt.
        parts: Of an assembled column, the columns that hold its values, in order.
    """

    name: str
    field: str
    kind: Literal["vector", "array", "scalar", "text", "raw", "assembled"]
    dtype: str
    flat: bool = False
    validity: Validity = "finite"
    shape: tuple[int, ...] = ()
    nulls: Nulls = "error"
    padding: Padding | None = None
    vocabulary: tuple[str, ...] | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a run reads, by role."""

    inputs: tuple[Column, ...]
    labels: tuple[Column, ...]
    weight: Column | None = None
    validation: Column | None = None

    def __iter__(self) -> Any:
        yield from self.inputs
        yield from self.labels
        if self.weight is not None:
            yield self.weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """How long a rank waits, by what it waits for."""

    rendezvous: timedelta = timedelta(minutes=5)
    """For the other ranks, until all have joined the process group."""

    step: timedelta = timedelta(minutes=10)
    """For a sign of progress: a batch, a step, a part of the validation. A rank that shows none hangs."""

    collective: timedelta = timedelta(minutes=15)
    """Inside one collective operation. Longer than ``step``, whose error says more."""

    checkpoint: timedelta = timedelta(minutes=10)
    """For the end of writing or of reading one checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a module is trained. Every field is a Param of the Estimators, in camelCase."""

    max_epochs: int = 10
    """Passes over the training rows."""

    batch_size: int = 256
    """Rows per optimizer step over all ranks together (the global batch). Each rank feeds its share; the log says
    how it divides, as in '256 = 4 x 64'."""

    micro_batch_size: int | None = None
    """Rows that one forward sees at most. A rank's share of the batch is cut into such pieces and their gradients
    are accumulated, and synchronised once; the result is that of the whole share. None: one piece. A rank on a GPU that
    runs out of memory in its first steps halves its own pieces until they fit."""

    precision: Precision = "32"
    """'32' computes in the module's own type. 'bf16' and '16' run forward and loss in mixed precision (torch.autocast);
    weights, gradients and what the optimizer keeps stay as they are. '16' scales the loss, so that small gradients
    survive, and leaves out the steps whose gradients overflow."""

    gradient_clip_norm: float | None = None
    """Norm that the gradient of the global batch, over all parameters, is scaled down to where it is larger."""

    gradient_clip_value: float | None = None
    """Size that every single component of the gradient of the global batch is cut to."""

    scheduler_interval: Interval = "epoch"
    """After what a scheduler steps: every optimizer step ('step'), or every epoch ('epoch'), as in torch's examples.
    One that looks at a metric steps after epochs."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly to its value. A scheduler of steps waits for their
    end."""

    learning_rate_scaling: RateScaling = "none"
    """How learningRate, found with batches of baseBatchSize rows, is brought to batchSize: times the ratio of the two
    ('linear'), times its square root ('sqrt'), or not at all ('none'). The number of ranks has no part in it."""

    base_batch_size: int = 256
    """The batchSize for which learningRate was chosen; for learningRateScaling."""

    averaging: Averaging = "none"
    """'ema' keeps an exponential moving average of the weights, 'swa' the mean of the weights after every epoch from
    averagingStart on, 'none' neither. Validation and the fitted model use the average."""

    averaging_decay: float = 0.999
    """Part of the moving average that one optimizer step keeps, for averaging='ema'."""

    averaging_start: int = 1
    """The first epoch whose weights are averaged, counted from 1."""

    frozen_parameters: tuple[str, ...] = ()
    """Parameters that are not trained: regular expressions, searched for in the parameters' names."""

    activation_checkpointing: tuple[str, ...] = ()
    """Submodules that keep no activations for the backward pass, but compute them again there: regular expressions that
    match their whole names. Saves memory, costs one more forward of them."""

    sync_batch_norm: bool = False
    """Let BatchNorm layers take their statistics over the rows of all ranks."""

    torch_compile: bool = False
    """Compile the module with torch.compile. Where that fails, the rank warns and goes on without."""

    non_finite: NonFinite = "stop"
    """What becomes of a step whose loss or gradient is not finite: 'stop' ends the fit and names the step and the rows,
    'skip' leaves the weights as they are and counts it in the history."""

    shuffle: Shuffle = "window"
    """'window' re-draws the order of row groups, and of the rows within a window of them, every epoch from (seed,
    epoch, shard). 'full' permutes all rows of a shard, which takes a cache that holds them. 'none' keeps the order of
    each shard; shards are still interleaved in every batch."""

    seed: int = 0
    """Seed of the initial weights, of the order of the rows and of random layers."""

    num_train_workers: int = 1
    """Ranks: barrier tasks that train together, each in a slot of its own."""

    num_shards: int | None = None
    """Slices that every global batch is made of. The batches depend on this number and not on numTrainWorkers, so a
    fit with fewer ranks and the same numShards sees the same batches. At least numTrainWorkers, at most batchSize.
    None: numTrainWorkers."""

    partitioning: Partitioning | None = None
    """Which row goes to which shard. 'sample' deals rows round robin, 'batch' cuts them into runs of consecutive rows,
    'random' draws by a hash of the row's place, 'key' keeps all rows of equal partitionKeyCol together. None: 'sample'
    where ranks spool their rows, 'batch' with stagingDir and for Parquet read in place, which knows no other."""

    partition_key_col: str | None = None
    """Column for partitioning='key'."""

    reshuffle_interval: int | None = None
    """Epochs after which ranks exchange rows, so that all rows are permuted over all shards. Takes a cache that holds
    every rank's rows. None: a row stays in its shard."""

    balance_shards: bool = False
    """Deal whole shards to ranks by the speed that they showed, between epochs: a slow rank gets fewer. Takes more
    shards than ranks, and rows that all ranks reach (stagingDir, or Parquet read in place). Batches stay what they are;
    which rank sums which of their rows, and so the last bits of the weights, follows the clock."""

    cache: CacheTier = "auto"
    """Where decoded rows are kept for later epochs: 'memory', 'disk' (the executor's local disk), 'device' (the GPU),
    'none', or 'auto': the fastest of them that holds all rows of the rank, else all of them, as far as they go."""

    cache_bytes: int | None = None
    """Bytes that the cache of one rank may use. None: a part of what is free (40 % of memory, half of the disk, half of
    the GPU), shared by the ranks of a host."""

    reader_threads: int | None = None
    """Threads of one rank that read and decode. None: as many as the rank has cores, 4 at most."""

    standardization: bool = False
    """Bring floating inputs to mean 0 and variance 1 with exact statistics of all training rows, which the model keeps
    and applies in transform."""

    device: Device = "auto"
    """'cpu', 'cuda', or 'auto': the GPU that Spark assigned to the task, else the one of the rank's number on its host
    where there are enough, else the CPU. Never an index: Spark says which."""

    staging_dir: str | None = None
    """Absolute path or URL of a directory that all executors reach. The rows are written there to Parquet once and read
    by every rank; what was written is removed after the fit. None: every rank spools its own rows to its local disk."""

    validation_fraction: float | None = None
    """Part of the rows that is held out for validation, between 0 and 1. A row is drawn by a hash of the seed and its
    values, so that equal rows are on one side, whatever the partitions. Of Parquet read in place, a row is drawn by
    where it lies: its file's path in the data set, row group and number. Rows stay on their side when files are added
    or the whole is moved; written anew, they are drawn anew."""

    monitor: str | None = None
    """The entry of the history that early stopping, restoreBest and a scheduler of a metric look at. None:
    'validation_loss' where there are validation rows, else 'loss'."""

    monitor_mode: MonitorMode = "auto"
    """Whether 'monitor' is better when it is smaller ('min') or larger ('max'). 'auto': smaller for losses and errors,
    larger for everything else."""

    early_stopping_patience: int | None = None
    """Epochs without a better value of 'monitor' after which the fit ends. None: all epochs are run."""

    early_stopping_min_delta: float = 0.0
    """By how much a value of 'monitor' has to be better to count."""

    restore_best: bool = False
    """Return the weights of the epoch with the best value of 'monitor', instead of the last ones."""

    tracking_dir: str | None = None
    """Absolute path or URL of a directory for the events of fits, one JSON object per line in <run>.jsonl. None: in the
    run's directory in checkpointDir, else in a file on the driver that is removed when its process ends."""

    verbose: bool = True
    """Show a progress bar on the driver."""

    checkpoint_dir: str | None = None
    """Absolute path or URL of a directory that all executors reach. Every fit writes checkpoints to a directory of its
    own in it, from which a restart goes on; without stagingDir the rows are staged under its 'data'. None: a restart
    begins with the first step."""

    checkpoint_interval: int | None = None
    """Optimizer steps from one checkpoint to the next. None: one at the end of every epoch, unless checkpointSeconds is
    set."""

    checkpoint_seconds: float | None = None
    """Seconds from one checkpoint to the next, by rank 0's clock; alone or beside checkpointInterval."""

    keep_checkpoints: int = 3
    """Checkpoints of a fit that are kept, the newest ones."""

    max_restarts: int = 3
    """How often a fit that lost a rank to the cluster (an executor or a process that died, a timeout) is started again,
    from the newest checkpoint. Errors of the module, of the data or of the settings are never tried again."""

    min_workers: int | None = None
    """Ranks that a restart needs at least: where the cluster has fewer slots than numTrainWorkers left, a restart makes
    do with as many as there are. None: numTrainWorkers."""

    timeouts: Timeouts = Timeouts()
    """Seconds that a rank waits at most, as a dict: 'rendezvous' (300) for the others to join, 'step' (600) for a sign
    of progress of any rank, 'collective' (900) inside one collective operation, 'checkpoint' (600) for one checkpoint.
    What is left out keeps its default."""

    allow_unencrypted_traffic: bool = False
    """Let ranks exchange gradients in the clear although Spark is told to encrypt or to authenticate: neither gloo nor
    NCCL can. Only for networks that are protected otherwise (WireGuard, IPsec, a network policy)."""


def config_values(config: TrainConfig) -> dict[str, Any]:
    """A config as plain values, with timeouts in seconds."""
    timeouts = {name: value.total_seconds() for name, value in asdict(config.timeouts).items()}
    return {**asdict(config), "timeouts": timeouts}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything that a rank needs to know; pickled once on the driver."""

    run_id: str
    """Unique to this run: names its files and prefixes its keys in the store."""

    config: TrainConfig
    """How to train."""

    columns: Columns
    """What to read."""

    payload: bytes = field(repr=False)
    """Pickled (module, objective, optimizer recipe, transform)."""

    thresholds: int | None = None
    """How many thresholds a classifier was given; must be as many as its classes."""

    attempt: int = 1
    """How often the run was started, this time included."""

    window_bytes: int = 64 << 20
    """Size of one shard's shuffle window in memory."""

    rate_search: tuple[float, float, int] | None = None
    """Learning rates to try instead of training: the first, the last, and the number of steps."""

    encrypt_spool: bool = False
    """Rows that ranks spool to their local disks are encrypted, and none are kept there in the clear. To be set where
    ``spark.io.encryption.enabled`` is, which only the driver can see."""

    @property
    def num_shards(self) -> int:
        """Shards that the data is cut into."""
        return self.config.num_shards or self.config.num_train_workers

    @property
    def staging_url(self) -> str | None:
        """Where the rows of this run are staged; None where ranks spool their own."""
        config = self.config
        if config.staging_dir is not None:
            return f"{config.staging_dir.rstrip('/')}/{self.run_id}"
        if config.checkpoint_dir is not None:  # only staged rows are the same for a restart
            return f"{config.checkpoint_dir.rstrip('/')}/data/{self.run_id}"
        return None

    @property
    def checkpoint_url(self) -> str | None:
        """The directory of this run's checkpoints, if it writes any."""
        directory = self.config.checkpoint_dir
        return None if directory is None else f"{directory.rstrip('/')}/{self.run_id}"
