from __future__ import annotations

import io
import os
import shutil
import threading

import pytest

from tui_trainer.run.output import Capture, LogFile


class Disk(io.BytesIO):
    """Accepts a limited number of bytes, like a full disk."""

    room = 1_000_000

    def write(self, data):
        taken = bytes(data)[: self.room - len(self.getvalue())]
        if not taken:
            raise OSError(28, "No space left on device")
        return super().write(taken)

    def close(self):
        self.kept = self.getvalue().decode()
        super().close()


def test_the_log_file_continues_when_the_disk_has_room_again(tmp_path):
    disk = Disk()
    log = LogFile(tmp_path / "log.txt", open_file=lambda path: disk)
    log._append(b"first\n")
    disk.room = 9
    for _ in range(3):
        log._append(b"middle\n")
    disk.room = 1_000
    log._append(b"last\n")
    assert log.close()
    assert disk.kept == "first\nmid\n… (3 lines, 18 bytes, could not be written)\nlast\n"


def test_a_stalled_disk_blocks_nothing_and_missing_lines_are_counted(tmp_path):
    disk, moves = Disk(), threading.Event()

    def opened(path):
        moves.wait()
        return disk

    log = LogFile(tmp_path / "log.txt", queue_bytes=100, open_file=opened)
    captured = []
    capture = Capture(lambda stream, text: captured.append(text))
    capture._log = log
    for number in range(1000):
        capture._add(1, b"line %03d\n" % number)
    assert len(captured) == 1000
    moves.set()
    assert log.close()
    kept = disk.kept.splitlines()
    assert kept[:11] == [f"line {number:03}" for number in range(11)]
    assert kept[11:] == ["", "… (989 lines, 8,901 bytes, could not be written)"]


def test_the_log_marks_where_it_is_cut(tmp_path):
    path = tmp_path / "log.txt"
    log = LogFile(path, limit=20)
    for _ in range(5):
        log.write(b"0123456789\n")
    assert log.close()
    assert path.read_text() == (
        "0123456789\n0123456789\n\n… (the log file ends here, at 20 B; "
        "the app shows later output)\n"
    )


def test_a_log_that_was_removed_is_begun_again(tmp_path):
    path = tmp_path / "run" / "log.txt"
    path.parent.mkdir()
    log = LogFile(path)
    log._append(b"before\n")
    shutil.rmtree(path.parent)
    log._append(b"meanwhile\n")
    path.parent.mkdir()
    log._append(b"after\n")
    assert log.close()
    assert path.read_text() == "\n… (1 line, 10 bytes, could not be written)\nafter\n"


@pytest.mark.parametrize("held", range(12))
def test_output_comes_before_the_traceback_that_followed_it(held):
    """Both are waiting when they are read; `held` moves the numbers that the pipes get."""
    captured = []
    capture = Capture(lambda stream, text: captured.append((stream, text)))
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(held)]
    capture._pipes = pipes = {}
    try:
        for number in (1, 2):
            read_end, write_end = os.pipe()
            os.write(write_end, b"line\n")
            os.close(write_end)
            pipes[read_end] = number
        capture._read()
    finally:
        for descriptor in others:
            os.close(descriptor)
    assert captured == [("stdout", "line"), ("stderr", "line")]
