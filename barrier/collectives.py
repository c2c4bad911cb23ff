"""Collective operators on tensors, and on nested dicts, lists, tuples and named tuples of tensors.

Every function is a collective of ``group`` (None: the default one): all its ranks call it, in the same order, with
trees of the same paths, dtypes and shapes. The ranks first compare what they were given, 40 bytes each, so that a
mismatch is an error on all of them and not a hang. Then the leaves travel, small ones of one dtype in one message.

Arguments are not changed, and results share no memory with them: they are plain tensors without gradients, each of
dtype and device of its leaf. Sums over ranks are rounded once: floats of fewer than 32 bits are summed in 32.

With ``async_op=True`` the ranks still compare before the call returns, but do not wait for the tensors; see `Pending`.
"""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from sparkdl.errors import ConfigError

__all__ = ["Group", "Op", "Pending", "all_gather", "all_reduce", "broadcast", "reduce_scatter"]

Group = dist.ProcessGroup | None
Op = Literal["sum", "mean", "product", "min", "max"]
Tree = TypeVar("Tree")
Result = TypeVar("Result")

MESSAGE_BYTES = 4 << 20
"""Leaves share a message up to this size; a larger leaf has one of its own."""

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
_SAME = (torch.float64, torch.float32, torch.int64, torch.int32)
_SMALL_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)
_ORDERED = {torch.float32: torch.int32, torch.float64: torch.int64}


