"""The base class of every error that is shown to the user as a message rather than a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error to show to the user: one message, and a hint at what to do about it.

    Every exception of the product that carries a hint derives from this class, so that one
    `except UserError as error` can print `error.message` and `error.hint`. Subclasses are
    `ConfigurationError` (a bad setting), `Refusal` (a command that the run cannot obey now),
    `RunError` (a run that cannot be found or trusted) and `CommandError` (the command line), among
    others.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
