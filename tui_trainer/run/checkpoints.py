"""Checkpoints without pickle: weights, optimizer, schedule, scaler, generators, data position.

One directory each, `checkpoints/step-00000060`:

* `weights.safetensors`: the model's `state_dict()`, readable by any other tool;
* `state.safetensors` and `state.json`: everything else, tensors and skeleton (see `flatten`).

A checkpoint appears whole or not at all: it is written and synced under another name first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.flatten import flatten, unflatten
from tui_trainer.run.randomness import random_state

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
