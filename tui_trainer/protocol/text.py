"""Text that comes from outside, made safe and short enough for a terminal.

A control character can move the cursor, set a title or make the terminal send an answer. Messages
are therefore sanitised before they are sent, and again by the receiver, because the peer cannot
be trusted. Widths are in terminal cells, where a wide character takes two.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from rich.cells import cell_len, chop_cells, set_cell_size

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and newline; and halves of surrogate pairs, which cannot be encoded."""
_ESCAPE_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC: titles, links
    r"|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)
_UNDRAWABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
"""Controls, and characters that are invisible or change the writing direction."""
MAX_LINE_CHARACTERS = 20_000
ELLIPSIS = "…"

T = TypeVar("T")


# ---------------------------------------------------------------- for messages


def sanitize(text: str) -> str:
    """`text` with control characters other than tab and newline replaced by U+FFFD."""
    if _CONTROL.search(text) is None:
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def remove_escapes(text: str) -> str:
    """`text` without escape sequences, such as colours."""
    return _ESCAPE_SEQUENCE.sub("", text) if "\x1b" in text else text


def keep_colors_only(block: bytes) -> bytes:
    """UTF-8 text without control sequences other than colours (which end in `m`): the output of a
    script must not move the cursor or make the terminal answer."""
    passed = re.sub(rb"\x1b(?!\[[\d;:]*m)|\xc2[\x80-\x9f]", b"\xef\xbf\xbd", block)
    return re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", b"", passed)


def sanitize_message(value: T) -> T:
    """A message, tuple or dict with every text in it sanitised; the same object if unchanged."""
    return _sanitized(value)  # type: ignore[no-any-return]


def _sanitized(value: Any) -> Any:
    match value:
        case str():
            return sanitize(value)
        case msgspec.Struct():
            changes = {}
            for name in value.__struct_fields__:
                field = getattr(value, name)
                if (clean := _sanitized(field)) is not field:
                    changes[name] = clean
            return msgspec.structs.replace(value, **changes) if changes else value
        case tuple():
            items = [_sanitized(item) for item in value]
            changed = any(a is not b for a, b in zip(items, value, strict=True))
            return tuple(items) if changed else value
        case dict():
            pairs = [(key, _sanitized(key), item, _sanitized(item)) for key, item in value.items()]
            changed = any(a is not b or c is not d for a, b, c, d in pairs)
            return {b: d for _, b, _, d in pairs} if changed else value
        case _:
            return value


def single_line(text: str, limit: int) -> str:
    """`text` as one line of at most `limit` printable characters."""
    kept = "".join(char if char.isprintable() else " " for char in text[: 4 * limit])
    return " ".join(kept.split())[:limit]


# ---------------------------------------------------------------- for drawing


def strip_escapes(text: str) -> str:
    """One line of `text` without escape sequences.

    A line that is overwritten by carriage returns, as by a progress bar, keeps its last state.
    Other control characters become `·`, text beyond MAX_LINE_CHARACTERS is cut off, and a line
    break inside the text becomes a space.
    """
    text = text[:MAX_LINE_CHARACTERS].rstrip("\r\n")
    if text.isascii() and text.isprintable():
        return text
    text = remove_escapes(text)
    if "\r" in text:
        text = text.rstrip("\r").rpartition("\r")[2]
    return _UNDRAWABLE.sub("·", text.replace("\n", " ").expandtabs(4))


def truncate(text: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """`text` in at most `width` cells, its end replaced by an ellipsis if it does not fit."""
    if len(text) <= width and text.isascii():
        return text
    if cell_len(text) <= width:
        return text
    return set_cell_size(text[: width + 1], max(0, width - cell_len(ellipsis))) + ellipsis


def truncate_middle(text: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """`text` in at most `width` cells, its middle replaced by an ellipsis if it does not fit.

    For names and paths, which differ at both ends; the kept end is twice as long as the start.
    """
    if len(text) <= width and text.isascii():
        return text
    if cell_len(text) <= width:
        return text
    room = width - cell_len(ellipsis)
    if room < 2:
        return set_cell_size(text[: width + 1], max(0, width))
    head_cells = room // 3
    head = set_cell_size(text[: head_cells + 1], head_cells) if head_cells else ""
    tail, cells = "", 0
    for character in reversed(text):
        cells += cell_len(character)
        if cells > room - head_cells:
            break
        tail = character + tail
    return head + ellipsis + tail


def fit(text: str, width: int, left: bool = False) -> str:
    """`text` in exactly `width` cells, aligned right, or `left`."""
    text = truncate_middle(strip_escapes(text), width)
    padding = " " * (width - cell_len(text))
    return text + padding if left else padding + text


def wrap(text: str, width: int) -> list[str]:
    """`text` in rows of at most `width` cells, broken at spaces where possible."""
    rows: list[str] = []
    for paragraph in text.split("\n"):
        rows += _wrap_line(strip_escapes(paragraph), max(1, width))
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
