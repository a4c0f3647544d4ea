"""The characters that screens draw with, and their ASCII replacements of the same width."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter


@dataclass(frozen=True)
class Glyphs:
    """One set of characters."""

    ascii: bool = False
    rule: str = "─"
    vertical: str = "│"
    tick: str = "┤"
    corner: str = "└"
    axis: str = "─"
    dash: str = "╌"
    vertical_dash: str = "┆"
    running: str = "●"
    paused: str = "‖"
    waiting: str = "○"
    ended: str = "■"
    failed: str = "×"
    folded: str = "▸"
    unfolded: str = "▾"
    ascending: str = "▲"
    descending: str = "▼"
    arrow: str = "→"
    point: str = "◆"
    mark: str = "╵"
    user_event: str = "▴"
    current: str = "▶"
    ellipsis: str = "…"
    separator: str = "·"
    missing: str = "–"
    times: str = "×"
    track: str = "─"
    bar: str = "━"
    sparks: str = "▁▂▃▄▅▆▇█"


UNICODE = Glyphs()
ASCII = Glyphs(
    ascii=True,
    rule="-",
    vertical="|",
    tick="+",
    corner="+",
    axis="-",
    dash="-",
    vertical_dash="|",
    running="*",
    paused="=",
    waiting="o",
    ended="#",
    failed="x",
    folded="+",
    unfolded="-",
    ascending="^",
    descending="v",
    arrow=">",
    point="o",
    mark="'",
    user_event="^",
    current=">",
    ellipsis="~",
    separator="-",
    missing="-",
    times="x",
    track="-",
    bar="=",
    sparks="_.,-=+*#",
)

_REPLACEMENTS = str.maketrans(
    {
        **dict.fromkeys("─━╌┄┈═▔▁▂▃–—‾⎯", "-"),
        **dict.fromkeys("│┃┆║▏▎▌▍▐▕‖", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╔╗╚╝┏┓┗┛", "+"),
        **dict.fromkeys("█▓▉▊▋▇▆■▅▄▀", "#"),
        **dict.fromkeys("▒░", ":"),
        **dict.fromkeys("●◆•⬤★◼", "*"),
        **dict.fromkeys("○◇◯☐", "o"),
        **dict.fromkeys("×✗✕✖", "x"),
        **dict.fromkeys("▶▸→›⏵➜", ">"),
        **dict.fromkeys("◀◂←‹⏴", "<"),
        **dict.fromkeys("▲▴↑⬆", "^"),
        **dict.fromkeys("▼▾↓⬇", "v"),
        "…": "~",
        "·": "-",
        "✓": "+",
        "√": "V",
        "∑": "S",
        "Σ": "S",
        "σ": "s",
        "Δ": "D",
        "∞": "8",
        "∂": "d",
        "∇": "V",
        "−": "-",
        "≤": "<",
        "≥": ">",
        "≈": "~",
        "²": "2",
        "₂": "2",
        "₀": "0",
        "ᵢ": "i",
        "⏎": "<",
        "␣": "_",
        "⎵": "_",
        "\u00a0": " ",
        "‘": "'",
        "’": "'",
        "“": '"',
        "«": '"',
        "»": '"',
        "œ": "o",
        "Œ": "O",
        "ᵀ": "T",
        "α": "a",
        "β": "b",
        "λ": "l",
        "°": "o",
        "′": "'",
        "”": '"',
    }
)


def to_ascii(text: str) -> str:
    """`text` with each non-ASCII character replaced by one ASCII character; keeps its length."""
    if text.isascii():
        return text
    translated = text.translate(_REPLACEMENTS)
    if translated.isascii():
        return translated
    return "".join(char if char.isascii() else _base_letter(char) for char in translated)


def _base_letter(char: str) -> str:
    """A letter without its accent."""
    base = unicodedata.normalize("NFKD", char)[0]
    return base if base.isascii() else "?"


class AsciiFilter(LineFilter):
    """Applies `to_ascii` to all output, including Textual's own widgets and a script's output."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(to_ascii(text), style, control) for text, style, control in segments]
