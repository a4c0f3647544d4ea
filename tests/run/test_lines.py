from __future__ import annotations

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from tui_trainer.run.output import MAX_LINE_CHARACTERS, LineSplitter


def lines(*parts):
    splitter = LineSplitter()
    made = [line for part in parts for line in splitter.feed(part)]
    return made + list(splitter.finish())


def test_lines():
    assert lines(b"one\ntw", b"o\r\n", b"", b"\nthree") == ["one", "two", "", "three"]


def test_a_progress_bar_is_one_line_its_last_state():
    assert lines(b"\r 10%", b"\r 20%", b"\r", b"100%\n", b"done\n") == ["100%", "done"]
    assert lines(b"10%\r20%\r\n") == ["20%"]


def test_bytes_that_are_no_text_and_escapes_do_no_harm():
    (line,) = lines(b"\xff\xfe a\x00b \x1b[31mred\x1b[0m \x1b]0;title\x07\xc3", b"\xa4\n")
    assert line.endswith("red \xe4")
    assert all(char.isprintable() for char in line)


def test_a_megabyte_without_newline_is_cut_with_a_note():
    (line,) = lines(b"x" * 1_000_000)
    assert len(line) < MAX_LINE_CHARACTERS + 100
    assert "996,000 more" in line


@given(st.binary(max_size=300), st.integers(1, 20))
def test_how_it_is_cut_into_reads_does_not_matter(data, size):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    assert lines(*parts) == lines(data)


CAPTURED = r"""
import os, subprocess, sys
from pathlib import Path
from tui_trainer.run.output import Capture
kept = []
capture = Capture(lambda stream, text: kept.append((stream, text)), Path(sys.argv[1]))
capture.start()
print("python")
os.write(1, b"descriptor\n")
subprocess.run([sys.executable, "-c", "import sys; print('child', file=sys.stderr)"])
sys.stdout.write("m" * 1_000_000)
os.write(1, b"\n")
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
capture.stop()
sleeper.kill()
print("after")
sys.stderr.write(repr([(s, t[:10]) for s, t in kept]))
"""


def test_capture_takes_everything_and_gives_the_descriptors_back(tmp_path):
    log = tmp_path / "log.txt"
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED, str(log)], capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "after\n"
    kept = eval(done.stderr)
    assert ("stderr", "child") in kept
    assert [text for stream, text in kept if stream == "stdout"] == [
        "python",
        "descriptor",
        "m" * 10,
    ]
    assert os.path.getsize(log) > 1_000_000
