from __future__ import annotations

from tests.ui.conftest import wait_for_the_event_loop

__all__ = ["wait_for_the_event_loop"]
