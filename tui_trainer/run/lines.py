"""From the bytes that a program writes to lines that are safe to keep and to show."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

LINE_CHARACTERS = 4_000
"""Longer lines are cut, and say by how much."""

_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links
    r"|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_CONTROLS[ord("\t")] = "    "


class LineSplitter:
    """Cuts one stream into lines. Memory is bounded whatever comes.

    A carriage return begins the line anew, so a progress bar becomes one line: its last state.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._cut = 0
        self._returned = False

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that `data` completes."""
        text = self._decoder.decode(data)
        start = 0
        while (end := text.find("\n", start)) >= 0:
            self._add(text[start:end])
            yield self._take()
            start = end + 1
        self._add(text[start:])

    def finish(self) -> Iterator[str]:
        """What was begun and never ended with a newline."""
        self._add(self._decoder.decode(b"", final=True))
        if self._line or self._cut:
            yield self._take()

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._returned or "\r" in text:
            text = self._begin_anew(text)
        room = LINE_CHARACTERS - len(self._line)
        self._line += text[:room]
        self._cut += max(0, len(text) - room)

    def _begin_anew(self, text: str) -> str:
        """What stays of `text`: after its last return, unless nothing has overwritten that yet."""
        stays = text.rstrip("\r")
        if not stays:
            self._returned = True
            return ""
        if self._returned or "\r" in stays:
            self._line, self._cut = "", 0
        self._returned = stays != text
        return stays.rpartition("\r")[2]

    def _take(self) -> str:
        line = clean(self._line)
        if self._cut:
            line += f" … ({self._cut:,} more characters)"
        self._line, self._cut, self._returned = "", 0, False
        return line


def clean(text: str) -> str:
    """Without escape sequences; other control characters are shown as replaced."""
    return _ESCAPES.sub("", text).translate(_CONTROLS).rstrip()
