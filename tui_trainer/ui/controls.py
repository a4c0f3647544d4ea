"""The keys that steer the run: one list of bindings, for every screen that shows a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual.binding import Binding

from tui_trainer.protocol import messages
from tui_trainer.ui.screens.dialogs import NumberPrompt, TextPrompt

if TYPE_CHECKING:
    from textual.screen import Screen

    from tui_trainer.ui.app import TuiTrainerApp

CONTROL_BINDINGS = (
    Binding("space", "pause", "Pause/resume", key_display="space", id="run.pause",
            tooltip="Pause at the next phase boundary, or go on"),
    Binding("s", "step", "Step", id="run.step", tooltip="One optimizer step, then pause"),
    Binding("p", "phase", "Phase", id="run.phase",
            tooltip="To the next phase boundary, then pause"),
    Binding("n", "steps", "N steps", id="run.steps", tooltip="So many steps, then pause"),
    Binding("e", "epoch", "Epoch", id="run.epoch", tooltip="To the end of the epoch, then pause"),
    Binding("t", "throttle", "Throttle", id="run.throttle",
            tooltip="At most so many steps a second, for watching"),
    Binding("ctrl+t", "take_control", "Take control", show=False, id="run.take_control",
            tooltip="Steer the run from this screen; whoever did so watches from then on"),
    Binding("a", "mark", "Annotate", show=False, id="run.mark",
            tooltip="Put a note at this step: in the log, on the charts, in its replay"),
)  # fmt: skip
MOST_SENT = 10**15
"""More steps than any run takes, which says so, and no more than a message can hold."""
STEERING = frozenset(binding.action for binding in CONTROL_BINDINGS)


class ControlActions:
    """Mixed into a screen: sends each command and lets the app show its answer."""

    @property
    def _trainer(self) -> TuiTrainerApp:
        return cast("TuiTrainerApp", cast("Screen[object]", self).app)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that steer are dimmed while there is no run that could obey."""
        if action not in STEERING:
            return True
        snapshot = self._trainer.snapshot
        status, link = snapshot.status, snapshot.link
        if link.state == "replay":  # they move the cursor, at its end too
            if action in ("phase", "mark", "throttle", "take_control"):
                return False
        elif link.state != "live" or link.read_only or status.ended or status.state == "stopping":
            return None
        if action == "epoch" and (snapshot.info is None or not snapshot.info.steps_per_epoch):
            return None
        return True

    def action_pause(self) -> None:
        """Pause, or resume when paused."""
        status = self._trainer.snapshot.status
        paused = status.state == "paused" or status.ended  # a recording can be played from its end
        self._trainer.command(messages.Resume() if paused else messages.Pause())

    def action_step(self) -> None:
        """One optimizer step."""
        self._trainer.command(messages.Step(1))

    def action_phase(self) -> None:
        """One phase."""
        self._trainer.command(messages.StepPhase())

    def action_epoch(self) -> None:
        """To the end of the epoch."""
        self._trainer.command(messages.RunToEpochEnd())

    def action_take_control(self) -> None:
        """Steer from here."""
        self._trainer.command(messages.TakeControl())

    def action_steps(self) -> None:
        """Ask how many steps, then run them."""

        def run(count: float | None) -> None:
            if count is not None:
                self._trainer.command(messages.Step(int(min(count, MOST_SENT))))

        self._trainer.push_screen(NumberPrompt("Steps to run, then pause", "10", whole=True), run)

    def action_mark(self) -> None:
        """Ask for a few words and put them at the present step."""

        def mark(text: str | None) -> None:
            if text is not None:
                self._trainer.command(messages.Mark(text))

        self._trainer.push_screen(TextPrompt("A note at this step"), mark)

    def action_throttle(self) -> None:
        """Ask for a speed; an empty answer lifts the limit."""
        now = self._trainer.snapshot.status.throttle
        question = "At most so many steps a second (empty: full speed)"

        def limit(rate: float | None) -> None:
            if rate is not None:
                self._trainer.command(messages.Throttle(rate if rate > 0 else None))

        prompt = NumberPrompt(question, f"{now:g}" if now else "", empty=0.0)
        self._trainer.push_screen(prompt, limit)
