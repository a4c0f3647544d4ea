from __future__ import annotations

import io

import pytest

from tui_trainer.cli.commands.common import confirmed


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("y\n", True), (" Yes \n", True), ("n\n", False), ("\n", False), ("", False)],
)
def test_only_yes_confirms(monkeypatch, capsys, answer, expected):
    """The last is ctrl+d; the question is not part of the output."""
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert confirmed("remove it?") is expected
    assert capsys.readouterr() == ("", "remove it? [y/N] ")
