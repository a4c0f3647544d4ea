"""Branches of a script: the steps after a rewind are also recorded as a separate run.

The process and its own recording continue. The branch has a directory next to it and counts its
steps from the restored step, so that it can be compared with the steps before the rewind.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from tui_trainer.config.run_spec import (
    RUN_NAME,
    SOCKET_POINTER_FILE,
    RunSpec,
    find_socket,
    write_spec,
)
from tui_trainer.protocol.events import (
    Artifact,
    ConfusionMatrix,
    Event,
    Finding,
    ImageSample,
    LogLine,
    NonFinite,
    TextSample,
)
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    Sink,
    StepRecorded,
)
from tui_trainer.record.sink_thread import SinkThread
from tui_trainer.record.status_file import StatusFile
from tui_trainer.runs.launch import free_name
from tui_trainer.store.writer import StoreWriter
from tui_trainer.trace.gate import Refusal

NOT_RESTORED = (
    "in the same process: the script's own variables and its place in the data are not restored, "
    "they continue"
)


Numbered = TypeVar("Numbered", Event, LogLine, Artifact)


@dataclass(frozen=True)
class Segment:
    """A range of the process's steps, and the recording that numbers them as its own."""

    after: int
    """The last step before the range, as numbered by the process."""
    name: str
    directory: Path
    offset: int
    """Step number in the process minus step number in the recording."""


class ScriptBranches:
    """The branches that one process has recorded. Used on the training thread."""

    def __init__(
        self, spec: RunSpec, recorder: Recorder, report: Callable[[str], None] = lambda _: None
    ) -> None:
        """`report`: see `StoreWriter`."""
        self._spec = spec
        self._recorder = recorder
        self._report = report
        self._segments = [Segment(0, spec.name, Path(spec.directory), 0)]
        self._current: tuple[SinkThread, BranchRecording] | None = None

    def new_directory(self, name: str = "") -> Path:
        """The directory of a new branch, by default with the next free name. Raises Refusal."""
        own = Path(self._spec.directory)
        taken = {segment.name for segment in self._segments}
        if not name:
            return own.with_name(free_name(own, taken))
        if not RUN_NAME.fullmatch(name):
            raise Refusal(f"a branch cannot be called {name!r}", "use letters, digits and . _ + -")
        directory = own.with_name(name)
        if directory.exists() or name in taken:
            raise Refusal(f"there is a run {name} already", "give the branch another name")
        return directory

    def begin(
        self, now: int, restored: int, directory: Path | None = None, changes: str = ""
    ) -> str:
        """Record the steps after step `now` of the process, whose state is now that of its step
        `restored`, as a branch. Returns the branch's name.

        Without a `directory`, a new one is created at the first step.
        """
        if self._current is not None:
            thread, recording = self._current
            self._current = None
            recording.left(f"the script was rewound to step {restored:,}")
            self._recorder.unsubscribe(thread)
            if self._segments[-1].after == now:  # without a step
                self._segments.pop()
        at_once = directory is not None
        directory = directory or self.new_directory()
        parent = self._segment_of(restored)
        step = restored - parent.offset
        spec = msgspec.structs.replace(
            self._spec,
            name=directory.name,
            directory=str(directory),
            parent=str(parent.directory),
            branch_step=step,
        )
        segment = Segment(now, directory.name, directory, now - step)
        recording = BranchRecording(
            spec, segment, f"step {step:,} of {parent.name}", changes, self._recorder, self._report
        )
        if at_once:
            recording.begin()
        self._segments.append(segment)
        self._current = self._recorder.subscribe(recording), recording
        return directory.name

    def _segment_of(self, step: int) -> Segment:
        """The segment that contains a step of the process."""
        later = [each for each in self._segments[1:] if each.after < step]
        return later[-1] if later else self._segments[0]


