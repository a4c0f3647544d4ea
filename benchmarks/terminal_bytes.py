"""What the screen sends to the terminal while a run is watched: bytes a second, and frames.

    python -m benchmarks.terminal_bytes [--seconds 30] [--steps-per-second 25] [--json FILE]

The command itself in a real pseudo-terminal, over a real run (the small GPT) that is held at one
speed, once as it is by default and once with `--slow-link`. Bytes are counted as the terminal takes
them, from the moment the first steps are on the screen; nobody presses a key, but the run is young
enough for the pace not to be that of a screen that is left alone. A frame is one burst of output.
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

SIZES = ((80, 24), (120, 40), (200, 60))
SETTLE_S = 6.0
"""After attaching: the first picture is drawn, with all that had been measured before."""
BURST_S = 0.05


@dataclass(frozen=True)
class Measured:
    """One terminal watched for a while."""

    columns: int
    rows: int
    slow_link: bool
    bytes_per_second: float
    compressed_per_second: float
    """With ssh's `Compression yes` (zlib)."""
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
        environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": directory}
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
                for slow in (False, True):
                    attach = [*command, "attach", name, *(["--slow-link"] if slow else [])]
                    one = watch(attach, environment, columns, rows, slow, options.seconds)
                    results.append(one)
                    print(
                        f"{columns}×{rows:<6}{'slow link' if slow else 'default':12}"
                        f"{one.bytes_per_second:9,.0f}{one.compressed_per_second:9,.0f}"
                        f"{one.frames_per_second:10.2f}{one.largest_second:9,}",
                        flush=True,
                    )
        finally:
            subprocess.run([*command, "stop", name], env=environment, check=False)
    if any(not one.bytes_per_second and not one.slow_link for one in results):
        raise RuntimeError("a screen was sent nothing: it did not show the run")
    finish(options.json, {"terminals": [asdict(one) for one in results]})


def _throttle(runs: str, name: str, rate: float) -> None:
    """Hold the run at one speed, so that the figures do not depend on the machine's."""
    from tui_trainer.client.connection import connector
    from tui_trainer.client.live import LiveSession
    from tui_trainer.protocol.messages import Throttle

    session = LiveSession(connector(Path(runs) / name))
    try:
        while session.poll().status.step < 3:
            time.sleep(0.1)
        session.send(Throttle(rate)).result(10)
    finally:
        session.close()


def watch(
    command: list[str], environment: dict[str, str], columns: int, rows: int, slow: bool, s: float
) -> Measured:
    """Attach in a pseudo-terminal of this size, and count for `s` seconds what it is sent."""
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
    return Measured(columns, rows, slow, size / s, small / s, frames / s, max(seconds))


def _read(terminal: int, seconds: float) -> list[tuple[float, bytes]]:
    """What comes within so many seconds, and when."""
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
