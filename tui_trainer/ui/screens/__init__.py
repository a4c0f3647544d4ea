"""The screens with their keys, and the app's interface for them. A screen's module is imported
after the first paint, or when the screen is first shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from textual.dom import DOMNode
from textual.screen import Screen

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.inspection import Inspected, InspectionRequest, TensorRef
from tui_trainer.ui.widgets.lines import DrawingContext

ScreenMode = Literal[
    "dashboard",
    "attention",
    "parameters",
    "samples",
    "log",
    "help",
    "findings",
    "ranks",
    "inspect",
    "autograd",
    "start",
    "learn",
    "attention_layer",
    "parameter_groups",
    "compare",
    "graph",
]
"""Names of screens: modes of the Textual app, except screens that open over another one."""


@dataclass(frozen=True)
class ScreenEntry:
    """One screen of the app."""

    mode: ScreenMode
    key: str
    title: str
    target: str
    """`module:class` in `tui_trainer.ui.screens`."""
    tooltip: str
    short_title: str = ""
    """Title for narrow terminals; "": the title itself."""

    def load(self) -> type[Screen[Any]]:
        """Import the screen's class."""
        module, _, name = self.target.partition(":")
        loaded: type[Screen[Any]] = getattr(import_module(f"tui_trainer.ui.screens.{module}"), name)
        return loaded

    def factory(self) -> Callable[[], Screen[Any]]:
        """A function that imports and creates the screen."""
        return lambda: self.load()()


SCREENS = (
    ScreenEntry(
        "dashboard",
        "1",
        "Dashboard",
        "dashboard:DashboardScreen",
        "Everything at a glance",
        "Dash",
    ),
    ScreenEntry(
        "attention",
        "2",
        "Attention",
        "attention:AttentionScreen",
        "Wq, Wk, Wv per layer and head",
        "Attn",
    ),
    ScreenEntry(
        "parameters",
        "3",
        "Parameters",
        "parameters:ParametersScreen",
        "Every parameter, every column",
        "Params",
    ),
    ScreenEntry("samples", "4", "Samples", "samples:SamplesScreen", "What the model produces"),
    ScreenEntry("log", "5", "Log", "log:LogScreen", "Output of the script, events and commands"),
    ScreenEntry("help", "6", "Help", "help:HelpScreen", "Every key, and what the quantities mean"),
    ScreenEntry(
        "findings", "8", "Findings", "findings:FindingsScreen", "What is wrong, since when and why"
    ),
    ScreenEntry("ranks", "9", "Ranks", "ranks:RanksScreen", "One line for each process of the run"),
    ScreenEntry(
        "inspect", "0", "Inspect", "inspect:InspectScreen", "Inspect a tensor of the live run"
    ),
    ScreenEntry(
        "autograd",
        "g",
        "Autograd",
        "autograd:AutogradScreen",
        "The graph from the loss to the parameters, with the gradients along it",
        "Graph",
    ),
    ScreenEntry("start", "7", "Start", "start:StartScreen", "Choose what to train"),
    ScreenEntry(
        "learn",
        "ctrl+l",
        "Learn",
        "learn:LearnScreen",
        "Short pages about training, measured on a live model while you read",
    ),
)

FURTHER_SCREENS = (
    ScreenEntry(
        "attention_layer",
        "enter",
        "Attention of a layer",
        "attention_layer:AttentionLayerScreen",
        "What a head attends to: enter on a layer of the attention screen",
    ),
    ScreenEntry(
        "parameter_groups",
        "G",
        "Parameter groups",
        "parameter_groups:ParameterGroupsScreen",
        "Who updates which parameters, and the memory by kind: G in the inspector",
    ),
)
"""Screens that open over another screen."""


class LeavingContext(Protocol):
    """The part of `ui.leaving.Leaving` that screens use."""

    def leave_for(self, command: tuple[str, ...] | None) -> None:
        """Leave, and run another command of `tui-trainer` then; None: stay."""

    def leave_run_for(self, command: tuple[str, ...]) -> None:
        """Leave for another command, once the user has chosen what happens to the open run."""

    def ask_next(self) -> None:
        """Offer commands for a run that has ended."""


class AppContext(DrawingContext, Protocol):
    """The part of the app that its screens use."""

    session: Session | None
    snapshot: Snapshot
    """The snapshot on screen."""
    inspected: TensorRef | None
    """The tensor in the inspector."""
    inspected_rank: int
    """The rank whose tensors are inspected."""
    on_launch: OnLaunch | None
    """Starts a run from the start screen; None where nothing can be started."""

    help_for: ScreenMode
    """The screen that the help was opened from."""
    learn_from: ScreenMode | Literal[""]
    """The screen that the pages were opened from; "" where the app began with them."""
    lesson: str
    """The page to open when the pages are shown next; "" for the list."""
    language: str
    """Language of the pages and of the texts about guided runs."""
    lessons: tuple[str, ...]
    """Pages about what was on the screen that the help was opened from."""

    def command(self, action: Action) -> None:
        """Send a command to the run and show its answer."""

    def inspect(
        self,
        request: InspectionRequest,
        answered: Callable[[Inspected], None],
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """Request an inspection. Calls `answered` on the event loop, or `replaced` when another
        request replaces this one."""

    def show_tensor(self, tensor: TensorRef) -> None:
        """Open a tensor in the inspector."""

    def show_lesson(self, page: str) -> None:
        """Open a page of `tui-trainer learn`."""

    def start_demo(self, name: str, introduced: bool = False) -> None:
        """Start a guided run; `introduced`: the user has read what it shows."""

    @property
    def guided_run_finishes(self) -> bool:
        """Whether a guided run continues to its end to be compared."""

    @property
    def cure_label(self) -> str:
        """The label of the key `C`, which depends on the stage of the guided run."""

    def attach(self, session: Session) -> None:
        """Show the run of another session."""

    @property
    def leaving(self) -> LeavingContext:
        """Leaves the app."""

    def schedule(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call `callback` on the event loop, from any thread, without waiting for the call."""

    def redraw(self) -> None:
        """Draw the same snapshot again."""

    def action_go(self, mode: ScreenMode) -> None:
        """Switch to the screen of `mode`."""

    def screen_resumed(self, screen: Screen[Any]) -> None:
        """Draw a screen that came to the front."""


def app_context(node: DOMNode) -> AppContext:
    """The app that shows `node`."""
    return cast(AppContext, node.app)
