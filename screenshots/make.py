"""Makes the pictures here, each from a real run: `make screenshots [ONLY=dashboard-80x24]`.

A run process is started as `tui-trainer` would start it, the app looks at it through its session,
and what the app shows is written as SVG (and as PNG, where rsvg-convert is installed).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cells import redraw
from textual.pilot import Pilot

from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.start import demo_spec
from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.config.run_spec import RunSpec, create_run_directory
from tui_trainer.config.training import resolve, to_flat
from tui_trainer.learn.demos import find_demo
from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.parser import EXAMPLES
from tui_trainer.learn.scalar.svg import svg
from tui_trainer.protocol.messages import Breakpoint
from tui_trainer.protocol.schema import SCRIPT, Scalar
from tui_trainer.runs.launch import launch
from tui_trainer.tasks.definition import find_task
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.graph_app import GraphApp, GraphScreen
from tui_trainer.ui.screens.learn import LearnScreen

HERE = Path(__file__).resolve().parent
LONGEST_S = 300.0


@dataclass(frozen=True)
class Picture:
    """What to train, how far, and which screen to show of it at which size."""

    name: str
    task: str = "gpt"
    preset: str | None = None
    settings: dict[str, Scalar] = field(default_factory=dict)
    step: int = 400
    size: tuple[int, int] = (120, 40)
    keys: tuple[str, ...] = ()
    paused_after: str = ""
    """Pause, and go phase by phase to the end of this one."""


EXPLODING: dict[str, Scalar] = {
    "learning_rate": 0.5,
    "min_learning_rate": 0.5,
    "schedule": "constant",
    "optimizer": "sgd",
    "warmup_steps": 0,
    "clip": "off",
}

PICTURES = (
    Picture("dashboard-80x24", size=(80, 24)),
    Picture("dashboard-120x40"),
    Picture("dashboard-200x60", size=(200, 60)),
    Picture("attention", keys=("2",)),
    Picture("parameters", keys=("3",)),
    Picture("samples-gpt", keys=("4",), step=1000),
    Picture("samples-vit", "vit", keys=("4",), step=300),
    Picture("dashboard-vit", "vit", step=300),
    Picture("paused-after-backward", paused_after="backward", step=200),
    Picture("exploding", settings=EXPLODING, step=150),
    Picture(
        "autograd",
        paused_after="backward",
        step=60,
        keys=("g", "slash", *"blocks.1 query", "enter", "end"),
    ),
    Picture("inspect", paused_after="step", step=600, keys=("3", "down", "enter", "m")),
    Picture(
        "inspect-200x60",
        paused_after="backward",
        step=200,
        size=(200, 60),
        keys=("3", *["down"] * 3, "enter", "m", "u", "x", *"3,17", "enter", "p", "p"),
    ),
    Picture(
        "parameter-groups",
        paused_after="backward",
        step=60,
        keys=("3", "down", "enter", "G", "s", "s"),
    ),
    Picture(
        "attention-layer",
        paused_after="backward",
        step=700,
        size=(120, 40),
        keys=("2", "down", "enter", *["left"] * 6),
    ),
    Picture(
        "residual-stream",
        paused_after="backward",
        step=700,
        keys=("2", "down", "down", "enter", "m", "m", "m", "m"),
    ),
    Picture(
        "attention-vit",
        "vit",
        paused_after="backward",
        step=300,
        keys=("2", "down", "enter", "m", "h"),
    ),
    Picture("findings", settings=EXPLODING, step=150, keys=("8",)),
)


@dataclass(frozen=True)
class GraphPicture:
    """Which example of the scalar graph to show, after which keys."""

    name: str
    example: str
    size: tuple[int, int] = (120, 40)
    keys: tuple[str, ...] = ()


GRAPHS = (
    GraphPicture("graph", "neuron", keys=("p",) * 7),
    GraphPicture("graph-80x24", "chain", (80, 24), ("p",) * 6),
    GraphPicture("graph-learning-rate", "weight", (80, 24), ("space", "left")),
    GraphPicture("graph-error", "neuron", (80, 24), ("space", "right", "right")),
)
BACKPROPAGATION = "backpropagation"
"""The picture that `tui-trainer graph --svg` writes."""


@dataclass(frozen=True)
class PagePicture:
    """Which page of `tui-trainer learn` to show, after which keys."""

    name: str
    page: str = ""
    size: tuple[int, int] = (80, 24)
    keys: tuple[str, ...] = ()


PAGES = (
    PagePicture("learn-80x24", "accumulation", keys=("r",)),
    PagePicture("learn", "attention-scores", (200, 45), ("r", "a")),
    PagePicture("learn-fr", "attention-scores", (80, 40), ("l",)),
)


async def make_page(picture: PagePicture) -> None:
    """Open a page, press the keys, wait for its numbers after each, and write the screen down."""
    app = TuiTrainerApp(start_mode="learn", lesson=picture.page)
    async with app.run_test(size=picture.size) as pilot:
        for key in ("", *picture.keys):
            if key:
                await pilot.press(key)
            await pilot.pause()
            async with asyncio.timeout(LONGEST_S):
                while not isinstance(app.screen, LearnScreen) or app.screen.measuring:
                    await pilot.pause(0.1)
        await pilot.pause(0.5)
        write(picture.name, app.export_screenshot(title="tui-trainer"))


async def make_graph(picture: GraphPicture) -> None:
    """Open an example, press the keys, wait for PyTorch, and write the screen down."""
    found = next(example for example in EXAMPLES if example.name == picture.example)
    app = GraphApp(ScalarGraph.of(found.text, found.values))
    async with app.run_test(size=picture.size) as pilot:
        await pilot.pause()
        for key in picture.keys:
            await pilot.press(key)
        async with asyncio.timeout(LONGEST_S):
            while not isinstance(app.screen, GraphScreen) or app.screen.state.autograd is None:
                await pilot.pause(0.1)
        await pilot.pause()
        write(picture.name, app.export_screenshot(title="tui-trainer"))


DEMO, DEMO_NAME = "demo", "bad-batch"


async def make_demo(runs: Path) -> None:
    """The screen of a guided run, paused at its breakpoint."""
    demo = find_demo(DEMO_NAME)
    spec = demo_spec(demo, RunOptions(runs_dir=runs), guided=True)
    launched = launch(spec)
    session = LiveSession(connector(launched.connect))
    app = TuiTrainerApp(session, start_mode=demo.screen)
    try:
        async with app.run_test(size=(120, 40)) as pilot:
            await until(pilot, app, lambda: app.snapshot.status.stopped_at is not None)
            await pilot.pause(1.0)
            write(DEMO, app.export_screenshot(title="tui-trainer"))
    finally:
        launched.process.terminate()
        launched.process.wait(60)


TUTORIAL = "tutorial"
TUTORIAL_SCRIPT = HERE.parent / "docs" / "examples" / "reverse.py"
TUTORIAL_STOP = "step == 300 at backward"


async def make_tutorial(runs: Path) -> None:
    """The session of docs/tutorial.md, key by key: five pictures of one run."""
    directory = runs / "before"
    directory.mkdir(mode=0o700)
    spec = RunSpec(
        name="before", directory=str(directory), task=SCRIPT, script=str(TUTORIAL_SCRIPT),
        snapshots=100 << 20, breakpoints=(Breakpoint(1, TUTORIAL_STOP, once=True),),
    )  # fmt: skip
    launched = launch(spec)
    app = TuiTrainerApp(LiveSession(connector(launched.connect)))

    def status() -> tuple[str, int]:
        return app.snapshot.status.state, app.snapshot.status.step

    try:
        async with app.run_test(size=(120, 40)) as pilot:

            async def press(*keys: str) -> None:
                for key in keys:
                    await pilot.press(key)
                    await pilot.pause(0.5)

            async def take(part: str) -> None:
                await pilot.pause(2.0)
                write(f"{TUTORIAL}-{part}", app.export_screenshot(title="tui-trainer"))

            await until(pilot, app, lambda: status() == ("paused", 299))
            await take("loss")
            await press("3", *["down"] * 12)
            await take("parameters")
            await press("enter", "u", "x", *"3,17", "enter")
            await press("s")
            await until(pilot, app, lambda: status() == ("paused", 300))
            await take("update")
            await press("T", "end")
            await take("timeline")
            await press("enter")
            await pilot.pause(5.0)
            await press("escape", "E", *"weight_decay[1]=0.01")
            await take("settings")
            await press("enter", "escape", "1", "n", *["backspace"] * 3, *"300", "enter")
            await until(pilot, app, lambda: status()[1] == 600 and bool(app.snapshot.related))
            await pilot.pause(5.0)
            await take("mended")
    finally:
        launched.process.terminate()
        launched.process.wait(60)


async def make(picture: Picture, runs: Path) -> None:
    """Train as far as the picture needs, show it, and write it down."""
    definition = find_task(picture.task)
    configuration = to_flat(resolve(definition, picture.preset, picture.settings))
    name, directory = create_run_directory(picture.task, runs)
    spec = RunSpec(
        name=name, directory=str(directory), task=picture.task, configuration=configuration
    )
    launched = launch(spec)
    app = TuiTrainerApp(LiveSession(connector(launched.connect)))
    try:
        async with app.run_test(size=picture.size) as pilot:
            await until(pilot, app, lambda: app.snapshot.status.step >= picture.step)
            if picture.paused_after:
                await pause_after(pilot, app, picture.paused_after)
            for key in picture.keys:
                await pilot.press(key)
                if key == "g":  # from now on the batch of each step is kept
                    await until(pilot, app, lambda: getattr(app.screen, "graph", None) is not None)
                    at = app.snapshot.status.step
                    await pilot.press("space")
                    await until(pilot, app, lambda: app.snapshot.status.step > at + 1)  # noqa: B023
                    await pause_after(pilot, app, picture.paused_after)
                    await pilot.pause(2.0)
            await pilot.pause(1.0)
            write(picture.name, app.export_screenshot(title="tui-trainer"))
    finally:
        launched.process.terminate()
        launched.process.wait(60)


async def until(pilot: Pilot[int], app: TuiTrainerApp, holds: Callable[[], bool]) -> None:
    """Wait until `holds()`, or until the run has ended. Raises TimeoutError after `LONGEST_S`."""
    async with asyncio.timeout(LONGEST_S):
        while not holds() and not app.snapshot.status.ended:
            await pilot.pause(0.1)


async def pause_after(pilot: Pilot[int], app: TuiTrainerApp, phase: str) -> None:
    """Pause, then go on by single phases."""

    def stands() -> bool:
        return app.snapshot.status.state == "paused" and app.snapshot.report is not None

    await pilot.press("space")
    await until(pilot, app, stands)
    while app.snapshot.status.phase != phase:
        before = app.snapshot.status.phase
        await pilot.press("p")
        await until(pilot, app, lambda: stands() and app.snapshot.status.phase != before)  # noqa: B023
    await until(pilot, app, lambda: stands() and app.snapshot.report.phase == phase)  # type: ignore[union-attr]


def write(name: str, svg: str) -> None:
    """Write the SVG, and the PNG next to it where it can be made."""
    path = HERE / f"{name}.svg"
    # Without it rsvg-convert, and with it what is aligned, loses the spaces at the left.
    path.write_text(redraw(svg), encoding="utf-8")
    if converter := shutil.which("rsvg-convert"):
        subprocess.run([converter, "-z", "1.0", "-o", path.with_suffix(".png"), path], check=True)
    print(f"{path.name} written", flush=True)


def main() -> None:
    """Make all pictures, or those that are named."""
    wanted = sys.argv[1:]
    known = {each.name for each in (*PICTURES, *GRAPHS, *PAGES)} | {
        BACKPROPAGATION,
        DEMO,
        TUTORIAL,
    }
    unknown = set(wanted) - known
    if unknown:
        sys.exit(f"no picture is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="tui-trainer-pictures-") as runs:
        for picture in PICTURES:
            if not wanted or picture.name in wanted:
                asyncio.run(make(picture, Path(runs)))
        if not wanted or DEMO in wanted:
            asyncio.run(make_demo(Path(runs)))
        if not wanted or TUTORIAL in wanted:
            asyncio.run(make_tutorial(Path(runs)))
    for page in PAGES:
        if not wanted or page.name in wanted:
            with tempfile.TemporaryDirectory(prefix="tui-trainer-pictures-") as state:
                os.environ |= {"XDG_STATE_HOME": state, "LC_ALL": "C.UTF-8"}
                asyncio.run(make_page(page))
    for graph in GRAPHS:
        if not wanted or graph.name in wanted:
            asyncio.run(make_graph(graph))
    if not wanted or BACKPROPAGATION in wanted:
        chain = EXAMPLES[0]
        picture_of_chain = svg(ScalarGraph.of("(a*b + c) * f", chain.values))
        (HERE / f"{BACKPROPAGATION}.svg").write_text(picture_of_chain, encoding="utf-8")


if __name__ == "__main__":
    main()
