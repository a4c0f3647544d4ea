"""What is known of a run, as it grows: items are taken in, in order, and made ready for sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tui_trainer.history import History
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol.describe import RunInfo, Table
from tui_trainer.protocol.messages import Artifact, LogLine, NonFinite, Status
from tui_trainer.protocol.text import harmless_all
from tui_trainer.recording.items import Described, Ended, Item, Rowed, Stepped
from tui_trainer.recording.pace import Pace
from tui_trainer.recording.telling import Tellings, in_short


class Ledger:
    """All that has been taken in. Used under the recorder's lock."""

    def __init__(self, info: RunInfo, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.info = harmless_all(info)
        self.status = Status()
        """As it was last set; see `status_now`."""
        self.history = History()
        self.pace = Pace()
        self.told = Tellings(clock)
        self.out: list[Item] = []
        """What sinks have not been handed yet."""
        self.first_nonfinite: NonFinite | None = None
        self.row_bytes = 0
        """About what a record with a row of every table holds."""
        self._described = False
        self._cadences_said = True
        self._ended_at: float | None = None

    @property
    def measured(self) -> bool:
        """Whether there is anything that somebody might look back at."""
        rows = any(table.rows for table in self.history.tables.values())
        return rows or self.told.artifacts.next_id > 0

    def end(self, **said: Any) -> None:
        """The run has ended, with these changes of its status."""
        self.pace.resume(self._clock())
        self._ended_at = self._clock()
        self.change_status(**said, waiting_for="", run_to=None)
        self._described = self._described and self._cadences_said
        self._say_description()
        self.out.append(Ended(self.status_now({})))

    def change_status(self, **changes: Any) -> None:
        """Change fields of the status."""
        self.status = harmless_all(msgspec.structs.replace(self.status, **changes))

    def _say_description(self) -> None:
        if not self._described:
            self._described = True
            self.out.append(Described(self.info))

    def take_step(self, record: StepRecord, excluded_s: float) -> None:
        """One optimizer step; `excluded_s` as in `Pace.add`."""
        record = in_short(record)
        self._say_description()
        tables = self.history.tables
        for table, values in record.rows:
            tables[table].append(record.step, values)
        self.status = msgspec.structs.replace(self.status, step=max(self.status.step, record.step))
        self.pace.add(record.step, record.time, self._step_ms(record), record.own_ms, excluded_s)
        clip = self.told.clip_in_force(record, self.info.tables)
        if clip is not None:
            self.pace.add_clip(clip)
        self.out.append(Stepped(record))
        events = self.told.events_of(record)
        self.out.extend(events)
        if self.first_nonfinite is None:
            self.first_nonfinite = next((e for e in events if isinstance(e, NonFinite)), None)

    def _step_ms(self, record: StepRecord) -> float:
        for table, values in record.rows:
            if self.info.tables[table].name == "step":
                # A step cannot have begun before the run did.
                return min(float(values[3]), (record.time - self.info.started_at) * 1e3)
        return 0.0

    def take_row(self, row: Rowed) -> None:
        """A row measured outside a step."""
        self._say_description()
        self.history.tables[row.table].append(row.step, row.values)
        self.out.append(row)

    def take_notice(
        self,
        kind: str,
        text: str,
        level: str = "info",
        step: int | None = None,
        who: str = "",
        when: float | None = None,
    ) -> None:
        """Something worth a line in the log."""
        at = self.status.step if step is None else step
        when = self._clock() if when is None else when
        self.out.append(self.told.notice(kind, text, level, at, who, when))

    def take_log(self, stream: str, text: str, when: float) -> None:
        """A line that was printed."""
        line = LogLine(self.told.log.next_id, when, self.status.step, stream, text)
        self.told.log.append(line)
        self.out.append(line)

    def take_artifact(self, artifact: Artifact) -> None:
        """A sample."""
        self.out.append(self.told.artifact(artifact))

    def take_tables(self, declared: tuple[Table, ...]) -> None:
        """Tables, new ones or with another cadence."""
        tables = list(self.info.tables)
        for table in declared:
            while table.id >= len(tables):  # ids reserved but not declared yet
                tables.append(Table(len(tables), "", ()))
            known = tables[table.id]
            if table.columns is not known.columns:
                table = harmless_all(table)
            tables[table.id] = table
            if not known.name or known.columns != table.columns:
                self.history.declare(table)
        cadences = tuple(table.every for table in tables)
        if self.info.with_cadences(cadences).tables == tuple(tables):
            self.info = self.info.with_cadences(cadences)
            self._cadences_said = False
        else:
            self.take_description({"tables": tuple(tables)})
        self.row_bytes = sum(4 * len(table.columns) + 64 for table in tables)

    def take_description(self, changes: dict[str, Any]) -> None:
        """Changes of the description."""
        changes = {name: harmless_all(value) for name, value in changes.items()}
        changed = msgspec.structs.replace(self.info, **changes)
        if changed != self.info:
            self.info = msgspec.structs.replace(changed, revision=self.info.revision + 1)
            self._described = False

    def status_now(self, live: dict[str, Any]) -> Status:
        """The status at this moment; `live`: the fields that change by themselves."""
        now = self._clock() if self._ended_at is None else self._ended_at
        info, pace, step = self.info, self.pace, self.status.step
        speed = pace.steps_per_second(None if self._ended_at else now)
        left = info.total_steps - step if info.total_steps is not None else None
        return msgspec.structs.replace(
            self.status,
            epoch=step / info.steps_per_epoch if info.steps_per_epoch else 0.0,
            steps_per_second=speed,
            items_per_second=speed * info.items_per_step if speed and info.items_per_step else None,
            elapsed_s=pace.elapsed_s(now),
            remaining_s=pace.remaining_s(left, now) if left and left > 0 else left and 0.0,
            cost_share=pace.cost_share()
            if self.status.cost_share is None
            else self.status.cost_share,
            clipped_share=pace.clipped_share(),
            **live,
        )
