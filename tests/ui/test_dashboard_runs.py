"""The dashboard over runs of other kinds: several optimizers, no attention, inside the app."""

from __future__ import annotations

import msgspec

from tests.ui import fake
from tests.ui.screens import text_of
from tests.ui.test_dashboard import drawn
from tui_trainer.protocol import actions
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.gradients import GradientsPanel
from tui_trainer.ui.panels.header import HeaderLine
from tui_trainer.ui.panels.phases import PhaseStrip
from tui_trainer.ui.widgets.key_line import KeyLine
from tui_trainer.ui.widgets.tabs import TabLine


async def test_every_optimizer_is_shown_with_its_loss_and_its_gradients():
    session = fake.fake_two_optimizers(60)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        seen = text_of(app)
        assert "sgd" in seen
        assert "adam" in seen
        assert f"of {2 * len(fake.fake_gpt(1).run.info.parameters)} parameters" in seen
        assert len(app.screen.query_one(GradientsPanel).name_tree.names) == 54


async def test_where_there_is_no_attention_its_screen_says_so_and_updates_have_its_room():
    session = fake.fake_gpt(60)
    reason = "no attention layer was found"
    info = msgspec.structs.replace(session.run.info, attention=(), unseen={"attention": reason})
    session.run.info = info
    session.advance(1)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        assert reason not in text_of(app)
        assert app.screen.query_one("#updates").size.height > 8
        await pilot.press("2")
        await pilot.pause()
        assert reason in text_of(app)


async def test_the_header_shows_the_name_to_attach_to():
    for size in ((80, 24), (120, 40)):
        app = TuiTrainerApp(fake.fake_gpt(10))
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            assert app.snapshot.info.name in drawn(app, HeaderLine)
            assert app.snapshot.link.state in drawn(app, HeaderLine)


async def test_phases_of_the_step_in_the_making_stand_out():
    session = fake.fake_gpt(60)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("space")
        for _ in range(3):  # data, zero_grad, forward
            await pilot.press("p")
            await pilot.pause()
        strip = app.screen.query_one(PhaseStrip)
        names, times = strip._rows[:2]
        style = {segment.text.strip(): segment.style for segment in names}
        assert style["forward"] == app.palette.current
        assert style["data"] == style["zero_grad"] == app.palette.text
        assert style["backward"] == style["step"] == app.palette.dim
        measured = [s.text for s in times if s.style == app.palette.provisional]
        assert len(measured) == 3
        assert "the model's predictions for the batch" in drawn(app, PhaseStrip)


async def test_a_run_inside_the_app_cannot_be_detached_from():
    app = TuiTrainerApp(fake.fake_gpt(60), ends_with_app=True)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("q")
        await pilot.pause()
        assert "leaving ends it" in text_of(app)
        assert "Detach" not in text_of(app)
        await pilot.press("q")
        await pilot.pause()
    assert actions.Stop(checkpoint=True) in app.session.sent


async def test_clicks_on_the_footer_and_on_tabs_do_what_their_labels_say():
    session = fake.fake_gpt(60)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        for number, name in enumerate(("Loss", "Gradients", "Clipping", "Updates", "Wq Wk Wv")):
            at = drawn(app, TabLine).index(name)
            await pilot.click(TabLine, offset=(at + 1, 0))
            assert app.screen.query_one(TabLine).current == number
        for word, action in (("Pause", actions.Pause()), ("Step", actions.Step(1))):
            at = drawn(app, KeyLine).index(word)
            await pilot.click(KeyLine, offset=(at, 0))
            await pilot.pause()
            assert session.sent[-1] == action
