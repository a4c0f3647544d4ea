"""A run by an unprivileged user, whose directory is read-only for a while.

python -m tests.runs.as_unprivileged_user RUNS_DIRECTORY    prints one JSON object
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time

NOBODY_UID = 65534


def until(found, what):
    deadline = time.monotonic() + 240
    while not found():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def main(parent):
    from tests.runs.fake_host import FakeHost
    from tui_trainer.config.run_spec import RunSpec, write_spec
    from tui_trainer.run.host import WorkerStopHandler

    # The imports above may need the caller's permissions; only the run belongs to `nobody`.
    os.setgroups([])
    os.setgid(NOBODY_UID)
    os.setuid(NOBODY_UID)
    place = os.path.join(parent, "gpt-shut")
    write_spec(RunSpec(name="gpt-shut", directory=place, task="gpt"))
    os.chmod(place, 0o500)
    with contextlib.suppress(PermissionError):
        open(os.path.join(place, "probe"), "w").close()
        raise SystemExit("this user may write anywhere")
    host = FakeHost(place, 1_000_000, 0.005)
    host.stops = WorkerStopHandler(host.gate)
    seen = {}
    host.open(None)
    threading.Thread(target=host.train, daemon=True).start()
    recorder = host.recorder
    until(lambda: "not recording" in recorder.status.recording, "the status reports it")
    seen["status"] = recorder.status.recording
    before = recorder.status.step
    until(lambda: recorder.status.step > before + 50, "training continues")
    seen["files while read-only"] = sorted(os.listdir(place))
    os.chmod(place, 0o700)
    until(lambda: not recorder.status.recording, "recording resumes")
    seen["resumed at"] = recorder.status.step
    until(lambda: recorder.status.step > seen["resumed at"] + 50, "recording continues")
    seen["ended at"] = recorder.status.step
    recorder.end("stopped")
    recorder.close(240)
    # In one piece, for the training still prints its steps.
    sys.stdout.write(f"\n{json.dumps(seen)}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
