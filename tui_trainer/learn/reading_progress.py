"""What a learner has read, and in which language: kept in the user's state directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from tui_trainer.learn.page import LANGUAGES, language_of

FILE = "learn.json"

PageState = Literal["new", "read", "answered"]


class ReadingProgress(msgspec.Struct):
    """The pages that were opened and those whose question was answered, by name."""

    read: list[str] = msgspec.field(default_factory=list)
    answered: list[str] = msgspec.field(default_factory=list)
    language: str = ""
    """The language that was chosen; "": that of the environment."""

    def state(self, page: str) -> PageState:
        """The state of a page."""
        if page in self.answered:
            return "answered"
        return "read" if page in self.read else "new"

    @property
    def shown_language(self) -> str:
        """The language to show pages in."""
        return self.language if self.language in LANGUAGES else language_of()

    def mark(self, page: str, answered: bool = False) -> bool:
        """Note that a page was opened or answered. Returns whether that is new."""
        before = self.state(page)
        if page not in self.read:
            self.read.append(page)
        if answered and page not in self.answered:
            self.answered.append(page)
        return self.state(page) != before


def load_progress() -> ReadingProgress:
    """What was saved; nothing where there is no file, or none that can be read."""
    try:
        return msgspec.json.decode(_file().read_bytes(), type=ReadingProgress)
    except (OSError, msgspec.MsgspecError):
        return ReadingProgress()


def save_progress(progress: ReadingProgress) -> None:
    """Save it, if the directory can be written to."""
    path = _file()
    partial = path.with_name(f".{FILE}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(progress)) + b"\n")
        partial.replace(path)


def _file() -> Path:
    return Path(platformdirs.user_state_dir("tui-trainer", appauthor=False)) / FILE
