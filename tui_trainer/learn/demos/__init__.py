"""Guided runs: short trainings with one fault each, and what to see in them.

Each script trains on handwritten digits; with `--cured` it trains without the fault. The texts
about the scripts are in `demos.toml` in the folder of each language, such as `pages/en`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tui_trainer.learn.page import TEXTS
from tui_trainer.protocol.schema import RunInfo

HERE = Path(__file__).parent
_TITLE = re.compile(r"demo ([a-z0-9-]+)(, cured)?")


@dataclass(frozen=True)
class Demo:
    """One guided run."""

    name: str
    screen: Literal["dashboard", "attention", "parameters", "log", "findings"]
    """The screen to watch: a mode of the app."""
    rule: str
    """The rule whose finding names the fault."""
    breakpoint: str
    """The condition that pauses the run when the fault shows."""
    live: str = ""
    """The change of settings that cures the paused run, as for `tui-trainer set`; "" for none."""
    back: int = 0
    """Steps between the snapshots of a run that is cured by going back to before the fault; 0 for
    another cure."""
    pace: float = 20.0
    """Steps per second, slow enough to be watched."""

    @property
    def script(self) -> Path:
        """The program that trains."""
        return HERE / f"{self.name.replace('-', '_')}.py"

    def title(self, cured: bool) -> str:
        """Title of a run of this demo in the header; `demo_titled` parses it."""
        return f"demo {self.name}{', cured' if cured else ''}"


DEMOS = (
    Demo("zero-grad", "findings", "gradients-kept", 'finding("gradients-kept")', pace=10),
    Demo("rate-high", "dashboard", "update-ratio-high", "loss > 5", "lr=0.1", pace=10),
    Demo("rate-low", "parameters", "update-ratio-low", 'finding("update-ratio-low")', "lr=0.1"),
    Demo("exploding", "dashboard", "gradients-explode", "loss > 2", "clip=0.1", pace=5),
    Demo("vanishing", "parameters", "gradients-vanish", 'finding("gradients-vanish")'),
    Demo("dead-relu", "findings", "dead-units", 'finding("dead-units")'),
    Demo("missing-layer", "parameters", "not-in-optimizer", 'finding("not-in-optimizer")'),
    Demo("shuffled-labels", "dashboard", "no-progress", 'finding("no-progress")', pace=40),
    Demo(
        "attention", "attention", "attention-logits", 'finding("attention-logits")', "lr[0]=0.001"
    ),
    Demo("fp16-overflow", "log", "loss-scale", "nonfinite at loss", pace=10),
    Demo("bad-batch", "dashboard", "bad-batch", "loss > 4 * ema(loss)", back=9),
)


@dataclass(frozen=True)
class DemoText:
    """The texts about a guided run, in one language."""

    title: str
    happens: str
    """What will happen, in one sentence."""
    cure: str
    """What cures the fault."""


@cache
def demo_texts(language: str) -> dict[str, DemoText]:
    """The texts of all guided runs, by name."""
    import tomllib

    texts = tomllib.loads((TEXTS / language / "demos.toml").read_text(encoding="utf-8"))
    return {name: DemoText(**text) for name, text in texts.items()}


def find_demo(name: str) -> Demo:
    """The guided run of this name, one of `DEMOS`."""
    return next(each for each in DEMOS if each.name == name)


def demo_of(info: RunInfo | None) -> tuple[Demo, bool] | None:
    """(guided run, whether without the fault) of a run; None if it is no guided run."""
    return demo_titled(info.title) if info is not None and info.is_script else None


def demo_titled(title: str) -> tuple[Demo, bool] | None:
    """(guided run, whether without the fault) of a title; None if it is not a guided run's."""
    found = _TITLE.fullmatch(title)
    if found is None or found[1] not in {each.name for each in DEMOS}:
        return None
    return find_demo(found[1]), found[2] is not None
