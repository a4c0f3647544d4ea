"""Traces the processes that a script starts with `multiprocessing` or `os.fork`, as members of its
run, and reports the Python programs that it starts by commands, which are not traced.

A spawned child receives the run's directory with the preparation data of `multiprocessing`; a
forked child inherits a copy of the tracer, which is replaced. Both kinds join the run at their
first optimizer step, so workers that only load data never appear in it.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import multiprocessing.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tui_trainer.config.run_spec import RunSpec, read_spec
from tui_trainer.protocol.messages import Status
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.sink_items import Item, StepRecorded
from tui_trainer.run.context import RunContext, create_tracer
from tui_trainer.run.environment import initial_info
from tui_trainer.run.import_hook import around_torch_import
from tui_trainer.run.inspection import Inspections, answer_rank_zero
from tui_trainer.run.outcome import Outcome, outcome_of
from tui_trainer.run.rank_client import RankClient, connect_locally
from tui_trainer.run.rank_control import RankFollower
from tui_trainer.trace.gate import Gate

FLUSH_S = 20.0
KEY = "tui_trainer"
"""Key of our entry in the preparation data of a spawned child, which ignores unknown keys."""
PYTHON = re.compile(r"python[\d.]*(\.exe)?")
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")

if TYPE_CHECKING:
    from tui_trainer.inspector.inspector import Inspector
    from tui_trainer.run.checkpoints import CheckpointSaver
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.trace.tracer import Tracer
    from tui_trainer.travel.time_travel import TimeTravel


class _JoinWhenUnpickled:
    """Starts tracing when unpickled in a spawned child. If that fails, the child trains
    untraced."""

    def __init__(self, directory: str, label: str) -> None:
        self._code = (
            "try:\n"
            "    from tui_trainer.run.child_processes import join_spawned\n"
            f"    join_spawned({directory!r}, {label!r})\n"
            "except Exception:\n"
            "    pass\n"
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (self._code, {})


class ChildTraces:
    """Makes children started between `install` and `remove` join the run, and reports programs that
    cannot."""

    def __init__(self, run: RunContext) -> None:
        self._directory = run.spec.directory
        self.untrace: Callable[[], None] = _nothing
        """Called in a forked child: undoes the tracing that the parent has begun or prepared."""
        self._installed = False
        self._original: Callable[..., dict[str, Any]] | None = None
        self._programs = ProgramReports(lambda text: run.recorder.notice("rank", text))

    def install(self) -> None:
        self._installed = True
        original = self._original = multiprocessing.spawn.get_preparation_data
        directory = self._directory

        def prepared(name: str) -> dict[str, Any]:
            data = original(name)
            data[KEY] = _JoinWhenUnpickled(directory, name)
            return data

        self._ours = prepared
        multiprocessing.spawn.get_preparation_data = prepared
        multiprocessing.util.register_after_fork(self, _join_forked)
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _join_os_forked(reference()))
        self._programs.install()

    def remove(self) -> None:
        self._installed = False
        self._programs.remove()
        if self._original and multiprocessing.spawn.get_preparation_data is self._ours:
            multiprocessing.spawn.get_preparation_data = self._original

    def join_forked(self, label: str, by_fork_alone: bool = False) -> None:
        """Called in a forked child."""
        if not self._installed:
            return
        untrace, self.untrace = self.untrace, _nothing
        untrace()
        training = ChildTraining(self._directory, label)
        self.untrace = around_torch_import(lambda: None, training.trace)
        if by_fork_alone:
            training.end_before_exit()


def _join_forked(traces: ChildTraces) -> None:
    """Join the run from a child that `multiprocessing` has forked."""
    try:
        process = multiprocessing.process.current_process()
        target = getattr(getattr(process, "_target", None), "__module__", "")
        if "torch" in sys.modules:
            from tui_trainer.trace.torch_private import DATA_LOADER_WORKER

            if target == DATA_LOADER_WORKER:  # trains nothing
                return
        traces.join_forked(process.name)
    except Exception as error:
        print(f"tui-trainer: this child process is not traced: {error}", file=sys.stderr)


def _join_os_forked(traces: ChildTraces | None) -> None:
    """Join the run from a forked child if the script itself called `os.fork`."""
    try:
        caller = sys._getframe(2).f_globals.get("__name__", "")
        if traces is not None and not caller.startswith(("multiprocessing.", "subprocess", "pty")):
            traces.join_forked(f"pid {os.getpid()}", by_fork_alone=True)
    except Exception as error:
        print(f"tui-trainer: this child process is not traced: {error}", file=sys.stderr)


def join_spawned(directory: str, label: str) -> None:
    """Called in a spawned child, before it imports the script."""
    around_torch_import(lambda: None, ChildTraining(directory, label).trace)


class ChildTraining:
    """The `RunContext` of a child process."""

    recording = False

    def __init__(self, directory: str, label: str) -> None:
        spec = read_spec(directory)
        self.spec = RunSpec(
            name=label,
            directory="",
            task="script",
            budget=spec.budget,
            attention_pattern=spec.attention_pattern,
        )
        self.gate = Gate()
        self.inspections = Inspections(self.gate)
        self._directory = Path(directory)
        self._label = label
        self._tracer: Tracer | None = None
        self._pid = os.getpid()

    def trace(self) -> None:
        """Trace this thread; torch has been imported. Never raises."""
        try:
            self.recorder = Recorder(initial_info(self.spec))
            follower = RankFollower(self.gate)
            self._client = RankClient(
                -1,
                1,
                self._label,
                connect_locally(lambda: self._directory),
                _ignore,
                follower.descriptor,
            )
            follower.follow(self._client)
            answer_rank_zero(self.inspections, self._client)
            self.recorder.subscribe(_ConnectAtFirstStep(self._client))
            tracer = create_tracer(self)
            tracer.attach()
            self._tracer = tracer
            self._finalize()
            # A child of a fork server forgets its finalizers when its target is about to run.
            multiprocessing.util.register_after_fork(self, ChildTraining._finalize)
        except Exception as error:
            print(f"tui-trainer: this child process is not traced: {error}", file=sys.stderr)

    def _finalize(self) -> None:
        """Call `_end` when this process ends, also by the `os._exit` of `multiprocessing`."""
        if os.getpid() == self._pid:
            multiprocessing.util.Finalize(self, self._end, exitpriority=0)

    def end_before_exit(self) -> None:
        """Replace `os._exit`, with which forked children end, to record the last steps first."""
        original = os._exit

        def _exit(status: int) -> NoReturn:
            if os.getpid() == self._pid:
                self._end()
            original(status)

        os._exit = _exit

    def _end(self) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        error = sys.exc_info()[1]
        outcome = Outcome("finished") if error is None else outcome_of(error)
        tracer.detach()
        self.gate.end()
        status: Status = self.recorder.status
        self.recorder.close(FLUSH_S)
        if status.step:
            self._client.leave(outcome.state, outcome.reason, status.step)

    # ------------------------------------------------------------ RunContext

    @property
    def edits(self) -> LiveEdits | None:
        return None

    @property
    def travel(self) -> TimeTravel | None:
        return None

    def show_waiting_for(self, what: str) -> None:
        """Does nothing: viewers show rank 0's."""

    def save_with(self, saver: CheckpointSaver) -> None:
        """Does nothing: checkpoints are requested from rank 0."""

    def inspect_with(self, inspector: Inspector) -> None:
        self.inspections.inspector = inspector

    def name_outputs(self, tokens: Sequence[str], classes: Sequence[str]) -> None:
        """Does nothing: a script does not name its outputs."""

    def edit_with(self, edits: LiveEdits, travel: TimeTravel) -> None:
        """Does nothing: settings are changed in a run of one process only."""

    def at_end(self, call: Callable[[], None]) -> None:
        """Does nothing: nothing has to be undone in a child."""

    def script_started(self) -> None:
        """Does nothing: the parent started the script."""


