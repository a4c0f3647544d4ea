"""The import contracts hold, and would notice a breach: each is broken on purpose in a copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"

BREACHES = {
    "ui/breach.py": "import torch",
    "history/breach.py": "import tui_trainer.ui",
    "client/breach.py": "from tui_trainer import trace",
    "record/breach.py": "import torch",
    "store/breach.py": "import torch",
    "runs/breach.py": "import torch",
    "trace/breach.py": "import textual",
    "run/breach.py": "import tui_trainer.client",
    "models/breach.py": "import tui_trainer.protocol",
    "protocol/breach.py": "import tui_trainer.history",
    "tasks/breach.py": "import textual",
}
"""A file, and an import in it that must not be."""


def installed_shape(to: Path) -> Path:
    """A copy of the package as it is once installed: models inside it."""
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tui_trainer", to / "tui_trainer", ignore=no_caches)
    shutil.copytree(ROOT / "models", to / "tui_trainer" / "models", ignore=no_caches)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def lint(where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINTER, "--no-cache"],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_contracts_hold(tmp_path: Path) -> None:
    done = lint(installed_shape(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_breach_is_noticed(tmp_path: Path) -> None:
    where = installed_shape(tmp_path)
    for file, breach in BREACHES.items():
        (where / "tui_trainer" / file).write_text(breach + "\n")
    done = lint(where)
    assert done.returncode == 1, done.stdout + done.stderr
    for file in BREACHES:
        module = f"tui_trainer.{file.removesuffix('.py').replace('/', '.')}"
        assert f"{module} -> " in done.stdout, done.stdout


def test_nothing_is_exempt() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in settings["contracts"]:
        assert not set(contract) & {"ignore_imports", "unmatched_ignore_imports_alerting"}, contract


def test_every_package_is_in_the_wheel_and_under_a_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    found = {
        ".".join(each.parent.relative_to(ROOT).parts)
        for each in (ROOT / "tui_trainer").rglob("__init__.py")
    } | {"tui_trainer.models"}
    assert found == set(settings["setuptools"]["packages"])
    text = " ".join(
        " ".join(contract.get("layers", []) + contract.get("source_modules", []))
        for contract in settings["importlinter"]["contracts"]
    )
    for package in found - {"tui_trainer"}:
        assert ".".join(package.split(".")[:2]) in text, f"{package} is under no contract"


def test_models_may_import_none_of_our_packages() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (
        c for c in settings["contracts"] if c.get("source_modules") == ["tui_trainer.models"]
    )
    assert set(contract["forbidden_modules"]) == {f"tui_trainer.{name}" for name in packages()}


def test_the_map_of_contributing_has_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [name for name in packages() if f"| `tui_trainer/{name}/` |" not in text] == []


def packages() -> list[str]:
    return sorted(each.parent.name for each in (ROOT / "tui_trainer").glob("*/__init__.py"))
