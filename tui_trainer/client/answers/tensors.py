"""Tensors of a run for a viewer: found by name, decoded, and written to a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tui_trainer.protocol.formatting import scalar
from tui_trainer.protocol.heat_map import HeatMap
from tui_trainer.protocol.inspection import (
    Inspected,
    InspectionRequest,
    ReadTensor,
    TensorData,
    TensorInfo,
    TensorKind,
    TensorRef,
)
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.errors import RunError

MAX_SUGGESTIONS = 8
KIND_NAMES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "state": "optimizer state",
    "buffer": "buffers",
    "saved": "saved for backward",
}
"""Display names of the values of `HeldBytes.kind`."""
ENDINGS = (".npy", ".safetensors")


def find_tensor(
    tensors: Sequence[TensorInfo], text: str, kind: TensorKind | None, key: str = ""
) -> TensorInfo:
    """The tensor named `text`, or the only one whose name contains `text`; with `kind` None, among
    parameters and buffers. Raises RunError."""
    wanted = [
        each
        for each in tensors
        if (each.ref.kind == kind if kind else each.ref.kind in ("parameter", "buffer"))
        and each.ref.key == key
    ]
    exact = [each for each in wanted if text in each.names]
    found = exact or [each for each in wanted if any(text in name for name in each.names)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(each.ref.name for each in found[:MAX_SUGGESTIONS])
        more = ", …" if len(found) > MAX_SUGGESTIONS else ""
        raise RunError(f"{len(found)} tensors match {text}", f"{names}{more}")
    raise RunError(*_why_not_found(tensors, text, kind, key))


def _why_not_found(
    tensors: Sequence[TensorInfo], text: str, kind: TensorKind | None, key: str
) -> tuple[str, str]:
    if kind in ("input", "output"):
        number = f" {key}" if key else ""
        hint = "tui-trainer inspect RUN --modules lists them"
        return f"no module that matches {text} has an {kind}{number}", hint
    named = [each for each in tensors if any(text in name for name in each.names)]
    if named and kind == "state":
        keys = dict.fromkeys(each.ref.key for each in named if each.ref.kind == "state")
        hint = f"it has {', '.join(keys)}" if keys else "its optimizer holds none (yet)"
        return f"there is no optimizer state {key} for {text}", hint
    if named and kind == "gradient":
        return f"{text} has no gradient now", "pause the run after backward"
    return f"no parameter or buffer matches {text}", "tui-trainer inspect RUN lists them"


def cells_of(heat: HeatMap) -> npt.NDArray[np.float32]:
    """The cells of a heat map, (rows, columns). Raises ValueError when their number is wrong."""
    return np.frombuffer(heat.cells, "<f4").reshape(heat.rows, heat.columns)


QUIET_SETTINGS = (
    *("foreach", "fused", "capturable", "differentiable"),
    *("decoupled_weight_decay", "initial_lr"),
)
"""Settings that do not change the result, or that the formula shows anyway."""


def settings_text(settings: Mapping[str, Scalar], count: int = 0) -> str:
    """`lr 0.01, betas 0.9, 0.999, eps 1e-08 (its step t = 30)`"""
    shown = [
        f"{name} {scalar(value)}"
        for name, value in settings.items()
        if name not in QUIET_SETTINGS and value is not None and value is not False
    ]
    counting = f" (its step t = {count:,})" if count else ""
    return f"{', '.join(shown)}{counting}"


def exact(value: float) -> str:
    """Enough digits to tell two float32 values apart."""
    return f"{value:.8g}"


# ---------------------------------------------------------------- writing


def fetch(
    inspect: Callable[[InspectionRequest], Inspected], ref: TensorRef
) -> tuple[TensorInfo, bytes]:
    """All bytes of a tensor, copied at one moment. Raises RunError."""
    parts: list[bytes] = []
    done = 0
    while True:
        answer = inspect(ReadTensor(ref, done))
        if answer.state == "failed":
            raise RunError(answer.message, answer.hint)
        data = answer.result
        if not isinstance(data, TensorData) or data.offset != done:
            raise RunError("the run sent something other than the tensor")
        parts.append(data.data)
        done += len(data.data)
        if done >= data.total:
            return data.tensor, b"".join(parts)
        if not data.data:
            raise RunError("the run sent less than the tensor")


def write_tensor(path: Path, tensor: TensorInfo, data: bytes) -> None:
    """Write a `.npy` or `.safetensors` file. Raises RunError for a type that the format lacks."""
    if path.suffix == ".safetensors":
        _write_safetensors(path, tensor, data)
    else:
        with path.open("wb") as file:
            np.save(file, as_array(tensor, data), allow_pickle=False)


def as_array(tensor: TensorInfo, data: bytes) -> npt.NDArray[np.generic]:
    """A numpy array of the tensor; bfloat16, which numpy lacks, becomes float32."""
    if tensor.dtype == "bfloat16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    try:
        return np.frombuffer(data, np.dtype(tensor.dtype)).reshape(tensor.shape)
    except TypeError:
        hint = "write a .safetensors file"
        raise RunError(f"numpy has no type {tensor.dtype}", hint) from None


SAFETENSORS_TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""Names of torch dtypes in the safetensors format."""


def _write_safetensors(path: Path, tensor: TensorInfo, data: bytes) -> None:
    """Write length, JSON header and data by hand, since the safetensors functions that write
    without torch differ between versions of the library."""
    dtype = SAFETENSORS_TYPES.get(tensor.dtype)
    if dtype is None:
        raise RunError(f"safetensors has no type {tensor.dtype}", "write a .npy file")
    entry = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (0, len(data))}
    header = msgspec.json.encode({tensor.ref.text: entry})
    header += b" " * (-len(header) % 8)  # aligns the data
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(data)


def parse_index(text: str) -> tuple[int, ...]:
    """Parse the index of an entry, such as `3,17` or `[3, 17]`; an empty index names the entry of a
    scalar. Raises ValueError."""
    inside = text.strip("[] ")
    parts = inside.split(",") if inside else []
    if not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", part) for part in parts):
        raise ValueError("an index is numbers from 0, such as 3,17")
    return tuple(map(int, parts))
