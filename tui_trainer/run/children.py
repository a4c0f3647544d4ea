"""Traces the processes that a script starts by `multiprocessing`, as members of its run.

A spawned child is told of the run in the data that `multiprocessing` prepares it with; a forked one
has a copy of the tracer, which is replaced. Either joins the run at its first optimizer step, so
workers that only load data never appear in it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import multiprocessing.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.messages import Status
from tui_trainer.record.events import Item, StepRecorded
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.context import create_tracer
from tui_trainer.run.environment import initial_info
from tui_trainer.run.import_hook import around_torch_import
from tui_trainer.run.outcome import Outcome, outcome_of
from tui_trainer.run.rank_client import RankClient
from tui_trainer.run.rank_control import RankObedience
from tui_trainer.trace.gate import Gate

if TYPE_CHECKING:
    from tui_trainer.run.checkpoints import CheckpointSaver
    from tui_trainer.trace.tracer import Tracer

FLUSH_S = 5.0
KEY = "tui_trainer"
"""Key of our entry in the data that prepares a spawned child; unknown keys are ignored there."""


class _JoinWhenUnpickled:
    """Unpickled in a spawned child, it has the child's torch traced. A child in which that fails
    trains as if alone."""

    def __init__(self, directory: str, label: str) -> None:
        self._code = (
            "try:\n"
            "    from tui_trainer.run.children import join_spawned\n"
            f"    join_spawned({directory!r}, {label!r})\n"
            "except Exception:\n"
            "    pass\n"
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (self._code, {})


class ChildTraces:
    """Between `install` and `remove`, children that this process starts join its run."""

    def __init__(self, directory: str, budget: float, tracer: Tracer) -> None:
        self._directory = directory
        self._budget = budget
        self._tracer: Tracer | None = tracer
        self._original: Callable[..., dict[str, Any]] | None = None

    def install(self) -> None:
        original = self._original = multiprocessing.spawn.get_preparation_data
        directory = self._directory

        def prepared(name: str) -> dict[str, Any]:
            data = original(name)
            data[KEY] = _JoinWhenUnpickled(directory, name)
            return data

        self._ours = prepared
        multiprocessing.spawn.get_preparation_data = prepared
        multiprocessing.util.register_after_fork(self, _join_forked)

    def remove(self) -> None:
        self._tracer = None
        if self._original and multiprocessing.spawn.get_preparation_data is self._ours:
            multiprocessing.spawn.get_preparation_data = self._original

    def join_forked(self) -> None:
        """In a forked child."""
        tracer, self._tracer = self._tracer, None
        process = multiprocessing.process.current_process()
        target = getattr(getattr(process, "_target", None), "__module__", "")
        if tracer is None:
            return
        from tui_trainer.trace.torch_private import DATA_LOADER_WORKER  # imports torch

        if target == DATA_LOADER_WORKER:  # which trains nothing
            return
        tracer.detach()
        ChildTraining(self._directory, process.name, self._budget).trace()


def _join_forked(traces: ChildTraces) -> None:
    try:
        traces.join_forked()
    except Exception as error:
        print(f"tui-trainer: this child process is not traced: {error}", file=sys.stderr)


def join_spawned(directory: str, label: str) -> None:
    """In a spawned child, before it imports anything of the script."""
    around_torch_import(lambda: None, ChildTraining(directory, label, 0.01).trace)


class ChildTraining:
    """The `RunContext` of a child process."""

    recording = False

    def __init__(self, directory: str, label: str, budget: float) -> None:
        self.spec = RunSpec(name=label, directory="", task="script", budget=budget)
        self.gate = Gate()
        self._directory = Path(directory)
        self._label = label

    def trace(self) -> None:
        """Trace this thread, once torch is imported. Never raises."""
        try:
            self.recorder = Recorder(initial_info(self.spec))
            obedience = RankObedience(self.gate)
            self._client = RankClient(
                -1, 1, self._label, lambda: self._directory, _say_nothing, obedience.descriptor
            )
            obedience.follow(self._client)
            self.recorder.subscribe(_FromFirstStep(self._client))
            self._tracer = create_tracer(self)
            self._tracer.attach()
            # Runs also where a forked child ends by os._exit.
            multiprocessing.util.Finalize(self, self._end, exitpriority=0)
        except Exception as error:
            print(f"tui-trainer: this child process is not traced: {error}", file=sys.stderr)

    def _end(self) -> None:
        error = sys.exc_info()[1]
        outcome = Outcome("finished") if error is None else outcome_of(error)
        self._tracer.detach()
        self.gate.end()
        status: Status = self.recorder.status
        self.recorder.close(FLUSH_S)
        if status.step:
            self._client.leave(outcome.state, outcome.reason, status.step)

    # ------------------------------------------------------------ RunContext

    def show_waiting_for(self, what: str) -> None:
        """No viewer is shown it."""

    def save_with(self, saver: CheckpointSaver) -> None:
        """No viewer can request one here."""

    def at_end(self, call: Callable[[], None]) -> None:
        """Nothing of the parent's is installed here."""

    def script_started(self) -> None:
        """It was started by its parent."""


class _FromFirstStep:
    """Connects a client at the first step."""

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


def _say_nothing(text: str) -> None:
    """A child process whose run has ended trains on."""
