"""What the tracer needs from the rest: the recorder it hands its measurements to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tui_trainer.history.records import StepRecord
from tui_trainer.protocol.describe import Table
from tui_trainer.protocol.messages import PhaseReport


class RecorderLike(Protocol):
    """The recorder as the training thread sees it. Every call returns at once and never raises
    because of a viewer, a disk or a socket."""

    def declare(self, tables: Sequence[Table]) -> Sequence[Table]:
        """Announce tables before their first row, and return them as numbered.

        A table with id -1 is new and gets the next dense id; one with a known id replaces its
        declaration (only `every` may differ).
        """

    def describe(self, **changes: Any) -> None:
        """Set fields of `RunInfo` (`parameters`, `attention`, `optimizers`, `unseen`, …)."""

    def record(self, record: StepRecord) -> None:
        """Take one optimizer step's measurements: O(1)."""

    def notice(
        self, kind: str, text: str, level: str = "info", step: int | None = None, who: str = ""
    ) -> None:
        """Put a line in the log."""

    def report(self, report: PhaseReport | None) -> None:
        """What the phase at whose end the run is now stopped produced; None: it goes on."""

    def status(self, **changes: Any) -> None:
        """Set fields of `Status` (`cost_share`, `phase`, …)."""

    def watched(self) -> frozenset[str]:
        """Topics that some viewer has on its screen now."""
