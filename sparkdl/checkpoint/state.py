"""State as tensors and JSON: nested values taken apart and put together again, and tensors as a safetensors file."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparkdl.errors import CheckpointError
from sparkdl.storage import reason

__all__ = ["encode_facts", "flatten_state", "safetensors_pieces", "unflatten_state"]

_PIECE = 16 << 20  # bytes of one read or write
# Types that safetensors has had from the beginning; tensors of others are stored as their bytes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def flatten_state(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dicts, lists and tuples, and all the rest as JSON values.

    Floats are kept bit for bit. A tensor that appears twice (tied weights) is there once. Nothing is copied unless it
    has to be: the tensors are detached views, of any strides and on any device.

    Args:
        nested: Dicts (also of a subclass, such as `OrderedDict`; they come back as dict) with str or int keys, lists,
            tuples, dense tensors and parameters, bool, int, float, str and None.

    Returns:
        Tensors by name, all of types that safetensors has, and the structure for `unflatten_state`.

    Raises:
        CheckpointError: Anything else, named by its path.
    """
    flattening = _Flattening()
    structure = flattening.encode(nested, "")
    return flattening.tensors, structure


def unflatten_state(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """What `flatten_state` was given; parameters come back as tensors.

    Args:
        tensors: Tensors by name.
        structure: As `flatten_state` returned it, or after a round trip through JSON.

    Raises:
        CheckpointError: The two do not belong together, or are not from `flatten_state`.
    """
    try:
        return _decode(structure, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"The structure of a checkpoint does not fit its tensors: {type(error).__name__}: {reason(error)}. "
            "Was it written by another version of sparkdl?"
        ) from error


class _Flattening:
    """Collects tensors on the way through nested values."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._encoded: dict[tuple[Any, ...], dict[str, Any]] = {}

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind in (list, tuple):
            items = [self.encode(item, _join(path, index)) for index, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if isinstance(value, dict):
            for key in value:
                if type(key) not in (str, int):
                    raise CheckpointError(
                        f"{path or 'the state'} has the key {key!r}, a {type(key).__name__}, but checkpoints hold "
                        "dicts with str or int keys. Convert the key."
                    )
            encoded = [[key, self.encode(item, _join(path, key))] for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(encoded) if plain else {"$items": encoded}
        if kind in (Tensor, torch.nn.Parameter):
            return self._tensor(value, path)
        raise CheckpointError(
            f"{path or 'the state'} is a {kind.__name__}, but checkpoints hold dicts, lists, tuples, tensors, numbers, "
            "text and None. Convert it, or leave it out of the state."
        )

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            found = "without data" if tensor.is_meta else "quantized" if tensor.is_quantized else f"{tensor.layout}"
            raise CheckpointError(
                f"{path or 'the state'} is a tensor that is not dense ({found}). Convert it to a plain one."
            )
        # Not id(): two calls of state_dict(), or two names in it, give two objects for one tensor.
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), *view)
        if place not in self._encoded:
            # A name for people and other tools; text that UTF-8 cannot hold is escaped.
            name = (path or "state").encode("utf-8", "backslashreplace").decode()
            while name in self.tensors or name == "__metadata__":
                name += "'"
            values = tensor.detach().resolve_conj().resolve_neg()
            encoded: dict[str, Any] = {"$tensor": name}
            if values.dtype not in _DTYPES:
                encoded.update(dtype=str(values.dtype).removeprefix("torch."), shape=list(values.shape))
                values = values.contiguous().reshape(-1).view(torch.uint8)
            self.tensors[name] = values
            self._encoded[place] = encoded
        return self._encoded[place]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    match tag:
        case None:
            return {key: _decode(item, tensors) for key, item in value.items()}
        case "$float":
            return struct.unpack(">d", bytes.fromhex(value[tag]))[0]
        case "$tuple":
            return tuple(_decode(item, tensors) for item in value[tag])
        case "$items":
            return {key: _decode(item, tensors) for key, item in value[tag]}
        case "$tensor":
            tensor = tensors[value[tag]]
            if "dtype" not in value:
                return tensor
            dtype = getattr(torch, value["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{value['dtype']!r} is no type of tensors")
            # A clone, because the bytes may lie where no element of this type can begin.
            return tensor.clone().view(dtype).reshape(value["shape"])
        case _:
            raise ValueError(f"{tag!r} is not known")


def encode_facts(facts: Mapping[str, Any]) -> Any:
    """Facts as JSON values; `unflatten_state` without tensors gives them back.

    Raises:
        CheckpointError: They hold what is no plain value.
    """
    flattening = _Flattening()
    encoded = flattening.encode(dict(facts), "facts")
    if flattening.tensors:
        raise CheckpointError(f"{next(iter(flattening.tensors))} is a tensor. Facts are plain values: use .tolist().")
    return encoded


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The pieces of a file as https://huggingface.co/docs/safetensors lays it out; contiguous CPU tensors not copied.

    The library's own ``save`` copies everything while it holds the interpreter's lock: the training would stand still.
    """
    ordered = sorted(tensors.items(), key=lambda named: -named[1].element_size())  # so that every tensor lies aligned
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            for piece in tensor.cpu().contiguous().reshape(-1).view(torch.uint8).split(_PIECE):
                yield piece.numpy()
