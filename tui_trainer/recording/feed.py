"""One sink's own bounded queue and thread: a slow or blocked sink delays nobody but itself."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from tui_trainer.protocol.messages import Status
from tui_trainer.recording.items import Item, Lost, Rowed, Sink, Stepped

QUEUE_BYTES = 64 * 1024 * 1024
"""Steps waiting for a sink take at most about so much memory."""
TICK_S = 0.5
BATCH = 512


def size_of(item: Item) -> int:
    """About how many bytes a waiting item holds."""
    if isinstance(item, Stepped):
        return 512 + sum(values.nbytes + 64 for _, values in item.record.rows)
    return 512


class Feed:
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
                if isinstance(item, (Stepped, Rowed)) and self._bytes + size > self._limit:
                    self._lost += 1
                    continue
                if self._lost:
                    self._queue.append(Lost(self._lost))
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
                batch.append(Lost(self._lost))
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
