"""`tui-trainer`, which can be stopped by SIGSTOP and goes on as if nothing had been.

    python benchmarks/stoppable.py run script.py …

Textual takes SIGCONT for the end of a Ctrl+Z: it would start its terminal's threads a second time,
beside those it has. Here it is deaf to it. Nothing else differs from the command.
"""

from __future__ import annotations

import sys
from typing import Any

from textual.drivers.linux_driver import LinuxDriver

from tui_trainer.__main__ import main


def _go_on(*_: Any) -> None:
    """Whoever was stopped by SIGSTOP has left nothing that would have to be taken up again."""


if __name__ == "__main__":
    sys.argv[0] = "tui-trainer"
    LinuxDriver._sigcont_application = _go_on  # type: ignore[method-assign]
    main()
