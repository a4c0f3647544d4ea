"""A bounded queue and a thread for each sink: a slow or blocked sink delays only itself."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal

from tui_trainer.protocol.events import (
    ConfusionMatrix,
    Finding,
    ImageSample,
    LogLine,
    Notice,
    TextSample,
)
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    Sink,
    StepRecorded,
    item_bytes,
)

QUEUE_BYTES = 64 * 1024 * 1024
TICK_S = 0.5
BATCH_ITEMS = 512


class SinkThread:
    """Queues items in O(1) on the recorder's thread and hands them to the sink on its own thread.

    Items beyond `queue_bytes` are dropped and counted, except descriptions, findings, notices and
    the end, of which there are few. `on_fault` is called with an exception of the sink, which is
    then closed and gets no further items.
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
        self._queue: deque[tuple[Item, int]] = deque()
        """(item, bytes)"""
        self._bytes = 0
        self._dropped: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._dead = False
        self._thread = threading.Thread(target=self._work, name="tui-trainer sink", daemon=True)
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Queue `items`; those that are dropped are replaced by one `ItemsDropped`."""
        with self._changed:
            if self._dead:
                return
            for item in items:
                size, kind = item_bytes(item), _kind_of(item)
                if kind is not None and self._bytes + size > self._limit:
                    self._dropped[kind] += 1
                    continue
                if self._dropped:
                    self._append_dropped()
                self._append(item, size)
            self._changed.notify_all()

    def _append(self, item: Item, size: int) -> None:
        self._queue.append((item, size))
        self._bytes += size

    def _append_dropped(self) -> None:
        dropped = ItemsDropped(**self._dropped)
        self._dropped.clear()
        self._append(dropped, item_bytes(dropped))

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
                self._bytes = 0
                self._changed.notify_all()
            try:
                self._sink.close()
            except Exception as error:
                self._on_fault(self._sink, error)

    def _take_batch(self) -> bool:
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait(TICK_S)
        # Read the status first: its step is then among these items or among earlier ones.
        status = self._status()
        with self._changed:
            if self._dropped and len(self._queue) < BATCH_ITEMS:
                self._append_dropped()
            taken = [self._queue.popleft() for _ in range(min(BATCH_ITEMS, len(self._queue)))]
            self._bytes -= sum(size for _, size in taken)
            batch = [item for item, _ in taken]
            self._busy = bool(batch)
            if self._closing and not batch:
                return False
        try:
            self._sink.take(batch, status)
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        return True


def _kind_of(item: Item) -> Literal["steps", "events", "lines", "samples"] | None:
    """The kind as which a dropped item is counted; None for an item that is always kept."""
    match item:
        case InfoChanged() | ItemsDropped() | RunEnded() | Finding() | Notice():
            return None
        case StepRecorded() | RowRecorded():
            return "steps"
        case LogLine():
            return "lines"
        case TextSample() | ImageSample() | ConfusionMatrix():
            return "samples"
        case _:
            return "events"
