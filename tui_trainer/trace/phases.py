"""Where in a step the training is: which phase is open, what lies between two of them, how long
each has taken, and which of them this script has at all.

* What lies between a step and the next forward is `data`, wherever `zero_grad` falls in it; what
  lies between a forward and its backward is `loss`.
* A phase inside another one (a backward inside a forward, …) is part of it; only inside a `step`
  with a closure the closure's own phases are seen.
"""

from __future__ import annotations

import dis
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import CodeType, FrameType
from typing import Any

import torch

from tui_trainer.protocol import PHASES
from tui_trainer.protocol.messages import Quantity
from tui_trainer.trace.gate import Gate

# ---- timing
# How long each phase of a step took: the host's clock on a CPU, events on a CUDA device.
#
# Events are recorded into the stream and read a step or more later, when they have long passed, so
# that timing never makes the host wait for the device.


OUTSIDE = len(PHASES)
"""What belongs to no phase: our own work, evaluations, what a script does between two phases."""
Times = Callable[[], list[float]]
"""Gives the milliseconds of each phase; to be called once the step's values have arrived."""


class HostClock:
    """Self time of each phase on the host's clock, summed within a step."""

    def __init__(self) -> None:
        self._totals = [0.0] * (OUTSIDE + 1)
        self._current = OUTSIDE
        self._since = perf_counter()

    def switch(self, phase: int) -> None:
        """The present phase ends here and `phase` (an index into PHASES, or OUTSIDE) begins."""
        now = perf_counter()
        self._totals[self._current] += now - self._since
        self._since = now
        self._current = phase

    def relabel(self, phase: int) -> None:
        """What has run since the last switch turns out to have been `phase`."""
        self._current = phase

    def total_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far."""
        return self._totals[phase] * 1e3

    def take(self) -> Times:
        """The times of the step that ends here; the next one starts from nothing."""
        taken = [seconds * 1e3 for seconds in self._totals]
        del taken[OUTSIDE:]
        self._totals = [0.0] * (OUTSIDE + 1)
        return lambda: taken


class CudaClock:
    """The same on the device's clock, by events from a pool."""

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []
        self._current = OUTSIDE
        self._start: torch.cuda.Event | None = None
        self._spans: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._events: list[torch.cuda.Event] = []

    def switch(self, phase: int) -> None:
        """The present phase ends here in the stream and `phase` begins."""
        if phase == self._current == OUTSIDE:
            return
        event = self._pool.pop() if self._pool else _timing_event()
        event.record()
        self._events.append(event)
        if self._current != OUTSIDE and self._start is not None:
            self._spans.append((self._current, self._start, event))
        self._start = event
        self._current = phase

    def relabel(self, phase: int) -> None:
        """What has run since the last switch turns out to have been `phase`."""
        self._current = phase

    def total_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Waits for the device: only while stopped."""
        torch.cuda.current_stream().synchronize()
        return float(sum(a.elapsed_time(b) for p, a, b in self._spans if p == phase))

    def take(self) -> Times:
        """The times of the step that ends here, readable once the stream has come this far."""
        spans, self._spans = self._spans, []
        used, self._events = self._events, []
        if self._start is not None and used and used[-1] is self._start:
            self._events.append(used.pop())  # it also begins the next step's first phase

        taken: list[float] = []

        def times() -> list[float]:
            if taken:  # asked again
                return taken
            taken.extend([0.0] * OUTSIDE)
            for phase, start, end in spans:
                taken[phase] += start.elapsed_time(end)
            self._pool.extend(used)
            return taken

        return times


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock that can time work on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


# ---- tensors
# Tensors that can be shown: those in arguments and results, those among a loop's variables.


MAX_TENSORS = 6
_OWN_PACKAGE = __name__.rpartition(".")[0]


def shape(tensor: torch.Tensor) -> str:
    """Its type and shape, as `float32 12×64`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape)) or '0-d'}"


def summary(name: str, tensor: torch.Tensor) -> Iterator[Quantity]:
    """Its shape and, over its elements, mean, standard deviation and range."""
    yield Quantity(name, shape(tensor))
    if not tensor.numel() or tensor.is_complex() or tensor.layout != torch.strided:
        return
    values = tensor.detach().to(torch.float32)
    yield Quantity(f"{name} mean", float(values.mean()))
    if tensor.is_floating_point() and tensor.numel() > 1:
        yield Quantity(f"{name} std", float(values.std()))
    yield Quantity(f"{name} min", float(values.min()))
    yield Quantity(f"{name} max", float(values.max()))


