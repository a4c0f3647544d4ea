"""Text that is safe on anybody's terminal, whoever wrote it.

A control character can move a cursor, set a title or make a terminal answer for its user. Names,
marks, messages and printed lines therefore cross without any, and are freed of them again by
whoever receives them: the other side may be of another mind.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and newline; and halves of surrogate pairs, which no encoder takes."""

T = TypeVar("T")


def harmless(text: str) -> str:
    """`text` with every control character but tab and newline shown as replaced."""
    if _CONTROL.search(text) is None:
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def printable(text: str, limit: int) -> str:
    """One line of at most `limit` characters without anything that could move a cursor."""
    kept = "".join(char if char.isprintable() else " " for char in text[: 4 * limit])
    return " ".join(kept.split())[:limit]


def harmless_all(value: T) -> T:
    """A message (or tuple, dict, string, …) whose every text is `harmless`; the same object where
    there was nothing to replace."""
    return _clean(value)  # type: ignore[no-any-return]


def _clean(value: Any) -> Any:
    match value:
        case str():
            return harmless(value)
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
