"""Commands, and the screen after their answers."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol.actions import Action, StepPhase, TakeControl
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Ack


async def test_a_late_answer_does_not_undo_newer_states() -> None:
    session = fake_gpt(steps=20)
    answers: list[Future[Ack]] = []

    def send(action: Action) -> Future[Ack]:
        answers.append(Future())
        return answers[-1]

    session.send = send  # type: ignore[method-assign]
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        app.command(StepPhase())
        then = session.status  # running, as the run answered the command
        session._status(state="paused", phase="data")
        session._changed()
        await frame(pilot)
        assert app.snapshot.status.state == "paused"
        answers[0].set_result(Ack(1, True, then, "one phase"))
        await settle(pilot)
        assert app.snapshot.status.state == "paused"


async def test_the_answer_to_a_pause_does_not_repeat_the_state() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("space")
        await settle(pilot)
        first = text_of(app).splitlines()[0]
        assert first.count("paused") == 1
        assert "after step" in first
        await pilot.press("s")
        await settle(pilot)
        assert "1 step" in text_of(app).splitlines()[0]


async def test_the_controller_is_shown_when_there_are_several_viewers() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "live" in text_of(app).splitlines()[0]
        session._status(viewers=("me", "them"), controller=1)
        session._changed()
        await frame(pilot)
        assert "in control" in text_of(app).splitlines()[0]
        session.events.append(Notice(10_000, 20, 0.0, "control", "take control", who="them@there"))
        session._status(controller=2)
        session._changed()
        await frame(pilot)
        assert "watching" in text_of(app).splitlines()[0]
        assert any("them@there has taken control" in each.message for each in app._notifications)
        await pilot.press("ctrl+t")
        assert session.sent == [TakeControl()]


async def test_a_missing_answer_is_reported_before_the_link_is_lost() -> None:
    session = fake_gpt(steps=20)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        session.link = replace(session.link, message="no answer for 3 s")
        session._changed()
        await frame(pilot)
        first = text_of(app).splitlines()[0]
        assert "no answer for 3 s" in first
        assert "live" not in first
