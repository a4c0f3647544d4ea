"""How many examples Hypothesis tries."""

from __future__ import annotations

import os

FEW = "TUI_TRAINER_TEST_FEW_EXAMPLES"
"""Set in the environment by `tests/conftest.py` for `make test-fast`."""


def examples(count: int) -> int:
    """`count`, or a fifth of it where the quick tests alone run."""
    return max(5, count // 5) if FEW in os.environ else count
