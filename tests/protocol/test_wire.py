"""What crosses the wire is pinned to PROTOCOL_VERSION: fields go by place, and a peer of another
version would take one for another.

python -m tests.protocol.test_wire    rewrites the pinned description
"""

from __future__ import annotations

import types
import typing
from pathlib import Path

import msgspec

from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.framing import RelayGreeting
from tui_trainer.protocol.messages import ToRun, ToViewer

PINNED = Path(__file__).parent / "wire.txt"
WHAT_TO_DO = """
the messages have changed, and no longer match tests/protocol/wire.txt.

If a peer of the version before cannot read it (a field that is not the last of its message, has no
default, or changes its type; a new message), raise PROTOCOL_VERSION in tui_trainer/protocol/__init__.py.
Then: python -m tests.protocol.test_wire"""  # noqa: E501


def spelled(kind: object) -> str:
    """A type as it is written, whatever the version of Python."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spelled, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(spelled, arguments))}]"
    if kind is Ellipsis:
        return "..."
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def structs_in(kind: object, found: dict[str, type[msgspec.Struct]]) -> None:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind.__name__ in found:
            return
        found[kind.__name__] = kind
        for field in msgspec.structs.fields(kind):
            structs_in(field.type, found)
    for argument in typing.get_args(kind):
        structs_in(argument, found)


def described() -> str:
    """Every struct that crosses, with its fields in order."""
    found: dict[str, type[msgspec.Struct]] = {}
    for root in (ToRun, ToViewer, RelayGreeting):
        structs_in(root, found)
    lines = [f"version {PROTOCOL_VERSION}"]
    for name, kind in sorted(found.items()):
        config = kind.__struct_config__
        tag = f" {config.tag}" if config.tag else ""
        lines += ["", f"{name}{tag} ({'by place' if config.array_like else 'by name'})"]
        for field in msgspec.structs.fields(kind):
            optional = "" if field.required else ", may be missing"
            lines.append(f"    {field.encode_name}: {spelled(field.type)}{optional}")
    return "\n".join(lines) + "\n"


def test_no_message_changes_unnoticed():
    assert described() == PINNED.read_text(encoding="utf-8"), WHAT_TO_DO


class Part(msgspec.Struct, array_like=True):
    size: int


class Whole(msgspec.Struct, tag="whole"):
    parts: tuple[Part, ...]
    name: str | None = None


def test_structs_within_structs_are_described():
    found: dict[str, type[msgspec.Struct]] = {}
    structs_in(Whole | None, found)
    assert list(found) == ["Whole", "Part"]
    types_of = [spelled(field.type) for field in msgspec.structs.fields(Whole)]
    assert types_of == ["tuple[Part, ...]", "str | None"]


if __name__ == "__main__":
    PINNED.write_text(described(), encoding="utf-8")
