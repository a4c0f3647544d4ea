"""What is imported where, seen in a fresh interpreter: the contracts on paper are not enough, for
an import inside a function or by a library does the same harm."""

from __future__ import annotations

import json
import subprocess
import sys

VIEWING = (
    "tui_trainer.ui.app",
    "tui_trainer.ui.graph_app",
    "tui_trainer.learn.demos",
    "tui_trainer.ui.screens.learn",
    "tui_trainer.learn.measurement_process",
    "tui_trainer.client.api",
    "tui_trainer.client.live",
    "tui_trainer.runs.launch",
    "tui_trainer.protocol.messages",
    "tui_trainer.history",
    "tui_trainer.config",
    "tui_trainer.config.run_spec",
    "tui_trainer.record.recorder",
    "tui_trainer.tasks.definition",
    "tui_trainer.tasks.gpt",
    "tui_trainer.tasks.vit",
    "tui_trainer.cli.main",
    "tui_trainer.cli.start",
)
TRAINING = (
    "tui_trainer.run.host",
    "tui_trainer.trace.tracer",
    "tui_trainer.probes",
    "tui_trainer.tasks.gpt.training",
    "tui_trainer.tasks.vit.training",
)


def loaded_after(code: str) -> set[str]:
    """Names of the top-level packages in `sys.modules` after `code` ran in a new interpreter."""
    report = (
        "\nimport sys, json\n"
        "found = sorted({m.partition('.')[0] for m in sys.modules})\n"
        "sys.__stderr__.write('\\n' + json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def import_each(modules: tuple[str, ...], never: set[str]) -> str:
    """Code that imports one module after the other and names the first that brings one of `never`.

    None of them brings it alone if all of them together do not."""
    return (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    brought = {never!r} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "    assert not brought, f'{module} brings {brought}'\n"
    )


def test_the_viewing_side_never_brings_torch() -> None:
    never = {"torch", "sklearn", "pandas", "matplotlib"}
    assert "tui_trainer" in loaded_after(import_each(VIEWING, never))


def test_the_training_side_never_brings_textual_and_a_model_nothing_of_ours() -> None:
    models = (
        "import tui_trainer.models.gpt, tui_trainer.models.vit, sys\n"
        "ours = {m for m in sys.modules if m.startswith('tui_trainer.')}\n"
        "assert all(m.startswith('tui_trainer.models') for m in ours), ours\n"
    )
    never = {"textual", "plotext", "cyclopts"}
    assert {"tui_trainer", "torch"} <= loaded_after(models + import_each(TRAINING, never))


def test_the_first_paint_waits_for_no_database_and_no_parser() -> None:
    code = "import tui_trainer.cli.main, tui_trainer.ui.app, tui_trainer.ui.screens.dashboard"
    assert not loaded_after(code) & {"sqlite3", "tomllib", "markdown_it", "plotext", "PIL"}


def test_asking_for_help_brings_neither() -> None:
    every = [["--help"], ["--version"], ["gpt", "--help"], ["run", "-h"]]
    code = (
        "from tui_trainer.cli.main import run\n"
        f"for arguments in {every!r}:\n"
        "    assert run(arguments) == 0"
    )
    assert not loaded_after(code) & {"torch", "textual", "sklearn"}