class Pending(Generic[Result]):
    """What an asynchronous collective will give."""

    def __init__(self, works: Sequence[dist.Work], finish: Callable[[], Result]) -> None:
        self._works = works
        self._finish = finish
        self._result: list[Result] = []

    def done(self) -> bool:
        """True where `wait` would not wait for a peer any more."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> Result:
        """The result; the same one at every call.

        Raises:
            RuntimeError: A peer went away, or the group's timeout has passed.
        """
        if not self._result:
            for work in self._works:
                work.wait()
            self._result.append(self._finish())
        return self._result[0]


@overload
def all_reduce(
    tree: Tree, op: Op = ..., *, weight: float | None = ..., group: Group = ..., async_op: Literal[False] = ...
) -> Tree: ...


@overload
def all_reduce(
    tree: Tree, op: Op = ..., *, weight: float | None = ..., group: Group = ..., async_op: Literal[True]
) -> Pending[Tree]: ...


def all_reduce(
    tree: Tree, op: Op = "sum", *, weight: float | None = None, group: Group = None, async_op: bool = False
) -> Tree | Pending[Tree]:
    """Each leaf reduced over all ranks, on all ranks.

    Integers wrap around, and have no mean; of booleans there are only "min" (all ranks) and "max" (any rank). A NaN of
    any rank makes "min" and "max" NaN.

    Args:
        tree: A tensor, or a tree of tensors, of any shapes.
        op: "sum", "mean", "product", "min" or "max".
        weight: This rank's weight in a weighted mean, sum_r(weight_r x_r) / sum_r(weight_r), such as its number of
            rows. A rank of weight 0 adds nothing, even where its tensors hold NaN. All ranks give one, or none.
        group: The ranks that take part.
        async_op: Return a `Pending` at once.

    Raises:
        ConfigError: On all ranks, where trees or arguments differ or are wrong, or all weights are 0.
    """
    call = _Call("all_reduce", tree, group)
    forms = {"op": str(op), "weight": "none" if weight is None else "given"}
    fault = call.fault or _fault_of_op(op, call.leaves) or _fault_of_weight(op, weight)
    total = call.agree(forms, fault, 1.0 if weight is None else weight)
    parts = [_to_wire(leaf, op, weight)[None] for leaf in call.leaves]

    def send(buffer: Tensor) -> tuple[Tensor, Any]:
        return buffer, dist.all_reduce(buffer, _OPS[op], group=group, async_op=True)

    def receive(leaves: list[Tensor]) -> Tree:
        return call.tree([_from_wire(part[0], leaf, op, total) for part, leaf in zip(leaves, call.leaves, strict=True)])

    pending = call.start(parts, send, receive)
    return pending if async_op else pending.wait()


@overload
def reduce_scatter(tree: Tree, op: Op = ..., *, group: Group = ..., async_op: Literal[False] = ...) -> Tree: ...


@overload
def reduce_scatter(tree: Tree, op: Op = ..., *, group: Group = ..., async_op: Literal[True]) -> Pending[Tree]: ...


def reduce_scatter(tree: Tree, op: Op = "sum", *, group: Group = None, async_op: bool = False) -> Tree | Pending[Tree]:
    """Each leaf reduced over all ranks, of which every rank gets its part: as `all_reduce`, then cut into as many.

    Args:
        tree: A tensor, or a tree of tensors, of shapes (ranks * n, ...); of the result, rank r gets rows r n
            to (r + 1) n.
        op: "sum", "mean", "product", "min" or "max", as in `all_reduce`.
        group: The ranks that take part.
        async_op: Return a `Pending` at once.

    Raises:
        ConfigError: On all ranks, before anything is sent: trees or arguments differ or are wrong, or a leading
            dimension cannot be divided among the ranks.
    """
    call = _Call("reduce_scatter", tree, group)
    total = call.agree({"op": str(op)}, call.fault or _fault_of_op(op, call.leaves) or call.fault_of_division(), 1.0)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = [_to_wire(leaf, op, None) for leaf in call.leaves]
    parts = [part.view(size, len(part) // size) for part in parts]

    def send(buffer: Tensor) -> tuple[Tensor, Any]:
        if buffer.device.type == "cpu":  # gloo's own is this all_reduce, behind a work that never says it is done
            return buffer[rank : rank + 1], dist.all_reduce(buffer, _OPS[op], group=group, async_op=True)
        result = torch.empty_like(buffer[:1])
        return result, dist.reduce_scatter(result[0], list(buffer), _OPS[op], group=group, async_op=True)

    def receive(leaves: list[Tensor]) -> Tree:
        own = [leaf[: len(leaf) // size] for leaf in call.leaves]
        return call.tree([_from_wire(part[0], leaf, op, total) for part, leaf in zip(leaves, own, strict=True)])

    pending = call.start(parts, send, receive)
    return pending if async_op else pending.wait()


@overload
def broadcast(tree: Tree, src: int = ..., *, group: Group = ..., async_op: Literal[False] = ...) -> Tree: ...


@overload
def broadcast(tree: Tree, src: int = ..., *, group: Group = ..., async_op: Literal[True]) -> Pending[Tree]: ...


def broadcast(tree: Tree, src: int = 0, *, group: Group = None, async_op: bool = False) -> Tree | Pending[Tree]:
    """The tree of rank ``src``, on all ranks; tensors of any dtype, to the bit.

    Args:
        tree: A tensor, or a tree of tensors; on other ranks than ``src`` only their dtypes and shapes matter.
        src: Rank in the group.
        group: The ranks that take part.
        async_op: Return a `Pending` at once.

    Raises:
        ConfigError: On all ranks, where trees or arguments differ or are wrong.
    """
    call = _Call("broadcast", tree, group)
    size = dist.get_world_size(group)
    fault = None if 0 <= src < size else f"src={src}, but there are {size} ranks. Give one of 0 to {size - 1}."
    call.agree({"src": str(src)}, call.fault or fault, 1.0)
    parts = [_bytes(leaf)[None] for leaf in call.leaves]

    def send(buffer: Tensor) -> tuple[Tensor, Any]:
        return buffer, dist.broadcast(buffer, group_src=src, group=group, async_op=True)

    def receive(leaves: list[Tensor]) -> Tree:
        return call.tree([_from_bytes(part[0], leaf) for part, leaf in zip(leaves, call.leaves, strict=True)])

    pending = call.start(parts, send, receive)
    return pending if async_op else pending.wait()


@overload
def all_gather(tree: Tree, *, group: Group = ..., async_op: Literal[False] = ...) -> list[Tree]: ...


@overload
def all_gather(tree: Tree, *, group: Group = ..., async_op: Literal[True]) -> Pending[list[Tree]]: ...


def all_gather(tree: Tree, *, group: Group = None, async_op: bool = False) -> list[Tree] | Pending[list[Tree]]:
    """The trees of all ranks, in rank order, on all ranks; tensors of any dtype, to the bit.

    Args:
        tree: A tensor, or a tree of tensors, of the same shapes on all ranks.
        group: The ranks that take part.
        async_op: Return a `Pending` at once.

    Raises:
        ConfigError: On all ranks, where their trees differ.
    """
    call = _Call("all_gather", tree, group)
    call.agree({}, call.fault, 1.0)
    size = dist.get_world_size(group)
    parts = [_bytes(leaf)[None] for leaf in call.leaves]

    def send(buffer: Tensor) -> tuple[Tensor, Any]:
        result = buffer.new_empty(size, buffer.shape[1])
        return result, dist.all_gather(list(result), buffer[0], group=group, async_op=True)

    def receive(leaves: list[Tensor]) -> list[Tree]:
        return [
            call.tree([_from_bytes(part[rank], leaf) for part, leaf in zip(leaves, call.leaves, strict=True)])
            for rank in range(size)
        ]

    pending = call.start(parts, send, receive)
    return pending if async_op else pending.wait()


# What the ranks were given, and whether it fits.


class _Call(Generic[Tree]):
    """The leaves of one rank's tree, in the order of their paths: dicts of the same keys may be filled in any order."""

    def __init__(self, name: str, tree: Tree, group: Group) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                f"{name} needs a process group, and there is none. Call it in a function that sparkdl.launch runs in "
                "every rank, or after torch.distributed.init_process_group."
            )
        self._name = name
        self._group = group
        # Where tensors must lie to travel.
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        pairs, self._spec = tree_flatten_with_path(tree)
        paths = [keystr(path) for path, _ in pairs]
        self._order = sorted(range(len(pairs)), key=paths.__getitem__)
        self._paths = [paths[number] for number in self._order]
        leaves = [pairs[number][1] for number in self._order]
        faults = (_fault_of_leaf(path, leaf) for path, leaf in zip(self._paths, leaves, strict=True))
        self.fault = next(filter(None, faults), None)
        self.leaves: list[Tensor] = (
            [] if self.fault else [leaf.detach().resolve_conj().resolve_neg() for leaf in leaves]
        )

    def tree(self, leaves: Sequence[Tensor]) -> Tree:
        """Leaves in the order of their paths as a tree like the one given."""
        given = dict(zip(self._order, leaves, strict=True))
        return tree_unflatten([given[number] for number in range(len(given))], self._spec)  # type: ignore[no-any-return]

    def fault_of_division(self) -> str | None:
        size = dist.get_world_size(self._group)
        for path, leaf in zip(self._paths, self.leaves, strict=True):
            if leaf.dim() == 0 or len(leaf) % size:
                return (
                    f"{_place(path)} has shape {tuple(leaf.shape)}, whose leading dimension cannot be divided among "
                    f"{size} ranks. Pad it to a multiple of {size}."
                )
        return None

    def agree(self, forms: Mapping[str, str], fault: str | None, weight: float) -> float:
        """Raise on all ranks where one has a fault or another call, argument or tree than most have.

        Returns:
            The weights of all ranks, added up.
        """
        leaves = zip(self._paths, self.leaves, strict=False)
        shapes = {
            _place(path): f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}" for path, leaf in leaves
        }
        text = json.dumps([fault, {"the call": self._name, **forms, **shapes}])
        own = hashlib.sha256(text.encode()).digest() + struct.pack("d", math.nan if fault else weight)
        table = torch.stack(self._gather(torch.from_numpy(np.frombuffer(own, np.int64).copy()))).numpy()
        digests, weights = table[:, :4], np.ascontiguousarray(table[:, 4]).view(np.float64)
        if fault is not None or bool((digests != digests[0]).any()):
            raise ConfigError(f"{self._name}: {self._difference(text)}")
        total = float(weights.sum())
        if total == 0:
            raise ConfigError(
                f"{self._name}: the weights of all {len(table)} ranks are 0, so that there is no mean. Give at least "
                "one rank a weight above 0."
            )
        return total

    def _difference(self, text: str) -> str:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._gather(torch.tensor([len(data)]))]
        padded = self._gather(torch.nn.functional.pad(data, (0, max(lengths) - len(data))))
        texts = [part[:length].numpy().tobytes().decode() for part, length in zip(padded, lengths, strict=True)]
        accounts = [json.loads(text) for text in texts]
        for rank, (found, _) in enumerate(accounts):
            if found is not None:
                return f"rank {rank}: {found}"
        usual = texts.index(Counter(texts).most_common(1)[0][0])
        odd = next(rank for rank, text in enumerate(texts) if text != texts[usual])
        theirs, ours = accounts[odd][1], accounts[usual][1]
        label = next(label for label in [*ours, *theirs] if ours.get(label) != theirs.get(label))
        return (
            f"{label} is {theirs.get(label, 'missing')} on rank {odd}, but {ours.get(label, 'missing')} on rank "
            f"{usual}. All ranks must call it with the same."
        )

    def _gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on the CPU."""
        own = own.to(self._device)
        each = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(each, own, group=self._group)
        return [tensor.cpu() for tensor in each]

    @torch.no_grad()
    def start(
        self,
        parts: Sequence[Tensor],
        send: Callable[[Tensor], tuple[Tensor, Any]],
        receive: Callable[[list[Tensor]], Result],
    ) -> Pending[Result]:
        """Send parts of shape (rows, values), as many rows each, and have what comes given to ``receive``.

        Args:
            parts: Of each leaf, what travels.
            send: From one message, (rows, values of its leaves), to where the result will be, of as many columns, and
                the work that brings it there.
            receive: From the columns of each leaf, (rows of the result, values), to the result of the call.
        """
        messages = _messages(parts)
        widths = [part.shape[1] for part in parts]
        sent = [send(torch.cat([parts[number].to(self._device) for number in numbers], 1)) for numbers in messages]

        @torch.no_grad()
        def finish() -> Result:
            leaves: dict[int, Tensor] = {}
            for numbers, (result, _) in zip(messages, sent, strict=True):
                columns = result.split([widths[number] for number in numbers], 1)
                # Not as views: a leaf that is kept, or written to a file, is not to bring its message along.
                alone = columns[0].nbytes == result.untyped_storage().nbytes()
                leaves |= zip(numbers, columns if alone else [c.clone() for c in columns], strict=True)
            return receive([leaves[number] for number in range(len(widths))])

        return Pending([work for _, work in sent], finish)


def _messages(parts: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the parts that travel together: of one dtype, and up to `MESSAGE_BYTES`."""
    messages: list[list[int]] = []
    newest: dict[torch.dtype, tuple[list[int], int]] = {}
    for number, part in enumerate(parts):
        if part.nbytes > MESSAGE_BYTES:
            messages.append([number])
            continue
        numbers, held = newest.get(part.dtype, (None, 0))
        if numbers is None or held + part.nbytes > MESSAGE_BYTES:
            numbers, held = [], 0
            messages.append(numbers)
        numbers.append(number)
        newest[part.dtype] = numbers, held + part.nbytes
    return messages


