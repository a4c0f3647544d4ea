"""Runs benchmarks of this working tree and of an earlier commit in turn, and compares the figures.

    python -m benchmarks.against COMMIT frames keys [--rounds 2] [--json FILE] [-- OPTION …]

Each side runs its own benchmarks with its own package, because names inside an earlier commit
differ. Each side gets a folder in which the package lies as if installed, and a virtual environment
whose interpreter finds that folder before the other packages: the commands that a benchmark starts,
and their children, then use the same side whatever they do to PYTHONPATH. Options after `--` go to
every benchmark on both sides.

A round runs every benchmark on both sides, one after the other; every second round runs them in the
opposite order, so that changes in the machine's speed affect both sides. The program prints the
medians of the rounds and their ratio (after / before); a figure of one side only has no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import write_json

HERE = Path(__file__).resolve().parent.parent
LABELS = ("parameters", "columns", "rows", "threads")
"""Keys of numbers that distinguish the entries of a list."""
LEFT_OUT = (*LABELS, "pairs", "launches", "presses", "frames", "every")
"""Keys of numbers that are not compared."""


class Side:
    """One version of the program and its benchmarks."""

    def __init__(self, name: str, tree: Path, folder: Path) -> None:
        self.name = name
        self._shape = folder / name
        self._python = _environment(folder / f"{name}-environment", self._shape)
        package = self._shape / "tui_trainer"
        package.mkdir(parents=True)
        for entry in (tree / "tui_trainer").iterdir():
            (package / entry.name).symlink_to(entry)
        if not (package / "models").exists():
            (package / "models").symlink_to(tree / "models")
        for beside in ("benchmarks", "tests"):  # `frames` uses the tests' synthetic run
            (self._shape / beside).symlink_to(tree / beside)
        _describe_package(tree, self._shape / "tui_trainer-0.dist-info")

    def run(self, benchmark: str, options: list[str], results: Path) -> dict[str, Any] | None:
        """The figures of one run; None where it failed, after printing the end of its output."""
        command = [str(self._python), "-m", f"benchmarks.{benchmark}", *options]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [*command, "--json", str(results)],
            cwd=self._shape,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        results.with_suffix(".txt").write_text(done.stdout)
        if done.returncode or not results.exists():
            print(f"{benchmark} of {self.name} failed:\n{done.stdout[-3000:]}", flush=True)
            return None
        found: dict[str, Any] = json.loads(results.read_text())
        print(f"{benchmark} of {self.name}: {found.get('load', 'done')}", flush=True)
        return found


def _environment(folder: Path, shape: Path) -> Path:
    """Create an environment whose interpreter imports from `shape`, then from the packages of the
    present environment; returns the interpreter.

    Python searches a folder named in a .pth file without reading that folder's own .pth files, so
    an editable installation of this tree is not found.
    """
    venv.create(folder, symlinks=True)
    inside = sysconfig.get_path("purelib", vars={"base": str(folder)})
    lines = [str(shape), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    Path(inside, "side.pth").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return folder / "bin" / "python"


def _describe_package(tree: Path, folder: Path) -> None:
    """Write the metadata of the package, through which its tasks are found."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    folder.mkdir()
    version = project.get("version", "0")
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
    )
    groups = {**project.get("entry-points", {}), "console_scripts": project.get("scripts", {})}
    (folder / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
            for group, entries in groups.items()
        )
    )


def extract(commit: str, folder: Path) -> Path:
    """Extract the tree of a commit into `folder`; returns its path."""
    tree = folder / "tree"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def figures(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of each number; entries of a list are named by the texts and counts in them."""
    if isinstance(found, dict):
        for key, value in found.items():
            left_out = key in LEFT_OUT and not isinstance(value, list)
            if not left_out and not key.startswith(("others_cores", "load", "machine")):
                yield from figures(value, f"{name} {key}".strip())
    elif isinstance(found, list):
        for number, value in enumerate(found):
            label = str(number)
            if isinstance(value, dict):
                given = [str(v) for k, v in value.items() if isinstance(v, str) or k in LABELS]
                label = ", ".join(given) or label
            yield from figures(value, f"{name} [{label}]".strip())
    elif isinstance(found, (int, float)) and not isinstance(found, bool):
        yield name, float(found)


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The medians of all figures, and their ratios where both sides have one."""
    sides = []
    for runs in (before, after):
        values: dict[str, list[float]] = {}
        for run in runs:
            for name, value in figures(run):
                values.setdefault(name, []).append(value)
        sides.append({name: statistics.median(each) for name, each in values.items()})
    rows = []
    for name in dict.fromkeys((*sides[0], *sides[1])):
        old, new = sides[0].get(name), sides[1].get(name)
        ratio = new / old if old and new is not None else None
        rows.append({"figure": name, "before": old, "after": new, "ratio": ratio})
    return rows


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    """Print the tables; write them as JSON when asked to."""
    given, passed = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("benchmarks", nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, help="folder that keeps the output of every run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    compared: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="against-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        results = (options.results or folder / "results").resolve()
        results.mkdir(parents=True, exist_ok=True)
        sides = [
            Side("before", extract(options.commit, folder), folder),
            Side("after", HERE, folder),
        ]
        for benchmark in options.benchmarks:
            runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
            for number in range(options.rounds):
                for side in sides if number % 2 == 0 else sides[::-1]:
                    file = results / f"{benchmark}-{side.name}-{number + 1}.json"
                    found = side.run(benchmark, passed, file)
                    if found is not None:
                        runs[side.name].append(found)
            rows = compare(runs["before"], runs["after"])
            compared[benchmark] = rows
            print(f"\n{benchmark:70}{'before':>12}{'after':>12}{'ratio':>8}")
            for row in rows:
                old, new, ratio = (_text(row[key]) for key in ("before", "after", "ratio"))
                print(f"{row['figure']:70}{old:>12}{new:>12}{ratio:>8}")
            print(flush=True)
    write_json(options.json, {"commit": options.commit, "compared": compared})


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(own arguments, arguments after `--`)"""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    main()
