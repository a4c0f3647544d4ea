"""The one line with which the far end of an ssh connection begins, before the protocol does.

A login shell may print anything first, the host may lack tui-trainer, hold another version or not
have that run: this line, found by its mark, tells them apart.
"""

from __future__ import annotations

import msgspec

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.text import harmless_all

MARK = b"TUI-TRAINER-RELAY "
MISSING = b"missing"
"""In place of the greeting, from the shell, where the host has no tui-trainer."""
MAX_NOISE_BYTES = 256 * 1024
"""What shells print before it, at most."""


class RemoteRun(msgspec.Struct, frozen=True):
    """A run that the host offers."""

    name: str
    state: str
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    title: str = ""
    started_at: float = 0.0


class RelayGreeting(msgspec.Struct, frozen=True):
    """What the relay found."""

    kind: str
    """`connected`: the protocol follows; `choose`: it waits for a line with one of the names in
    `runs`, and greets again; `error`: `message` says why there is nothing to connect to."""
    protocol: int = PROTOCOL_VERSION
    product: str = __version__
    run: str = ""
    message: str = ""
    hint: str = ""
    state: str = ""
    """Of a run that has ended: `finished`, `stopped` or `crashed`."""
    runs: tuple[RemoteRun, ...] = ()


class NoGreeting(Exception):
    """What follows the mark cannot be read."""


def encode_greeting(greeting: RelayGreeting) -> bytes:
    """On a line of its own, whatever was printed before it."""
    return b"\n" + MARK + msgspec.json.encode(greeting) + b"\n"


def find_greeting(received: bytes) -> RelayGreeting | None:
    """The greeting in what the far end printed; None while it is not there in full.

    Raises NoGreeting when there is too much noise, or the greeting is of an unknown kind.
    """
    start = received.find(MARK)
    if start < 0:
        if len(received) > MAX_NOISE_BYTES:
            raise NoGreeting("it prints without end instead of greeting")
        return None
    line, newline, _ = received[start + len(MARK) :].partition(b"\n")
    if not newline:
        if len(line) > MAX_NOISE_BYTES:
            raise NoGreeting("its greeting has no end")
        return None
    if line.strip() == MISSING:
        return RelayGreeting("missing")
    try:
        return harmless_all(msgspec.json.decode(line, type=RelayGreeting))
    except msgspec.DecodeError as fault:
        raise NoGreeting(f"its greeting cannot be read: {fault}") from fault
