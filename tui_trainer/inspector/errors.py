"""The error raised when an inspection is not possible."""

from __future__ import annotations

from tui_trainer.protocol.errors import UserError


class InspectionError(UserError):
    """A tensor that cannot be inspected; the message says why."""
