"""Synchronous data parallelism: every rank holds the module, gradients are averaged by an all-reduce in each step."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.compression import Compression, build_compression
from sparkdl.parallel.error_feedback import CompressedAllReduce
from sparkdl.parallel.gradients import Computed, add_up, compute_gradients, cut_alike
from sparkdl.parallel.priority import PriorityExchange, order_of_use
from sparkdl.parallel.replicas import Replicas
from sparkdl.parallel.strategy import Setting, StepResult
from sparkdl.serialization import load_state, state_of

__all__ = ["DataParallel"]

logger = logging.getLogger(__name__)

Schedule = Literal["ready", "priority"]

# The first brings the gradients and the optimizer's state into memory; the second needs all of it at once.
_CAREFUL_STEPS = 2


@dataclass
class DataParallel:
    """`DistributedDataParallel` around module and loss together; a single rank goes without it.

    The loss is inside, so that a rank without rows in a step can take part in the all-reduce with a gradient of zero
    and without a forward of the module.

    Attributes:
        bucket_cap_mb: Gradients of so many MiB are reduced together; None for torch's own choice, 25.
        static_graph: True where the same parameters have a part in the loss in every step; DDP then takes modules whose
            checkpointed layers it refuses otherwise.
        compression: What of the gradients is sent: "fp16", "bf16", "int8", "topk", "powersgd" or an object of
            `sparkdl.parallel.compression`; None sends them whole.
        schedule: "ready" sends gradients as the backward pass brings them, and the next step waits for all of them;
            "priority" sends first what the next forward needs first, and has that wait where it needs it. That pays
            where the network is slow and a forward takes a good part of the step; whoever looks at the module between
            two steps waits for the rest.
    """

    name: ClassVar[str] = "ddp"

    bucket_cap_mb: float | None = None
    static_graph: bool = False
    compression: str | Compression | None = None
    schedule: Schedule = "ready"

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        return Replicas.of_size(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        if self.bucket_cap_mb is not None and not self.bucket_cap_mb > 0:
            raise ConfigError(f"bucket_cap_mb={self.bucket_cap_mb} is too small. Use more than 0, or None.")
        if self.compression is not None:
            _check_compression(build_compression(self.compression), self.compression, module, config)
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule={self.schedule!r} is not known. Use one of {', '.join(get_args(Schedule))}.")
        if self.schedule == "priority":
            self._check_priority(module, config)

    def _check_priority(self, module: nn.Module, config: TrainConfig) -> None:
        for asked, by, why in (
            (self.compression is not None, f"compression={self.compression!r}", "goes by the buckets of DDP"),
            (self.bucket_cap_mb is not None, f"bucket_cap_mb={self.bucket_cap_mb}", "is about the buckets of DDP"),
            (self.static_graph, "static_graph=True", "is about the buckets of DDP"),
            (config.gradient_clip_norm is not None, "gradientClipNorm", "needs all gradients before the first update"),
            (config.non_finite == "skip", "nonFinite='skip'", "needs all gradients before the first update"),
            (config.precision == "16", "precision='16'", "needs all gradients before the first update"),
            (config.torch_compile, "torchCompile=True", "hides where a parameter is used"),
            (config.averaging != "none", f"averaging={config.averaging!r}", "needs all weights after every step"),
        ):
            if asked:
                raise ConfigError(
                    f"schedule='priority' brings weights forward one after the other, but {by} {why}. Use "
                    f"schedule='ready', or leave {by.partition('=')[0]} out."
                )
        compiled = [
            name for name, part in module.named_modules()
            if isinstance(part, torch.jit.ScriptModule) or type(part).__name__ == "OptimizedModule"
            or getattr(part, "_compiled_call_impl", None) is not None
        ]  # fmt: skip
        if compiled:
            raise ConfigError(
                "schedule='priority' sees where a parameter is used, but not in the compiled module "
                f"{compiled[0] or type(module).__name__!r}. Use schedule='ready', or the module as it was before."
            )

    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Broadcast rank 0's weights and build the optimization.

        Raises:
            ConfigError: A graph that is said to be static leaves parameters out, or the schedule does not suit them or
                the optimizer.
        """
        device = next(module.parameters()).device
        if self.schedule == "priority" and (setting.find_unused_parameters or device.type != "cpu"):
            found = f"it is on {device}" if device.type != "cpu" else "some parameters have no part in the output"
            raise ConfigError(
                f"schedule='priority' is for modules on the CPU all of whose parameters are used, but {found}. Use "
                "schedule='ready'."
            )
        if self.static_graph and setting.find_unused_parameters:
            raise ConfigError(
                "static_graph=True, but some parameters have no part in the output, and a rank without rows cannot "
                "know which. Use static_graph=False, or freeze these parameters (frozenParameters)."
            )
        self._module = module
        self._config = config
        self.micro_batch_size = config.micro_batch_size
        step = _RowsToLoss(module, objective, everyone_forwards=config.sync_batch_norm)
        # Instead of DDP's own broadcast: large weights go from host to host in a chain.
        state = (*step.parameters(), *step.buffers())
        hosts = setting.hosts or [""] * dist.get_world_size()
        broadcast_state([value.detach() for value in state], 0, hosts=hosts)
        self._world_size = dist.get_world_size()
        self._step: nn.Module = step
        self._reducing: DistributedDataParallel | None = None
        self._priority: PriorityExchange | None = None
        prioritised = self._world_size > 1 and self.schedule == "priority"
        if self._world_size > 1 and not prioritised:
            self._step = self._reducing = DistributedDataParallel(
                step,
                device_ids=[device] if device.type == "cuda" else None,
                init_sync=False,
                bucket_cap_mb=self.bucket_cap_mb,
                find_unused_parameters=setting.find_unused_parameters,
                gradient_as_bucket_view=True,
                static_graph=self.static_graph,
            )
        self._compressed: CompressedAllReduce | None = None
        if self.compression is not None:
            named = {name: value for name, value in step.named_parameters() if value.requires_grad}
            self._compressed = CompressedAllReduce(build_compression(self.compression), named)
            if self._reducing is not None:
                self._reducing.register_comm_hook(None, self._compressed.hook)
        self._optimization = build(module)
        self._careful_steps = 0 if config.sync_batch_norm else _CAREFUL_STEPS
        if self._reducing is not None:
            self._warm_up(setting.example)
        elif prioritised:
            others = [type(one).__name__ for one in self._optimization.optimizers if not _is_of_torch(one)]
            if others:
                raise ConfigError(
                    "schedule='priority' updates parameters one after the other, which is known to suit the optimizers "
                    f"of torch, but {others[0]} is another. Use schedule='ready', or an optimizer of torch.optim."
                )
            self._priority = PriorityExchange(self._order_of_use(setting.example))
        self._on_computed = setting.on_computed
        self._busy = self._begun = 0.0
        # In the backward pass the first layer's gradients come last: when they are there this rank has computed its
        # part, and what is left of the backward pass is waiting for the others.
        self._handle: Any = None
        if self._world_size > 1:
            first = next(value for value in module.parameters() if value.requires_grad)
            self._handle = first.register_post_accumulate_grad_hook(lambda _: self._computed())

    def _warm_up(self, example: Batch) -> None:
        """A backward pass that changes nothing but the order of DDP's buckets.

        DDP puts gradients into buckets by the order in which the first backward pass brings them, and with it changes
        the order of summation over three and more ranks. A resumed run must not sum its first step in another order
        than the run that it goes on with.
        """
        buffers = [value.clone() for value in self._module.buffers()]
        devices = [value.device for value in example.inputs if value.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), _uncompressed(self._compressed):
            with self._optimization.autocast():
                loss, _ = self._step(example)
            loss.backward()
        self._module.zero_grad(set_to_none=True)
        self._restore(buffers)

    def _order_of_use(self, example: Batch) -> list[nn.Parameter]:
        """The order in which a forward uses the parameters."""
        buffers = [value.clone() for value in self._module.buffers()]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self._optimization.autocast():
            trained = [value for value in self._module.parameters() if value.requires_grad]
            order = order_of_use(trained, lambda: self._step(example))
        self._restore(buffers)
        return order

    def _restore(self, buffers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for value, before in zip(self._module.buffers(), buffers, strict=True):
                value.copy_(before)

    def meets(self, step: int) -> bool:
        """In every step."""
        return True

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`.

        Raises:
            ConfigError: This rank's memory does not hold a micro-batch.
        """
        self._begun = time.perf_counter()
        # The all-reduce takes the mean over ranks; the gradient wanted is the sum over ranks by the denominator.
        scale = self._world_size / denominator if denominator else float(self._world_size)
        computed = self._carefully(batch, scale) if self._careful_steps else self._backward(batch, scale)
        if self._world_size > 1:
            self._begun = time.perf_counter()
        elif self._compressed is not None:
            self._compressed.add_what_is_kept()
        if self._priority is None:
            taken = self._optimization.step()
        else:
            self._optimization.advance()
            taken = True
        self._busy += time.perf_counter() - self._begun
        return StepResult(*add_up(computed), taken)

    def _backward(self, batch: Batch, scale: float, *, synchronised: bool = True) -> Computed:
        """The gradients of this rank's rows, reduced with the last micro-batch: losses and logged sums of each."""
        micro_batches = self._micro_batches(batch)
        if self._priority is not None and synchronised:
            return self._prioritised(self._priority, micro_batches, scale)

        def around(number: int) -> contextlib.AbstractContextManager[Any]:
            reduced = synchronised and number == len(micro_batches) - 1
            return contextlib.nullcontext() if reduced or self._reducing is None else self._reducing.no_sync()

        return compute_gradients(self._optimization, self._step, micro_batches, scale, around=around)

    def _prioritised(self, exchange: PriorityExchange, micro_batches: Sequence[Batch], scale: float) -> Computed:
        """As `_backward`; the weights of the last step become new as the forward uses them."""
        left = len(micro_batches)

        def compute(micro_batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal left
            waited = exchange.waited
            with exchange.waiting():
                found: tuple[Tensor, dict[str, Tensor]] = self._step(micro_batch)
            exchange.settle()
            self._busy -= exchange.waited - waited
            left -= 1
            if not left:
                exchange.begin(self._optimization.deferred_update())
            return found

        computed = compute_gradients(self._optimization, compute, micro_batches, scale)
        exchange.end()
        return computed

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        if not self._config.sync_batch_norm or self.micro_batch_size is None:
            return batch.split(self.micro_batch_size)
        # BatchNorm layers wait for each other in every forward: all ranks need as many.
        return cut_alike(batch, self.micro_batch_size)

    def _carefully(self, batch: Batch, scale: float) -> Computed:
        """As `_backward`, but nothing is reduced before all rows are computed: a rank can begin again until then."""
        devices = [value.device for value in batch.inputs if value.device.type == "cuda"][:1]
        self._settle()
        buffers = [value.clone() for value in self._module.buffers()]
        while True:
            out_of_memory: str | None = None
            with torch.random.fork_rng(devices=devices):
                try:
                    computed = self._backward(batch, scale, synchronised=False)
                except torch.OutOfMemoryError as error:
                    out_of_memory = str(error)
            if out_of_memory is None:
                break
            # Outside of the handler, whose traceback holds on to the tensors of the forward.
            self._halve(batch.rows, out_of_memory)
            self._restore(buffers)
        self._careful_steps -= 1
        if self._priority is not None:
            self._priority.begin(self._optimization.deferred_update())
            self._priority.take_all()
            self._priority.end()
            self._priority.settle()
        if self._reducing is not None:
            loss, _ = self._step(batch.part(0, 0))
            loss.backward()  # of no rows: adds nothing, and reduces what is there
        return computed

    def _halve(self, rows: int, reason: str) -> None:
        tried = min(rows, self.micro_batch_size or rows)
        if tried <= 1:
            raise ConfigError(f"This rank's memory does not hold the step of a single row: {reason}")
        self._module.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.micro_batch_size = -(-tried // 2)
        logger.warning(
            "out of memory with %d rows in one forward; this rank goes on with microBatchSize=%d",
            tried,
            self.micro_batch_size,
        )

    def _computed(self) -> None:
        now = time.perf_counter()
        self._busy += now - self._begun
        self._begun = now
        self._on_computed()

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    def _settle(self) -> None:
        if self._priority is not None:
            self._priority.settle()

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        self._settle()
        return self._module

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        self._settle()
        return {
            "module": state_of(self._module),
            "optimization": self._optimization.state_dict(),
            "compressed": None if self._compressed is None else self._compressed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`.

        Raises:
            ConfigError: The run that is gone on with keeps parts of gradients for another compression.
        """
        compressed = state.get("compressed")
        if self._compressed is not None and compressed is not None:
            self._compressed.load_state_dict(compressed)
        elif compressed is not None and any(compressed["kept"]):
            raise ConfigError(
                f"compression=None cannot go on from this checkpoint: compression={compressed['compression']!r} wrote "
                "it and keeps parts of gradients that are still to be sent. Use the same compression."
            )
        load_state(self._module, state["module"])
        self._optimization.load_state_dict(state["optimization"])

    def close(self) -> None:
        """Let go of the process group while others still hold it.

        DDP's reducer frees the group with the GIL held, which joins gloo's threads, which may be waiting for the GIL:
        as the last owner it would hang the rank for ever.
        """
        if self._compressed is not None:
            self._compressed.close()
        if self._priority is not None:
            self._priority.close()
            self._priority = None
        if self._handle is not None:
            self._handle.remove()
        if self._reducing is not None:
            del self._reducing.reducer, self._reducing.logger
        del self._step, self._reducing

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        self._settle()
        return self._module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization


def _check_compression(compression: Compression, asked: Any, module: nn.Module, config: TrainConfig) -> None:
    if compression.keeps and config.precision == "16":
        raise ConfigError(
            f"compression={asked!r} keeps parts of gradients for the next step, but with precision='16' their scale "
            "changes between steps. Use precision='bf16', or compression='fp16'."
        )
    if compression.keeps and config.non_finite == "skip":
        raise ConfigError(
            f"compression={asked!r} keeps parts of gradients for the next step, also of one that is left out by "
            "nonFinite='skip'. Use nonFinite='stop', or compression='fp16'."
        )
    sparse = [name for name, part in module.named_modules() if getattr(part, "sparse", False) is True]
    if sparse:
        raise ConfigError(
            f"compression={asked!r} takes dense gradients, but those of {sparse[0]!r} are sparse. Use sparse=False "
            "there, or compression=None."
        )
    odd = [(name, value.dtype) for name, value in module.named_parameters() if not value.is_floating_point()]
    if odd:
        raise ConfigError(
            f"compression={asked!r} takes real numbers, but the parameter {odd[0][0]!r} is {odd[0][1]}. Use "
            "compression=None."
        )


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.")


@contextlib.contextmanager
def _uncompressed(compressed: CompressedAllReduce | None) -> Iterator[None]:
    if compressed is None:
        yield
        return
    compressed.active = False
    try:
        yield
    finally:
        compressed.active = True


class _RowsToLoss(nn.Module):
    def __init__(self, module: nn.Module, objective: Objective, *, everyone_forwards: bool) -> None:
        super().__init__()
        self.module = module
        self.objective = objective
        self.everyone_forwards = everyone_forwards

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.rows:
            return self.objective.compute(self.module, batch)
        nothing = [(value * 0).sum() for value in self.parameters() if value.requires_grad]
        if self.everyone_forwards and self.training:
            outputs = self.objective.predict(self.module, batch.inputs)
            nothing += [value.sum() * 0 for value in tree_leaves(outputs) if isinstance(value, Tensor)]
        return torch.stack(nothing).sum(), {}
