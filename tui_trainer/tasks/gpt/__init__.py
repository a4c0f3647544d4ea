"""The GPT task. Imports fast: no torch here."""

from __future__ import annotations

from tui_trainer.tasks.definition import TaskDefinition
from tui_trainer.tasks.gpt.config import PRESETS, GptConfig

task = TaskDefinition(
    name="gpt",
    summary="a small GPT on the characters of a text",
    config=GptConfig,
    presets=PRESETS,
    build="tui_trainer.tasks.gpt.training:build",
)
