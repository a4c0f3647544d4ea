"""`tui_trainer.watch(model, optimizer)`: records a run in a process that `tui-trainer` did not
start, such as a notebook or a script under its own launcher.

The run is recorded and served like any other: `tui-trainer ls` lists it and `tui-trainer attach`
shows, pauses and steps it. The process keeps its output and its signal handlers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from tui_trainer.config.run_spec import (
    RunSpec,
    create_run_directory,
    runs_directory,
    write_spec,
)
from tui_trainer.history import History
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import number, step_of
from tui_trainer.record.alerts import can_be_called
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.host import Host, WorkerStopHandler
from tui_trainer.run.outcome import STOPPED, Outcome, outcome_of
from tui_trainer.run.scalars import activated, active_log
from tui_trainer.run.script import trace, trace_children
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.security import check_directory
from tui_trainer.trace.gate import StopTraining
from tui_trainer.trace.torch_private import stored_values

if TYPE_CHECKING:
    from tui_trainer.trace.tracer import Tracer

Optimizer = torch.optim.Optimizer

UPDATE_EVERY_S = 1.0
"""How often the display in a notebook is redrawn."""
PICTURE_WIDTH, PICTURE_HEIGHT = 420, 90

_watched: WatchedRun | None = None
"""The run that `watch` has started in this process."""


class WatchError(RuntimeError):
    """The training loop cannot be watched; the message includes a hint."""


def watch(
    model: torch.nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    name: str | None = None,
    runs_dir: str | os.PathLike[str] | None = None,
    paused: bool = False,
    alert: str | Sequence[str] = (),
) -> Run:
    """Record the training loop of `model` from now on, and let terminals attach to it.

    `name`: name of the run; random by default. `paused`: wait at the first phase for a terminal.
    `alert`: commands or http(s) addresses to call at findings and at the end, as with `--alert`.

    Call `watch` between two iterations on the training thread; earlier steps are not recorded. The
    run ends with `close()`, at the end of a `with` block, or with the process. In a process started
    by `tui-trainer run`, `watch` returns the run that is already being recorded.

    Raises WatchError within an iteration or if another run is being watched, and TypeError or
    ValueError if the arguments are not a model and its optimizers.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    _check_arguments(model, optimizers)
    targets = (alert,) if isinstance(alert, str) else tuple(alert)
    if wrong := [target for target in targets if not can_be_called(target)]:
        raise ValueError(f"watch: {wrong[0]!r} is neither a command nor an http(s) address")
    if _watched is not None and _watched.open:
        raise WatchError(
            f"this process is already watched, as {_watched.name}\n"
            "  hint: end that run first: run.close(), or `with tui_trainer.watch(…):`"
        )
    if (active := active_log()) is not None:
        text = "tui_trainer.watch has no effect: this process is already being recorded"
        active.recorder.notice("state", text)
        return Run(active.recorder)
    _check_between_iterations(model, optimizers)
    return WatchedRun(_prepare(name, runs_dir, paused, targets), model, optimizers)


def _check_arguments(model: Any, optimizers: Sequence[Any]) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"watch(model, optimizer): the model is of type {type(model).__name__}")
    if not optimizers:
        raise ValueError("watch(model, optimizer): there is no optimizer")
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            kind = type(optimizer).__name__
            raise TypeError(f"watch(model, optimizer): the optimizer is of type {kind}")
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "watch(model, optimizer): the optimizer has none of the model's parameters"
        )


def _check_between_iterations(model: torch.nn.Module, optimizers: Sequence[Optimizer]) -> None:
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    gradients = [p.grad for p in {id(p): p for p in [*model.parameters(), *held]}.values()]
    with torch.no_grad():
        if any(g is not None and _any_nonzero(g) for g in gradients):
            raise WatchError(
                "there are gradients that no optimizer step has used: watch was called within an "
                "iteration\n"
                "  hint: call tui_trainer.watch before the loop, or after optimizer.zero_grad()"
            )


def _any_nonzero(gradient: torch.Tensor) -> bool:
    values = stored_values(gradient) if gradient.is_sparse else gradient
    return bool((values != 0).any())


# ---------------------------------------------------------------- the run's directory


