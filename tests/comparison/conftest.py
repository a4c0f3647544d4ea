from __future__ import annotations

from tests.ui.conftest import (
    nothing_passes_with_time,
    parse_style_sheets_once,
    wait_for_the_event_loop,
)

__all__ = ["nothing_passes_with_time", "parse_style_sheets_once", "wait_for_the_event_loop"]
