"""Metrics of the validation rows, by torchmetrics, over ranks that have different numbers of rows.

Torchmetrics' own synchronisation is not used: its ranks must have updated a metric equally often. Here every rank hands
over once what all its metrics hold, rank 0 merges that and computes, and all ranks get its numbers. Nothing is pickled:
states travel as safetensors and JSON.

Metrics by name are in `sparkdl.named_metrics`.
"""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat, dim_zero_mean

from sparkdl.checkpoint.state import flatten_state, safetensors_pieces, unflatten_state
from sparkdl.errors import ConfigError, SparkdlError
from sparkdl.io.exchange import Group, all_to_all, gather_numbers, gather_texts
from sparkdl.named_metrics import Kind, NamedMetric, metric_names, named_metric

__all__ = ["Kind", "Metrics", "check_metrics", "higher_is_better", "metric_names"]

_MOST_NUMBERS = 1000  # that one metric may give
_TAKEN = ("loss", "seconds")  # of the history's validation_loss and validation_seconds


# What the caller asked for.


def check_metrics(metrics: Any, kind: Kind = "any") -> None:
    """Raise where ``metrics`` cannot be computed, whatever the data.

    Args:
        metrics: None, a list of names and torchmetrics objects, or a dict from name to one of these.
        kind: What the labels are.

    Raises:
        ConfigError: An unknown name, a name of the other kind, two entries of one name, or an object that is no metric,
            cannot be copied, or hides metrics in a plain list.
    """
    _entries(metrics, kind)


def higher_is_better(metrics: Any) -> dict[str, bool]:
    """Of each entry for which it is known, whether larger is better.

    Args:
        metrics: As `check_metrics` takes it.

    Raises:
        ConfigError: As `check_metrics`.
    """
    known = {
        name: metric.higher if isinstance(metric, NamedMetric) else metric.higher_is_better
        for name, metric in _entries(metrics, "any").items()
    }
    return {name: better for name, better in known.items() if better is not None}


def _entries(metrics: Any, kind: Kind) -> dict[str, NamedMetric | Metric]:
    """The metrics by their names in the history; objects are copies that have seen no rows."""
    if metrics is None:
        return {}
    if isinstance(metrics, str | Metric | MetricCollection) or not isinstance(metrics, Mapping | Sequence):
        raise ConfigError(
            f"metrics={metrics!r} is neither a list nor a dict. Give a list of names and torchmetrics objects, such as "
            "['accuracy'], or a dict from name to one of them."
        )
    by_name = isinstance(metrics, Mapping)
    found: dict[str, NamedMetric | Metric] = {}
    for name, asked in metrics.items() if isinstance(metrics, Mapping) else ((None, entry) for entry in metrics):
        if by_name and (not isinstance(name, str) or not name):
            raise ConfigError(f"metrics has the name {name!r}. Names are text, at least one character.")
        for entry, metric in _resolved(name, asked, kind):
            if entry in found:
                raise ConfigError(
                    f"metrics has two entries named {entry!r}. Give a dict from different names to the metrics."
                )
            if entry in _TAKEN:
                raise ConfigError(
                    f"metrics has an entry named {entry!r}, but the history's validation_{entry} is another number. "
                    "Give it another name."
                )
            found[entry] = metric
    return found


def _resolved(name: str | None, asked: Any, kind: Kind) -> Iterator[tuple[str, NamedMetric | Metric]]:
    """What one entry of ``metrics`` stands for: one metric, or those of a collection."""
    if isinstance(asked, str):
        yield name or asked.lower(), named_metric(asked.lower(), kind)
    elif isinstance(asked, MetricCollection):
        # Apart from each other: its groups, whose members share states, form in the first update.
        for key, metric in asked.items():
            yield f"{name}_{key}" if name else key, _copied(metric)
    elif isinstance(asked, Metric):
        yield name or _snake_case(type(asked).__name__), _copied(asked)
    elif isinstance(asked, type) and issubclass(asked, Metric):
        raise ConfigError(f"metrics holds the class {asked.__name__}. Pass an instance: {asked.__name__}(...).")
    else:
        raise ConfigError(f"metrics holds {asked!r}, which is neither a name nor a torchmetrics.Metric.")


def _copied(metric: Metric) -> Metric:
    kind = type(metric).__name__
    try:
        copied = copy.deepcopy(metric)
    except Exception as error:
        raise ConfigError(
            f"The metric {kind} cannot be copied: {error}. It must be picklable to travel to the executors; keep "
            "locks, sockets and open files out of it."
        ) from error
    for _, module in _within(copied):
        for attribute, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if attribute != "_modules" and any(isinstance(inner, Metric) for inner in held):
                raise ConfigError(
                    f"The metric {kind} keeps metrics in {attribute!r}, a plain {type(value).__name__}, where they "
                    "cannot be found. Keep them in a torch.nn.ModuleList or ModuleDict."
                )
        if isinstance(module, MetricCollection):
            # Metrics of a group share their states, but only from the first update on, which some ranks never see.
            module._enable_compute_groups = False
            module._groups, module._groups_checked = {}, False
    return _adopted(copied)