def _place(path: str) -> str:
    return f"the leaf at {path}" if path else "the tensor"


def _fault_of_leaf(path: str, leaf: Any) -> str | None:
    if not isinstance(leaf, Tensor):
        return f"{_place(path)} is {'None' if leaf is None else f'of type {type(leaf).__name__}'}. Give tensors."
    if leaf.layout != torch.strided or leaf.is_quantized or is_traceable_wrapper_subclass(leaf):
        kind = type(leaf).__name__ if leaf.layout == torch.strided else str(leaf.layout).removeprefix("torch.")
        return f"{_place(path)} is no plain tensor ({kind}). Give dense ones: to_dense(), full_tensor()."
    return None


def _fault_of_op(op: str, leaves: Sequence[Tensor]) -> str | None:
    if op not in _OPS:
        return f"op={op!r} is none of {', '.join(map(repr, _OPS))}. Use one of them."
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bool and op not in ("min", "max"):
            return f"the {op} of {name} is not defined. Use op='min' (all ranks), op='max' (any rank), or integers."
        if dtype.is_complex and op not in ("sum", "mean"):
            return f"the {op} of {name} is not supported. Use op='sum' or op='mean', or real tensors."
        if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
            return f"there is no mean of {name}. Convert it to floats first, with .float() or .double()."
        if dtype in (torch.uint64, torch.complex32):
            return f"{name} cannot be reduced. Convert it to another dtype first."
    return None


