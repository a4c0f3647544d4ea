"""The table of docs/scripts.md is made of what the tests compare."""

from __future__ import annotations

from pathlib import Path

from tests.integrations.seen import DOCUMENT, QUANTITIES, TITLES, marks, table

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_documents():
    assert table() in DOCUMENT.read_text(encoding="utf-8"), table()


def test_marks_are_of_tests_that_exist():
    assert marks().keys() == TITLES.keys()
    for tests in marks().values():
        for test, quantities in tests.items():
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
            assert set(quantities) <= QUANTITIES.keys()
