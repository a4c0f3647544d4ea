"""Runs a user's unmodified script as python would, traced from the script's import of torch on.

The script gets its own `sys.argv`, `sys.path[0]` and a real `__main__` module, so that pickling its
classes and starting worker processes (fork, spawn, forkserver) work. It keeps the working
directory, and may set its own signal handlers.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import runpy
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.run.child_processes import ChildTraces
from tui_trainer.run.context import RunContext, create_tracer
from tui_trainer.run.environment import busy_cores_warning, device_info, with_torch_versions
from tui_trainer.run.import_hook import around_torch_import
from tui_trainer.run.outcome import STOPPED, Outcome
from tui_trainer.trace.gate import StopTraining

if TYPE_CHECKING:
    import torch

    from tui_trainer.trace.tracer import Tracer
    from tui_trainer.travel.snapshots import Stateful

_kept_alive: list[types.ModuleType] = []


def train_script(run: RunContext) -> Outcome:
    """Run the script to its end. Raises whatever the script raises, except `StopTraining`."""
    spec = run.spec
    if spec.resume is not None:
        raise ConfigurationError(
            "a script resumes by its own means",
            "give the script its own option for it; a run's checkpoints hold weights and "
            "optimizers as safetensors",
        )
    load = load_module if spec.module else load_script
    program = load(spec.script or "", spec.arguments)
    tracers: list[Tracer] = []
    children = trace_children(run)
    remove_hook = around_torch_import(
        lambda: run.show_waiting_for("importing torch"), lambda: trace(run, tracers, children)
    )
    if children is not None and not tracers:
        children.untrace = remove_hook
    run.show_waiting_for("the script's first step")
    run.script_started()
    try:
        program.run()
    except StopTraining:  # the gate has already written a checkpoint if one was requested
        return STOPPED
    finally:
        for tracer in tracers:
            tracer.detach()
    return STOPPED if run.gate.mode in ("stopping", "ended") else Outcome("finished")


# ---------------------------------------------------------------- tracing


def trace_children(run: RunContext) -> ChildTraces | None:
    """Trace the child processes of the script from here on, if this process records."""
    if not run.recording:
        return None
    children = ChildTraces(run)
    children.install()
    run.at_end(children.remove)
    return children


def trace(
    run: RunContext,
    tracers: list[Tracer],
    children: ChildTraces | None,
    started_in: types.FrameType | None = None,
) -> None:
    """Trace this thread from here on; no exception reaches the script. Appends to `tracers`.

    `started_in`: the frame of a loop that may be running already.
    """
    try:
        from tui_trainer.run.checkpoints import CheckpointSaver
        from tui_trainer.run.frameworks import observe_frameworks
        from tui_trainer.run.progress import Progress

        tracer = create_tracer(run)
        progress = Progress(run, tracer, started_in)
        tracer.attach()
        tracers.append(tracer)
        if children is not None:
            children.untrace = tracer.detach
        run.at_end(observe_frameworks(run, progress, tracer))
        run.at_end(progress.close)
        if not run.recording:
            return
        run.show_waiting_for("the script's first step")
        run.recorder.describe(versions=with_torch_versions(run.recorder.info.versions))
        saver = CheckpointSaver(run.spec, run.recorder, lambda: _visible_state(tracer))
        run.gate.call_every(saver.cadences, saver.after_step)
        run.save_with(saver)
        run.recorder.describe_with(_DeviceOfScript(run, tracer))
    except Exception as error:
        run.recorder.fault("tracing the script", error)


class _DeviceOfScript:
    """The device as a field of `RunInfo`, known once the script has called its model."""

    def __init__(self, run: RunContext, tracer: Tracer) -> None:
        self._run = run
        self._tracer = tracer
        self._warned = False

    def __call__(self) -> dict[str, Any]:
        torch = sys.modules["torch"]
        threads = torch.get_num_threads()
        device = next((device_info(model, threads) for model in self._tracer.roots), None)
        warning = busy_cores_warning(threads)
        if device is not None and device.kind == "cpu" and warning and not self._warned:
            self._warned = True
            self._run.recorder.notice("threads", warning)
        return {"device": device}


def _visible_state(tracer: Tracer) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Stateful]]:
    """Weights of the models that the script calls, and its optimizers."""
    weights: dict[str, torch.Tensor] = {}
    for number, model in enumerate(tracer.roots):
        prefix = "" if number == 0 else f"{type(model).__name__}#{number + 1}."
        weights.update({f"{prefix}{name}": value for name, value in model.state_dict().items()})
    stateful: dict[str, Stateful] = {}
    for measurer in tracer.registry.measurers:
        optimizer = tracer.registry.optimizer_of(measurer)
        if optimizer is not None:
            stateful[measurer.tracked.name] = optimizer
    return weights, stateful


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Program:
    """A compiled script or module and the `__main__` module that it runs in."""

    code: types.CodeType
    module: types.ModuleType
    argv: tuple[str, ...]
    path_entry: str

    def run(self) -> None:
        """Execute the program to its end; raises whatever the program raises."""
        sys.argv = list(self.argv)
        if sys.flags.safe_path:
            sys.path.insert(0, self.path_entry)
        else:
            sys.path[0] = self.path_entry
        _kept_alive.append(sys.modules["__main__"])  # its globals may still be in use
        sys.modules["__main__"] = self.module
        exec(self.code, self.module.__dict__)


def load_script(path: str, arguments: tuple[str, ...]) -> Program:
    """The program of `python path arguments`: a file, or a folder with a `__main__.py`.

    Raises ConfigurationError when there is no such file, SyntaxError when it is not Python.
    """
    if os.path.isdir(path):
        return _load_folder(path, arguments)
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except FileNotFoundError:
        raise ConfigurationError(f"there is no script {path}", _other_scripts(path)) from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from None
    absolute = os.path.abspath(path)  # as python does; argv keeps the path as given
    code = compile(source, absolute, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    module = _main_module(absolute, loader)
    folder = os.path.dirname(os.path.realpath(path))
    return Program(code, module, (path, *arguments), folder)


def _load_folder(path: str, arguments: tuple[str, ...]) -> Program:
    entry = os.getcwd() if path == "." else os.path.join(os.getcwd(), path)
    spec = importlib.machinery.PathFinder.find_spec("__main__", [entry])
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        raise ConfigurationError(
            f"{path} is a folder without a __main__.py", "name the script in it that trains"
        )
    code = spec.loader.get_code("__main__")
    assert code is not None  # otherwise get_code raises SyntaxError
    return Program(code, _module_of(spec), (path, *arguments), entry)


def load_module(name: str, arguments: tuple[str, ...]) -> Program:
    """The program of `python -m name arguments`. Raises ConfigurationError if it is not found."""
    if sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    else:
        sys.path[0] = os.getcwd()
    try:
        _, spec, code = runpy._get_module_details(name, ConfigurationError)  # type: ignore[attr-defined]
    except ConfigurationError as error:
        raise ConfigurationError(f"cannot run module {name}: {error}") from None
    finally:
        if sys.flags.safe_path:
            del sys.path[0]
    return Program(code, _module_of(spec), (spec.origin, *arguments), os.getcwd())


def _module_of(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
    module = _main_module(spec.origin or "", spec.loader)
    module.__spec__ = spec
    module.__package__ = spec.parent
    module.__dict__["__cached__"] = spec.cached
    return module


def _main_module(path: str, loader: Any) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(
        __file__=path,
        __builtins__=builtins,
        __loader__=loader,
        __spec__=None,
        __package__=None,
        __cached__=None,
        __annotations__={},
        __doc__=None,
    )
    return module


def _other_scripts(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"there is no folder {folder} either"
    found = sorted(entry for entry in os.listdir(folder) if entry.endswith(".py"))
    if not found:
        return f"{folder} contains no Python file"
    return f"{folder} contains {', '.join(found[:8])}"
