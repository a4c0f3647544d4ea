"""Pictures of real pixels: what terminals answer, what is sent to them, and when."""

from __future__ import annotations

import base64
import os
import pty
import re
import select
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.ui.fake import fake_gpt
from tests.ui.fake_tensors import WEIGHT
from tests.ui.screens import app_on, frame, until
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.inspection import TensorRef
from tui_trainer.ui import terminal_images
from tui_trainer.ui.app import TuiTrainerApp, run_app
from tui_trainer.ui.screens.attention_layer import AttentionLayerScreen
from tui_trainer.ui.screens.dialogs import TextPrompt
from tui_trainer.ui.terminal_images import (
    PLACEHOLDER,
    QUERY,
    PixelSupport,
    ask_terminal,
    enlarged,
    kitty,
    padded,
    placeholders,
    sixel,
)

KITTY = b"\x1b_Gi=31;OK\x1b\\\x1bP>|kitty(0.35.2)\x1b\\\x1b[6;18;9t\x1b[?62;c"
KONSOLE = b"\x1b_Gi=31;OK\x1b\\\x1bP>|Konsole 24.2\x1b\\\x1b[?62;1;4c"
XTERM = b"\x1bP>|XTerm(390)\x1b\\\x1b[6;20;10t\x1b[?64;1;2;4;6;9;15;22c"
PLAIN = b"\x1b[?62;22c"
ON_KITTY = PixelSupport("kitty(0.35.2)", True, False, 9, 18)
ON_XTERM = PixelSupport("XTerm(390)", False, True, 10, 20)


class Terminal:
    """A pseudo-terminal that answers queries."""

    def __init__(self, answer: bytes) -> None:
        self.fd, self._other = pty.openpty()
        self.path = os.ttyname(self._other)
        self.asked = b""
        self._answer = answer
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self.asked.endswith(b"\x1b[c"):
            if not select.select([self.fd], [], [], 60)[0]:
                return
            self.asked += os.read(self.fd, 4096)
        for byte in self._answer:  # as over a slow line
            os.write(self.fd, bytes([byte]))

    def close(self) -> None:
        self._thread.join(60)
        os.close(self.fd)
        os.close(self._other)


@pytest.mark.parametrize(
    ("answer", "expected", "in_app"),
    [
        (KITTY, ON_KITTY, True),
        (KONSOLE, PixelSupport("Konsole 24.2", True, True, 10, 20), True),
        (XTERM, ON_XTERM, True),
        (PLAIN, PixelSupport("xterm-256color", False, False, 10, 20), False),
        (b"", PixelSupport("xterm-256color", False, False, 10, 20), False),
    ],
    ids=["kitty", "konsole", "xterm", "plain", "silent"],
)
def test_a_terminal_is_asked(monkeypatch, answer, expected, in_app):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal_images, "ANSWER_S", 60.0 if answer else 0.05)
    terminal = Terminal(answer)
    try:
        found = ask_terminal(terminal.path)
    finally:
        terminal.close()
    assert terminal.asked == QUERY.encode()
    assert found == expected
    assert found.in_app == in_app
    assert found.placeholders == (expected is ON_KITTY)


def test_no_query_is_sent_where_it_would_be_printed(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TERM", "dumb")
    assert not ask_terminal(str(tmp_path / "no terminal")).in_app
    monkeypatch.setenv("TERM", "xterm")
    found = ask_terminal(str(tmp_path / "no terminal"))
    assert found.missing == "xterm has neither the graphics of kitty nor sixel"


@pytest.mark.parametrize(
    ("support", "colors", "pixels", "said"),
    [
        (ON_XTERM, "", ON_XTERM, ""),
        (ON_KITTY, "truecolor", ON_KITTY, ""),
        (ON_KITTY, "", None, "No pixels: kitty(0.35.2) has neither"),
        (PixelSupport("WezTerm 2", True, False, 8, 16), "", None, "does not place pictures"),
    ],
)
def test_the_app_says_where_there_are_none(monkeypatch, support, colors, pixels, said):
    shown = []
    monkeypatch.setenv("COLORTERM", colors)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal_images, "ask_terminal", lambda: support)
    monkeypatch.setattr(TuiTrainerApp, "run_until_exit", lambda app: shown.append(app) or 0)
    run_app(None, pixels=True)
    assert shown[0].pixels == pixels
    assert said in shown[0]._message
    assert bool(shown[0]._message) == bool(said)


