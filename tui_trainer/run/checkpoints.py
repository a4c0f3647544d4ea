"""Checkpoints without pickle: weights, optimizer, learning rate, scaler, generators, data position.

Each is a directory, `checkpoints/step-00000060`:

* `weights.safetensors`: the model's `state_dict()`, readable by any other tool;
* `state.safetensors` and `state.json`: everything else, as tensors and a JSON skeleton.

A checkpoint is written and synced under another name and then renamed, so that a partial one is
never seen. docs/decisions.md says why the state is not a `torch.save` file.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.record.recorder import Recorder
from tui_trainer.runs.checkpoints import (
    CHECKPOINT_STATE,
    CHECKPOINTS,
    checkpoint_path,
    checkpoint_steps,
)
from tui_trainer.trace.random_state import random_state
from tui_trainer.travel.snapshots import Stateful

FORMAT = 1
WEIGHTS_FILE = "weights.safetensors"
TENSORS_FILE = "state.safetensors"
SKELETON_FILE = CHECKPOINT_STATE
BEST_FILE = "best.json"


Contents = Callable[[], tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]]
"""Returns (weights, other parts with a state), each by name."""


class CheckpointSaver:
    """Decides when a run writes checkpoints. Used on the training thread, between steps.

    A checkpoint that cannot be written is reported and never stops the training.
    """

    def __init__(self, spec: RunSpec, recorder: Recorder, contents: Contents) -> None:
        self._spec = spec
        self._recorder = recorder
        self._contents = contents
        self._writer = CheckpointWriter(spec.directory, spec.keep_checkpoints)
        self._last: tuple[int, Path] | None = None

    @property
    def cadences(self) -> tuple[int, ...]:
        """Intervals, in steps, at which `after_step` is called."""
        return (self._spec.checkpoint_every or 0,)

    def after_step(self, step: int) -> None:
        self.write(step)

    def save_if_best(self, step: int, loss: float) -> None:
        """Keep the weights with the lowest validation loss, once training has begun."""
        if step > 0 and self._writer.is_best(loss) and self.write(step):
            try:
                self._writer.mark_best(step, loss)
            except OSError as error:
                self._recorder.fault("checkpoint", error)

    def write(self, step: int, requested: bool = False) -> bool:
        """Write the checkpoint of `step` unless it exists; returns whether it exists now.

        `requested`: a user is waiting for a notice, even when there is nothing to write.
        """
        if self._last is not None and self._last[0] == step and self._last[1].is_dir():
            if requested:
                text = f"checkpoint {self._last[1].name} exists already"
                self._recorder.notice("checkpoint", text, step=step)
            return True
        try:
            with self._recorder.excluded():
                weights, stateful = self._contents()
                facts = {
                    "task": self._spec.task,
                    "run": self._spec.name,
                    "configuration": self._spec.configuration,
                }
                path = self._writer.write(step, weights, stateful, facts)
        except Exception as error:
            text = f"no checkpoint of step {step}: {type(error).__name__}: {error}"
            self._recorder.notice("checkpoint", text, "error", step)
            return False
        self._last = step, path
        self._recorder.notice("checkpoint", f"checkpoint {path.name}", step=step)
        return True


# ---------------------------------------------------------------- writing


class CheckpointWriter:
    """Writes the checkpoints of one run; keeps the `keep` newest and the best one."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        self._run = Path(directory)
        self._folder = self._run / CHECKPOINTS
        self._keep = max(1, keep)
        self._best: tuple[int, float] | None = _read_best(self._folder)

    def write(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        stateful: Mapping[str, Stateful],
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and return its directory.

        Raises OSError (such as a full disk) or NotSerializable; earlier checkpoints then stay.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._folder / f".writing-{os.getpid()}-{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        try:
            states = {name: part.state_dict() for name, part in stateful.items()}
            skeleton, tensors = flatten({"states": states, "random": random_state()})
            copies = {name: _own_copy(tensor) for name, tensor in weights.items()}
            _write_tensors(copies, temporary / WEIGHTS_FILE)
            _write_tensors(tensors, temporary / TENSORS_FILE)
            document = {"format": FORMAT, "step": step, "facts": dict(facts or {})}
            _write_json({**document, "state": skeleton}, temporary / SKELETON_FILE)
            _sync_folder(temporary)
            path = checkpoint_path(self._run, step)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            _sync_folder(self._folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._remove_old(step)
        return path

    def is_best(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far; nan is not."""
        return not math.isnan(loss) and (self._best is None or loss < self._best[1])

    def mark_best(self, step: int, loss: float) -> None:
        """Keep the checkpoint of `step` as the best one, and let go of the previous best."""
        self._best = (step, loss)
        temporary = self._folder / f".{BEST_FILE}"
        _write_json({"step": step, "loss": loss}, temporary)
        temporary.replace(self._folder / BEST_FILE)
        self._remove_old(step)

    def _remove_old(self, newest: int) -> None:
        steps = checkpoint_steps(self._run)
        kept = {newest, *steps[-self._keep :]} | ({self._best[0]} if self._best else set())
        for step in steps:
            if step not in kept:
                shutil.rmtree(checkpoint_path(self._run, step), ignore_errors=True)
        for abandoned in self._folder.glob(".writing-*"):
            shutil.rmtree(abandoned, ignore_errors=True)  # left by a process that was killed


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU with its own storage: safetensors refuses tensors that share storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Past the wrapper that times the script's own saves: this one is not the script's.
    inspect.unwrap(safetensors.torch.save_file)(tensors, path)
    path.chmod(0o600)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_json(document: Any, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not supported by every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_best(folder: Path) -> tuple[int, float] | None:
    try:
        best = json.loads((folder / BEST_FILE).read_text())
        return int(best["step"]), float(best["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    states: dict[str, Any]
    """State of each `Stateful`, by name."""
    random: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | os.PathLike[str]) -> LoadedCheckpoint:
    """The checkpoint in the directory `path`, or the newest one of the run in `path`.

    Raises ConfigurationError when there is none or it cannot be read.
    """
    found = _find_checkpoint(Path(path))
    try:
        document = json.loads((found / SKELETON_FILE).read_text())
        if document["format"] != FORMAT:
            raise ConfigurationError(
                f"the checkpoint {found} has format {document['format']}, not {FORMAT}",
                "use the version of tui-trainer that wrote it",
            )
        state = unflatten(document["state"], safetensors.torch.load_file(found / TENSORS_FILE))
        weights = safetensors.torch.load_file(found / WEIGHTS_FILE)
        return LoadedCheckpoint(
            found, document["step"], weights, state["states"], state["random"], document["facts"]
        )
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"the checkpoint {found} cannot be read: {error}", "resume from another checkpoint"
        ) from error


def _find_checkpoint(path: Path) -> Path:
    if (path / SKELETON_FILE).exists():
        return path
    run = path.parent if path.name == CHECKPOINTS else path
    if steps := checkpoint_steps(run):
        return checkpoint_path(run, steps[-1])
    raise ConfigurationError(
        f"there is no checkpoint in {path}", "give a run's directory or one of its checkpoints"
    )


def restore(
    checkpoint: LoadedCheckpoint, model: torch.nn.Module, stateful: Mapping[str, Stateful]
) -> None:
    """Load the state of the model and of everything else except the random generators.

    Raises ConfigurationError when the checkpoint does not match them.
    """
    try:
        model.load_state_dict(checkpoint.weights)
        for name, part in stateful.items():
            part.load_state_dict(checkpoint.states[name])
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the checkpoint {checkpoint.path} does not fit this run: {error}",
            "resume with the task and the options that it was made with",
        ) from error


# ---------------------------------------------------------------- state as JSON and tensors

Json = Any


class NotSerializable(TypeError):
    """A value that is neither a tensor nor plain data."""


def flatten(value: Any) -> tuple[Json, dict[str, torch.Tensor]]:
    """A JSON skeleton of `value` and the tensors that it names, on the CPU.

    Raises NotSerializable.
    """
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
            return float(value) if math.isfinite(value) else {"float": nonfinite(value)}
        case torch.Tensor():
            return {"tensor": _add(value, path, tensors)}
        case np.ndarray():
            # As bytes, since numpy has dtypes and byte orders that torch does not have.
            if value.dtype.hasobject:
                raise NotSerializable(f"{path or 'the state'} is an array of Python objects")
            data = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
            return {"array": [_add(data, path, tensors), value.dtype.str, list(value.shape)]}
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case dict():
            items = [
                [_flatten(key, path, tensors), _flatten(part, f"{path}/{key}", tensors)]
                for key, part in value.items()
            ]
            return {"dict": items}
        case list():
            return [_flatten(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
        case tuple():
            parts = [_flatten(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
            return {"tuple": parts}
        case set() | frozenset():
            return {"set": [_flatten(part, path, tensors) for part in sorted(value)]}
    raise NotSerializable(f"{path or 'the state'} is a {type(value).__name__}")


def _add(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    name = f"{len(tensors):05}{path}"
    tensors[name] = _own_copy(tensor)
    return name


def unflatten(skeleton: Json, tensors: dict[str, torch.Tensor]) -> Any:
    """Rebuild the value that `flatten` was given. Raises KeyError or ValueError for damaged input.

    Creates tensors, numbers, text and containers only; no input can make it run other code.
    """
    match skeleton:
        case list():
            return [unflatten(part, tensors) for part in skeleton]
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
            return {unflatten(key, tensors): unflatten(part, tensors) for key, part in items}
        case {"tuple": parts}:
            return tuple(unflatten(part, tensors) for part in parts)
        case {"set": parts}:
            return {unflatten(part, tensors) for part in parts}
        case dict():
            raise ValueError(f"unknown element {next(iter(skeleton), '{}')}")
    return skeleton
