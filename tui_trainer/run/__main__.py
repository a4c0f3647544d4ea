"""`python -m tui_trainer.run DIRECTORY`: the process that an app starts for a run."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path


def start(arguments: list[str]) -> int:
    """Run the spec in a run's directory; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m tui_trainer.run DIRECTORY", file=sys.stderr)
        return 2
    from tui_trainer.config.machine import OtherLoad

    others = OtherLoad()  # measures while the rest is imported
    from tui_trainer.config.run_spec import LOG_FILE, read_spec
    from tui_trainer.run.host import Host, run_to_end
    from tui_trainer.run.output import Capture

    try:
        spec = read_spec(arguments[0])
        if spec.working_directory:
            os.chdir(spec.working_directory)
    except (OSError, ValueError) as error:
        print(f"tui-trainer: cannot start this run: {error}", file=sys.stderr)
        return 2
    # A crash of the interpreter is reported on the original stderr, not in a pipe of this process.
    faulthandler.enable(os.fdopen(os.dup(2), "w"))
    host = Host(spec, others=others)
    capture = Capture(host.recorder.log, Path(spec.directory) / LOG_FILE)
    capture.start()
    try:
        return run_to_end(host, None, own_session=True, after_training=capture.stop)
    finally:
        capture.stop()  # an exception of our own then goes to the original stderr


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
