"""Runs a generated script under the tracer and returns everything that is written about it.

The only module of these tests that depends on the structure of tui_trainer.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import processes
from tests.oracle.truth import ByHand, Silence, Truth
from tui_trainer.cli.commands.show import as_json
from tui_trainer.cli.run_summary import summarize_run
from tui_trainer.export.formats import write_csv, write_jsonl
from tui_trainer.probes import PROBES
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.status_file import StatusFile
from tui_trainer.run.sinks import Output as Descriptor
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.runs.liveness import inspect_run
from tui_trainer.runs.recording import open_history
from tui_trainer.store.writer import StoreWriter
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer

EVERY_STEP = {"weight_norm": 1, "update_ratio": 1}
Object = dict[str, Any]


@dataclass
class Output:
    """Everything written about one run."""

    live: list[Object]
    """The lines of `--json`."""
    export: list[Object]
    """The lines of `export --format jsonl`."""
    show: Object
    """The output of `show --json`."""
    tables: dict[str, list[dict[str, str]]]
    """The files of `export --format csv`, without their ending, row by row."""
    every_step: bool
    """Whether every quantity was measured at every step."""


def weights_of(names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The final weights of a script."""
    found = {n: p for net in names["nets"].values() for n, p in net.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in found.items()}


def run_alone(script: str) -> tuple[Truth, dict[str, torch.Tensor]]:
    """Run a script without the tracer: its truth and its final weights."""
    truth = Truth()
    names: dict[str, Any] = {"truth": truth, "ByHand": ByHand, "__name__": "__main__"}
    exec(compile(script, "<loop>", "exec"), names)
    return truth, weights_of(names)


def run_traced(
    script: str, folder: Path, gradients_every: int = 1
) -> tuple[Output, dict[str, torch.Tensor]]:
    """Run a traced script in this process; return its output and its final weights.

    `gradients_every`: cadence of the gradient norms; everything else is measured at every step."""
    run = folder / "loop"
    run.mkdir(parents=True)
    info = RunInfo(
        name="loop", task="script", title="loop.py", directory=str(run), started_at=time.time(),
        pid=os.getpid(),
    )  # fmt: skip
    recorder = Recorder(info)
    recorder.subscribe(StatusFile(run, recorder.info))
    recorder.subscribe(StoreWriter(run))
    recorder.subscribe(JsonLines(_file(folder / "live.jsonl")))
    names: dict[str, Any] = {"truth": Silence(), "ByHand": ByHand, "__name__": "__main__"}
    code = compile(script, "<loop>", "exec")
    options = ProbeOptions(budget=0.0, cadences={**EVERY_STEP, "grad_norm": gradients_every})
    state = "crashed"
    try:
        with Tracer(recorder, Gate(), PROBES, options):
            exec(code, names)
        state = "finished"
    finally:
        recorder.end(state)
        recorder.close()
    found = inspect_run(run)
    assert found is not None
    show = json.loads(as_json(summarize_run(found)))
    history = open_history(run)
    try:
        write_jsonl(history, _descriptor(folder / "export.jsonl"))
        tables = folder / "tables"
        tables.mkdir()
        write_csv(history, tables)
    finally:
        history.close()
    live, export = _lines(folder / "live.jsonl"), _lines(folder / "export.jsonl")
    return Output(live, export, show, _tables(tables), every_step=True), weights_of(names)


def run_command(program: str, folder: Path) -> Output:
    """Run a whole program through the command line; return its output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loop.py").write_text(program, encoding="utf-8")
    environment = {
        **os.environ,
        "TUI_TRAINER_RUNS_DIR": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
    }

    def call(*arguments: str) -> str:
        done = processes.run(
            [sys.executable, "-m", "tui_trainer", *arguments],
            torch=arguments[0] == "run",
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    live = call("run", "--json", "--name", "loop", "loop.py")
    show = json.loads(call("show", "--json", "loop"))
    export = call("export", "loop", "--format", "jsonl")
    call("export", "loop", "--format", "csv", "--output", str(folder / "tables"))
    return Output(_objects(live), _objects(export), show, _tables(folder / "tables"), False)


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _file(path: Path) -> Descriptor:
    return Descriptor(_descriptor(path))


def _objects(text: str) -> list[Object]:
    return [json.loads(line) for line in text.splitlines()]


def _lines(path: Path) -> list[Object]:
    return _objects(path.read_text(encoding="utf-8"))


def _tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for path in folder.glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found
