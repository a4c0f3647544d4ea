"""When checkpoints are written, and of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tui_trainer.config.spec import RunSpec
from tui_trainer.recording.recorder import Recorder

if TYPE_CHECKING:
    import torch

    from tui_trainer.run.checkpoints import Stateful

Contents = Callable[[], "tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]"]
"""Weights, and what else has a state, as they are now."""


class Saver:
    """Writes checkpoints of one run. Every call is made on the training thread, between steps.

    A checkpoint that cannot be written is said and never stops the training.
    """

    def __init__(self, spec: RunSpec, recorder: Recorder, contents: Contents) -> None:
        from tui_trainer.run.checkpoints import Checkpoints

        self._spec = spec
        self._recorder = recorder
        self._contents = contents
        self._checkpoints = Checkpoints(spec.directory, spec.keep_checkpoints)
        self._written: tuple[int, Path] | None = None
        """The step and the directory of the last."""

    @property
    def cadences(self) -> tuple[int, ...]:
        """Multiples of which steps end with `between_steps`."""
        return (self._spec.checkpoint_every or 0,)

    def between_steps(self, step: int) -> None:
        """On the cadence asked for."""
        self.write(step)

    def validated(self, step: int, loss: float) -> None:
        """Keep the weights with the lowest validation loss; a step of training comes before it."""
        if step > 0 and self._checkpoints.improves(loss) and self.write(step):
            try:
                self._checkpoints.mark_best(step, loss)
            except OSError as fault:
                self._recorder.fault("checkpoint", fault)

    def write(self, step: int, asked: bool = False) -> bool:
        """Write one now, unless this step's was written; whether it is there. `asked`: somebody
        waits for the answer, also where there is nothing left to do."""
        if self._written is not None and self._written[0] == step and self._written[1].is_dir():
            if asked:
                text = f"checkpoint {self._written[1].name} is there already"
                self._recorder.notice("checkpoint", text, step=step)
            return True
        try:
            with self._recorder.aside():
                weights, stateful = self._contents()
                facts = {
                    "task": self._spec.task,
                    "run": self._spec.name,
                    "configuration": self._spec.configuration,
                }
                path = self._checkpoints.write(step, weights, stateful, facts)
        except Exception as fault:
            text = f"no checkpoint of step {step}: {type(fault).__name__}: {fault}"
            self._recorder.notice("checkpoint", text, "error", step)
            return False
        self._written = step, path
        self._recorder.notice("checkpoint", f"checkpoint {path.name}", step=step)
        return True
