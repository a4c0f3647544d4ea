"""An autograd graph as SVG (folded), as DOT and as JSON (the whole of it)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec

from tui_trainer.client.answers.autograd import Fold, fold, lines, shape_text, short
from tui_trainer.protocol.autograd import AutogradGraph, GraphNode
from tui_trainer.protocol.formatting import bytes_

ROW, INDENT, LEFT, TOP = 20, 16, 16, 56
SHAPE, SAVED, GRADIENT, END = 110, 220, 310, 330
"""Right ends of the columns after the labels, and of the boxes."""
CHARACTER = 7.4
MAX_ROWS = 4_000

STYLE = """
text { font: 12px ui-monospace, monospace; fill: #24292f; }
.quiet { fill: #656d76; } .leaf { fill: #0550ae; } .count { fill: #9a6700; }
.module { fill: #656d76; fill-opacity: 0.06; stroke: #656d76; stroke-opacity: 0.35; }
.edge { fill: none; stroke: #8250df; stroke-opacity: 0.55; } .again { stroke-dasharray: 3 3; }
rect.page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .quiet { fill: #8d96a0; } .leaf { fill: #79c0ff; }
  .count { fill: #d29922; } .edge { stroke: #d2a8ff; } rect.page { fill: #0d1117; }
}
"""


def svg(graph: AutogradGraph, title: str, repeats: bool = True) -> str:
    """The folded graph from the loss down: one row for each operation and parameter, modules as
    boxes, and an arc for each edge, the wider the larger its gradient."""
    root = fold(graph, repeats)
    rows = list(lines(root))[:MAX_ROWS]
    place: dict[int, int] = {}
    for number_, (_, row) in enumerate(rows):
        if row.kind in ("operation", "leaf") and row.node is not None:
            place[row.node] = number_
    _place_repeats(rows, place)
    edges = list(_edges(graph, place))
    labels = max(LEFT + INDENT * depth + CHARACTER * _length(row) for depth, row in rows)
    right = [int(labels) + each for each in (SHAPE, SAVED, GRADIENT, END)]
    reach = max((abs(b - a) for a, b, _, _ in edges), default=1)
    width = right[3] + 40 + min(260, int(14 * math.sqrt(reach)) + 20)
    height = TOP + ROW * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text x="{LEFT}" y="20">{escape(title)}</text>',
        _text(right[0], 42, "shape", "quiet", "end"),
        _text(right[1], 42, "saved", "quiet", "end"),
        _text(right[2], 42, "gradient", "quiet", "end"),
    ]
    parts += [_box(rows, index, right[3]) for index, (_, row) in enumerate(rows) if row.children]
    for index, (depth, row) in enumerate(rows):
        parts += _row(index, depth, row, right)
    parts += [_arc(right[3] + 6, *edge) for edge in edges]
    return "\n".join([*parts, "</svg>", ""])


def _place_repeats(rows: list[tuple[int, Fold]], place: dict[int, int]) -> None:
    """Operations that are not shown lie where the equal ones that are shown lie."""
    for _, row in rows:
        for other in row.repeats[1:]:
            mine = [each for _, each in lines(row.repeats[0])]
            theirs = [each for _, each in lines(other)]
            for shown, hidden in zip(mine, theirs, strict=False):
                if shown.node in place and hidden.node is not None and shown.node is not None:
                    place.setdefault(hidden.node, place[shown.node])
        if row.kind == "repeat" and not row.children and row.repeats[0].node is not None:
            here = next(index for index, (_, each) in enumerate(rows) if each is row)
            for each in row.repeats:
                if each.node is not None:
                    place[each.node] = here


def _edges(graph: AutogradGraph, place: dict[int, int]) -> Iterator[tuple[int, int, float, bool]]:
    """(row, row of the input, gradient, whether it leads to the next one of a repeat)."""
    seen = set()
    for index, node in enumerate(graph.nodes):
        for before, gradient in zip(node.inputs, node.gradients, strict=True):
            a, b = place.get(index), place.get(before)
            if a is not None and b is not None and a != b and (a, b) not in seen:
                seen.add((a, b))
                yield a, b, gradient, b < a


def _y(index: int) -> float:
    return TOP + ROW * index + 14


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _label(row: Fold) -> str:
    return row.label + (f" × {row.count}" if row.count > 1 else "")


def _length(row: Fold) -> int:
    return len(_label(row)) + (len(row.detail) + 2 if row.kind in ("module", "repeat") else 0)


def _row(index: int, depth: int, row: Fold, right: list[int]) -> list[str]:
    x, y = LEFT + INDENT * depth, _y(index)
    label = _label(row)
    found = [_text(x, y, label, "leaf" if row.kind == "leaf" else "count" * (row.count > 1))]
    if row.kind in ("module", "repeat") and row.detail:
        found.append(_text(x + CHARACTER * len(label) + 10, y, row.detail, "quiet"))
    if row.shape and (row.kind in ("operation", "leaf") or not row.children):
        found.append(_text(right[0], y, shape_text(row.shape), "quiet", "end"))
    if row.saved_bytes:
        found.append(_text(right[1], y, bytes_(row.saved_bytes, 0), "quiet", "end"))
    if not math.isnan(row.gradient):
        found.append(_text(right[2], y, short(row.gradient), "", "end"))
    return found


def _box(rows: list[tuple[int, Fold]], index: int, right: int) -> str:
    depth = rows[index][0]
    end = index + 1
    while end < len(rows) and rows[end][0] > depth:
        end += 1
    x, y = LEFT + INDENT * depth - 6, TOP + ROW * index
    size = f'width="{right - x}" height="{ROW * (end - index) - 2}"'
    return f'<rect class="module" x="{x}" y="{y}" {size} rx="4"/>'


def _arc(x: int, a: int, b: int, gradient: float, again: bool) -> str:
    bulge = min(260, int(14 * math.sqrt(abs(b - a))))
    width = 1.0
    if gradient > 0 and math.isfinite(gradient):
        width = min(4.0, max(0.5, 2.5 + 0.5 * math.log10(gradient)))
    y, end = _y(a) - 4, _y(b) - 4
    style = "edge again" if again else "edge"
    path = f"M{x} {y} C{x + bulge} {y} {x + bulge} {end} {x} {end}"
    return f'<path class="{style}" stroke-width="{width:.1f}" d="{path}"/>'


# ---------------------------------------------------------------- DOT


def dot(graph: AutogradGraph, title: str) -> str:
    """The whole graph, unfolded, for Graphviz: a cluster for each module, an arrow along each
    gradient."""
    out = [
        "digraph autograd {",
        f"  label={_quoted(title)};",
        '  node [shape=box, fontname="mono"];',
    ]
    members: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        members.setdefault(graph.modules[node.module].path, []).append(index)
    kinds = {module.path: module.kind for module in graph.modules}
    below: dict[str, list[str]] = {}
    paths = {path for path in members if path}
    for path in list(paths):
        while "." in path:
            path = path.rpartition(".")[0]
            paths.add(path)
    for path in sorted(paths):
        below.setdefault(path.rpartition(".")[0], []).append(path)
    waiting: list[tuple[str, int, bool]] = [("", 0, False)]
    while waiting:
        path, depth, closing = waiting.pop()
        indent = "  " * (depth + 1)
        if closing:
            out.append(f"{'  ' * depth}}}")
            continue
        if path:
            out.append(f"{'  ' * depth}subgraph {_quoted(f'cluster_{path}')} {{")
            out.append(f"{indent}label={_quoted(f'{path} {kinds.get(path, str())}'.strip())};")
            waiting.append((path, depth, True))
        out += [f"{indent}{_node(graph.nodes[i], i)}" for i in members.get(path, [])]
        waiting += [(each, depth + 1, False) for each in reversed(below.get(path, []))]
    for index, node in enumerate(graph.nodes):
        for before, gradient in zip(node.inputs, node.gradients, strict=True):
            known = "" if math.isnan(gradient) else f" [label={_quoted(short(gradient))}]"
            out.append(f"  n{index} -> n{before}{known};")
    return "\n".join([*out, "}", ""])


def _node(node: GraphNode, index: int) -> str:
    saved = f", saves {bytes_(node.saved_bytes, 0)}" if node.saved_bytes else ""
    label = f"{node.leaf or node.operation}\n{shape_text(node.shape)}{saved}"
    style = ", style=filled, fillcolor=lightblue" if node.leaf else ""
    return f"n{index} [label={_quoted(label)}{style}];"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def as_data(value: Any) -> Any:
    """A message as dictionaries and lists, for JSON; nan as null."""
    if isinstance(value, msgspec.Struct):
        return {name: as_data(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [as_data(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
