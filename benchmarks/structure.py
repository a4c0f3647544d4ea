"""Prints the structure of the package in numbers, for the table of docs/decisions.md.

    python benchmarks/structure.py [DIRECTORY]

Reads the source text of `tui_trainer/` and `models/` in DIRECTORY (default: this repository)
without importing it. Code lines are those without docstrings, comments and blank lines. An import
inside a function counts for the number of importers, but not for circular imports.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

LONG = 600
SHORT = 60
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def modules_of(root: Path) -> dict[str, Path]:
    """Name → file of every module."""
    found: dict[str, Path] = {}
    for folder in ("tui_trainer", "models"):
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts if folder == "tui_trainer" else ("tui_trainer", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def code_lines(source: str, tree: ast.Module) -> int:
    documented: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def imports_of(nodes: Iterator[ast.AST], modules: dict[str, Path]) -> set[str]:
    """The modules of the package that are imported."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                name = f"{node.module}.{each.name}"
                found.add(name if name in modules else node.module)
    return found & modules.keys()


def circles(imports: dict[str, set[str]]) -> int:
    """Number of groups of modules that import each other (Tarjan's strongly connected parts)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    count = 0

    def visit(name: str) -> None:
        nonlocal count
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            count += len(part) > 1

    sys.setrecursionlimit(10_000)
    for name in imports:
        if name not in index:
            visit(name)
    return count


def main(root: Path) -> None:
    modules = modules_of(root)
    sources = {name: file.read_text("utf-8") for name, file in modules.items()}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    code = {name: code_lines(sources[name], trees[name]) for name in modules}
    filled = [name for name in modules if code[name]]
    lines = {name: len(sources[name].splitlines()) for name in filled}
    importers: dict[str, set[str]] = defaultdict(set)
    classes: dict[str, list[str]] = defaultdict(list)
    for name, tree in trees.items():
        for other in imports_of(ast.walk(tree), modules) - {name}:
            importers[other].add(name)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name)
    single = [name for name in filled if len(importers[name]) == 1]
    folder = {name: name.rpartition(".")[0] for name in modules}
    same = [name for name in single if folder[next(iter(importers[name]))] == folder[name]]
    files = Counter(modules[name].name for name in filled)
    special = {"__init__.py", "__main__.py"}
    print(f"modules with code: {len(filled)}, lines of code: {sum(code.values()):,}")
    print(f"median lines of a module: {statistics.median(lines.values()):g}")
    print(f"modules of at most {SHORT} lines: {sum(n <= SHORT for n in lines.values())}")
    print(f"modules with one importer: {len(single)}, in the same folder: {len(same)}")
    print(
        f"file names that occur twice: {sum(n > 1 for f, n in files.items() if f not in special)}"
    )
    at_import = {name: imports_of(iter(tree.body), modules) for name, tree in trees.items()}
    print(f"import circles: {circles(at_import)}")
    for name, count in sorted(lines.items(), key=lambda pair: -pair[1]):
        if count > LONG:
            print(f"longer than {LONG} lines: {name} ({count})")
    for name, where in classes.items():
        if len(where) > 1:
            print(f"class in several modules: {name} ({', '.join(where)})")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent)
