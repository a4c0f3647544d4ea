"""The colours of everything that is drawn: one for each meaning, taken from the Textual theme.

To change a colour, such as that of the validation points, edit `tt-validation` in `DARK` and
`LIGHT`, and `validation` in `_ansi_palette` for terminals with 16 colours. Under Textual's other
themes, which do not define the `tt-` variables, each meaning has a fallback in `_theme_palette`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs
from rich.console import Console
from rich.style import Style
from textual.color import Color
from textual.theme import BUILTIN_THEMES, Theme

DARK = Theme(
    name="tui-trainer",
    primary="#6ab0c9",
    secondary="#8796b0",
    accent="#7cc4c4",
    warning="#e3c75f",
    error="#f0717a",
    success="#6cc08b",
    foreground="#d3d9e3",
    background="#11151c",
    surface="#161b24",
    panel="#1d242f",
    dark=True,
    variables={
        "tt-rule": "#3a4453",
        "tt-faint": "#5d6979",
        "tt-dim": "#7f8b9d",
        "tt-loss": "#eef2f8",
        "tt-loss-raw": "#5c7391",
        "tt-validation": "#d495e0",
        "tt-norm": "#93a5dd",
        "tt-clip": "#f0717a",
        "tt-q": "#5cb3f2",
        "tt-k": "#f2a65a",
        "tt-v": "#57c99b",
        "tt-qk": "#b7a1f4",
        "tt-qv": "#63d3da",
        "tt-kv": "#c9c763",
        "footer-background": "#161b24",
        "footer-key-foreground": "#7cc4c4",
        "footer-description-foreground": "#8d99ab",
        "border": "#3a4453",
        "block-cursor-background": "#26404a",
        "block-cursor-blurred-background": "#1b2f37",
        "input-selection-background": "#2c4a5a",
        "block-cursor-foreground": "#eef2f8",
    },
)

LIGHT = Theme(
    name="tui-trainer-light",
    primary="#1f6f8b",
    secondary="#59677d",
    accent="#0d6a6c",
    warning="#7d6000",
    error="#b92a37",
    success="#1c7040",
    foreground="#1f2733",
    background="#fbfbf8",
    surface="#f2f2ee",
    panel="#e8e8e3",
    dark=False,
    variables={
        "tt-rule": "#c9cdd3",
        "tt-faint": "#8b939f",
        "tt-dim": "#5d6878",
        "tt-loss": "#10151d",
        "tt-loss-raw": "#7f93ad",
        "tt-validation": "#9a3fa8",
        "tt-norm": "#4759a8",
        "tt-clip": "#b92a37",
        "tt-q": "#0a65ad",
        "tt-k": "#a04f00",
        "tt-v": "#0a724d",
        "tt-qk": "#6a47bd",
        "tt-qv": "#0b6b80",
        "tt-kv": "#66640a",
        "footer-background": "#f2f2ee",
        "footer-key-foreground": "#0d6a6c",
        "footer-description-foreground": "#59677d",
        "border": "#c9cdd3",
        "block-cursor-background": "#cfe6e6",
        "block-cursor-blurred-background": "#e2f1f0",
        "block-cursor-foreground": "#10151d",
    },
)

THEMES = (DARK, LIGHT)

REMEMBERED = "theme"
"""File in the user's configuration directory with the name of the theme that was chosen last."""


def remembered_theme() -> str:
    """The theme that the user chose last; "" for none."""
    try:
        return _remembered_file().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def remember_theme(name: str) -> None:
    """Save a theme, which is used from the next start on."""
    with contextlib.suppress(OSError):  # a home that cannot be written to
        _remembered_file().parent.mkdir(parents=True, exist_ok=True)
        _remembered_file().write_text(f"{name}\n", encoding="utf-8")


def _remembered_file() -> Path:
    return Path(platformdirs.user_config_dir("tui-trainer", appauthor=False)) / REMEMBERED


def is_light(red: float, green: float, blue: float) -> bool:
    """Whether a background colour, with components from 0 to 1, is light."""
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.5


NO_QUERIES = ("dumb", "linux")
"""`$TERM` of terminals that would print the query for their background."""
LIGHT_ANSI_COLORS = (7, *range(9, 16))
"""Background colours of $COLORFGBG that are light, as Vim takes them."""


def initial_theme() -> dict[str, Any]:
    """The theme to start with, as options of the app: $TEXTUAL_THEME; else the theme that the user
    chose last; else Textual's 16-colour theme on a terminal with 16 colours; else `LIGHT` or
    `DARK`, for the background that $COLORFGBG or the terminal reports."""
    known = {*BUILTIN_THEMES, *(own_theme.name for own_theme in THEMES)}
    for requested in (os.environ.get("TEXTUAL_THEME", ""), remembered_theme()):
        if requested in known:
            return {"theme_name": requested}
    if Console(force_terminal=True).color_system == "standard":
        return {"theme_name": "ansi-dark"}
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    if background.isdigit():
        light = int(background) in LIGHT_ANSI_COLORS
        return {"theme_name": LIGHT.name if light else DARK.name}
    return {"theme_name": DARK.name, "asks_background": True}


TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0
"""Smallest contrast with the background, of text and of the marks of charts (WCAG 2.2, 1.4.3 and
1.4.11). Text keeps it under the cursor."""
CURSOR_SHARE = {True: 0.16, False: 0.1}
"""Share of the accent in the background of the cursor's row, in dark themes and in light ones."""


