"""Lays out a page as lines of styled text, for the screen and for a pipe.

Markdown is parsed before the values are inserted, so that no value can change the structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.cells import cell_len

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.page import NARROW_NO_BREAK, NO_BREAK, PLACEHOLDER, written

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

Piece = tuple[str, str]
"""(text, name of its style in the palette of the app)"""
StyledLine = list[Piece]

PENDING = "…"
"""Text in place of a value that has not been measured yet."""
UNCHANGED, CHANGED = "good underline", "warning"
"""Styles of values after a measurement with another seed."""
CODE_INDENT = 4
COLUMN_GAP = 3
_SPACES = str.maketrans({NO_BREAK: " ", NARROW_NO_BREAK: " "})


@dataclass(frozen=True)
class Numbers:
    """The values to insert into a page, and how to write them."""

    language: str
    values: dict[str, Value] | None = None
    """None: not measured yet."""
    before: dict[str, Value] | None = None
    """Values of an earlier measurement with another seed, to show which have changed."""
    pending: str = PENDING
    quotes_code: bool = False
    """Whether code in running text keeps its backticks, for output without styles."""

    def piece(self, name: str, form: str, code: bool) -> Piece:
        """The text of one value and its style."""
        if self.values is None or name not in self.values:
            return self.pending, "dim"
        text = written(self.values[name], form, self.language, code)
        if self.before is None or name not in self.before:
            return text, "accent"
        same = written(self.before[name], form, self.language, code) == text
        return text, UNCHANGED if same else CHANGED


def laid_out(markdown: str, numbers: Numbers, width: int) -> list[StyledLine]:
    """Lay out a text in lines of at most `width` cells, unless a word is longer."""
    return _Layout(numbers, max(20, width)).lines(_parser().parse(markdown))


def escaped(text: str) -> str:
    """`text` with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~&])", r"\\\1", " ".join(text.split()))