# ---------------------------------------------------------------- what is sent


def decoded_sixel(text: str) -> np.ndarray:
    """The picture of a sequence of sixels, a slow reference."""
    head, body = re.fullmatch(r'\x1bP[\d;]*q"1;1;([\d;]+?)(#.*)\x1b\\', text, re.DOTALL).groups()
    width, height = map(int, head.split(";"))
    image, colors = np.zeros((height, width, 3), np.uint8), {}
    x = y = number = 0
    for repeat, character, color, change in re.findall(
        r"(?:!(\d+))?([?-~])|#(\d+(?:;2;\d+;\d+;\d+)?)|([$-])", body
    ):
        if color:
            number, *parts = map(int, color.split(";"))
            if parts:
                colors[number] = [round(part * 255 / 100) for part in parts[1:]]
        elif change:
            x, y = 0, y + (6 if change == "-" else 0)
        else:
            for _ in range(int(repeat or 1)):
                for bit in range(6):
                    if (ord(character) - 63) >> bit & 1:
                        image[y + bit, x] = colors[number]
                x = x + 1
    return image


def decoded_kitty(text: str) -> tuple[dict[str, str], np.ndarray]:
    """The keys and the picture of kitty's sequences."""
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    keys = dict(each.split("=") for each in parts[0][0].split(","))
    assert [part.rpartition("m=")[2] for part, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, data in parts)
    data = zlib.decompress(base64.b64decode("".join(data for _, data in parts)))
    return keys, np.frombuffer(data, np.uint8).reshape(int(keys["v"]), int(keys["s"]), 3)


@pytest.mark.parametrize("shape", [(1, 1), (6, 8), (13, 31), (60, 100)])
def test_pictures_arrive_as_they_are(shape):
    chance = np.random.default_rng(0)
    colors = chance.integers(0, 101, (33, 3)) * 255 / 100  # sixel has hundredths
    image = np.rint(colors).astype(np.uint8)[chance.integers(0, 33, shape)]
    assert (decoded_sixel(sixel(image)) == image).all()
    keys, found = decoded_kitty(kitty(image, 5, 2, 77))
    assert (found == image).all()
    assert {name: keys[name] for name in "aUicrq"} == {
        "a": "T", "U": "1", "i": "77", "c": "5", "r": "2", "q": "2"
    }  # fmt: skip


def test_pictures_fill_whole_characters():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = enlarged(image, 10, 5)
    assert large.shape == (4, 9, 3)
    assert (large[::2, ::3] == image).all()
    area = padded(large, 3, 1, (4, 6), np.array([9, 9, 9], np.uint8))
    assert area.shape == (6, 12, 3)
    assert (area[:4, :9] == large).all()
    assert (area[4:] == 9).all()


def test_each_placeholder_says_which_part_it_is():
    lines = placeholders(297, 2)
    cells = [line.split(PLACEHOLDER)[1:] for line in lines]
    rows = [{cell[0] for cell in line} for line in cells]
    assert rows == [{"\u0305"}, {"\u030d"}]
    assert len({cell[1] for cell in cells[0]}) == 297
    assert cells[0][2][1] == "\u030e"


# ---------------------------------------------------------------- on the screen


def inspector(support: PixelSupport):
    session = fake_gpt()
    session.send(Pause())
    app = app_on("inspect", session)
    app.inspected, app.pixels = TensorRef(WEIGHT), support
    sent: list[str] = []
    app.write_to_terminal = sent.append
    return app, session, sent


async def all_sent(pilot, session, sent):
    """Until the picture of the last answer, which is encoded on a thread, has been sent."""

    def encoded():
        return all(each.is_finished for each in pilot.app.workers if each.group == "picture")

    await until(pilot, lambda: bool(sent), "a picture")
    before = None
    while before != (len(session.inspected), len(sent)):
        before = len(session.inspected), len(sent)
        await frame(pilot)
        await until(pilot, encoded, "the bytes of a picture")
        await frame(pilot)


