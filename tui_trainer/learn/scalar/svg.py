"""A scalar graph as one SVG picture: every node with its value and gradient, every edge with the
local derivative."""

from __future__ import annotations

from html import escape

from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.layout import layout
from tui_trainer.learn.scalar.steps import local_text
from tui_trainer.protocol.formatting import short

NODE_WIDTH, NODE_HEIGHT = 132, 66
COLUMN, ROW = 280, 86
MARGIN, TITLE = 24, 58
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
STYLE = """
  .back { fill: #fbfbf8 } .box { fill: #ffffff; stroke: #8b939f }
  .out { stroke: #0d6a6c; stroke-width: 2 }
  .name { fill: #10151d; font-weight: 600 } .value { fill: #1f2733 } .dim { fill: #59677d }
  .grad { fill: #b92a37 } .edge { fill: none; stroke: #8b939f; stroke-width: 1.5 }
  .local { fill: #0a65ad } .halo { stroke: #fbfbf8; stroke-width: 5; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    .back { fill: #11151c } .box { fill: #1d242f; stroke: #5d6979 } .out { stroke: #7cc4c4 }
    .name { fill: #eef2f8 } .value { fill: #d3d9e3 } .dim { fill: #8d99ab }
    .grad { fill: #f0717a } .edge { stroke: #5d6979 }
    .local { fill: #5cb3f2 } .halo { stroke: #11151c }
  }
"""


def svg(graph: ScalarGraph) -> str:
    """The picture of a graph, in light or dark colours by the viewer's `prefers-color-scheme`."""
    placed = layout(graph.expression)
    width: float = MARGIN * 2 + (placed.columns - 1) * COLUMN + NODE_WIDTH
    height = TITLE + MARGIN + (placed.rows - 1) * ROW + NODE_HEIGHT
    values = ", ".join(f"{name} = {value:g}" for name, value in graph.inputs.items())
    title = f"{graph.expression.text}   at {values}"
    width = max(width, MARGIN * 2 + 8.0 * min(len(title), 150))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="{FONT}" font-size="13" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{width:g}" height="{height:g}"/>',
        f'<text class="name" x="{MARGIN}" y="26">{escape(graph.expression.text)}</text>',
        f'<text class="dim" x="{MARGIN}" y="44" font-size="12">at {escape(values)}; '
        f"on the edges the local derivatives</text>",
    ]
    at = [(MARGIN + c * COLUMN, TITLE + r * ROW) for c, r in placed.places]
    labels = []
    for source, target in placed.edges:
        operands = sorted(set(graph.nodes[target].inputs), key=lambda index: at[index][1])
        port = (operands.index(source) + 1) / (len(operands) + 1)
        edge, label = _edge(graph, source, target, at[source], at[target], port)
        parts.append(edge)
        labels += label
    parts += labels
    for index in range(len(graph.nodes)):
        parts += _node(graph, index, *at[index])
    return "\n".join([*parts, "</svg>", ""])


def _edge(
    graph: ScalarGraph,
    source: int,
    target: int,
    start: tuple[float, float],
    end: tuple[float, float],
    port: float,
) -> tuple[str, list[str]]:
    x1, y1 = start[0] + NODE_WIDTH, start[1] + NODE_HEIGHT / 2
    x2, y2 = end[0], end[1] + NODE_HEIGHT * port
    middle = x2 - (COLUMN - NODE_WIDTH) / 2
    curve = f"M{x1:g} {y1:g} C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"
    edge = f'<path class="edge" d="{curve}"/>'
    locals_ = [
        local_text(each)
        for step in graph.backward
        if step.node == target
        for each in step.contributions
        if each.to == source
    ]
    if not locals_:
        return edge, []
    x, y = x2 - 6, y2 - 5 if y2 <= end[1] + NODE_HEIGHT / 2 else y2 + 14
    place = f'x="{x:g}" y="{y:g}" font-size="11" text-anchor="end"'
    text = escape(", ".join(dict.fromkeys(locals_)))
    return edge, [f'<text class="halo" {place}>{text}</text>',
                  f'<text class="local" {place}>{text}</text>']  # fmt: skip


def _node(graph: ScalarGraph, index: int, x: float, y: float) -> list[str]:
    node, output = graph.nodes[index], graph.output_name
    operation = graph.expression.operation_text(index)
    title = f"{node.name} = {operation}" if operation else node.name
    gradient = graph.gradients[index]
    kind = "box out" if index == graph.output else "box"
    lines = [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{NODE_WIDTH}" height="{NODE_HEIGHT}" '
        f'rx="6"/>',
        f'<text class="name" x="{x + 10:g}" y="{y + 19:g}">{escape(_fitted(title, 14))}</text>',
    ]
    if node.operation == "constant":
        return [*lines, f'<text class="dim" x="{x + 10:g}" y="{y + 38:g}">constant</text>']
    lines.append(
        f'<text class="value" x="{x + NODE_WIDTH - 10:g}" y="{y + 38:g}" text-anchor="end">'
        f"{short(graph.values[index])}</text>"
    )
    if gradient is not None:
        lines += [
            f'<text class="dim" x="{x + 10:g}" y="{y + 56:g}">'
            f"d{escape(output)}/d{escape(node.name)}</text>",
            f'<text class="grad" x="{x + NODE_WIDTH - 10:g}" y="{y + 56:g}" text-anchor="end">'
            f"{short(gradient)}</text>",
        ]
    return lines


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
