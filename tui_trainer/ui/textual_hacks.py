"""Sends the terminal only the cells that changed, in as few bytes as they can be said.

Textual 8.2 sends a changed stretch of a line from the left edge of its widget on, once for each
stretch, and both colours for every segment: 9 KB a frame for the 300 cells that change on the
dashboard at 120×40. Here each stretch begins where it begins, what has one style is written
together, and of a style only what differs from the one before is set: 1.2 KB. Should a later
Textual build its updates otherwise, its own way of sending them stands.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Event, Thread, current_thread, main_thread

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, Compositor
from textual.driver import Driver

RESET = "\x1b[0m"
_SHOWN_ON_BLANKS = frozenset(("4", "7", "9", "21", "51", "52", "53"))
"""Attributes that can be seen on a space: underlined, reversed, struck through, framed, …"""


Codes = tuple[str, str, str]
"""What sets the attributes, the foreground and the background; "" each for the terminal's own."""
NO_CODES: Codes = ("", "", "")


class Pen:
    """The style that the terminal writes in, and the sequences that change it to another."""

    def __init__(self) -> None:
        self._now = NO_CODES

    def turn(self, wanted: Codes) -> str:
        """What to send before text that is to be written so."""
        now, self._now = self._now, wanted
        if wanted == now:
            return ""
        if wanted[0] != now[0]:
            return f"\x1b[{';'.join(code for code in ('0', *wanted) if code)}m"
        changed = []
        if wanted[1] != now[1]:
            changed.append(wanted[1] or "39")
        if wanted[2] != now[2]:
            changed.append(wanted[2] or "49")
        return f"\x1b[{';'.join(changed)}m"

    def lift(self) -> str:
        """Back to the terminal's own style."""
        worn, self._now = self._now != NO_CODES, NO_CODES
        return RESET if worn else ""


@lru_cache(maxsize=4096)
def _codes(style: Style, system: ColorSystem) -> Codes:
    """The codes of attributes, foreground and background."""
    colors = []
    for color, foreground in ((style.color, True), (style.bgcolor, False)):
        codes = color.downgrade(system).get_ansi_codes(foreground) if color is not None else ()
        colors.append(";".join(codes))
    return style.without_color._make_ansi_codes(system), colors[0], colors[1]


@lru_cache(maxsize=64)
def _shown(attributes: str) -> bool:
    return not _SHOWN_ON_BLANKS.isdisjoint(attributes.split(";"))


@dataclass
class CellRun:
    """Cells of one line that are written in one go."""

    y: int
    x: int
    width: int
    codes: Codes
    text: str
    plain: bool = False
    """Whether `text` brings its own sequences (a link, a control)."""


class TightUpdate(ChopsUpdate):
    """The same update in fewer bytes.

    Pieces are written style by style, not line by line: in a table, whose columns have a colour
    each, it is cheaper to move the cursor (4 to 8 bytes) than to change the colour (17).
    """

    def render_segments(self, console: Console) -> str:
        """The escape sequences and text to write."""
        pieces = self._pieces(console)
        first = {piece.codes: number for number, piece in reversed(list(enumerate(pieces)))}
        pieces.sort(key=lambda piece: first[piece.codes])
        out: list[str] = []
        pen = Pen()
        at = (-1, -1)
        for piece in pieces:
            out.append(_move(at, (piece.y, piece.x)))
            out.append(pen.lift() if piece.plain else pen.turn(piece.codes))
            out.append(piece.text)
            at = (-1, -1) if piece.plain else (piece.y, piece.x + piece.width)
        out.append(pen.lift())
        return "".join(out)

    def _pieces(self, console: Console) -> list[CellRun]:
        system, pieces = console._color_system, []
        for y, x1, x2 in self.spans:
            last: CellRun | None = None
            for end, (x, strip) in zip(self.chop_ends[y], self.chops[y].items(), strict=False):
                if strip is None or x >= x2 or end <= x1:
                    continue
                at = max(x, x1)
                for segment in strip.crop(at - x, min(end, x2) - x):
                    piece = _piece(y, at, segment, system, console)
                    at += piece.width
                    if last is not None and (codes := _together(last, piece)) is not None:
                        last.codes = codes
                        last.text += piece.text
                        last.width += piece.width
                    else:
                        pieces.append(piece)
                        last = piece
        return pieces


