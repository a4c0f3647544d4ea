from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from tests.store.test_store import INFO, stepped
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol.messages import Status
from tui_trainer.record.events import InfoChanged
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import (
    APPLICATION_ID,
    MIGRATIONS,
    SCHEMA_VERSION,
    STORE_FILE,
    open_for_writing,
    schema_version,
)
from tui_trainer.store.writer import StoreWriter


def tables(connection):
    question = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY 2"
    return connection.execute(question).fetchall()


def written(directory, steps):
    sink = StoreWriter(directory)
    sink.take([InfoChanged(INFO)], Status(state="running"))
    sink.take([stepped(step, np.full(3, step, np.float32)) for step in steps], Status())
    sink.close()


def taken_back(directory, version):
    """What an older tui-trainer would have left: the same rows in tables of its version."""
    path = directory / STORE_FILE
    with sqlite3.connect(path) as new:
        rows = {
            name: new.execute(f"SELECT * FROM {name}").fetchall()
            for kind, name, _ in tables(new)
            if kind == "table"
        }
    path.unlink()
    with sqlite3.connect(path) as old:
        for script in MIGRATIONS[:version]:
            old.executescript(script)
        old.execute(f"PRAGMA user_version = {version}")
        for kind, name, _ in tables(old):
            for row in rows[name] if kind == "table" else ():
                old.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(row))})", row)


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_an_older_store_is_read_brought_up_to_date_and_written_on(tmp_path, version):
    written(tmp_path, range(1, 1001))
    taken_back(tmp_path, version)
    assert ReplaySession(tmp_path).last_step == 1000  # readable as it is
    written(tmp_path, range(1001, 2001))
    table = StoredHistory(tmp_path).tables[0]
    assert table.rows == 2000
    for step in (1, 999, 1001, 2000):
        np.testing.assert_array_equal(table.at(step), np.full(3, step, np.float32))
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        assert schema_version(connection) == SCHEMA_VERSION
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        (tmp_path / "new").mkdir()
        assert tables(connection) == tables(open_for_writing(tmp_path / "new"))


def test_a_migration_that_is_interrupted_leaves_the_old_version(tmp_path, monkeypatch):
    from tui_trainer.store import schema

    written(tmp_path, range(1, 11))
    taken_back(tmp_path, 1)
    broken = (*MIGRATIONS[:-1], MIGRATIONS[-1] + "\nCREATE TABLE told (again INTEGER);\n")
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    with pytest.raises(sqlite3.Error):
        open_for_writing(tmp_path)
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        assert schema_version(connection) == SCHEMA_VERSION - 1
    written(tmp_path, range(11, 21))
    assert StoredHistory(tmp_path).tables[0].rows == 20
