"""A callback for Hugging Face's `Trainer`: `Trainer(…, callbacks=[TuiTrainerCallback()])`.

It records the training as a run, so that a terminal can attach to it in a notebook or under another
launcher. Under `tui-trainer run` it does nothing.
"""

from __future__ import annotations

from typing import Any

from tui_trainer.run.scalars import active_log
from tui_trainer.run.watch import Run, watch

try:
    from transformers import TrainerCallback
except ImportError:  # reported when a callback is created
    TrainerCallback = object


class TuiTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Takes the options `name`, `runs_dir` and `paused` of `tui_trainer.watch`."""

    def __init__(self, **options: Any) -> None:
        if TrainerCallback is object:
            raise ImportError('transformers is not installed: pip install "tui-trainer[hf]"')
        self._options = options
        self.run: Run | None = None
        """The run that is being recorded; None before the training begins."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        if active_log() is None:
            self.run = watch(model, optimizer, **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.run is not None:
            self.run.close()
