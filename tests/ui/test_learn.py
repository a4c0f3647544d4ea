"""The pages on the screen: the list, reading, measuring again, languages, the way from the help."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from textual.pilot import Pilot

from tests.ui.fake import fake_gpt
from tests.ui.screens import SIZES, app_on, frame, settle, text_of, until
from tests.ui.test_contrast import hard_to_read
from tests.ui.test_findings import finding
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.measurement_process import MeasurementError, PageMeasurement, Value
from tui_trainer.learn.page import load_page, load_progress, placeholders
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.leaving import Leaving
from tui_trainer.ui.lessons import OF_ANY_SCREEN, OF_SCREEN, lessons_for
from tui_trainer.ui.screens import FURTHER_SCREENS, SCREENS, learn
from tui_trainer.ui.screens.learn import LearnScreen
from tui_trainer.ui.theme import THEMES
from tui_trainer.ui.widgets.lines import LineView


class FakeMeasurements:
    """Answers with values of its own; `gate` holds answers back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: MeasurementError | None = None
        self.closed = False

    def prepare(self) -> None:
        pass

    def measure(self, name: str, seed: int) -> PageMeasurement:
        self.asked.append((name, seed))
        assert self.gate.wait(240)
        if self.error is not None:
            raise self.error
        page = load_page(name, "en")
        values: dict[str, Value] = {}
        for name in sorted(placeholders(page.text + page.answer)):
            values[name] = 7
        values |= {"loss": 3.0 + seed, "norm_once": 0.5 * seed, "left_none": "None"}
        return PageMeasurement(name, seed, values, 12.3, "2.13.0")

    def release(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.gate.set()


@pytest.fixture(autouse=True)
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMeasurements:
    fake = FakeMeasurements()
    monkeypatch.setattr(learn, "MeasurementProcess", lambda: fake)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    return fake


async def press(pilot: Pilot[int], *keys: str) -> None:
    for key in keys:
        await pilot.press(key)
        await settle(pilot)


async def shows(pilot: Pilot[int], app: TuiTrainerApp, *texts: str) -> None:
    def all_there() -> bool:
        shown = text_of(app)
        return all(text in shown for text in texts)

    await until(pilot, all_there, f"{texts} on\n{text_of(app)}")


def title(name: str, language: str = "en") -> str:
    return load_page(name, language).title


@pytest.mark.parametrize("size", SIZES)
async def test_the_list_and_a_page(size: tuple[int, int], measurements: FakeMeasurements) -> None:
    app = app_on("learn", None)
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        for name in PAGES:
            assert title(name) in text_of(app)
        await press(pilot, "enter")
        await shows(pilot, app, f"1/{len(PAGES)}", "seed 1, measured in 12 ms", "of 7×7 holds 7")
        assert load_progress().read == [PAGES[0]]
        await press(pilot, "escape")
        assert title(PAGES[1]) in text_of(app)
    assert measurements.closed


async def test_a_page_is_there_before_its_numbers(measurements: FakeMeasurements) -> None:
    measurements.gate.clear()
    app = app_on("learn", None)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "enter")
        await shows(pilot, app, "measuring…", "A weight matrix of …×… holds")
        measurements.gate.set()
        await shows(pilot, app, "measured in 12 ms")
        assert "measuring…" not in text_of(app)


async def test_only_the_page_in_front_is_measured_next(measurements: FakeMeasurements) -> None:
    measurements.gate.clear()
    app = app_on("learn", None)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "enter", "n", "n")
        measurements.gate.set()
        await shows(pilot, app, f"3/{len(PAGES)}", "measured in 12 ms")
        assert measurements.asked == [(PAGES[0], 1), (PAGES[2], 1)]
        await press(pilot, "left")
        await shows(pilot, app, f"2/{len(PAGES)}", "measured in 12 ms")
        assert measurements.asked[2:] == [(PAGES[1], 1)]


