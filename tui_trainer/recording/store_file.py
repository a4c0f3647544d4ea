"""The store as a file: which one it is, whether it is damaged, and setting it aside."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import msgspec

from tui_trainer.history.store import objects
from tui_trainer.history.store.schema import STORE_FILE
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Status

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def identity(directory: Path) -> tuple[int, int]:
    """Which file the name leads to, (0, 0) for none. Raises OSError where the directory is gone as
    well."""
    try:
        found = os.stat(directory / STORE_FILE)
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def is_damage(fault: Exception) -> bool:
    """Whether the database cannot be trusted any more, as against a disk that refuses."""
    code: int = getattr(fault, "sqlite_errorcode", 0)
    return isinstance(fault, ValueError) or code & 0xFF in _CORRUPT


def set_aside(directory: Path) -> Path:
    """Keep a damaged database under another name, which is returned. Raises OSError."""
    path = directory / STORE_FILE
    kept = path.with_name(f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{STORE_FILE}")
    for ending in ("", "-wal", "-shm"):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.rename(kept.with_name(kept.name + ending))
    return kept


def put(connection: sqlite3.Connection, key: str, value: RunInfo | Status) -> None:
    """Write the one description or status that there is. Raises sqlite3.Error."""
    data = objects.encode(value) if isinstance(value, Status) else msgspec.json.encode(value)
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, data))
