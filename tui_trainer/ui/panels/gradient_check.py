"""A gradient of autograd next to numerical ones, in the inspector."""

from __future__ import annotations

from tui_trainer.protocol.autograd import CheckedEntry, GradientCheck
from tui_trainer.protocol.formatting import bytes_, number
from tui_trainer.ui.panels.base import title_line
from tui_trainer.ui.widgets.lines import BuiltLines, Row

WRONG, DOUBTFUL = 1e-2, 1e-4
"""Relative errors from which a gradient in float64 is wrong, and doubtful."""


class GradientCheckView(BuiltLines):
    """Each entry with its gradients, and the error against h."""

    lessons = ("gradient",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.check: GradientCheck | None = None
        self.message = ("", "")

    def show(self, check: GradientCheck | None, message: tuple[str, str]) -> None:
        """Show a check, or the reason and a hint why there is none."""
        self.check, self.message = check, message
        self._build()

    def _build(self) -> None:
        width = self.view_size.width
        if not self.is_attached or not width:
            return
        found = self.check
        self._built = [title_line(self, width, "Gradient check")]
        if found is not None:
            loss = f"loss {number(found.loss, 0, 7)} in {found.dtype}"
            copied = f"computed on a copy of {bytes_(found.copied_bytes, 0)}"
            self._built += [self.styled([(text, "dim")]) for text in (loss, copied)]
            for note in found.notes:
                self._built += self.wrapped_rows(note, "warning", width)
            for entry in found.entries:
                self._built += self._entry(entry, found.dtype == "float64", width)
        else:
            for text, style in zip(self.message, ("text", "dim"), strict=True):
                self._built += self.wrapped_rows(text, style, width)
        self.lines_changed()

    def _entry(self, entry: CheckedEntry, wide: bool, width: int) -> list[Row]:
        best = entry.steps[entry.best]
        place = f"[{', '.join(map(str, entry.index))}]"
        style = "good"
        if wide and best.central_error >= DOUBTFUL:
            style = "error" if best.central_error >= WRONG else "warning"
        rows: list[Row] = [[], title_line(self, width, place, right=f"w = {entry.value:.6g}")]
        for name, value, shown in (
            ("autograd", f"{entry.autograd:.8g}", "strong"),
            (f"numerical, h = {best.h:.0e}", f"{best.central:.8g}", "strong"),
            ("relative error", f"{best.central_error:.1e}", style),
        ):
            gap = max(1, width - len(name) - len(value))
            rows.append(self.styled([(name + " " * gap, "dim"), (value, shown)]))
        rows.append(self.styled([(f"{'h':>7}{'one-sided':>14}{'central':>12}", "dim")]))
        for index, step in enumerate(entry.steps):
            text = f"{step.h:>7.0e}{step.forward_error:>14.1e}{step.central_error:>12.1e}"
            mark = "  best" if index == entry.best else ""
            rows.append(self.styled([(text, "text"), (mark, "accent")]))
        return rows