async def test_another_seed_shows_what_is_law(measurements: FakeMeasurements) -> None:
    app = app_on("learn", None)
    app.lesson = "loss-graph"
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, app, "4.0000")
        await press(pilot, "r")
        await shows(pilot, app, "seed 2:", " changed", "underlined: the same with seed 1", "5.0000")
        screen = app.screen
        assert isinstance(screen, LearnScreen)
        view = screen.query_one(learn.PageView)
        styles = {text: style for line in view._laid_out for text, style in line}
        assert styles["5.0000"] == "warning"
        assert styles["7"] == "good underline"


async def test_the_answer_is_shown_on_request_and_remembered(
    measurements: FakeMeasurements,
) -> None:
    app = app_on("learn", None)
    app.lesson = "loss-graph"
    async with app.run_test(size=(80, 48)) as pilot:
        await shows(pilot, app, "measured", "a shows the answer")
        assert "No graph is freed" not in text_of(app)
        await press(pilot, "a")
        await shows(pilot, app, "7 nodes. No graph is freed", f"1 of {len(PAGES)} answered")
        assert load_progress().answered == ["loss-graph"]
        await press(pilot, "a")
        assert "No graph is freed" not in text_of(app)
        await press(pilot, "escape")
        assert "✓" in text_of(app)


async def test_the_language_is_changed_and_remembered(measurements: FakeMeasurements) -> None:
    app = app_on("learn", None)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "enter", "l")
        await shows(pilot, app, "Apprendre", title(PAGES[0], "fr"), "graine 1")
        assert load_progress().language == "fr"
        await press(pilot, "l")
        await shows(pilot, app, title(PAGES[0], "en"))


async def test_the_language_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    app = app_on("learn", None)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert title(PAGES[0], "fr") in text_of(app)


async def test_without_pytorch_the_text_stays_and_the_reason_is_shown(
    measurements: FakeMeasurements,
) -> None:
    measurements.error = MeasurementError("there is no module *torch*", "pip_install [torch]")
    app = app_on("learn", None)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await press(pilot, "enter")
        await shows(pilot, app, "could not be measured", "no module *torch*", "pip_install [torch]")
        assert "A weight matrix of" in text_of(app)
        measurements.error = None
        await press(pilot, "r")
        await shows(pilot, app, "seed 1, measured")


async def test_accents_are_kept_readable_in_ascii() -> None:
    app = app_on("learn", None, ascii=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "l", "enter")
        await shows(pilot, app, "A la main, la regle de la chaine")
        assert text_of(app).isascii()


async def test_the_cursor_passes_over_the_heading() -> None:
    app = app_on("learn", None)
    async with app.run_test(size=(80, 40)) as pilot:
        await shows(pilot, app, "Guided runs")
        pages = app.screen.query_one(learn.PageList)
        await press(pilot, *["down"] * len(PAGES))
        assert learn.ENTRIES[pages.cursor] == "zero-grad"
        await press(pilot, "up")
        assert learn.ENTRIES[pages.cursor] == PAGES[-1]
        await press(pilot, "enter", "n")
        await shows(pilot, app, "tui-trainer demo zero-grad")
        await press(pilot, "left")
        await shows(pilot, app, f"{len(PAGES)}/{len(PAGES)}")


async def test_a_key_runs_what_the_page_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaving, "next_command", ())
    app = app_on("learn", None)
    app.lesson = "accumulation"
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, app, "measured", "t Try it")
        await press(pilot, "t")
        await until(pilot, lambda: Leaving.next_command, "leaving")
    assert Leaving.next_command == ("learn", "accumulation", "--try")


async def test_a_page_without_a_command_has_no_key_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "command_to_try", lambda page: ())
    app = app_on("learn", None)
    app.lesson = "attention-scores"
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, app, "measured")
        assert "Try it" not in text_of(app)


@pytest.mark.parametrize("theme", [each.name for each in THEMES])
async def test_the_text_of_pages_and_guided_runs_can_be_read(theme: str) -> None:
    app = app_on("learn", None)
    async with app.run_test(size=(160, 45)) as pilot:
        app.theme = theme
        await settle(pilot)
        await press(pilot, *["down"] * len(PAGES))
        assert hard_to_read(app) == []
        await press(pilot, "home", "enter")
        await shows(pilot, app, "seed 1, measured")
        await press(pilot, "r")
        await shows(pilot, app, "underlined: the same with seed 1")
        assert hard_to_read(app) == []


