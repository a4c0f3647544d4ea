"""The scalar graph in French: every text that it can show, with the same values."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import tui_trainer
from tui_trainer.learn.page import LANGUAGES, NO_BREAK, graph_texts
from tui_trainer.learn.scalar.graph import ScalarGraph, three_rates
from tui_trainer.learn.scalar.parser import CONSTANT, EXAMPLES, INPUT, GraphError
from tui_trainer.learn.scalar.translation import say, translated
from tui_trainer.ui.graph_app import GraphScreen

ROOT = Path(tui_trainer.__file__).parent
SOURCES = (
    *(ROOT / "learn" / "scalar").glob("*.py"),
    *(ROOT / "ui" / "panels" / "scalar_graph").glob("*.py"),
    ROOT / "ui" / "graph_app.py",
)
SAME = {"gradient", "Expression"}
"""Words that are the same in French."""


def templates() -> Iterator[str]:
    """The texts given to `say`, and those that are translated by their value."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="say") | ast.Attribute(attr="say"),
                    args=[ast.Constant(value=str() as text)],
                ):
                    yield text
    yield from (*GraphScreen.tabs, INPUT, CONSTANT, *(example.title for example in EXAMPLES))
    for expression, name in (("(a - b)**2", "a"), ("a*b", "a")):
        graph = ScalarGraph.of(expression, {"a": 1.0, "b": 3.0})
        yield from (run.label for run in three_rates(graph, name).runs)


def fields(template: str) -> set[tuple[str | None, str | None]]:
    return {(name, form) for _, name, form, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_every_text_is_there(language: str) -> None:
    texts = graph_texts(language)
    assert set(texts) == set(templates())
    for english, text in texts.items():
        assert fields(english) == fields(text)
        assert text != english or english in SAME
        assert "'" not in text, "an apostrophe is ’"
        assert not re.search(rf"[^{NO_BREAK}][;:?!](?= |$)", text), text


def test_values_that_are_messages_are_translated_too() -> None:
    message = say("{given} is not a number", given=say("nothing"))
    assert message == "nothing is not a number"
    assert translated(message, "fr") == "rien n’est pas un nombre"
    assert translated(message, "en") == message
    assert translated("of a user", "fr") == "of a user"


def test_braces_of_a_value_stay() -> None:
    assert translated(say("wrote {path}", path="{x}.svg"), "fr") == "{x}.svg est écrit"


def test_an_error_is_in_english_until_it_is_translated() -> None:
    with pytest.raises(GraphError) as caught:
        ScalarGraph.of("1 + log(a - b)", {"a": 2, "b": 3})
    assert caught.value.message == "the logarithm of a negative number, -1"
    assert translated(caught.value.message, "fr") == "le logarithme d’un nombre négatif, -1"
    assert translated(caught.value.hint, "fr") == "là, a - b = -1"
