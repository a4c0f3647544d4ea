"""The terms of the optimizer's update of a weight or tensor, in the inspector."""

from __future__ import annotations

from tui_trainer.client.answers.tensors import exact, settings_text
from tui_trainer.protocol.inspection import UpdateExplanation
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.panels.base import title_line
from tui_trainer.ui.widgets.lines import BuiltLines, Row


class UpdateView(BuiltLines):
    """The formula of the optimizer, line by line, with the numbers of this step."""

    lessons = ("updates",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.explanation: UpdateExplanation | None = None
        self.message = ("", "")

    def show(self, explanation: UpdateExplanation | None, message: tuple[str, str]) -> None:
        """Show an explanation, or the reason and a hint why there is none."""
        self.explanation, self.message = explanation, message
        self._build()

    def _build(self) -> None:
        width = self.view_size.width
        if not self.is_attached or not width:
            return
        found = self.explanation
        if found is not None:
            self._built = [*self._head(found, width), *self._terms(found, width)]
            self._built += self._result(found, width)
        else:
            styles = ("text", "dim")
            self._built = [title_line(self, width, "Update")]
            for text, style in zip(self.message, styles, strict=True):
                self._built += self.wrapped_rows(text, style, width)
        self.lines_changed()

    def _head(self, found: UpdateExplanation, width: int) -> list[Row]:
        place = "whole tensor, in norms"
        if found.index is not None:
            place = f"entry [{', '.join(map(str, found.index))}]"
        figures = [("", place, self.palette.text)]
        count = f"its step t = {found.count:,}" if found.count else ""
        rows = [title_line(self, width, "Update", figures, count)]
        group = f"{found.optimizer}, group {found.group}"
        rows += self.wrapped_rows(group, "accent", width)
        return rows + self.wrapped_rows(settings_text(found.settings), "dim", width)

    def _terms(self, found: UpdateExplanation, width: int) -> list[Row]:
        rows: list[Row] = []
        for term in found.terms:
            value = f"{exact(term.value):>15}"
            room = max(4, width - 15 - 5)
            formula, *more = wrap(term.formula, room)
            spans = [(f"{term.name:<5}", "accent"), (formula.ljust(room), "text")]
            rows.append(self.styled([*spans, (value, "strong")]))
            for line in more:
                rows += self.wrapped_rows(line, "text", width, indent=5)
            rows += self.wrapped_rows(term.numbers, "dim", width, indent=5)
        return rows

    def _result(self, found: UpdateExplanation, width: int) -> list[Row]:
        after = found.actual is not None
        rows = [title_line(self, width, "After the step" if after else "Before the step")]
        before = "weight before" if found.index is not None else "norm before"
        pairs = [(before, exact(found.old)), ("predicted", exact(found.predicted))]
        if found.actual is not None and found.difference is not None:
            pairs.append(("actual", exact(found.actual)))
            pairs.append(("difference", f"{found.difference:.2g}"))
            pairs.append(("last place", f"{found.precision:.2g}"))
        gap = max(1, width - 15 - 15)
        rows += [
            self.styled([(f"{name:<15}{' ' * gap}", "dim"), (f"{value:>15}", "text")])
            for name, value in pairs
        ]
        for note in found.notes:
            rows += self.wrapped_rows(note, "warning", width)
        return rows
