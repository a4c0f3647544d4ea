"""Whether a script's batch is there when it zeroes its gradients, or drawn after that.

The textbook draws a batch, zeroes the gradients and calls the model. Other loops zero first and
draw then, or zero once before the loop and then at the end of each step: what their variables hold
at `zero_grad` is the batch before, or none. Only a loop whose batch is known to be there passes the
boundary of `data` at `zero_grad`; any other passes it where the model is called.

Known is: the code of the innermost loop around the call of `zero_grad` gives a variable a tensor
before that call, and it is such a tensor that the model is called with. Both are looked at once for
each optimizer (or module) that is zeroed; from then on the answer stands.
"""

from __future__ import annotations

import dis
import weakref
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from tui_trainer.tracing.tensors import frame_of_the_loop, tensors_in

_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
Site = tuple[CodeType | None, int]
"""Where a call stands: code, and the offset of its instruction."""


@dataclass(slots=True, eq=False)
class Verdict:
    """On one call of `zero_grad` in the code."""

    there: bool
    """Whether the batch has been drawn when it is called."""
    candidates: list[weakref.ref[torch.Tensor]]
    """Tensors one of which must be what the model is called with."""


class Sight:
    """What is known of one script's zeroing."""

    def __init__(self) -> None:
        self.waiting = True
        """Whether the next call of the model should be told of."""
        self._called = False
        """Whether the model has ever been called."""
        self._things: dict[int, tuple[weakref.ref[Any], Verdict]] = {}
        self._sites: dict[Site, Verdict] = {}

    def batch_is_there(self, thing: Any) -> bool:
        """At `thing.zero_grad()`, before the model is called: whether the batch has been drawn."""
        known = self._things.get(id(thing))
        if known is None or known[0]() is not thing:
            known = self._things[id(thing)] = weakref.ref(thing), self._verdict_here()
        return known[1].there

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called with these: what was taken for the batch is among them, or was none.

        Need not be told while not `waiting`.
        """
        self._called, self.waiting = True, False
        named = [*((str(place), value) for place, value in enumerate(args)), *kwargs.items()]
        given = [tensor for _, tensor in tensors_in(named)]
        for verdict in self._sites.values():
            if verdict.candidates:
                held = [ref() for ref in verdict.candidates]
                verdict.candidates = []
                verdict.there = any(_is_of(g, tensor) for g in given for tensor in held)

    def _verdict_here(self) -> Verdict:
        frame = frame_of_the_loop()
        site: Site = (frame.f_code, frame.f_lasti) if frame is not None else (None, 0)
        if site not in self._sites:
            found: list[torch.Tensor] = []
            # Once the model has been called, its last batch may still be in the variables.
            if frame is not None and not self._called:
                drawn = names_drawn_before(frame.f_code, frame.f_lasti)
                values = [(n, value) for n, value in frame.f_locals.items() if n in drawn]
                found = [t for _, t in tensors_in(values) if t.dim() > 0 and not t.requires_grad]
            self._sites[site] = Verdict(bool(found), [weakref.ref(tensor) for tensor in found])
            self.waiting |= bool(found)
        return self._sites[site]


def _is_of(given: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    """Whether `given` is this tensor or a view of it."""
    return tensor is not None and (given is tensor or given._base is tensor)


def names_drawn_before(code: CodeType, offset: int) -> frozenset[str]:
    """The variables to which the innermost loop around the instruction at `offset` gives values
    before it comes to that instruction. Outside of any loop: those that the code so far gave values
    to, and its parameters, unless a loop follows, which may draw its own."""
    instructions = list(dis.get_instructions(code))
    loops = [
        (each.argval, each.offset)
        for each in instructions
        if each.opcode in _JUMPS and each.argval <= each.offset
    ]
    around = [start for start, end in loops if start <= offset <= end]
    if not around and any(start > offset for start, _ in loops):
        return frozenset()
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    names = set() if around else set(parameters)
    for each in instructions:
        if max(around, default=0) <= each.offset < offset and each.opname.startswith("STORE_"):
            names.update(each.argval if isinstance(each.argval, tuple) else (each.argval,))
    return frozenset(names)
