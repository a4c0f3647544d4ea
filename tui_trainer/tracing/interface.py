"""What the tracer needs from others: the recorder it hands its measurements to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tui_trainer.history.records import StepRecord
from tui_trainer.protocol.describe import Column, Table
from tui_trainer.protocol.messages import PhaseReport


class RecorderLike(Protocol):
    """The recorder as the training thread sees it. Every call returns at once and never raises
    because of a viewer, a disk or a socket."""

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        """Declare a table under the next free id, before its first row; returns the id."""

    def declare(self, tables: Sequence[Table]) -> None:
        """Change the declaration of known tables (only `every` differs)."""

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

    def watched(self) -> frozenset[str]:
        """Topics that some viewer has on its screen now."""