class _ConnectAtFirstStep:
    """A sink that connects `client` once the first step has been recorded."""

    def __init__(self, client: RankClient) -> None:
        self._client = client
        self._started = False

    def take(self, items: Sequence[Item], status: Status) -> None:
        if not self._started and any(isinstance(item, StepRecorded) for item in items):
            self._started = True
            self._client.start()
        self._client.take(items, status)

    def close(self) -> None:
        self._client.close()


def _ignore(text: str) -> None:
    """A child process continues to train silently when its run has ended."""


def _nothing() -> None:
    pass


class ProgramReports:
    """Between `install` and `remove`, calls `report(text)` once for each Python program that the
    script starts by a command."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._reported: set[str] = set()
        self._pid = os.getpid()
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        self._wrap(subprocess.Popen, "__init__", 1)
        self._wrap(os, "system", 0)

    def remove(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _wrap(self, owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._started(args[place] if len(args) > place else kwargs.get("args"))
            return original(*args, **kwargs)

        def restore() -> None:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)

        setattr(owner, name, wrapper)
        self._restore.append(restore)

    def _started(self, command: Any) -> None:
        """Report a command that starts a Python program. Never raises, since scripts call this."""
        try:
            if os.getpid() != self._pid or (found := traced_command(command)) is None:
                return
            program, instead = found
            if program not in self._reported:
                self._reported.add(program)
                self._report(
                    f"{program} runs in a separate process, which is not traced: if it trains, "
                    f"start it with {instead}"
                )
        except Exception:
            return


def traced_command(command: Any) -> tuple[str, str] | None:
    """(program, command that traces it) if `command` starts a Python program of the user's."""
    words = _words(command)
    if any(os.path.basename(word) == "tui-trainer" for word in words):
        return None
    for place, word in enumerate(words):
        name = os.path.basename(word)
        if name in LAUNCHERS:
            script = next((w for w in words[place + 1 :] if w.endswith(".py")), None)
            return None if script is None else (script, f"tui-trainer run {name} … {script}")
        if word == sys.executable or PYTHON.fullmatch(name):
            return _of_python(words[place + 1 :])
        if place > 3:  # `env`, `nohup`, `CUDA_VISIBLE_DEVICES=0` and the like come before it
            break
    return None


