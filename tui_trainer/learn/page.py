"""The pages: their texts in each language, and the numbers written into them.

A page is a Markdown file: a title, the text, and three sections (to try, question, answer), whose
headings are in the language of the page. `{name:.3f}` is the placeholder of a measured value, with
a format specification of Python. No value is written out in the text, so that every number on the
screen was measured. Numbers in running text and tables are written as in the language of the page
(`0,090`), those in code as in Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from tui_trainer.config.atomic_file import replacing
from tui_trainer.learn.measurement_process import Value

TEXTS = Path(__file__).parent / "pages"
"""A folder for each language, with a file for each page and the words of the screen."""
LANGUAGES = ("en", "fr")
KEY = "key_"
"""Prefix of the words that name keys: `key_learn_open` is for the binding `learn.open`."""
NO_BREAK, NARROW_NO_BREAK = "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}"
PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)(?::([^{}\s]*))?\}")
_COMMAND = re.compile(r"`tui-trainer ([^`]*)`")
_SECTION = re.compile(r"^## .*$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """The text of a page in one language, in Markdown with placeholders."""

    name: str
    language: str
    title: str
    body: str
    """The text before the three sections."""
    to_try: str
    """The section with one thing to try, including its heading."""
    question: str
    """The section with a question that the measurement answers, including its heading."""
    answer: str

    @property
    def text(self) -> str:
        """Everything but the answer."""
        return "\n\n".join((self.body, self.to_try, self.question))


def load_page(name: str, language: str) -> Page:
    """Read a page. `name` is one of `catalog.PAGES`."""
    text = (TEXTS / language / f"{name}.md").read_text(encoding="utf-8")
    heads = [match.start() for match in _SECTION.finditer(text)]
    title, _, body = text[: heads[0]].partition("\n")
    to_try, question, answer = (
        text[start:end].strip() for start, end in zip(heads, [*heads[1:], len(text)], strict=True)
    )
    return Page(name, language, title.removeprefix("# "), body.strip(), to_try, question, answer)


def command_to_try(page: Page) -> tuple[str, ...]:
    """The first command of a page's section to try that can be run as it is; () for none."""
    for command in _COMMAND.findall(" ".join(page.to_try.split())):
        given = tuple(shlex.split(command))
        if not any(word.isupper() or word.endswith("/") for word in given):
            return given
    return ()


@cache
def titles(language: str) -> dict[str, str]:
    """The titles of all pages, by name."""
    from tui_trainer.learn.catalog import PAGES

    return {name: load_page(name, language).title for name in PAGES}


@cache
def words(language: str) -> dict[str, str]:
    """The texts of the screen around the pages."""
    return _texts_in(TEXTS / language / "words.toml")


def key_labels(language: str) -> dict[str, str]:
    """Id of a binding → name of its key, on the screens that exist in each language."""
    return {
        name.removeprefix(KEY).replace("_", "."): text
        for name, text in words(language).items()
        if name.startswith(KEY)
    }


@cache
def help_texts(language: str) -> dict[str, str]:
    """English text of the help → text in `language`; missing ones stay English."""
    file = TEXTS / language / "help.toml"
    return _texts_in(file) if file.is_file() else {}


@cache
def graph_texts(language: str) -> dict[str, str]:
    """English text of the scalar graph → text in `language`; empty for English."""
    file = TEXTS / language / "graph.toml"
    return _texts_in(file) if file.is_file() else {}


def _texts_in(file: Path) -> dict[str, str]:
    import tomllib  # not needed by commands that show none of these texts

    return dict(tomllib.loads(file.read_text(encoding="utf-8")))


def language_of(environment: Mapping[str, str] = os.environ) -> str:
    """The language that LANGUAGE, LC_ALL, LC_MESSAGES or LANG selects, in the order in which
    gettext reads them; English where there are no pages in that language."""
    wanted = next(
        (
            environment[name]
            for name in ("LC_ALL", "LC_MESSAGES", "LANG")
            if environment.get(name, "")
        ),
        "",
    )
    if wanted.split(".")[0] not in ("", "C", "POSIX") and environment.get("LANGUAGE", ""):
        wanted = environment["LANGUAGE"].split(":")[0]
    language = re.split(r"[_.@]", wanted)[0].lower()
    return language if language in LANGUAGES else LANGUAGES[0]


def placeholders(text: str) -> set[str]:
    """The names of the values for which a text has placeholders."""
    return {match[1] for match in PLACEHOLDER.finditer(text)}


def written(value: Value, form: str, language: str, code: bool = False) -> str:
    """A value, formatted by `form`, as it is written in a text of `language`, or in code."""
    if isinstance(value, list):
        items = [written(item, form, language, code) for item in value]
        separator = f"{NO_BREAK}; " if language == "fr" and not code else ", "
        return f"[{separator.join(items)}]"
    text = str(value) if isinstance(value, bool) else format(value, form)
    if code or isinstance(value, str | bool):
        return text
    if "e" not in text:
        text = text.lstrip("-") if not text.strip("-0.,") else text  # no negative zero
        text = text.replace("-", "\N{MINUS SIGN}")
    if language == "fr":
        return text.replace(",", NARROW_NO_BREAK).replace(".", ",")
    return text


FILE = "learn.json"

PageState = Literal["new", "read", "answered"]


class ReadingProgress(msgspec.Struct):
    """The pages that were opened and those whose question was answered, by name."""

    read: list[str] = msgspec.field(default_factory=list)
    answered: list[str] = msgspec.field(default_factory=list)
    language: str = ""
    """The language that the user has chosen; "" for that of the environment."""

    def state(self, page: str) -> PageState:
        """The state of a page."""
        if page in self.answered:
            return "answered"
        return "read" if page in self.read else "new"

    @property
    def shown_language(self) -> str:
        """The language to show pages in."""
        return self.language if self.language in LANGUAGES else language_of()

    def mark(self, page: str, answered: bool = False) -> bool:
        """Note that a page was opened or answered; returns whether its state has changed."""
        before = self.state(page)
        if page not in self.read:
            self.read.append(page)
        if answered and page not in self.answered:
            self.answered.append(page)
        return self.state(page) != before


def load_progress() -> ReadingProgress:
    """The saved progress; an empty one if there is no readable file."""
    try:
        return msgspec.json.decode(_file().read_bytes(), type=ReadingProgress)
    except (OSError, msgspec.MsgspecError):
        return ReadingProgress()


def save_progress(progress: ReadingProgress) -> None:
    """Save the progress, if the directory can be written to."""
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(progress)) + b"\n")


def _file() -> Path:
    return Path(platformdirs.user_state_dir("tui-trainer", appauthor=False)) / FILE
