"""`--alert`: tells the user about warnings, errors, breakpoints and the end of a run.

The run only writes a line to a pipe. A separate process, started before the training and detached
from it, runs the commands and calls the webhooks: nothing is forked while the training runs, and a
run that is killed is reported too. The process logs to `alerts.log` in the run's directory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from tui_trainer.config.run_spec import process_identity, read_state
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import LEVEL_ORDER, Finding, Level, Notice, finding_object
from tui_trainer.protocol.formatting import nonfinite, number, rough_duration
from tui_trainer.protocol.messages import EndState, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import InfoChanged, Item, RunEnded, StepRecorded

LOG_FILE = "alerts.log"
MAX_PER_MINUTE = 10
"""Maximum number of alerts about findings and breakpoints; the end of a run is always reported."""
TIMEOUT_S = 30.0
"""Limit for one command, and for one attempt to call a webhook."""
RETRY_AFTER_S = (1.0, 4.0, 15.0)
"""Pauses before each further attempt to call a webhook or run a command that failed."""
START_TIMEOUT_S = 20.0
POLL_S = 2.0
"""How often the existence of the run process is checked."""

AlertKind = Literal["finding", "breakpoint", "end", "crash"]


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON object that a command gets on standard input and a webhook as the body of a POST."""

    kind: AlertKind
    run: str
    text: str
    """The alert in one line."""
    level: Level = "info"
    directory: str = ""
    host: str = ""
    title: str = ""
    step: int = 0
    total_steps: int | None = None
    state: EndState | Literal["killed", ""] = ""
    """State at the end of the run."""
    reason: str = ""
    loss: float | None = None
    loss_text: str | None = None
    """`nan`, `inf` or `-inf` where the loss is that."""
    finding: dict[str, Any] | None = None
    """Finding as in `show --json`."""
    left_out: int = 0
    """Number of alerts since the previous one that were not sent, because the limit per minute was
    reached."""
    time: float = 0.0


# ---------------------------------------------------------------- in the run


