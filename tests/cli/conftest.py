from __future__ import annotations

from tests.runs.conftest import runs
from tests.ui.conftest import wait_for_the_event_loop

__all__ = ["runs", "wait_for_the_event_loop"]
