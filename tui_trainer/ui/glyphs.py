"""Every sign the screens draw, with an ASCII stand-in of the same width for each."""

from __future__ import annotations

from dataclasses import dataclass

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter


@dataclass(frozen=True)
class Glyphs:
    """One set of signs."""

    ascii: bool = False
    rule: str = "─"
    vertical: str = "│"
    tick: str = "┤"
    corner: str = "└"
    axis: str = "─"
    dash: str = "╌"
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

_STAND_INS = str.maketrans(
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
        "”": '"',
    }
)


def to_ascii(text: str) -> str:
    """`text` with every other sign replaced by one ASCII character; its length stays."""
    if text.isascii():
        return text
    translated = text.translate(_STAND_INS)
    if translated.isascii():
        return translated
    return "".join(sign if sign.isascii() else "?" for sign in translated)


class AsciiFilter(LineFilter):
    """Catches what other widgets draw (toasts, a script's own output) under `--ascii`."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Translate the text of each segment."""
        return [Segment(to_ascii(text), style, control) for text, style, control in segments]
