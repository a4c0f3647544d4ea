"""A callback for Hugging Face's `Trainer`: `Trainer(…, callbacks=[TuiTrainerCallback()])`.

The callback records the training as a run, so that a terminal can attach to it in a notebook or
under another launcher. Under `tui-trainer run` it does nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tui_trainer.run.scalars import active_log
from tui_trainer.run.watch import Run, WatchedRun, watch

try:
    from transformers import TrainerCallback
except ImportError:  # reported when a callback is created
    TrainerCallback = object


class TuiTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Takes the options `name`, `runs_dir` and `paused` of `tui_trainer.watch`. Further calls of
    `train` with the same callback are recorded as `name-2`, `name-3`, …"""

    _newest: ClassVar[Run | None] = None
    """The run that was started last by any callback in this process."""

    def __init__(self, **options: Any) -> None:
        if TrainerCallback is object:
            raise ImportError('transformers is not installed: pip install "tui-trainer[hf]"')
        self._options = options
        self.run: Run | None = None
        """The run that is being recorded; None before the training begins."""
        self._started = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        # After an exception there is no `on_train_end`: in a notebook that run is still open.
        newest = TuiTrainerCallback._newest
        if isinstance(newest, WatchedRun) and newest.open:
            newest.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        if active_log() is None:
            options = dict(self._options)
            self._started += 1
            if self._started > 1 and options.get("name"):
                options["name"] += f"-{self._started}"
            self.run = TuiTrainerCallback._newest = watch(model, optimizer, **options)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.run is not None:
            self.run.close()
