"""The directory of a living run, made again when somebody removes it.

Without it the run would train on where neither `ls` nor `stop` finds it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tui_trainer.config.spec import SOCKET_POINTER_FILE, SPEC_FILE

_FILES = (SPEC_FILE, SOCKET_POINTER_FILE)


class Place:
    """Remembers the few files by which a run is found."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._kept: dict[str, bytes] = {}
        for name in _FILES:
            with contextlib.suppress(OSError):
                self._kept[name] = (self._directory / name).read_bytes()

    def restore(self) -> bool:
        """Put back what is missing; whether anything was. Raises OSError."""
        # A checkpoint may have made the directory anew by now: the file tells.
        if SPEC_FILE not in self._kept or (self._directory / SPEC_FILE).exists():
            return False
        for missing in reversed([self._directory, *self._directory.parents]):
            if not missing.exists():
                missing.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self._directory, 0o700)
        for name, data in self._kept.items():
            path = self._directory / name
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        return True
