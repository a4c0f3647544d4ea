"""A run through its whole life: started detached, attached to and hung up on, reached over ssh, cut
off, experimented with, rewound, killed, replayed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.starting import last_step, slow_down, until
from tests.ssh.sshd import only_ssh
from tests.terminal.harness import Terminal


@pytest.fixture
def terminal(runs):
    """Open the command in a pseudo-terminal."""
    opened = []

    def begin(*arguments):
        command = [sys.executable, "-m", "tui_trainer", *arguments]
        opened.append(Terminal(command, env=runs.environment))
        return opened[-1]

    yield begin
    for each in opened:
        each.__exit__()


SMALL = ("--width", "16", "--heads", "2", "--layers", "1", "--block-size", "16")
OPTIONS = (*SMALL, "--threads", "1", "--schedule", "constant", "--eval-every", "1000000")
OPTIONS = (*OPTIONS, "--sample-every", "0", "--eval-batches", "1")


def steps_in(lines: str) -> dict[int, tuple[object, ...]]:
    """Loss, learning rate, norm and clip scale of each step in JSON lines."""
    records = [json.loads(line) for line in lines.splitlines()]
    return {
        line["step"]: (line["loss"], line["lr"], line["grad_norm_preclip"], line["clip"]["scale"])
        for line in records
        if line["type"] == "step"
    }


def ends_in(alerts: Path) -> list[tuple[str, str]]:
    """(run, how it ended) of the alerts in a file."""
    lines = alerts.read_text().splitlines() if alerts.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [(each["run"], each["state"]) for each in found if each["state"]]


def newest(run: Path) -> tuple[int, Path]:
    found = max((run / "checkpoints").glob("step-*"))
    return int(found.name.removeprefix("step-")), found


def test_a_run_outlives_its_terminals_and_its_links(host, runs, terminal, tmp_path):
    out = tmp_path / "alerts"
    alert = ("--alert", f"cat >> {out}; echo >> {out}")
    saving = ("--checkpoint-every", "100", "--snapshots", "16MB")
    endless = (*OPTIONS, "--steps", "10000000", *saving)
    started = runs.call("gpt", "--detach", *alert, *endless)
    assert started.returncode == 0, started.stderr
    name = started.stdout.strip()
    until(lambda: runs.reported(name).step > 110, "it trains, and has a checkpoint")
    process = runs.reported(name).pid
    slow_down(runs.directory / name)
    try:
        here = terminal("attach", name)
        here.wait_for("running")
        here.hang_up()
        here.wait_for_exit()
        before = runs.reported(name).step
        until(lambda: runs.reported(name).step > before + 10, "it trains on after the hang-up")

        there = terminal("attach", f"ssh://Box/{name}")
        there.wait_for("running")
        there.press("space")
        until(lambda: there.pump(0.01) and runs.reported(name).state == "paused", "paused over ssh")
        with host.unresponsive():
            only_ssh().kill()
            there.wait_until(
                lambda text: "trying again" in text or "lost" in text, "that the link is lost"
            )
            there.hang_up()
            there.wait_for_exit()
        assert runs.ls()[name]["state"] == "paused"

        again = terminal("attach", f"ssh://Box/{name}")
        again.wait_for("paused")
        again.press("s")
        again.wait_for("after step")
        again.press("E")
        again.wait_for("ctrl+o: what if")
        again.press(*"lr=0.1", "ctrl+o")
        again.find(r"after 50 steps the loss is [\d.]+ instead of [\d.]+; the run is unchanged")
        again.press("escape")
        again.wait_for("ctrl+o: what if")
        again.press("escape")
        again.wait_until(lambda text: "ctrl+o" not in text, "the dialog is closed")
        again.press(",")
        was = int(again.find(r"back from step ([\d,]+)")[1].replace(",", ""))
        until(lambda: again.pump(0.01) and runs.reported(name).step == was - 1, "a step back")
        here_step = last_step(runs.call("step", "1", name))
        assert last_step(runs.call("resume", "--no-wait", name)) >= here_step
        again.wait_for("running")
        until(lambda: runs.reported(name).step > here_step + 10, "it trains on")
    finally:
        os.kill(process, signal.SIGKILL)
    until(lambda: runs.ls()[name]["state"] == "crashed", "ls shows crashed")
    until(lambda: ends_in(out) == [(name, "killed")], "the alert that it was killed")
    reported = runs.reported(name)
    shown = json.loads(runs.call("show", name, "--json").stdout)
    assert shown["state"] == "crashed"
    assert shown["step"] >= reported.step

    # Replay has every step but those of the last second (ten are allowed here).
    kept = steps_in(runs.call("export", name, "--format", "jsonl").stdout)
    assert list(kept) == list(range(1, max(kept) + 1))
    assert max(kept) >= reported.step - 10 * (reported.steps_per_second or 20)
    back = terminal("replay", name)
    back.wait_until(lambda text: re.search(rf"step +{max(kept):,}/{max(kept):,}", text), "its end")
    back.press("q")
    assert back.wait_for_exit() == 0

    # A resumed run ends with the weights of one that was never interrupted.
    branched, _ = newest(runs.directory / name)
    last = branched + 60
    rest_of_it = ("--resume", name, "--steps", str(last), "--name", "rest", "--json")
    rest = runs.call("gpt", *rest_of_it, *alert)
    assert rest.returncode == 0, rest.stderr
    until(lambda: ends_in(out)[1:] == [("rest", "finished")], "the alert that the rest ended")
    whole = runs.call("gpt", *OPTIONS, "--steps", str(last), "--name", "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    expected = steps_in(whole.stdout)
    before = min(branched, max(kept))  # the checkpoint may be of the second that the store misses
    assert {step: kept[step] for step in range(1, before + 1)} == {
        step: expected[step] for step in range(1, before + 1)
    }
    assert steps_in(rest.stdout) == {step: expected[step] for step in range(branched + 1, last + 1)}
    ends = [newest(runs.directory / each) for each in ("rest", "whole")]
    assert [step for step, _ in ends] == [last, last]
    resumed, uninterrupted = (load_file(path / "weights.safetensors") for _, path in ends)
    assert list(resumed) == list(uninterrupted)
    assert all(torch.equal(resumed[each], uninterrupted[each]) for each in resumed)
