"""The pages: their texts in each language, and the numbers written into them.

A page is a Markdown file: a title, the text, and the three sections of `SECTIONS`, whose headings
are in the language of the page. `{name:.3f}` stands for a measured value in Python's notation of
formats; none is written out in the text, so that each number on the screen is one that was
measured. In running text and tables a number has the signs of the language (`0,090`), in code those
of Python.
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
"""How the words begin that name keys: `key_learn_open` is the binding `learn.open`."""
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
    """What the page explains."""
    to_try: str
    """One thing to try, with its heading as the others."""
    question: str
    """A question whose answer the measurement gives."""
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
    """The first command that a page proposes and that can be run as is; () for none."""
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
    """The names of keys by the id of their binding, of the screens that are in each language."""
    return {
        name.removeprefix(KEY).replace("_", "."): text
        for name, text in words(language).items()
        if name.startswith(KEY)
    }


@cache
def help_texts(language: str) -> dict[str, str]:
    """The texts of the help by those in English; what is missing stays English."""
    file = TEXTS / language / "help.toml"
    return _texts_in(file) if file.is_file() else {}


@cache
def graph_texts(language: str) -> dict[str, str]:
    """The texts of the scalar graph by those in English, which need none."""
    file = TEXTS / language / "graph.toml"
    return _texts_in(file) if file.is_file() else {}


def _texts_in(file: Path) -> dict[str, str]:
    import tomllib  # commands that show no text of these start without it

    return dict(tomllib.loads(file.read_text(encoding="utf-8")))


def language_of(environment: Mapping[str, str] = os.environ) -> str:
    """The language that LANGUAGE, LC_ALL, LC_MESSAGES or LANG asks for, in the order in which
    gettext reads them; English for one in which there are no pages."""
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
    """The names of the values that a text states."""
    return {match[1] for match in PLACEHOLDER.finditer(text)}


def written(value: Value, form: str, language: str, code: bool = False) -> str:
    """A value as written in a text of `language`, or in code."""
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
    """The language that was chosen; "": that of the environment."""

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
        """Note that a page was opened or answered. Returns whether that is new."""
        before = self.state(page)
        if page not in self.read:
            self.read.append(page)
        if answered and page not in self.answered:
            self.answered.append(page)
        return self.state(page) != before


def load_progress() -> ReadingProgress:
    """What was saved; nothing where there is no file, or none that can be read."""
    try:
        return msgspec.json.decode(_file().read_bytes(), type=ReadingProgress)
    except (OSError, msgspec.MsgspecError):
        return ReadingProgress()


def save_progress(progress: ReadingProgress) -> None:
    """Save it, if the directory can be written to."""
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(progress)) + b"\n")


def _file() -> Path:
    return Path(platformdirs.user_state_dir("tui-trainer", appauthor=False)) / FILE
