"""Pictures of real pixels in terminals that support them: kitty's graphics protocol, and sixel.

https://sw.kovidgoyal.net/kitty/graphics-protocol/ and the VT330/VT340 programmer reference manual.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import re
import select
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

try:
    import termios
    import tty
except ImportError:  # pragma: no cover - there is none on Windows
    termios = tty = None  # type: ignore[assignment]

Pixels = NDArray[np.uint8]
"""(height, width, 3), red, green and blue."""

QUERY = (
    "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"  # kitty: can you show a picture of one pixel?
    "\x1b[>0q"  # XTVERSION: name and version
    "\x1b[16t"  # the size of a character in pixels
    "\x1b[c"  # DA1, which every terminal answers: the last answer
)
ANSWER_S = 1.0
"""How long a terminal may take to answer; it may be at the other end of an ssh connection."""
_KITTY = re.compile(rb"\x1b_Gi=31;OK\x1b\\")
_VERSION = re.compile(rb"\x1bP>\|([^\x1b]*)\x1b\\")
_CELL = re.compile(rb"\x1b\[6;(\d{1,4});(\d{1,4})t")
_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
SIXEL = b"4"
"""Attribute for sixel graphics in the answer to DA1."""
WITH_PLACEHOLDERS = ("kitty", "ghostty")
"""Terminals that draw a picture where its placeholder characters are, as an app that redraws lines
needs. Other terminals that answer kitty's query would show the characters."""
DEFAULT_CELL = (10, 20)
NO_QUERIES = ("dumb", "linux")
"""`$TERM` of terminals that would print a query."""

PLACEHOLDER = "\U0010eeee"
_MARKS = (
    "305 30D-30E 310 312 33D-33F 346 34A-34C 350-352 357 35B 363-36F 483-487 592-595 597-599 "
    "59C-5A1 5A8-5A9 5AB-5AC 5AF 5C4 610-617 657-65B 65D-65E 6D6-6DC 6DF-6E2 6E4 6E7-6E8 "
    "6EB-6EC 730 732-733 735-736 73A 73D 73F-741 743 745 747 749-74A 7EB-7F1 7F3 816-819 "
    "81B-823 825-827 829-82D 951 953-954 F82-F83 F86-F87 135D-135F 17DD 193A 1A17 1A75-1A7C "
    "1B6B 1B6D-1B73 1CD0-1CD2 1CDA-1CDB 1CE0 1DC0-1DC1 1DC3-1DC9 1DCB-1DCC 1DD1-1DE6 1DFE "
    "20D0-20D1 20D4-20D7 20DB-20DC 20E1 20E7 20E9 20F0 2CEF-2CF1 2DE0-2DFF A66F A67C-A67D "
    "A6F0-A6F1 A8E0-A8F1 AAB0 AAB2-AAB3 AAB7-AAB8 AABE-AABF AAC1 FE20-FE26 10A0F 10A38 "
    "1D185-1D189 1D1AA-1D1AD 1D242-1D244"
)
"""The combining characters that number rows and columns, in the order of the protocol."""
MAX_CELLS = 297
"""Maximum number of rows, and of columns, of a picture of placeholders: the number of combining
characters."""
CHUNK = 4096
"""Bytes of a picture in one escape sequence of kitty's."""


@dataclass(frozen=True)
class PixelSupport:
    """The support for pictures that a terminal has reported."""

    terminal: str
    """Name and version, such as `kitty(0.35.2)`, or the value of `$TERM`."""
    kitty: bool
    sixel: bool
    cell_width: int
    """Width of a character in pixels."""
    cell_height: int

    @property
    def placeholders(self) -> bool:
        """Whether pictures can be placed by characters."""
        return self.kitty and self.terminal.casefold().startswith(WITH_PLACEHOLDERS)

    @property
    def in_app(self) -> bool:
        """Whether an app that redraws its lines can show pictures."""
        return self.placeholders or self.sixel

    @property
    def missing(self) -> str:
        """Why there are no pictures in the app."""
        if self.kitty:
            return (
                f"{self.terminal} does not place pictures by characters, and has no sixel graphics"
            )
        return f"{self.terminal} has neither the graphics of kitty nor sixel"


HINT = "kitty, Ghostty, WezTerm, foot, Konsole and xterm -ti vt340 have them"