class AlertSink:
    """A sink that writes alerts to the pipe of the process that sends them."""

    def __init__(
        self, targets: Sequence[str], info: RunInfo, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises OSError where the process cannot be started."""
        self._describe(info)
        self._clock = clock
        self._pipe: int | None = start_sender(targets, info)
        self._loss: float | None = None
        self._reported: dict[int, Level] = {}
        self._sent: deque[float] = deque(maxlen=MAX_PER_MINUTE)
        self._left_out = 0

    def take(self, items: Sequence[Item], status: Status) -> None:
        for item in items:
            match item:
                case InfoChanged():
                    self._describe(item.info)
                case StepRecorded():
                    self._observe(item)
                case Finding():
                    self._report_finding(item)
                case Notice(kind="breakpoint", level="warning"):
                    self._report("breakpoint", item.text, "warning", item.step)
                case RunEnded():
                    self._report_end(item.status)
                case _:
                    pass

    def close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _describe(self, info: RunInfo) -> None:
        self._info = info
        self._step_tables = {table.id for table in info.tables if table.name == schema.STEP}

    def _observe(self, item: StepRecorded) -> None:
        for table, values in item.record.rows:
            if table in self._step_tables:
                self._loss = float(values[schema.STEP_INDEX["loss"]])

    def _report_finding(self, finding: Finding) -> None:
        """Report a finding without a cause once, and again when it gets worse."""
        known = self._reported.get(finding.number, "info")
        if finding.cause is not None or LEVEL_ORDER[finding.level] >= LEVEL_ORDER[known]:
            return
        self._reported[finding.number] = finding.level
        text = f"{finding.title}: {finding.text}"
        made = finding_object(finding)
        self._report("finding", text, finding.level, finding.step, finding=made)

    def _report_end(self, status: Status) -> None:
        crashed = status.state == "crashed"
        text = f"{status.state} {'at' if crashed else 'after'} step {status.step:,}"
        if crashed and status.reason:
            text += f": {status.reason}"
        elif self._loss is not None:
            text += f", loss {number(self._loss, 0)}"
        level: Level = "error" if crashed else "info"
        kind: AlertKind = "crash" if crashed else "end"
        self._report(kind, text, level, status.step, state=status.state, reason=status.reason)

    def _report(self, kind: AlertKind, text: str, level: Level, step: int, **fields: Any) -> None:
        now = self._clock()
        if kind in ("finding", "breakpoint"):
            if len(self._sent) == MAX_PER_MINUTE and now - self._sent[0] < 60:
                self._left_out += 1
                return
            self._sent.append(now)
        finite = self._loss is not None and abs(self._loss) < float("inf")
        info = self._info
        alert = Alert(
            kind=kind,
            run=info.name,
            text=f"{info.name}: {text}",
            level=level,
            directory=info.directory,
            host=info.host,
            title=info.title or info.task,
            step=step,
            total_steps=info.total_steps,
            loss=self._loss if finite else None,
            loss_text=None if finite or self._loss is None else nonfinite(self._loss),
            left_out=self._left_out,
            time=now,
            **fields,
        )
        self._left_out = 0
        self._write(msgspec.json.encode(alert) + b"\n")

    def _write(self, line: bytes) -> None:
        """Write without blocking: the alerts of a full pipe cannot be sent in time anyway."""
        if self._pipe is None:
            return
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            self._left_out += 1
        except OSError:  # the process was killed
            self.close()


def start_sender(targets: Sequence[str], info: RunInfo) -> int:
    """Start the process that sends alerts; returns the pipe to it. Raises OSError."""
    # -P: a json.py in the user's directory must not stand in for Python's own.
    command = [sys.executable, "-P", "-m", "tui_trainer.record.alerts"]
    command += [info.name, info.directory, str(os.getpid()), *targets]
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if process.wait(START_TIMEOUT_S):  # the sender itself continues in a grandchild
            raise OSError(f"the process that sends alerts failed ({process.returncode})")
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        os.close(write)
        raise OSError("the process that sends alerts did not start") from error
    except OSError:
        os.close(write)
        raise
    finally:
        os.close(read)
    os.set_blocking(write, False)
    return write


# ---------------------------------------------------------------- in the process


AlertQueue = queue.Queue[tuple[Alert, bytes] | None]


class Sender:
    """Reads alerts from standard input and sends each one to every target."""

    def __init__(self, run: str, directory: Path, pid: int, targets: Sequence[str]) -> None:
        self._run, self._directory, self._pid = run, directory, pid
        self._process = process_identity(pid)
        self._queues: list[AlertQueue] = [queue.Queue() for _ in targets]
        self._threads = [
            threading.Thread(target=self._serve, args=pair)
            for pair in zip(targets, self._queues, strict=True)
        ]
        self._ended = False

    def run(self, stream: int) -> None:
        """Queue alerts until the run has ended or its process is gone; wait until all are sent."""
        for thread in self._threads:
            thread.start()
        buffered = b""
        while not self._ended:
            ready, _, _ = select.select([stream], [], [], POLL_S)
            if not ready:
                if process_identity(self._pid) != self._process:
                    break
                continue
            data = os.read(stream, 65536)
            if not data:
                break
            *lines, buffered = (buffered + data).split(b"\n")
            for line in lines:
                self._send(line)
        if not self._ended:
            self._send(msgspec.json.encode(self._killed()))
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _killed(self) -> Alert:
        """The alert about a process that is gone and has not reported its end."""
        state = read_state(self._directory)
        step = state.step if state is not None else 0
        return Alert(
            kind="crash",
            run=self._run,
            text=f"{self._run}: killed near step {step:,} (by a signal, or for its memory)",
            level="error",
            directory=str(self._directory),
            host=state.host if state is not None else "",
            title=state.title if state is not None else "",
            step=step,
            total_steps=state.total_steps if state is not None else None,
            state="killed",
            time=time.time(),
        )

    def _send(self, line: bytes) -> None:
        alert = msgspec.json.decode(line, type=Alert)
        self._ended = self._ended or alert.state != ""
        for waiting in self._queues:
            waiting.put((alert, line))

    def _serve(self, target: str, waiting: AlertQueue) -> None:
        """Send the alerts in a queue to one target, so that a failing target delays no other."""
        while (taken := waiting.get()) is not None:
            problem = ""
            for attempt, wait in enumerate((0.0, *RETRY_AFTER_S), 1):
                time.sleep(wait)
                try:
                    deliver(target, *taken)
                except AlertError as error:
                    problem = f"{error} (attempt {attempt})"
                    if not error.again:
                        break
                else:
                    problem = ""
                    break
            self._log(taken[0], target, problem)

    def _log(self, alert: Alert, target: str, problem: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        done = f"failed: {problem}" if problem else "sent"
        with contextlib.suppress(OSError):
            path = self._directory / LOG_FILE
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "a", encoding="utf-8") as file:
                file.write(f"{when} {alert.kind} to {name_of(target)}: {done}\n")


class AlertError(Exception):
    """An alert that was not delivered."""

    def __init__(self, text: str, again: bool = True) -> None:
        """`again`: whether another attempt can help."""
        super().__init__(text)
        self.again = again


def can_be_called(target: str) -> bool:
    """Whether `target` can be a command or a webhook: it is not empty, and no other kind of URL."""
    scheme, separator, rest = target.partition("://")
    if not target.strip() or (separator and not rest.partition("/")[0]):
        return False
    return not separator or " " in scheme or scheme in ("http", "https")


def is_webhook(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def name_of(target: str) -> str:
    """Name for the log: only the host of a webhook, since its path is a secret."""
    return target.partition("://")[2].partition("/")[0] if is_webhook(target) else target


def deliver(target: str, alert: Alert, line: bytes) -> None:
    """Call a webhook or run a command. Raises AlertError."""
    if is_webhook(target):
        _post(target, line)
    else:
        _run(target, alert, line)


def _post(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "tui-trainer"}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        again = error.code == 429 or error.code >= 500
        raise AlertError(f"status {error.code} {error.reason}", again) from error
    except (OSError, ValueError) as error:
        raise AlertError(str(error) or type(error).__name__) from error


def _run(command: str, alert: Alert, line: bytes) -> None:
    environment = {
        **os.environ,
        "TUI_TRAINER_ALERT": alert.text,
        "TUI_TRAINER_ALERT_KIND": alert.kind,
        "TUI_TRAINER_ALERT_LEVEL": alert.level,
        "TUI_TRAINER_ALERT_RUN": alert.run,
        "TUI_TRAINER_ALERT_DIRECTORY": alert.directory,
        "TUI_TRAINER_ALERT_STEP": str(alert.step),
    }
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=line,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AlertError(f"still running after {rough_duration(TIMEOUT_S)}", again=False) from error
    except (OSError, ValueError) as error:
        raise AlertError(str(error)) from error
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        last = f": {text[-1]}" if text else ""
        again = done.returncode not in (126, 127)  # the shell cannot find or run the command
        raise AlertError(f"exit status {done.returncode}{last}", again)


def main(arguments: Sequence[str]) -> int:
    """`python -m tui_trainer.record.alerts RUN DIRECTORY PID TARGET…`, with alerts on stdin."""
    run, directory, pid, *targets = arguments
    sender = Sender(run, Path(directory), int(pid), targets)
    if os.fork():  # not a child of the run, whose script may wait for any child
        return 0
    sender.run(0)
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
