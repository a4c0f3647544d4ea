"""Parameter groups and memory of a run, and a table of its parameters with what is unusual about
each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len
from textual.message import Message

from tui_trainer.client.answers.tensors import KIND_NAMES, QUIET_SETTINGS
from tui_trainer.protocol.formatting import bytes_, count, counted, scalar
from tui_trainer.protocol.inspection import HeldBytes, OptimizerGroup, ParameterUse
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.panels.base import title_line
from tui_trainer.ui.widgets.lines import BuiltLines, Row, Span
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

BAR_WIDTH = 16
MAX_GROUP_WIDTH = 20


class GroupsView(BuiltLines):
    """The groups with their hyper-parameters, and the bytes of each kind of tensor by device."""

    lessons = ("param-groups",)

    class Rebuilt(Message):
        """The lines were built again, for other content or another width."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.use: ParameterUse | None = None

    def show(self, use: ParameterUse | None) -> None:
        self.use = use
        self._build()

    def _build(self) -> None:
        width = self.view_size.width
        if not self.is_attached or not width:
            return
        use = self.use
        self._built = [*self._groups(use, width), *self._memory(use, width)] if use else []
        self.lines_changed()
        self.post_message(self.Rebuilt())

    def _groups(self, use: ParameterUse, width: int) -> list[Row]:
        rows = [title_line(self, width, "Groups")]
        if not use.groups:
            rows.append(self.styled([("no optimizer is known yet", "dim")]))
        for group in use.groups:
            size = f"{counted(group.parameters, 'parameter')}, {count(group.elements, 0)} entries"
            name = f"{group.optimizer}, group {group.number}"
            rows.append(self.styled([(name, "accent"), (f"  {size}", "text")]))
            rows += self._settings(group, _differing(use, group), width)
        return rows

    def _settings(self, group: OptimizerGroup, differing: set[str], width: int) -> list[Row]:
        """The settings of a group; those that differ between groups are emphasised."""
        rows: list[Row] = []
        spans: list[Span] = [("  ", "text")]
        used = 2
        for name, value in group.settings.items():
            if name in QUIET_SETTINGS or (not value and name not in differing):
                continue
            text = scalar(value)
            needed = len(name) + cell_len(text) + 3
            if used + needed > width and used > 2:
                rows.append(self.styled(spans))
                spans, used = [("  ", "text")], 2
            style = "strong" if name in differing else "text"
            spans += [(f"{name} ", "dim"), (f"{text}  ", style)]
            used += needed
        return [*rows, self.styled(spans)]

    def _memory(self, use: ParameterUse, width: int) -> list[Row]:
        held = [each for each in use.memory if each.kind != "saved"]
        total = bytes_(sum(each.bytes for each in held), 0)
        rows = [[], title_line(self, width, "Memory", [("", total, self.palette.text)])]
        most = max((each.bytes for each in use.memory), default=0) or 1
        device = max((cell_len(each.device) for each in use.memory), default=0)
        rows += [self._held(each, most, device, width) for each in use.memory]
        if use.graph_missing:
            text = f"saved for backward: unknown, {use.graph_missing}"
            rows += [self.styled([(line, "dim")]) for line in wrap(text, width)]
        return rows

    def _held(self, held: HeldBytes, most: int, device: int, width: int) -> Row:
        room = min(BAR_WIDTH, width - 19 - device - 11 - 2)
        length = max(1, round(held.bytes / most * room)) if held.bytes and room > 3 else 0
        style = "dim" if held.kind == "saved" else "k"
        return self.styled([
            (f"{KIND_NAMES[held.kind]:<19}", "text"),
            (f"{held.device:<{device}}", "dim"),
            (f"{bytes_(held.bytes, 0):>11}  ", "strong"),
            (self.glyphs.bar * length, style),
        ])  # fmt: skip


def _differing(use: ParameterUse, group: OptimizerGroup) -> set[str]:
    """The settings that are not the same in all groups of an optimizer."""
    same = [each.settings for each in use.groups if each.optimizer == group.optimizer]
    return {name for name in group.settings if len({str(s.get(name)) for s in same}) > 1}


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class ParameterRow:
    """A parameter, the group that updates it, and what is unusual about it."""

    name: str
    group: str
    """Optimizer and number of the group, such as `adamw 0`; "" for none."""
    notes: tuple[tuple[str, str], ...] = ()
    """(text, style), the most serious one first."""


def parameter_rows(use: ParameterUse) -> list[ParameterRow]:
    """The parameters, noteworthy ones first, then all others in the order of their groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for group in use.groups:
        for name in group.names:
            groups[name].append(f"{group.optimizer} {group.number}")
    notes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for names, note, style in (
        (use.without_optimizer, "in no optimizer", "warning"),
        (use.unused, "not used by the loss", "warning"),
        (sorted({*use.without_gradient} - {*use.unused}), "no gradient", "warning"),
        (use.frozen, "frozen", "dim"),
    ):
        for name in names:
            notes[name].append((note, style))
    for same in use.shared:
        kept = next((name for name in same if name in groups), same[0])
        others = ", ".join(name for name in same if name != kept)
        notes[kept].append((f"= {others}", "accent"))
    rows = [
        ParameterRow(name, ", ".join(groups.get(name, ())), tuple(notes[name])) for name in notes
    ]
    return rows + [
        ParameterRow(name, ", ".join(of)) for name, of in groups.items() if name not in notes
    ]


class ParameterUseTable(VirtualTable):
    """A row for each parameter; enter inspects it."""

    lessons = ("param-groups",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.header_height = 1
        self.placeholder = "no parameter is known yet"
        self.listed: list[ParameterRow] = []
        self.left_out = 0
        self.columns = self._columns(9)

    def _columns(self, group: int) -> tuple[TableColumn, ...]:
        """`group`: cells of the longest name of a group."""
        widest = max((len(row.name) for row in self.listed), default=20)
        noted = max((len(self._note(row)) for row in self.listed), default=0)
        columns = [
            TableColumn("name", "parameter", min(max(widest, 12), 48), self._parameter, left=True),
            TableColumn("group", "group", group, self._updated_by, left=True),
        ]
        if noted:
            columns.append(TableColumn("note", "note", 0, self._noted, left=True))
        return tuple(columns)

    def show(self, use: ParameterUse | None) -> None:
        self.listed = parameter_rows(use) if use is not None else []
        groups = use.groups if use is not None else ()
        self.left_out = sum(group.parameters - len(group.names) for group in groups)
        widest = max((cell_len(row.group) for row in self.listed), default=9)
        self.columns = self._columns(min(max(widest, 5), MAX_GROUP_WIDTH) + 1)
        self.set_order(np.arange(len(self.listed)))
        self.update_rows()

    def header(self, width: int) -> list[Row]:
        noted = sum(bool(row.notes) for row in self.listed)
        figures = [("", f"{len(self.listed) + self.left_out:,}", self.palette.text)]
        if noted:
            figures.append(("with a note", f"{noted:,}", self.palette.accent))
        if self.left_out:
            figures.append(("not listed", f"{self.left_out:,}", self.palette.dim))
        return [title_line(self, width, "Parameters", figures)]

    def _parameter(self, row: int) -> CellValue:
        return self.listed[row].name

    def _updated_by(self, row: int) -> CellValue:
        group = self.listed[row].group
        return Cell(group, "text") if group else Cell("none", "dim")

    def _note(self, row: ParameterRow) -> str:
        return "; ".join(text for text, _ in row.notes)

    def _noted(self, row: int) -> CellValue:
        listed = self.listed[row]
        return Cell(self._note(listed), listed.notes[0][1]) if listed.notes else ""
