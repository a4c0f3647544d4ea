"""The inspector: a tensor of the live run as a heat map and in numbers, read again at each stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec
from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from tui_trainer.client.answers.tensors import parse_index
from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import Phase
from tui_trainer.protocol.autograd import CheckGradient, GradientCheck
from tui_trainer.protocol.formatting import milliseconds
from tui_trainer.protocol.heat_map import HeatMapWindow
from tui_trainer.protocol.inspection import (
    ExplainUpdate,
    Inspected,
    ListTensors,
    Summarize,
    TensorList,
    TensorRef,
    TensorSummary,
    UpdateExplanation,
)
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.gradient_check import GradientCheckView
from tui_trainer.ui.panels.tensor import REDUCTIONS, ZOOM, HeatMapView, Viewport
from tui_trainer.ui.panels.tensor_statistics import (
    StatisticsReading,
    StatisticsView,
    recorded_columns,
)
from tui_trainer.ui.panels.update_explanation import UpdateView
from tui_trainer.ui.screens.base import (
    CONTROL_BINDINGS,
    RANK_BINDING,
    DetailScreen,
)
from tui_trainer.ui.screens.dialogs import TensorDialog, TextPrompt
from tui_trainer.ui.screens.inspection_requests import InspectionRequests, ending, last_edit
from tui_trainer.ui.screens.saving import save_tensor
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.lines import BuiltLines, Span

MIN_WIDTH_BESIDE = 76
"""Width from which heat map and numbers are side by side."""
MIN_WIDTH_FOR_UPDATE = 110
"""Width from which heat map and update are side by side."""
MIN_WIDTH_FOR_ALL = 170
"""Width from which the numbers stay next to the update or the check."""
ENTRIES = 5
READINGS_KEPT = 500
CHECKED_ENTRIES = 2
CHECKING = "computing the loss of this step again, 19 times for each entry …"
INTERRUPTED = ("the check was interrupted by another request", "c twice begins it again")
READING, WAITING = "reading …", "waiting for the end of the current step"
NEEDS_TENSOR = (
    "zoom", "pan", "fit", "reduction", "log", "kind", "next", "update", "entry", "check", "save",
)  # fmt: skip
"""Actions that act on the tensor on the screen."""
NO_TENSOR = "no tensor is chosen"
NO_TENSOR_HINT = "/ lists the tensors; enter on a parameter of screen 3 opens it"


class InspectScreen(DetailScreen):
    """A heat map with zoom and pan, next to the statistics of the tensor."""

    CSS = """
    InspectScreen #tensor { margin: 0 1; }
    InspectScreen #parts { height: 1fr; margin: 0 1; }
    InspectScreen HeatMapView { width: 1fr; }
    InspectScreen StatisticsView { width: 1fr; display: none; }
    InspectScreen.-numbers HeatMapView { display: none; }
    InspectScreen.-numbers StatisticsView { display: block; }
    InspectScreen.-beside HeatMapView { display: block; margin-right: 2; }
    InspectScreen.-beside StatisticsView { display: block; width: 37; }
    InspectScreen.-wide StatisticsView { width: 46; }
    InspectScreen UpdateView { width: 1fr; display: none; }
    InspectScreen.-update UpdateView { display: block; }
    InspectScreen.-update StatisticsView { display: none; }
    InspectScreen.-update HeatMapView { display: none; }
    InspectScreen.-update.-room-for-update HeatMapView { display: block; }
    InspectScreen.-update.-room-for-update UpdateView { width: 64; }
    InspectScreen GradientCheckView { width: 1fr; display: none; }
    InspectScreen.-check GradientCheckView { display: block; }
    InspectScreen.-check StatisticsView { display: none; }
    InspectScreen.-check HeatMapView { display: none; }
    InspectScreen.-check.-beside HeatMapView { display: block; }
    InspectScreen.-check.-beside GradientCheckView { width: 40; }
    InspectScreen.-all StatisticsView { display: block; width: 46; margin-right: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "choose", "Choose", key_display="/", id="inspect.choose",
                tooltip="Choose a tensor by words of its name"),
        Binding("o", "modules", "Modules", id="inspect.modules", show=False,
                tooltip="Choose what a module is given or returns: the forward pass runs again"),
        Binding("k", "kind", "Kind", id="inspect.kind",
                tooltip="The parameter, its gradient, and the state of its optimizer, in turn"),
        Binding("right_square_bracket", "next(1)", "Next", key_display="]", id="inspect.next",
                tooltip="The next parameter or buffer of the model"),
        Binding("left_square_bracket", "next(-1)", "Previous", key_display="[",
                id="inspect.previous", show=False, tooltip="The previous parameter or buffer"),
        Binding("plus,equals_sign", "zoom(1)", "Zoom", key_display="+", id="inspect.zoom_in",
                tooltip="A smaller part of the heat map, larger; arrows move it"),
        Binding("minus", "zoom(-1)", "Zoom out", key_display="-", id="inspect.zoom_out",
                show=False, tooltip="A larger part of the heat map, smaller"),
        Binding("f,escape", "fit", "Whole", id="inspect.fit", show=False,
                tooltip="The whole tensor in the heat map"),
        Binding("up", "pan(-1,0)", "Up", id="inspect.up", show=False,
                tooltip="Move the part that is shown"),
        Binding("down", "pan(1,0)", "Down", id="inspect.down", show=False,
                tooltip="Move the part that is shown"),
        Binding("left", "pan(0,-1)", "Left", id="inspect.left", show=False,
                tooltip="Move the part that is shown"),
        Binding("right", "pan(0,1)", "Right", id="inspect.right", show=False,
                tooltip="Move the part that is shown"),
        Binding("m", "reduction", "Reduce", id="inspect.reduction",
                tooltip="How a block of entries becomes one cell: mean |x|, mean, largest |x|"),
        Binding("l", "log", "Log", id="inspect.log",
                tooltip="Histogram of the values, or of log10 of their sizes"),
        Binding("u", "update", "Update", id="inspect.update",
                tooltip="Why the optimizer moves the parameter: its formula with the numbers"),
        Binding("x", "entry", "Entry", id="inspect.entry", show=False,
                tooltip="The update of one entry: asks for its index, * for the whole tensor"),
        Binding("c", "check", "Check", id="inspect.check",
                tooltip="Check the gradient against numerical ones, on the batch of this step"),
        Binding("w", "save", "Write", id="inspect.save", show=False,
                tooltip="Write the whole tensor to a .npy or .safetensors file"),
        Binding("G", "groups", "Groups", key_display="G", id="inspect.groups",
                tooltip="Parameter groups, who updates which parameters, and the memory by kind"),
        Binding("pagedown", "scroll(1)", "Further down", id="inspect.scroll_down", show=False,
                tooltip="More of the numbers, of the update or of the check"),
        Binding("pageup", "scroll(-1)", "Further up", id="inspect.scroll_up", show=False,
                tooltip="The numbers, the update or the check further up"),
        Binding("v", "numbers", "Numbers", id="inspect.numbers",
                tooltip="Heat map or numbers, where only one fits"),
        RANK_BINDING,
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.viewport = Viewport()
        self.summary: TensorSummary | None = None
        """The tensor on the screen."""
        self.explanation: UpdateExplanation | None = None
        self._index: tuple[int, ...] | None = None
        """The entry whose update is explained; None: the whole tensor."""
        self._unexplained = ("", "")
        self._explained_for: tuple[object, ...] | None = None
        """(request, moment) of the explanation."""
        self._history: deque[StatisticsReading] = deque(maxlen=READINGS_KEPT)
        """Readings of this tensor while it is on the screen."""
        self.gradient_check: GradientCheck | None = None
        self._unchecked = ("", "")
        self._ref: TensorRef | None = None
        self._rank = 0
        self._asked: _SentTensorRequest | None = None
        self.requests = InspectionRequests(self)
        self._saving = False
        self._offered = False
        """Whether the list of tensors was opened since the screen came to the front."""

    def body(self) -> Iterable[Widget]:
        yield Caption(id="tensor")
        yield Placeholder()
        yield Horizontal(
            HeatMapView(), StatisticsView(), UpdateView(), GradientCheckView(), id="parts"
        )

    @property
    def read_at(self) -> str:
        """The step and phase that the values on the screen belong to."""
        return self.requests.read_at

    @property
    def heat_map(self) -> HeatMapView:
        return self.query_one(HeatMapView)

    @property
    def numbers(self) -> StatisticsView:
        return self.query_one(StatisticsView)

    # ------------------------------------------------------------ reading

    def show_body(self, snapshot: Snapshot) -> None:
        self._follow_choice()
        self._read(snapshot)
        self._draw(snapshot)
        nothing = self._ref is None and snapshot.link.state == "live"
        if nothing and not self._offered and self._missing(snapshot)[0] == NO_TENSOR:
            self._offered = True
            self.action_choose()

    def on_screen_suspend(self) -> None:
        if self.app.current_mode != "inspect":  # and not for a dialog over it
            self._offered = False

    def _follow_choice(self) -> None:
        chosen = (self.context.inspected, self.context.inspected_rank)
        if chosen != (self._ref, self._rank):
            self._ref, self._rank = chosen
            self.requests.forget()
            self._asked = self.summary = None
            self.explanation, self._unexplained, self._explained_for = None, ("", ""), None
            self._index = None
            self._history.clear()
            self.gradient_check, self._unchecked = None, ("", "")
            self.remove_class("-check")
            self.viewport.reset()

    def _read(self, snapshot: Snapshot) -> None:
        """Request the tensor, unless the screen shows its present state."""
        status = snapshot.status
        closed = status.ended or snapshot.link.state not in ("live", "replay")
        if self._ref is None or closed or self._saving or not self.requests.in_front:
            return
        if not isinstance(self.requests.pending, Summarize | None):
            return  # the tensor is requested once the pending request is answered
        paused = status.state == "paused"
        visible = self.heat_map.view_size.height > 0
        window = self.viewport.window(self.heat_map.pixels) if visible else None
        wanted = _SentTensorRequest(
            self._ref, (status.step, status.phase, paused, last_edit(snapshot)), window
        )
        last = self._asked
        if wanted == last:
            return
        moved = last is None or (wanted.tensor, wanted.window) != (last.tensor, last.window)
        if not moved and not paused and not self.requests.may_ask_again:
            return
        known = self.summary is not None and last is not None and paused
        unchanged = known and (wanted.tensor, wanted.moment) == (last.tensor, last.moment)  # type: ignore[union-attr]
        request = Summarize(self._ref, not unchanged, window, entries=ENTRIES)
        self.requests.send(request, self._summarized, self._summary_given_up)
        self._asked = wanted

    def _summary_given_up(self) -> None:
        """Send the request, which another one has replaced, again when this screen is in front."""
        self._asked = None

    def _summarized(self, answer: Inspected) -> None:
        summary = self.requests.result(answer, TensorSummary)
        if summary is not None:
            at = answer.moment
            if summary.statistics is not None:
                if self._history and self._history[-1].at == at:
                    self._history.pop()
                reading = StatisticsReading(at, summary.statistics, answer.phase, summary.before)
                self._history.append(reading)
            elif self.summary is not None:
                summary = msgspec.structs.replace(summary, statistics=self.summary.statistics)
        self.summary = summary
        self._draw(self.context.snapshot)
        self._explain()

    def _explain(self) -> None:
        """Request the update, after the summary of the same moment."""
        if self._ref is None or self._asked is None or not self.has_class("-update"):
            return
        if self._ref.kind in ("buffer", "input", "output"):
            self._unexplained = ("only parameters are updated by an optimizer", "")
            return
        request = ExplainUpdate(self._ref.name, self._index)
        wanted = (request, self._asked.moment)
        idle = self.requests.pending is None and self.requests.in_front
        if wanted != self._explained_for and idle:
            self.requests.send(request, lambda answer: self._explained(answer, wanted))

    def _explained(self, answer: Inspected, of: tuple[object, ...]) -> None:
        self._explained_for = of
        if isinstance(answer.result, UpdateExplanation):
            self.explanation, self._unexplained = answer.result, ("", "")
        else:
            self.explanation, self._unexplained = None, (answer.message, answer.hint)
        self._show()
        self._explain()

    # ------------------------------------------------------------ drawing

    def _draw(self, snapshot: Snapshot) -> None:
        summary = self.summary
        message = self._missing(snapshot) if summary is None and not self._reading else ("", "")
        self.query_one(Placeholder).set_message(*message)
        self.query_one("#parts").display = not message[0]
        spans, right = self._caption(snapshot)
        self.query_one("#tensor", Caption).update(spans, right, right_is_optional=True)
        if summary is not None:
            empty = "it has no entries" if not summary.tensor.elements else READING
            self.heat_map.show(summary.heat, empty)
            recorded = [] if self._rank else recorded_columns(snapshot, summary.tensor.ref)
            self.numbers.show(summary.tensor, summary.statistics, tuple(self._history), recorded)
            self.query_one(UpdateView).show(self.explanation, self._unexplained)
            self.query_one(GradientCheckView).show(self.gradient_check, self._unchecked)
        else:
            self.heat_map.show(None, WAITING if self._waits(snapshot) else READING)
            self.numbers.show(None, None)

    def _caption(self, snapshot: Snapshot) -> tuple[list[Span], str]:
        spans: list[Span] = [("Inspect", "title")]
        if self._ref is not None:
            spans.append((self._ref.text, "accent"))
        if self.summary is None:
            return [*spans, (f"rank {self._rank}", "text")] if self._rank else spans, ""
        spans.append((self.read_at, "text"))
        if snapshot.status.ended:
            spans.append((ending(snapshot), "warning"))
        return spans, f"read in {milliseconds(self.requests.took_ms, 0)}"

    def _missing(self, snapshot: Snapshot) -> tuple[str, str]:
        """Why there is nothing to see, and what to do."""
        unavailable = self.requests.unavailable(snapshot)
        if unavailable[0]:
            return unavailable
        message, hint = placeholder_message(snapshot, NO_TENSOR)
        return message, NO_TENSOR_HINT if message == NO_TENSOR else hint

    @property
    def _reading(self) -> bool:
        """Whether an answer will come."""
        return (
            self._ref is not None and bool(self.requests.pending) and not self.requests.refusal[0]
        )

    def _waits(self, snapshot: Snapshot) -> bool:
        """Whether the answer comes at the end of a step."""
        return snapshot.status.state != "paused"

    # ------------------------------------------------------------ actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the keys that have nothing to act on."""
        if action in NEEDS_TENSOR:
            return True if self.summary is not None or self._ref is not None else None
        if action == "numbers":
            return not self.has_class("-beside")
        return super().check_action(action, parameters)

    def _show(self) -> None:
        self.show(self.context.snapshot)

    def action_modules(self) -> None:
        """List the inputs and outputs of the modules."""
        self.action_choose(modules=True)

    def action_choose(self, modules: bool = False) -> None:
        """List the tensors of the run."""

        def chosen(tensor: TensorRef | None) -> None:
            self._asked = None
            if tensor is not None:
                self.context.inspected = tensor
            self._show()

        def listed(tensors: TensorList) -> None:
            if self.app.screen is self:
                self.app.push_screen(TensorDialog(tensors), chosen)

        self._with_list(listed, modules)

    def _with_list(self, use: Callable[[TensorList], object], modules: bool = False) -> None:
        """Call `use` with a new list of the run's tensors."""

        def listed(answer: Inspected) -> None:
            if isinstance(answer.result, TensorList):
                use(answer.result)
            else:
                self.notify(answer.message, title=answer.hint, severity="warning", markup=False)

        self._asked = None
        self.requests.send(ListTensors(modules), listed)

    def action_kind(self) -> None:
        """Show the next of the tensors that belong to the same parameter."""
        ref = self._ref
        if ref is not None:
            self._with_list(lambda tensors: self._go_to(_next_kind(tensors, ref)))

    def action_next(self, by: int) -> None:
        """Show the same kind of tensor of the next parameter."""
        ref = self._ref
        if ref is not None:
            self._with_list(lambda tensors: self._go_to(_next_name(tensors, ref, by)))

    def _go_to(self, tensor: TensorRef) -> None:
        self.context.inspected = tensor
        self._show()

    def action_zoom(self, direction: int) -> None:
        """Show a smaller (1) or a larger (-1) part."""
        self._change_view(lambda matrix: self.viewport.zoom(matrix, ZOOM**-direction))

    def action_pan(self, down: int, right: int) -> None:
        """Move the part that is shown."""
        self._change_view(lambda matrix: self.viewport.pan(matrix, down, right))

    def _change_view(self, change: Callable[[tuple[int, int]], None]) -> None:
        if self.summary is not None and self.summary.heat is not None:
            change(self.summary.heat.matrix)
            self._show()

    def action_fit(self) -> None:
        self.viewport.reset()
        self._show()

    def action_reduction(self) -> None:
        """Switch to the next reduction of a block of entries to one cell."""
        place = REDUCTIONS.index(self.viewport.reduction)
        self.viewport.reduction = REDUCTIONS[(place + 1) % len(REDUCTIONS)]
        self._show()

    def action_log(self) -> None:
        self.numbers.toggle_log()

    def action_update(self) -> None:
        """Show the update in place of the numbers, or the numbers again."""
        self.remove_class("-check")
        self.toggle_class("-update")
        self._explained_for = None
        self._explain()
        self.call_after_refresh(self._show)

    def action_check(self) -> None:
        """Check the gradient of the chosen entry, or of some; or show the numbers again."""
        ref = self._ref
        if ref is None or self.has_class("-check"):
            self.remove_class("-check")
            self.call_after_refresh(self._show)
            return
        self.remove_class("-update")
        self.add_class("-check")
        self.gradient_check = None
        if ref.kind in ("buffer", "input", "output"):
            self._unchecked = ("only parameters have gradients to check", "")
        else:
            self._unchecked = (CHECKING, "")
            indices = (self._index,) if self._index is not None else ()
            request = CheckGradient(ref.name, indices, CHECKED_ENTRIES)
            self.requests.send(request, self._checked, self._check_given_up)
        self.call_after_refresh(self._show)

    def _check_given_up(self) -> None:
        self._unchecked = INTERRUPTED

    def _checked(self, answer: Inspected) -> None:
        if isinstance(answer.result, GradientCheck):
            self.gradient_check, self._unchecked = answer.result, ("", "")
        else:
            self._unchecked = (answer.message, answer.hint)
        self._show()

    def action_save(self) -> None:
        """Write the tensor to a file, and send no other request meanwhile."""

        def finished() -> None:
            self._saving = False
            self._asked = None
            self._show()

        if self._ref is not None and not self._saving:
            self._saving = True
            save_tensor(self, self._ref, finished)

    def action_groups(self) -> None:
        """Show the parameter groups and the memory."""
        from tui_trainer.ui.screens.parameter_groups import ParameterGroupsScreen

        self.app.push_screen(ParameterGroupsScreen())

    def action_entry(self) -> None:
        """Ask for the index of an entry, and explain its update."""

        def chosen(text: str | None) -> None:
            if text is None:
                return
            try:
                self._index = parse_index(text.strip("* ")) or None
            except ValueError as error:
                self.notify(str(error), markup=False)
                return
            self.remove_class("-check")
            self.add_class("-update")
            self._explained_for = None
            self._explain()
            self.call_after_refresh(self._show)

        self.app.push_screen(TextPrompt("Index of the entry (* for the whole tensor)"), chosen)

    def action_scroll(self, direction: int) -> None:
        """Scroll all views next to the heat map by a page."""
        for view in self.query(BuiltLines):
            view.scroll_relative(y=direction * view.size.height, animate=False)

    def action_numbers(self) -> None:
        self.toggle_class("-numbers")
        self.call_after_refresh(self._show)

    def on_resize(self, event: events.Resize) -> None:
        """Show heat map and numbers side by side where both fit."""
        super().on_resize(event)
        self.set_class(event.size.width >= MIN_WIDTH_BESIDE, "-beside")
        self.set_class(event.size.width >= MIN_WIDTH_FOR_UPDATE, "-room-for-update")
        self.set_class(event.size.width >= MIN_WIDTH_FOR_ALL, "-all")

    def on_heat_map_view_resized(self) -> None:
        """Request as many cells as fit now."""
        self._show()


@dataclass(frozen=True)
class _SentTensorRequest:
    """A request that was sent, and the moment that it was sent for."""

    tensor: TensorRef
    moment: tuple[int, Phase | Literal[""], bool, int]
    """(step, phase, whether the run was paused, id of the last edit)"""
    window: HeatMapWindow | None


def _next_kind(tensors: TensorList, ref: TensorRef) -> TensorRef:
    same = [each.ref for each in tensors.tensors if each.ref.name == ref.name]
    if ref not in same:
        return same[0] if same else ref
    return same[(same.index(ref) + 1) % len(same)]


def _next_name(tensors: TensorList, ref: TensorRef, by: int) -> TensorRef:
    names = list(dict.fromkeys(each.ref.name for each in tensors.tensors))
    if ref.name not in names:
        return ref
    name = names[(names.index(ref.name) + by) % len(names)]
    found = [each.ref for each in tensors.tensors if each.ref.name == name]
    return next((r for r in found if (r.kind, r.key) == (ref.kind, ref.key)), found[0])
