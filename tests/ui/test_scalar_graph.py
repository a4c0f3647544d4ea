"""The screen of scalar graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ui.screens import SIZES, settle, text_of, until
from tests.ui.test_contrast import hard_to_read
from tui_trainer.learn.page import NO_BREAK
from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.parser import EXAMPLES, parse
from tui_trainer.learn.scalar.torch_process import TorchGradients
from tui_trainer.ui import graph_app
from tui_trainer.ui.graph_app import GraphApp, GraphScreen
from tui_trainer.ui.panels.scalar_graph.charts import DescentChart
from tui_trainer.ui.panels.scalar_graph.graph_view import StepList
from tui_trainer.ui.theme import THEMES

LESSON = ScalarGraph.of("(a*b + c) * f", {"a": 2, "b": -3, "c": 10, "f": -2})


class FakeTorch:
    """Answers like the process, without one."""

    off_by = 0.0

    def gradients(self, expression: str, values: dict[str, float]) -> TorchGradients:
        gradients = ScalarGraph.at(parse(expression), values).gradients
        wrong = tuple(None if g is None else g + self.off_by for g in gradients)
        return TorchGradients("PyTorch 9.9", wrong)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_app, "TorchProcess", FakeTorch)


def example(name: str) -> ScalarGraph:
    found = next(each for each in EXAMPLES if each.name == name)
    return ScalarGraph.of(found.text, found.values)


def screen_of(app: GraphApp) -> GraphScreen:
    assert isinstance(app.screen, GraphScreen)
    return app.screen


async def press(pilot, *keys):
    await pilot.press(*keys)
    await settle(pilot)


async def answered(pilot):
    await until(pilot, lambda: screen_of(pilot.app).state.autograd, "PyTorch's answer")
    await settle(pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_forward_and_backward_one_node_at_a_time(size):
    async with GraphApp(LESSON).run_test(size=size) as pilot:
        await settle(pilot)
        assert "-6.000" not in text_of(pilot.app)
        await press(pilot, "p")
        assert "e = a*b = 2*(-3) = -6" in text_of(pilot.app)
        assert "de/da = b = -3" in text_of(pilot.app)
        await press(pilot, "p", "p", "p")
        text = text_of(pilot.app)
        assert "backward: dL/dL = 1" in text
        assert "dL/dd = f = -2" in text
        await press(pilot, "p", "p")
        assert "dL/da = dL/de * de/da = dL/de * b = -2 * (-3) = 6" in text_of(pilot.app)
        await press(pilot, "p")  # nothing is left
        assert screen_of(pilot.app).state.finished
        await press(pilot, "comma")
        assert "backward: dL/dd = -2" in text_of(pilot.app)
        await press(pilot, "space", "space")
        assert screen_of(pilot.app).state.position == 0


@pytest.mark.parametrize(
    ("name", "size"), [("neuron", SIZES[0]), ("net", SIZES[1]), ("net", SIZES[2])]
)
async def test_every_panel_of_the_examples(name, size):
    async with GraphApp(example(name)).run_test(size=size) as pilot:
        await answered(pilot)
        await press(pilot, "space")
        seen = text_of(pilot.app)
        for _ in range(3):
            await press(pilot, "right")
            seen += text_of(pilot.app)
        for part in ("PyTorch 9.9 agrees", "numerical", "central", "lr*G", "1e-15", "tanh"):
            assert part in seen
        assert "of it rounding" in seen or "only rounding" in seen


async def test_a_value_is_edited_and_everything_follows():
    async with GraphApp(LESSON).run_test(size=(80, 24)) as pilot:
        await press(pilot, "space", "enter")
        await press(pilot, *["backspace"] * 3, *"log", "enter")
        assert "log is not a number" in text_of(pilot.app)
        await press(pilot, *["backspace"] * 3, *"4", "enter")
        await settle(pilot)
        state = screen_of(pilot.app).state
        assert state.graph.inputs["a"] == 4
        assert state.graph.values[state.graph.output] == 4
        assert "4.000" in text_of(pilot.app)
        assert state.finished


async def test_a_value_where_the_expression_is_undefined_is_refused():
    graph = ScalarGraph.of("log(a)", {"a": 2})
    async with GraphApp(graph).run_test(size=(80, 24)) as pilot:
        await press(pilot, "enter", "backspace", *"-1", "enter")
        assert "the logarithm of a negative number" in text_of(pilot.app)
        await press(pilot, "escape")
        assert screen_of(pilot.app).state.graph.inputs["a"] == 2


async def test_update_moves_the_selected_input_downhill():
    async with GraphApp(example("weight")).run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        before = screen_of(pilot.app).state.graph
        await press(pilot, "u")
        after = screen_of(pilot.app).state.graph
        assert after.values[after.output] < 0.1 * before.values[before.output]


async def test_selection_h_examples_and_an_expression():
    async with GraphApp(LESSON).run_test(size=(80, 24)) as pilot:
        await press(pilot, "down", "down")
        state = screen_of(pilot.app).state
        assert state.graph.nodes[state.selected].name == "e"
        await press(pilot, "enter")
        assert isinstance(pilot.app.screen, GraphScreen)  # no prompt for a computed node
        await press(pilot, "h", *["backspace"] * 6, *"0", "enter")
        assert "a number above 0" in text_of(pilot.app)
        await press(pilot, *".01", "enter")
        assert state.h == 0.01
        await press(pilot, "o")
        assert state.graph.expression.text == EXAMPLES[0].text
        await press(pilot, "i", *["backspace"] * len(EXAMPLES[0].text), *"a*", "enter")
        assert "not a valid expression" in text_of(pilot.app)
        await press(pilot, *"k", "enter")
        assert state.graph.inputs == {"a": 2, "k": 1}
        assert state.position == 0


async def test_gradients_that_differ_are_not_hidden(monkeypatch):
    monkeypatch.setattr(FakeTorch, "off_by", 0.5)
    async with GraphApp(LESSON).run_test(size=(80, 24)) as pilot:
        await answered(pilot)
        assert "PyTorch 9.9 differs by" in text_of(pilot.app)


async def test_the_picture_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with GraphApp(LESSON).run_test(size=(80, 24)) as pilot:
        await press(pilot, "w", "enter")
        assert "</svg>" in (tmp_path / "backpropagation.svg").read_text()
        await press(pilot, "w", "enter")
        assert "already exists" in text_of(pilot.app)


async def test_help_and_back():
    async with GraphApp(LESSON, ascii=True).run_test(size=(120, 40)) as pilot:
        await press(pilot, "question_mark")
        assert "Scalar graph" in text_of(pilot.app)
        assert pilot.app.lessons[0] == "scalar-tensor"
        await press(pilot, "escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, GraphScreen), "the graph again")
        assert all(row.isascii() for row in text_of(pilot.app).splitlines() if "dL" in row)


async def test_in_french_until_the_language_changes():
    app = GraphApp(LESSON)
    app.language = "fr"
    async with app.run_test(size=(120, 40)) as pilot:
        await answered(pilot)
        assert "avant le premier pas" in text_of(app)
        await press(pilot, "space")
        text = text_of(app)
        for part in (
            "arrière 3 sur 3", "PyTorch 9.9 d’accord", "nœud", "entrée", "centrée",
            "seulement l’arrondi", "plus grand", "8 pas", "Nœud suivant", "Aide",
        ):  # fmt: skip
            assert part in text
        await press(pilot, "enter", *["backspace"] * 3, "x", "enter")
        assert "Valeur de a" in text_of(app)
        assert "x n’est pas un nombre" in text_of(app)
        assert f"échap{NO_BREAK}: annuler" in text_of(app)
        await press(pilot, "escape", "i", *["backspace"] * 20, *"log(a", "enter")
        assert "parenthèse" in text_of(app)
        await press(pilot, "escape")
        app.language = "en"
        await press(pilot, "comma")
        text = text_of(app)
        for part in ("backward 2 of 3", "node", "input", "central", "Next node"):
            assert part in text


async def test_room_below_the_table_has_the_steps():
    async with GraphApp(LESSON).run_test(size=(120, 40)) as pilot:
        await press(pilot, "p", "p", "p", "p", "p")
        steps = pilot.app.screen.query_one(StepList)
        assert steps.display
        assert "d = e + c = -6 + 10 = 4" in text_of(pilot.app)  # of a step before
        assert "backward: dL/dd = -2" in text_of(pilot.app)
        screen_of(pilot.app)._set(example("net"))  # whose table takes all of it
        await settle(pilot)
        assert not steps.display


@pytest.mark.parametrize("size", SIZES)
async def test_nothing_of_the_learning_rates_is_cut_off(size):
    async with GraphApp(example("net")).run_test(size=size) as pilot:
        await press(pilot, "left")
        chart = pilot.app.screen.query_one(DescentChart)
        rows = chart.rows(chart.size)
        assert all(sum(len(segment.text) for segment in row) <= chart.size.width for row in rows)
        assert "8 steps: L = 621.95" in text_of(pilot.app)


@pytest.mark.parametrize("theme", [each.name for each in THEMES])
async def test_the_text_of_every_panel_can_be_read(theme):
    async with GraphApp(example("neuron")).run_test(size=(120, 40)) as pilot:
        pilot.app.theme = theme
        await answered(pilot)
        for keys in (("p",), ("space",), ("enter",)):
            await press(pilot, *keys)
            assert hard_to_read(pilot.app) == [], keys
