"""The autograd graph of a run for a viewer: folded by module, searched, followed to the loss, and
written as SVG, DOT or JSON."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import msgspec

from tui_trainer.protocol.autograd import AutogradGraph, GraphNode
from tui_trainer.protocol.formatting import bytes_, shape_text
from tui_trainer.runs.errors import RunError

FoldKind = Literal["loss", "module", "repeat", "operation", "leaf"]
MIN_REPEATS = 2
MIN_OPERATIONS = 3
"""Numbers of equal neighbouring modules, or operations, from which they become one `repeat`."""
MAX_SUGGESTIONS = 8


@dataclass(eq=False)
class Fold:
    """A row of the folded graph: a module with its operations and submodules, equal neighbours as
    one `repeat`, an operation, or a leaf."""

    kind: FoldKind
    label: str
    detail: str = ""
    """Class of a module, or full name of a leaf."""
    path: str = ""
    node: int | None = None
    """Index in `AutogradGraph.nodes` of the operation or leaf; for a module, of its operation
    nearest to the loss."""
    children: list[Fold] = field(default_factory=list)
    repeats: list[Fold] = field(default_factory=list)
    """All modules that a `repeat` stands for; its children are those of the first one."""
    order: float = math.inf
    operations: int = 0
    """Number of operations in this row; for a repeat, in all of `repeats`."""
    saved_bytes: int = 0
    gradients: tuple[float, float] = (math.nan, math.nan)
    """Smallest and largest norm of the gradients that arrive here; for a repeat, at any of
    `repeats`."""
    shape: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return max(1, len(self.repeats))

    @property
    def gradient(self) -> float:
        return self.gradients[1]


def fold(graph: AutogradGraph, repeats: bool = True) -> Fold:
    """Build the tree of modules below the loss; `repeats` folds equal neighbours into one row."""
    root = Fold("loss", "loss", order=-1)
    known = graph.source == "rerun" and len(graph.modules) > 1
    model = Fold("module", graph.modules[1].kind if known else "model", "the model")
    places: dict[str, Fold] = {}

    def place(path: str) -> Fold:
        if path not in places:
            above, _, label = path.rpartition(".")
            found = places[path] = Fold("module", label, path=path)
            (place(above) if above else model).children.append(found)
        return places[path]

    top = graph.modules[1].path if known else ""
    places[top] = model
    model.path = top
    for module in graph.modules[1:]:
        if module.path not in ("", top) and module.kind != "module":
            place(module.path).detail = module.kind
    homes = [root, *(place(m.path) if m.path else model for m in graph.modules[1:])]
    consumers: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for before in node.inputs:
            consumers.setdefault(before, index)
        if node.leaf:
            user = consumers.get(index, 0)
            home, order = homes[graph.nodes[user].module], user + 0.5
            row = Fold("leaf", node.leaf.rpartition(".")[2], node.leaf, node.leaf, index)
        else:
            home, order = homes[node.module], float(index)
            row = Fold("operation", node.operation, node=index, operations=1)
            row.path = graph.modules[node.module].path
        row.order, row.shape, row.saved_bytes = order, node.shape, node.saved_bytes
        row.gradients = (node.gradient, node.gradient)
        home.children.append(row)
    root.children.append(model)
    _finish(root, repeats)
    return root


def _finish(root: Fold, repeats: bool) -> None:
    """Sort, sum up and fold repeats, from the innermost modules outwards and without recursion."""
    signatures: dict[object, int] = {}
    known: dict[int, int] = {}
    for each in reversed(list(_walk(root))):
        each.children = [c for c in each.children if c.kind != "module" or c.children]
        each.children.sort(key=lambda child: child.order)
        if each.children:
            each.order = min(each.order, each.children[0].order)
            each.operations = sum(child.operations for child in each.children)
            each.saved_bytes = sum(child.saved_bytes for child in each.children)
            first = next((c for c in each.children if c.kind != "leaf"), each.children[0])
            each.gradients = first.gradients
            if each.node is None:
                each.node = first.node
                each.shape = first.shape
        inside = tuple(known[id(child)] for child in each.children)
        label = each.label if each.kind == "leaf" else each.detail
        what = (each.kind, label if each.kind != "operation" else each.label, inside)
        own = (*what, each.shape) if each.kind in ("operation", "leaf") else what
        known[id(each)] = signatures.setdefault(own, len(signatures))
        if repeats:
            each.children = _repeated(each.children, known, signatures)


def _repeated(
    children: list[Fold], known: dict[int, int], signatures: dict[object, int]
) -> list[Fold]:
    found: list[Fold] = []
    start = 0
    while start < len(children):
        first = children[start]
        end = start + 1
        if first.kind in ("module", "operation"):
            while end < len(children) and known[id(children[end])] == known[id(first)]:
                end += 1
        alike = children[start:end]
        least = MIN_REPEATS if first.kind == "module" else MIN_OPERATIONS
        if len(alike) >= least:
            found.append(_repeat(alike))
            known[id(found[-1])] = signatures.setdefault(
                ("repeat", len(alike), known[id(first)]), len(signatures)
            )
        else:
            found += alike
        start = end
    return found


def _repeat(alike: list[Fold]) -> Fold:
    first = alike[0]
    names = sorted({each.label for each in alike}, key=_natural)
    label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    gradients = [value for each in alike for value in each.gradients if not math.isnan(value)]
    return Fold(
        "repeat",
        label,
        first.detail,
        first.path,
        first.node,
        list(first.children),
        alike,
        first.order,
        sum(each.operations for each in alike),
        sum(each.saved_bytes for each in alike),
        (min(gradients), max(gradients)) if gradients else (math.nan, math.nan),
        first.shape,
    )


def _natural(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdigit() else (0, label)


def _walk(root: Fold) -> Iterator[Fold]:
    """All rows of the tree, each before its children."""
    waiting = [root]
    while waiting:
        each = waiting.pop()
        yield each
        waiting += reversed(each.children)


def lines(root: Fold, depth: int | None = None) -> Iterator[tuple[int, Fold]]:
    """(depth, row) of every row down to `depth`, each before its children."""
    waiting = [(0, root)]
    while waiting:
        level, each = waiting.pop()
        yield level, each
        if depth is None or level < depth:
            waiting += [(level + 1, child) for child in reversed(each.children)]


# ---------------------------------------------------------------- finding and following


def matches(graph: AutogradGraph, text: str) -> list[int]:
    """The nodes in which every word of `text` occurs: in the operation, the module or the name."""
    words = text.lower().split()
    found = []
    for index, node in enumerate(graph.nodes):
        module = graph.modules[node.module]
        line = f"{node.operation} {module.path} {module.kind} {node.leaf}".lower()
        if all(word in line for word in words):
            found.append(index)
    return found


def find_leaf(graph: AutogradGraph, text: str) -> int:
    """The leaf named `text`, or the only one whose name contains `text`. Raises RunError."""
    leaves = [(index, node.leaf) for index, node in enumerate(graph.nodes) if node.leaf]
    exact = [index for index, name in leaves if name == text]
    found = exact or [index for index, name in leaves if text in name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunError(
            f"no leaf of the graph matches {text}",
            "it is frozen, or the loss does not depend on it",
        )
    names = ", ".join(graph.nodes[index].leaf for index in found[:MAX_SUGGESTIONS])
    raise RunError(f"{len(found)} leaves match {text}", names)


@dataclass(frozen=True)
class PathToLoss:
    """The path from a leaf to the loss."""

    nodes: tuple[int, ...]
    """From the leaf to the loss."""
    gradients: tuple[float, ...]
    """The gradient that flowed along each edge; one fewer than nodes."""
    paths: int
    """Number of different paths from the leaf to the loss."""


def path_to_loss(graph: AutogradGraph, leaf: int) -> PathToLoss:
    """Follow the edge with the largest gradient at each branch, or the shortest path where no
    gradient is known."""
    users: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        for before, gradient in zip(node.inputs, node.gradients, strict=True):
            users[before].append((index, gradient))
    distance = _distances(graph)
    nodes, gradients = [leaf], []
    while nodes[-1] != 0 and len(nodes) <= len(graph.nodes):
        user, gradient = max(
            users[nodes[-1]],
            key=lambda each: (-1.0 if math.isnan(each[1]) else each[1], -distance[each[0]]),
            default=(0, math.nan),
        )
        nodes.append(user)
        gradients.append(gradient)
    return PathToLoss(tuple(nodes), tuple(gradients), _count_paths(graph, leaf))


def _distances(graph: AutogradGraph) -> list[int]:
    """Number of edges on the shortest path from the loss to each node."""
    found = [len(graph.nodes)] * len(graph.nodes)
    found[0] = 0
    waiting = deque([0])
    while waiting:
        index = waiting.popleft()
        for before in graph.nodes[index].inputs:
            if found[before] > found[index] + 1:
                found[before] = found[index] + 1
                waiting.append(before)
    return found


def _count_paths(graph: AutogradGraph, leaf: int) -> int:
    due = [0] * len(graph.nodes)
    for node in graph.nodes:
        for before in node.inputs:
            due[before] += 1
    paths = [0] * len(graph.nodes)
    paths[0] = 1
    ready = [index for index, count in enumerate(due) if not count]
    while ready:
        index = ready.pop()
        for before in graph.nodes[index].inputs:
            paths[before] += paths[index]
            due[before] -= 1
            if not due[before]:
                ready.append(before)
    return paths[leaf]


def gradient_text(gradient: float) -> str:
    """`gradient` with three significant digits, or "" where it is nan (unknown)."""
    return "" if math.isnan(gradient) else f"{gradient:.3g}"


ROW, INDENT, LEFT, TOP = 20, 16, 16, 56
SHAPE, SAVED, GRADIENT, END = 110, 220, 310, 330
"""Right edges of the columns, and of the boxes, in pixels after the longest label."""
CHARACTER = 7.4
"""Width of a character of the monospaced font, in pixels."""
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
    """Give each operation hidden in a repeat the row of its equal that is shown."""
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
    """(row, row of the input, gradient, whether the edge leads back up, to the next module of a
    repeat)."""
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
        found.append(_text(right[2], y, gradient_text(row.gradient), "", "end"))
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
            known = "" if math.isnan(gradient) else f" [label={_quoted(gradient_text(gradient))}]"
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
