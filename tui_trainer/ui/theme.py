"""The colours of everything that is drawn: one for each meaning, taken from the Textual theme.

To change a colour, such as that of the validation points, edit `tt-validation` in `DARK` and
`LIGHT`, and `validation` in `_ansi_palette` for terminals with 16 colours. Under Textual's other
themes, which do not define the `tt-` variables, each meaning has a fallback in `_theme_palette`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from rich.style import Style
from textual.color import Color
from textual.theme import Theme

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
        "tt-faint": "#3a4453",
        "tt-dim": "#7f8b9d",
        "tt-loss": "#eef2f8",
        "tt-loss-raw": "#5c7391",
        "tt-validation": "#d495e0",
        "tt-norm": "#93a5dd",
        "tt-clip": "#f0717a",
        "tt-q": "#5cb3f2",
        "tt-k": "#f2a65a",
        "tt-v": "#57c99b",
        "footer-background": "#161b24",
        "footer-key-foreground": "#7cc4c4",
        "footer-description-foreground": "#8d99ab",
        "border": "#3a4453",
        "block-cursor-background": "#26404a",
        "block-cursor-foreground": "#eef2f8",
    },
)

LIGHT = Theme(
    name="tui-trainer-light",
    primary="#1f6f8b",
    secondary="#59677d",
    accent="#0f7173",
    warning="#8a6a00",
    error="#c0303c",
    success="#1f7a45",
    foreground="#1f2733",
    background="#fbfbf8",
    surface="#f2f2ee",
    panel="#e8e8e3",
    dark=False,
    variables={
        "tt-faint": "#c9cdd3",
        "tt-dim": "#667182",
        "tt-loss": "#10151d",
        "tt-loss-raw": "#9db0c8",
        "tt-validation": "#9a3fa8",
        "tt-norm": "#4759a8",
        "tt-clip": "#c0303c",
        "tt-q": "#0a6ebd",
        "tt-k": "#b85c00",
        "tt-v": "#0b7d54",
        "footer-background": "#f2f2ee",
        "footer-key-foreground": "#0f7173",
        "footer-description-foreground": "#59677d",
        "border": "#c9cdd3",
        "block-cursor-background": "#cfe6e6",
        "block-cursor-foreground": "#10151d",
    },
)

THEMES = (DARK, LIGHT)


@dataclass(frozen=True)
class Palette:
    """A Rich style for each meaning."""

    text: Style
    strong: Style
    dim: Style
    """Labels and units."""
    faint: Style
    """Rules, axes and tracks."""
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
    cursor: Style
    """The row under the cursor; added to the styles of its cells."""
    current: Style
    """The current phase."""
    provisional: Style
    """Values of the unfinished step, while paused inside it."""

    def series(self, letter: str) -> Style:
        """The colour of `q`, `k` or `v`; that of text for a pair (`qk`)."""
        return {"q": self.q, "k": self.k, "v": self.v}.get(letter, self.text)


def palette(variables: Mapping[str, str], ansi: bool = False) -> Palette:
    """The palette for the CSS variables of a theme; `ansi`: for a terminal with 16 colours."""
    return _cached_palette(
        tuple(sorted((k, v) for k, v in variables.items() if k in _USED_VARIABLES)), ansi
    )


_USED_VARIABLES = frozenset(
    ("foreground", "background", "accent", "warning", "error", "success", *DARK.variables)
)


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

    def style(name: str, fallback: Color | str, bold: bool = False, italic: bool = False) -> Style:
        color = variables.get(name) or fallback
        color = color if isinstance(color, Color) else Color.parse(color)
        solid = background.blend(color.with_alpha(1), color.a)
        return Style(
            color=solid.rich_color,
            bgcolor=background.rich_color,
            bold=bold or None,
            italic=italic or None,
        )

    def mixed(share: float) -> Color:
        return background.blend(foreground, share)

    accent = style("accent", ours["footer-key-foreground"])
    cursor = background.blend(Color.parse(variables["accent"]), 0.24)
    return Palette(
        text=style("", foreground),
        strong=style("", foreground, bold=True),
        dim=style("tt-dim", mixed(0.55)),
        faint=style("tt-faint", mixed(0.24)),
        title=style("", mixed(0.85), bold=True),
        accent=accent,
        good=style("success", "green"),
        warning=style("warning", "yellow"),
        error=style("error", "red"),
        loss=style("tt-loss", foreground),
        loss_raw=style("tt-loss-raw", mixed(0.4)),
        validation=style("tt-validation", ours["tt-validation"]),
        norm=style("tt-norm", ours["tt-norm"]),
        clip=style("tt-clip", variables["error"]),
        q=style("tt-q", ours["tt-q"]),
        k=style("tt-k", ours["tt-k"]),
        v=style("tt-v", ours["tt-v"]),
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
        cursor=Style(reverse=True),
        current=Style(reverse=True, bold=True),
        provisional=Style(color="yellow", italic=True),
    )
