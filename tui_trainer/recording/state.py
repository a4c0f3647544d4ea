"""A sink that keeps `status.json` in the run's directory: what `tui-trainer ls` reads."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence

from tui_trainer.config.state import RunState, process_identity, this_place, write_state
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Status
from tui_trainer.recording.items import Described, Ended, Item, Stepped
from tui_trainer.recording.place import Place

EVERY_S = 1.0


class StateSink:
    """Says on disk how the run is: at once when it is made, when its state changes, each second.

    A disk that refuses is tried again at the next turn: the run's own store says that it is full.
    Where somebody has removed the directory of the living run, it is made again, so that the run is
    found; who serves viewers then listens there again, and says so.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        info: RunInfo,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._place = Place(directory)
        self._info = info
        self._clock = clock
        self._loss: float | None = None
        self._written: str | None = None
        self._over = False
        self._next = 0.0
        self._write(Status(waiting_for="starting"))

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Take in what happened; write when it is time or the state is another."""
        for item in items:
            if isinstance(item, Described):
                self._info = item.info
            elif isinstance(item, Stepped):
                self._see_loss(item)
            elif isinstance(item, Ended):
                status = item.status
        if status.state != self._written or self._clock() >= self._next:
            self._write(status)

    def close(self) -> None:
        """Nothing is held open."""

    def _see_loss(self, stepped: Stepped) -> None:
        declared = self._info.tables
        for table, values in stepped.record.rows:
            if table < len(declared) and declared[table].name == tables.STEP:
                self._loss = float(values[0])

    def _write(self, status: Status) -> None:
        now, info, loss = self._clock(), self._info, self._loss
        finite = loss is not None and math.isfinite(loss)
        pid = info.pid or os.getpid()
        state = RunState(
            name=info.name,
            task=info.task,
            title=info.title,
            state=status.state,
            pid=pid,
            began=process_identity(pid),
            place=this_place(),
            host=info.host,
            started_at=info.started_at or now,
            written_at=now,
            ended_at=now if status.ended else None,
            step=status.step,
            total_steps=info.total_steps,
            epoch=status.epoch,
            loss=loss if finite else None,
            loss_text="" if finite or loss is None else str(loss),
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
        self._next = now + EVERY_S
        with contextlib.suppress(OSError):
            if not self._over:  # of one that has ended, whoever removes it shall succeed
                self._place.restore()
            self._over = status.ended
            write_state(self._directory, state)
            self._written = status.state
