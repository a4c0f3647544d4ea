"""`tui-trainer doctor`: checks versions, device, terminal, permissions and disk.

Nothing here imports torch, which is examined in another process.
"""

from __future__ import annotations

import importlib.metadata
import json
import locale
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from rich.console import Console
from rich.text import Text

from tui_trainer import __version__
from tui_trainer.cli.commands.common import RunsDir, flag
from tui_trainer.cli.errors import FAULT
from tui_trainer.cli.table import columns, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.config.machine import usable_cores
from tui_trainer.config.run_spec import MAX_SOCKET_PATH_BYTES, SOCKET_FILE, runs_directory
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.formatting import bytes_
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.registry import list_runs
from tui_trainer.runs.security import check_directory

LIBRARIES = {
    "cyclopts": "the command line",
    "textual": "the screens",
    "rich": "tables in the terminal",
    "jinja2": "reports",
    "markdown-it-py": "the pages to learn from",
    "plotext": "charts of show and compare --plain",
    "msgspec": "messages and the files of a run",
    "numpy": "measurements",
    "platformdirs": "the directory of the runs",
    "psutil": "memory of the process and the machine",
    "safetensors": "weights in checkpoints",
    "pillow": "images for the vision transformer",
    "scikit-learn": "its data set of digits",
}
"""Required packages and what they are for."""
OPTIONAL = {
    "pyarrow": ('"tui-trainer[parquet]"', "export --format parquet"),
    "tensorboard": ('"tui-trainer[tensorboard]"', "export --format tensorboard"),
    "nvidia-ml-py": ("nvidia-ml-py", "torch.cuda.utilization() and similar calls in a script"),
}
"""Optional packages: how to install them, and what needs them."""
TORCH_TIMEOUT_S = 120.0
PROGRAM_TIMEOUT_S = 10.0
_ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "threads": torch.get_num_threads(), "devices": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found["devices"].append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.1f} GB")
if torch.backends.mps.is_available():
    found["devices"].append("mps")
if hasattr(torch, "xpu") and torch.xpu.is_available():
    found["devices"].append("xpu: " + torch.xpu.get_device_name(0))
torch.ones(2) @ torch.ones(2)
print(json.dumps(found))
"""

CheckLevel = Literal["good", "note", "warning", "bad"]
"""`bad`: tui-trainer cannot work."""


class CheckResult(msgspec.Struct, frozen=True):
    """The result of one check."""

    group: str
    name: str
    level: CheckLevel
    value: str
    hint: str = ""


def examine(runs_dir: Path | None = None) -> list[CheckResult]:
    """Run every check; takes as long as importing torch."""
    return [*_versions(), *_optional(), *_training(), *_terminal(), *_storage(runs_dir)]


def _versions() -> Iterator[CheckResult]:
    group = "Versions"
    yield CheckResult(group, "tui-trainer", "good", f"{__version__}, protocol {PROTOCOL_VERSION}")
    python = f"{platform.python_version()} ({sys.executable})"
    yield CheckResult(group, "python", "good", python)
    yield CheckResult(group, "system", "good", platform.platform())
    for name, purpose in LIBRARIES.items():
        version = installed(name)
        if version:
            yield CheckResult(group, name, "good", f"{version} ({purpose})")
        else:
            yield CheckResult(group, name, "bad", f"missing ({purpose})", f"pip install {name}")


def installed(package: str) -> str:
    """The version of a package; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _optional() -> Iterator[CheckResult]:
    group = "Optional"
    for name, (source, purpose) in OPTIONAL.items():
        version = installed(name)
        if version:
            yield CheckResult(group, name, "good", f"{version} ({purpose})")
        else:
            missing = f"missing: {purpose} needs it"
            yield CheckResult(group, name, "note", missing, f"pip install {source}")
    yield _program("git", "--version", group, "records the commit of your code with each run")
    yield _program("ssh", "-V", group, "attach ssh://host, for runs on other machines")


