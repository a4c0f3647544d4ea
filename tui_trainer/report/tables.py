"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import Scalar
from tui_trainer.report.read import Recorded

WORST_SHOWN = 12
HEALTHY = 1e-3
"""The ratio of update to weight that is usually aimed at."""


def settings(title: str, values: Mapping[str, Scalar], layout: str) -> Iterator[str]:
    """Names and values; nothing where there are none."""
    shown = {name: value for name, value in values.items() if value not in (None, "")}
    if not shown:
        return
    yield f'<h2>{escape(title)}</h2>\n<div class="panel"><div class="{layout}"><table>\n'
    for name, value in shown.items():
        yield f'<tr><th>{escape(name)}</th><td class="m">{escape(text_of(value))}</td></tr>\n'
    yield "</table></div></div>\n"


def text_of(value: Scalar) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def worst_parameters(recorded: Recorded) -> Iterator[str]:
    """The parameters with the highest gradient norm of the whole run, with where they ended."""
    found = recorded.history.of_every_optimizer(tables.GRAD_NORM)
    found = [table for table in found if table.rows and table.columns]
    if not found:
        return
    extremes = [_extremes(table) for table in found]
    highest = np.concatenate([high for high, _ in extremes])
    seen_bad = np.concatenate([bad for _, bad in extremes])
    last = _last_by_name(recorded, tables.GRAD_NORM)
    ratios = _last_by_name(recorded, tables.UPDATE_RATIO)
    weights = _last_by_name(recorded, tables.WEIGHT_NORM)
    names = [column.name for table in found for column in table.table.columns]
    score = np.where(seen_bad, np.inf, np.nan_to_num(highest, nan=-1.0))
    order = np.argsort(-score, kind="stable")[:WORST_SHOWN]
    yield '<h2>Parameters with the largest gradients</h2>\n<div class="panel"><table>\n'
    heads = ("‖∂L/∂p‖, highest", "‖∂L/∂p‖, last", "‖w‖, last", "‖Δw‖/‖w‖, last")
    yield "<tr><th>parameter</th>" + "".join(f'<th class="n">{h}</th>' for h in heads) + "</tr>\n"
    for place in order.tolist():
        name = names[place]
        bad = ' <span class="error">NaN or infinity seen</span>' if seen_bad[place] else ""
        cells = (float(highest[place]), last.get(name), weights.get(name), ratios.get(name))
        row = "".join(f'<td class="n">{_number(cell)}</td>' for cell in cells)
        yield f'<tr><td class="m">{escape(name)}{bad}</td>{row}</tr>\n'
    yield "</table></div>\n"


def _extremes(table: TableHistory) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    columns = list(range(table.columns))
    seen = table.window(columns, table.first_step or 0, (table.last_step or 0) + 1, 1)
    return seen.high[0], seen.nonfinite[0]


def _last_by_name(recorded: Recorded, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for table in recorded.history.of_every_optimizer(name):
        if (latest := table.latest()) is not None:
            columns = (column.name for column in table.table.columns)
            found.update(zip(columns, latest[1].tolist(), strict=True))
    return found


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"
