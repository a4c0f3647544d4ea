"""No panel assumes that a table, a row, a column or a piece of the description is there."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from itertools import count

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.ui.fake import fake_gpt, fake_vit
from tests.ui.open_app import OpenApp
from tests.ui.screens import app_on, settle, text_of
from tui_trainer.client.api import Link
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol import PHASES
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import Clip, Skipped
from tui_trainer.protocol.messages import PhaseReport, Rows

STEPS = 40
ODD_VALUES = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -1e-38, absent(Absent.FROZEN)])
WHOLE = {
    kind: session.poll() for kind, session in (("gpt", fake_gpt(STEPS)), ("vit", fake_vit(STEPS)))
}


@pytest.fixture(scope="module", params=[(80, 24), (120, 40), (200, 60)], ids=str)
def opened(request):
    opened = OpenApp(request.param)
    yield opened
    opened.close()


@st.composite
def snapshots(draw):
    """A run without some of its tables, columns, rows, values and parts of its description."""
    whole = WHOLE[draw(st.sampled_from(("gpt", "vit")))]
    info = whole.info
    history = MemoryHistory()
    kept = []
    for table in info.tables:
        if not draw(st.booleans()):
            continue
        columns = range(len(table.columns))
        missing = draw(st.sampled_from(("none", "first", "last", "half", "all")))
        columns = {
            "none": columns, "first": columns[1:], "last": columns[:-1], "half": columns[::2],
            "all": columns[:0],
        }[missing]  # fmt: skip
        series = whole.history.tables[table.id]
        steps, values = series.tail(draw(st.sampled_from((0, 0, 1, 2, STEPS))))
        values = np.array(values[:, list(columns)], np.float32)
        if values.size and draw(st.booleans()):
            at = draw(st.lists(st.integers(0, values.size - 1), max_size=6))
            values.flat[at] = ODD_VALUES[draw(st.integers(0, len(ODD_VALUES) - 1))]
        if values.size and draw(st.integers(0, 3)) == 0:
            values[:] = np.nan
        table = msgspec.structs.replace(
            table,
            id=len(kept),
            columns=tuple(table.columns[column] for column in columns),
            optimizer=draw(st.sampled_from(("", "AdamW", "elsewhere"))),
        )
        kept.append(table)
        history.declare(table)
        if len(steps):
            history.apply(Rows(table.id, 0, len(steps), steps.tobytes(), values.tobytes()))

    def some(field):
        return () if draw(st.booleans()) else field[: draw(st.sampled_from((1, None)))]

    info = msgspec.structs.replace(
        info,
        revision=next(REVISIONS),
        tables=tuple(kept),
        parameters=some(info.parameters),
        attention=some(info.attention),
        optimizers=some(info.optimizers),
        device=draw(st.sampled_from((None, info.device))),
        total_steps=draw(st.sampled_from((None, 1, 2000))),
        steps_per_epoch=draw(st.sampled_from((None, 1, 600))),
        items_per_step=draw(st.sampled_from((None, 768))),
        facts=draw(st.sampled_from(({}, info.facts))),
        unseen=dict.fromkeys(draw(st.sets(st.sampled_from(QUANTITIES))), "not in this run"),
    )
    step = draw(st.sampled_from((0, 1, STEPS)))
    status = msgspec.structs.replace(
        whole.status,
        state=draw(st.sampled_from(("starting", "running", "paused", "finished", "crashed"))),
        step=step,
        phase=draw(st.sampled_from(("", *PHASES))),
        steps_per_second=draw(st.sampled_from((None, 0.001, 20.0))),
        remaining_s=draw(st.sampled_from((None, 10.0))),
        cost_share=draw(st.sampled_from((None, 0.01))),
        clipped_share=draw(st.sampled_from((None, 0.0, 1.0))),
    )
    clip = Clip(
        0, 1, 0.0, 1.0, draw(st.sampled_from((2.0, float("nan")))), 0.5, (0, 99), (0.5, 0.1)
    )
    report = None
    if draw(st.booleans()):
        rows = ()
        if kept and draw(st.booleans()):
            table = draw(st.sampled_from(kept))
            values = np.zeros((1, len(table.columns)), np.float32).tobytes()
            rows = (Rows(table.id, 0, 1, np.int64([step]).tobytes(), values),)
        report = PhaseReport(step, draw(st.sampled_from(PHASES)), 1.0, "", (), rows)
    state = draw(st.sampled_from(("live", "lost", "connecting", "closed")))
    return replace(
        whole,
        link=Link(state),
        status=status,
        info=draw(st.sampled_from((info, info, info, None))),
        history=history,
        events=(*some(whole.events), *some((clip,))),
        log=some(whole.log),
        artifacts=some(whole.artifacts),
        report=report,
    )


REVISIONS = count(1)
QUANTITIES = ("loss", "clip", "attention", "grad_norm", "memory", *PHASES)


@given(snapshot=snapshots())
@settings(
    max_examples=examples(6), suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
def test_every_screen_draws_whatever_is_missing(opened, snapshot):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # such as the mean of an empty slice
        shown = opened.draw(snapshot)
    assert all(shown.values())


def with_values(session, name, columns, values):
    """The snapshot of a session with other values in some columns of its table called `name`."""
    whole = session.poll()
    table = next(table for table in whole.info.tables if table.name == name)
    history = MemoryHistory()
    for other in whole.info.tables:
        history.declare(other)
        steps, rows = whole.history.tables[other.id].tail(STEPS)
        rows = np.array(rows, np.float32)
        if other is table:
            rows[:, columns] = values
        if len(steps):
            history.apply(Rows(other.id, 0, len(steps), steps.tobytes(), rows.tobytes()))
    return replace(whole, history=history)


def test_absent_gradients_are_shown_with_their_reason_and_counted_nowhere(opened):
    opened.draw(fake_gpt(STEPS).poll())  # another history with the same description
    whole = with_values(fake_gpt(STEPS), "grad_norm", [0, 1], np.float32(absent(Absent.FROZEN)))
    parameters = opened.draw(whole)["parameters"]
    assert "– frozen" in parameters
    (row,) = (line for line in parameters.splitlines() if "position_embedding" in line)
    assert "–" in row
    assert "nan" not in parameters


def test_an_absent_loss_is_not_a_nan(opened):
    value = np.float32(absent(Absent.LOSS_NOT_SEEN))
    shown = opened.draw(with_values(fake_gpt(STEPS), "step", [0], value))["dashboard"]
    assert "nan" not in shown
    if opened.size[0] > 80:
        assert "– the loss is not visible" in shown


def test_skipped_iterations_evaluations_and_scaled_clips_are_shown(opened):
    whole = with_values(fake_gpt(STEPS), "step", [4], np.float32(7))
    skipped = Skipped(900, 20, 1e9, "scaler", "a GradScaler skipped", "", (), 65536.0)
    shown = opened.draw(replace(whole, events=(*whole.events, skipped)))
    assert re.search(r"skipped +1 ", shown["dashboard"])
    assert "7 evaluations" in shown["dashboard"]
    assert "a GradScaler skipped" in shown["log"]


@pytest.mark.parametrize("width", range(100, 121, 4))
async def test_the_share_of_clipped_steps_is_whole_at_every_width(width):
    app = app_on("dashboard", fake_gpt(STEPS))
    async with app.run_test(size=(width, 32)) as pilot:
        await settle(pilot)
        app.draw_frame()
        await settle(pilot)
        assert re.search(r"% of last 100 ", text_of(app))
