"""The slow-down of a distributed training: each rank with and without tui-trainer, in turns.

    python -m benchmarks.ranks [--ranks 2] [--pairs 8] [--seconds 3] [--json FILE]

Two groups of processes train the same small GPT with DistributedDataParallel over gloo, one group
under `tui-trainer run`. They are stopped (SIGSTOP) and continued in turns, so that only one trains
at a time; every watched turn is compared with the mean of the bare turns before and after it. A
rank counts its steps, and the CPU time of its training thread, in a file that is mapped into
memory. Each rank has one torch thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from report import begin, finish

COUNTS = "<qd"
"""Format of a rank's file: steps completed, and CPU seconds of its training thread."""
START_TIMEOUT_S = 300.0
WARM_S = 0.5
"""The first part of a turn, not counted, with the work that was due while the processes were
stopped."""

TRAIN = """
import mmap, os, struct, sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tui_trainer.models.gpt import GPT

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
with open(f"{sys.argv[1]}/counts-{rank}", "r+b") as file:
    counts = mmap.mmap(file.fileno(), 0)
torch.manual_seed(0)
model = DDP(GPT(vocabulary=65, block_size=64, layers=4, heads=4, width=128))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
torch.manual_seed(rank)
step = 0
while True:
    ids = torch.randint(0, 65, (12, 65))
    logits = model(ids[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    step += 1
    struct.pack_into("<qd", counts, 0, step, time.thread_time())
"""


@dataclass(frozen=True)
class Turn:
    """The times per step in one turn, as means over all ranks."""

    step_ms: float
    thread_ms: float


class Group:
    """The processes of one launch."""

    def __init__(self, name: str, ranks: int, command: Sequence[str], folder: Path) -> None:
        self._counts = []
        own = folder / name
        own.mkdir()
        (own / "train.py").write_text(TRAIN)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._processes = []
        for rank in range(ranks):
            counts = own / f"counts-{rank}"
            counts.write_bytes(bytes(struct.calcsize(COUNTS)))
            self._counts.append(counts)
            environment = {
                **os.environ,
                "TUI_TRAINER_RUNS_DIR": str(own / "runs"),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, *command, "train.py", str(own)],
                    cwd=own,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=open(own / f"stderr-{rank}", "wb"),  # noqa: SIM115
                )
            )

    def wait_until_ready(self) -> None:
        """Return after some steps of every rank, with all processes stopped."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(steps < 20 for steps, _ in self._read()):
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes):
                raise SystemExit("a rank does not train: see its stderr")
            time.sleep(0.1)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """Train for some seconds. The time that a rank waits for others is part of its steps."""
        self._signal(signal.SIGCONT)
        time.sleep(WARM_S)
        before, began = self._read(), time.perf_counter()
        time.sleep(seconds)
        after, took = self._read(), time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        steps = [b[0] - a[0] for a, b in zip(before, after, strict=True)]
        thread_s = [b[1] - a[1] for a, b in zip(before, after, strict=True)]
        return Turn(
            1e3 * took * len(steps) / sum(steps),
            1e3 * sum(thread_s) / sum(steps),
        )

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _read(self) -> list[tuple[int, float]]:
        return [struct.unpack(COUNTS, path.read_bytes()) for path in self._counts]

    def _signal(self, number: int) -> None:
        for process in self._processes:
            for each in (process, *psutil.Process(process.pid).children(recursive=True)):
                os.kill(each.pid, number)


def main() -> None:
    """Print the ratios; write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin()
    watched_command = ("-P", "-m", "tui_trainer", "run", "--plain")
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as name:
        groups: list[Group] = []
        try:
            for way, command in (("bare", ()), ("again", ()), ("watched", watched_command)):
                groups.append(Group(way, options.ranks, command, Path(name)))
                groups[-1].wait_until_ready()
            bare, again, watched = groups
            for group in groups:  # cadences settle
                group.turn(options.seconds)
            rows = [measure("bare again", bare, again, options)]
            rows.append(measure("tui-trainer", bare, watched, options))
        finally:
            for group in groups:
                group.close()
    finish(options.json, {"ranks": options.ranks, "rows": rows})


def measure(way: str, bare: Group, other: Group, options: argparse.Namespace) -> dict[str, object]:
    """Compare two groups in turns; print the row and return it."""
    ratios, cpu_ratios, taken = [], [], []
    before = bare.turn(options.seconds)
    for _ in range(options.pairs):
        took, after = other.turn(options.seconds), bare.turn(options.seconds)
        ratios.append(2 * took.step_ms / (before.step_ms + after.step_ms))
        cpu_ratios.append(2 * took.thread_ms / (before.thread_ms + after.thread_ms))
        taken.append(took.step_ms)
        before = after
    low, ratio, high = statistics.quantiles(ratios, n=4)
    row = {
        "way": way,
        "step_ms": statistics.mean(taken),
        "ratio": ratio,
        "low": low,
        "high": high,
        "cpu_ratio": statistics.median(cpu_ratios),
    }
    print(
        f"{way:14}{row['step_ms']:9.2f} ms/step  ratio {ratio:.3f} ({low:.3f} to {high:.3f})"
        f"  CPU of the training threads {row['cpu_ratio']:.3f}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