@dataclass(frozen=True)
class Palette:
    """A Rich style for each meaning."""

    text: Style
    strong: Style
    dim: Style
    """Labels and units."""
    faint: Style
    """Axes, tracks and other marks that are not text."""
    rule: Style
    """Rules next to titles, which carry no information."""
    title: Style
    accent: Style
    """Keys, the current phase, and other things that can be acted on."""
    good: Style
    warning: Style
    error: Style
    loss: Style
    """The smoothed training loss."""
    loss_raw: Style
    """The loss of every step."""
    validation: Style
    """The validation points and their values."""
    norm: Style
    """Gradient norms."""
    clip: Style
    """The clipping threshold and clipped steps."""
    q: Style
    k: Style
    v: Style
    qk: Style
    qv: Style
    kv: Style
    cursor: Style
    """The row under the cursor; added to the styles of its cells."""
    current: Style
    """The current phase."""
    provisional: Style
    """Values of the unfinished step, while paused inside it."""


def palette(variables: Mapping[str, str], ansi: bool = False) -> Palette:
    """The palette for the CSS variables of a theme; `ansi`: for a terminal with 16 colours."""
    return _cached_palette(
        tuple(sorted((k, v) for k, v in variables.items() if k in _USED_VARIABLES)), ansi
    )


_USED_VARIABLES = frozenset(
    ("foreground", "background", "accent", "warning", "error", "success", *DARK.variables)
)


def contrast(one: Color, other: Color) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    parts = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in color.normalized
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def readable(color: Color, backgrounds: Sequence[Color], minimum: float) -> Color:
    """`color`, moved towards white on dark backgrounds and towards black on light ones until it
    has the contrast `minimum` with all of them."""
    end = Color(255, 255, 255) if backgrounds[0].brightness < 0.5 else Color(0, 0, 0)
    for share in range(0, 101, 4):
        moved = color.blend(end, share / 100)
        if all(contrast(moved, background) >= minimum for background in backgrounds):
            return moved
    return end


@lru_cache(maxsize=16)
def _cached_palette(items: tuple[tuple[str, str], ...], ansi: bool) -> Palette:
    return _ansi_palette() if ansi else _theme_palette(dict(items))


def _theme_palette(variables: dict[str, str]) -> Palette:
    """Blends all colours with the background, since Rich knows no transparency."""
    background = Color.parse(variables["background"])
    foreground = Color.parse(variables["foreground"])
    if foreground.a < 1:
        foreground = background.blend(foreground.with_alpha(1), foreground.a)
    dark = background.brightness < 0.5
    ours = (DARK if dark else LIGHT).variables

    cursor = background.blend(Color.parse(variables["accent"]), CURSOR_SHARE[dark])

    def style(
        name: str,
        fallback: Color | str,
        *,
        bold: bool = False,
        italic: bool = False,
        on: tuple[Color, ...] = (background, cursor),
        contrast: float = TEXT_CONTRAST,
    ) -> Style:
        """The colour of a variable, or `fallback`, with at least this contrast with `on`."""
        color = variables.get(name) or fallback
        color = color if isinstance(color, Color) else Color.parse(color)
        solid = background.blend(color.with_alpha(1), color.a)
        return Style(
            color=readable(solid, on, contrast).rich_color,
            bgcolor=background.rich_color,
            bold=bold or None,
            italic=italic or None,
        )

    def mark(name: str, fallback: Color | str) -> Style:
        return style(name, fallback, on=(background,), contrast=MARK_CONTRAST)

    def mixed(share: float) -> Color:
        return background.blend(foreground, share)

    accent = style("accent", ours["footer-key-foreground"])
    return Palette(
        text=style("", foreground),
        strong=style("", foreground, bold=True),
        dim=style("tt-dim", mixed(0.55), on=(background,)),  # the cursor draws it as text
        faint=mark("tt-faint", mixed(0.4)),
        rule=style("tt-rule", mixed(0.24), contrast=1),
        title=style("", mixed(0.85), bold=True),
        accent=accent,
        good=style("success", "green"),
        warning=style("warning", "yellow"),
        error=style("error", "red"),
        loss=style("tt-loss", foreground),
        loss_raw=mark("tt-loss-raw", mixed(0.4)),
        validation=style("tt-validation", ours["tt-validation"]),
        norm=style("tt-norm", ours["tt-norm"]),
        clip=style("tt-clip", variables["error"]),
        q=style("tt-q", ours["tt-q"]),
        k=style("tt-k", ours["tt-k"]),
        v=style("tt-v", ours["tt-v"]),
        qk=style("tt-qk", ours["tt-qk"]),
        qv=style("tt-qv", ours["tt-qv"]),
        kv=style("tt-kv", ours["tt-kv"]),
        cursor=Style(bgcolor=cursor.rich_color, bold=True),
        current=Style(color=background.rich_color, bgcolor=accent.color, bold=True),
        provisional=style("warning", "yellow", italic=True),
    )


def _ansi_palette() -> Palette:
    """The 16 named colours, which are defined by the terminal."""
    plain = Style()
    return Palette(
        text=plain,
        strong=Style(bold=True),
        dim=Style(dim=True),
        faint=Style(dim=True),
        rule=Style(dim=True),
        title=Style(bold=True),
        accent=Style(color="cyan"),
        good=Style(color="green"),
        warning=Style(color="yellow"),
        error=Style(color="bright_red", bold=True),
        loss=Style(bold=True),
        loss_raw=Style(dim=True),
        validation=Style(color="magenta"),
        norm=Style(color="cyan"),
        clip=Style(color="bright_red"),
        q=Style(color="bright_blue"),
        k=Style(color="yellow"),
        v=Style(color="green"),
        qk=Style(color="bright_magenta"),
        qv=Style(color="bright_cyan"),
        kv=Style(color="bright_yellow"),
        cursor=Style(reverse=True),
        current=Style(reverse=True, bold=True),
        provisional=Style(color="yellow", italic=True),
    )
