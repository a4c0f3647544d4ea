"""The table of docs/scripts.md is the one that the tests assert."""

from __future__ import annotations

from pathlib import Path

from tests.integrations.seen import table


def test_the_table_of_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text(encoding="utf-8")
    assert table() in text, table()
