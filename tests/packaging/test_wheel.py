"""The wheel, installed in a clean environment, works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.once import made_once

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)
SMALL = ("--threads", "1", "--eval-batches", "1", "--sample-length", "8")


def checked(command: Sequence[str | Path], **options: object) -> str:
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Build it from a copy of the sources, without leftovers of earlier builds."""
    (built,) = (made_once("wheel", build) / "out").glob("*.whl")
    return built


def build(place: Path) -> None:
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("tui_trainer", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    checked([sys.executable, "-m", "build", "--wheel", "--outdir", place / "out", source])


@pytest.fixture(scope="module")
def clean(wheel: Path) -> Path:
    """The `bin` of an environment that holds the wheel and, of this one, the dependencies alone.

    The dependencies (gigabytes, some of them) are lent by path; this environment's own editable
    tui-trainer is not: its `.pth` files are not read there, and the wheel's files come first.
    """
    return made_once("clean", lambda where: install(wheel, where)) / "bin"


def install(wheel: Path, where: Path) -> None:
    venv.create(where, with_pip=False, symlinks=True)
    purelib = Path(
        checked(
            [where / "bin/python", "-c", "import sysconfig as s; print(s.get_path('purelib'))"]
        ).strip()
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    checked([*pip, "--python", where / "bin/python", "install", "--no-deps", "--no-index", wheel])
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")


def away(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {
        **kept,
        "PYTHONPATH": "",
        "TUI_TRAINER_RUNS_DIR": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "2",
    }


def test_it_holds_what_it_must_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    here = {str(each.relative_to(ROOT)) for each in (ROOT / "tui_trainer").rglob("*.py")}
    here |= {f"tui_trainer/models/{each.name}" for each in (ROOT / "models").glob("*.py")}
    for kind in ("*.tcss", "*.css", "*.html", "*.md", "*.toml"):
        here |= {str(each.relative_to(ROOT)) for each in (ROOT / "tui_trainer").rglob(kind)}
    here |= {"tui_trainer/py.typed"}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == here
    assert {"tui_trainer/models/gpt.py", "tui_trainer/models/vit.py"} <= packed


def test_the_command_the_tasks_and_the_models_are_found(clean: Path, tmp_path: Path) -> None:
    code = (
        "import tui_trainer\n"
        "from importlib.metadata import entry_points\n"
        "from importlib.util import find_spec\n"
        "for name in ('gpt', 'vit'):\n"
        "    print(find_spec(f'tui_trainer.models.{name}').origin)\n"
        "found = {e.name: e.load().name for e in entry_points(group='tui_trainer.tasks')}\n"
        "assert found['gpt'] == 'gpt' and found['vit'] == 'vit', found\n"
        "print(tui_trainer.__file__)"
    )
    for where in checked(
        [clean / "python", "-c", code], cwd=tmp_path, env=away(tmp_path)
    ).splitlines():
        assert str(clean.parent) in where
        assert str(ROOT) not in where
    version = checked([clean / "tui-trainer", "--version"], cwd=tmp_path, env=away(tmp_path))
    assert version.strip()[0].isdigit()


def test_it_trains_on_a_screen_away_from_the_checkout(clean: Path, tmp_path: Path) -> None:
    from tests.terminal.harness import Terminal

    command = [str(clean / "tui-trainer"), "gpt", "--steps", "5", *SMALL]
    with Terminal(command, cwd=tmp_path, env=away(tmp_path), cold=True) as terminal:
        terminal.find(r"(?i)finished")
        terminal.press("q")
        assert terminal.wait_for_exit() == 0
        terminal.assert_restored()
        assert "finished at step 5" in terminal.output.decode(errors="replace")
    (run,) = (tmp_path / "runs").iterdir()
    command = [clean / "tui-trainer", "show", "--json", run.name]
    shown = json.loads(checked(command, cwd=tmp_path, env=away(tmp_path)))
    assert (shown["state"], shown["step"]) == ("finished", 5)
