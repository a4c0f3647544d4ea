"""A callback for Lightning: `Trainer(…, callbacks=[TuiTrainerCallback()])`.

It begins a run with `fit` and ends it with it, so that a terminal can attach to a training in a
notebook or under another launcher. Under `tui-trainer run` it has nothing to do.
"""

from __future__ import annotations

from typing import Any

from tui_trainer.run.scalars import active_log
from tui_trainer.run.watch import Run, watch

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:  # said when a callback is made
        Callback = object


class TuiTrainerCallback(Callback):  # type: ignore[misc]
    """`name`, `runs_dir` and `paused` as those of `tui_trainer.watch`."""

    def __init__(self, **options: Any) -> None:
        if Callback is object:
            raise ImportError('lightning is not installed: pip install "tui-trainer[lightning]"')
        super().__init__()
        self._options = options
        self.run: Run | None = None
        """The run that is being recorded; None before the training begins."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if active_log() is None:
            self.run = watch(pl_module, trainer.optimizers, **self._options)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.run is not None:
            self.run.__exit__(type(exception), exception, None)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.run is not None:
            self.run.close()