def tensors_in(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in arguments and results, however they are packed."""
    for name, thing in named:
        if isinstance(thing, torch.Tensor):
            yield name, thing
        elif isinstance(thing, dict):
            yield from tensors_in((str(key), value) for key, value in thing.items())
        elif isinstance(thing, (list, tuple)):
            yield from tensors_in((f"{name}[{i}]", value) for i, value in enumerate(thing))


def frame_of_the_loop() -> FrameType | None:
    """The innermost call on this thread that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and _is_ours_or_torch(frame):
        frame = frame.f_back
    return frame


def locals_of_the_loop() -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the variables of the training loop: before `zero_grad` the batch is known
    to nobody else."""
    frame = frame_of_the_loop()
    if frame is None:
        return
    found = 0
    for name, thing in tensors_in(list(frame.f_locals.items())):
        whole = "[" not in name and not name.startswith("_")
        data = not thing.requires_grad and thing.dim() > 0
        if whole and data and not isinstance(thing, torch.nn.Parameter):
            yield name, thing
            found += 1
            if found == MAX_TENSORS:
                return


def _is_ours_or_torch(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == _OWN_PACKAGE or name.startswith((f"{_OWN_PACKAGE}.", "torch.", "contextlib"))


# ---- sight
# Whether a script's batch is there when it zeroes its gradients, or drawn after that.
#
# The textbook draws a batch, zeroes the gradients and calls the model. Other loops zero first and
# draw then, or zero once before the loop and then at the end of each step: what their variables
# hold
# at `zero_grad` is the batch before, or none. Only a loop whose batch is known to be there passes
# the
# boundary of `data` at `zero_grad`; any other passes it where the model is called.
#
# Known is: the code of the innermost loop around the call of `zero_grad` gives a variable a tensor
# before that call, and it is such a tensor that the model is called with. Both are looked at once
# for
# each optimizer (or module) that is zeroed; from then on the answer stands.


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


DATA, ZERO_GRAD, FORWARD, LOSS, BACKWARD, CLIP, STEP = range(len(PHASES))
STEPS_BEFORE_UNSEEN = 5

WHY_UNSEEN = {
    ZERO_GRAD: "this run never calls zero_grad",
    FORWARD: "the model is never called from outside in a way that can be seen: the whole step may "
    "be compiled, or `model.forward` called directly",
    BACKWARD: "backward is never called: gradients are made in another way",
    CLIP: "this run never clips its gradients by torch.nn.utils",
}


class Phases:
    """The phases of one run, on the thread that trains."""

    def __init__(self, gate: Gate, on_passed: Callable[[], None]) -> None:
        """`on_passed` is called after each passage of the gate."""
        self.step = 1
        """The optimizer step in the making."""
        self.closure = False
        """Whether the open `step` evaluates a closure."""
        self.seen: set[int] = set()
        """The phases that the step in the making has had so far."""
        self._gate = gate
        self._on_passed = on_passed
        self._clock: Clock = HostClock()
        self._clock_due = True
        """Where the models are is not known before the first of them is called."""
        self._times: Times = lambda: [0.0] * OUTSIDE
        self._open: list[int] = []
        self._gap = OUTSIDE
        self._batch_due = True
        self._sight = Sight()
        self._last_end = 0.0
        self._idle_before = 0.0
        self._in_gate = False
        self._seen_ever: set[int] = set()
        self._said: set[int] = set()

    @property
    def open(self) -> int | None:
        """The innermost phase that is open."""
        return self._open[-1] if self._open else None

    # ------------------------------------------------------------ one phase

    def enter(self, phase: int) -> bool:
        """Begin a phase; False when another is already open (a backward inside a forward, …)."""
        if self._open:
            if self._open[-1] != STEP:
                return False
            if not self.closure:
                if phase == STEP:
                    return False
                self._open.clear()  # an optimizer raised and the script went on
        if self._last_end == 0.0:
            self._last_end, self._idle_before = perf_counter(), self._gate.idle_s
        self._open.append(phase)
        self.seen.add(phase)
        return True

    def run(self) -> None:
        """The phase just entered begins to run now, after whatever we did first."""
        self._clock.switch(self._open[-1])

    def leave(self, gap: int | None = None) -> None:
        """The open phase has ended; what follows it is `gap` until something else is known (None:
        what it was before)."""
        phase = self._open.pop()
        if gap is not None:
            self._gap = gap
        self.boundary(phase)
        self.go_on()

    def end(self, phase: int) -> bool:
        """`phase` has ended and no boundary is passed yet; False where it is not open."""
        if self.open != phase:
            return False
        self._open.pop()
        return True

    def fail(self) -> int | None:
        """What the script called raised: the phase is over, and it is no boundary. Which it was."""
        phase = self._open.pop() if self._open else None
        self.go_on()
        return phase

    def drop(self) -> None:
        """Nothing is open any more."""
        self._open.clear()

    def boundary(self, phase: int) -> None:
        """Through the gate at the end of `phase`; nothing is timed there."""
        self._clock.switch(OUTSIDE)
        self._in_gate = True
        gate = self._gate
        try:
            if gate.armed or (phase == STEP and gate.has_work_after(self.step)):
                with torch.enable_grad():  # for what others have the gate do here
                    gate.reached(PHASES[phase], self.step)
            else:
                gate.reached(PHASES[phase], self.step)
        finally:
            self._in_gate = False
            self._on_passed()

    def pause_clock(self) -> None:
        """What comes now is ours."""
        self._clock.switch(OUTSIDE)

    def go_on(self) -> None:
        """Back to the script."""
        self._clock.switch(self._open[-1] if self._open else self._gap)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around work that is not training: it belongs to no phase and to no step's time."""
        current = self._open[-1] if self._open else self._gap
        began = perf_counter()
        if not self._in_gate:  # there nothing is timed anyway
            self._clock.switch(OUTSIDE)
        try:
            yield
        finally:
            if not self._in_gate:
                if self._last_end:  # 0 until the first phase has begun
                    self._last_end += perf_counter() - began
                self._clock.switch(current)

    # ------------------------------------------------------------ the batch

    def zeroing(self, thing: Any) -> None:
        """`zero_grad` of this is open: the batch is there already where a script is known to zero
        after it has drawn one."""
        if self._batch_due and not self.closure and self._sight.batch_is_there(thing):
            self._data_ends()

    def forwarding(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """`forward` of this model is open: the batch is there."""
        if self._sight.waiting:
            self._sight.called(args, kwargs)
        if self._clock_due and isinstance(self._clock, HostClock):
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type == "cuda":
                self._clock = clock_for(parameter.device)
        self._data_ends()

    def losing(self) -> None:
        """`backward` is open: the batch is there, even where no model was seen to be called."""
        if self._batch_due and not self.closure and not self.seen & {FORWARD, LOSS}:
            self._data_ends()
        self.seen.add(LOSS)

    def batch_used(self) -> None:
        """A backward is made: the next forward needs another batch."""
        self._batch_due = True

    def _data_ends(self) -> None:
        if self._gap == OUTSIDE and BACKWARD in self.seen:
            self._clock.relabel(DATA)  # the next micro-batch of an accumulated step
        if self._batch_due:
            self._batch_due = False
            self.boundary(DATA)

    # ------------------------------------------------------------ one step

    def step_made(self) -> tuple[float, Times]:
        """The step has ended: the milliseconds it took, and those of each phase."""
        now, idle = perf_counter(), self._gate.idle_s
        step_ms = (now - self._last_end - (idle - self._idle_before)) * 1e3
        self._last_end, self._idle_before = now, idle
        self.closure = False
        self._batch_due = True
        self._clock_due = False
        self._seen_ever |= self.seen
        self.seen = set()
        self._times = self._clock.take()
        return step_ms, self._times

    def step_skipped(self) -> None:
        """The optimizer was not let to step; the next batch belongs to the same step."""
        self._batch_due = True
        self._gap = DATA

    def next_step(self) -> None:
        """Past the boundary of the step that was made."""
        self._gap = DATA
        self.boundary(STEP)
        self.step += 1
        self.go_on()

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Only while stopped."""
        return self._times()[phase] if phase == STEP else self._clock.total_ms(phase)

    def unseen(self) -> dict[str, str] | None:
        """Phases that this script does not have, and why they cannot be shown; None where that is
        not known yet or has been told before."""
        if self.step < STEPS_BEFORE_UNSEEN or self._seen_ever == self._said:
            return None
        self._said = set(self._seen_ever)
        return {PHASES[p]: why for p, why in WHY_UNSEEN.items() if p not in self._said}
