from __future__ import annotations

import pytest

from tests.runs.starting import Runs


@pytest.fixture
def runs(tmp_path):
    """A runs directory; what is started in it is ended with the test."""
    made = Runs(tmp_path / "runs")
    yield made
    made.end()
