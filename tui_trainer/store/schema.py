"""The database of a run: its tables, and how it is created and opened."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from tui_trainer.protocol.text import single_line

STORE_FILE = "history.sqlite"
APPLICATION_ID = 0x54545231  # "TTR1", by which `file` and other tools recognise the database
SCHEMA_VERSION = 2
"""Value of `PRAGMA user_version`; an empty database has 0."""

SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,       -- 'status': the last known state of the run
    value BLOB NOT NULL         -- JSON
) WITHOUT ROWID;

-- `seq` numbers everything that a run produces in the order in which it happened: a description, a
-- step with its rows, a row measured outside a step, an event, a log line, an artifact.

-- The description of the run from `seq` on, JSON; the last one is in force.
CREATE TABLE description (
    seq INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);

-- When each step ended: up to 512 consecutive steps, or rows measured outside a step.
CREATE TABLE step_time (
    id INTEGER PRIMARY KEY,
    last_seq INTEGER NOT NULL,
    last_step INTEGER NOT NULL,
    last_time REAL NOT NULL,    -- seconds since the epoch
    data BLOB NOT NULL          -- packed int64 and float32: seq, step, time in µs; own_ms
);
CREATE INDEX step_time_by_step ON step_time (last_step, last_time);

CREATE TABLE series (
    id INTEGER PRIMARY KEY,     -- number of the measured table
    description BLOB NOT NULL,  -- JSON: name, columns with unit and direction, cadence, optimizer
    rows INTEGER NOT NULL DEFAULT 0 -- raw rows stored
);

-- 512 consecutive entries of one level of a measured table: rows (level 0) or buckets of 8^level.
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY,
    series INTEGER NOT NULL,
    level INTEGER NOT NULL,
    number INTEGER NOT NULL,    -- entries number*512 ... number*512+511
    last_step INTEGER NOT NULL, -- step of the last row
    steps BLOB NOT NULL,        -- packed int64: last steps, then (levels > 0) first steps
    seqs BLOB,                  -- packed int64: seq of each row (level 0)
    UNIQUE (series, level, number)
);
CREATE INDEX chunk_by_step ON chunk (series, level, last_step, number);

-- The values of 16 consecutive columns of a chunk.
CREATE TABLE part (
    chunk INTEGER NOT NULL,
    columns INTEGER NOT NULL,   -- columns columns*16 ... columns*16+15
    data BLOB NOT NULL,
    PRIMARY KEY (chunk, columns)
) WITHOUT ROWID;

-- Entries that do not fill a chunk yet, one row per commit, not packed.
CREATE TABLE tail (
    series INTEGER NOT NULL,
    level INTEGER NOT NULL,
    first INTEGER NOT NULL,     -- index of the first entry
    data BLOB NOT NULL,         -- MessagePack: the protocol's message `Rows`
    seqs BLOB,                  -- int64: seq of each row (level 0)
    PRIMARY KEY (series, level, first)
) WITHOUT ROWID;

-- Clips, non-finite values, skipped iterations, findings and notices, JSON.
CREATE TABLE event (
    id INTEGER PRIMARY KEY,
    seq INTEGER NOT NULL,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX event_by_step ON event (step);
CREATE INDEX event_by_kind ON event (kind, step);
-- A run may clip at every step: the other events are found without reading all of those.
CREATE INDEX event_but_clips ON event (step) WHERE kind <> 'clip';

CREATE TABLE log (
    id INTEGER PRIMARY KEY,
    seq INTEGER NOT NULL,
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    stream TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX log_by_step ON log (step);

-- Samples and confusion matrices, MessagePack.
CREATE TABLE artifact (
    id INTEGER PRIMARY KEY,
    seq INTEGER NOT NULL,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX artifact_by_kind ON artifact (kind, step);

-- Steps that were not recorded, because the recorder could not keep up.
CREATE TABLE dropped (
    seq INTEGER PRIMARY KEY,
    steps INTEGER NOT NULL
);
"""

READ_ERRORS = (sqlite3.Error, UnicodeDecodeError, OverflowError)
"""What a query of a damaged database raises; UnicodeDecodeError where the message quotes a damaged
name."""


class StoreError(Exception):
    """The store cannot be read or written; the message says why."""


class DamageError(StoreError):
    """The content of the store cannot be decoded."""


def error_text(error: Exception) -> str:
    """The message of one of READ_ERRORS on one line; it may quote any text."""
    if isinstance(error, UnicodeDecodeError):
        return "malformed database schema"
    return single_line(str(error), 200)


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
    """Open the store of a run read-only, while the run writes to it or later. Raises StoreError.

    `ended`: the run no longer writes. Reading then changes nothing in the directory: neither a
    journal nor the index of a journal that a killed writer left is created. (SQLite reads a journal
    through a shared index in a file, which it creates and changes.)
    """
    path = Path(directory) / STORE_FILE
    if not path.exists():
        raise StoreError(f"nothing was recorded in {directory}")
    journal = path.with_name(path.name + "-wal").exists()
    # Without a journal, and without the need or the permission to create one, read the file alone.
    alone = not journal and (ended or not os.access(directory, os.W_OK))
    options = "&immutable=1" if alone else "&vfs=unix-none" if ended and os.name == "posix" else ""
    uri = f"file:{quote(str(path))}?mode=ro{options}"
    connection = None
    try:
        connection = sqlite3.connect(
            uri, uri=True, timeout=2.0, isolation_level=None, check_same_thread=False
        )
        # A damaged text must not hide the rows after it.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        if ended:  # SQLite then keeps the index of the journal in memory
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = schema_version(connection)
    except READ_ERRORS as error:
        if connection is not None:
            connection.close()
        raise StoreError(f"{path} cannot be read: {error_text(error)}") from error
    if version != SCHEMA_VERSION:
        connection.close()
        if version:
            raise StoreError(_other_version(version))
        # A run that is starting: the file exists, its tables do not yet.
        raise StoreError(f"nothing was recorded in {directory}")
    return connection
