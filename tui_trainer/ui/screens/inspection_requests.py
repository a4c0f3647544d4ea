"""The requests of a screen to inspect the run: the pending request, and the refusal, moment and
duration of the last answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from textual.screen import Screen

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import Phase
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.ui.screens import app_context

T = TypeVar("T")

NOT_RECORDED = "a recording holds what was measured, not the weights"
MIN_INTERVAL_S = 1.0
COST_SHARE = 0.05
"""Largest share of the time of a running run that answers take: the next request waits for
`MIN_INTERVAL_S`, and longer after a slow answer."""
MAX_RETRIES = 5


def _ignore() -> None: ...


class Moment(NamedTuple):
    """When a request was made, and of which rank."""

    step: int
    phase: Phase | Literal[""]
    rank: int
    edit: int
    """Id of the last edit; -1 for none (see `last_edit`)."""


class InspectionRequests:
    """Sends the requests of one screen. Only the answer to the newest request is used."""

    def __init__(self, screen: Screen[Any]) -> None:
        self._screen = screen
        self.pending: InspectionRequest | None = None
        """The request that is not answered yet."""
        self.asked_at: Moment | None = None
        """The moment of the last request that was not given up."""
        self.refusal = ("", "")
        """Message and hint of the last answer, where the run refused."""
        self.read_at, self.took_ms = "", 0.0
        """The step and phase that the last result belongs to, and how long it took."""
        self.due_at = 0.0
        """When to ask again while the run runs, on the monotonic clock."""
        self.retries = 0
        self._number = 0
        self._given_up: Callable[[], None] = _ignore

    def send(
        self,
        request: InspectionRequest,
        answered: Callable[[Inspected], None],
        given_up: Callable[[], None] = _ignore,
    ) -> None:
        """Send a request. Calls `given_up` instead of `answered` when the next request of this
        screen, or of another screen, replaces it."""
        self.give_up()
        self._number += 1
        number = self._number
        self.pending, self._given_up, self.asked_at = request, given_up, self.now()

        def arrived(answer: Inspected) -> None:
            if number == self._number and self._screen.is_mounted:
                self.pending = None
                answered(answer)

        def replaced() -> None:
            if number == self._number:
                self.give_up()

        app_context(self._screen).inspect(request, arrived, replaced)

    def now(self) -> Moment:
        context = app_context(self._screen)
        status, edit = context.snapshot.status, last_edit(context.snapshot)
        return Moment(status.step, status.phase, context.inspected_rank, edit)

    @property
    def in_front(self) -> bool:
        """False while another screen that inspects is in front: a run answers only the newest
        request, so this screen sends its own when it is in front again."""
        front = self._screen.app.screen
        other = getattr(front, "requests", None)
        return front is self._screen or not isinstance(other, InspectionRequests)

    def give_up(self) -> None:
        """Stop waiting for the answer to the pending request."""
        if self.pending is not None:
            self.pending = self.asked_at = None
            self._given_up()

    def forget(self) -> None:
        """Discard the pending request and the last answer: the screen shows another tensor now."""
        self.pending = self.asked_at = None
        self._number += 1
        self.refusal, self.read_at, self.took_ms = ("", ""), "", 0.0

    def result(self, answer: Inspected, kind: type[T]) -> T | None:
        """The result of an answer. Returns None and sets `refusal` when the run refused."""
        self.due_at = time.monotonic() + max(MIN_INTERVAL_S, answer.took_ms / 1e3 / COST_SHARE)
        if isinstance(answer.result, kind):
            self.refusal = ("", "")
            self.read_at, self.took_ms = answer.moment, answer.took_ms
            return answer.result
        self.refusal = (answer.message, answer.hint)
        return None

    @property
    def may_ask_again(self) -> bool:
        """Whether a running run may be read again now."""
        return self.pending is None and time.monotonic() >= self.due_at

    def may_retry(self) -> bool:
        """Count a retry of a request that the run was not ready for; False after the last one."""
        self.retries += 1
        return self.retries <= MAX_RETRIES

    def unavailable(self, snapshot: Snapshot, recorded: bool = False) -> tuple[str, str]:
        """(reason why the run cannot answer, hint), empty when it can. `recorded`: a replay can
        answer as well."""
        if self.refusal[0]:
            return self.refusal
        link = snapshot.link
        if snapshot.status.ended:
            return f"{ending(snapshot)}: its tensors are gone", ""
        if link.state == "replay":
            return ("", "") if recorded else (NOT_RECORDED, "")
        if link.state != "live":
            return link.message or "no connection to the run", link.hint
        return "", ""


def last_edit(snapshot: Snapshot) -> int:
    """The id of the last notice of an edit; -1 for none. An edit may change tensors and settings
    within a step, as when a script is rewound."""
    newest_first = reversed(snapshot.events)
    edits = (each.id for each in newest_first if isinstance(each, Notice) and each.kind == "edit")
    return next(edits, -1)


def ending(snapshot: Snapshot) -> str:
    """A clause that says how the run has ended."""
    state = snapshot.status.state
    return f"the run has {'been stopped' if state == 'stopped' else state}"
