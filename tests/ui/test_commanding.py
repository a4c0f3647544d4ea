"""Commands and what the screen shows once they were answered."""

from __future__ import annotations

from concurrent.futures import Future

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle
from tui_trainer.protocol.messages import Ack, Action, StepPhase


async def test_an_answer_that_comes_late_does_not_undo_what_was_shown_since() -> None:
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
        then = session.status  # running, as the run said when it took the command
        session._status(state="paused", phase="data")
        session._changed()
        await frame(pilot)
        assert app.snapshot.status.state == "paused"
        answers[0].set_result(Ack(1, True, then, "one phase"))
        await settle(pilot)
        assert app.snapshot.status.state == "paused"
