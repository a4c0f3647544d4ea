"""Guided runs on the screen: the introduction, what is said at each stage, the key of the cure, and
the ways in from the list, the palette and the start screen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.ui.fake import FakeSession, fake_gpt
from tests.ui.screens import SIZES, app_on, frame, settle, text_of, until
from tests.ui.test_findings import finding
from tests.ui.test_learn import measurements, press, shows  # noqa: F401
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.learn.demos import DEMOS, Demo, demo_texts, find_demo
from tui_trainer.protocol import actions
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import BreakpointStop
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.protocol.text import wrap
from tui_trainer.runs.launch import LaunchError, LaunchRequest
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.guide import CURED_PACE, MAX_ROWS, GuideLine, guidance, introduction, stage_of
from tui_trainer.ui.leaving import Leaving
from tui_trainer.ui.screens.start import Launcher


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaving, "next_command", ())


def run_of(demo: Demo, steps: int = 0, *, cured: bool = False, folder: object = "") -> FakeSession:
    session = fake_gpt(steps)
    assert session.run is not None
    session.run.info = msgspec.structs.replace(
        session.run.info, task=SCRIPT, title=demo.title(cured), directory=str(folder)
    )
    return session


def stop(session: FakeSession, demo: Demo) -> None:
    """At its breakpoint."""
    step = session.status.step
    session.events.append(Notice(len(session.events), step, 0.0, "breakpoint", "paused"))
    at = BreakpointStop(1, demo.breakpoint, step, "step", "loss 7.1")
    session._status(state="paused", phase="step", stopped_at=at)
    session._changed()


async def test_the_introduction_waits_for_the_run_and_starts_it() -> None:
    demo = find_demo("rate-high")
    session = run_of(demo)
    session._status(state="starting", waiting_for="importing torch")
    app = TuiTrainerApp(session, start_mode=demo.screen, demo=demo.name)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, app, demo_texts("en")[demo.name].title, "importing torch", "loss > 5")
        await press(pilot, "enter")
        assert session.sent == []
        session._status(state="paused", waiting_for="")
        session._changed()
        await until(pilot, lambda: actions.Resume() in session.sent, "the start")
        await settle(pilot)
        assert "importing torch" not in text_of(app)


@pytest.mark.parametrize("size", SIZES)
async def test_a_guided_run_from_its_pause_to_its_cure(size: tuple[int, int]) -> None:
    demo = find_demo("rate-high")
    session = run_of(demo, 3)
    app = app_on("dashboard", session)
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        await shows(pilot, app, "rate-high  The learning rate is 200 times")
        await press(pilot, "C")
        assert session.sent == [], "nothing to cure yet"
        stop(session, demo)
        await frame(pilot)
        await shows(pilot, app, "Paused at loss > 5 (loss 7.1).", "A few steps on", "C Cure")
        finding(session, rule=demo.rule)
        session._changed()
        await frame(pilot)
        await shows(pilot, app, f"The finding {demo.rule} names")
        await press(pilot, "C")
        changes = actions.ChangeSettings(parse_changes(["lr=0.1"]))
        assert session.sent == [changes, actions.Throttle(CURED_PACE), actions.Resume()]
        await frame(pilot)
        await shows(pilot, app, "Cured.")
        session.end("finished", "all steps made")
        await frame(pilot)
        await shows(pilot, app, "C shows both curves", "C Both curves")


async def test_a_step_back_waits_there() -> None:
    demo = find_demo("bad-batch")
    session = run_of(demo, 100)
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        stop(session, demo)
        await frame(pilot)
        await press(pilot, "C")
        assert session.sent == [actions.Back()]
        session.events.append(Notice(len(session.events), 100, 0.0, "edit", "back to step 99"))
        session._changed()
        await frame(pilot)
        await shows(pilot, app, "Back at the state before the fault.")
        assert stage_of(app.snapshot, demo, cured=False) == "back"


async def test_a_fault_in_the_program_is_trained_to_its_end_and_compared(tmp_path: Path) -> None:
    demo = find_demo("zero-grad")
    session = run_of(demo, 20, folder=tmp_path)
    app = app_on(demo.screen, session)
    async with app.run_test(size=(80, 24)) as pilot:
        stop(session, demo)
        await frame(pilot)
        await press(pilot, "C")
        assert session.sent == [actions.Throttle(None), actions.Resume()]
        await shows(pilot, app, "It trains to its end now.")
        session.end("finished", "all steps made")
        app.draw_frame()
        await until(pilot, lambda: Leaving.next_command, "leaving")
    options = ("--runs-dir", str(tmp_path.parent))
    assert Leaving.next_command == ("demo", demo.name, "--against", str(tmp_path), *options)


async def test_other_runs_have_no_guide_and_no_such_key() -> None:
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert not app.screen.query_one(GuideLine).display
        assert app.check_action("cure", ()) is False
        await press(pilot, "C")
        assert "Cure" not in text_of(app)


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_each_language_says_all_of_it(demo: Demo) -> None:
    session = run_of(demo, 30)
    stop(session, demo)
    for language in ("en", "fr"):
        said = guidance(session.poll(), demo, False, language)
        assert demo.breakpoint in said or demo.breakpoint.startswith("finding")
        assert demo.breakpoint in introduction(demo, language)
        for text in (introduction(demo, language), said):
            assert "{" not in text
            assert demo.rule in text
            assert demo_texts(language)[demo.name].cure in text
            assert not demo.live or demo.live in text
        assert len(wrap(f"{demo.name}  {said}", 78)) <= MAX_ROWS, said


# ---------------------------------------------------------------- the ways in


class Started:
    """Starts guided runs."""

    def __init__(self) -> None:
        self.requests: list[LaunchRequest] = []
        self.refusal: Exception | None = None

    def __call__(self, request: LaunchRequest) -> FakeSession:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        session = run_of(find_demo(request.demo))
        if request.paused:
            session._status(state="paused", phase="")
        return session


async def test_the_list_offers_them_and_enter_starts_one() -> None:
    start = Started()
    app = TuiTrainerApp(None, start_mode="start", on_launch=Launcher((), start))
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, app, "ctrl+l", "guided runs")
        await press(pilot, "ctrl+l", "end")
        await shows(pilot, app, demo_texts("en")["bad-batch"].title)
        await press(pilot, "enter")
        await shows(pilot, app, "loss > 4 * ema(loss)", "tui-trainer demo bad-batch", "s Start")
        await press(pilot, "enter")
        await until(pilot, lambda: app.session is not None, "the run")
        await shows(pilot, app, "bad-batch  At step 100 three images")
    assert start.requests == [LaunchRequest(SCRIPT, demo="bad-batch")]


async def test_a_refused_start_is_shown() -> None:
    start = Started()
    start.refusal = LaunchError("no space is left", "free some")
    app = TuiTrainerApp(None, start_mode="learn", on_launch=Launcher((), start), lesson="rate-low")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await shows(pilot, app, "tui-trainer demo rate-low")
        await press(pilot, "s")
        await shows(pilot, app, "no space is left")
        assert app.session is None


async def test_the_palette_starts_one_with_its_introduction() -> None:
    start = Started()
    app = TuiTrainerApp(None, start_mode="start", on_launch=Launcher((), start))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        commands = {name: call for name, _, call in ActionProvider(app.screen).commands()}
        commands["Demo: rate-low"]()
        await shows(pilot, app, demo_texts("en")["rate-low"].title, "enter: start")
        assert start.requests == [LaunchRequest(SCRIPT, demo="rate-low", paused=True)]
        assert app.current_mode == "parameters"


async def test_over_a_live_run_it_is_asked_what_becomes_of_that() -> None:
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        app.start_demo("rate-low")
        await shows(pilot, app, "Leave this run?")
        await press(pilot, "escape")
        assert Leaving.next_command == ()
        app.start_demo("rate-low")
        await settle(pilot)
        await press(pilot, "d")
        await until(pilot, lambda: Leaving.next_command, "leaving")
    assert Leaving.next_command[:2] == ("demo", "rate-low")
