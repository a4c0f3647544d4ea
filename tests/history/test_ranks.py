"""What stands out among the processes of a run."""

from __future__ import annotations

import numpy as np
import pytest

from tui_trainer.history import MemoryHistory
from tui_trainer.history.ranks import skew_ms, summarize_ranks
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.messages import ProcessAt, Status
from tui_trainer.protocol.schema import ProcessInfo, RunInfo, Table


def ranks(*rows, status=None, states=None, steps=30):
    """Summaries of processes that have made `steps` steps with these values."""
    tables = [
        Table(number, schema.RANKS, schema.RANK_COLUMNS, rank=number) for number in range(len(rows))
    ]
    history = MemoryHistory(tables)
    for number, given in enumerate(rows):
        row = np.full(len(schema.RANK_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
        for name, value in given.items():
            row[schema.RANK_INDEX[name]] = value
        for step in range(1, steps + 1):
            history.tables[number].append(step, row)
    processes = tuple(
        ProcessInfo(number, state=(states or {}).get(number, "running"), reason="was killed")
        for number in range(len(rows))
    )
    info = RunInfo("r", "script", tables=tuple(tables), processes=processes)
    return summarize_ranks(info, status or Status("running"), history)


def remarks(found):
    return [rank.remarks for rank in found]


STEP = {"step_ms": 50.0, "loss": 1.0, "grad_norm_preclip": 2.0, "lag_ms": 0.0}


def test_the_slow_one_is_named_with_its_phase_and_those_that_wait_for_it_are_not():
    found = ranks(
        {**STEP, "phase_ms.data": 1.0, "phase_ms.backward": 40.0},
        {**STEP, "phase_ms.data": 30.0, "phase_ms.backward": 11.0, "lag_ms": 3.0},
        {**STEP, "phase_ms.data": 2.0, "phase_ms.backward": 39.0, "lag_ms": -1.0},
    )
    assert remarks(found) == [[], ["slow in data, +28.0 ms"], []]
    assert skew_ms(found) == pytest.approx(4.0)


def test_nobody_is_slow_in_a_balanced_run():
    assert (
        remarks(ranks({**STEP, "phase_ms.data": 1.0}, {**STEP, "phase_ms.data": 1.5})) == [[]] * 2
    )


def test_a_gradient_that_stands_out_is_named():
    high = ranks(STEP, {**STEP, "grad_norm_preclip": 20.0}, STEP)
    assert remarks(high) == [[], ["gradient 10 times the others'"], []]
    low = ranks(STEP, {**STEP, "grad_norm_preclip": 0.2}, STEP)
    assert remarks(low) == [[], ["gradient 0.1 of the others'"], []]


def test_what_is_not_finite_is_named_and_what_is_absent_is_not():
    found = ranks(STEP, {**STEP, "loss": np.nan, "grad_norm_preclip": np.inf}, {"step_ms": 50.0})
    assert remarks(found) == [[], ["loss is nan", "gradient is inf"], []]
    assert found[2].values["loss"] is None


def test_those_that_wait_for_another_are_named():
    status = Status(
        "running",
        processes=(
            ProcessAt(0, 5, "loss", 4.0),
            ProcessAt(1, 5, "data", 4.1),
            ProcessAt(2, 5, "loss", 0.01),
        ),
    )
    assert remarks(ranks(STEP, STEP, STEP, status=status)) == [["waits for rank 1"], [], []]


def test_a_dead_one_is_named_first():
    found = ranks(STEP, {**STEP, "loss": np.nan}, states={1: "killed"})
    assert remarks(found) == [[], ["was killed", "loss is nan"]]


def test_a_run_of_one_process_has_none():
    assert summarize_ranks(RunInfo("r", "script"), Status(), MemoryHistory()) == []
