"""`tui-trainer learn [PAGE]`: short pages whose numbers are measured on live models."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter, validators

from tui_trainer.cli.commands.common import RunsDir, flag
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.options import StartOptions
from tui_trainer.cli.start import start_screen
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.learn.catalog import PAGES, UnknownPage, find_page
from tui_trainer.learn.measurement_process import (
    MeasurementError,
    MeasurementProcess,
    PageMeasurement,
)
from tui_trainer.learn.page import (
    Page,
    ReadingProgress,
    command_to_try,
    load_page,
    load_progress,
    save_progress,
    titles,
    words,
)
from tui_trainer.learn.page_layout import Numbers, laid_out, plain

MAX_WIDTH = 84


def learn(
    page: Annotated[
        str | None, Parameter(help="name of a page (default: the list)", show_default=False)
    ] = None,
    *,
    language: Annotated[
        Literal["en", "fr"] | None,
        Parameter(
            help="language of the pages, from now on (default: that of $LANG)", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int,
        Parameter(
            help="seed of the measurement, for text and --json", validator=validators.Number(gte=0)
        ),
    ] = 1,
    answer: Annotated[bool, flag("print the answer to the question, too")] = False,
    try_it: Annotated[
        bool,
        Parameter(
            name="--try",
            help="run the command that the page proposes, then return to the page",
            negative=(),
            show_default=False,
        ),
    ] = False,
    plain: Annotated[bool, flag("print text even on a terminal")] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
    slow_link: Annotated[
        bool, flag("send less to the terminal: one frame in 2 s, and at once after a key")
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """learn how training works from pages that measure what they state"""
    try:
        name = find_page(page) if page is not None else ""
    except UnknownPage as error:
        raise UsageError(error.message, error.hint) from None
    progress = load_progress()
    if language is not None and language != progress.language:
        progress.language = language
        save_progress(progress)
    if try_it:
        return _try(load_page(name, progress.shown_language) if name else None)
    if not (json or plain or answer) and not why_no_screen():
        options = StartOptions(ascii=ascii, slow_link=slow_link, runs_dir=runs_dir)
        return start_screen(options, mode="learn", lesson=name)
    if not name:
        _print_list(progress, json)
        return 0
    shown = load_page(name, progress.shown_language)
    measurements = MeasurementProcess()
    try:
        measured = measurements.measure(name, seed)
    except MeasurementError as error:
        raise CommandError(error.message, error.hint) from error
    finally:
        measurements.close()
    if json:
        print(msgspec.json.encode(page_object(shown, measured)).decode())
    else:
        print(page_text(shown, measured, answer))
    return 0


def _try(page: Page | None) -> int:
    """Run the command that a page proposes, then replace this process by one that shows the
    page."""
    command = command_to_try(page) if page is not None else ()
    if page is None or not command:
        name = "the list" if page is None else page.name
        raise UsageError(f"{name} proposes no command that can be run as is")
    if why := why_no_screen():
        raise UsageError("--try needs a terminal", why)
    program = [sys.executable, "-P", "-m", "tui_trainer"]
    # Ctrl+C is for the command alone. A handler, since the command would inherit an ignored signal.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        subprocess.run([*program, *command], check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        input(f"\n{words(page.language)['return']} ")
    except (EOFError, KeyboardInterrupt):
        print()
        return 0
    os.execv(sys.executable, [*program, "learn", page.name])


def _print_list(progress: ReadingProgress, json: bool) -> None:
    language = progress.shown_language
    if json:
        pages = [
            {"page": name, "title": title, "state": progress.state(name)}
            for name, title in titles(language).items()
        ]
        print(msgspec.json.encode({"language": language, "pages": pages}).decode())
        return
    width = max(map(len, PAGES))
    for name, title in titles(language).items():
        state = progress.state(name)
        print(f"{name:{width}}  {title}{'' if state == 'new' else f' ({words(language)[state]})'}")
    print("\ntui-trainer learn PAGE prints one, on a terminal it opens it")


def page_text(page: Page, measured: PageMeasurement, answer: bool = False) -> str:
    """A page with its numbers as plain text."""
    numbers = Numbers(page.language, measured.values, quotes_code=True)
    text = f"# {page.title}\n\n{page.text}" + (f"\n\n{page.answer}" if answer else "")
    return plain(laid_out(text, numbers, min(MAX_WIDTH, shutil.get_terminal_size().columns)))


def page_object(page: Page, measured: PageMeasurement) -> dict[str, Any]:
    """A page, its numbers and the answer as one object."""
    numbers = Numbers(page.language, measured.values, quotes_code=True)

    def filled(markdown: str) -> str:
        return plain(laid_out(markdown, numbers, MAX_WIDTH))

    return {
        "page": page.name,
        "language": page.language,
        "title": page.title,
        "seed": measured.seed,
        "torch": measured.torch,
        "values": measured.values,
        "body": filled(page.body),
        "to_try": filled(page.to_try),
        "question": filled(page.question),
        "answer": filled(page.answer),
    }
