"""Text that is safe on anybody's terminal, whoever wrote it.

A control character can move a cursor, set a title or make a terminal answer for its user. Names,
marks, messages and printed lines therefore cross without any, and are freed of them again by
whoever receives them: the other side may be of another mind.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from rich.cells import cell_len, chop_cells, set_cell_size

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and newline; and halves of surrogate pairs, which no encoder takes."""

T = TypeVar("T")


def sanitize(text: str) -> str:
    """`text` with every control character but tab and newline shown as replaced."""
    if _CONTROL.search(text) is None:
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def single_line(text: str, limit: int) -> str:
    """One line of at most `limit` characters without anything that could move a cursor."""
    kept = "".join(char if char.isprintable() else " " for char in text[: 4 * limit])
    return " ".join(kept.split())[:limit]


def sanitize_message(value: T) -> T:
    """A message (or tuple, dict, string, …) whose every text is `harmless`; the same object where
    there was nothing to replace."""
    return _clean(value)  # type: ignore[no-any-return]


def _clean(value: Any) -> Any:
    match value:
        case str():
            return sanitize(value)
        case msgspec.Struct():
            changes = {}
            for name in value.__struct_fields__:
                held = getattr(value, name)
                if (cleaned := _clean(held)) is not held:
                    changes[name] = cleaned
            return msgspec.structs.replace(value, **changes) if changes else value
        case tuple():
            parts = [_clean(part) for part in value]
            changed = any(a is not b for a, b in zip(parts, value, strict=True))
            return tuple(parts) if changed else value
        case dict():
            pairs = [(key, _clean(key), held, _clean(held)) for key, held in value.items()]
            changed = any(a is not b or c is not d for a, b, c, d in pairs)
            return {b: d for _, b, _, d in pairs} if changed else value
        case _:
            return value


# ---- plain
# Text from outside (a script's output, a model's words) made safe to draw: one row, no escapes.


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


def without_control(text: str) -> str:
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


def cut_cells(text: str, width: int, ellipsis: str = "…") -> str:
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
        rows += _wrap_line(without_control(paragraph), max(1, width))
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
