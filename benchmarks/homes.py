"""The cost of the screen to a run in its own process, and to one with `--in-app`.

    python benchmarks/homes.py [--rounds 5] [--steps 400] [--threads 1] [--preset light]

Runs the real command in a pseudo-terminal of 120×40, whose output is discarded, in turns: detached
(no viewer), with the screen in another process than the training, and with `--in-app`. Prints the
medians over all rounds of each run's median step, mean step and 95th percentile, read from the
run's store, without its first steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pexpect

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish
from report import environment as terminal_environment

from tui_trainer.config.run_spec import read_state
from tui_trainer.store.reader import StoredHistory

HOMES = {"detached": ["--detach"], "own process": [], "--in-app": ["--in-app"]}
WARM_UP_STEPS = 50
LONGEST_S = 600.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--threads", help="torch's threads; the task's own choice if not given")
    options.add_argument("--preset", default="light")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    begin()
    command = [sys.executable, "-m", "tui_trainer", "gpt", "--preset", given.preset]
    command += ["--steps", str(given.steps)]
    command += ["--threads", given.threads] if given.threads else []
    measured: dict[str, list[tuple[float, float, float]]] = {home: [] for home in HOMES}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(given.rounds):
            for home, flags in HOMES.items():
                name = f"{home.strip('-').replace(' ', '-')}-{number}"
                train([*command, *flags, "--name", name], directory, name)
                measured[home].append(steps_of(Path(directory) / name))
    show(measured, given)
    finish(given.json, {"median_mean_p95_ms": measured})


def train(command: list[str], directory: str, name: str) -> None:
    """Run a training until all steps are made, then close its screen."""
    environment = terminal_environment() | {"TUI_TRAINER_RUNS_DIR": directory}
    deadline = time.monotonic() + LONGEST_S
    if "--detach" in command:
        subprocess.run(command, env=environment, check=True, capture_output=True)
        wait_for_end(directory, name, deadline, lambda: time.sleep(0.2))
        return
    child = pexpect.spawn(command[0], command[1:], dimensions=(40, 120), env=environment)

    def drain() -> None:
        try:
            child.read_nonblocking(65536, timeout=0.2)
        except pexpect.TIMEOUT:
            return

    wait_for_end(directory, name, deadline, drain)
    child.close(force=True)


def wait_for_end(directory: str, name: str, deadline: float, between) -> None:  # noqa: ANN001
    while True:
        state = read_state(Path(directory) / name)
        if state is not None and state.ended:
            assert state.state == "finished", state.reason
            return
        assert time.monotonic() < deadline, f"{name} does not end"
        between()


def steps_of(run: Path) -> tuple[float, float, float]:
    """(median, mean, 95th percentile) of a run's steps in ms."""
    history = StoredHistory(run)
    table = next(t for t in history.tables.values() if t.table.name == "step")
    column = [each.name for each in table.table.columns].index("step_ms")
    step_ms = table.tail(table.rows)[1][WARM_UP_STEPS:, column]
    history.close()
    return float(np.median(step_ms)), float(np.mean(step_ms)), float(np.quantile(step_ms, 0.95))


def show(measured: dict[str, list[tuple[float, float, float]]], given: argparse.Namespace) -> None:
    threads = given.threads or "the task's own"
    print(f"gpt {given.preset}, {given.steps} steps, {threads} threads, {given.rounds} rounds")
    print(f"{'':14}{'median':>10}{'mean':>10}{'95 %':>10}   ms a step; each round's median")
    for home, rounds in measured.items():
        middle = [statistics.median(each) for each in zip(*rounds, strict=True)]
        single = " ".join(f"{each[0]:.1f}" for each in rounds)
        print(f"{home:14}" + "".join(f"{value:10.2f}" for value in middle) + f"   {single}")


if __name__ == "__main__":
    main()
