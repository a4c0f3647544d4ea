"""An app without a terminal that draws into a terminal emulator."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pyte
from rich.color import ColorSystem
from textual._compositor import CompositorUpdate
from textual.screen import Screen

from tests.ui.fake import FakeSession
from tui_trainer.ui.app import TuiTrainerApp


class EmulatedApp(TuiTrainerApp):
    """Also writes into `emulator` what it would write to the terminal."""

    def __init__(
        self, session: FakeSession, size: tuple[int, int], cell_updates: bool = True, **options: Any
    ) -> None:
        super().__init__(session, **options)
        self.link = replace(self.link, cell_updates=cell_updates)
        # Rich keeps the codes of a style from the first time that it is written, in whatever
        # colours that was: all tests of a process have to use the same.
        self.console._color_system = ColorSystem.TRUECOLOR
        self.emulator = pyte.Screen(*size)
        self.stream = pyte.Stream(self.emulator)
        self.updates: list[tuple[type, int]] = []
        """Class and bytes of each update."""

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        if isinstance(renderable, CompositorUpdate) and not self._batch_count:
            written = renderable.render_segments(self.console)
            self.updates.append((type(renderable), len(written.encode())))
            self.stream.feed(written.replace("\n", "\r\n"))
        super()._display(screen, renderable)

    def drawn(self) -> str:
        """What the terminal shows."""
        return "\n".join(self.emulator.display)

    async def wait_until_drawn(self, text: str) -> None:
        """Without `Pilot.pause`, which sends every widget a message, so that all are drawn."""
        async with asyncio.timeout(240):
            while text not in self.drawn():
                await asyncio.sleep(0.01)
