"""A callback for Lightning: `Trainer(…, callbacks=[TuiTrainerCallback()])`.

The callback records `fit` as a run, so that a terminal can attach to it in a notebook or under
another launcher. Under `tui-trainer run` it does nothing.
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
    except ImportError:  # reported when a callback is created
        Callback = object


class TuiTrainerCallback(Callback):  # type: ignore[misc]
    """Takes the options `name`, `runs_dir` and `paused` of `tui_trainer.watch`."""

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
