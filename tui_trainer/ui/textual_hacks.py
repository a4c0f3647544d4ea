"""Everything that relies on Textual's private names, last checked with Textual 8.2.8.

1. A compositor that sends the terminal only the cells that changed. Textual sends each changed part
   of a line from the left edge of its widget on, and both colours with every segment: 15 KB a frame
   for the few hundred cells that change on the dashboard at 120×40. `CellCompositor` sends 1.2 KB.
   Uses `textual._compositor.Compositor` and `ChopsUpdate`, `Screen._compositor`,
   `Console._color_system` and `Style._make_ansi_codes`.
2. A driver that counts its output and can be closed while the terminal reads nothing.
   Uses `App._driver`, `Driver._writer_thread` and `WriterThread._queue`.
3. The bindings of one node. Uses `DOMNode._bindings`.
4. The terminal's answer about its background colour, removed from the input before Textual reads it
   as keys. Uses `textual._xterm_parser.XTermParser.feed`.

`tests/ui/test_textual_hacks.py` fails when one of these names changes its meaning.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Event, Thread, current_thread, main_thread
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, Compositor
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.binding import Binding
from textual.dom import DOMNode
from textual.driver import Driver
from textual.screen import Screen

try:
    import termios
except ImportError:  # pragma: no cover - there is none on Windows
    termios = None  # type: ignore[assignment]

# ---------------------------------------------------------------- only the cells that changed

RESET = "\x1b[0m"
_VISIBLE_ON_SPACES = frozenset(("4", "7", "9", "21", "51", "52", "53"))
"""Attributes that show on a space: underline, reverse, strike-through, frame, …"""

StyleCodes = tuple[str, str, str]
"""SGR parameters of the attributes, the foreground and the background; "" is the default."""
DEFAULT_CODES: StyleCodes = ("", "", "")


class SgrWriter:
    """Emits the shortest escape sequence that changes one style into another."""

    def __init__(self) -> None:
        self._current = DEFAULT_CODES

    def change_to(self, wanted: StyleCodes) -> str:
        """The sequence to send before text with the style `wanted`."""
        current, self._current = self._current, wanted
        if wanted == current:
            return ""
        if wanted[0] != current[0]:
            return f"\x1b[{';'.join(code for code in ('0', *wanted) if code)}m"
        changed = []
        if wanted[1] != current[1]:
            changed.append(wanted[1] or "39")
        if wanted[2] != current[2]:
            changed.append(wanted[2] or "49")
        return f"\x1b[{';'.join(changed)}m"

    def reset(self) -> str:
        """The sequence to return to the default style."""
        styled, self._current = self._current != DEFAULT_CODES, DEFAULT_CODES
        return RESET if styled else ""


@lru_cache(maxsize=4096)
def _style_codes(style: Style, system: ColorSystem) -> StyleCodes:
    colors = []
    for color, foreground in ((style.color, True), (style.bgcolor, False)):
        codes = color.downgrade(system).get_ansi_codes(foreground) if color is not None else ()
        colors.append(";".join(codes))
    return style.without_color._make_ansi_codes(system), colors[0], colors[1]


@lru_cache(maxsize=64)
def _visible_on_spaces(attributes: str) -> bool:
    return not _VISIBLE_ON_SPACES.isdisjoint(attributes.split(";"))


@dataclass
class CellRun:
    """Adjacent cells of one line and one style."""

    y: int
    x: int
    width: int
    codes: StyleCodes
    text: str
    has_sequences: bool = False
    """Whether `text` contains escape sequences (of a link, or of a control segment)."""


class CellUpdate(ChopsUpdate):
    """A partial update of the screen in fewer bytes than Textual's.

    Runs of cells are written style by style, not line by line: in a table, whose columns have a
    colour each, moving the cursor (4 to 8 bytes) is cheaper than changing the colour (17).
    """

    def render_segments(self, console: Console) -> str:
        """The text and escape sequences to write."""
        runs = self._cell_runs(console)
        first_use = {run.codes: number for number, run in reversed(list(enumerate(runs)))}
        runs.sort(key=lambda run: first_use[run.codes])
        out: list[str] = []
        sgr = SgrWriter()
        cursor = (-1, -1)
        for run in runs:
            out.append(_move_cursor(cursor, (run.y, run.x)))
            out.append(sgr.reset() if run.has_sequences else sgr.change_to(run.codes))
            out.append(run.text)
            cursor = (-1, -1) if run.has_sequences else (run.y, run.x + run.width)
        out.append(sgr.reset())
        return "".join(out)

    def _cell_runs(self, console: Console) -> list[CellRun]:
        system, runs = console._color_system, []
        for y, x1, x2 in self.spans:
            last: CellRun | None = None
            for end, (x, strip) in zip(self.chop_ends[y], self.chops[y].items(), strict=False):
                if strip is None or x >= x2 or end <= x1:
                    continue
                cell = max(x, x1)
                for segment in strip.crop(cell - x, min(end, x2) - x):
                    run = _cell_run(y, cell, segment, system, console)
                    cell += run.width
                    if last is not None and (codes := _common_codes(last, run)) is not None:
                        last.codes = codes
                        last.text += run.text
                        last.width += run.width
                    else:
                        runs.append(run)
                        last = run
        return runs


def _cell_run(
    y: int, x: int, segment: Segment, system: ColorSystem | None, console: Console
) -> CellRun:
    text, style, control = segment
    if control or (style is not None and style.link):
        if style is not None and not control:
            text = style.render(text, color_system=system)
        return CellRun(y, x, segment.cell_length, DEFAULT_CODES, text, has_sequences=True)
    codes = _style_codes(style, system) if style is not None and system is not None else None
    return CellRun(y, x, segment.cell_length, codes or DEFAULT_CODES, text)


def _common_codes(left: CellRun, right: CellRun) -> StyleCodes | None:
    """The codes with which both runs can be written as one; None if there are none."""
    if left.has_sequences or right.has_sequences:
        return None
    if left.y != right.y or left.x + left.width != right.x:
        return None
    a, b = left.codes, right.codes
    if a == b:
        return a
    if a[2] != b[2] or _visible_on_spaces(a[0]) or _visible_on_spaces(b[0]):
        return None
    if right.text.isspace():  # a space shows its background only
        return a
    return b if left.text.isspace() else None


def _move_cursor(current: tuple[int, int], target: tuple[int, int]) -> str:
    """The sequence to move the cursor between two (line, column)."""
    if current == target:
        return ""
    if current[0] == target[0] and target[1] > current[1] >= 0:
        return f"\x1b[{target[1] - current[1]}C"
    return f"\x1b[{target[0] + 1};{target[1] + 1}H"


class CellCompositor(Compositor):
    """A compositor whose partial updates are `CellUpdate`s."""

    def render_partial_update(self) -> ChopsUpdate | None:
        """What has changed since the last update."""
        update = super().render_partial_update()
        if type(update) is not ChopsUpdate:
            return update
        return CellUpdate(update.chops, update.spans, update.chop_ends)


def use_cell_compositor(screen: Screen[Any]) -> None:
    """Send only changed cells of `screen`. Call before the screen is mounted."""
    screen._compositor = CellCompositor()


def use_256_colors(console: Console) -> None:
    """Write colours as one of 256, which takes half the bytes of 24-bit colours."""
    if console._color_system is ColorSystem.TRUECOLOR:
        console._color_system = ColorSystem.EIGHT_BIT


# ---------------------------------------------------------------- the driver's output

CLOSE_TIMEOUT_S = 1.0
"""How long closing waits for a terminal that reads nothing before it discards output."""
DISCARD_INTERVAL_S = 0.1


class MeteredDriver(Driver):
    """Mixed into one of Textual's drivers: counts the bytes written, and closes even if the
    terminal has stopped reading (as after ctrl+s)."""

    bytes_written = 0

    def write(self, data: str) -> None:
        """Write and count."""
        self.bytes_written += len(data.encode("utf-8", "replace"))
        super().write(data)  # type: ignore[safe-super]

    def close(self) -> None:
        """Wait for the terminal to read what is left, but not longer than `CLOSE_TIMEOUT_S`."""
        writer = getattr(self, "_writer_thread", None)
        if termios is None or writer is None or current_thread() is not main_thread():
            super().close()
            return
        closed = Event()
        Thread(target=self._discard_output, args=(writer, closed), daemon=True).start()
        # A handler must be installed for SIGWINCH to interrupt the writer's blocked write().
        previous = signal.signal(signal.SIGWINCH, lambda *_: None)
        try:
            super().close()
        finally:
            closed.set()
            signal.signal(signal.SIGWINCH, previous or signal.SIG_DFL)

    def _discard_output(self, writer: Thread, closed: Event) -> None:
        """Flush the terminal's output queue and wake the blocked writer until it is done."""
        timeout = CLOSE_TIMEOUT_S
        while not closed.wait(timeout):
            with contextlib.suppress(OSError, ValueError, termios.error):
                termios.tcflush(writer.fileno(), termios.TCOFLUSH)  # type: ignore[attr-defined]
                if writer.ident is not None and writer.is_alive():
                    signal.pthread_kill(writer.ident, signal.SIGWINCH)
            timeout = DISCARD_INTERVAL_S


