"""What the start screen asks for when Enter is pressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tui_trainer.protocol.describe import Scalar
from tui_trainer.session.api import Session


@dataclass(frozen=True)
class LaunchRequest:
    """A training to start."""

    task: str
    """`gpt`, `vit`, a third party's task, or `script`."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Fields of the task's configuration that differ from its defaults (`preset` among them)."""
    script: str | None = None
    arguments: tuple[str, ...] = ()
    paused: bool = False


OnLaunch = Callable[[LaunchRequest], Session]
"""Starts the run and returns a session to it; called on a thread of its own. Raises LaunchError."""


class LaunchError(Exception):
    """The run could not be started; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
