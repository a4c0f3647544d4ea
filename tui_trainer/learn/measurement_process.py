"""Measures pages in a child process, which imports PyTorch once and answers in JSON.

The process that shows pages never imports PyTorch. The child sees no GPU and uses one thread, so
that it does not disturb a training on this machine. It ends when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import threading

import msgspec

from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.text import sanitize_message, single_line

Value = bool | int | float | str | list[float | int | str]
"""A number, a text, or a vector. Floats are finite."""


class PageMeasurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The measured values of one page."""

    page: str
    seed: int
    values: dict[str, Value]
    """Name of a placeholder → its value."""
    milliseconds: float
    torch: str
    """Version of PyTorch."""


class PageFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reason why a measurement could not be run."""

    message: str
    hint: str = ""


class PageRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The page to measure, and the seed of its random numbers."""

    page: str
    seed: int


def all_finite(values: dict[str, Value]) -> bool:
    """Whether no value is nan or infinite, which JSON cannot hold and no page states."""
    return all(
        not isinstance(item, float) or math.isfinite(item)
        for value in values.values()
        for item in (value if isinstance(value, list) else [value])
    )


TIMEOUT_S = 180.0
"""Limit of a measurement. Importing PyTorch takes seconds, on a cold disk minutes; the measurement
itself takes less than a second."""
MAX_ANSWER_BYTES = 1 << 20
COMMAND = (sys.executable, "-P", "-m", "tui_trainer.learn.measurements", "--serve")


class MeasurementError(UserError):
    """A measurement could not be run."""


class MeasurementProcess:
    """Runs measurements in a child process, started at the first one. Thread-safe."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        """Held while a measurement runs."""
        self._closed = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child

    def prepare(self) -> None:
        """Start the child, so that it has imported PyTorch when the first page is opened."""
        with self._lock, contextlib.suppress(MeasurementError):
            if not self._closed:
                self._running()

    def measure(self, page: str, seed: int) -> PageMeasurement:
        """Measure a page and wait for its values. Raises MeasurementError."""
        with self._lock:
            if self._closed:
                raise MeasurementError("the screen has been closed")
            process = self._running()
            timer = threading.Timer(TIMEOUT_S, process.kill)
            timer.daemon = True
            timer.start()
            try:
                answer = self._ask(process, PageRequest(page, seed))
            finally:
                timer.cancel()
        if answer.page != page or answer.seed != seed:
            raise MeasurementError(f"the measurement of {page} answered for another page")
        return answer

    def release(self) -> None:
        """End the child until the next measurement, unless one is running."""
        if self._lock.acquire(blocking=False):
            try:
                process, self._process = self._process, None
                if process is not None:
                    _end(process)
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the child; a measurement that is running fails."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                    start_new_session=True,  # Ctrl-C is for the app
                )
            except OSError as error:
                raise MeasurementError(f"cannot start the measurement: {error}") from error
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], wanted: PageRequest) -> PageMeasurement:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(wanted) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(MAX_ANSWER_BYTES)
        except (OSError, ValueError):
            line = b""
        if not line:
            raise self._why_silent(process)
        return checked(line)

    def _why_silent(self, process: subprocess.Popen[bytes]) -> MeasurementError:
        _end(process)
        self._process = None
        printed = single_line(self._last_line(), 200)
        return MeasurementError(
            "the measurement ended without an answer",
            printed
            or "python -m tui_trainer.learn.measurements --list shows whether it can be started",
        )

    def _last_line(self) -> str:
        """The last line that the child wrote to its standard error."""
        with contextlib.suppress(OSError, ValueError):
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""


def checked(line: bytes) -> PageMeasurement:
    """The answer of the child. Raises MeasurementError if it is invalid or reports a failure."""
    try:
        answer = msgspec.json.decode(line, type=PageMeasurement)
    except msgspec.MsgspecError:
        try:
            failed = sanitize_message(msgspec.json.decode(line, type=PageFailure))
        except msgspec.MsgspecError as error:
            raise MeasurementError(f"the measurement gave no valid answer: {error}") from error
        raise MeasurementError(failed.message, failed.hint) from None
    if not all_finite(answer.values):
        raise MeasurementError(f"the measurement of {answer.page} gave nan or inf")
    return sanitize_message(answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
