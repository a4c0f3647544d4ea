"""The line with which `tui-trainer relay` begins, on the other end of an ssh connection.

A login shell may print anything before it, and the host may lack tui-trainer, have another version
or not have the run: this line, found by its mark, distinguishes these cases.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.messages import EndState, EntryState
from tui_trainer.protocol.text import sanitize_message

MARK = b"TUI-TRAINER-RELAY "
"""Distinguishes the greeting from what a login shell prints before it."""
MISSING = b"missing"
"""Printed by the shell in place of the greeting where tui-trainer is not installed."""
MAX_NOISE_BYTES = 256 * 1024
"""What shells print before the greeting, at most."""


class RemoteRun(msgspec.Struct, frozen=True):
    """A live run on the other machine."""

    name: str
    state: EntryState
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    title: str = ""
    started_at: float = 0.0


class RelayGreeting(msgspec.Struct, frozen=True):
    """The first line that a relay prints."""

    kind: Literal["connected", "choose", "error", "missing"]
    """`connected`: the protocol follows; `choose`: it waits for a line with one of the names in
    `runs`, and greets again; `error`: `message` says why there is no run to connect to."""
    protocol: int = PROTOCOL_VERSION
    product: str = __version__
    run: str = ""
    message: str = ""
    hint: str = ""
    state: EndState | Literal[""] = ""
    """How the run ended, if it has."""
    runs: tuple[RemoteRun, ...] = ()


class NoGreeting(Exception):
    """The data received is not a greeting."""


def encode_greeting(greeting: RelayGreeting) -> bytes:
    """The greeting on a line of its own, even after an unfinished line."""
    return b"\n" + MARK + msgspec.json.encode(greeting) + b"\n"


def find_greeting(received: bytes) -> RelayGreeting | None:
    """The greeting in what came from the other machine; None while it is incomplete.

    Raises NoGreeting when too much else comes, or when the greeting cannot be read.
    """
    start = received.find(MARK)
    if start < 0:
        if len(received) > MAX_NOISE_BYTES:
            raise NoGreeting("it keeps printing and sends no greeting")
        return None
    line, newline, _ = received[start + len(MARK) :].partition(b"\n")
    if not newline:
        if len(line) > MAX_NOISE_BYTES:
            raise NoGreeting("its greeting has no end")
        return None
    if line.strip() == MISSING:
        return RelayGreeting("missing")
    try:
        return sanitize_message(msgspec.json.decode(line, type=RelayGreeting))
    except msgspec.DecodeError as error:
        raise NoGreeting(f"its greeting cannot be read: {error}") from error
