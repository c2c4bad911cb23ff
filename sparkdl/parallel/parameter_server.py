"""Asynchronous data parallelism: some ranks keep the parameters, the others compute gradients at their own pace.

M. Li et al., Scaling Distributed Machine Learning with the Parameter Server, OSDI 2014. How far workers may be apart:
Q. Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server, NIPS 2013. Smaller
learning rates for older gradients: W. Zhang et al., Staleness-aware Async-SGD for Distributed Deep Learning, IJCAI
2016, https://arxiv.org/abs/1511.05950.
"""

import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast, broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.gradients import add_up, compute_gradients
from sparkdl.parallel.messages import Inbox, Kind, Message, Package, receive_package, send_message, send_package
from sparkdl.parallel.rank_states import gather_states
from sparkdl.parallel.replicas import Replicas
from sparkdl.parallel.strategy import Setting, StepResult
from sparkdl.serialization import load_state, state_of

__all__ = ["ParameterServer", "deal_parameters", "stale_rate_factor"]


@dataclass
class ParameterServer:
    """The last ranks are servers: they keep the parameters and the optimizer's state, and read no rows.

    All others are workers. A worker sends the gradient of its rows to the servers, and gets the parameters as they are
    by then; it does not wait for other workers, unless it is too far ahead of the slowest one. In each step a worker
    sends and receives the size of the module once, and a server that of its part once per worker.

    With ``max_staleness=0`` the servers add up the gradients of all workers and take one step: the result is that of
    one process that sees the whole batches. Otherwise a gradient is applied when it comes, as a part of the mean over
    the global batch. So the gradients of one step move the weights of plain SGD as far as one synchronous step does,
    while an optimizer that brings every step to one size (Adam, Adagrad, RMSprop, Adafactor, Lion) goes as far per
    gradient as it else goes per step: divide its learning rate by the number of workers. Learning-rate schedules count
    the steps of the slowest worker. Two such runs differ, and so does a resumed one from one that was not interrupted.

    This hides delays that come and go, now on one worker, now on another. Where a worker is always slower, the others
    wait for it at the end of every epoch, since each has its part of the rows.

    BatchNorm's statistics are each worker's own; those of rank 0 are used and kept.

    Attributes:
        num_servers: Ranks that keep parameters: each whole ones, so that all have about as many bytes.
        max_staleness: Steps that a worker may be ahead of the slowest one; 0 for synchronous steps, None for any.
        staleness_aware: Divide the learning rate of a gradient by its staleness, where that is above 1: the number of
            gradients that were applied since its worker got the parameters, divided by the number of workers. That is
            how many steps the gradient is behind. Without effect in synchronous steps.
    """

    num_servers: int = 1
    max_staleness: int | None = 4
    staleness_aware: bool = True
    name: ClassVar[str] = "parameter_server"

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`: every worker is one."""
        if self.num_servers < 1:
            raise ConfigError(
                f"strategy='parameter_server': num_servers={self.num_servers} keep no parameters. Use 1 or more."
            )
        if world_size <= self.num_servers:
            raise ConfigError(
                f"strategy='parameter_server': num_servers={self.num_servers} of numTrainWorkers={world_size} leave no "
                f"rank to compute gradients. Use numTrainWorkers={self.num_servers + 1} or more."
            )
        return Replicas(tuple((rank,) for rank in range(world_size - self.num_servers)))

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        for asked, reason in self._faults(module, config):
            raise ConfigError(f"strategy='parameter_server' cannot be had with {asked}: {reason}")

    def _faults(self, module: nn.Module, config: TrainConfig) -> Iterator[tuple[str, str]]:
        """What was asked that cannot be, and why, with what to do."""
        if self.max_staleness is not None and self.max_staleness < 0:
            yield f"max_staleness={self.max_staleness}", "workers cannot wait for the future. Use 0 or more, or None."
        trained = [
            name
            for name, value in module.named_parameters()
            if value.requires_grad and not any(re.search(pattern, name) for pattern in config.frozen_parameters)
        ]
        if len(trained) < self.num_servers:
            yield (
                f"num_servers={self.num_servers}",
                f"a server keeps whole parameters, and {len(trained)} are trained. Use as many servers at most.",
            )
        if config.averaging != "none":
            yield (
                f"averaging={config.averaging!r}",
                "no rank has all weights after every step. Use averaging='none', and restoreBest for the best epoch.",
            )
        if config.non_finite == "skip":
            yield "nonFinite='skip'", "a gradient is applied before others are known. Use nonFinite='stop'."
        if config.precision == "16":
            yield "precision='16'", "workers do not agree on a scale of the loss. Use precision='bf16' or '32'."
        if config.sync_batch_norm:
            yield "syncBatchNorm=True", "workers do not wait for each other's statistics. Leave it out."
        if config.balance_shards or config.reshuffle_interval is not None:
            moving = "balanceShards=True" if config.balance_shards else f"reshuffleInterval={config.reshuffle_interval}"
            yield moving, "servers hold no rows that could be moved. Leave it out."
        clips = {"gradientClipNorm": config.gradient_clip_norm, "gradientClipValue": config.gradient_clip_value}
        for name, value in clips.items():
            if value is not None and self.max_staleness != 0:
                yield (
                    f"{name}={value:g} and max_staleness={self.max_staleness}",
                    "the gradient of the global batch is never in one place. Use max_staleness=0, or leave it out.",
                )
        if config.gradient_clip_norm is not None and self.num_servers > 1:
            yield (
                f"gradientClipNorm={config.gradient_clip_norm:g} and num_servers={self.num_servers}",
                "no server knows the norm over all parameters. Use num_servers=1, or gradientClipValue.",
            )

    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Broadcast rank 0's weights, build the optimization, and deal the parameters to the servers."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._module = module
        self.micro_batch_size = config.micro_batch_size
        state = (*module.parameters(), *objective.parameters(), *module.buffers(), *objective.buffers())
        broadcast_state([value.detach() for value in state], 0, hosts=setting.hosts or [""] * world_size)
        # Of the whole module on every rank: numbers and groups of parameters are those of any other strategy. State
        # comes to be where parameters get gradients, which is on their server.
        self._optimization = build(module)
        trained = [value for value in module.parameters() if value.requires_grad]
        dealt = deal_parameters([value.numel() * value.element_size() for value in trained], self.num_servers)
        shards = [[trained[number] for number in own] for own in dealt]
        self._num_workers = world_size - self.num_servers
        self._shards = {self._num_workers + server: shard for server, shard in enumerate(shards)}
        self._group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=config.timeouts.collective)
        self._role: _Worker | _Server
        if rank in self._shards:
            self._role = _Server(
                self,
                self._optimization,
                self._shards[rank],
                self._num_workers,
                self._group,
                config,
                setting.on_computed,
            )
        else:
            self._role = _Worker(
                module, objective, self._optimization, self._shards, self._group, config, setting.on_computed
            )

    def meets(self, step: int) -> bool:
        """In synchronous steps."""
        return self.max_staleness == 0

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`; a server's takes as long as the slowest worker's.

        Raises:
            TimeoutError: A worker did not come as far in time.
        """
        return self._role.train_step(batch, denominator)

    @torch.no_grad()
    def gather(self) -> nn.Module:
        """See `Strategy.gather`: parameters of the servers, buffers of rank 0."""
        for server, shard in self._shards.items():
            broadcast([value.detach() for value in shard], server)
        self._role.have_met()
        if next(self._module.buffers(), None) is None:
            return self._module
        # Buffers are each worker's own and stay so; parameters are not copied.
        whole = copy.deepcopy(self._module, {id(value): value for value in self._module.parameters()})
        broadcast(whole.buffers(), 0)
        return whole

    # ---- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        module = state_of(self.gather())
        own: Any = self._optimization.state_dict()
        if dist.get_rank() < self._num_workers:
            own = dict(self._module.named_buffers())
        states = gather_states(own)
        if states is None:
            return {}
        buffers, servers = states[: self._num_workers], states[self._num_workers :]
        optimization = servers[0]
        for number, optimizer in enumerate(self._optimization.optimizers):
            kept = [self._kept(optimizer, one["optimizers"][number]["state"], server)
                    for server, one in zip(self._shards, servers, strict=True)]  # fmt: skip
            optimization["optimizers"][number]["state"] = {key: one[key] for one in kept for key in sorted(one)}
        return {"module": module, "optimization": optimization, "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`; the numbers of workers and of servers may be others.

        A worker more than there were goes on with the buffers of rank 0.
        """
        rank = dist.get_rank()
        load_state(self._module, state["module"])
        buffers = state["buffers"][rank if rank < len(state["buffers"]) else 0]
        with torch.no_grad():
            for name, value in self._module.named_buffers():
                value.copy_(buffers[name])
        saved = state["optimization"]
        optimizers = [
            {**one, "state": self._kept(optimizer, one["state"], rank)}
            for optimizer, one in zip(self._optimization.optimizers, saved["optimizers"], strict=True)
        ]
        self._optimization.load_state_dict({**saved, "optimizers": optimizers})
        self._role.have_met()

    def _kept(self, optimizer: torch.optim.Optimizer, state: Mapping[Any, Any], rank: int) -> dict[Any, Any]:
        """Of an optimizer's state by number of parameter, what a server keeps; nothing for a worker."""
        own = {id(value) for value in self._shards.get(rank, ())}
        members = [value for group in optimizer.param_groups for value in group["params"]]
        return {number: entry for number, entry in state.items() if id(members[number]) in own}

    def close(self) -> None:
        """Leave the group of messages, once all ranks are done with it."""
        self._role.close()
        dist.barrier(self._group)
        dist.destroy_process_group(self._group)
        del self._role, self._group

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`; of a server, those in which it applied gradients and packed parameters."""
        return self._role.busy


class _Worker:
    """Computes gradients, sends them to the servers and waits for parameters."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        optimization: Optimization,
        shards: Mapping[int, Sequence[nn.Parameter]],
        group: dist.ProcessGroup,
        config: TrainConfig,
        on_computed: Callable[[], None],
    ) -> None:
        self._module = module
        self._objective = objective
        self._optimization = optimization
        self._shards = shards
        self._group = group
        self._config = config
        self._on_computed = on_computed
        # There and back: a server answers when it has what it was sent.
        self._packages = {server: Package(shard) for server, shard in shards.items()}
        self.busy = 0.0

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        began = time.perf_counter()
        loss = torch.zeros((), device=batch.device)
        logged: dict[str, Tensor] = {}
        if batch.rows:
            computed = compute_gradients(
                self._optimization,
                lambda rows: self._objective.compute(self._module, rows),
                batch.split(self._config.micro_batch_size),
                1 / (denominator or 1.0),
            )
            loss, logged = add_up(computed)
            for server, shard in self._shards.items():
                self._packages[server].put(value.grad for value in shard)
        self.busy += time.perf_counter() - began
        self._on_computed()
        self._send(Kind.CONTENT if batch.rows else Kind.NOTHING, self._optimization.steps)
        for server, package in self._packages.items():
            receive_package(package, server, self._group, self._config.timeouts.collective)
        began = time.perf_counter()
        with torch.no_grad():
            for server, shard in self._shards.items():
                for value, arrived in zip(shard, self._packages[server].tensors, strict=True):
                    value.copy_(arrived)
        self._optimization.advance()
        self.busy += time.perf_counter() - began
        return StepResult(loss, logged, True)

    def _send(self, kind: Kind, step: int) -> None:
        """A message to every server."""
        sent = [send_message(kind, step, package, server, self._group) for server, package in self._packages.items()]
        for works in sent:
            for work in works:
                work.wait()

    def have_met(self) -> None:
        """Nothing of a worker is under way between two steps."""

    def close(self) -> None:
        self._send(Kind.FAREWELL, 0)


class _Server:
    """Applies gradients as they come, and sends parameters."""

    def __init__(
        self,
        options: ParameterServer,
        optimization: Optimization,
        shard: Sequence[nn.Parameter],
        num_workers: int,
        group: dist.ProcessGroup,
        config: TrainConfig,
        on_computed: Callable[[], None],
    ) -> None:
        self._options = options
        self._optimization = optimization
        self._shard = shard
        self._group = group
        self._timeout = config.timeouts.collective
        self._on_computed = on_computed
        self._packages = {worker: Package(shard) for worker in range(num_workers)}
        self._updates = 0  # gradients that were applied
        self._gradients: dict[int, list[Tensor | None]] = {}  # of a synchronous step, by worker
        self._unanswered: list[int] = []
        self._sent: dict[int, dist.Work] = {}
        self.busy = 0.0
        self.have_met()
        self._inbox = Inbox(self._packages, group)

    def have_met(self) -> None:
        """All workers have come as far as this server, and have its parameters."""
        self._clocks = dict.fromkeys(self._packages, self._optimization.steps)  # steps of each worker
        self._given = dict.fromkeys(self._packages, self._updates)  # updates that each worker's parameters have seen

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """Serve until every worker has done the step; others may do further ones meanwhile."""
        self._on_computed()
        step = self._optimization.steps
        while min(self._clocks.values()) <= step:
            message = self._inbox.take(self._timeout, lambda: self._awaited(step))
            began = time.perf_counter()
            assert message.step == self._clocks[message.source]
            self._clocks[message.source] += 1
            self._unanswered.append(message.source)
            if self._options.max_staleness == 0:
                self._collect(message)
            elif message.kind is Kind.CONTENT:
                self._apply(message.source)
            self._answer()
            self.busy += time.perf_counter() - began
        if self._options.max_staleness != 0:
            self._optimization.advance()
        return StepResult(torch.zeros((), device=batch.device), {}, True)

    def _collect(self, message: Message) -> None:
        """Take a step by the gradients of all workers, once they are here."""
        package = self._packages[message.source]
        self._gradients[message.source] = package.get() if message.kind is Kind.CONTENT else [None] * len(self._shard)
        if len(self._gradients) < len(self._packages):
            return
        in_order = [self._gradients[worker] for worker in self._packages]
        self._set([_sum(gradients) for gradients in zip(*in_order, strict=True)])
        self._optimization.step()
        self._gradients.clear()

    def _apply(self, worker: int) -> None:
        """Change the parameters by the gradient of one worker."""
        staleness = (self._updates - self._given[worker]) / len(self._packages)
        self._set(self._packages[worker].get())
        self._optimization.update(stale_rate_factor(staleness) if self._options.staleness_aware else 1.0)
        self._updates += 1

    def _set(self, gradients: Sequence[Tensor | None]) -> None:
        for value, gradient in zip(self._shard, gradients, strict=True):
            value.grad = None if gradient is None else gradient.to(value.device)

    def _answer(self) -> None:
        """Send parameters to all workers that are not too far ahead."""
        slowest, limit = min(self._clocks.values()), self._options.max_staleness
        for worker in tuple(self._unanswered):
            if limit is not None and self._clocks[worker] - slowest > limit:
                continue
            if worker in self._sent:
                self._sent[worker].wait()  # it has arrived, or the worker would have sent nothing
            self._packages[worker].put(self._shard)
            self._sent[worker] = send_package(self._packages[worker], worker, self._group)
            self._given[worker] = self._updates
            self._unanswered.remove(worker)

    def _awaited(self, step: int) -> str:
        late = [str(worker) for worker, clock in self._clocks.items() if clock <= step]
        return f"step {step + 1} of rank{'s' if len(late) > 1 else ''} {', '.join(late)}"

    def close(self) -> None:
        self._inbox.close()
        for work in self._sent.values():
            work.wait()


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def deal_parameters(sizes: Sequence[int], num_servers: int) -> list[list[int]]:
    """Which parameters each server keeps: largest first, each to the server that has least.

    Args:
        sizes: Bytes of each.
        num_servers: Servers.

    Returns:
        Numbers of parameters by server, rising.
    """
    dealt: list[list[int]] = [[] for _ in range(num_servers)]
    loads = [0] * num_servers
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        server = loads.index(min(loads))
        dealt[server].append(number)
        loads[server] += sizes[number]
    return [sorted(own) for own in dealt]


def stale_rate_factor(staleness: float) -> float:
    """What the learning rate of a gradient is multiplied by (Zhang et al. 2016, equation 5).

    Args:
        staleness: Steps that the parameters it was computed from are behind.
    """
    return 1 / max(1.0, staleness)


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Their sum, in the memory of the first; None where none is there."""
    there = [one for one in gradients if one is not None]
    for one in there[1:]:
        there[0].add_(one)
    return there[0] if there else None
