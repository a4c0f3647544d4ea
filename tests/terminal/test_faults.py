"""Bad input and faults in the app: the screen shows the error and keeps the measurements, the
terminal is restored on exit, and the exit status is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.terminal.harness import COMMAND, Terminal

SHORT = ["--steps", "3", "--threads", "1", "--device", "cpu", "--sample-every", "0"]
SHORT += ["--layers", "2", "--width", "16", "--heads", "2", "--eval-batches", "1"]
EXPLOSIVE = ["--learning-rate", "1e9", "--warmup-steps", "0", "--schedule", "constant"]
EXPLOSIVE += ["--clip", "off", "--optimizer", "sgd"]


def shown(command: list[str], *texts: str, status: int) -> str:
    """Run it in the app until the screen shows all of `texts`, and leave; return the screen."""
    with Terminal([*COMMAND, *command], columns=120, rows=36) as terminal:
        for text in texts:
            terminal.wait_for(text)
        terminal.find(r"crashed|finished|stopped")
        seen = terminal.settle(0.5)
        terminal.press("q")
        assert terminal.wait_for_exit() == status
        terminal.assert_restored()
    return seen


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["gpt", "--data", "nowhere.txt"], ["there is no file or folder nowhere.txt", "--data"]),
        (["vit", "--data", "one"], ["only one class", "at least two classes"]),
    ],
    ids=["missing", "class"],
)
def test_refused_starts(
    options: list[str],
    messages: list[str],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "1.png").write_bytes(b"")
    rest = ["--steps", "3", "--threads", "1"]
    shown([*options, *rest], *messages, status=2)


def test_a_loss_that_is_not_a_number(runs: Path) -> None:
    messages = ["the loss is nan", "the loss was nan at step 2", "divide the learning rate by 10"]
    shown(["gpt", *EXPLOSIVE, *SHORT], *messages, status=1)


def test_a_tensor_that_memory_cannot_hold(runs: Path, train: Path) -> None:
    then = "if step == 7: torch.empty(10**15)"
    train.write_text(train.read_text().replace("# then", then))
    messages = ["crashed at step 7", "out of memory: 3.6 PB", "try a smaller batch"]
    shown(["run", str(train)], *messages, status=1)


def test_a_script_that_is_not_python(runs: Path, train: Path) -> None:
    train.write_text("for step in range(3)\n    pass\n")
    shown(["run", str(train)], "train.py, line 1", status=1)


def test_a_megabyte_on_one_line_and_control_sequences(runs: Path, train: Path) -> None:
    noise = r"'x' * 1_000_000 + '\n\x1b[2J\x1b[31mred\x07\x1b]0;title\x07\n'"
    then = f"sys.stdout.write({noise}) if step == 5 else step == 9 and sys.exit()"
    train.write_text(train.read_text().replace("# then", then))
    seen = shown(["run", str(train)], "finished after 9 steps", "Gradients", status=0)
    assert "xxxx" not in seen


def test_a_script_with_its_own_signal_handlers(runs: Path, train: Path) -> None:
    then = "if step == 4: os.kill(os.getpid(), 15); os.kill(os.getpid(), 2)\n"
    then += "    if step == 9: sys.exit(len(got))\n"
    own = "import os, signal\ngot = []\n"
    own += "signal.signal(signal.SIGTERM, lambda *a: got.append(a))\n"
    own += "signal.signal(signal.SIGINT, lambda *a: got.append(a))\n"
    train.write_text(own + train.read_text().replace("# then", then))
    shown(["run", str(train)], "at step 9", "exited with status 2", status=2)


@pytest.mark.parametrize(
    ("death", "messages", "status"),
    [
        ("os.kill(os.getpid(), 9)", ["killed by SIGKILL", "memory ran out"], 137),
        ("ctypes.string_at(0)", ["killed by SIGSEGV", "Segmentation fault (__init__.py"], 139),
        ("os._exit(7)", ["exit status 7"], 7),
    ],
    ids=["killed", "segmentation", "exit"],
)
def test_a_process_that_dies_at_once(
    death: str, messages: list[str], status: int, runs: Path, train: Path
) -> None:
    then = f"import os, ctypes; time.sleep(0.3 * (step % 10 == 0)); step == 60 and {death}"
    train.write_text(train.read_text().replace("# then", then))
    # "weight" stands in the table of gradients: what was measured so far is still shown.
    shown(["run", str(train)], "crashed at step", *messages, "weight", status=status)
