"""Measurements in a child process: its answers are checked, and it never stays behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests import processes
from tui_trainer.learn import page as progress_module
from tui_trainer.learn.measurement_process import (
    COMMAND,
    MeasurementError,
    MeasurementProcess,
    PageFailure,
    PageMeasurement,
    PageRequest,
    checked,
)
from tui_trainer.learn.measurements.__main__ import answer
from tui_trainer.learn.page import ReadingProgress, load_progress, save_progress

ANSWER = PageMeasurement(
    "loss-graph", 1, {"loss": 3.5, "name": "x", "vector": [1, 2.5]}, 1.0, "2.13.0"
)


def child(program: str) -> MeasurementProcess:
    """A process of measurements whose child is this Python program."""
    return MeasurementProcess((sys.executable, "-c", program))


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[MeasurementProcess]:
    monkeypatch.setattr("subprocess.Popen", processes.Popen)
    measurements = MeasurementProcess()
    yield measurements
    measurements.close()


@pytest.mark.slow
def test_a_real_child_answers_again_and_ends_with_its_owner(real: MeasurementProcess) -> None:
    real.prepare()
    first, second = real.measure("loss-graph", 1), real.measure("loss-graph", 2)
    assert (first.page, first.seed, second.seed) == ("loss-graph", 1, 2)
    assert first.values["leaves"] == second.values["leaves"]
    assert first.values["loss"] != second.values["loss"]
    with pytest.raises(MeasurementError, match="no page nothing"):
        real.measure("nothing", 1)
    assert real.measure("loss-graph", 1).values == first.values
    real.release()
    assert real._process is None
    real.prepare()
    pid = real._process.pid  # type: ignore[union-attr]
    real.close()
    assert gone(pid)
    with pytest.raises(MeasurementError, match="closed"):
        real.measure("loss-graph", 1)


def test_the_child_is_this_python_without_the_current_directory() -> None:
    assert COMMAND[:3] == (sys.executable, "-P", "-m")


def test_a_child_ends_when_its_input_is_closed() -> None:
    measurements = child("import sys; sys.stdin.read()")
    measurements.prepare()
    process = measurements._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(120) == 0


def test_a_child_that_dies_is_reported_with_its_last_words_and_started_again(
    tmp_path: Path,
) -> None:
    measurements = child(
        "import os, sys\n"
        f"path = {str(tmp_path / 'again')!r}\n"
        "if not os.path.exists(path):\n"
        "    open(path, 'w').close()\n"
        "    sys.exit('out of luck')\n"
        f"sys.stdin.readline(); print({msgspec.json.encode(ANSWER).decode()!r}, flush=True)\n"
    )
    with pytest.raises(MeasurementError, match="without an answer") as caught:
        measurements.measure("loss-graph", 1)
    assert caught.value.hint == "out of luck"
    assert measurements.measure("loss-graph", 1) == ANSWER
    measurements.close()


def test_closing_ends_a_measurement_that_hangs() -> None:
    measurements = child("import time; time.sleep(600)")
    errors = []

    def measure() -> None:
        try:
            measurements.measure("loss-graph", 1)
        except MeasurementError as error:
            errors.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    deadline = time.monotonic() + 120
    while measurements._process is None and time.monotonic() < deadline:
        time.sleep(0.01)
    measurements.close()
    thread.join(120)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_an_answer_for_another_page_is_refused() -> None:
    line = msgspec.json.encode(ANSWER).decode()
    measurements = child(f"input(); print({line!r}, flush=True); input()")
    with pytest.raises(MeasurementError, match="another"):
        measurements.measure("accumulation", 1)
    measurements.close()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"[]",
        b'{"page": "loss-graph"}',
        b'{"page":"x","seed":1,"values":{"a":null},"milliseconds":1,"torch":""}',
        b'{"page":"x","seed":1,"values":{"a":{"b":1}},"milliseconds":1,"torch":""}',
        b'{"page":"x","seed":1,"values":{},"milliseconds":1,"torch":"","more":1}',
    ],
)
def test_what_is_no_answer_is_refused(line: bytes) -> None:
    with pytest.raises(MeasurementError, match="no valid answer"):
        checked(line)


def test_an_answer_is_checked() -> None:
    assert checked(msgspec.json.encode(ANSWER)) == ANSWER
    with pytest.raises(MeasurementError, match="why") as caught:
        checked(msgspec.json.encode(PageFailure("why", "what to do")))
    assert caught.value.hint == "what to do"


def test_without_pytorch_the_hint_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "tui_trainer.learn.measurements.loss_graph", raising=False)
    failed = answer(PageRequest("loss-graph", 1))
    assert isinstance(failed, PageFailure)
    assert "PyTorch" in failed.message
    assert "pip install torch" in failed.hint


def test_a_measurement_that_raises_or_measures_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from tui_trainer.learn.measurements import loss_graph

    monkeypatch.setattr(loss_graph, "measure", lambda: {"loss": float("nan")})
    failed = answer(PageRequest("loss-graph", 1))
    assert isinstance(failed, PageFailure)
    assert "nan" in failed.message
    monkeypatch.setattr(loss_graph, "measure", lambda: [][0])
    failed = answer(PageRequest("loss-graph", 1))
    assert isinstance(failed, PageFailure)
    assert "IndexError" in failed.message


# ---------------------------------------------------------------- progress


def test_progress_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    for name in ("LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    progress = load_progress()
    assert progress == ReadingProgress()
    assert progress.shown_language == "fr"
    assert progress.mark("loss-graph")
    assert not progress.mark("loss-graph")
    assert progress.mark("accumulation", answered=True)
    progress.language = "en"
    save_progress(progress)
    loaded = load_progress()
    assert [loaded.state(n) for n in ("loss-graph", "accumulation", "param-groups")] == [
        "read",
        "answered",
        "new",
    ]
    assert loaded.shown_language == "en"
    if sys.platform == "linux":
        assert progress_module._file() == tmp_path / "tui-trainer" / "learn.json"


@pytest.mark.parametrize("content", [b"", b"{", b'{"read": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    save_progress(ReadingProgress(read=["x"]))
    progress_module._file().write_bytes(content)
    assert load_progress() == ReadingProgress()


def test_a_home_that_cannot_be_written_to_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    save_progress(ReadingProgress(read=["x"]))
