"""The breakpoints of a run: connected to its gate and its recorder, and saved in its directory."""

from __future__ import annotations

from collections.abc import Sequence

from tui_trainer.breakpoints.breakpoint_list import Breakpoints
from tui_trainer.config.run_spec import RunSpec, save_breakpoints
from tui_trainer.protocol.events import Finding, Level, NoticeKind
from tui_trainer.protocol.messages import BreakpointStop
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate


class RunBreakpoints:
    """Creates the breakpoints of a run, and implements their `BreakpointHost`."""

    def __init__(self, spec: RunSpec, gate: Gate, recorder: Recorder) -> None:
        """With those that `spec` begins with."""
        self._gate = gate
        self._recorder = recorder
        self._directory = spec.directory
        self.all = Breakpoints(self)
        gate.breakpoints = self.all
        self.all.restore(spec.breakpoints)

    def save(self) -> None:
        """Write them into the run's directory. Not for the training thread."""
        try:
            save_breakpoints(self._directory, self.all.list())
        except OSError as error:
            self._recorder.fault("saving the breakpoints", error)

    @property
    def stopped_at(self) -> BreakpointStop | None:
        """The breakpoint at which the run is paused."""
        return self.all.stop if self._gate.mode == "paused" else None

    def forget_stop(self) -> None:
        """A user controls the run from here: forget the breakpoint."""
        self.all.stop = None

    # ------------------------------------------------------------ `breakpoints.Run`

    def info(self) -> RunInfo:
        return self._recorder.info

    def findings(self) -> Sequence[Finding]:
        return self._recorder.findings

    def notice(self, kind: NoticeKind, text: str, level: Level, step: int) -> None:
        self._recorder.notice(kind, text, level, step)

    def breakpoints_changed(self, breakpoints: Breakpoints) -> None:
        self._gate.break_phases = breakpoints.phases
        self._recorder.needed_tables = breakpoints.tables
        self._recorder.on_record = breakpoints.observe if breakpoints.phases else None