def _words(command: Any) -> list[str]:
    if isinstance(command, (str, bytes)):
        text = os.fsdecode(command)
        return shlex.split(text, comments=True) if len(text) < 10_000 else []
    if isinstance(command, Sequence):
        return [os.fsdecode(word) for word in command]
    return []


def _of_python(arguments: list[str]) -> tuple[str, str] | None:
    rest = iter(arguments)
    for argument in rest:
        if argument in OPTIONS_WITH_VALUE:
            next(rest, None)
        elif argument == "-m":
            module = next(rest, "")
            if module in LAUNCHER_MODULES:
                script = next((word for word in rest if word.endswith(".py")), None)
                return None if script is None else (script, f"tui-trainer run torchrun … {script}")
            found = importlib.util.find_spec(module.partition(".")[0])
            if found is None or _is_installed(found.origin or ""):
                return None
            return f"-m {module}", f"tui-trainer run -m {module}"
        elif argument.startswith("-c"):
            return None
        elif not argument.startswith("-"):
            if not argument.endswith(".py") or _is_installed(os.path.abspath(argument)):
                return None
            return argument, f"tui-trainer run {argument}"
    return None


def _is_installed(path: str) -> bool:
    """Whether `path` belongs to Python or an installed package, not to the user's programs."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path in ("built-in", "frozen") or any(path.startswith(f + os.sep) for f in folders)