def _prepare(
    name: str | None,
    runs_dir: str | os.PathLike[str] | None,
    paused: bool,
    alerts: tuple[str, ...],
) -> RunSpec:
    """Create the directory of the run. Raises WatchError."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    notebook = "ipykernel" in sys.modules
    title = "notebook" if notebook or program is None else os.path.basename(program)
    stem = re.sub(r"[^\w+-]+", "-", os.path.splitext(title)[0]).strip("-") or "watched"
    try:
        parent = runs_directory(runs_dir)
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_directory(parent)
        if name is None:
            name, directory = create_run_directory(stem, runs_dir)
        else:
            if not re.fullmatch(r"[\w][\w.+-]{0,99}", name):
                raise WatchError(f"{name!r} is not a valid name: use letters, digits and . _ + -")
            directory = parent / name
            directory.mkdir(mode=0o700)
    except FileExistsError as error:
        raise WatchError(f"a run named {name} already exists in {parent}") from error
    except (OSError, RunError) as error:
        raise WatchError(f"cannot create a run: {error}") from error
    spec = RunSpec(
        name=name,
        directory=str(directory),
        task=schema.SCRIPT,
        title=title,
        working_directory=os.getcwd(),
        command=tuple(argument.encode(errors="replace").decode() for argument in sys.argv),
        start_paused=paused,
        alerts=alerts,
    )
    write_spec(spec)
    return spec


# ---------------------------------------------------------------- handles


class Run:
    """A run in this process. Displays its current numbers as text, as a rich table and, in a
    notebook, as HTML with a loss curve."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._displays: list[Any] = []
        self._next_update = 0.0
        self._drawing = threading.Lock()
        self._drawn_to_the_end = False

    @property
    def name(self) -> str:
        return self.recorder.info.name

    @property
    def directory(self) -> Path:
        return Path(self.recorder.info.directory)

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        self._refresh()
        return self.recorder.status.step

    @property
    def loss(self) -> float | None:
        """Loss of the newest step; None before the first."""
        self._refresh()
        return self._newest().get("loss")

    def close(self) -> None:
        """End the run if `watch` started it. Further calls do nothing."""

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        self.close()
        return False

    def _refresh(self) -> None:
        """Record the newest steps, if called on the training thread."""

    # ------------------------------------------------------------ display

    def _newest(self) -> dict[str, float]:
        def read(history: History) -> dict[str, float]:
            tables = [t for t in history.tables_named(schema.STEP) if t.rows]
            if not tables:
                return {}
            newest = max(tables, key=lambda table: table.last_step or 0)
            names = ("loss", "grad_norm_preclip", "learning_rate")
            values = {name: newest.newest(name) for name in names}
            return {name: value for name, value in values.items() if value is not None}

        return self.recorder.read(read)

    def _rows(self) -> list[tuple[str, str]]:
        """The rows of a table of the current state."""
        self._refresh()
        status, info = self.recorder.status, self.recorder.info
        found = self._newest()
        rows = [("state", status.state), ("step", step_of(status.step, info.total_steps))]
        labels = {"loss": "loss", "grad_norm_preclip": "gradient norm", "learning_rate": "lr"}
        rows += [(label, number(found[key], 0)) for key, label in labels.items() if key in found]
        if status.steps_per_second:
            rows.append(("speed", f"{number(status.steps_per_second, 0, 3)} steps/s"))
        command = "replay" if status.ended else "attach"
        rows.append(("in a terminal", f"tui-trainer {command} {info.name}"))
        return rows

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value}" for name, value in self._rows()[:4])
        return f"<tui-trainer run {self.name}: {shown}>"

    def __rich__(self) -> Table:
        table = Table(title=Text(self.name), show_header=False)
        for name, value in self._rows():
            table.add_row(Text(name, "dim"), Text(value))
        return table

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='color:#888'>{escape(name)}</td><td>{escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<div><b>{escape(self.name)}</b><table>{cells}</table>{self._curve()}</div>"

    def _curve(self) -> str:
        """The loss over the steps as SVG; "" before the second step."""

        def read(history: History) -> tuple[Any, Any] | None:
            found = history.find(schema.STEP, "loss")
            if found is None:
                return None
            table, column = found
            first, last = table.first_step or 0, (table.last_step or 0) + 1
            window = table.window([column], first, last, PICTURE_WIDTH // 2)
            kept = window.filled & np.isfinite(window.last[:, 0])
            return window.edges[:-1][kept], window.last[:, 0][kept]

        points = self.recorder.read(read)
        if points is None or len(points[0]) < 2:
            return ""
        steps, losses = (np.asarray(each, np.float64) for each in points)
        x = (steps - steps[0]) / max(1.0, steps[-1] - steps[0]) * PICTURE_WIDTH
        span = float(losses.max() - losses.min()) or 1.0
        y = (losses.max() - losses) / span * PICTURE_HEIGHT
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return (
            f"<svg width='{PICTURE_WIDTH}' height='{PICTURE_HEIGHT + 22}' role='img'>"
            f"<title>loss of {escape(self.name)}</title>"
            f"<polyline points='{path}' transform='translate(0 4)' fill='none' stroke='#4c78a8' "
            "stroke-width='1.5'/>"
            f"<text x='0' y='{PICTURE_HEIGHT + 18}' font-size='11' fill='#888'>"
            f"loss {number(float(losses.max()), 0)} … {number(float(losses.min()), 0)}, "
            f"steps {int(steps[0]):,} to {int(steps[-1]):,}</text></svg>"
        )

    def _ipython_display_(self) -> None:
        """Display the run in a notebook and keep the display up to date."""
        shell = sys.modules.get("IPython")
        current = shell.get_ipython() if shell is not None else None
        if type(current).__name__ != "ZMQInteractiveShell":
            raise NotImplementedError  # IPython in a terminal then uses __repr__
        from IPython.display import HTML, display

        handle = display(HTML(self._repr_html_()), display_id=True)
        if handle is not None:
            if not self._displays:
                self.recorder.call_regularly(self._update_displays)
            self._displays = [*self._displays[-3:], handle]

    def _update_displays(self, final: bool = False) -> None:
        """Redraw the displays. Called on the recorder's thread, and a last time by the thread that
        closes the run."""
        if not self._displays or (time.monotonic() < self._next_update and not final):
            return
        self._next_update = time.monotonic() + UPDATE_EVERY_S
        from IPython.display import HTML

        with self._drawing:
            if self._drawn_to_the_end:
                return
            self._drawn_to_the_end = final
            picture = HTML(self._repr_html_())
            for handle in self._displays:
                handle.update(picture)


class WatchedRun(Run):
    """A run that `watch` has started."""

    def __init__(
        self, spec: RunSpec, model: torch.nn.Module, optimizers: Sequence[Optimizer]
    ) -> None:
        global _watched
        self._host = Host(spec, WorkerStopHandler)
        super().__init__(self._host.recorder)
        self._closing = threading.Lock()
        self._pid = os.getpid()
        self.open = True
        """Whether the run has not been closed yet."""
        self._host.open(None)
        self._scalars = contextlib.ExitStack()
        self._scalars.enter_context(activated(self._host.recorder, self._host.gate))
        tracers: list[Tracer] = []
        self._tracers = tracers
        trace(self._host, tracers, trace_children(self._host), sys._getframe(1))
        for tracer in tracers:
            tracer.register(model, optimizers)
        self._host.show_waiting_for("the first step")
        self._host.recorder.call_regularly(self._close_when_stopped)
        _watched = self
        atexit.register(self._close_at_exit)
        _report_stop_without_traceback()

    def _refresh(self) -> None:
        for tracer in self._tracers:
            if tracer.training_thread == threading.get_ident():
                tracer.flush()

    def close(self) -> None:
        """End the run and remove the tracer. Further calls do nothing."""
        self._close(STOPPED if self._host.gate.mode == "ended" else Outcome("finished"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        """Close the run. If a terminal has stopped it, `error` is a `StopTraining`, which is a
        KeyboardInterrupt."""
        self._close(Outcome("finished") if error is None else outcome_of(error))
        return False

    def _close(self, outcome: Outcome) -> None:
        with self._closing:
            if not self.open or self._pid != os.getpid():
                return
            self.open = False
            for tracer in self._tracers:
                tracer.detach()
            self._host.training_ended()
            self._scalars.close()
            self._host.stops.training_ended()
            self._host.close(outcome)
            with contextlib.suppress(Exception):
                self._update_displays(final=True)

    def _close_when_stopped(self) -> None:
        """Close the run after a terminal has stopped it, even if the loop continues."""
        if self._host.gate.mode == "ended" and self.open:
            threading.Thread(target=self.close, name="tui-trainer close", daemon=True).start()

    def _close_at_exit(self) -> None:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if isinstance(error, BaseException) and "IPython" not in sys.modules:
            self._close(outcome_of(error))
        else:
            self.close()


def _report_stop_without_traceback() -> None:
    """Print one line instead of a traceback when a script is stopped from a terminal."""
    previous = sys.excepthook
    if getattr(previous, "of_tui_trainer", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, StopTraining):
            print("tui-trainer: stopped on request", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.of_tui_trainer = True  # type: ignore[attr-defined]
    sys.excepthook = hook
