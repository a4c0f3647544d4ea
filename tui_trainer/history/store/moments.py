"""What happened when in a recorded run: events, output, samples, and where to jump to."""

from __future__ import annotations

import msgspec
import numpy as np

from tui_trainer.history.store.database import Store
from tui_trainer.history.store.objects import decode_event
from tui_trainer.protocol.messages import Artifact, Event, LogLine
from tui_trainer.protocol.text import harmless, harmless_all

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
        return tuple(decode_event(data) for _, data in sorted(rows))

    def log(self, step: int, count: int) -> tuple[LogLine, ...]:
        """The last `count` lines printed up to a step, oldest first."""
        question = (
            "SELECT id, time, step, stream, text FROM log WHERE step <= ? ORDER BY id DESC LIMIT ?"
        )
        rows = reversed(self._store.ask(question, step, count))
        return tuple(
            LogLine(number, when, made, stream, harmless(text))
            for number, when, made, stream, text in rows
        )

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
        found = (msgspec.msgpack.decode(data, type=Artifact) for _, data in sorted(rows))
        return tuple(map(harmless_all, found))

    # ------------------------------------------------------------ jumping

    def next_event(self, kind: str, step: int, backwards: bool = False) -> int | None:
        """Step of the next event of a kind (`clip`, `nonfinite`, `mark`, …) after a step, or of the
        one before it; None when there is none."""
        question = (
            "SELECT step FROM event WHERE kind = ? AND step < ? ORDER BY step DESC LIMIT 1"
            if backwards
            else "SELECT step FROM event WHERE kind = ? AND step > ? ORDER BY step LIMIT 1"
        )
        found = self._store.ask(question, kind, step)
        return int(found[0][0]) if found else None

    def places(self, kind: str, last_step: int, cells: int) -> list[int]:
        """Which of `cells` equal stretches of steps 0..last_step hold an event of a kind."""
        question = (
            "SELECT DISTINCT min(step * ?1 / (?2 + 1), ?1 - 1) FROM "
            "(SELECT step FROM event WHERE kind = ?3 AND step <= ?2 LIMIT ?4)"
        )
        found = self._store.ask(question, cells, max(0, last_step), kind, EVENTS_PLACED)
        return sorted(int(cell) for (cell,) in found)

    # ------------------------------------------------------------ time

    def elapsed_s(self, step: int) -> float:
        """Seconds from the first recorded moment to when a step was made, pauses included."""
        began = self._store.ask("SELECT time FROM clock ORDER BY step LIMIT 1")
        before = self._store.ask(
            "SELECT step, time FROM clock WHERE step <= ? ORDER BY step DESC LIMIT 1", step
        )
        if not began or not before:
            return 0.0
        after = self._store.ask(
            "SELECT step, time FROM clock WHERE step > ? ORDER BY step LIMIT 1", step
        )
        known = [*before, *after]
        when = np.interp(step, [row[0] for row in known], [row[1] for row in known])
        return float(when) - float(began[0][0])

    def steps_per_second(self) -> float | None:
        """Over the whole run, pauses included."""
        ends = self._store.ask(
            "SELECT step, time FROM clock WHERE step IN "
            "((SELECT min(step) FROM clock), (SELECT max(step) FROM clock)) ORDER BY step"
        )
        if len(ends) < 2 or ends[1][1] <= ends[0][1]:
            return None
        return float((ends[1][0] - ends[0][0]) / (ends[1][1] - ends[0][1]))
