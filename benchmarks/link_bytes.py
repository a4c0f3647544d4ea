"""Bytes per second over an ssh connection while a run is watched, by kind of content.

A real run of the GPT is started detached and polled as the app polls, through `tui-trainer relay`,
whose standard streams are what ssh transfers. With `--ssh` the run is reached through a real sshd
on loopback with the app's options for ssh, and the bytes that ssh reads from and writes to its
socket (compressed, encrypted and in packets) are counted as well.

    python benchmarks/link_bytes.py [--ssh] [--preset nanogpt-cpu] [--rate 4] [--seconds 30]
"""

from __future__ import annotations

import argparse
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

from tui_trainer import __version__
from tui_trainer.client.connection import next_poll
from tui_trainer.client.ssh import OPTIONS
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import Throttle
from tui_trainer.protocol.framing import encode
from tui_trainer.protocol.messages import Command, Hello, Poll, ToViewer, Update

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.ssh.sshd import PATH_WITH_US, Sshd

BUDGET = 64 * 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--preset", default="nanogpt-cpu")
    options.add_argument("--rate", type=float, default=4.0, help="polls a second")
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", default="2")
    options.add_argument("--ssh", action="store_true", help="through a real sshd on loopback")
    options.add_argument("--budget", default="0.01", help="0: no cadence is stretched")
    options.add_argument(
        "--steps-per-second",
        type=float,
        help="hold this speed, with tensors so small that any machine reaches it: the bytes sent "
        "depend on the number of tensors, not on their size",
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    begin()
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": directory}
        command = [sys.executable, "-m", "tui_trainer"]
        start = [*command, "gpt", "--preset", given.preset, "--threads", given.threads]
        start += ["--budget", given.budget, "--detach"]
        if given.steps_per_second:
            start += ["--width", "16", "--block-size", "8", "--batch-size", "1"]
        name = subprocess.check_output(start, env=environment, text=True).strip()
        relay = [*command, "relay", name]
        sshd = None
        try:
            if given.ssh:
                passed = {"PATH": PATH_WITH_US, "TUI_TRAINER_RUNS_DIR": directory}
                sshd = Sshd(Path(directory) / "sshd", passed)
                relay = [*shlex.split(sshd.command), *OPTIONS, "--", "Box", shlex.join(relay)]
            link = Link(relay, environment)
            if given.steps_per_second:
                link.hold(given.steps_per_second)
            link.wait_for_steps(20)
            figures = measure(link, given.rate, given.seconds, given.ssh)
        finally:
            if sshd is not None:
                sshd.stop()
            subprocess.run([*command, "stop", name], env=environment, check=False)
    finish(given.json, figures)


class Link:
    """Polls through a relay and counts the bytes in both directions."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._relay = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._send, self._receive = self._relay.stdin, self._relay.stdout
        self._process = psutil.Process(self._relay.pid)
        while b"TUI-TRAINER-RELAY" not in self._receive.readline():
            pass
        self._next_poll = Poll(budget=BUDGET)
        self._decoder = msgspec.msgpack.Decoder(ToViewer)
        self._compressor = zlib.compressobj(6)
        self.tables: dict[int, tuple[str, int]] = {}
        self.parameters = 0
        self.forget()
        self._exchange(encode(Hello(PROTOCOL_VERSION, __version__, "benchmark")))

    def forget(self) -> None:
        """Reset all counts."""
        self.by_kind: Counter[str] = Counter()
        self.received = self.sent = self.compressed = self.polls = 0
        self.step = 0
        self._before = self._process.io_counters()

    def on_the_socket(self) -> tuple[int, int]:
        """(bytes read, bytes written) by ssh on its socket: all its bytes except those of its
        standard streams."""
        now = self._process.io_counters()
        read = now.read_chars - self._before.read_chars - self.sent
        return read, now.write_chars - self._before.write_chars - self.received

    def _exchange(self, frame: bytes) -> ToViewer:
        self._send.write(frame)
        self._send.flush()
        self.sent += len(frame)
        header = self._receive.read(4)
        payload = self._receive.read(struct.unpack(">I", header)[0])
        self.received += 4 + len(payload)
        self.compressed += len(self._compressor.compress(header + payload))
        self.compressed += len(self._compressor.flush(zlib.Z_SYNC_FLUSH))
        return self._decoder.decode(payload)

    def hold(self, steps_per_second: float) -> None:
        """Limit the run to this speed."""
        self._exchange(encode(Command(1, Throttle(steps_per_second))))

    def poll(self) -> Update:
        """Poll once, as the app does."""
        update = self._exchange(encode(self._next_poll))
        assert isinstance(update, Update)
        self._next_poll = next_poll(self._next_poll, update)
        self.polls += 1
        self._count(update)
        self.step = update.status.step
        return update

    def _count(self, update: Update) -> None:
        if update.info is not None:
            tables = update.info.tables
            self.tables = {each.id: (each.name, len(each.columns)) for each in tables}
            self.parameters = len(update.info.parameters)
        for name in ("status", "info", "events", "log", "artifacts", "report"):
            self.by_kind[name] += len(msgspec.msgpack.encode(getattr(update, name)))
        for rows in update.rows:
            name, columns = self.tables[rows.table]
            self.by_kind[f"table {name} ({columns})"] += len(msgspec.msgpack.encode(rows))

    def wait_for_steps(self, count: int) -> None:
        """Poll until the run has made `count` steps and no data is waiting."""
        while self.poll().status.step < count:
            time.sleep(0.2)
        while self.poll().more:
            pass


def measure(link: Link, rate: float, seconds: float, through_ssh: bool) -> dict[str, float]:
    """Poll for some seconds; print the counts, and return them in bytes per second."""
    attaching = link.received
    first = link.poll().status.step
    link.forget()
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        link.poll()
        time.sleep(max(0.0, now + 1 / rate - time.monotonic()))
    took = time.monotonic() - began
    steps = link.step - first
    print(f"{link.parameters} parameter tensors, {steps / took:.1f} steps/s, {rate:g} polls/s")
    print(f"on attaching, with the first steps: {attaching:,} bytes")
    print(f"received {link.received / took:,.0f} bytes/s; sent {link.sent / took:,.0f} bytes/s")
    if through_ssh:
        read, written = link.on_the_socket()
        print(f"over ssh {read / took:,.0f} bytes/s; sent {written / took:,.0f} bytes/s")
    print(f"         {link.received / max(1, steps):,.0f} bytes a step, all of it")
    print(f"with ssh's Compression yes it would be about {link.compressed / took:,.0f} bytes/s")
    for name, size in link.by_kind.most_common():
        if size / took >= 1:
            print(f"  {size / took:9,.0f} bytes/s  {size / link.received:5.1%}  {name}")
    figures = {"received": link.received / took, "sent": link.sent / took}
    figures |= {"compressed": link.compressed / took, "steps_per_second": steps / took}
    return figures | {name: size / took for name, size in link.by_kind.items()}


if __name__ == "__main__":
    main()
