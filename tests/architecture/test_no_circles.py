"""No module imports itself by way of others: not at its top, in a function or for typing only."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp


def import_circle(graph: grimp.ImportGraph) -> list[str]:
    """The modules of one circle, each imported by the next; empty where there is none."""
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_circle() -> None:
    graph = grimp.build_graph("tui_trainer", cache_dir=None)
    assert len(graph.modules) > 50
    assert import_circle(graph) == []


def test_a_circle_would_be_found() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in ("ab", "bc", "ca", "cd"):
        graph.add_import(importer=importer, imported=imported)
    assert set(import_circle(graph)) == {"a", "b", "c"}


def test_imports_in_functions_count() -> None:
    graph = grimp.build_graph("tui_trainer", cache_dir=None)
    imported = graph.find_modules_directly_imported_by("tui_trainer.cli.commands.replay")
    assert "tui_trainer.ui.replay_app" in imported