def ask_terminal(path: str = "/dev/tty") -> PixelSupport:
    """Ask the terminal for its support of pictures. Nothing else may read the terminal meanwhile,
    and keys typed before the answers are lost. A terminal that does not answer has no support."""
    term = os.environ.get("TERM", "") or "this terminal"
    answer, size = b"", DEFAULT_CELL
    if termios is not None and term not in NO_QUERIES:
        with contextlib.suppress(OSError, termios.error), _opened(path) as fd:
            size = _size_from_window(fd)
            with _unbuffered(fd):
                os.write(fd, QUERY.encode())
                answer = _read_answer(fd)
    version, cell, known = (pattern.search(answer) for pattern in (_VERSION, _CELL, _ATTRIBUTES))
    width, height = (int(cell[2]), int(cell[1])) if cell else size
    return PixelSupport(
        terminal=version[1].decode("ascii", "replace") if version else term,
        kitty=_KITTY.search(answer) is not None,
        sixel=known is not None and SIXEL in known[1].split(b";"),
        cell_width=min(max(width, 1), 100),
        cell_height=min(max(height, 1), 200),
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _unbuffered(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def _read_answer(fd: int) -> bytes:
    deadline, answer = time.monotonic() + ANSWER_S, b""
    while _ATTRIBUTES.search(answer) is None:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        part = os.read(fd, 4096)
        if not part:
            break
        answer += part
    return answer


def _size_from_window(fd: int) -> tuple[int, int]:
    """(width, height) of a character in pixels, if the kernel knows the size of the window."""
    try:
        raw = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return DEFAULT_CELL
    rows, columns, width, height = struct.unpack("HHHH", raw)
    if not (rows and columns and width and height):
        return DEFAULT_CELL
    return width // columns, height // rows


# ---------------------------------------------------------------- pictures


def enlarged(image: Pixels, width: int, height: int) -> Pixels:
    """`image` with each pixel repeated as often as fits into `width` × `height`, at least once."""
    down, across = max(1, height // image.shape[0]), max(1, width // image.shape[1])
    return image.repeat(down, 0).repeat(across, 1)


def padded(image: Pixels, columns: int, rows: int, cell: tuple[int, int], color: Pixels) -> Pixels:
    """The picture at the top left of an area of `columns` × `rows` characters of `cell` (width,
    height) pixels. The rest of the area has `color`; what does not fit is cut."""
    area = np.empty((rows * cell[1], columns * cell[0], 3), np.uint8)
    area[:] = color
    height, width = min(image.shape[0], area.shape[0]), min(image.shape[1], area.shape[1])
    area[:height, :width] = image[:height, :width]
    return area


def kitty(image: Pixels, columns: int, rows: int, number: int = 0) -> str:
    """The picture in `columns` × `rows` characters: at the cursor, or with a `number` wherever its
    placeholders are. A picture of the same number is replaced."""
    height, width, _ = image.shape
    data = base64.standard_b64encode(zlib.compress(image.tobytes(), 1)).decode()
    place = f"i={number},U=1," if number else ""
    keys = f"a=T,{place}f=24,o=z,s={width},v={height},c={columns},r={rows},q=2,"
    parts = [data[first : first + CHUNK] for first in range(0, len(data), CHUNK)]
    more = [1] * (len(parts) - 1) + [0]
    return "".join(
        f"\x1b_G{keys if place == 0 else ''}m={follows};{part}\x1b\\"
        for place, (part, follows) in enumerate(zip(parts, more, strict=True))
    )


def delete_kitty(number: int) -> str:
    """The sequence that deletes a picture from the terminal."""
    return f"\x1b_Ga=d,d=I,i={number},q=2\x1b\\"


def placeholders(columns: int, rows: int) -> list[str]:
    """The characters of each row of a picture. They are written in the 24-bit colour that equals
    the picture's number."""
    marks = _marks()
    return [
        "".join(PLACEHOLDER + marks[row] + marks[column] for column in range(columns))
        for row in range(rows)
    ]


def _marks() -> list[str]:
    ranges = [part.split("-") for part in _MARKS.split()]
    return [chr(code) for each in ranges for code in range(int(each[0], 16), int(each[-1], 16) + 1)]


def sixel(image: Pixels) -> str:
    """The picture at the cursor. Raises ValueError for more than 256 colours.

    Six rows at a time are written: for each colour in them, a character of six bits per column.
    """
    height, width, _ = image.shape
    packed = image.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    colors, places = np.unique(packed, return_inverse=True)
    if len(colors) > 256:
        raise ValueError(f"{len(colors)} colours, of at most 256")
    places = places.reshape(height, width)
    out = [f'\x1bP0;1;0q"1;1;{width};{height}']
    for number, color in enumerate(colors.tolist()):
        parts = (color >> 16, color >> 8 & 255, color & 255)
        red, green, blue = (round(part * 100 / 255) for part in parts)
        out.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = places[top : top + 6]
        bits = np.zeros((len(colors), width), np.uint8)
        for row, numbers in enumerate(band):
            bits[numbers, np.arange(width)] |= 1 << row
        used = np.flatnonzero(bits.any(1)).tolist()
        text = (bits + 63).tobytes().decode("ascii")
        lines = (f"#{number}{text[number * width : (number + 1) * width]}" for number in used)
        out.append(_RUN.sub(_repeated, "$".join(lines)) + "-")
    return "".join(out) + "\x1b\\"


_RUN = re.compile(r"([?-~])\1{3,}")


def _repeated(run: re.Match[str]) -> str:
    return f"!{len(run[0])}{run[1]}"
