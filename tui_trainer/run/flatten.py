"""State of any shape as tensors by name and a JSON skeleton: what pickle would do, without code.

Loading it can make tensors, numbers, text and containers, and nothing else.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import torch

Json = Any


class CannotFlatten(TypeError):
    """A value that is neither a tensor nor plain data."""


def flatten(value: Any) -> tuple[Json, dict[str, torch.Tensor]]:
    """A JSON skeleton of `value`, and its tensors (on the CPU) under the names that it mentions."""
    tensors: dict[str, torch.Tensor] = {}
    return _flatten(value, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    match value:
        case None | bool() | str():
            return value
        case np.generic():
            return {"scalar": [value.dtype.str, _flatten(value.item(), path, tensors)]}
        case int():
            return int(value)
        case float():
            return value if math.isfinite(value) else {"float": repr(float(value))}
        case torch.Tensor():
            return {"tensor": _keep(value, path, tensors)}
        case np.ndarray():
            # Any dtype of any byte order, as its bytes: torch knows fewer dtypes than numpy.
            if value.dtype.hasobject:
                raise CannotFlatten(f"{path or 'it'} is an array of Python objects")
            data = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
            name = _keep(data, path, tensors)
            return {"array": [name, value.dtype.str, list(value.shape)]}
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case dict():
            items = [
                [_flatten(key, path, tensors), _flatten(held, f"{path}/{key}", tensors)]
                for key, held in value.items()
            ]
            return {"dict": items}
        case list():
            return [_flatten(held, f"{path}/{i}", tensors) for i, held in enumerate(value)]
        case tuple():
            return {
                "tuple": [_flatten(held, f"{path}/{i}", tensors) for i, held in enumerate(value)]
            }
        case set() | frozenset():
            return {"set": [_flatten(held, path, tensors) for held in sorted(value)]}
    raise CannotFlatten(f"{path or 'it'} is a {type(value).__name__}, which cannot be written")


def _keep(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    name = f"{len(tensors):05}{path}"
    # A copy of its own: tied tensors share storage, which the file format refuses.
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return name


def unflatten(skeleton: Json, tensors: dict[str, torch.Tensor]) -> Any:
    """The value again. Raises KeyError or ValueError when the two do not belong together."""
    match skeleton:
        case list():
            return [unflatten(held, tensors) for held in skeleton]
        case {"scalar": [dtype, value]}:
            return np.dtype(dtype).type(unflatten(value, tensors))
        case {"float": text}:
            return float(text)
        case {"tensor": name}:
            return tensors[name]
        case {"array": [name, dtype, shape]}:
            return np.frombuffer(tensors[name].numpy().tobytes(), dtype).reshape(shape).copy()
        case {"bytes": text}:
            return base64.b64decode(text)
        case {"dict": items}:
            return {unflatten(k, tensors): unflatten(v, tensors) for k, v in items}
        case {"tuple": held}:
            return tuple(unflatten(part, tensors) for part in held)
        case {"set": held}:
            return {unflatten(part, tensors) for part in held}
        case dict():
            raise ValueError(f"{next(iter(skeleton), '{}')} is not part of a skeleton")
    return skeleton
