"""The database of a run: its tables, and how it is created and opened."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from tui_trainer.protocol.text import single_line

STORE_FILE = "history.sqlite"
APPLICATION_ID = 0x54545231  # "TTR1": `file` and other tools tell our databases by it
SCHEMA_VERSION = 1
"""Of `PRAGMA user_version`; 0 is an empty database."""

SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,   -- 'info', 'status'
    value BLOB NOT NULL     -- JSON
) WITHOUT ROWID;

CREATE TABLE series (
    id INTEGER PRIMARY KEY, -- number of the measured table
    description BLOB NOT NULL, -- JSON: name, columns with unit and direction, cadence, optimizer
    rows INTEGER NOT NULL DEFAULT 0 -- raw rows stored
);

-- 512 consecutive entries of one level of one measured table: rows (level 0) or buckets of 8^level.
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY,
    series INTEGER NOT NULL,
    level INTEGER NOT NULL,
    number INTEGER NOT NULL,     -- entries number*512 ... number*512+511
    last_step INTEGER NOT NULL,  -- step of the last row
    steps BLOB NOT NULL,         -- packed int64: last steps, then (levels > 0) first steps
    UNIQUE (series, level, number)
);
CREATE INDEX chunk_by_step ON chunk (series, level, last_step, number);

-- The values of 16 consecutive columns in a chunk.
CREATE TABLE part (
    chunk INTEGER NOT NULL,
    columns INTEGER NOT NULL,    -- columns columns*16 ... columns*16+15
    data BLOB NOT NULL,
    PRIMARY KEY (chunk, columns)
) WITHOUT ROWID;

-- Entries that do not fill a chunk yet, as they were committed, unpacked.
CREATE TABLE tail (
    series INTEGER NOT NULL,
    level INTEGER NOT NULL,
    first INTEGER NOT NULL,      -- index of the first entry
    count INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (series, level, first)
) WITHOUT ROWID;

-- Clips, non-finite values and notices, JSON.
CREATE TABLE event (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL,
    data BLOB NOT NULL);
CREATE INDEX event_by_step ON event (step);
CREATE TABLE log (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL,
    stream TEXT NOT NULL, text TEXT NOT NULL);
CREATE INDEX log_by_step ON log (step);
-- Samples and confusion matrices, MessagePack.
CREATE TABLE artifact (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL,
    data BLOB NOT NULL);
CREATE INDEX artifact_by_kind ON artifact (kind, step);

-- When a step ended (seconds since the epoch), about one step a second.
CREATE TABLE clock (step INTEGER PRIMARY KEY, time REAL NOT NULL);

-- What came after what, and when: pieces of the thread that joins rows, events, output and samples.
-- MessagePack, packed columns.
CREATE TABLE told (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
-- The description of the run as it was at a moment of the story, JSON.
CREATE TABLE description (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE INDEX event_by_kind ON event (kind, step);
-- A run may clip at every step: what else happened is found without looking at all of those.
CREATE INDEX event_but_clips ON event (step) WHERE kind <> 'clip';
"""


REFUSALS = (sqlite3.Error, UnicodeDecodeError, OverflowError)
"""What a question raises: the second where the message quotes a damaged name of a table."""


class StoreError(Exception):
    """The store cannot be read, and why, for people."""


def reason_of(fault: Exception) -> str:
    """One of REFUSALS for people, on one line; what it quotes may come from anywhere."""
    if isinstance(fault, UnicodeDecodeError):
        return "malformed database schema"
    return single_line(str(fault), 200)


def open_for_writing(directory: str | os.PathLike[str]) -> sqlite3.Connection:
    """Open the store of a run, creating it where there is none. Raises sqlite3.Error or
    StoreError."""
    path = Path(directory) / STORE_FILE
    connection = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    try:
        os.chmod(path, 0o600)
        connection.execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing that was committed; a power cut may lose the last commits.
        connection.execute("PRAGMA synchronous = NORMAL")
        _create(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """Create the tables of an empty database, in one transaction: another process sees none of
    them or all."""
    connection.execute("BEGIN IMMEDIATE")
    version = schema_version(connection)
    if version == 0:
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    if version not in (0, SCHEMA_VERSION):
        raise StoreError(_other_version(version))


def _other_version(version: int) -> str:
    return (
        f"this run was recorded by another version of tui-trainer (its store has version "
        f"{version}, this one reads {SCHEMA_VERSION})"
    )


def schema_version(connection: sqlite3.Connection) -> int:
    """0 for an empty database."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def open_for_reading(directory: str | os.PathLike[str], ended: bool = False) -> sqlite3.Connection:
    """The store of a run, read-only, while it is written or after. Raises StoreError.

    `ended`: nobody writes to it any more. Then nothing is written beside it either, neither a
    journal nor the index of one that a killed writer has left (SQLite's own way of reading a
    journal is through a shared index in a file, which it makes and changes).
    """
    path = Path(directory) / STORE_FILE
    if not path.exists():
        raise StoreError(f"nothing was recorded in {directory}")
    journal = path.with_name(path.name + "-wal").exists()
    # Where neither the journal nor the right to make one is there, the file alone is all there is.
    alone = not journal and (ended or not os.access(directory, os.W_OK))
    ending = "&immutable=1" if alone else "&vfs=unix-none" if ended and os.name == "posix" else ""
    address = f"file:{quote(str(path))}?mode=ro{ending}"
    try:
        connection = sqlite3.connect(
            address, uri=True, timeout=2.0, isolation_level=None, check_same_thread=False
        )
        # A damaged text must not hide the rows after it.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        if ended:  # the index of the journal is then kept in memory
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = schema_version(connection)
    except REFUSALS as fault:
        raise StoreError(f"{path} cannot be read: {reason_of(fault)}") from fault
    if version != SCHEMA_VERSION:
        connection.close()
        if version:
            raise StoreError(_other_version(version))
        # A run that is starting: its store is there, its tables are not.
        raise StoreError(f"nothing was recorded in {directory}")
    return connection
