"""What of a store could not be read: gathered while it is read, said in one sentence."""

from __future__ import annotations

MOST_REMEMBERED = 10_000
"""Damaged things told apart; of more, the rest is not counted."""
INFO, STATE = "the run's description", "its last state"
EVENT, SAMPLE, LINE = "event", "sample", "line of output"
TABLE, STRETCH, STORY = "table", "stretch of measurements", "piece of the story"
_COUNTED = (TABLE, STRETCH, STORY, EVENT, SAMPLE, LINE)


class Damage:
    """Each damaged thing counts once, however often it is come upon."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, object]] = set()
        self._reasons: dict[str, None] = {}

    def note(self, what: str, which: object = None) -> None:
        """That `what` (INFO, EVENT, …) cannot be read; `which` of them."""
        if len(self._seen) < MOST_REMEMBERED:
            self._seen.add((what, which))

    def refused(self, reason: str) -> None:
        """That the database itself refused a question, and why."""
        if len(self._reasons) < 3:
            self._reasons[reason] = None

    def __str__(self) -> str:
        """One sentence for people; "" while nothing was found to be damaged."""
        if not self._seen and not self._reasons:
            return ""
        kinds = [what for what, _ in self._seen]
        parts = [what for what in (INFO, STATE) if what in kinds]
        parts += [_so_many(kinds.count(what), what) for what in _COUNTED if what in kinds]
        what = ", ".join(parts)
        why = "; ".join(self._reasons)
        if what and why:
            what += f" ({why})"
        return f"part of the recording cannot be read: {what or why}"


def _so_many(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    first, *rest = what.split(" ", 1)
    plural = f"{first}es" if first.endswith("ch") else f"{first}s"
    return " ".join([f"{count:,}", plural, *rest])