# ---------------------------------------------------------------- from other screens


async def test_the_help_leads_to_the_page_of_the_screen(measurements: FakeMeasurements) -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "question_mark")
        await shows(pilot, app, "Learn about this", title(app.lessons[0]))
        await press(pilot, "l")
        await shows(pilot, app, title(app.lessons[0]), "measured in")
        await press(pilot, "escape")
        assert app.current_mode == "parameters"


async def test_the_phase_in_which_a_run_is_paused_comes_first() -> None:
    session = fake_gpt()
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        app.draw_frame()
        await settle(pilot)
        status = app.snapshot.status
        paused = type(status)(state="paused", step=3, phase="zero_grad")
        assert lessons_for(app.screen, paused)[0] == "accumulation"


def line_views(kind: type[LineView]) -> Iterator[type[LineView]]:
    for each in kind.__subclasses__():
        yield each
        yield from line_views(each)


def test_screens_and_panels_name_pages_that_exist() -> None:
    screens = (*SCREENS, *FURTHER_SCREENS)
    for entry in screens:
        entry.load()
    of_views = [view.lessons for view in line_views(LineView)]
    named = [name for names in of_views if isinstance(names, tuple) for name in names]
    assert named
    own_apps = {"graph", "compare"}
    assert set(OF_SCREEN) <= {entry.mode for entry in screens} | own_apps
    pages_themselves = {"help", "learn"}
    assert {entry.mode for entry in screens} == (set(OF_SCREEN) | pages_themselves) - own_apps
    assert all(OF_SCREEN.values())
    of_screens = [name for names in OF_SCREEN.values() for name in names]
    assert {*named, *OF_ANY_SCREEN, *of_screens} == set(PAGES)


async def test_the_panel_in_view_comes_first() -> None:
    app = app_on("dashboard", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        app.draw_frame()
        for page in ("loss-graph", "gradient", "clipping", "updates", "qkv"):
            await settle(pilot)
            assert lessons_for(app.screen, app.snapshot.status)[0] == page
            await press(pilot, "right")


async def test_a_finding_leads_to_the_page_about_it() -> None:
    session = fake_gpt(300)
    finding(session, rule="attention-logits")
    app = app_on("findings", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        assert lessons_for(app.screen, app.snapshot.status)[0] == "attention-scores"


async def test_the_palette_has_the_list_and_every_page() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        commands = {name: run for name, _, run in ActionProvider(app.screen).commands()}
        assert "Learn" in commands
        commands[f"Learn: {title('clipping')}"]()
        await shows(pilot, app, title("clipping"), "measured in")
        await press(pilot, "escape")
        assert app.current_mode == "log"


async def test_the_start_screen_offers_the_pages() -> None:
    from tests.ui.test_start import Started, app_with

    app = app_with(Started())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "Learn" in text_of(app)
        await press(pilot, "ctrl+l")
        assert app.current_mode == "learn"
        await press(pilot, "escape")
        assert app.current_mode == "start"


async def test_the_help_of_the_pages_leads_back_to_them() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "ctrl+l", "question_mark", "l")
        assert app.current_mode == "learn"
        await press(pilot, "escape")
        assert app.current_mode == "log"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "theme"), [*((size, "tui-trainer") for size in SIZES), (SIZES[0], "tui-trainer-light")]
)
def test_looks(snap_compare: Callable[..., bool], size: tuple[int, int], theme: str) -> None:
    app = TuiTrainerApp(None, start_mode="learn", theme_name=theme, lesson="accumulation")

    async def again(pilot: Pilot[int]) -> None:
        await shows(pilot, app, "measured in 12 ms")
        await press(pilot, "r")
        await shows(pilot, app, "seed 2:")

    assert snap_compare(app, terminal_size=size, run_before=again)


async def test_from_a_run_and_back() -> None:
    app = app_on("log", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await press(pilot, "ctrl+l", "enter", "escape")
        assert app.current_mode == "learn"
        await press(pilot, "escape")
        assert app.current_mode == "log"
