"""A bounded queue and a thread for each sink: a slow or blocked sink delays only itself."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from tui_trainer.protocol.messages import Status
from tui_trainer.record.events import Item, RowRecorded, Sink, StepRecorded, StepsDropped

QUEUE_BYTES = 64 * 1024 * 1024
TICK_S = 0.5
BATCH_ITEMS = 512
ITEM_BYTES = 512
"""Assumed for any item, besides the values of a step."""


def size_of(item: Item) -> int:
    """Approximate bytes that a queued item holds."""
    if isinstance(item, StepRecorded):
        return ITEM_BYTES + sum(values.nbytes + 64 for _, values in item.record.rows)
    return ITEM_BYTES


class SinkThread:
    """Queues items in O(1) on the recorder's thread and hands them to the sink on its own thread.

    Steps and rows beyond `queue_bytes` are dropped and counted. `on_fault` is called with an
    exception of the sink, which is then closed and gets nothing more.
    """

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
        self._dropped = 0
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._dead = False
        self._thread = threading.Thread(target=self._work, name="tui-trainer sink", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Queue `items`; dropped steps are replaced by one `StepsDropped`."""
        with self._changed:
            if self._dead:
                return
            for item in items:
                size = size_of(item)
                if (
                    isinstance(item, (StepRecorded, RowRecorded))
                    and self._bytes + size > self._limit
                ):
                    self._dropped += 1
                    continue
                if self._dropped:
                    self._queue.append(StepsDropped(self._dropped))
                    self._dropped = 0
                self._queue.append(item)
                self._bytes += size
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the sink has taken everything; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._dead or (not self._queue and not self._busy), timeout
            )

    def close(self, timeout: float | None = None) -> bool:
        """Let the sink take what is queued, then close it; False after `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while self._take_batch():
                pass
        except Exception as error:
            self._on_fault(self._sink, error)
        finally:
            with self._changed:
                self._dead = True
                self._queue.clear()
                self._changed.notify_all()
            try:
                self._sink.close()
            except Exception as error:
                self._on_fault(self._sink, error)

    def _take_batch(self) -> bool:
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait(TICK_S)
            batch = [self._queue.popleft() for _ in range(min(BATCH_ITEMS, len(self._queue)))]
            self._bytes -= sum(map(size_of, batch))
            if not self._queue and self._dropped:
                batch.append(StepsDropped(self._dropped))
                self._dropped = 0
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
