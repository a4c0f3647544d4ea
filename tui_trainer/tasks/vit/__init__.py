"""The vision transformer task. Imports fast: no torch here."""

from __future__ import annotations

from tui_trainer.tasks.definition import TaskDefinition
from tui_trainer.tasks.vit.config import PRESETS, VitConfig

task = TaskDefinition(
    name="vit",
    summary="a small vision transformer on images",
    config=VitConfig,
    presets=PRESETS,
    preset_for_data="images",
    build="tui_trainer.tasks.vit.training:build",
)
