from __future__ import annotations

import pyte
import pytest
from rich.color import ColorSystem
from textual._compositor import CompositorUpdate

from tests.ui import fake
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.textual_hacks import CellUpdate
from tui_trainer.ui.widgets import chart


class Terminal(TuiTrainerApp):
    """Writes into a terminal emulator what it would write to the terminal."""

    def __init__(self, session, size):
        super().__init__(session, frames_per_second=0.01)
        self.console._color_system = ColorSystem.TRUECOLOR
        self.emulator = pyte.Screen(*size)
        self.stream = pyte.Stream(self.emulator)
        self.updates = []

    def _display(self, screen, renderable):
        if isinstance(renderable, CompositorUpdate) and not self._batch_count:
            written = renderable.render_segments(self.console)
            self.updates.append((type(renderable), len(written.encode())))
            self.stream.feed(written.replace("\n", "\r\n"))
        super()._display(screen, renderable)


def full(app):
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def drawn_anew(app, size):
    """What a terminal shows that is sent everything, in Rich's own way."""
    emulator = pyte.Screen(*size)
    lines = app.screen._compositor.render_strips()
    console = app.console
    for y, strip in enumerate(lines, 1):
        text = "".join(s.style.render(s.text, color_system=console._color_system) for s in strip)
        pyte.Stream(emulator).feed(f"\x1b[{y};1H{text}")
    return emulator


def cells(emulator):
    """Every cell with all that can be seen of it: of a space, not the colour of its text."""
    seen = []
    for y in range(emulator.lines):
        for x in range(emulator.columns):
            cell = emulator.buffer[y][x]
            blank = cell.data == " " and not cell.reverse and not cell.underscore
            plain = (cell.reverse, cell.underscore, cell.strikethrough)
            seen.append(
                (cell.data, cell.bg, plain, None if blank else (cell.fg, cell.bold, cell.italics))
            )
    return seen


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
async def test_the_terminal_shows_what_the_screen_holds(size):
    chart.load()
    session = fake.fake_gpt(300)
    app = Terminal(session, size)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        app.screen.refresh(layout=True)
        await pilot.pause()
        for key in ("space", "p", "p", "s", "down", "o", "l", "w", "right", "space"):
            await pilot.press(key)
            session.advance(7)
            app.draw_frame()
            await pilot.pause()
        assert CellUpdate in {kind for kind, _ in app.updates}
        for shown, wanted in zip(app.emulator.display, full(app), strict=True):
            assert shown == wanted
        assert cells(app.emulator) == cells(drawn_anew(app, size))


async def test_a_frame_of_the_default_view_is_a_few_kilobytes_at_most():
    chart.load()
    session = fake.fake_gpt(700)
    app = Terminal(session, (120, 40))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        app.updates.clear()
        for _ in range(12):
            session.advance(10)
            app.draw_frame()
            await pilot.pause()
        sizes = [size for kind, size in app.updates if kind is CellUpdate]
        assert sizes
        assert sum(sizes) / len(sizes) < 3500