async def test_a_heat_map_in_kitty_is_sent_once_and_placed_by_characters():
    app, session, sent = inspector(ON_KITTY)
    async with app.run_test(size=(120, 40)) as pilot:
        await all_sent(pilot, session, sent)
        keys, image = decoded_kitty(sent[0])
        heat = app.screen.heat_map
        assert image.shape == (int(keys["r"]) * 18, int(keys["c"]) * 9, 3)
        assert int(keys["r"]) <= heat.size.height - 2
        window = session.inspected[-1].window
        assert window.columns > heat.size.width  # more than there are characters
        line = heat.render_line(1)
        assert line.cell_length == heat.size.width
        segment = next(iter(line))
        assert segment.text.count(PLACEHOLDER) == int(keys["c"])
        red, green, blue = segment.style.color.triplet
        assert (red << 16) + (green << 8) + blue == int(keys["i"])
        drawn = len(sent)
        for _ in range(3):
            await all_sent(pilot, session, sent)
        assert len(sent) == drawn
        await pilot.press("plus")
        await until(pilot, lambda: len(sent) > drawn, "another picture")
        assert decoded_kitty(sent[-1])[0]["i"] == keys["i"]
    assert sent[-1].startswith("\x1b_Ga=d,")


async def test_a_heat_map_in_sixels_is_drawn_after_its_cells_and_not_over_a_dialog():
    app, session, sent = inspector(ON_XTERM)
    async with app.run_test(size=(80, 24)) as pilot:
        await all_sent(pilot, session, sent)
        heat = app.screen.heat_map
        place = f"\x1b7\x1b[{heat.content_region.y + 2};{heat.content_region.x + 1}H"
        assert all(each.startswith(place) for each in sent)
        image = decoded_sixel(sent[-1].removeprefix(place).removesuffix("\x1b8"))
        assert image.shape[1] <= heat.size.width * 10
        drawn = len(sent)
        heat.refresh()
        await until(pilot, lambda: len(sent) > drawn, "it is drawn again over its cells")
        app.push_screen(TextPrompt("in front"))
        await frame(pilot)
        drawn = len(sent)
        heat.refresh()
        await frame(pilot)
        assert len(sent) == drawn
        app.pop_screen()
        await until(pilot, lambda: len(sent) > drawn, "it is drawn again")


@pytest.mark.parametrize("support", [ON_KITTY, ON_XTERM], ids=["kitty", "sixel"])
async def test_an_attention_map_in_pixels_stands_beside_its_tokens(support):
    app, session, sent = inspector(support)
    async with app.run_test(size=(120, 40)) as pilot:
        await all_sent(pilot, session, sent)
        first = sent[0]
        await pilot.press("2", "down", "enter")
        await until(pilot, lambda: isinstance(app.screen, AttentionLayerScreen), "a layer")
        drawn = app.screen.map_view
        await until(pilot, lambda: "Weights" in drawn.render_line(0).text, "its map")
        await until(pilot, lambda: drawn._picture._wanted is not None, "a picture")
        await until(pilot, lambda: drawn._picture._sequence or drawn._picture._lines, "its bytes")
        await all_sent(pilot, session, sent)
        window = [each for each in session.inspected if isinstance(each, ExamineAttention)][-1]
        assert window.window.rows > 300  # a map of a long text has a pixel for each query
        left = drawn._gutter
        lines = [drawn.render_line(y).text for y in range(1, 5)]
        assert all(drawn.render_line(y).cell_length == drawn.size.width for y in range(1, 5))
        assert any(line[:left].strip() for line in lines)
        if support is ON_KITTY:
            keys, image = decoded_kitty(sent[-1])
            assert keys["i"] != decoded_kitty(first)[0]["i"]
            assert image.shape == (int(keys["r"]) * 18, int(keys["c"]) * 9, 3)
            assert lines[0].count(PLACEHOLDER) == int(keys["c"])
            assert lines[0].index(PLACEHOLDER) == left
        else:
            region = drawn.content_region
            assert sent[-1].startswith(f"\x1b7\x1b[{region.y + 2};{region.x + 1 + left}H")
