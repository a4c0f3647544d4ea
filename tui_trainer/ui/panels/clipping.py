"""The clipping panel: the total gradient norm against its limit, and the clipped steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import CLIP_SCALE, GradientNormRange, HealthyRange
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.protocol.events import Clip
from tui_trainer.protocol.text import fit
from tui_trainer.ui.panels.base import (
    NO_STEP_YET,
    Figure,
    Panel,
    message_row,
    newest_row,
    unavailable_reason,
    user_event_marks,
)
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.chart import Chart, put_message
from tui_trainer.ui.widgets.chart_layers import AxisMarks, Band, Layer, Threshold
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.related import related_curves, related_legend

CLIPS_SHARE = 0.42
"""Share of the panel's height for the list of clipped steps."""
MIN_HEIGHT_FOR_CLIPS = 10
CLIP_FIGURES_WIDTH = 25
SHARE_WIDTH = 30
"""Cells for a parameter and its share, where there are at least twice as many."""
MIN_SHARE_WIDTH = 18


class ClippingPanel(Panel):
    """A chart of the norm with the limit, and below it the clipped steps with the parameters that
    contributed most to the norm."""

    lessons = ("clipping",)
    panel_title = "Clipping"
    # No `quantity`: the norm is shown even where nothing clips.

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart(include_zero=True)
        self.max_steps: int | None = None
        """Steps that the chart shows; None for the whole run."""
        self.clips = True
        """Whether the run clips, as far as known. If so, the clipped steps are listed."""
        self._norm_range = GradientNormRange()

    def toggle_log(self) -> None:
        """Switch between a linear and a logarithmic axis."""
        self.chart.toggle_log()
        self.update_rows()

    def content(self, size: Size) -> Sequence[Row]:
        """Title, chart, clipped steps."""
        clips_height = 0
        clips = self.clips
        reason = unavailable_reason(self.snapshot, "clip")
        self.panel_title = "Clipping" if clips else "Gradient norm"
        if clips and size.height >= MIN_HEIGHT_FOR_CLIPS:
            clips_height = max(3, int((size.height - 1) * CLIPS_SHARE))
        chart_height = size.height - 1 - (clips_height if clips else bool(reason))
        steps, layers, others = self._chart_layers(size.width)
        legend = related_legend(self, others, size.width)
        chart_height -= len(legend)
        rows = self.chart.rows(size.width, chart_height, steps, layers, self.palette, self.glyphs)
        if not layers:
            put_message(rows, NO_STEP_YET, self.palette.dim)
        # With several optimizers this is the norm of the first; the list has the clips of all.
        info = self.snapshot.info
        optimizer = info.optimizers[0] if info and len(info.optimizers) > 1 else ""
        right = [word for word in ("log" if self.chart.drawn_log else "", optimizer) if word]
        why = [message_row(reason, self.palette.dim)] if reason and not clips else []
        title = self.title_line(
            size.width, self._figures(), f" {self.glyphs.separator} ".join(right)
        )
        return [title, *legend, *rows, *why, *self._clipped_steps(size.width, clips_height)]

    def has_clipped(self, snapshot: Snapshot) -> bool:
        """Whether a clipping has been seen, in the newest step or as an event."""
        table = snapshot.history.table(schema.CLIP)
        row = newest_row(snapshot, table)[0] if table is not None else None
        if row is not None and table is not None:
            limit = table.column("max_norm")
            if limit is not None and math.isfinite(row[limit]):
                return True
        return any(isinstance(event, Clip) for event in snapshot.events)

    def _chart_layers(self, width: int) -> tuple[tuple[int, int], list[Layer], list[Figure]]:
        """The steps that the chart shows, its layers (none before the first step), and the legend
        of other runs."""
        snapshot, info = self.snapshot, self.snapshot.info
        table = snapshot.history.table(schema.STEP)
        last_step = (table.last_step or 0) if table is not None else 0
        total_steps = info.total_steps if info else None
        steps = step_window(last_step, self.max_steps, total_steps, self.slow_link)
        index = table.column("grad_norm_preclip") if table is not None else None
        if table is None or not table.rows or index is None:
            return steps, [], []
        columns = 2 * self.chart.plot_width(width)
        layers: list[Layer] = []
        clip = self._newest_clip()[0]
        limit = clip.get("max_norm", math.nan) / _loss_scale(clip)
        if math.isfinite(limit):
            layers.append(Threshold(self.palette.clip, limit))
        window = table.window([index], *steps, columns)
        lines, others = related_curves(
            self, self.snapshot.related, schema.STEP, "grad_norm_preclip", steps, columns
        )
        layers += lines
        layers.append(Band.from_window(window, 0, self.palette.norm))
        clipped = [event.step for event in snapshot.events if isinstance(event, Clip)]
        layers.append(
            AxisMarks.at_steps(clipped, steps, columns, self.palette.clip, self.glyphs.mark)
        )
        layers += user_event_marks(self, snapshot, steps, columns)
        return steps, layers, others

    def _newest_clip(self) -> tuple[dict[str, float], bool]:
        """The newest values of the clip table by column, {} before the first, and whether they are
        provisional."""
        table = self.snapshot.history.table(schema.CLIP)
        if table is None:
            return {}, False
        row, provisional = newest_row(self.snapshot, table)
        if row is None:
            return {}, False
        names = (column.name for column in table.table.columns)
        return dict(zip(names, row.tolist(), strict=True)), provisional

    def _figures(self) -> list[Figure]:
        palette, table = self.palette, self.snapshot.history.table(schema.STEP)
        if table is None or not table.rows:
            return []
        clip, provisional = self._newest_clip()
        healthy = self._norm_range.of(table)
        norm = clip.get("norm_before") if clip else table.newest_measured("grad_norm_preclip")
        clip_saw, loss_scale = norm, _loss_scale(clip)
        if norm is not None:
            norm /= loss_scale
        style = palette.provisional if provisional else palette.norm
        style = palette.clip if clip.get("scale", 1.0) < 1 else style
        figures = self._with_range("norm", norm, formatting.number(norm, 6, 3), style, healthy)
        if not clip:
            return figures
        if loss_scale != 1.0:
            figures.append(("clip saw", formatting.number(clip_saw, 0, 3), palette.warning))
            figures.append(("loss scale", formatting.number(loss_scale, 0), palette.warning))
        limit, scale = clip.get("max_norm", math.nan), clip.get("scale")
        of_limit = len(figures)
        figures.append(("limit", formatting.number(clip.get("max_norm"), 5, 3), palette.clip))
        figures += self._with_range(
            "scale", scale, formatting.number(scale, 5, 4), style, CLIP_SCALE
        )
        if why_absent(limit) is Absent.NO_LIMIT:
            figures[of_limit] = ("", "by hand", palette.clip)
        return figures

    def _with_range(
        self, label: str, value: float | None, text: str, style: Style, healthy: HealthyRange
    ) -> list[Figure]:
        """A value, followed by its healthy range when the value is outside."""
        if value is None or healthy.holds(value):
            return [(label, text, style)]
        name, _, limits = healthy.words.partition(" ")
        return [(label, text, self.palette.warning), (name, limits, self.palette.warning)]

    # ------------------------------------------------------------ the clipped steps

    def _clipped_steps(self, width: int, height: int) -> list[Row]:
        """The newest clips first, below a line of titles."""
        if height < 2:
            return []
        titles = self._clip_titles(width)
        clips = [event for event in self.snapshot.events if isinstance(event, Clip)]
        reason = unavailable_reason(self.snapshot, "clip")
        if reason or not clips:
            no_clip = "no step was clipped" if self.snapshot.status.step else ""
            return [titles, message_row(reason or no_clip, self.palette.dim)]
        return [titles, *(self._clip_row(clip, width) for clip in clips[:-height:-1])]

    def _clip_titles(self, width: int) -> Row:
        """Column titles, and how many of the last steps were clipped."""
        palette, status = self.palette, self.snapshot.status
        titles = "    step     norm  scale  dominated by, share"
        share = status.clipped_share
        if share is None:
            return [Segment(titles, palette.dim)]
        rate = f"{formatting.percent(share, 4, 0)} of last {status.clip_window}"
        if len(titles) + len(rate) + 2 > width:
            titles = titles.removesuffix(", share")
        if len(titles) + len(rate) + 2 > width:
            titles = titles.replace("dominated by", "by")
        gap = " " * max(1, width - len(titles) - len(rate))
        return [
            Segment(titles + gap, palette.dim),
            Segment(rate, palette.clip if share else palette.dim),
        ]

    def _clip_row(self, clip: Clip, width: int) -> Row:
        palette, info = self.palette, self.snapshot.info
        row: Row = [
            Segment(f"{clip.step:8,} ", palette.text),
            Segment(formatting.number(clip.norm_before, 8, 3), palette.clip),
            Segment(
                f" {formatting.number(clip.scale, 6, 3)} ",
                palette.text if CLIP_SCALE.holds(clip.scale) else palette.warning,
            ),
        ]
        if not clip.parameters:  # the norms of the parameters are measured less often
            return [*row, Segment(f" {self.glyphs.missing}", palette.dim)]
        left = width - CLIP_FIGURES_WIDTH
        needed = SHARE_WIDTH if left >= 2 * SHARE_WIDTH else max(MIN_SHARE_WIDTH, left)
        for index, share in zip(clip.parameters, clip.shares, strict=False):
            if needed > left or info is None or index >= len(info.parameters):
                break
            name = formatting.parameter_name(info.parameters[index].name)
            name = fit(name, needed - 7, left=True)
            row += (
                Segment(f" {name}", palette.dim),
                Segment(formatting.percent(share, 4, 0), palette.text),
                Segment("  ", palette.text),
            )
            left -= needed
        return row


def _loss_scale(clip: dict[str, float]) -> float:
    """The factor that a GradScaler still had on the clipped gradients; 1 without one."""
    scale = clip.get("gradient_scale", 1.0)
    return scale if math.isfinite(scale) and scale > 0 else 1.0