def _piece(
    y: int, x: int, segment: Segment, system: ColorSystem | None, console: Console
) -> CellRun:
    text, style, control = segment
    if control or (style is not None and style.link):
        return CellRun(y, x, segment.cell_length, NO_CODES, _plainly(segment, console), True)
    codes = _codes(style, system) if style is not None and system is not None else NO_CODES
    return CellRun(y, x, segment.cell_length, codes, text)


def _together(left: CellRun, right: CellRun) -> Codes | None:
    """The codes in which both can be written, if there are such and they touch."""
    if left.plain or right.plain or left.y != right.y or left.x + left.width != right.x:
        return None
    a, b = left.codes, right.codes
    if a == b:
        return a
    if a[2] != b[2] or _shown(a[0]) or _shown(b[0]):
        return None
    if right.text.isspace():  # of a space only the background is seen
        return a
    return b if left.text.isspace() else None


def _move(old: tuple[int, int], new: tuple[int, int]) -> str:
    """From (line, column) to another place."""
    if old == new:
        return ""
    if old[0] == new[0] and new[1] > old[1] >= 0:
        return f"\x1b[{new[1] - old[1]}C"
    return f"\x1b[{new[0] + 1};{new[1] + 1}H"


def _plainly(segment: Segment, console: Console) -> str:
    """What is rare is left to Rich."""
    text, style, control = segment
    if control or style is None:
        return text
    return style.render(text, color_system=console._color_system)


class TightCompositor(Compositor):
    """A compositor whose partial updates are `TightUpdate`s."""

    def render_partial_update(self) -> ChopsUpdate | None:
        """What changed since the last time."""
        update = super().render_partial_update()
        if type(update) is not ChopsUpdate:
            return update
        return TightUpdate(update.chops, update.spans, update.chop_ends)


# ---- output
# What goes to the terminal, counted; and whether the terminal takes it.


try:
    import termios
except ImportError:  # pragma: no cover - there is none on Windows
    termios = None  # type: ignore[assignment]

PATIENCE_S = 1.0
"""How long leaving waits for a terminal that takes nothing …"""
AGAIN_S = 0.1
"""… and how often what it has not taken is then thrown away."""


class Metered(Driver):
    """Mixed into a driver of Textual's: counts the bytes that were handed to it, and closes whether
    the terminal takes them or not."""

    written = 0

    def write(self, data: str) -> None:
        """Write, and count."""
        self.written += len(data.encode("utf-8", "replace"))
        super().write(data)  # type: ignore[safe-super]

    def close(self) -> None:
        """Wait for the terminal to take what is left, but not for ever: somebody wants to leave."""
        writer = getattr(self, "_writer_thread", None)
        if termios is None or writer is None or current_thread() is not main_thread():
            super().close()
            return
        closed = Event()
        Thread(target=self._throw_away, args=(writer, closed), daemon=True).start()
        before = signal.signal(signal.SIGWINCH, lambda *_: None)  # one that interrupts a write
        try:
            super().close()
        finally:
            closed.set()
            signal.signal(signal.SIGWINCH, before or signal.SIG_DFL)

    def _throw_away(self, writer: Thread, closed: Event) -> None:
        """Empty what the terminal has not taken, and let the writer notice that there is room."""
        patience = PATIENCE_S
        while not closed.wait(patience):
            with contextlib.suppress(OSError, ValueError, termios.error):
                termios.tcflush(writer.fileno(), termios.TCOFLUSH)  # type: ignore[attr-defined]
                if writer.ident is not None and writer.is_alive():
                    signal.pthread_kill(writer.ident, signal.SIGWINCH)
            patience = AGAIN_S


@cache
def metered(driver: type[Driver]) -> type[Driver]:
    """The driver, with its output counted."""
    return type(f"Metered{driver.__name__}", (Metered, driver), {})


def written(driver: Driver | None) -> int:
    """Bytes handed to the terminal so far; 0 where there is none."""
    return driver.written if isinstance(driver, Metered) else 0


def waiting(driver: Driver | None) -> int:
    """Pieces of output that the terminal has not taken yet.

    Textual writes on a thread from a queue that holds 30 of them; when it is full, whoever draws is
    kept waiting, and that is the event loop. There is no public way to see how full it is.
    """
    queue = getattr(getattr(driver, "_writer_thread", None), "_queue", None)
    return queue.qsize() if queue is not None else 0
