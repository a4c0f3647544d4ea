"""What happened when in a recorded run: events, output, samples, and where to jump to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tui_trainer.history.store.damage import EVENT, LINE, SAMPLE
from tui_trainer.history.store.database import UNREADABLE, Store
from tui_trainer.history.store.objects import decode_artifact, decode_event, read_line
from tui_trainer.protocol.messages import Artifact, Event, LogLine

T = TypeVar("T")
EVENTS_PLACED = 200_000
"""Events of a kind that are looked at to mark where there are some: the first so many."""


class Moments:
    """Answers about the time line of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def events(self, step: int, count: int) -> tuple[Event, ...]:
        """The last `count` clips up to a step and as many of the other events, oldest first: what
        somebody did is not lost among thousands of clips."""
        rows = [
            row
            for which in ("kind = 'clip'", "kind <> 'clip'")
            for row in self._store.ask(
                f"SELECT id, data FROM event WHERE {which} AND step <= ? "
                "ORDER BY step DESC, id DESC LIMIT ?",
                step,
                count,
            )
        ]
        return self._decoded(EVENT, sorted(rows, key=_by_id), decode_event)

    def log(self, step: int, count: int) -> tuple[LogLine, ...]:
        """The last `count` lines printed up to a step, oldest first."""
        question = (
            "SELECT id, time, step, stream, text FROM log WHERE step <= ? ORDER BY id DESC LIMIT ?"
        )
        rows = [(row[0], row) for row in reversed(self._store.ask(question, step, count))]
        return self._decoded(LINE, rows, read_line)

    def artifacts(self, step: int, count: int) -> tuple[Artifact, ...]:
        """The last `count` artifacts of each kind up to a step, oldest first."""
        question = (
            "SELECT id, data FROM artifact WHERE kind = ? AND step <= ? "
            "ORDER BY step DESC, id DESC LIMIT ?"
        )
        rows = [
            row
            for (kind,) in self._store.ask("SELECT DISTINCT kind FROM artifact")
            for row in self._store.ask(question, kind, step, count)
        ]
        return self._decoded(SAMPLE, sorted(rows, key=_by_id), decode_artifact)

    def event(self, number: int) -> Event | None:
        """One event; None where it cannot be read."""
        rows = self._store.ask("SELECT id, data FROM event WHERE id = ?", number)
        return next(iter(self._decoded(EVENT, rows, decode_event)), None)

    def line(self, number: int) -> LogLine | None:
        """One line of output; None where it cannot be read."""
        question = "SELECT id, time, step, stream, text FROM log WHERE id = ?"
        rows = [(row[0], row) for row in self._store.ask(question, number)]
        return next(iter(self._decoded(LINE, rows, read_line)), None)

    def artifact(self, number: int) -> Artifact | None:
        """One sample; None where it cannot be read."""
        rows = self._store.ask("SELECT id, data FROM artifact WHERE id = ?", number)
        return next(iter(self._decoded(SAMPLE, rows, decode_artifact)), None)

    def first_events(self, count: int) -> tuple[Event, ...]:
        """The first events that are no clips."""
        question = "SELECT id, data FROM event WHERE kind <> 'clip' ORDER BY id LIMIT ?"
        return self._decoded(EVENT, self._store.ask(question, count), decode_event)

    def _decoded(
        self, what: str, rows: Sequence[tuple[Any, ...]], decode: Callable[[Any], T]
    ) -> tuple[T, ...]:
        """Those of (id, data) that can be decoded."""
        found = []
        for number, data in rows:
            try:
                found.append(decode(data))
            except UNREADABLE:
                self._store.damage.note(what, number)
        return tuple(found)

    # ------------------------------------------------------------ jumping

    def next_event(self, kind: str, step: int, backwards: bool = False) -> int | None:
        """Step of the next event of a kind (`clip`, `nonfinite`, `mark`, …) after a step, or of the
        one before it; None when there is none."""
        question = (
            "SELECT step FROM event WHERE kind = ? AND step < ? ORDER BY step DESC LIMIT 1"
            if backwards
            else "SELECT step FROM event WHERE kind = ? AND step > ? ORDER BY step LIMIT 1"
        )
        found = self._store.numbers(question, kind, step)
        return int(found[0][0]) if found else None

    def places(self, kind: str, last_step: int, cells: int) -> list[int]:
        """Which of `cells` equal stretches of steps 0..last_step hold an event of a kind."""
        question = (
            "SELECT DISTINCT min(step * ?1 / (?2 + 1), ?1 - 1) FROM "
            "(SELECT step FROM event WHERE kind = ?3 AND step <= ?2 LIMIT ?4)"
        )
        found = self._store.numbers(question, cells, max(0, last_step), kind, EVENTS_PLACED)
        return sorted(int(cell) for (cell,) in found)

    # ------------------------------------------------------------ time

    def elapsed_s(self, step: int) -> float:
        """Seconds from the first recorded moment to when a step was made, pauses included."""
        began = self._store.numbers("SELECT time FROM clock ORDER BY step LIMIT 1")
        before = self._store.numbers(
            "SELECT step, time FROM clock WHERE step <= ? ORDER BY step DESC LIMIT 1", step
        )
        if not began or not before:
            return 0.0
        after = self._store.numbers(
            "SELECT step, time FROM clock WHERE step > ? ORDER BY step LIMIT 1", step
        )
        known = [*before, *after]
        when = np.interp(step, [row[0] for row in known], [row[1] for row in known])
        return float(when) - float(began[0][0])

    def steps_per_second(self) -> float | None:
        """Over the whole run, pauses included."""
        ends = self._store.numbers(
            "SELECT step, time FROM clock WHERE step IN "
            "((SELECT min(step) FROM clock), (SELECT max(step) FROM clock)) ORDER BY step"
        )
        if len(ends) < 2 or ends[1][1] <= ends[0][1]:
            return None
        return float((ends[1][0] - ends[0][0]) / (ends[1][1] - ends[0][1]))


def _by_id(row: tuple[Any, ...]) -> int:
    return row[0] if isinstance(row[0], int) else 0
