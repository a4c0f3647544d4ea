"""`python -m tui_trainer.run <run directory>`: the process that an app starts for a run."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path


def start(arguments: list[str]) -> int:
    """Do the run kept in the directory; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m tui_trainer.run <run directory>", file=sys.stderr)
        return 2
    from tui_trainer.config.machine import OtherLoad

    others = OtherLoad()  # looks while the rest is imported
    from tui_trainer.config.run_spec import LOG_FILE, read_spec
    from tui_trainer.run.host import Host, finish
    from tui_trainer.run.output import Capture

    try:
        spec = read_spec(arguments[0])
        if spec.working_directory:
            os.chdir(spec.working_directory)
    except (OSError, ValueError) as fault:
        print(f"tui-trainer: cannot start this run: {fault}", file=sys.stderr)
        return 2
    # What kills the interpreter is said where we were started, not in a pipe of our own.
    faulthandler.enable(os.fdopen(os.dup(2), "w"))
    host = Host(spec, others=others)
    capture = Capture(host.recorder.log, Path(spec.directory) / LOG_FILE)
    capture.start()
    try:
        return finish(host, None, own_session=True, before_end=capture.stop)
    finally:
        capture.stop()  # a fault of our own is then said where we were started


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
