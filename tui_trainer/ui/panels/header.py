"""The lines at the top of the screens: the run and its state, its progress, facts about its data,
and a banner when something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import Skipped
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import strip_escapes, truncate, truncate_middle, wrap
from tui_trainer.ui.panels.base import Figure, Panel
from tui_trainer.ui.widgets.lines import DrawingContext, Row, Span

WIDE = 120
"""Columns from which the budget is shown with the overhead."""
FAR_OVER_BUDGET = 5.0
"""Multiple of the budget from which the overhead is shown as a warning. With steps of a few
milliseconds the overhead always exceeds the budget, which deserves no warning."""
STATE_WIDTH = 8
MIN_NAME_WIDTH = 10
"""Minimum number of cells for the title, and for the run's name, which is left out where room is
shorter."""
RESERVED_MESSAGE_WIDTH = 22
"""Maximum number of cells of the message that title and name leave free."""
MAX_DEVICE_WIDTH = 40
MIN_BAR_WIDTH = 12
MAX_BANNER_LINES = 3
"""Maximum number of lines of the message, and of the hint."""
NOTICEABLE_MS = 10
"""Latency from which the header shows it."""


class HeaderLine(Panel):
    """Title, name and state of the run, a message, and at the right device and connection.

    Where room is short, facts such as the device are left out first; then title and name are cut in
    the middle, and the message is shortened. State and connection stay, and so does the overhead
    unless the title would be cut to less than `MIN_NAME_WIDTH`.
    """

    DEFAULT_CSS = "HeaderLine { height: 1; }"

    _remote = False
    """Whether the connection has been slow enough for its latency to be shown."""
    _skipped: Skipped | None = None
    """The newest iteration without a step."""

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.events is not self.snapshot.events:
            newest_first = reversed(snapshot.events)
            self._skipped = next((e for e in newest_first if isinstance(e, Skipped)), None)
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        sign, word, state_style = self._state()
        link, link_style = self._link()
        message = strip_escapes(self._message())
        state = f"{sign} {word:<{STATE_WIDTH}}"
        if message and len(word) >= STATE_WIDTH:
            state += " "
        message_width = cell_len(message) + 2 if message else 2
        wide = size.width >= WIDE
        left = size.width - 4 - len(state) - cell_len(link)
        # The message of a breakpoint is worth more than the name of the run.
        stopped = self.snapshot.status.stopped_at is not None
        room = left - (message_width if stopped else min(message_width, RESERVED_MESSAGE_WIDTH))
        room = max(room, MIN_NAME_WIDTH) if stopped else room
        overhead_width = self._overhead_width(wide)
        if room - overhead_width < MIN_NAME_WIDTH:
            overhead_width = 0
        title, name = self._names(max(0, room - overhead_width))
        left -= cell_len(title) + cell_len(name)
        facts = self._facts(max(left - message_width, overhead_width), wide)
        left -= sum(segment.cell_length for segment in facts)
        cut = truncate if stopped else truncate_middle
        message = cut(message, max(0, left - 2), self.glyphs.ellipsis)
        gap = max(1, left - cell_len(message))
        row = self.styled([(f" {title}", "strong"), (name, "dim"), ("  ", "text")])
        row.append(Segment(state, state_style))
        row += self.styled([(f" {message}", "text"), (" " * (gap - 1), "text")])
        return [[*row, *facts, Segment(f"{link} ", link_style)]]

    def _names(self, room: int) -> tuple[str, str]:
        """The title, and the name by which to attach to the run unless it is the title, both cut
        in the middle where they do not fit into `room` cells."""
        info, ellipsis = self.snapshot.info, self.glyphs.ellipsis
        if info is None:
            return "tui-trainer", ""
        name = strip_escapes(info.name)
        title = strip_escapes(info.title).strip() or name or "tui-trainer"
        if not name.strip() or name == title or room < 2 * MIN_NAME_WIDTH:
            return truncate_middle(title, room, ellipsis), ""
        name_width = min(cell_len(name), max(room // 2, room - 2 - cell_len(title)))
        title = truncate_middle(title, room - 2 - name_width, ellipsis)
        return title, f"  {truncate_middle(name, name_width, ellipsis)}"

    def _state(self) -> tuple[str, str, Style]:
        """(sign, word, style)"""
        status, link = self.snapshot.status, self.snapshot.link
        palette, glyphs = self.palette, self.glyphs
        if status.state == "crashed":
            return glyphs.failed, "crashed", palette.error
        if status.ended:
            return glyphs.ended, status.state, palette.accent
        if link.state in ("lost", "closed"):
            return glyphs.failed, "no link", palette.error
        if status.state in ("paused", "running"):
            sign = glyphs.paused if status.state == "paused" else glyphs.running
            style = palette.warning if status.state == "paused" else palette.good
            return sign, status.state, palette.error if self._nonfinite_loss() else style
        return glyphs.waiting, status.state, palette.dim

    def _message(self) -> str:
        """The answer to the last command, or what the run is doing or why it is paused."""
        status = self.snapshot.status
        if answer := cast("DrawingContext", self.app).status_message:
            return answer
        if status.state == "paused" and status.stopped_at is not None:
            return f"at {status.stopped_at.reason}"
        if status.state == "paused":
            after = f"after {status.phase}" if status.phase else status.reason
            return after if status.ahead is None else f"{after}, back from step {status.ahead:,}"
        if status.state == "starting":
            return status.waiting_for
        if status.run_to is not None and not status.ended:
            return f"to step {status.run_to:,}"
        if status.throttle is not None and not status.ended:
            return f"at most {status.throttle:g} steps/s"
        return "" if status.ended else self._nonfinite_loss()

    def _nonfinite_loss(self) -> str:
        """`loss is nan` while the newest loss of an optimizer is not finite, even in an iteration
        without a step; else ""."""
        skipped = self._skipped
        of_skipped = {}
        if skipped is not None and skipped.step == self.snapshot.status.step + 1:
            of_skipped = dict(skipped.rows)
        for table in self.snapshot.history.tables_named(schema.STEP):
            loss = table.newest("loss")
            if (row := of_skipped.get(table.table.id)) is not None:
                values = np.frombuffer(row, "<f4", len(row) // 4)
                if len(values) == len(table.table.columns):
                    loss = float(values[schema.STEP_INDEX["loss"]])
            if loss is not None and not math.isfinite(loss) and why_absent(loss) is None:
                return f"loss is {formatting.number(loss, 0)}"
        return ""

    def _link(self) -> tuple[str, Style]:
        """The connection to the run, and its style."""
        link = self.snapshot.link
        slow = " slow link" if self.slow_link else ""
        if link.state == "live" and link.message:  # nothing has arrived for a while
            return f"{link.message}{slow}", self.palette.warning
        # Once shown, the latency stays, so that nothing moves when the connection gets faster.
        self._remote |= (link.latency_ms or 0) >= NOTICEABLE_MS
        live = self._remote and link.state == "live"
        latency = f" {formatting.milliseconds(link.latency_ms, 8)}" if live else ""
        broken = link.state == "lost" or (link.state == "closed" and not self.snapshot.status.ended)
        style = self.palette.error if broken else self.palette.dim
        return f"{self._role()}{slow}{latency}", style

    def _role(self) -> str:
        """The state of the link; with several viewers, whether this one controls the run."""
        link, status = self.snapshot.link, self.snapshot.status
        if link.read_only:
            return "read-only"
        if link.state != "live" or status.controller is None or len(status.viewers) < 2:
            return link.state
        return "in control" if status.controller == link.viewer_id else "watching"

    def _facts(self, room: int, wide: bool) -> Row:
        """Device, memory and overhead, as many as fit; the least important are left out first."""
        info, separator = self.snapshot.info, f" {self.glyphs.separator} "
        ellipsis = self.glyphs.ellipsis
        facts: list[tuple[int, Span]] = []
        """(rank, fact): a higher rank is left out earlier."""
        if info and info.device:
            device = info.device
            facts.append((3, (device.kind, "dim")))
            if name := truncate_middle(strip_escapes(device.name), MAX_DEVICE_WIDTH, ellipsis):
                facts.append((5 if device.kind == "cpu" else 2, (name, "dim")))
            if device.threads:
                facts.append((4, (formatting.counted(device.threads, "thread"), "dim")))
        if (memory := self._memory()) is not None:
            facts.append((1, (formatting.bytes_(memory, 0), "dim")))
        if (overhead := self._overhead(wide)) is not None:
            facts.append((0, overhead))
        while facts and sum(cell_len(text) + len(separator) for _, (text, _) in facts) > room:
            facts.remove(max(facts))
        return self.styled(span for _, fact in facts for span in (fact, (separator, "dim")))

    def _memory(self) -> float | None:
        """Bytes on the accelerator, or of the training process where there is none."""
        table = self.snapshot.history.table(schema.MEMORY)
        if table is None:
            return None
        values = (table.newest(name) for name in ("device_bytes", "host_bytes"))
        return next((value for value in values if value is not None and value == value), None)

    def _overhead_width(self, wide: bool) -> int:
        """Cells of the overhead and the separator after it."""
        overhead = self._overhead(wide)
        return len(overhead[0]) + 3 if overhead is not None else 0

    def _overhead(self, wide: bool) -> Span | None:
        """The share of step time that measuring takes; with its budget if `wide`."""
        share, info = self.snapshot.status.cost_share, self.snapshot.info
        if share is None:
            return None
        text = f"overhead {100 * share:.{2 if share < 0.09995 else 1}f} %"  # of constant width
        budget = info.budget if info else 0.0
        if wide and budget:
            text = f"{text} (budget {formatting.percent(budget, 0, 2)})"
        return text, "warning" if 0 < FAR_OVER_BUDGET * budget < share else "dim"


class ProgressLine(Panel):
    """A progress bar and step, speed, remaining time, epoch, elapsed time and throughput."""

    DEFAULT_CSS = "ProgressLine { height: 1; }"

    def rows(self, size: Size) -> Sequence[Row]:
        """One row; the figures that do not fit are left out, the last ones first."""
        row: Row = []
        left = size.width - 2 - MIN_BAR_WIDTH
        for label, value, style in self._figures():
            needed = len(label) + len(value) + (3 if label else 2)
            if needed > left:
                break
            row += (
                Segment("  ", self.palette.text),
                Segment(value, style),
                Segment(f" {label}" if label else "", self.palette.dim),
            )
            left -= needed
        bar = self._bar(MIN_BAR_WIDTH + max(0, left))
        return [[Segment(" ", self.palette.text), *bar, *row]]

    def _bar(self, width: int) -> Row:
        info, step = self.snapshot.info, self.snapshot.status.step
        total = info.total_steps if info else None
        filled = int(min(1.0, step / total) * width) if total else 0
        return [
            Segment(self.glyphs.bar * filled, self.palette.accent),
            Segment(self.glyphs.track * (width - filled), self.palette.faint),
        ]

    def _figures(self) -> list[Figure]:
        info, status, palette = self.snapshot.info, self.snapshot.status, self.palette
        total = info.total_steps if info else None
        width = len(f"{total:,}") if total else 9
        steps = f"{status.step:,}".rjust(width) + (f"/{total:,}" if total else "")
        figures: list[Figure] = [
            ("", f"step {steps}", palette.strong),
            ("steps/s", self._speed(), palette.text),
        ]
        if not status.ended:
            figures.append(("left", _clock(status.remaining_s), palette.text))
        if info and info.steps_per_epoch:
            figures.append(("epoch", f"{status.epoch:6.2f}", palette.text))
        figures.append(("elapsed", _clock(status.elapsed_s), palette.text))
        if info and info.items_per_step:
            throughput = formatting.count(status.items_per_second, 6)
            figures.append((f"{info.item_unit}/s", throughput, palette.text))
        return figures

    def _speed(self) -> str:
        speed = self.snapshot.status.steps_per_second
        if speed is None:
            return self.glyphs.missing.rjust(6)
        return f"{speed:6.1f}" if speed >= 1 else f"{speed:6.3f}"


def _clock(seconds: float | None) -> str:
    """A duration whose width changes only once, at an hour."""
    return formatting.duration(seconds, 5 if seconds is None or seconds < 3600 else 8)


class Banner(Panel):
    """A line across the screen when the run has ended or cannot be reached, with a hint below it;
    hidden otherwise."""

    DEFAULT_CSS = """
    Banner { height: 1; display: none; }
    Banner.-shown { display: block; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot, and appear or disappear."""
        self.snapshot = snapshot
        kind, message, hint = self._message()
        self.set_class(bool(kind), "-shown")
        lines = self._lines(message, hint, self.app.size.width)
        self.styles.height = max(1, len(lines))
        self.update_rows()

    def _lines(self, message: str, hint: str, width: int) -> list[tuple[str, bool]]:
        """(line, whether it belongs to the message) of the message and the hint. The lines have
        room for the file and line of an error; the log has longer texts in full."""
        found: list[tuple[str, bool]] = []
        for text, is_message in ((message.partition("\n")[0], True), (hint, False)):
            text = " ".join(strip_escapes(text).split())
            lines = wrap(text, max(1, width - 4)) if text else []
            if len(lines) > MAX_BANNER_LINES:
                last = f"{lines[MAX_BANNER_LINES - 1]} {lines[MAX_BANNER_LINES]}"
                last = truncate(last, max(1, width - 4), self.glyphs.ellipsis)
                lines = [*lines[: MAX_BANNER_LINES - 1], last]
            found += [(line, is_message) for line in lines]
        return found

    def _message(self) -> tuple[Literal["error", "warning", "end", ""], str, str]:
        """(kind, what happened, what to do about it)"""
        status, link = self.snapshot.status, self.snapshot.link
        if link.state == "replay" and link.message:  # the header says how the run ended
            return "warning", link.message, link.hint
        if status.state == "crashed" and status.refused:
            return "error", f"could not start: {status.reason}", status.hint
        if status.state == "crashed":
            return "error", f"crashed at step {status.step:,}: {status.reason}", status.hint
        if status.ended:
            reason = f": {status.reason}" if status.reason else ""
            return "end", f"{status.state} after {status.step:,} steps{reason}", status.hint
        if link.state == "lost":
            return "warning", link.message or "connection lost", link.hint
        if link.state == "closed":
            return "error", link.message or "the connection was closed", link.hint
        if status.recording:
            return "warning", status.recording, ""
        return "", "", ""

    def rows(self, size: Size) -> Sequence[Row]:
        """The message, and the hint below it."""
        kind, message, hint = self._message()
        style = "accent" if kind in ("end", "") else kind
        sign = self.glyphs.ended if kind == "end" else self.glyphs.failed
        rows: list[Row] = []
        for text, is_message in self._lines(message, hint, size.width):
            start = f" {sign} " if not rows else "   "
            rows.append(self.styled([(f"{start}{text}", f"{style} bold" if is_message else "dim")]))
        return rows


MAX_FACT_WIDTH = 40
SHOWN_IN_HEADER = ("device", "threads")
"""Facts that the header line shows in its own way."""


class FactsLine(Panel):
    """Facts about the data (images, characters, batches per epoch, …), as many as fit; hidden for
    runs that have none."""

    DEFAULT_CSS = """
    FactsLine { height: 1; display: none; }
    FactsLine.-known { display: block; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot. The line appears before its facts are known, so that nothing moves when
        they arrive."""
        info = snapshot.info
        starting = snapshot.status.state == "starting"
        expected = starting and info is not None and not info.is_script
        self.set_class(bool(info and info.facts) or expected, "-known")
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        info = self.snapshot.info
        text = ""
        for name, value in shown_facts(info) if info else ():
            name = truncate_middle(name, MAX_FACT_WIDTH, self.glyphs.ellipsis)
            value = truncate_middle(value, MAX_FACT_WIDTH, self.glyphs.ellipsis)
            longer = f"{text} {self.glyphs.separator} {name} {value}" if text else f"{name} {value}"
            if cell_len(longer) > size.width - 2:
                break
            text = longer
        return [self.styled([(f" {text}", "dim")])]


def shown_facts(info: RunInfo) -> list[tuple[str, str]]:
    """(name, value) of the facts about the data: counts first, then texts such as a path."""
    facts = [fact for fact in info.facts.items() if fact[0] not in SHOWN_IN_HEADER]
    facts.sort(key=lambda fact: isinstance(fact[1], str))
    return [(strip_escapes(name), strip_escapes(formatting.scalar(value))) for name, value in facts]
