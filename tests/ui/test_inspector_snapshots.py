"""How the screens look that open up a step, at each of the three sizes, and in the light theme.

After a wanted change: `pytest tests/ui/test_inspector_snapshots.py --snapshot-update`, and look.
"""

from __future__ import annotations

import pytest
from pytest_textual_snapshot import SVGImageExtension
from syrupy.assertion import SnapshotAssertion

from tests.ui.fake import fake_gpt, fake_vit
from tests.ui.fake_tensors import HEAD
from tests.ui.screens import SIZES, app_on, settle, until
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.inspection import BeforePhase, TensorMoments, TensorRef

BEFORE = BeforePhase(300, "clip", TensorMoments(-3.1, 2.6, 0.07, 1.02, 15.4, 0, 1))
LOOKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tensor": ("inspect", ()),
    "update": ("inspect", ("x", *"3,17", "enter")),
    "check": ("inspect", ("c",)),
    "groups": ("inspect", ("G",)),
    "autograd": ("autograd", ("down", "down", "down", "right", "down")),
    "query": ("attention", ("down", "enter", "m", "m")),
    "heads": ("attention", ("down", "enter", "m", "m", "m")),
    "stream": ("attention", ("down", "enter", "m", "m", "m", "m")),
    "timeline": ("log", ("T",)),
}
IN_LIGHT = ("tensor", "heads")


pytestmark = pytest.mark.usefixtures("utc")


@pytest.mark.parametrize("look", LOOKS)
async def test_looks(snapshot: SnapshotAssertion, look: str) -> None:
    """One app, resized: opening three takes three times as long."""
    mode, keys = LOOKS[look]
    session = fake_vit() if mode == "attention" else fake_gpt()
    session.send(Pause())
    session.tensors.images = mode == "attention"
    session.tensors.before = {TensorRef(HEAD): BEFORE}
    app = app_on(mode, session)
    app.inspected = TensorRef(HEAD)
    pictures = snapshot.use_extension(SVGImageExtension)
    async with app.run_test(size=SIZES[0]) as pilot:

        async def all_drawn() -> None:
            seen = -1
            while seen != len(session.inspected):  # a new size may need another answer
                seen = len(session.inspected)
                await settle(pilot)
                await until(pilot, lambda: all(each.done() for each in session.held), "answers")
                await settle(pilot)

        await all_drawn()
        for key in keys:
            await pilot.press(key)
            await all_drawn()
        differing = []
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await all_drawn()
            name = f"{size[0]}x{size[1]}"
            if app.export_screenshot() != pictures(name=name):
                differing.append(name)
        if look in IN_LIGHT:
            await pilot.resize_terminal(*SIZES[0])
            app.theme = "tui-trainer-light"
            await all_drawn()
            if app.export_screenshot() != pictures(name="light"):
                differing.append("light")
    assert not differing
