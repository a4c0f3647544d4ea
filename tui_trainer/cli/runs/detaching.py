"""`--detach`: start a run, say its name, and leave it to itself."""

from __future__ import annotations

import contextlib
import sys
import time

from tui_trainer.cli.directory import discard
from tui_trainer.cli.errors import CommandError
from tui_trainer.config.spec import RunSpec, find_socket
from tui_trainer.session.launch import Launched, launch

LISTENS_WITHIN_S = 30.0
"""It listens before it imports torch: a tenth of this on a slow disk."""


def start_detached(spec: RunSpec) -> int:
    """Start the run process, wait until others can find it, and print the run's name alone on
    stdout, for `RUN=$(tui-trainer gpt --detach)`. Raises CommandError when it does not start."""
    try:
        launched = launch(spec)
    except OSError as fault:
        discard(spec)
        raise CommandError(f"cannot start the run process: {fault}") from fault
    _wait(launched)
    print(spec.name, flush=True)
    if sys.stderr.isatty():
        print(f"  tui-trainer attach {spec.name} shows it", file=sys.stderr)
    return 0


def _wait(launched: Launched) -> None:
    deadline = time.monotonic() + LISTENS_WITHIN_S
    while find_socket(launched.spec.directory) is None:
        status = launched.process.poll()
        if status is not None:
            said = launched.last_words()
            discard(launched.spec)
            raise CommandError(f"the run process ended at once (exit status {status})", said)
        if time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                launched.process.terminate()
            raise CommandError("the run process does not come up", launched.last_words())
        time.sleep(0.02)
