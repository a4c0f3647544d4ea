"""Makes an exported screen look the same in every renderer, whatever fonts it has.

Few monospaced fonts hold braille, and a stand-in from another font has another width, so that a row
of dots drifts out of its panel. Here braille is drawn as dots, every other sign beyond ASCII is put
at the x of its own cell, and nothing is fetched from the network.
"""

from __future__ import annotations

import re
from html import escape, unescape

CELL_WIDTH = 12.2
CELL_HEIGHT = 24.4
BASELINE = 18.5
"""Of the text below the top of its cell, in the units of Textual's export."""
FONTS = '"Fira Code", "DejaVu Sans Mono", Menlo, Consolas, monospace'

_TEXT = re.compile(
    r'<text class="(?P<style>[^"]+)" x="(?P<x>[\d.]+)" y="(?P<y>[\d.]+)" textLength="[\d.]+"'
    r"(?P<rest>[^>]*)>(?P<text>[^<]*)</text>"
)
# Words of ASCII stay whole; every other sign that is not braille stands alone, in its own cell.
_PIECES = re.compile(r"[!-~]+|[^\s\x00-\x7f\u2800-\u28ff]")
# Bit to (column, row) of its dot in the 2 × 4 grid (Unicode, Braille Patterns).
_DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))


def redraw(svg: str) -> str:
    """The same picture on an exact grid of cells."""
    svg = re.sub(r"@font-face \{.*?\n    \}\n", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-family: Fira Code, monospace;", f"font-family: {FONTS};")
    return _TEXT.sub(_redraw_run, svg)


def _redraw_run(run: re.Match[str]) -> str:
    text = unescape(run["text"])
    if text.isascii():
        return run[0]
    x, y, style = float(run["x"]), float(run["y"]), run["style"]
    out: list[str] = []
    dots = "".join(
        _dots(ord(sign) - 0x2800, x + column * CELL_WIDTH, y - BASELINE)
        for column, sign in enumerate(text)
        if _is_braille(sign)
    )
    if dots:
        out.append(f'<path class="{style}" d="{dots}"/>')
    for piece in _PIECES.finditer(text):
        place = f"{x + piece.start() * CELL_WIDTH:.1f}"
        written = escape(piece[0], quote=False)
        out.append(f'<text class="{style}" x="{place}" y="{y}"{run["rest"]}>{written}</text>')
    return "".join(out)


def _is_braille(sign: str) -> bool:
    return 0x2800 <= ord(sign) <= 0x28FF


def _dots(bits: int, left: float, top: float) -> str:
    """One small square for each dot of the pattern `bits`, as path data."""
    return "".join(
        f"M{left + CELL_WIDTH * (0.25 + 0.5 * column) - 1.7:.1f} "
        f"{top + CELL_HEIGHT * (0.125 + 0.25 * row) - 1.7:.1f}h3.4v3.4h-3.4z"
        for bit, (column, row) in enumerate(_DOTS)
        if bits >> bit & 1
    )
