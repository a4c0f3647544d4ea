from __future__ import annotations

import io

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
