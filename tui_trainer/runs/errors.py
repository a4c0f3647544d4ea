"""Why a run cannot be found, trusted or reached."""

from __future__ import annotations

from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.messages import EndState


class RunError(UserError):
    """A run that cannot be found, trusted or reached."""


class NotListening(RunError):
    """Nothing listens on the run's socket yet, or it is being replaced: try again soon."""


class Unreachable(RunError):
    """The run may be there but cannot be reached now: worth another try after a while."""


class RunGone(RunError):
    """There is no run to connect to, and there will be none.

    `state`: how it ended; None where that is not the reason.
    """

    def __init__(self, message: str, hint: str = "", state: EndState | None = None) -> None:
        super().__init__(message, hint)
        self.state = state
