"""The newest of what was written: what a new database begins with in place of a damaged one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.recording.items import Described, Item, Stepped
from tui_trainer.recording.store_sayings import bytes_of

KEPT_BYTES = 32 * 2**20


class Memory:
    """The newest KEPT_BYTES of the run's story, oldest first."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self.info_before: RunInfo | None = None
        """The description in force before what is kept."""

    def __iter__(self) -> Iterator[Item]:
        return (item for item, _ in self._kept)

    @property
    def first_step(self) -> int | None:
        """The oldest step that is kept."""
        return next((item.record.step for item in self if isinstance(item, Stepped)), None)

    def keep(self, item: Item) -> None:
        """Remember one more; the oldest make room."""
        size = bytes_of(item)
        self._kept.append((item, size))
        self._bytes += size
        while self._bytes > KEPT_BYTES:
            oldest, size = self._kept.popleft()
            self._bytes -= size
            if isinstance(oldest, Described):
                self.info_before = oldest.info
