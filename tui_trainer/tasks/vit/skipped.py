"""Images that cannot be decoded."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Skipped:
    """Those met so far: each is counted, and named in the log, once."""

    def __init__(self, kind: str = "image") -> None:
        """`kind`: what the log calls one of them."""
        self.reasons: dict[str, str] = {}
        """Name to why it cannot be decoded."""
        self._kind = kind

    def __len__(self) -> int:
        return len(self.reasons)

    def note(self, name: str, reason: str) -> None:
        """One was met, perhaps not for the first time."""
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning(
                "skipped unreadable %s %s: %s (%d so far)", self._kind, name, reason, len(self)
            )
