"""Tables as text: columns without lines between them, as wide as their contents need.

Nothing is cut off, and wide characters are measured in cells. A terminal wraps what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Alignment = Literal["left", "right"]
GAP = 2
MAX_WIDTH = 10_000


def new_table(headings: Sequence[str], right: Sequence[str] = (), style: str = "bold") -> Table:
    """An empty table; the columns in `right` are aligned to the right. `style` as rich has it."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style=style)
    for heading in headings:
        justify: Alignment = "right" if heading in right else "left"
        table.add_column(Text(heading), justify=justify, no_wrap=True)
    return table


def columns(*aligned: Alignment, least: Sequence[int] = ()) -> Table:
    """An empty table without headings; `least` is the least width of the first columns."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=False)
    for index, justify in enumerate(aligned):
        width = least[index] if index < len(least) else None
        table.add_column(justify=justify, no_wrap=True, min_width=width)
    return table


def table_lines(table: Table) -> list[Text]:
    """The lines of a table, without spaces at their ends."""
    console = Console(width=MAX_WIDTH)
    width = Measurement.get(console, console.options, table).maximum
    lines = []
    for segments in console.render_lines(table, console.options.update(width=width), pad=False):
        line = Text.assemble(*((part.text, part.style or "") for part in segments))
        line.rstrip()
        lines.append(line)
    return lines
