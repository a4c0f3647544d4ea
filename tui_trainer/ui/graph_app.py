"""The app for `tui-trainer graph`: a scalar graph, forward and backward one node at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from tui_trainer.client.api import Snapshot
from tui_trainer.learn.page import key_labels
from tui_trainer.learn.scalar.graph import DEFAULT_H, ScalarGraph, three_rates
from tui_trainer.learn.scalar.layout import layout
from tui_trainer.learn.scalar.parser import EXAMPLES, GraphError, parse
from tui_trainer.learn.scalar.svg import svg
from tui_trainer.learn.scalar.torch_process import TorchGradients, TorchProcess
from tui_trainer.learn.scalar.translation import say
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.panels.scalar_graph.charts import DescentChart, SweepChart
from tui_trainer.ui.panels.scalar_graph.graph_view import (
    MAX_PITCH,
    STEP_TEXT_ROWS,
    GraphTitle,
    GraphView,
    NodeTable,
    StepList,
    StepText,
    graph_height,
)
from tui_trainer.ui.panels.scalar_graph.state import GraphState
from tui_trainer.ui.screens.base import MIN_SIZE, FoldingScreen, RunScreen
from tui_trainer.ui.theme import initial_theme
from tui_trainer.ui.widgets.key_line import KeyLine, TooSmall
from tui_trainer.ui.widgets.ordered_input import OrderedInput
from tui_trainer.ui.widgets.tabs import TabLine

PANELS = ("graph", "nodes", "sweep", "descent")
TALL = 50
"""Height of the terminal, in rows, from which the rows of the graph are further apart."""
GRAPH_SHARE = (3, 7)
"""Largest share of the rows for the graph: (numerator, denominator)."""
MIN_STEP_LIST = 6
"""Rows that must be left below the table for the list of steps."""


class GraphPrompt(ModalScreen[str | None]):
    """Asks for a text until `check` finds nothing wrong with it. Escape returns None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="graph_prompt.cancel",
                tooltip="Change nothing")
    ]  # fmt: skip

    def __init__(self, question: str, value: str, check: Callable[[str], str], keys: str) -> None:
        """`check` returns an error message, or ""; `keys` explains the keys."""
        super().__init__()
        self._question, self._value, self._check, self._keys = question, value, check, keys

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self._question, markup=False)
            yield OrderedInput(self._value, compact=True)
            yield Static("", classes="error", markup=False)
            yield Static(self._keys, classes="keys", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Return the text, or show what is wrong with it."""
        text = event.value.strip()
        if wrong := self._check(text):
            self.query_one(".error", Static).update(wrong)
        else:
            self.dismiss(text)


class GraphScreen(FoldingScreen):
    """The graph, the current step, the table of nodes, and two charts."""

    CSS = """
    GraphScreen #graph { height: 3fr; padding: 0 1; }
    GraphPrompt .keys { color: $text-muted; }
    GraphScreen StepText { padding: 0 1; }
    GraphScreen #lower { height: 1fr; }
    GraphScreen #table { width: 4fr; }
    GraphScreen #nodes { padding: 0 1; }
    GraphScreen #steps { margin: 1 1 0 1; }
    GraphScreen #charts { width: 3fr; padding: 0 1 0 0; }
    GraphScreen #sweep, GraphScreen #descent { height: 1fr; }
    GraphScreen.-folded #graph { height: 1fr; }
    GraphScreen.-folded #lower { height: 1fr; }
    GraphScreen.-folded #charts { padding: 0 1; }
    """
    tabs = ("Graph", "Nodes", "Error against h", "Learning rate")
    full_size = (110, 34)
    COMMANDS = RunScreen.COMMANDS | {ActionProvider}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "step(1)", "Next node", id="graph.next",
                tooltip="Compute the next node, or pass its gradient on"),
        Binding("comma", "step(-1)", "Back", key_display=",", id="graph.back",
                tooltip="One step back"),
        Binding("space", "all", "All", key_display="space", id="graph.all",
                tooltip="Make all steps, or begin again"),
        Binding("enter", "edit", "Value", id="graph.edit",
                tooltip="Change the value of the selected input"),
        Binding("u", "update", "Update", id="graph.update",
                tooltip="One step W <- W - lr*G of the selected input with the right rate"),
        Binding("h", "h", "Set h", id="graph.h", tooltip="Step of the numerical gradient"),
        Binding("o", "example", "Example", id="graph.example",
                tooltip="The next example: the chain rule, a weight, a neuron, a net"),
        Binding("i", "expression", "Expression", show=False, id="graph.expression",
                tooltip="Type another expression"),
        Binding("w", "write", "SVG", show=False, id="graph.svg",
                tooltip="Write the graph as an SVG picture"),
        Binding("up", "select(-1)", "Select", show=False, id="graph.up",
                tooltip="Select the previous node"),
        Binding("down", "select(1)", "Select", show=False, id="graph.down",
                tooltip="Select the next node"),
        Binding("left", "tab(-1)", "Tab", show=False, id="graph.tab_left",
                tooltip="Show the previous panel, where only one fits"),
        Binding("right", "tab(1)", "Tab", show=False, id="graph.tab_right",
                tooltip="Show the next panel, where only one fits"),
    ]  # fmt: skip

    def __init__(self, graph: ScalarGraph, h: float = DEFAULT_H) -> None:
        super().__init__()
        self.state = GraphState(graph, h)
        self.torch = TorchProcess()
        self._select_first_input()
        self._is_translated = False

    def compose(self) -> ComposeResult:
        yield TooSmall(*MIN_SIZE)
        yield GraphTitle(self.state)
        yield TabLine(self.tabs)
        yield GraphView(self.state, id="graph")
        yield StepText(self.state)
        with Horizontal(id="lower"):
            with Vertical(id="table"):
                yield NodeTable(self.state, id="nodes")
                yield StepList(self.state, id="steps")
            with Vertical(id="charts"):
                yield SweepChart(self.state, id="sweep")
                yield DescentChart(self.state, id="descent")
        yield KeyLine()

    def on_mount(self) -> None:
        self._ask_torch()

    def on_unmount(self) -> None:
        self.torch.close()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the graph. `snapshot` is not used, since this app shows no run."""
        self._translate()
        self.query_one(GraphTitle).update_rows()
        self.query_one(GraphView).show()
        self.query_one(StepText).update_rows()
        self.query_one(NodeTable).show()
        self.query_one(StepList).show()
        self.query_one(SweepChart).update_rows()
        self.query_one(DescentChart).update_rows()
        self.query_one(KeyLine).update_rows()

    def _redraw(self) -> None:
        self.show(self.context.snapshot)

    def _translate(self) -> None:
        """Switch to the user's language, which may have changed on another screen."""
        if self.state.language == self.context.language and self._is_translated:
            return
        self._is_translated = True
        self.state.language = self.context.language
        self.query_one(TabLine).names = tuple(map(self.state.translated, self.tabs))
        self.query_one(TabLine).update_rows()
        self.query_one(KeyLine).labels = key_labels(self.state.language)

    # ------------------------------------------------------------ PyTorch

    def _ask_torch(self) -> None:
        """Ask for PyTorch's gradients on a thread."""
        graph = self.state.graph
        self.run_worker(lambda: self._answer(graph), thread=True, group="torch")

    def _answer(self, graph: ScalarGraph) -> None:
        """Runs on a thread."""
        answer = self.torch.gradients(graph.expression.text, graph.inputs)
        with contextlib.suppress(RuntimeError):  # the app has ended meanwhile
            self.app.call_from_thread(self._answered, graph, answer)

    def _answered(self, graph: ScalarGraph, answer: TorchGradients | None) -> None:
        if graph is self.state.graph:
            self.state.autograd, self.state.no_torch = answer, answer is None
            self._redraw()

    # ------------------------------------------------------------ layout

    def show_panels(self) -> None:
        for number, name in enumerate(PANELS):
            self.query_one(f"#{name}").display = not self._folded or number == self._tab
        self.query_one("#table").display = not self._folded or self._tab == 1
        self._share_height()
        self.query_one("#lower").display = not self._folded or self._tab > 0
        self.query_one("#charts").display = not self._folded or self._tab > 1
        self.query_one(StepText).display = not self._folded or self._tab < 2
        if not self._folded or self._tab == 1:
            self.query_one(NodeTable).focus()

    def _share_height(self) -> None:
        """Give the graph and the table the rows that they need, and the list of steps the rest."""
        graph, nodes = self.query_one(GraphView), self.query_one(NodeTable)
        steps = self.query_one(StepList)
        steps.display = False
        if self._folded:
            graph.styles.height = nodes.styles.height = "1fr"
            return
        room = self.app.size.height - 2 - STEP_TEXT_ROWS  # without the title and the keys
        pitch = MAX_PITCH if self.app.size.height >= TALL else MAX_PITCH - 1
        placed = layout(self.state.graph.expression)
        upper = min(graph_height(placed, pitch) + 1, room * GRAPH_SHARE[0] // GRAPH_SHARE[1])
        table = min(len(self.state.graph.nodes) + 1, room - upper)
        graph.styles.height = upper
        if room - upper - table >= MIN_STEP_LIST:
            nodes.styles.height = table
            steps.display = True
        else:
            nodes.styles.height = "1fr"

    # ------------------------------------------------------------ steps and selection

    def action_step(self, by: int) -> None:
        """Make the next step, or take the last one back."""
        self._go_to(self.state.position + by)

    def action_all(self) -> None:
        """Make all steps; begin again at the end."""
        self._go_to(0 if self.state.finished else len(self.state.steps))

    def _go_to(self, position: int) -> None:
        self.state.position = min(max(position, 0), len(self.state.steps))
        self._redraw()

    def action_select(self, by: int) -> None:
        """Select another node."""
        self._select(min(max(self.state.selected + by, 0), len(self.state.graph.nodes) - 1))

    def on_virtual_table_highlighted(self, message: NodeTable.Highlighted) -> None:
        if message.row != self.state.selected:
            self._select(message.row)

    def on_virtual_table_activated(self) -> None:
        self.action_edit()

    def _select(self, index: int) -> None:
        self.state.selected = index
        self._redraw()

    def _select_first_input(self) -> None:
        graph = self.state.graph
        wanted = next((e.raise_ for e in EXAMPLES if e.text == graph.expression.text), None)
        index = graph.expression.index(wanted) if wanted is not None else None
        inputs = (i for i, node in enumerate(graph.nodes) if node.is_input)
        self.state.selected = index if index is not None else next(inputs)

    # ------------------------------------------------------------ changes

    def _set(self, graph: ScalarGraph) -> None:
        """Show another graph, or other values."""
        self.state.set_graph(graph)
        self._share_height()
        self._ask_torch()
        self._redraw()

    def action_edit(self) -> None:
        """Ask for another value of the selected input."""
        node, graph = self.state.graph.nodes[self.state.selected], self.state.graph
        if not node.is_input:
            text = self.state.say(
                "{name} is not an input; select one with the arrow keys", name=node.name
            )
            self.notify(text, severity="warning", markup=False)
            return

        def attempt(text: str) -> ScalarGraph:
            try:
                return graph.with_value(node.name, float(text))
            except ValueError:
                wrong = say("{given} is not a number", given=text)
                empty = say("enter a number, or press escape")
                raise GraphError(wrong if text else empty, "", 0, 0) from None

        def change(text: str | None) -> None:
            if text is not None:
                self._set(attempt(text))

        value = f"{graph.inputs[node.name]:.10g}"
        question = self.state.say("Value of {name}", name=node.name)
        self._ask(question, value, lambda text: self._wrong(attempt, text), change)

    def action_update(self) -> None:
        """W <- W - lr*G for the selected input."""
        node, graph = self.state.graph.nodes[self.state.selected], self.state.graph
        descent = three_rates(graph, node.name) if node.is_input else None
        if descent is None or not descent.runs:
            computed = say("{name} is not an input", name=node.name)
            why = descent.verdict if descent is not None else computed
            self.notify(self.state.translated(why), severity="warning", markup=False)
            return
        run = descent.runs[1]
        try:
            self._set(graph.with_value(node.name, run.weights[1]))
        except (GraphError, IndexError):
            text = self.state.say("that step leaves what is defined")
            self.notify(text, severity="warning", markup=False)

    def action_h(self) -> None:
        """Ask for another step of the numerical gradient."""

        def change(text: str | None) -> None:
            if text is not None:
                self.state.h = float(text)
                self._redraw()

        question = self.state.say("Step h of the numerical gradient")
        self._ask(question, f"{self.state.h:g}", self._wrong_h, change)

    def action_example(self) -> None:
        """Show the next example."""
        texts = [example.text for example in EXAMPLES]
        shown = self.state.graph.expression.text
        number = (texts.index(shown) + 1) % len(EXAMPLES) if shown in texts else 0
        example = EXAMPLES[number]
        self.state.position = 0
        self.state.set_graph(ScalarGraph.of(example.text, example.values))
        self._select_first_input()
        self.notify(self.state.translated(example.title), markup=False)
        self._share_height()
        self._ask_torch()
        self._redraw()

    def action_expression(self) -> None:
        """Ask for another expression. Names keep their values; new ones are 1."""
        graph = self.state.graph

        def attempt(text: str) -> ScalarGraph:
            expression = parse(text)
            values = {name: graph.inputs.get(name, 1.0) for name in expression.inputs}
            return ScalarGraph.at(expression, values)

        def change(text: str | None) -> None:
            if text is not None:
                self.state.position = 0
                self.state.set_graph(attempt(text))
                self._select_first_input()
                self._share_height()
                self._ask_torch()
                self._redraw()

        question, shown = self.state.say("Expression"), graph.expression.text
        self._ask(question, shown, lambda text: self._wrong(attempt, text), change)

    def action_write(self) -> None:
        """Ask for a file and write the picture into it."""
        graph = self.state.graph

        def check(text: str) -> str:
            path = Path(text).expanduser()
            if path.suffix != ".svg":
                return self.state.say("the name must end in .svg")
            return self.state.say("{path} already exists", path=path) if path.exists() else ""

        def write(text: str | None) -> None:
            if text is None:
                return
            path = Path(text).expanduser()
            try:
                path.write_text(svg(graph), encoding="utf-8")
            except OSError as error:
                reason = error.strerror or str(error)
                text = self.state.say("cannot write {path}: {reason}", path=path, reason=reason)
                self.notify(text, severity="error", markup=False)
            else:
                self.notify(self.state.say("wrote {path}", path=path), markup=False)

        self._ask(self.state.say("Write the graph to"), "backpropagation.svg", check, write)

    # ------------------------------------------------------------ questions

    def _ask(
        self, question: str, value: str, check: Callable[[str], str],
        then: Callable[[str | None], None],
    ) -> None:  # fmt: skip
        keys = self.state.say("enter: confirm, escape: cancel")
        self.app.push_screen(GraphPrompt(question, value, check, keys), then)

    def _wrong(self, attempt: Callable[[str], object], text: str) -> str:
        """The error that `attempt` raises for a text, with its hint; "" for none."""
        try:
            attempt(text)
        except GraphError as error:
            message, hint = map(self.state.translated, (error.message, error.hint))
            if error.text:
                place = f"{error.text[error.start : error.end]!r}"
                message = self.state.say("{message} at {place}", message=message, place=place)
            if hint:
                message = self.state.say("{message}: {hint}", message=message, hint=hint)
            return message
        return ""

    def _wrong_h(self, text: str) -> str:
        number = float(text) if re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", text.lower()) else 0.0
        return "" if 0 < number <= 1 else self.state.say("a number above 0, up to 1, such as 1e-4")


class GraphApp(TuiTrainerApp):
    """Shows a scalar graph."""

    HOME_MODE = "graph"
    OWN_SCREENS = (("Scalar graph", GraphScreen),)

    def __init__(self, graph: ScalarGraph, h: float = DEFAULT_H, **options: Any) -> None:
        super().__init__(None, start_mode=self.HOME_MODE, **options)
        self.add_mode(self.HOME_MODE, lambda: GraphScreen(graph, h))


def run_graph(graph: ScalarGraph, *, h: float = DEFAULT_H, ascii: bool = False) -> int:
    """Show the graph until the user leaves. Returns the exit code."""
    return GraphApp(graph, h, ascii=ascii, **initial_theme()).run_until_exit()
