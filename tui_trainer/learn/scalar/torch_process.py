"""Computes PyTorch's gradients in a child process, so that the screen's process needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

COMMAND = (sys.executable, "-P", "-m", "tui_trainer.learn.scalar.torch_worker")


@dataclass(frozen=True)
class TorchGradients:
    """PyTorch's gradients of the nodes of an expression."""

    version: str
    gradients: tuple[float | None, ...]


class TorchProcess:
    """A child process that is started by the first request and ends with `close()` or with this
    process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def gradients(self, expression: str, values: Mapping[str, float]) -> TorchGradients | None:
        """The gradients of all nodes; None without torch, or after `close()`. Blocks until the
        answer; the first time, importing torch takes seconds."""
        with self._lock:
            try:
                process = self._started()
                if process is None or process.stdin is None or process.stdout is None:
                    return None
                request = {"expression": expression, "values": dict(values)}
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
            except (OSError, ValueError):
                return None
        return TorchGradients(answer["version"], tuple(answer["gradients"]))

    def _started(self) -> subprocess.Popen[str] | None:
        if self._closed:
            return None
        if self._process is None:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        return self._process

    def close(self) -> None:
        """End the process; a request in progress returns None."""
        self._closed = True
        process = self._process
        if process is None:
            return
        process.kill()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.wait(5)
        for stream in (process.stdin, process.stdout):
            if stream is not None and self._lock.acquire(timeout=5):
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
                self._lock.release()
