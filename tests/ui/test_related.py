"""The lines of the other runs of the same tree on the charts of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.history.window import Window
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels.loss import LossPanel


class Branch:
    """A branch that recorded the steps from 200 on."""

    name = "gpt-calm-otter-2"
    run = SimpleNamespace(directory=Path("/runs/gpt-calm-otter-2"), live=False)

    def window(self, table: str, column: str, steps: tuple[int, int], buckets: int):
        if table == "step" and column not in ("loss", "grad_norm_preclip"):
            return None
        edges = np.linspace(*steps, buckets + 1).astype(np.int64)
        filled = edges[:-1] >= 200
        values = np.where(filled, 2.0, np.nan).astype(np.float32)[:, None]
        return Window(
            edges,
            values,
            values,
            values,
            filled,
            np.zeros((buckets, 1), bool),
            np.zeros((buckets, 1), np.uint8),
        )

    def close(self) -> None:
        pass

    def newest(self, table: str, column: str) -> float:
        return 2.0


async def test_a_branch_has_a_dim_line_and_its_name_on_the_charts() -> None:
    app = app_on("dashboard", fake_gpt(steps=300))
    async with app.run_test(size=(200, 60)) as pilot:
        await frame(pilot)
        assert "■" not in text_of(app)
        app._related = (Branch(),)
        app.redraw()
        await settle(pilot)
        shown = text_of(app)
        assert shown.count("■ gpt-calm-otter-2 2") == 2, "below the loss and the norm"
        assert shown.count("■") >= 5, "signs along both lines"
        panel = app.screen.query_one(LossPanel)
        assert panel.snapshot.related == app._related


async def shown_on(mode: str, size: tuple[int, int], app: TuiTrainerApp) -> str:
    async with app.run_test(size=size) as pilot:
        await frame(pilot)
        assert "■" not in text_of(app)
        app._related = (Branch(),)
        app.redraw()
        await settle(pilot)
        return text_of(app)


async def test_a_branch_has_its_line_on_the_charts_of_parameters_and_of_attention() -> None:
    for mode, charts in (("parameters", 3), ("attention", 4)):
        shown = await shown_on(mode, (200, 60), app_on(mode, fake_gpt(steps=300)))
        assert shown.count("■ gpt-calm-otter-2") >= charts, shown
        assert shown.count("■") > 2 * charts, "signs along the lines"
    narrow = await shown_on("parameters", (80, 24), app_on("parameters", fake_gpt(steps=300)))
    assert narrow.count("■ g") == 2, narrow
