"""What ranks tell each other besides tensors: values as JSON, and behind it the bytes of tensors and arrays. Never a
pickle, which could run code on every rank: whoever reaches the ranks' ports could send one.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch

# Bytes that say how long the JSON is.
_LENGTH = 8


def to_bytes(item: Any) -> bytes:
    """Return a message that `from_bytes` turns into an equal item.

    Args:
        item: None, a bool, int, float, str or bytes, a tensor (of any device and dtype), a NumPy array or scalar; or a
            list, tuple or dict of these, however deep.

    Raises:
        TypeError: there is something else in it; names its type.
    """
    payload: list[bytes] = []
    text = json.dumps(_describe(item, payload)).encode()
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *payload])


def from_bytes(message: bytes) -> Any:
    """Return what `to_bytes` was given; tensors are on the CPU.

    Raises:
        ValueError: no rank of ours has written that.
    """
    end = _LENGTH + int.from_bytes(message[:_LENGTH], "little")
    try:
        return _Reader(message, end).restore(json.loads(message[_LENGTH:end]))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"a message of {len(message)} bytes between ranks is none of ours ({message[:40]!r}...: {reason}); "
            "somebody else may be sending to the ranks' ports"
        ) from error


def _describe(item: Any, payload: list[bytes]) -> Any:
    """Return what JSON can say of an item; the rest is appended to `payload`. Whatever JSON has no word for becomes an
    object with one entry, its kind.
    """
    if isinstance(item, (np.ndarray, np.generic)):
        item = np.asarray(item)
        if item.dtype.hasobject:
            raise TypeError("ranks cannot exchange arrays of objects")
        payload.append(item.tobytes())
        return {"array": [item.dtype.str, item.shape]}
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    if isinstance(item, list):
        return [_describe(part, payload) for part in item]
    if isinstance(item, tuple):
        return {"tuple": [_describe(part, payload) for part in item]}
    if isinstance(item, dict):
        return {"dict": [[_describe(part, payload) for part in pair] for pair in item.items()]}
    if isinstance(item, bytes):
        payload.append(item)
        return {"bytes": len(item)}
    if isinstance(item, torch.Tensor):
        payload.append(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"tensor": [str(item.dtype).removeprefix("torch."), item.shape]}
    raise TypeError(f"ranks cannot exchange a {type(item).__name__}")


class _Reader:
    """Reads the payload in the order in which it was written."""

    def __init__(self, message: bytes, position: int):
        self._message, self._position = message, position

    def restore(self, told: Any) -> Any:
        if isinstance(told, list):
            return [self.restore(part) for part in told]
        if not isinstance(told, dict):
            return told
        ((kind, content),) = told.items()
        kinds = {
            "tuple": self._tuple,
            "dict": self._dict,
            "bytes": self._bytes,
            "array": self._array,
            "tensor": self._tensor,
        }
        return kinds[kind](content)

    def _tuple(self, parts: list[Any]) -> tuple:
        return tuple(self.restore(parts))

    def _dict(self, pairs: list[list[Any]]) -> dict:
        return dict(self.restore(pairs))

    def _bytes(self, length: int) -> bytes:
        begin, self._position = self._position, self._position + length
        if not begin <= self._position <= len(self._message):
            raise ValueError(f"{length} bytes are not there")
        return self._message[begin : self._position]

    def _array(self, told: list[Any]) -> np.ndarray | np.generic:
        dtype, shape = np.dtype(told[0]), told[1]
        # In memory of its own, which may be written. An array without axes comes back as a scalar.
        content = bytearray(self._bytes(dtype.itemsize * math.prod(shape)))
        return np.frombuffer(content, dtype).reshape(shape)[()]

    def _tensor(self, told: list[Any]) -> torch.Tensor:
        result = torch.empty(told[1], dtype=getattr(torch, told[0]))
        content = bytearray(self._bytes(result.numel() * result.element_size()))
        if content:
            result.view(-1).view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
        return result
