"""The column "may import" of CONTRIBUTING's map names what each folder does import."""

from __future__ import annotations

import re
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(?:tui_trainer/)?(\w+)/` \|.*\| ([^|]*) \|$", re.MULTILINE)
BASE = ("protocol", "config", "history")


def named_in_map() -> dict[str, set[str]]:
    """Folder → the folders that its row names. Those that may import everything are left out."""
    rows = ROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    return {
        folder: set() if cell in ("torch only", "nothing of ours") else set(cell.split(", "))
        for folder, cell in rows
        if cell not in ("everything", "")
    }


def allowed(folder: str, named: dict[str, set[str]]) -> set[str]:
    """What the row names, what these may import, and the folders that all may import."""
    listed = list(named)
    found = {each for each in BASE if listed.index(each) < listed.index(folder)}
    if folder == "history":
        found.discard("config")
    waiting = list(named[folder])
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += named[each]
    return found


def imports_of_folders() -> dict[str, set[str]]:
    graph = grimp.build_graph("tui_trainer", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        folder = module.split(".")[1:2]
        for other in graph.find_modules_directly_imported_by(module):
            imported = other.split(".")[1:2]
            if folder and imported and folder != imported:
                found.setdefault(folder[0], set()).add(imported[0])
    return found


def test_the_map_of_the_folders_is_true() -> None:
    named, imports = named_in_map(), imports_of_folders()
    assert set(BASE) | {"trace", "ui", "report"} <= named.keys()
    wrong = {}
    for folder, names in named.items():
        imported = imports.get(folder, set())
        forbidden = imported - allowed(folder, named)
        unused = names - imported - {"models"}  # a checkout has it outside the package
        if forbidden or unused:
            wrong[folder] = (forbidden, unused)
    assert wrong == {}
