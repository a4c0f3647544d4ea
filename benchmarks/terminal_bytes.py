"""Bytes and frames per second that the screen sends to the terminal while a run is watched.

    python -m benchmarks.terminal_bytes [--seconds 30] [--steps-per-second 25] [--json FILE]

Runs the real command in a pseudo-terminal, over a real run (the small GPT) held at one speed: as on
a local terminal, as in an SSH session, and with `--slow-link`. Bytes are counted as the terminal
reads them, once the first steps are on the screen. No key is pressed, but the screen has not been
idle for so long that frames become rarer. A frame is one burst of output.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

MODES = {"local": (), "ssh": (), "slow link": ("--slow-link",)}
"""Kind of terminal → options for it."""
SIZES = ((80, 24), (120, 40), (200, 60))
SETTLE_S = 6.0
"""Seconds after attaching that are not counted: the first frame draws everything measured so
far."""
BURST_S = 0.05


@dataclass(frozen=True)
class Measured:
    """The output of one terminal."""

    columns: int
    rows: int
    mode: str
    bytes_per_second: float
    compressed_per_second: float
    """Bytes per second with ssh's `Compression yes` (zlib)."""
    frames_per_second: float
    largest_second: int
    """Bytes in the worst second."""


def main() -> None:
    """Print the table; write it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--steps-per-second", default="25")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        environment = {name: value for name, value in os.environ.items() if "SSH" not in name}
        environment |= {"TUI_TRAINER_RUNS_DIR": directory}
        environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        command = [sys.executable, "-m", "tui_trainer"]
        start = [*command, "gpt", "--threads", "1", "--steps", "200000", "--detach"]
        name = subprocess.check_output(start, env=environment, text=True).strip()
        try:
            _throttle(directory, name, float(options.steps_per_second))
            time.sleep(20)
            titles = f"{'bytes/s':>9}{'zipped':>9}{'frames/s':>10}{'worst s':>9}"
            print(f"{'terminal':10}{'mode':12}{titles}")
            for columns, rows in SIZES:
                for mode, extra in MODES.items():
                    attach = [*command, "attach", name, *extra]
                    ssh = {"SSH_CONNECTION": "192.0.2.1 50000 192.0.2.2 22"}
                    terminal = environment | (ssh if mode == "ssh" else {})
                    one = watch(attach, terminal, columns, rows, mode, options.seconds)
                    results.append(one)
                    print(
                        f"{columns}×{rows:<6}{mode:12}"
                        f"{one.bytes_per_second:9,.0f}{one.compressed_per_second:9,.0f}"
                        f"{one.frames_per_second:10.2f}{one.largest_second:9,}",
                        flush=True,
                    )
        finally:
            subprocess.run([*command, "stop", name], env=environment, check=False)
    if any(not one.bytes_per_second and one.mode != "slow link" for one in results):
        raise RuntimeError("a screen was sent nothing: it did not show the run")
    finish(options.json, {"terminals": [asdict(one) for one in results]})


def _throttle(runs: str, name: str, rate: float) -> None:
    """Hold the run at one speed, so that the figures do not depend on the machine's."""
    from tui_trainer.client.connection import connector
    from tui_trainer.client.live import LiveSession
    from tui_trainer.protocol.actions import Throttle
    from tui_trainer.runs.registry import connect_run

    session = LiveSession(connector(lambda: connect_run(Path(runs) / name)))
    try:
        while session.poll().status.step < 3:
            time.sleep(0.1)
        session.send(Throttle(rate)).result(10)
    finally:
        session.close()


def watch(
    command: list[str], environment: dict[str, str], columns: int, rows: int, mode: str, s: float
) -> Measured:
    """Attach in a pseudo-terminal of this size, and count its output for `s` seconds."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    try:
        _read(terminal, SETTLE_S)
        bursts = _read(terminal, s)
    finally:
        os.kill(child, signal.SIGTERM)
        _read(terminal, 2.0)
        os.close(terminal)
        os.waitpid(child, 0)
    zipped = zlib.compressobj(6)
    small = sum(
        len(zipped.compress(data)) + len(zipped.flush(zlib.Z_SYNC_FLUSH)) for _, data in bursts
    )
    seconds = [0] * (int(s) + 1)
    for at, data in bursts:
        seconds[int(at)] += len(data)
    frames = sum(
        1
        for number, (at, _) in enumerate(bursts)
        if number == 0 or at - bursts[number - 1][0] > BURST_S
    )
    size = sum(len(data) for _, data in bursts)
    return Measured(columns, rows, mode, size / s, small / s, frames / s, max(seconds))


def _read(terminal: int, seconds: float) -> list[tuple[float, bytes]]:
    """(time, bytes) of each piece of output within `seconds`."""
    began = time.monotonic()
    got: list[tuple[float, bytes]] = []
    while (left := began + seconds - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other side has gone
                break
            if not data:
                break
            got.append((time.monotonic() - began, data))
    return got


if __name__ == "__main__":
    main()
