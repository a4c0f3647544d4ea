from __future__ import annotations

import io
import os

import pytest

from tui_trainer.run.capture import Capture


class Disk(io.BytesIO):
    """Takes so many bytes at most, as a disk that is full does."""

    room = 1_000_000

    def write(self, data):
        taken = bytes(data)[: self.room - len(self.getvalue())]
        if not taken:
            raise OSError(28, "No space left on device")
        return super().write(taken)


def test_the_log_file_goes_on_when_the_disk_has_room_again():
    said = []
    capture = Capture(lambda stream, text: said.append(text))
    capture._log = disk = Disk()
    capture._take(1, b"first\n")
    disk.room = 9
    for _ in range(3):
        capture._take(1, b"middle\n")
    disk.room = 1_000
    capture._take(2, b"last\n")
    assert said == ["first", "middle", "middle", "middle", "last"]
    kept = disk.getvalue().decode()
    assert kept == "first\nmid\n… (18 bytes could not be written)\nlast\n"


@pytest.mark.parametrize("held", range(12))
def test_what_was_printed_comes_before_the_traceback_that_followed_it(held):
    """Both are waiting when they are read; `held` moves the numbers that the pipes get."""
    said = []
    capture = Capture(lambda stream, text: said.append((stream, text)))
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
    assert said == [("stdout", "line"), ("stderr", "line")]
