"""The run store: everything measured in a run, in one SQLite database in the run's directory.

`writer` is a sink of the recorder, `reader` a history for viewers, and `recorded_items` replays the
items of the run in order. `series`, `step_times` and `events` write and read their tables. The
format is described in docs/store.md.
"""

from __future__ import annotations

from tui_trainer.store.schema import STORE_FILE, StoreError

__all__ = ["STORE_FILE", "StoreError"]
