"""The run store: everything measured in a run, in one SQLite database in the run's directory.

Here are its schema, how values are packed, and its reader; what writes it is with the recorder.
The format is described in docs/store.md.
"""

from __future__ import annotations

from tui_trainer.store.schema import STORE_FILE, StoreError

__all__ = ["STORE_FILE", "StoreError"]
