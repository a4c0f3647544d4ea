"""What the training thread tells of a run: taken at once into a bounded queue, looked at later.

The training thread only ever appends here; it never takes a lock that others hold while they work,
and never waits for a viewer, a disk or a socket.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.describe import Column, RunInfo, Table
from tui_trainer.protocol.messages import Artifact
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.recording.items import Lost, Rowed
from tui_trainer.recording.ledger import Ledger

QUEUE_STEPS = 4096
QUEUE_BYTES = 64 * 1024 * 1024
FAULTS_SAID = 200


class Intake:
    """The near end of the recorder: what it offers is for the training thread."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ids = threading.Lock()
        self._next_table = len(info.tables)
        self._incoming: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._capacity = QUEUE_STEPS
        self._overflow = 0
        self._overflow_said = 0
        self._ledger = Ledger(info, clock)
        self._paused_s: Callable[[], float] | None = None
        self._faults: set[str] = set()
        self._forked = False
        self.pace = self._ledger.pace
        self.describe_along: Callable[[], dict[str, Any]] = dict
        """What more to describe when the parameters are described, asked on the training thread."""

    def record(self, record: StepRecord) -> None:
        """Take the record of one optimizer step, in O(1); over the bound it is counted as lost."""
        if self._forked:
            return
        if len(self._incoming) >= self._capacity:
            self._overflow += 1
            return
        paused = self._paused_s() if self._paused_s else self.pace.paused_s
        excluded = paused + self.pace.aside_s
        self._incoming.append((self._ledger.take_step, (record, excluded)))

    def row(self, table: int, step: int, values: Floats) -> None:
        """Take a row measured outside a step, such as a validation."""
        self._enqueue(self._ledger.take_row, Rowed(table, step, values, self._clock()))

    def notice(
        self, kind: str, text: str, level: str = "info", step: int | None = None, who: str = ""
    ) -> None:
        """Say something worth a line in the log; `kind` as in `Notice`."""
        said = harmless(text)
        self._enqueue(
            self._ledger.take_notice, kind, said, level, step, harmless(who), self._clock()
        )

    def fault(self, where: str, fault: BaseException) -> None:
        """Say once that something of ours failed; training goes on."""
        if text := self._new_fault(where, fault):
            self.notice("fault", text, "error")

    def _new_fault(self, where: str, fault: BaseException) -> str:
        text = f"{where}: {type(fault).__name__}: {fault}"
        if text in self._faults or len(self._faults) >= FAULTS_SAID:
            return ""
        self._faults.add(text)
        return text

    def log(self, stream: str, text: str) -> None:
        """Take a line that the script or a library printed."""
        self._enqueue(self._ledger.take_log, stream, harmless(text), self._clock())

    def artifact(self, artifact: Artifact) -> None:
        """Take a sample to show; its id is set here."""
        self._enqueue(self._ledger.take_artifact, harmless_all(artifact))

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        """Declare a table under the next free id; returns the id."""
        with self._ids:
            number = self._next_table
            self._next_table += 1
        table = Table(number, name, tuple(columns), every, optimizer, natural)
        self._enqueue(self._take_tables, (table,))
        return number

    def declare(self, tables: Sequence[Table]) -> None:
        """Announce tables before their first rows, or change the cadence of known ones."""
        with self._ids:
            self._next_table = max([self._next_table, *(table.id + 1 for table in tables)])
        self._enqueue(self._take_tables, tuple(tables))

    def describe(self, **changes: Any) -> None:
        """Change fields of the `RunInfo`; its revision grows by itself."""
        if "parameters" in changes:
            changes = {**self.describe_along(), **changes}
        self._enqueue(self._ledger.take_description, changes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around an evaluation or a checkpoint on the training thread: not counted in the speed."""
        began = self._clock()
        try:
            yield
        finally:
            if not self.pace.paused:
                self.pace.aside_s += max(0.0, self._clock() - began)

    def pause_began(self) -> None:
        """The training thread has stopped at a gate."""
        self.pace.pause(self._clock())

    def pause_ended(self) -> None:
        """The training thread goes on."""
        self.pace.resume(self._clock())

    # ------------------------------------------------------------ taking in, by whoever drains it

    def _enqueue(self, take: Callable[..., None], *arguments: Any) -> None:
        if not self._forked:
            self._incoming.append((take, arguments))

    def _take_in(self) -> None:
        """Enter what waits into the ledger; one thread at a time."""
        incoming = self._incoming
        for _ in range(len(incoming)):
            take, arguments = incoming.popleft()
            try:
                take(*arguments)
            except Exception as fault:
                if text := self._new_fault("recorder", fault):
                    self._ledger.take_notice("fault", harmless(text), "error")
        if self._overflow > self._overflow_said:
            lost, self._overflow_said = self._overflow - self._overflow_said, self._overflow
            self._ledger.out.append(Lost(lost))
            self._ledger.take_notice(
                "fault", f"{lost} steps came too fast to be recorded", "warning"
            )

    def _take_tables(self, declared: tuple[Table, ...]) -> None:
        self._ledger.take_tables(declared)
        fitting = QUEUE_BYTES // max(1, self._ledger.row_bytes)
        self._capacity = max(64, min(QUEUE_STEPS, fitting))
