"""Text from outside (a script's output, a model's words) made safe to draw: one row, no escapes."""

from __future__ import annotations

import re

from rich.cells import cell_len, chop_cells, set_cell_size

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC: titles, links
    r"|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
LONGEST = 20_000
"""Characters of one line that are looked at: the rest could not be read on any screen."""


def clean(text: str) -> str:
    """`text` without escape sequences; what overwrote a line with `\\r` leaves its last state, and
    other control characters, which would disturb the screen, become `·`."""
    text = text[:LONGEST].rstrip("\r\n")
    if text.isascii() and text.isprintable():
        return text
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    if "\r" in text:
        text = text.rstrip("\r").rpartition("\r")[2]
    return _CONTROLS.sub("·", text.expandtabs(4))


def cut(text: str, width: int, ellipsis: str = "…") -> str:
    """`text` in at most `width` cells, ending in an ellipsis where something is missing."""
    if len(text) <= width and text.isascii():
        return text
    if cell_len(text) <= width:
        return text
    return set_cell_size(text[: width + 1], max(0, width - cell_len(ellipsis))) + ellipsis


def wrap(text: str, width: int) -> list[str]:
    """`text` in rows of at most `width` cells, broken at spaces where there are any."""
    rows: list[str] = []
    for paragraph in text.split("\n"):
        rows += _wrap_line(clean(paragraph), max(1, width))
    return rows


def _wrap_line(line: str, width: int) -> list[str]:
    rows: list[str] = []
    while cell_len(line) > width:
        head = chop_cells(line[: width + 1], width)[0]
        space = head.rfind(" ")
        if space > width // 3 and line[len(head) : len(head) + 1] != " ":
            head = head[: space + 1]
        rows.append(head)
        line = line[len(head) :].lstrip(" ") if head.strip() else line[len(head) :]
    return [*rows, line]
