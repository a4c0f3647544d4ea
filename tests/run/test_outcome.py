"""How a run ended, from the exception that ended it."""

from __future__ import annotations

import pytest

from tui_trainer.run.outcome import outcome_of, print_failure


def test_text_of_an_exit_is_printed_once_and_only_where_python_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python itself prints it where `watch` or a child process takes the outcome."""
    error = SystemExit("no data")
    outcome = outcome_of(error)
    assert (outcome.state, outcome.reason, outcome.status) == ("crashed", "no data", 1)
    assert capsys.readouterr().err == ""
    print_failure(error, outcome)
    assert capsys.readouterr().err == "no data\n"


@pytest.mark.parametrize("code", [None, 0, 3])
def test_status_of_an_exit_is_not_printed(
    code: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    error = SystemExit(code)
    outcome = outcome_of(error)
    print_failure(error, outcome)
    assert outcome.status == (code or 0)
    assert capsys.readouterr().err == ""
