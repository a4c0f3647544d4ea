"""A callback for Hugging Face's `Trainer`: `Trainer(…, callbacks=[TuiTrainerCallback()])`.

It begins a run with the training and ends it with it, so that a terminal can attach to a training
in a notebook or under another launcher. Under `tui-trainer run` it has nothing to do.
"""

from __future__ import annotations

from typing import Any

from tui_trainer.run.scalars import active_log
from tui_trainer.run.watch import Run, watch

try:
    from transformers import TrainerCallback
except ImportError:  # said when a callback is made
    TrainerCallback = object


class TuiTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """`name`, `runs_dir` and `paused` as those of `tui_trainer.watch`."""

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
