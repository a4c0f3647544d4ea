"""The texts of the scalar graph in each language.

They are written in English where they are used, most of them as templates that `say` fills in. What
it returns remembers its template, so that `translated` finds the same text in another language:
`pages/fr/graph.toml` has the French for each English template.
"""

from __future__ import annotations

from typing import Self

from tui_trainer.learn.page import graph_texts


class Message(str):
    """An English text, with the template and the values that it was made from."""

    template: str
    values: dict[str, object]

    __slots__ = ("template", "values")

    def __new__(cls, template: str, values: dict[str, object]) -> Self:
        made = super().__new__(cls, template.format(**values))
        made.template, made.values = template, values
        return made


def say(template: str, **values: object) -> Message:
    """A text in English that can be translated. Values that are messages are translated, too."""
    return Message(template, values)


def translated(text: str, language: str) -> str:
    """A text in another language; as it is where there is no translation."""
    texts = graph_texts(language)
    if not isinstance(text, Message):
        return texts.get(text, text)
    values = {
        name: translated(value, language) if isinstance(value, Message) else value
        for name, value in text.values.items()
    }
    return texts.get(text.template, text.template).format(**values)
