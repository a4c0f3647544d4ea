"""Real short runs to look back at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tests.cli.calling import call
from tests.once import made_once

STEPS = 30


def home() -> Path:
    """A directory with two finished runs of different learning rates, and what --json printed."""
    return made_once("looking-back", _train_two)


def _train_two(place: Path) -> None:
    for name, rate in (("calm", "0.001"), ("eager", "0.02")):
        options = ("--steps", str(STEPS), "--threads", "1", "--learning-rate", rate)
        options += ("--eval-batches", "2", "--sample-length", "40")
        done = call("gpt", *options, "--name", name, "--json", cwd=place)
        assert done.returncode == 0, done.stderr
        (place / f"{name}.jsonl").write_text(done.stdout, encoding="utf-8")


def directory(name: str) -> Path:
    """Of one of the two runs."""
    return home() / "runs" / name


def fingerprint(place: Path, names: Sequence[str] = ()) -> dict[str, tuple[str, int, int]]:
    """Every file below, or those of these names: digest, size, time of the last change."""
    return {
        str(path.relative_to(place)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in (map(place.joinpath, names) if names else sorted(place.rglob("*")))
        if path.is_file()
    }