class BranchRecording(Sink):
    """Writes the store and the status of one branch, from the first step after `segment.after`."""

    def __init__(
        self,
        spec: RunSpec,
        segment: Segment,
        origin: str,
        changes: str,
        recorder: Recorder,
        report: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._segment = segment
        self._origin = origin
        self._changes = changes
        self._recorder = recorder
        self._report = report
        self._info: RunInfo | None = None
        self._started_at = time.time()
        self._sinks: tuple[StoreWriter, StatusFile] | None = None
        self._waiting: list[Item] = []
        self._ids = {"event": 0, "line": 0, "sample": 0}
        self._findings: dict[int, int] = {}
        """Number of a finding in the run → its number in the branch."""
        self._end: Status | None = None
        """The run's status when the script left this branch for another one."""
        self._ended = False
        self.begun = False

    def begin(self) -> None:
        """Create the branch's directory. Raises OSError."""
        write_spec(self._spec)
        own = find_socket(Path(self._spec.parent))
        if own is not None:  # commands for the branch go to the process that records it
            pointer = Path(self._spec.directory) / SOCKET_POINTER_FILE
            pointer.write_text(str(own), encoding="utf-8", errors="surrogateescape")
        self.begun = True

    def left(self, reason: str) -> None:
        """Note that the script was rewound again and continues in another branch. Called on the
        training thread, before the next step."""
        self._end = msgspec.structs.replace(self._recorder.status, reason=reason)

    def take(self, items: Sequence[Item], status: Status) -> None:
        renumbered = [found for item in items for found in self._renumbered(item)]
        if not self.begun and any(isinstance(item, StepRecorded) for item in renumbered):
            self.begin()
        if not self.begun or self._info is None:
            self._waiting += renumbered
            return
        status = self._status(status)
        if self._sinks is None:
            directory = self._spec.directory
            store = StoreWriter(directory, self._report)
            self._sinks = (store, StatusFile(directory, self._info))
            renumbered, self._waiting = [*self._waiting, *renumbered], []
            with_changes = f" with {self._changes}" if self._changes else ""
            text = f"branch {self._spec.name} continues from {self._origin}{with_changes}"
            self._recorder.notice("branch", f"{text}, {NOT_RESTORED}", step=self._segment.after)
        for sink in self._sinks:
            sink.take(renumbered, status)

    def close(self) -> None:
        if self._sinks is None:
            return
        if not self._ended:
            self._report_end()
        for sink in self._sinks:
            sink.close()
        with contextlib.suppress(OSError):
            (Path(self._spec.directory) / SOCKET_POINTER_FILE).unlink(missing_ok=True)

    def _report_end(self) -> None:
        assert self._sinks is not None
        status = self._end
        if status is None:
            status = msgspec.structs.replace(
                self._recorder.status, reason="its recording has ended"
            )
        status = msgspec.structs.replace(self._status(status), state="stopped", waiting_for="")
        for sink in self._sinks:
            sink.take([RunEnded(status)], status)

    # ------------------------------------------------------------ step numbers of the branch

    def _step(self, step: int) -> int:
        return max(self._spec.branch_step or 0, step - self._segment.offset)

    def _status(self, status: Status) -> Status:
        return msgspec.structs.replace(status, step=self._step(status.step), run_to=None)

    def _renumbered(self, item: Item) -> list[Item]:
        """The item as the branch records it; none for a step before the branch."""
        match item:
            case InfoChanged(info=info):
                self._info = self._described(info)
                return [InfoChanged(self._info)]
            case StepRecorded(record=record):
                if record.step <= self._segment.after:
                    return []
                return [StepRecorded(replace(record, step=self._step(record.step)))]
            case RowRecorded(step=step):
                if step <= self._segment.after:
                    return []
                return [replace(item, step=self._step(step))]
            case RunEnded(status=status):
                self._ended = True
                return [RunEnded(self._status(status))]
            case ItemsDropped():
                return [item]
            case LogLine():
                return [self._numbered(item, "line")]
            case TextSample() | ImageSample() | ConfusionMatrix():
                return [self._numbered(item, "sample")]
            case NonFinite(finite_at=int(before)):
                item = msgspec.structs.replace(item, finite_at=self._step(before))
            case Finding():
                item = self._finding(item)
            case _:
                pass
        return [self._numbered(item, "event")]

    def _numbered(self, item: Numbered, kind: str) -> Numbered:
        number = self._ids[kind]
        self._ids[kind] += 1
        return msgspec.structs.replace(item, id=number, step=self._step(item.step))

    def _finding(self, found: Finding) -> Finding:
        number = self._findings.setdefault(found.number, len(self._findings))
        cause = self._findings.get(found.cause) if found.cause is not None else None
        text = found.text
        if "step" in text and self._segment.offset:
            text += f" (its steps are {self._segment.offset:,} more: as the process counts)"
        return msgspec.structs.replace(
            found, number=number, cause=cause, onset=self._step(found.onset), text=text
        )

    def _described(self, info: RunInfo) -> RunInfo:
        total = info.total_steps
        return msgspec.structs.replace(
            info,
            name=self._spec.name,
            directory=self._spec.directory,
            parent=self._spec.parent,
            branch_step=self._spec.branch_step,
            started_at=self._started_at,
            pid=os.getpid(),
            total_steps=self._step(total) if total is not None else None,
        )
