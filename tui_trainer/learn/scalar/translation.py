"""The texts of the scalar graph in each language.

The texts are written in English where they are used, most of them as templates that `say` fills in.
A `Message` keeps its template, so that `translated` finds the same text in another language:
`pages/fr/graph.toml` has the French for each English template.
"""

from __future__ import annotations

from typing import Self

from tui_trainer.learn.page import graph_texts


class Message(str):
    """An English text that keeps its template and the values filled in."""

    template: str
    values: dict[str, object]

    __slots__ = ("template", "values")

    def __new__(cls, template: str, values: dict[str, object]) -> Self:
        made = super().__new__(cls, template.format(**values))
        made.template, made.values = template, values
        return made


def say(template: str, **values: object) -> Message:
    """An English text that can be translated, along with those of its values that are messages."""
    return Message(template, values)


def translated(text: str, language: str) -> str:
    """A text in another language; unchanged if there is no translation."""
    texts = graph_texts(language)
    if not isinstance(text, Message):
        return texts.get(text, text)
    values = {
        name: translated(value, language) if isinstance(value, Message) else value
        for name, value in text.values.items()
    }
    return texts.get(text.template, text.template).format(**values)
