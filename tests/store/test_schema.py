"""Creating the store: another process sees an empty database or the whole schema."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest

from tui_trainer.store.schema import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    STORE_FILE,
    StoreError,
    open_for_reading,
    open_for_writing,
    schema_version,
)

STORES = 100

CREATE_STORES = """
import sys
from pathlib import Path
from tui_trainer.store.schema import open_for_writing

for number in range(int(sys.argv[2])):
    directory = Path(sys.argv[1]) / str(number)
    directory.mkdir()
    open_for_writing(directory).close()
"""


def objects(connection):
    """Names of the tables and indexes."""
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def test_a_reader_sees_nothing_or_the_whole_schema(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = objects(open_for_writing(tmp_path / "whole"))
    command = [sys.executable, "-c", CREATE_STORES, str(tmp_path), str(STORES)]
    with pytest.raises(StoreError, match="nothing was recorded in "):
        open_for_reading(tmp_path / "0")
    with subprocess.Popen(command) as writer:
        number, refusals = 0, set()
        while number < STORES:
            assert writer.poll() in (None, 0)
            directory = tmp_path / str(number)
            try:
                connection = open_for_reading(directory)
            except StoreError as error:
                refusals.add(str(error).removesuffix(str(directory)))
                continue
            assert objects(connection) == whole
            connection.close()
            number += 1
    assert writer.returncode == 0
    assert refusals <= {"nothing was recorded in "}


def test_creating_again_changes_nothing(tmp_path):
    with open_for_writing(tmp_path) as first:
        before = objects(first)
    with open_for_writing(tmp_path) as second:
        assert objects(second) == before
        assert schema_version(second) == SCHEMA_VERSION
        assert second.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


def test_an_interrupted_creation_leaves_an_empty_database(tmp_path, monkeypatch):
    from tui_trainer.store import schema

    monkeypatch.setattr(schema, "SCHEMA", schema.SCHEMA + "CREATE TABLE meta (twice INTEGER);\n")
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        open_for_writing(tmp_path)
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        assert (schema_version(connection), objects(connection)) == (0, set())
    assert objects(open_for_writing(tmp_path))


def test_only_the_owner_reads_the_store(tmp_path):
    open_for_writing(tmp_path).close()
    assert os.stat(tmp_path / STORE_FILE).st_mode & 0o777 == 0o600


def test_a_store_that_cannot_be_read_is_closed(tmp_path, monkeypatch):
    (tmp_path / STORE_FILE).write_bytes(b"this is not a database " * 100)
    opened = []
    connect = sqlite3.connect

    def remember(*arguments, **options):
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", remember)
    with pytest.raises(StoreError, match="cannot be read"):
        open_for_reading(tmp_path)
    (connection,) = opened
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
