from __future__ import annotations

from tests.runs.conftest import runs
from tests.ui.conftest import nothing_passes_with_time, wait_for_the_event_loop

__all__ = ["nothing_passes_with_time", "runs", "wait_for_the_event_loop"]