@cache
def metered(driver: type[Driver]) -> type[Driver]:
    """The driver class, with its output counted."""
    return type(f"Metered{driver.__name__}", (MeteredDriver, driver), {})


def bytes_written(driver: Driver | None) -> int:
    """Bytes sent to the terminal so far; 0 without one."""
    return driver.bytes_written if isinstance(driver, MeteredDriver) else 0


def driver_of(app: App[Any]) -> Driver | None:
    """The driver of the app's terminal; None before the app runs."""
    return app._driver


def pending_writes(driver: Driver | None) -> int:
    """Pieces of output that the terminal has not read yet.

    Textual writes on a thread, from a queue of at most 30. When it is full, the next write blocks
    the event loop.
    """
    queue = getattr(getattr(driver, "_writer_thread", None), "_queue", None)
    return queue.qsize() if queue is not None else 0


# ---------------------------------------------------------------- bindings


def bindings_of(node: DOMNode, key: str) -> list[Binding]:
    """The node's own bindings of `key`, even where another node has one with priority."""
    return node._bindings.key_to_bindings.get(key, [])


# ---------------------------------------------------------------- the terminal's background

BACKGROUND_QUERY = "\x1b]11;?\x1b\\"
"""Asks an xterm-like terminal for its background colour; others ignore it."""
_BACKGROUND_REPLY = re.compile(r"\x1b\]11;rgba?:([0-9a-fA-F/]+)(?:\x07|\x1b\\)")
_BEGUN_REPLY = re.compile(r"\x1b\](?:1(?:1(?:;[^\x07\x1b]*\x1b?)?)?)?\Z")
_feed = XTermParser.feed


def take_background_replies(answered: Callable[[tuple[float, float, float]], None]) -> None:
    """Call `answered`, on the thread that reads the input, with red, green and blue of 0 to 1 for
    each reply to `BACKGROUND_QUERY`. To be called before the app starts."""
    begun = ""

    def feed(self: XTermParser, data: str) -> Iterable[Any]:
        nonlocal begun
        if data:
            data, begun = begun + data, ""
            while (reply := _BACKGROUND_REPLY.search(data)) is not None:
                parts = reply[1].split("/")[:3]
                if len(parts) == 3 and all(parts):
                    red, green, blue = (int(part, 16) / (16 ** len(part) - 1) for part in parts)
                    answered((red, green, blue))
                data = data[: reply.start()] + data[reply.end() :]
            if (rest := _BEGUN_REPLY.search(data)) is not None:
                data, begun = data[: rest.start()], rest[0]
            if not data:
                return ()
        return _feed(self, data)

    XTermParser.feed = feed  # type: ignore[method-assign]
