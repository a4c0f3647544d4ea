"""Keeps `status.json` in the run's directory up to date, which `tui-trainer ls` reads."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from tui_trainer.config.atomic_file import replacing
from tui_trainer.config.run_spec import (
    SOCKET_POINTER_FILE,
    SPEC_FILE,
    RunState,
    machine_identity,
    process_identity,
    write_state,
)
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import InfoChanged, Item, RunEnded, StepRecorded

WRITE_EVERY_S = 1.0
LOSSES_KEPT = 10_000
IDENTIFYING_FILES = (SPEC_FILE, SOCKET_POINTER_FILE)


class RunDirectory:
    """The directory of a live run, restored when it is removed.

    Without its directory, the run would keep training but neither `ls` nor `stop` could find it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._kept: dict[str, bytes] = {}
        for name in IDENTIFYING_FILES:
            with contextlib.suppress(OSError):
                self._kept[name] = (self._directory / name).read_bytes()

    def restore(self) -> bool:
        """Rewrite missing identifying files; returns whether any was missing. Raises OSError."""
        # A checkpoint may have created the directory again: the file decides.
        if SPEC_FILE not in self._kept or (self._directory / SPEC_FILE).exists():
            return False
        for missing in reversed([self._directory, *self._directory.parents]):
            if not missing.exists():
                missing.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self._directory, 0o700)
        for name, data in self._kept.items():
            path = self._directory / name
            with replacing(path) as partial:
                partial.write_bytes(data)
        return True


class StatusFile:
    """A sink that writes the status when it is created, when its state changes, and each second.

    A failed write is retried with the next one. A removed directory of a live run is
    created again, so that the run can still be found; the server then listens there again.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        info: RunInfo,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._run_directory = RunDirectory(directory)
        self._info = info
        self._clock = clock
        self._losses: OrderedDict[int, float] = OrderedDict()
        """Losses of the newest steps, since a training may go back to any of these steps."""
        self._written: str | None = None
        self._ended = False
        self._next = 0.0
        self._write(Status(waiting_for="starting"))

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write when the state has changed or WRITE_EVERY_S have passed."""
        for item in items:
            if isinstance(item, InfoChanged):
                self._info = item.info
            elif isinstance(item, StepRecorded):
                self._set_loss(item)
            elif isinstance(item, RunEnded):
                status = item.status
        if status.state != self._written or self._clock() >= self._next:
            self._write(status)

    def close(self) -> None:
        """Nothing to close."""

    def _set_loss(self, item: StepRecorded) -> None:
        declared = self._info.tables
        for table, values in item.record.rows:
            if table < len(declared) and declared[table].name == schema.STEP:
                self._losses[item.record.step] = float(values[schema.STEP_INDEX["loss"]])
                if len(self._losses) > LOSSES_KEPT:
                    self._losses.popitem(last=False)

    def _loss_at(self, step: int) -> float | None:
        """The loss of `step`, or of the last one before it that had one."""
        if step in self._losses:
            return self._losses[step]
        return next((self._losses[s] for s in reversed(self._losses) if s <= step), None)

    def _write(self, status: Status) -> None:
        now, info, loss = self._clock(), self._info, self._loss_at(status.step)
        finite = loss is not None and math.isfinite(loss)
        pid = info.pid or os.getpid()
        state = RunState(
            name=info.name,
            task=info.task,
            title=info.title,
            state=status.state,
            pid=pid,
            process=process_identity(pid),
            machine=machine_identity(),
            host=info.host,
            started_at=info.started_at or now,
            written_at=now,
            ended_at=now if status.ended else None,
            step=status.step,
            total_steps=info.total_steps,
            epoch=status.epoch,
            loss=loss if finite else None,
            loss_text="" if finite or loss is None else nonfinite(loss),
            steps_per_second=status.steps_per_second,
            items_per_second=status.items_per_second,
            item_unit=info.item_unit,
            elapsed_s=status.elapsed_s,
            remaining_s=status.remaining_s,
            device=info.device.name if info.device else "",
            waiting_for=status.waiting_for,
            reason=status.reason,
            hint=status.hint,
            refused=status.refused,
            parent=info.parent,
            branch_step=info.branch_step,
        )
        self._next = now + WRITE_EVERY_S
        with contextlib.suppress(OSError):
            if not self._ended:  # an ended run may be removed
                self._run_directory.restore()
            self._ended = status.ended
            write_state(self._directory, state)
            self._written = status.state
