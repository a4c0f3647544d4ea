"""Pictures of one app, at several sizes and in several themes, compared with the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_textual_snapshot import SVGImageExtension
from syrupy.assertion import SnapshotAssertion
from textual.app import App


class Pictures:
    """One app, resized: opening three takes three times as long."""

    def __init__(self, snapshot: SnapshotAssertion, directory: Path) -> None:
        self.known = snapshot.use_extension(SVGImageExtension)
        self.directory = directory
        """Gets the new pictures of those that differ."""
        self.differing: list[str] = []

    def compare(self, app: App[Any], name: str) -> None:
        """With the picture called `name` of this test."""
        drawn = app.export_screenshot(simplify=True)
        if drawn != self.known(name=name):
            new = self.directory / f"{name}.svg"
            new.write_text(drawn)
            self.differing.append(str(new))

    def compare_at(self, app: App[Any], size: tuple[int, int]) -> None:
        """With the picture called after this size."""
        self.compare(app, f"{size[0]}x{size[1]}")
