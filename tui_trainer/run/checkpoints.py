"""Checkpoints without pickle: weights, optimizer, schedule, scaler, generators, data position.

One directory each, `checkpoints/step-00000060`:

* `weights.safetensors`: the model's `state_dict()`, readable by any other tool;
* `state.safetensors` and `state.json`: everything else, tensors and skeleton (see `flatten`).

A checkpoint appears whole or not at all: it is written and synced under another name first.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tui_trainer.config.errors import ConfigurationError

# ---- flatten
# State of any shape as tensors by name and a JSON skeleton: what pickle would do, without code.
#
# Loading it can make tensors, numbers, text and containers, and nothing else.


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


# ---- randomness
# The state of every random generator that training may draw from.


def random_state() -> dict[str, Any]:
    """Of torch (the CPU and every CUDA device in use), numpy's global generator and Python's."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators as `random_state` found them."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


FORMAT = 1
FOLDER = "checkpoints"
WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "state.safetensors"
SKELETON_FILE = "state.json"
BEST_FILE = "best.json"


class Stateful(Protocol):
    """What can be asked for its state and given it back."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that it needs to go on."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go on from there."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was read back."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    states: dict[str, Any]
    """Name to state of what was saved beside the weights."""
    random: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Writes the checkpoints of one run: the newest `keep` and the best one stay."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        self._folder = Path(directory) / FOLDER
        self._keep = max(1, keep)
        self._best: tuple[int, float] | None = _read_best(self._folder)

    def write(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        stateful: Mapping[str, Stateful],
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, on the training thread; returns its directory.

        Raises OSError (disk full, …) or `CannotFlatten`, and leaves what was there before.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._folder / f".writing-{os.getpid()}-{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        try:
            states = {name: held.state_dict() for name, held in stateful.items()}
            skeleton, tensors = flatten({"states": states, "random": random_state()})
            _save(_own(weights), temporary / WEIGHTS_FILE)
            _save(tensors, temporary / STATE_FILE)
            document = {"format": FORMAT, "step": step, "facts": dict(facts or {})}
            _write_json({**document, "state": skeleton}, temporary / SKELETON_FILE)
            _sync_folder(temporary)
            path = self._folder / f"step-{step:08}"
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            _sync_folder(self._folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(step)
        return path

    def improves(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far."""
        return loss == loss and (self._best is None or loss < self._best[1])

    def mark_best(self, step: int, loss: float) -> None:
        """Say that the checkpoint of `step` is the best one; the former best may go now."""
        self._best = (step, loss)
        temporary = self._folder / f".{BEST_FILE}"
        _write_json({"step": step, "loss": loss}, temporary)
        temporary.replace(self._folder / BEST_FILE)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        kept = {newest} | ({self._best[0]} if self._best else set())
        steps = sorted(all_steps(self._folder))
        kept.update(steps[-self._keep :])
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._folder / f"step-{step:08}", ignore_errors=True)
        for left in self._folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while writing


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a directory; of a run's directory, its newest one.

    Raises ConfigurationError when there is none or it cannot be read.
    """
    found = _resolve(Path(path))
    try:
        document = json.loads((found / SKELETON_FILE).read_text())
        if document["format"] != FORMAT:
            raise ConfigurationError(
                f"the checkpoint {found} has format {document['format']}, this is {FORMAT}",
                "use the version of tui-trainer that wrote it",
            )
        tree = unflatten(document["state"], load_file(found / STATE_FILE))
        weights = load_file(found / WEIGHTS_FILE)
        return Checkpoint(
            found, document["step"], weights, tree["states"], tree["random"], document["facts"]
        )
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as fault:
        raise ConfigurationError(
            f"the checkpoint {found} cannot be read: {fault}", "choose another one beside it"
        ) from fault


def restore(
    checkpoint: Checkpoint, model: torch.nn.Module, stateful: Mapping[str, Stateful]
) -> None:
    """Give model and the rest the state that they had. Raises ConfigurationError on a mismatch.

    The random generators are left to the caller, right before the training goes on.
    """
    try:
        model.load_state_dict(checkpoint.weights)
        for name, held in stateful.items():
            held.load_state_dict(checkpoint.states[name])
    except (RuntimeError, KeyError, ValueError, TypeError) as fault:
        raise ConfigurationError(
            f"the checkpoint {checkpoint.path} does not fit this run: {fault}",
            "resume with the task and the options that it was made with",
        ) from fault


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a `checkpoints` folder."""
    names = [path.name for path in folder.glob("step-*") if (path / SKELETON_FILE).exists()]
    return [int(name[5:]) for name in names if name[5:].isdigit()]


def _resolve(path: Path) -> Path:
    if (path / SKELETON_FILE).exists():
        return path
    for folder in (path / FOLDER, path):
        if steps := all_steps(folder):
            return folder / f"step-{max(steps):08}"
    raise ConfigurationError(
        f"there is no checkpoint in {path}", "it is a run's directory or one of its checkpoints"
    )


def _own(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: held.detach().to("cpu", copy=True).contiguous() for name, held in weights.items()}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    path.chmod(0o600)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_json(document: Any, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_best(folder: Path) -> tuple[int, float] | None:
    try:
        found = json.loads((folder / BEST_FILE).read_text())
        return int(found["step"]), float(found["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