def _program(name: str, version: str, group: str, purpose: str) -> CheckResult:
    path = shutil.which(name)
    if path is None:
        return CheckResult(group, name, "note", f"missing: {purpose}", f"install {name}")
    try:
        asked = subprocess.run(
            [path, version],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=PROGRAM_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CheckResult(group, name, "warning", f"{path} does not answer: {error}")
    printed = (asked.stdout or asked.stderr).strip().splitlines() or [path]
    return CheckResult(group, name, "good", f"{printed[0]} ({purpose})")


def _training() -> Iterator[CheckResult]:
    group = "Training"
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield CheckResult(group, "torch", "bad", f"importing it does not finish: {error}")
        return
    try:
        found = json.loads(asked.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        yield CheckResult(group, "torch", "bad", last, "pip install torch, for your device")
        return
    yield CheckResult(group, "torch", "good", found["version"])
    yield CheckResult(
        group, "processor", "good", f"{usable_cores()} cores, {found['threads']} torch threads"
    )
    for device in found["devices"]:
        yield CheckResult(group, "device", "good", device)
    if not found["devices"]:
        hint = ""
        if shutil.which("nvidia-smi"):
            hint = "there is an NVIDIA driver, but this build of torch does not see a GPU"
        yield CheckResult(group, "device", "warning" if hint else "note", "CPU only", hint)


def _terminal() -> Iterator[CheckResult]:
    group = "Terminal"
    if reason := why_no_screen():
        yield CheckResult(group, "screen", "note", f"{reason}: runs print plain lines here")
    else:
        size = shutil.get_terminal_size()
        small = size.columns < 80 or size.lines < 24
        yield CheckResult(
            group,
            "size",
            "warning" if small else "good",
            f"{size.columns}×{size.lines}",
            "the dashboard needs at least 80×24" if small else "",
        )
    term, depth = os.environ.get("TERM", "not set"), os.environ.get("COLORTERM", "")
    yield CheckResult(
        group, "TERM", "good", term + (f", {depth}" if depth else ""), _colour_hint(term)
    )
    if os.environ.get("NO_COLOR"):
        yield CheckResult(group, "NO_COLOR", "note", "set: colours are off")
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") == "utf8":
        yield CheckResult(group, "encoding", "good", encoding)
    else:
        yield CheckResult(group, "encoding", "warning", encoding, "--ascii, or LC_ALL=C.UTF-8")
    for name in ("TMUX", "STY"):
        if os.environ.get(name):
            yield CheckResult(group, "inside", "note", "tmux" if name == "TMUX" else "screen")
    if os.environ.get("SSH_CONNECTION"):
        hint = "tui-trainer attach ssh://this-host, run on your own machine, draws there instead"
        yield CheckResult(group, "inside", "note", "an ssh login", hint)


def _colour_hint(term: str) -> str:
    many = "256color" in term or os.environ.get("COLORTERM") in ("truecolor", "24bit")
    known = ("kitty", "ghostty", "alacritty", "wezterm", "foot")
    return "" if many or any(name in term for name in known) else "16 colours will be used"


def _storage(runs_dir: Path | None) -> Iterator[CheckResult]:
    group = "Runs"
    directory = runs_directory(runs_dir)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    writable = os.access(existing, os.W_OK | os.X_OK)
    move = "--runs-dir DIR or $TUI_TRAINER_RUNS_DIR keeps runs elsewhere"
    if not writable:
        yield CheckResult(group, "directory", "bad", f"cannot write to {existing}", move)
    else:
        there = "" if directory.exists() else " (created with the first run)"
        yield CheckResult(group, "directory", "good", f"{directory}{there}")
    try:
        if directory.exists():
            check_directory(directory)
            runs = list_runs(runs_dir)
            live = sum(run.live for run in runs)
            yield CheckResult(group, "runs", "good", f"{len(runs)}, {live} of them live")
            for run in runs:
                if run.state == "refused":
                    yield CheckResult(group, "permissions", "warning", run.note, run.hint)
    except RunError as error:
        yield CheckResult(group, "permissions", "bad", error.message, error.hint)
    free = shutil.disk_usage(existing).free
    low = free < 2**30
    yield CheckResult(
        group,
        "disk",
        "warning" if low else "good",
        f"{bytes_(free, 0)} free",
        move if low else "",
    )
    longest = len(os.fsencode(directory / ("x" * 24) / SOCKET_FILE))
    if longest >= MAX_SOCKET_PATH_BYTES:
        yield CheckResult(
            group,
            "sockets",
            "note",
            "the path of the directory is too long for sockets, which are created elsewhere",
        )


# ---------------------------------------------------------------- the command


SIGNS: dict[CheckLevel, tuple[str, str]] = {
    "good": ("ok", "green"),
    "note": ("–", "dim"),
    "warning": ("!", "yellow"),
    "bad": ("✗", "red"),
}


def doctor(
    *,
    json: Annotated[bool, flag("print a list of objects instead")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """check versions, device, terminal, permissions, and what is missing"""
    findings = examine(runs_dir)
    if json:
        print(msgspec.json.encode(findings).decode())
    else:
        _print(findings)
    return FAULT if any(finding.level == "bad" for finding in findings) else 0


def _print(findings: list[CheckResult]) -> None:
    table = columns("left", "left")
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            table.add_row(Text(group, "bold"))
        sign, style = SIGNS[finding.level]
        table.add_row(Text.assemble((f"  {sign:>2} ", style), finding.name), Text(finding.value))
        if finding.hint:
            table.add_row("", Text(finding.hint, "dim"))
    console = Console(highlight=False)
    for line in table_lines(table):
        console.print(line, soft_wrap=True)
