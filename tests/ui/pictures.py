"""Compares an app, at several sizes and in several themes, with the known pictures of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_textual_snapshot import SVGImageExtension
from syrupy.assertion import SnapshotAssertion
from textual.app import App


class Pictures:
    """Compares pictures with the known ones, whatever app shows them: resizing one app takes a
    third of opening three."""

    def __init__(self, snapshot: SnapshotAssertion, directory: Path) -> None:
        self.known = snapshot.use_extension(SVGImageExtension)
        self.directory = directory
        """The new pictures of those that differ are written to it."""
        self.differing: list[str] = []

    def compare(self, app: App[Any], name: str) -> None:
        """Compare the screen with the picture `name`."""
        drawn = app.export_screenshot(simplify=True)
        if drawn != self.known(name=name):
            new = self.directory / f"{name}.svg"
            new.write_text(drawn)
            self.differing.append(str(new))

    def compare_at(self, app: App[Any], size: tuple[int, int]) -> None:
        """Compare the screen with the picture of this size."""
        self.compare(app, f"{size[0]}x{size[1]}")
