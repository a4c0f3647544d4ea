"""The code that relies on Textual's private names works with the installed Textual."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, Compositor
from textual.drivers import linux_driver
from textual.drivers._writer_thread import WriterThread
from textual.drivers.headless_driver import HeadlessDriver
from textual.strip import Strip

from tests.ui import fake
from tests.ui.emulated_app import EmulatedApp
from tui_trainer.ui import textual_hacks
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.textual_hacks import CellCompositor, CellUpdate


def full(app):
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def rendered_by_rich(app, size):
    """A terminal's contents after Rich has sent the whole screen."""
    emulator = pyte.Screen(*size)
    lines = app.screen._compositor.render_strips()
    console = app.console
    for y, strip in enumerate(lines, 1):
        text = "".join(s.style.render(s.text, color_system=console._color_system) for s in strip)
        pyte.Stream(emulator).feed(f"\x1b[{y};1H{text}")
    return emulator


def cells(emulator):
    """Everything visible of each cell: of a space not the color of its text."""
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
async def test_cell_updates_show_what_the_screen_holds(size):
    session = fake.fake_gpt(300)
    app = EmulatedApp(session, size, frames_per_second=0.01)
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
        assert cells(app.emulator) == cells(rendered_by_rich(app, size))


async def bytes_per_frame(cell_updates: bool) -> float:
    session = fake.fake_gpt(700)
    app = EmulatedApp(session, (120, 40), cell_updates, frames_per_second=0.01)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        app.updates.clear()
        for _ in range(6):
            session.advance(10)
            app.draw_frame()
            await pilot.pause()
        kind = CellUpdate if cell_updates else ChopsUpdate
        sizes = [size for updated, size in app.updates if updated is kind]
        assert len(sizes) == len(app.updates) > 0
        return sum(sizes) / len(sizes)


async def test_cell_updates_take_a_fraction_of_the_bytes():
    few = await bytes_per_frame(cell_updates=True)
    assert few < 3500
    assert few < 0.5 * await bytes_per_frame(cell_updates=False)


async def test_without_cell_updates_the_compositor_is_textuals_own():
    app = EmulatedApp(fake.fake_gpt(10), (80, 24), cell_updates=False)
    async with app.run_test(size=(80, 24)):
        assert type(app.screen._compositor) is Compositor
    app = EmulatedApp(fake.fake_gpt(10), (80, 24), cell_updates=True)
    async with app.run_test(size=(80, 24)):
        assert type(app.screen._compositor) is CellCompositor


def test_true_color_becomes_one_of_256():
    console = Console(force_terminal=True, color_system="truecolor")
    textual_hacks.use_256_colors(console)
    assert console.color_system == "256"
    with console.capture() as capture:
        console.print("x", style="#5cb3f2")
    assert "\x1b[38;5;" in capture.get()
    console = Console(force_terminal=True, color_system="standard")
    textual_hacks.use_256_colors(console)
    assert console.color_system == "standard"


def test_links_and_controls_keep_their_sequences():
    console = Console(force_terminal=True, color_system="truecolor")
    style = Style(color="red", link="https://example.org")
    strip = Strip([Segment("here", style), Segment(" there", Style(color="red"))])
    update = CellUpdate([{0: strip}], [(0, 0, 10)], [[10]])
    written = update.render_segments(console)
    assert "https://example.org" in written
    screen = pyte.Screen(20, 1)
    pyte.Stream(screen).feed(written)
    assert screen.display[0].rstrip() == "here there"


async def test_writes_that_the_terminal_has_not_read_are_counted():
    app = TuiTrainerApp(None)
    driver = textual_hacks.metered(HeadlessDriver)(app)
    assert textual_hacks.pending_writes(None) == textual_hacks.pending_writes(driver) == 0
    writer = WriterThread(StringIO())  # not started: it takes nothing from its queue
    driver._writer_thread = writer
    for number in range(3):
        writer.write("x")
        assert textual_hacks.pending_writes(driver) == number + 1
    driver.write("größer")
    assert textual_hacks.bytes_written(driver) == 8


def test_the_driver_of_a_terminal_writes_on_such_a_thread():
    source = Path(linux_driver.__file__).read_text()
    assert "self._writer_thread = WriterThread(" in source


async def test_the_bindings_of_a_node_are_its_own():
    app = TuiTrainerApp(fake.fake_gpt(10))
    async with app.run_test(size=(80, 24)):
        assert [b.action for b in textual_hacks.bindings_of(app.screen, "right")] == ["tab(1)"]
        assert textual_hacks.bindings_of(app.screen, "f12") == []


def test_parts_of_the_screen_are_drawn_up_to_250_times_a_second():
    code = (
        "import tui_trainer.ui.app, textual.screen\n"
        "assert textual.screen.UPDATE_PERIOD == 1 / 250, textual.screen.UPDATE_PERIOD"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
