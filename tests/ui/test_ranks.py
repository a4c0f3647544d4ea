"""The screen of the processes of a run."""

from __future__ import annotations

import msgspec
import pytest

from tests.ui.fake import fake_gpt
from tests.ui.screens import SIZES, app_on, frame, text_of
from tui_trainer.protocol.schema import ProcessInfo

REASON = "killed by signal 9 (SIGKILL), possibly out of memory"


@pytest.mark.parametrize("size", SIZES)
async def test_remarks_are_shown_in_full_at_every_size(size):
    session = fake_gpt(20)
    processes = (ProcessInfo(0, state="running"), ProcessInfo(1, state="killed", reason=REASON))
    session.run.info = msgspec.structs.replace(session.run.info, processes=processes)
    session._changed()
    app = app_on("ranks", session)
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        assert text_of(app).count(REASON) == 1
