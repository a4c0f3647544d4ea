"""One sink's own bounded queue and thread: a slow or blocked sink delays nobody but itself."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tui_trainer.config.run_spec import (
    SOCKET_POINTER_FILE,
    SPEC_FILE,
    RunState,
    machine_identity,
    process_identity,
    write_state,
)
from tui_trainer.protocol import schema
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.events import (
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    Sink,
    StepRecorded,
    StepsDropped,
)

QUEUE_BYTES = 64 * 1024 * 1024
"""Steps waiting for a sink take at most about so much memory."""
TICK_S = 0.5
BATCH = 512


def size_of(item: Item) -> int:
    """About how many bytes a waiting item holds."""
    if isinstance(item, StepRecorded):
        return 512 + sum(values.nbytes + 64 for _, values in item.record.rows)
    return 512


class SinkThread:
    """Takes items in O(1) on the recorder's thread and hands them to the sink on its own."""

    def __init__(
        self,
        sink: Sink,
        status: Callable[[], Status],
        on_fault: Callable[[Sink, Exception], None],
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._sink = sink
        self._status = status
        self._on_fault = on_fault
        self._limit = queue_bytes
        self._queue: deque[Item] = deque()
        self._bytes = 0
        self._lost = 0
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._dead = False
        self._thread = threading.Thread(target=self._work, name="tui-trainer sink", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Queue these. Steps over the bound are left out, counted, and said in their place."""
        with self._changed:
            if self._dead:
                return
            for item in items:
                size = size_of(item)
                if (
                    isinstance(item, (StepRecorded, RowRecorded))
                    and self._bytes + size > self._limit
                ):
                    self._lost += 1
                    continue
                if self._lost:
                    self._queue.append(StepsDropped(self._lost))
                    self._lost = 0
                self._queue.append(item)
                self._bytes += size
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the sink has taken all; whether it has."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._dead or (not self._queue and not self._busy), timeout
            )

    def close(self, timeout: float | None = None) -> bool:
        """Let the sink take what waits, then close it; whether that was done within `timeout`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while self._take_batch():
                pass
        except Exception as fault:
            self._on_fault(self._sink, fault)
        finally:
            with self._changed:
                self._dead = True
                self._queue.clear()
                self._changed.notify_all()
            try:
                self._sink.close()
            except Exception as fault:
                self._on_fault(self._sink, fault)

    def _take_batch(self) -> bool:
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait(TICK_S)
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._bytes -= sum(map(size_of, batch))
            if not self._queue and self._lost:
                batch.append(StepsDropped(self._lost))
                self._lost = 0
            self._busy = bool(batch)
            if self._closing and not batch:
                return False
        try:
            self._sink.take(batch, self._status())
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        return True


# ---- place
# The directory of a living run, made again when somebody removes it.
#
# Without it the run would train on where neither `ls` nor `stop` finds it.


_FILES = (SPEC_FILE, SOCKET_POINTER_FILE)


class RunDirectory:
    """Remembers the few files by which a run is found."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._kept: dict[str, bytes] = {}
        for name in _FILES:
            with contextlib.suppress(OSError):
                self._kept[name] = (self._directory / name).read_bytes()

    def restore(self) -> bool:
        """Put back what is missing; whether anything was. Raises OSError."""
        # A checkpoint may have made the directory anew by now: the file tells.
        if SPEC_FILE not in self._kept or (self._directory / SPEC_FILE).exists():
            return False
        for missing in reversed([self._directory, *self._directory.parents]):
            if not missing.exists():
                missing.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self._directory, 0o700)
        for name, data in self._kept.items():
            path = self._directory / name
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        return True


# ---- state
# A sink that keeps `status.json` in the run's directory: what `tui-trainer ls` reads.


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
        self._place = RunDirectory(directory)
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
            if isinstance(item, InfoChanged):
                self._info = item.info
            elif isinstance(item, StepRecorded):
                self._see_loss(item)
            elif isinstance(item, RunEnded):
                status = item.status
        if status.state != self._written or self._clock() >= self._next:
            self._write(status)

    def close(self) -> None:
        """Nothing is held open."""

    def _see_loss(self, stepped: StepRecorded) -> None:
        declared = self._info.tables
        for table, values in stepped.record.rows:
            if table < len(declared) and declared[table].name == schema.STEP:
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
            place=machine_identity(),
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
