"""Clipping: the total gradient norm against its threshold, and the ledger of events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.protocol import formatting as f
from tui_trainer.protocol import schema
from tui_trainer.protocol.messages import Clip
from tui_trainer.protocol.text import truncate_middle
from tui_trainer.ui.panels.base import (
    FIRST_STEP,
    Item,
    Panel,
    column,
    note,
    provisional,
    title_row,
    unseen,
)
from tui_trainer.ui.widgets.chart import Band, Chart, Layer, Marks, Rule
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import window
from tui_trainer.ui.widgets.text import user_marks

LEDGER_SHARE = 0.42


class ClippingPanel(Panel):
    """Norm, threshold, how often, and which parameters were to blame."""

    quantity = ""  # the norm is shown even where nothing clips

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart(zero=True)
        self.shown: int | None = None

    def toggle_log(self) -> bool:
        """Switch between a linear and a logarithmic axis; whether it is logarithmic now."""
        self.chart.log = not self.chart.log
        self.update_rows()
        return self.chart.log

    def title(self, width: int, items: Sequence[Item] = (), right: str = "") -> Row:
        """`Clipping` and its figures."""
        return title_row(self, width, "Clipping", items, right)

    def content(self, size: Size) -> Sequence[Row]:
        """Title, chart, ledger."""
        ledger = max(3, int((size.height - 1) * LEDGER_SHARE)) if size.height > 9 else 0
        tall = size.height - 1 - ledger
        steps, layers, items = self._read(size.width)
        info = self.snapshot.info
        # With several optimizers this is the first one's norm: the ledger has the clips of all.
        whose = info.optimizers[0] if info and len(info.optimizers) > 1 else ""
        dot = f" {self.glyphs.separator} "
        right = dot.join(word for word in ("log" if self.chart.log else "", whose) if word)
        rows = self.chart.rows(size.width, tall, steps, layers, self.palette, self.glyphs)
        if not layers:
            self.chart.say(rows, FIRST_STEP, self.palette)
        return [self.title(size.width, items, right), *rows, *self._ledger(size.width, ledger)]

    def _read(self, width: int) -> tuple[tuple[int, int], list[Layer], list[Item]]:
        snapshot, palette = self.snapshot, self.palette
        step = snapshot.history.table(schema.STEP)
        clip = snapshot.history.table(schema.CLIP)
        info = snapshot.info
        last = (step.last_step or 0) if step is not None else 0
        steps = window(last, self.shown, info.total_steps if info else None, self.slow_link)
        if step is None or not step.rows:
            return steps, [], []
        buckets = 2 * self.chart.plot_width(width)
        norm_at = column(step, "grad_norm_preclip")
        seen = step.window([norm_at], *steps, buckets)
        layers: list[Layer] = [Band.of(seen, 0, palette.norm)]
        items: list[Item] = []
        latest = step.latest()
        fresh = provisional(snapshot, clip) if clip is not None else None
        norm = float(latest[1][norm_at]) if latest is not None else None
        known = clip.latest() if clip is not None and clip.rows else None
        values = fresh if fresh is not None else known[1] if known is not None else None
        style = palette.provisional if fresh is not None else palette.norm
        if values is not None:
            threshold, before, _, scale = (float(v) for v in values[:4])
            layers.insert(0, Rule(palette.clip, threshold))
            clipped = palette.clip if scale < 1 else style
            items += [
                ("norm", f.number(before, 6, 3), clipped),
                ("limit", f.number(threshold, 5, 3), palette.clip),
                ("scale", f.number(scale, 5, 4), clipped),
            ]
        else:
            items.append(("norm", f.number(norm, 6, 3), palette.norm))
        events = [e.step for e in snapshot.events if isinstance(e, Clip)]
        if events:
            at = np.array(events, np.int64)
            inside = (at >= steps[0]) & (at < steps[1])
            places = (at[inside] - steps[0]) * buckets // max(1, steps[1] - steps[0])
            layers.append(Marks(palette.clip, places, self.glyphs.mark))
        layers += user_marks(snapshot, steps, buckets, palette, self.glyphs)
        return steps, layers, items

    def _ledger(self, width: int, height: int) -> list[Row]:
        if height < 2:
            return []
        palette = self.palette
        reason = unseen(self.snapshot, "clip")
        clips = [event for event in self.snapshot.events if isinstance(event, Clip)]
        rows = [self._ledger_title(width)]
        if reason or not clips:
            nothing = "no step was clipped so far" if self.snapshot.status.step else ""
            return [*rows, note(reason or nothing, palette.dim)]
        return rows + [self._event(clip, width) for clip in clips[:-height:-1]]

    def _ledger_title(self, width: int) -> Row:
        """Column titles, and how often the last steps were clipped."""
        palette, status = self.palette, self.snapshot.status
        text = "    step     norm  scale  dominated by, share"
        share = status.clipped_share
        if share is None:
            return [Segment(text, palette.dim)]
        rate = f"{100 * share:3.0f}% of last {status.clip_window}"
        if len(text) + len(rate) + 2 > width:
            text = text.removesuffix(", share")
        gap = max(1, width - len(text) - len(rate))
        return [
            Segment(text + " " * gap, palette.dim),
            Segment(rate, palette.clip if share else palette.dim),
        ]

    def _event(self, clip: Clip, width: int) -> Row:
        palette, info = self.palette, self.snapshot.info
        row: Row = [
            Segment(f"{clip.step:8,} ", palette.text),
            Segment(f.number(clip.norm_before, 8, 3), palette.clip),
            Segment(f" {f.number(clip.scale, 6, 3)} ", palette.text),
        ]
        if not clip.parameters:  # the norms of the parameters are measured less often
            return [*row, Segment(f" {self.glyphs.missing}", palette.faint)]
        left = width - 25
        each = 30 if left >= 60 else max(18, left)
        for index, share in zip(clip.parameters, clip.shares, strict=False):
            if each > left or info is None or index >= len(info.parameters):
                break
            name = info.parameters[index].name.removesuffix(".weight")
            shown = truncate_middle(name, each - 7, self.glyphs.ellipsis)
            row += (
                Segment(f" {shown:<{each - 7}}", palette.dim),
                Segment(f.percent(share, 4, 0), palette.text),
                Segment("  ", palette.text),
            )
            left -= each
        return row