def _fault_of_weight(op: str, weight: float | None) -> str | None:
    if weight is None:
        return None
    if op != "mean":
        return f"weight={weight} with op={op!r}. Weights make a weighted mean: use op='mean', or leave weight out."
    if not 0 <= weight < math.inf:
        return f"weight={weight}. Give a finite number of at least 0."
    return None


# From leaves to what travels, and back: flat, contiguous tensors.


def _bytes(leaf: Tensor) -> Tensor:
    return leaf.contiguous().view(-1).view(torch.uint8)


def _from_bytes(values: Tensor, leaf: Tensor) -> Tensor:
    return values.view(leaf.dtype).view(leaf.shape).to(leaf.device)


def _to_wire(leaf: Tensor, op: str, weight: float | None) -> Tensor:
    """The values of a leaf in a dtype that every backend reduces: 32 or 64 bits."""
    values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    if values.dtype not in _SAME:
        small = values.dtype in _SMALL_INTEGERS
        values = values.to(torch.int32 if small else torch.float32 if values.is_floating_point() else torch.int64)
    values = values.contiguous().view(-1)
    if weight is not None:
        values = values * weight if weight else torch.zeros_like(values)
    return _ordered(values, op) if op in ("min", "max") and values.is_floating_point() else values


def _from_wire(values: Tensor, leaf: Tensor, op: str, total: float) -> Tensor:
    if op in ("min", "max") and leaf.is_floating_point():
        floats = {integer: real for real, integer in _ORDERED.items()}[values.dtype]
        values = _mirrored(values).view(floats)
    if op == "mean":
        values = values / total
    if leaf.is_complex():
        values = torch.view_as_complex(values.view(-1, 2))
    return values.to(leaf.device, leaf.dtype).view(leaf.shape)


def _ordered(values: Tensor, op: str) -> Tensor:
    """Floats as integers in the same order, with NaN at the end that ``op`` looks for.

    gloo compares floats with ``<``, so that a NaN would win or lose depending on the rank that has it.
    """
    integers = _ORDERED[values.dtype]
    limits = torch.iinfo(integers)
    return _mirrored(values.view(integers)).masked_fill(values.isnan(), limits.max if op == "max" else limits.min)


def _mirrored(values: Tensor) -> Tensor:
    """The bits of negative floats rise with their magnitude; as integers they have to fall. Its own inverse."""
    return torch.where(values < 0, values ^ torch.iinfo(values.dtype).max, values)