def _adopted(metric: Metric) -> Metric:
    """The metric, made to leave the other ranks to us, and without rows."""
    for part in _parts(metric).values():
        part.distributed_available_fn = _alone
    _reset(metric)
    return metric


def _alone() -> bool:
    """To torchmetrics there is one process: states are merged here."""
    return False


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# On the ranks.


class Metrics:
    """Metrics of the rows of all ranks: each rank calls `update` with its own, all of them `compute`.

    Args:
        metrics: As `check_metrics` takes it; the caller's objects are copied.
        kind: What the labels are: classes, numbers, or anything, which is then handed on as it is.
        device: Where the outputs will be. States stay there, but travel through the CPU.
        group: Ranks that share the rows; None: all. Without a process group this process is alone.

    Raises:
        ConfigError: As `check_metrics`.
    """

    def __init__(self, metrics: Any, *, kind: Kind, device: torch.device | str = "cpu", group: Group = None) -> None:
        self._kind = kind
        self._device = torch.device(device)
        self._group = group
        entries = _entries(metrics, kind)
        self._names = tuple(entries)
        self._named = {name: entry for name, entry in entries.items() if isinstance(entry, NamedMetric)}
        self._metrics = {name: entry.to(self._device) for name, entry in entries.items() if isinstance(entry, Metric)}
        self._widths: dict[str, int] = {}  # numbers of classes and of targets, from the first rows on
        self._rows = 0

    @torch.inference_mode(False)  # or its states could not be changed outside of it
    @torch.no_grad()
    def update(self, outputs: Any, labels: Tensor | Sequence[Tensor]) -> None:
        """Count some rows; none is fine. Row weights have no part in metrics.

        Args:
            outputs: What the module returned for them.
            labels: One tensor per label column, or the only one.

        Raises:
            ConfigError: A metric cannot take outputs and labels.
        """
        label = labels[0] if not isinstance(labels, Tensor) and len(labels) == 1 else labels
        rows = _num_rows(label) or _num_rows(outputs)
        if not rows or not self._names:
            return
        compared = {kind: self._compared(kind, outputs, label) for kind in self._kinds()}
        given: tuple[Any, Any]
        for name, metric in self._metrics.items():
            try:
                if name in self._named:
                    given = compared[self._named[name].kind]
                elif self._kind == "any":
                    given = (outputs, label)
                else:
                    given = _in_own_type(metric, outputs, *compared[self._kind], kind=self._kind)
                metric.update(*given)
            except Exception as error:
                raise ConfigError(
                    f"The metric {name!r} ({type(metric).__name__}) cannot take outputs {_shape(outputs)} and labels "
                    f"{_shape(label)}: {error}"
                ) from error
        self._rows += rows

    def _kinds(self) -> set[Literal["class", "number"]]:
        kinds = {named.kind for named in self._named.values()}
        return kinds if self._kind == "any" else {self._kind}

    def _compared(self, kind: Literal["class", "number"], outputs: Any, label: Any) -> tuple[Tensor, Tensor]:
        """Probabilities of classes (rows, classes) and labels, or numbers (rows,) or (rows, targets) twice."""
        if kind == "class":
            pair, what = _classes(outputs, label, binary=self._kind == "class"), "(rows, classes) and integers (rows,)"
        else:
            pair, what = _numbers(outputs, label), "numbers of one shape, (rows,) or (rows, targets)"
        if pair is None:
            names = [name for name in self._names if name not in self._named or self._named[name].kind == kind]
            raise ConfigError(
                f"The metrics {', '.join(names)} compare {what}, but the module's output is {_shape(outputs)} and the "
                f"labels are {_shape(label)}. Choose other metrics, or change the module."
            )
        self._build(kind, pair[0].shape[1] if pair[0].ndim > 1 else 1)
        return pair

    def _build(self, kind: str, width: int) -> None:
        """Make the metrics by name, which need to know how many classes or targets there are."""
        if self._widths.setdefault(kind, width) != width:
            raise ConfigError(
                f"The module's output had {self._widths[kind]} columns, and now {width}. Metrics need the same number "
                "for all rows."
            )
        for name, named in self._named.items():
            if named.kind == kind and name not in self._metrics:
                self._metrics[name] = _adopted(named.build(width)).set_dtype(torch.float64).to(self._device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The metrics of the rows of all ranks since the last call, and begin again. A collective of the group.

        A metric that gives several numbers has an entry for each: ``name_0``, ``name_1``, or ``name_key``. Without any
        rows, all are NaN.

        Returns:
            Numbers by name, the same on all ranks.

        Raises:
            ConfigError: On all ranks, where a metric cannot be computed, its states cannot travel, or it gives what is
                no number.
        """
        if not self._names:
            return {}
        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            outcome = self._outcome([self._held()])
        else:
            parts = _gather(_encoded(self._held()), self._group)
            text = json.dumps(self._outcome([_decoded(part) for part in parts]) if parts else {})
            outcome = json.loads(gather_texts(text, self._group)[0])
        self._rows = 0
        for metric in self._metrics.values():
            _reset(metric)
        if "error" in outcome:
            raise ConfigError(outcome["error"])
        values: dict[str, float] = outcome["values"]
        return values

    def _held(self) -> dict[str, Any]:
        """What this rank tells rank 0."""
        try:
            states = {
                name: {path: [part.update_count, _state(part)] for path, part in _parts(metric).items()}
                for name, metric in self._metrics.items()
            }
        except Exception as error:
            return {"rows": self._rows, "fault": str(error)}
        return {"rows": self._rows, "widths": self._widths, "states": states}

    def _outcome(self, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The numbers, or what is wrong, from what all ranks hold, in rank order."""
        ranks = [held for held in ranks if held["rows"]]
        if not ranks:
            return {"values": dict.fromkeys(self._names, math.nan)}
        values: dict[str, float] = {}
        faults = [fault for held in ranks if (fault := held.get("fault"))]
        if faults:
            return {"error": f"What the metrics hold cannot travel between ranks: {faults[0]}"}
        try:
            for held in ranks:
                for kind, width in held["widths"].items():
                    self._build(kind, width)
            for name in self._names:
                for entry, value in self._numbers_of(name, ranks):
                    if entry in values:
                        raise ConfigError(f"Two metrics give the entry {entry!r}. Give them names in a dict.")
                    values[entry] = value
        except ConfigError as error:
            return {"error": str(error)}
        return {"values": values}

    def _numbers_of(self, name: str, ranks: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
        metric = self._metrics[name]
        try:
            for path, part in _parts(metric).items():
                _merge(part, [(held["rows"], *held["states"][name][path]) for held in ranks])
            found = list(_flat(name, metric.compute()))
        except Exception as error:
            raise ConfigError(f"The metric {name!r} ({type(metric).__name__}) cannot be computed: {error}") from error
        if len(found) > _MOST_NUMBERS:
            raise ConfigError(
                f"The metric {name!r} ({type(metric).__name__}) gives {len(found)} numbers, but the history holds at "
                f"most {_MOST_NUMBERS} of one metric. Wrap it in a metric that gives fewer."
            )
        return found


def _classes(outputs: Any, label: Any, *, binary: bool) -> tuple[Tensor, Tensor] | None:
    """Probabilities in float64, as `sparkdl.predict` makes them from the same scores, and labels; None: unsuited."""
    if not isinstance(outputs, Tensor) or not isinstance(label, Tensor) or outputs.ndim not in (1, 2):
        return None
    label = label[:, 0] if label.ndim == 2 and label.shape[1] == 1 else label
    one_logit = outputs.ndim == 1 or outputs.shape[1] == 1
    if label.ndim != 1 or len(label) != len(outputs) or (not binary and (one_logit or label.is_floating_point())):
        return None
    scores = outputs.double()
    if one_logit:
        logit = scores.reshape(-1, 1)
        raw = torch.cat([-logit, logit], 1)
        chance = torch.logaddexp(torch.zeros_like(raw), -raw).neg().exp()
    else:
        chance = scores.softmax(1)
    label = label.long()
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= chance.shape[1]:
        raise ConfigError(
            f"The labels of validation rows lie between {low} and {high}, but the module tells {chance.shape[1]} "
            "classes apart. Labels are numbers from 0 on, below the number of the module's outputs."
        )
    return chance, label


def _numbers(outputs: Any, label: Any) -> tuple[Tensor, Tensor] | None:
    """Outputs and labels in float64, without a second dimension of one target; None: unsuited."""
    if not isinstance(outputs, Tensor) or not isinstance(label, Tensor):
        return None
    values, labels = (
        (tensor[:, 0] if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor).double() for tensor in (outputs, label)
    )
    return (values, labels) if values.shape == labels.shape and values.ndim in (1, 2) else None


def _in_own_type(
    metric: Metric, outputs: Tensor, values: Tensor, labels: Tensor, *, kind: Kind
) -> tuple[Tensor, Tensor]:
    """What a torchmetrics object gets: in the module's own type, but at least float32, which its states are."""
    values = values.to(torch.promote_types(outputs.dtype, torch.float32))
    if kind == "number":
        return values, labels.to(values.dtype)
    if _is_binary(metric) and values.shape[1] > 2:  # the curves of torchmetrics do not look at shapes
        raise ConfigError(f"it is for two classes, but there are {values.shape[1]}.")
    if values.shape[1] == 2 and any(_is_binary(part) for part in _parts(metric).values()):
        values = values[:, 1]
    return values, labels


def _is_binary(metric: Metric) -> bool:
    return any(base.__name__.startswith("Binary") for base in type(metric).__mro__)


def _num_rows(value: Any) -> int:
    """Rows of the first tensor in a value; 0 where there is none."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((rows for entry in entries if (rows := _num_rows(entry))), 0)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shape(entry) for entry in value) + ")"
    return f"of type {type(value).__name__}"


# States. Torchmetrics has no public words for reductions, defaults and for setting the number of updates.


def _within(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all inside it, by path. `named_modules` hashes a metric, and with it every value that it holds."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _within(child, f"{path}.{name}")


def _parts(metric: Metric) -> dict[str, Metric]:
    """The metric and those that it wraps, by path."""
    return {path: module for path, module in _within(metric) if isinstance(module, Metric)}


def _reset(metric: Metric) -> None:
    parts = _parts(metric).values()
    for part in parts:
        for name, default in part._defaults.items():
            if isinstance(default, list):  # what it was reduced to cannot be emptied by reset()
                setattr(part, name, [])
    for part in parts:
        part.reset()


def _state(metric: Metric) -> dict[str, Any]:
    """The states by name; lists to be concatenated are one tensor already."""

    def packed(name: str, value: Any) -> Any:
        joined = metric._reductions[name] == dim_zero_cat and isinstance(value, list) and len(value) > 1
        return [dim_zero_cat(value)] if joined else value

    return {name: packed(name, value) for name, value in metric.metric_state.items()}


def _merge(metric: Metric, ranks: Sequence[tuple[int, int, Mapping[str, Any]]]) -> None:
    """Give a metric the states of all ranks: of each its rows, its updates and its states, in rank order.

    What one rank alone holds is left as it is, as in one process.
    """
    updated = [(rows, state) for rows, updates, state in ranks if updates]
    if not updated:
        return
    for name, reduction in metric._reductions.items():
        values = [state[name] for _, state in updated]
        is_list = isinstance(values[0], list)
        merged: Any = values[0]
        if len(values) > 1 and is_list:
            merged = [value for held in values for value in held]
            # Concatenated, they would be no list any more; in one process they are one, too.
            if callable(reduction) and reduction != dim_zero_cat and merged:
                merged = reduction(merged)
        elif len(values) > 1:
            merged = torch.stack(values)
            if reduction == dim_zero_mean:
                share = torch.tensor([rows for rows, _ in updated], dtype=torch.float64, device=merged.device)
                share = (share / share.sum()).reshape(-1, *[1] * (merged.ndim - 1))
                merged = (merged * share).sum(0).to(merged.dtype)
            elif callable(reduction):
                merged = reduction(merged)
        device = torch.device("cpu") if is_list and metric.compute_on_cpu else metric.device
        setattr(metric, name, _moved(merged, device))
    metric._update_count = sum(updates for _, updates, _ in ranks)
    metric._computed = None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in what a metric returned, each with its own name."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(f"{name}_{key}", entry)
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _flat(f"{name}_{number}", entry)
    elif isinstance(value, int | float):
        yield name, float(value)
    else:
        raise ConfigError(f"it gives {value!r}, which is no number.")


def _encoded(held: Mapping[str, Any]) -> bytes:
    """What a rank holds, as a safetensors file with its structure as one more tensor."""
    try:
        tensors, structure = flatten_state(held)
    except SparkdlError as error:
        tensors, structure = flatten_state({"rows": held["rows"], "fault": str(error)})
    text = bytearray(json.dumps(structure).encode())
    tensors["structure"] = torch.frombuffer(text, dtype=torch.uint8)
    return b"".join(bytes(piece) for piece in safetensors_pieces(tensors))


def _decoded(data: bytes) -> dict[str, Any]:
    tensors = safetensors.torch.load(data)
    structure = json.loads(tensors.pop("structure").numpy().tobytes())
    held: dict[str, Any] = unflatten_state(tensors, structure)
    return held


def _gather(data: bytes, group: Group) -> list[bytes]:
    """The bytes of all ranks on rank 0, in rank order; nothing on the others."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    counts = gather_numbers([len(own)], group)[:, 0].tolist()
    first = dist.get_rank(group) == 0
    sent = [len(own), *[0] * (len(counts) - 1)]
    received = counts if first else [0] * len(counts)
    arrived = all_to_all(own[:, None], sent, received, group)
    return [part.cpu().numpy().tobytes() for part in arrived.split(counts)] if first else []
