"""`tui-trainer check` and `explain`; findings of a run in show, JSON lines, the report and CSV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calling import assert_refused, call
from tui_trainer.cli.commands.check import FindingsCollector, _as_json, _report
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Status

SCRIPT = """
import sys, torch
from torch import nn
from torch.nn import functional as F
print("the script says hello")
bug = sys.argv[1]
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(net.parameters(), 0.05)
for step in range(60):
    x = torch.randn(16, 8)
    if bug != "zero":
        optimizer.zero_grad()
    F.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
    optimizer.step()
    if bug == "crash" and step == 20:
        raise RuntimeError("boom")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_bug_is_printed_and_fails(script: Path, tmp_path: Path) -> None:
    done = call("check", "--steps", "20", script, "zero", cwd=tmp_path)
    assert done.returncode == 1
    assert "zero_grad is missing" in done.stdout
    assert "since step 2" in done.stdout
    assert "1 finding in 20 steps" in done.stdout
    assert "hello" in done.stderr


def test_json_is_one_object(script: Path, tmp_path: Path) -> None:
    done = call("check", "--json", "--steps", "20", script, "zero", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["steps"], answer["state"]) == (20, "stopped")
    (finding,) = [each for each in answer["findings"] if each["cause"] is None]
    assert finding.keys() >= {"rule", "level", "onset", "where", "text", "next", "evidence"}
    assert (finding["rule"], finding["level"], finding["onset"]) == ("gradients-kept", "error", 2)
    assert finding["where"]["phase"] == "zero_grad"
    assert finding["found"] == 3


def test_clean_script_passes_and_leaves_nothing(script: Path, tmp_path: Path) -> None:
    done = call("check", "--steps", "20", script, "none", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "train.py: no findings in 20 steps\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_script_that_crashes_fails(script: Path, tmp_path: Path) -> None:
    done = call("check", script, "crash", cwd=tmp_path)
    assert done.returncode == 1
    assert "it crashed: RuntimeError: boom" in done.stdout


def test_faults_of_ours_are_not_passed_off_as_a_clean_script() -> None:
    collector = FindingsCollector()
    collector.end = Status(state="finished", step=3)
    fault = "rule bad-batch is switched off: ValueError: x"
    notice = Notice(1, 3, 0.0, "fault", fault, "error")
    collector.take([notice], collector.end)
    assert json.loads(_as_json("train.py", [], collector))["faults"] == [fault]
    lines = [str(line) for line in _report("train.py", [], collector)]
    assert lines[-2:] == [
        "train.py: no findings in 3 steps",
        f"not everything was checked: {fault}",
    ]


def test_rules_are_switched_off(script: Path, tmp_path: Path) -> None:
    done = call("check", "--steps", "20", "--rules", "off", script, "zero", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = call("check", "--rules", "gradients-keep=off", script, "zero", cwd=tmp_path)
    assert_refused(done, "there is no rule gradients-keep", "gradients-kept", status=2)


def test_findings_of_a_run_are_everywhere(script: Path, tmp_path: Path) -> None:
    done = call("run", "--json", "--name", "bad", script, "zero", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (event,) = [
        each for each in lines if each.get("kind") == "finding" and each["rule"] == "gradients-kept"
    ]
    assert (event["type"], event["level"], event["onset"]) == ("event", "error", 2)
    shown = json.loads(call("show", "--json", "bad", cwd=tmp_path).stdout)
    assert shown["findings"][0]["rule"] == "gradients-kept"
    assert "zero_grad is missing" in call("show", "bad", cwd=tmp_path).stdout
    assert call("report", "bad", "--output", "bad.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "bad.html").read_text()
    assert "<h2>Findings</h2>" in page
    assert "zero_grad is missing" in page


def test_explain(tmp_path: Path) -> None:
    assert "gradients-kept" in call("explain", cwd=tmp_path).stdout
    done = call("explain", "loss-diverges", cwd=tmp_path)
    assert "--rules loss-diverges.rise=2" in done.stdout
    assert_refused(call("explain", "loss-converges", cwd=tmp_path), "loss-diverges", status=2)
    one = json.loads(call("explain", "plateau", "--json", cwd=tmp_path).stdout)
    assert (one["rule"], one["level"]) == ("loss-plateau", "info")


def test_a_shipped_task_is_checked(tmp_path: Path) -> None:
    """`--steps` is that of check: the schedule stays that of a whole training."""
    options = ("--steps", "6", "--threads", "1", "--width", "16", "--layers", "1")
    done = call("check", "gpt", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "gpt: no findings in 6 steps\n"), done.stderr
    bad = call("check", "--json", "--steps", "40", "gpt", "--lr", "30", *options[2:], cwd=tmp_path)
    answer = json.loads(bad.stdout)
    assert (bad.returncode, answer["script"], answer["steps"]) == (1, "gpt", 40)
    assert answer["findings"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt", "--epohcs", "3"), "did you mean --epochs?"),
        (("gpt", "--learning-rate", "fast"), "--learning-rate cannot be 'fast'"),
        (
            ("--epochs", "3", "train.py"),
            "tui-trainer check train.py --epochs 3",
        ),
        (("--stpes", "3", "train.py"), "did you mean --steps?"),
        ((), "check needs a script or a task"),
    ],
)
def test_near_misses_of_check(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert_refused(call("check", *arguments, cwd=tmp_path), message)
