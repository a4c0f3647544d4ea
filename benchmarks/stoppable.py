"""`tui-trainer`, in a form that can be stopped by SIGSTOP and continued by SIGCONT.

    python benchmarks/stoppable.py run script.py …

Textual takes SIGCONT for the end of a Ctrl+Z and would start its terminal threads a second time.
Here it ignores the signal. Everything else is as in the command.
"""

from __future__ import annotations

import sys
from typing import Any

from textual.drivers.linux_driver import LinuxDriver

from tui_trainer.__main__ import main


def _ignore(*_: Any) -> None:
    """Do nothing: SIGSTOP did not reset the terminal, so there is nothing to restore."""


if __name__ == "__main__":
    sys.argv[0] = "tui-trainer"
    LinuxDriver._sigcont_application = _ignore  # type: ignore[method-assign]
    main()
