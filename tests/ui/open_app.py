"""An app that stays open for all examples of a property test."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack

from tests.ui.screens import app_on, settle, text_of
from tui_trainer.ui.screens import SCREENS

SHOWN = [place for place in SCREENS if place.mode != "start"]


class OpenApp:
    """Drawing a snapshot is much cheaper than opening an app. It is opened again after an example
    that made it fail."""

    def __init__(self, size):
        self.size = size
        self.runner = asyncio.Runner()
        self.stack = None

    def draw(self, snapshot):
        """What the screens show of a snapshot, by mode."""
        if self.stack is None:
            self.runner.run(self._open())
        try:
            return self.runner.run(self._visit(snapshot))
        except BaseException:
            self._leave()
            raise

    def close(self):
        self._leave()
        self.runner.close()

    async def _open(self):
        self.stack = AsyncExitStack()
        self.app = app_on("dashboard", None)
        # A traceback of all locals is slow.
        self.app._fatal_error = self.app._close_messages_no_wait
        self.pilot = await self.stack.enter_async_context(self.app.run_test(size=self.size))
        for place in SHOWN:
            self.app.action_go(place.mode)
            await settle(self.pilot)

    async def _visit(self, snapshot):
        shown = {}
        self.app.draw(snapshot)
        for place in SHOWN:
            self.app.action_go(place.mode)
            await self.pilot.pause()
            if self.app._exception is not None:
                raise self.app._exception
            shown[place.mode] = text_of(self.app)
        return shown

    def _leave(self):
        if self.stack is not None:
            with contextlib.suppress(Exception):
                self.runner.run(self.stack.aclose())
            self.stack = None
