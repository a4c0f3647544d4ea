"""The findings screen, and the line that leads to it."""

from __future__ import annotations

import pytest

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tui_trainer.protocol.actions import Back
from tui_trainer.protocol.events import Evidence, Finding
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.findings import FINDINGS_KEY, band_of_series
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.screens import SCREENS
from tui_trainer.ui.screens.findings import FindingsTable


def finding(session, number=0, **changed):
    """Add a finding to the run."""
    fields = {
        "rule": "update-ratio-high",
        "level": "warning",
        "onset": 120,
        "title": "updates are too large",
        "text": "one step changes the weights by 0.3 of their size",
        "advice": "divide the learning rate by 10",
        "parameters": (session.poll().info.parameters[3].name,),
        "evidence": (
            Evidence("‖Δw‖/‖w‖", "0.3", 0.3, 1e-4, 1e-1, "update_ratio",
                     session.poll().info.parameters[3].name),
        ),
    } | changed  # fmt: skip
    session.events.append(Finding(len(session.events), 130, 1000.0, number, **fields))
    session._changed()


def test_line_names_the_key_of_the_screen():
    assert next(entry.key for entry in SCREENS if entry.mode == "findings") == FINDINGS_KEY


@pytest.mark.parametrize("mode", ["dashboard", "parameters", "attention", "log"])
async def test_worst_finding_is_shown_under_the_header(mode):
    session = fake_gpt(300)
    app = app_on(mode, session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "updates are too large" not in text_of(app).splitlines()[2]
        finding(session)
        finding(session, 1, level="error", title="nan or inf", onset=125)
        await frame(pilot)
        line = text_of(app).splitlines()[2]
        assert "nan or inf, since step 125" in line
        assert "and 1 more" in line
        assert FINDINGS_KEY in line


async def test_ranks_that_differ_are_shown():
    session = fake_gpt(300)
    measured = (Evidence("ranks that clip", "1 of 2", 1.0, 2.0, 2.0),)
    finding(session, parameters=(), ranks=(1,), evidence=measured)
    app = app_on("findings", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        text = text_of(app)
        assert text.count("rank 1") == 2  # in the table, and below it
        assert "1 of 2, healthy 2" in text


async def test_note_makes_no_line():
    session = fake_gpt(300)
    finding(session, level="info")
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "updates are too large" not in text_of(app)


async def test_run_without_findings_says_so():
    app = app_on("findings", fake_gpt(300))
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        assert "no findings in 300 steps" in text_of(app)


async def test_the_cursor_goes_to_a_cause_that_is_found_later():
    session = fake_gpt(300)
    finding(session, 0, title="the loss diverges", rule="loss-diverges", onset=140)
    app = app_on("findings", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        table = app.screen.query_one(FindingsTable)
        finding(session, 1)
        finding(session, 0, title="the loss diverges", rule="loss-diverges", cause=1, onset=140)
        await frame(pilot)
        assert table.current.number == 1
        await pilot.press("down")  # back to the effect, where it stays
        finding(session, 2, title="nan or inf", level="error", onset=150)
        await frame(pilot)
        assert table.current.number == 0


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
async def test_findings_with_effects_below_their_cause(size):
    session = fake_gpt(300)
    finding(session, 0, title="the loss diverges", rule="loss-diverges", cause=1, onset=140)
    finding(session, 1)
    app = app_on("findings", session)
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        text = text_of(app)
        assert text.index("updates are too large") < text.index("the loss diverges")
        assert "divide the learning rate by 10" in text
        assert "healthy between 0.0001 and 0.1" in text
        await pilot.press("down")
        await settle(pilot)
        assert "an effect of" in text_of(app)


async def test_enter_goes_to_the_parameter():
    session = fake_gpt(300)
    finding(session)
    app = app_on("findings", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("enter")
        await settle(pilot)
        await settle(pilot)
        assert app.current_mode == "parameters"
        assert app.screen.table.current_row == 3


async def test_enter_on_a_finding_about_the_loss_goes_to_the_dashboard():
    session = fake_gpt(300)
    finding(
        session,
        evidence=(Evidence("loss", "nan", None, None, None, "step", "loss"),),
        parameters=(),
    )
    app = app_on("findings", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert app.current_mode == "dashboard"


async def test_go_there_moves_to_the_parameter_or_to_the_layer_and_its_statistic():
    session = fake_gpt(300)
    app = app_on("findings", session)
    async with app.run_test(size=(120, 40)) as pilot:
        column = "blocks.2.attention.growth"
        evidence = (Evidence("growth", "60", 60.0, None, 40.0, "attention", column),)
        finding(session, title="attention logits grow", evidence=evidence,
                parameters=("blocks.2.attention",))  # fmt: skip
        await frame(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert app.current_mode == "attention"
        assert app.screen.statistic.key == "growth"
        assert app.screen.layer_table.current_row == 2
        name = session.poll().info.parameters[5].name
        finding(session, evidence=(Evidence("loss", "9", 9.0),), parameters=(name,))
        await pilot.press("8")
        await frame(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert app.current_mode == "dashboard"
        gradients = app.screen.query_one(GradientsPanel)
        leaf = gradients.name_tree.names.index(name)
        await until(pilot, lambda: gradients.current_row == leaf, "the cursor on the parameter")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_looks(snap_compare, size):
    session = fake_gpt(300)
    finding(session, 0, title="the loss diverges", rule="loss-diverges", cause=1, onset=140)
    finding(session, 1)
    finding(session, 2, level="error", title="nan or inf", rule="non-finite", onset=231)
    app = TuiTrainerApp(session, start_mode="findings", frames_per_second=0.01)
    assert snap_compare(app, terminal_size=size)


async def test_a_key_goes_back_to_the_step_before_and_breaks_at_the_finding():
    session = fake_gpt(300)
    finding(session, phase="backward")
    app = app_on("findings", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("B")
        await settle(pilot)
        assert session.sent == [Back(119, break_at="step == 120 at backward")]


@pytest.mark.parametrize("others", [0, 2])
async def test_a_narrow_line_and_the_table_name_the_cause_and_its_place(others):
    session = fake_gpt(300)
    origin = "`log` (train.py:7) produced it from finite numbers; it was 0.75 at step 124"
    finding(session, 0, level="error", title="nan or inf", rule="non-finite", onset=125,
            text=f"the loss became nan: {origin}", parameters=(), phase="loss")  # fmt: skip
    for number in range(1, others + 1):
        finding(session, number)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        line = text_of(app).splitlines()[2]
        assert "nan or inf, since step 125: `log` (train.py:7) produced" in line
        assert line.rstrip().endswith("8 shows 3" if others else "8 shows it")
        await pilot.press(FINDINGS_KEY)
        await until(pilot, lambda: app.current_mode == "findings", "the findings")
        await frame(pilot)
        row = next(each for each in text_of(app).splitlines() if each.startswith(" error"))
        assert row.split() == ["error", "125", "nan", "or", "inf", "train.py:7"]


def test_the_band_of_a_number_of_parameters_is_not_that_of_their_norms() -> None:
    counted = Evidence("parameters without a gradient", "3", 3.0, None, 0.0, "grad_norm", "w")
    assert band_of_series(counted).limits == ()
    shrunk = Evidence("‖W‖ relative to its first value", "0.7", 0.7, 0.9, None, "weight_norm", "w")
    assert band_of_series(shrunk).limits == ()
    norm = Evidence("gradient norm", "3", 3.0, None, 0.5, "step", "grad_norm_preclip")
    assert band_of_series(norm).limits == (0.5,)
