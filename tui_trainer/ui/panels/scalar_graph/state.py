"""What the panels of the scalar graph show: the graph, the steps made, and PyTorch's gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tui_trainer.learn.page import LANGUAGES
from tui_trainer.learn.scalar.graph import DEFAULT_H, ScalarGraph
from tui_trainer.learn.scalar.steps import GraphStep, steps_of
from tui_trainer.learn.scalar.torch_process import TorchGradients
from tui_trainer.learn.scalar.translation import say, translated

AGREE = 1e-9
"""Largest relative difference of gradients that counts as rounding."""


@dataclass
class GraphState:
    """State of the scalar graph, which its panels draw."""

    graph: ScalarGraph
    h: float = DEFAULT_H
    position: int = 0
    """How many of the steps have been made."""
    selected: int = 0
    """Index of the selected node."""
    autograd: TorchGradients | None = None
    """None while PyTorch has not answered."""
    no_torch: bool = False
    """Whether PyTorch gave no answer."""
    language: str = LANGUAGES[0]
    steps: list[GraphStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.set_graph(self.graph)

    def set_graph(self, graph: ScalarGraph) -> None:
        """Show another expression, or other values of its inputs."""
        self.graph = graph
        self.steps = steps_of(graph)
        self.position = min(self.position, len(self.steps))
        self.selected = min(self.selected, len(graph.nodes) - 1)
        self.autograd = None

    def say(self, template: str, **values: object) -> str:
        """A text in the user's language, made from a template."""
        return self.translated(say(template, **values))

    def translated(self, text: str) -> str:
        """A text of the graph in the user's language."""
        return translated(text, self.language)

    @property
    def current(self) -> GraphStep | None:
        """The step that was made last."""
        return self.steps[self.position - 1] if self.position else None

    @property
    def finished(self) -> bool:
        return self.position == len(self.steps)

    def known_values(self) -> set[int]:
        """The nodes that have a value by now."""
        made = {step.node for step in self.steps[: self.position] if not step.backward}
        return made | {i for i, node in enumerate(self.graph.nodes) if not node.is_computed}

    def known_gradients(self) -> dict[int, float]:
        """The gradients so far, of which some may yet grow."""
        made = sum(step.backward for step in self.steps[: self.position])
        gradients: dict[int, float] = {}
        for step in self.graph.backward[:made]:
            gradients.setdefault(step.node, step.gradient)
            gradients.update({each.to: each.total for each in step.contributions})
        return gradients

    def touched(self) -> frozenset[int]:
        """The operands of the node of the current step."""
        step = self.current
        return frozenset(self.graph.nodes[step.node].inputs) if step is not None else frozenset()

    def progress(self) -> str:
        """`forward 2 of 3`, `backward 1 of 3`"""
        step, forward = self.current, sum(not each.backward for each in self.steps)
        if step is None:
            return self.say("before the first step")
        if not step.backward:
            return self.say("forward {number} of {count}", number=self.position, count=forward)
        number, count = self.position - forward, len(self.steps) - forward
        return self.say("backward {number} of {count}", number=number, count=count)

    def agreement(self) -> str:
        """Whether PyTorch's gradients equal those on the screen, in words."""
        if self.autograd is None:
            return self.say("no PyTorch") if self.no_torch else self.say("asking PyTorch")
        pairs = zip(self.autograd.gradients, self.graph.gradients, strict=True)
        apart = max((_difference(theirs, ours) for theirs, ours in pairs), default=0.0)
        version = self.autograd.version
        if apart <= AGREE:
            return self.say("{version} agrees", version=version)
        return self.say("{version} differs by {apart:.0e}", version=version, apart=apart)


def _difference(theirs: float | None, ours: float | None) -> float:
    """Relative difference of two gradients; 0 when both are missing, nan, or the same infinity."""
    a, b = theirs or 0.0, ours or 0.0
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if math.isfinite(largest) else math.inf
