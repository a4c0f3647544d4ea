"""Private names of PyTorch and Textual are used in one file each, which says what they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tui_trainer

PACKAGE = Path(tui_trainer.__file__).parent
ALLOWED = {
    "torch": {"trace/torch_private.py", "tasks/torch_private.py"},
    "textual": {"ui/textual_hacks.py"},
}
PRELOADED = {"torch._dynamo"}
"""Imported early, only because the first optimizer would."""


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _names(tree: ast.Module, library: str) -> list[str]:
    """Dotted names of a library that a module imports or uses."""
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found += [each.name for each in node.names]
            case ast.ImportFrom(module=str(module)):
                found += [f"{module}.{each.name}" for each in node.names]
            case ast.Attribute(attr=attr) if _is_private(attr):
                found.append(ast.unparse(node))
    dotted = [name for name in found if all(part.isidentifier() for part in name.split("."))]
    return [name for name in dotted if name.split(".")[0] == library]


def private_names(source: str, library: str) -> set[str]:
    return {name for name in _names(ast.parse(source), library) if _is_private(name)}


@pytest.mark.parametrize("library", ALLOWED)
def test_private_names_are_in_one_file(library: str) -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        where = file.relative_to(PACKAGE).as_posix()
        source = file.read_text("utf-8")
        names = private_names(source, library) - PRELOADED if library in source else set()
        if names and where not in ALLOWED[library]:
            found[where] = names
    assert found == {}


def test_a_private_name_would_be_found() -> None:
    source = (
        "import torch\nfrom torch.nn.modules.dropout import _DropoutNd\ntorch.utils._pytree.x()"
    )
    assert private_names(source, "torch") == {
        "torch.nn.modules.dropout._DropoutNd",
        "torch.utils._pytree",
    }
