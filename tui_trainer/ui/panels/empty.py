"""What stands where nothing can be shown: what is awaited, or why nothing will come."""

from __future__ import annotations

from textual.widgets import Static

from tui_trainer.protocol.messages import Status
from tui_trainer.session.api import Snapshot


class EmptyState(Static):
    """A line or two in the middle of an empty place; hidden while there is nothing to say."""

    DEFAULT_CSS = """
    EmptyState { width: 1fr; height: 1fr; content-align: center middle; text-align: center;
        color: $text-muted; display: none; background: $background; }
    EmptyState.-said { display: block; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self.said = ("", "")

    def say(self, what: str, hint: str = "") -> None:
        """Show this; "" hides it."""
        if (what, hint) != self.said:
            self.said = (what, hint)
            self.set_class(bool(what), "-said")
            self.update(f"{what}\n\n{hint}" if hint else what)


def awaited(snapshot: Snapshot, otherwise: str, *topics: str) -> tuple[str, str]:
    """(what, hint) for a place that has no data: the run's own reason for one of `topics`, what a
    run that has not begun is busy with, else `otherwise`."""
    if snapshot.info is not None:
        for topic in topics:
            if topic in snapshot.info.unseen:
                return snapshot.info.unseen[topic], ""
    status = snapshot.status
    if snapshot.link.state in ("lost", "closed") and snapshot.info is None:
        return snapshot.link.message or "no connection to the run", snapshot.link.hint
    if status.ended:
        return _ended(status), status.hint
    if snapshot.info is None or status.step == 0:
        doing = (
            f"waiting: {status.waiting_for}" if status.waiting_for else "waiting for the first step"
        )
        return f"{doing} …", ""
    return otherwise, ""


def _ended(status: Status) -> str:
    reason = f": {status.reason}" if status.reason else ""
    return f"the run {status.state} at step {status.step:,}{reason}"