def plain(lines: Iterable[StyledLine]) -> str:
    """The lines without styles."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def changed_values(markdown: str, numbers: Numbers) -> set[str]:
    """Names of the values that a text shows differently than with the other seed."""
    return {
        match[1]
        for match in PLACEHOLDER.finditer(markdown)
        if numbers.piece(match[1], match[2] or "", code=False)[1] == CHANGED
    }


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt  # imported with the first text: it takes 15 ms

    return MarkdownIt("commonmark").enable("table")


class _Layout:
    def __init__(self, numbers: Numbers, width: int) -> None:
        self._numbers = numbers
        self._width = width

    def lines(self, tokens: Sequence[Token]) -> list[StyledLine]:
        """All blocks, with an empty line between two of them."""
        found: list[StyledLine] = []
        index, in_item, new_item = 0, False, False
        while index < len(tokens):
            token = tokens[index]
            block: list[StyledLine] = []
            match token.type:
                case "heading_open":
                    block = self._wrapped(tokens[index + 1], "title")
                case "paragraph_open":
                    block = self._wrapped(tokens[index + 1], "text", 2 if in_item else 0)
                    if new_item:
                        block[0] = [("· ", "dim"), *block[0][1:]]
                        new_item = False
                case "code_block" | "fence":
                    block = self._code(token.content)
                case "table_open":
                    end = next(
                        i for i in range(index, len(tokens)) if tokens[i].type == "table_close"
                    )
                    block = self._table(tokens[index:end])
                    index = end
                case "list_item_open":
                    in_item = new_item = True
                case "list_item_close":
                    in_item = False
            if block:
                tight = in_item and found and not token.type.startswith("heading")
                found += [*([[]] if found and not (tight and token.hidden) else []), *block]
            index += 1
        return found

    # ------------------------------------------------------------ text

    def _pieces(self, inline: Token, base: str) -> list[Piece]:
        """The words of a paragraph with their styles, values filled in."""
        pieces: list[Piece] = []
        style = base
        for token in inline.children or ():
            match token.type:
                case "text":
                    pieces += self._filled(token.content, style, code=False)
                case "code_inline":
                    tick = [("`", "strong")] if self._numbers.quotes_code else []
                    pieces += [*tick, *self._filled(token.content, "strong", code=True), *tick]
                case "softbreak" | "hardbreak":
                    pieces.append((" ", style))
                case "strong_open" | "em_open":
                    style = "strong" if base == "text" else base
                case "strong_close" | "em_close":
                    style = base
        return pieces

    def _filled(self, text: str, style: str, code: bool) -> list[Piece]:
        pieces: list[Piece] = []
        last = 0
        for match in PLACEHOLDER.finditer(text):
            pieces.append((text[last : match.start()], style))
            pieces.append(self._numbers.piece(match[1], match[2] or "", code))
            last = match.end()
        return [piece for piece in [*pieces, (text[last:], style)] if piece[0]]

    def _wrapped(self, inline: Token, style: str, indent: int = 0) -> list[StyledLine]:
        lines: list[StyledLine] = []
        line: StyledLine = []
        used = 0
        for word in _words_of(self._pieces(inline, style)):
            cells = _cells(word)
            if line and used + 1 + cells > self._width - indent:
                lines.append(line)
                line, used = [], 0
            if line:
                line.append((" ", "text"))
                used += 1
            line += word
            used += cells
        margin: StyledLine = [(" " * indent, "text")] if indent else []
        return [[*margin, *_drawable(each)] for each in [*lines, line]]

    # ------------------------------------------------------------ code and tables

    def _code(self, content: str) -> list[StyledLine]:
        margin = (" " * CODE_INDENT, "text")
        lines: list[StyledLine] = []
        for text in content.rstrip("\n").split("\n"):
            code, mark, comment = text.partition("  #")
            line = [margin, *self._filled(code, "strong", code=True)]
            line += self._filled(mark + comment, "dim", code=True)
            lines.append(_drawable(line))
        return lines

    def _table(self, tokens: Sequence[Token]) -> list[StyledLine]:
        rows: list[list[list[Piece]]] = []
        right: list[bool] = []
        for token, inline in pairwise(tokens):
            if token.type == "tr_open":
                rows.append([])
            elif token.type in ("th_open", "td_open"):
                head = token.type == "th_open"
                if head:
                    right.append("right" in str(token.attrs.get("style", "")))
                rows[-1].append(_drawable(self._pieces(inline, "dim" if head else "text")))
        widths = [max(_cells(row[column]) for row in rows) for column in range(len(right))]
        if not any(map(_cells, rows[0])):  # a table without a header
            rows = rows[1:]
        lines = []
        for row in rows:
            line: StyledLine = [(" " * CODE_INDENT, "text")]
            for number, (cell, width, to_right) in enumerate(zip(row, widths, right, strict=True)):
                gap = " " * (COLUMN_GAP if number else 0)
                padding = " " * (width - _cells(cell))
                line.append((gap + (padding if to_right else ""), "text"))
                line += [*cell, ("" if to_right else padding, "text")]
            lines.append([piece for piece in line if piece[0]])
        return lines


def _words_of(pieces: Sequence[Piece]) -> list[StyledLine]:
    """Split pieces at spaces into words; a word may consist of pieces of several styles."""
    words: list[StyledLine] = []
    open_word = False
    for text, style in pieces:
        for part in re.split("( +)", text):
            if not part:
                continue
            if not part.strip(" "):  # a no-break space belongs to its word
                open_word = False
            elif open_word:
                words[-1].append((part, style))
            else:
                words.append([(part, style)])
                open_word = True
    return words


def _cells(pieces: Iterable[Piece]) -> int:
    return sum(cell_len(text) for text, _ in pieces)


def _drawable(pieces: Iterable[Piece]) -> StyledLine:
    """The pieces with ordinary spaces for no-break spaces, whose width differs by terminal."""
    return [(text.translate(_SPACES), style) for text, style in pieces]
