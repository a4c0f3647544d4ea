"""The active probes of an optimizer: their tables, cadences and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tui_trainer.protocol.schema import Table
from tui_trainer.trace.probe import Probe, Readings

STEP_HOOKS = (
    "before_forward",
    "after_forward",
    "model_called",
    "loss_called",
    "gradients",
    "gradient_norms",
    "before_update",
    "after_update",
)
"""The hooks of a probe that are called in the course of a step; each is optional."""
NEVER_STRETCHED = 100
"""Importance from which a cadence is never stretched."""
LIMITS = (32, 256, 1024)
"""Maximum stretches of a probe, in turn, before more important ones are stretched further."""
WATCHED_LIMIT = 16
"""Maximum stretch of a watched probe, as a multiple of its cadence while watched."""


@dataclass(eq=False, kw_only=True)
class ActiveProbe:
    """A probe of one optimizer, with its tables, its cadence and its cost."""

    probe: Probe
    tables: list[Table]
    name: str
    natural: int
    """Natural cadence in steps; 0: measured only while watched."""
    every: int
    """Cadence while not watched: the natural one times a power of two."""
    importance: int
    max_stretch: int = LIMITS[-1]
    """How many times its natural cadence it may be stretched."""
    watched_natural: int = 0
    """Natural cadence while watched; 0: watching makes no difference."""
    watched_every: int = 0
    """Cadence while watched: its natural one times a power of two."""
    watched: bool = False
    """Whether a viewer watches it and that makes a difference."""
    with_clipping: bool = False
    """Measured at every step at present, whatever the budget, from what clipping computes."""
    cost_ms: float = math.nan
    """Smoothed cost of one measurement."""
    failed: bool = False
    """It raised an exception and is no longer called."""
    readings: list[Readings] = field(default_factory=list)
    spent_s: float = 0.0
    """Time on the training thread in this step."""
    needed: bool = False
    """A breakpoint reads one of its tables: it measures every step."""

    def __post_init__(self) -> None:
        kind = type(self.probe)
        self.hooks = frozenset(
            name for name in STEP_HOOKS if getattr(kind, name) is not getattr(Probe, name)
        )
        """Those it implements: the others need not be called."""

    def begin_step(self) -> None:
        self.spent_s = 0.0
        self.readings = []

    @property
    def now(self) -> int:
        """The current cadence; 0: not measured."""
        return self.watched_every if self.watched else self.every

    @now.setter
    def now(self, every: int) -> None:
        if self.watched:
            self.watched_every = every
        else:
            self.every = every

    @property
    def unstretched(self) -> int:
        """The current cadence if nothing were stretched."""
        return self.watched_natural if self.watched else self.natural

    @property
    def longest(self) -> int:
        """The longest cadence that it may have now."""
        return self.unstretched * (WATCHED_LIMIT if self.watched else self.max_stretch)

    def mean_ms(self, every: int | None = None) -> float:
        """Mean cost per step at a cadence (default: the current one)."""
        every = self.now if every is None else every
        return self.cost_ms / every if every and not math.isnan(self.cost_ms) else 0.0

    @property
    def fixed(self) -> bool:
        """Whether its cadence cannot be stretched at present."""
        return self.with_clipping or self.importance >= NEVER_STRETCHED
