"""The actual events of a training loop, reported by the loop itself and computed in float64.

A generated script calls these methods around its own calls of PyTorch. The rules are those of
docs/json-lines.md, implemented a second time, without the tracer:

* A step is one call of an optimizer that changes the weights. Its loss is the sum of the losses
  that were backpropagated into this optimizer's parameters since its last step, unless
  `zero_grad` has discarded their gradients. Of a closure the first evaluation counts.
* Its gradients are those after the last of these backward passes, before any clipping that follows
  and without a loss scale. A missing gradient has no norm, not the norm 0.
* A clip belongs to the step that uses the gradients it changed. After the step it belongs to none.
* What the script does to gradients by itself, with no call of PyTorch's in between, is one clip.
  Gradients that it then releases or zeroes by itself, still with no call in between, are no part of
  it: of these only that they are gone can be seen.
* Gradients that are discarded before any optimizer has used them are a skipped iteration.

This module is also printed in front of a failing script, so that the script runs by itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class Clip:
    """One call that clipped gradients."""

    kind: str
    """`norm`, `value` or `hand`."""
    limit: float | None
    before: float
    """Norm of the clipped gradients, in the caller's norm type and including any loss scale."""
    after: float
    scale: float
    shares: dict[str, float]
    """Parameter to its share of the sum of squares of the clipped gradients."""
    loss_scale: float
    returned: float
    """The norm before as `clip_grad_norm_` computed it, which may have overflowed."""
    rounded: bool
    """Whether it computed in half precision."""
    at: int = 0
    """`Truth.events` when it was made."""
    norms: tuple[dict[int, float], dict[int, float]] = field(
        default_factory=lambda: ({}, {}), repr=False
    )
    """Of one by hand: id(parameter) to its norm before and after."""


@dataclass
class Step:
    """One optimizer step."""

    optimizer: int
    """Position among the script's optimizers."""
    loss: float | None
    """None: no loss was backpropagated into these parameters."""
    lr: float | None
    norms: dict[str, float | None]
    """Parameter of the optimizer to the norm of its gradient."""
    outside: dict[str, float | None]
    """The same of the models' parameters that are in no optimizer."""
    gone: list[float]
    """The same of the optimizer's parameters that are in no model any more, but have a gradient."""
    clips: list[Clip]
    weights: dict[str, float]
    """Norms after the update."""
    ratios: dict[str, float | None]
    """‖update‖ / ‖weights before‖; None where the latter is 0."""
    poisoned: dict[str, str]
    """Parameter to `nan` or `inf`, where some element of its gradient is that."""
    phases: set[str]
    """Phases that the step must have had."""
    evaluations: int = 0
    """How often a closure was evaluated."""
    shared: bool = False
    """Whether other steps have used every one of its backward passes before."""

    @property
    def total(self) -> float:
        """√Σ‖g‖² over the optimizer's parameters."""
        norms = [*self.norms.values(), *self.gone]
        return math.sqrt(sum(norm**2 for norm in norms if norm is not None))


@dataclass
class Skipped:
    """An iteration whose gradients no optimizer used."""

    why: str
    """`hand`, `scaler`, or `end`: the script ended before the step."""
    before_step: int
    """Number of the step that comes next."""
    loss: float
    norms: dict[str, float | None]
    clips: list[Clip]
    outside: dict[str, float | None] = field(default_factory=dict)
    """As in `Step`."""


@dataclass
class Parameter:
    """A parameter as it is at the end."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    held: bool
    """Whether some optimizer holds it."""


@dataclass(eq=False)
class Backward:
    """One backward pass."""

    loss: float
    claims: set[int]
    """Optimizers whose gradients include it and that have neither used nor lost them."""
    used: bool = False
    norms: dict[str, float | None] = field(default_factory=dict)
    outside: dict[str, float | None] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)


@dataclass
class State:
    """The pending contents of one optimizer's gradients."""

    passes: list[Backward] = field(default_factory=list)
    norms: dict[str, float | None] = field(default_factory=dict)
    outside: dict[str, float | None] = field(default_factory=dict)
    gone: list[float] = field(default_factory=list)
    poisoned: dict[str, str] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)

    def taken(self) -> State:
        """All of it; nothing is left."""
        taken = replace(self)
        self.passes, self.norms, self.outside, self.gone = [], {}, {}, []
        self.poisoned, self.clips = {}, []
        return taken


class ByHand:
    """Replaces an optimizer in a script that updates its weights itself."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": None}]


class Truth:
    """Collects the truth of one script."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.skipped: list[Skipped] = []
        self.parameters: dict[str, Parameter] = {}
        self.optimizers: list[Any] = []
        self.nets: dict[str, torch.nn.Module] = {}
        self.loss_scale = 1.0
        self.events = 0
        """Calls of PyTorch between which what the script does by hand is one clip."""
        self._states: list[State] = []
        self._evaluations = 0
        self._first: State | None = None
        self._stepping: int | None = None
        self._last_change: Clip | None = None

    # ------------------------------------------------------------ models and optimizers

    def watch(self, nets: dict[str, torch.nn.Module], optimizers: Sequence[Any]) -> None:
        """Register the models, by name, and the optimizers."""
        self.nets = nets
        self.optimizers = list(optimizers)
        self._states = [State() for _ in self.optimizers]

    def end(self) -> None:
        """Call at the end of the script."""
        open_passes = {id(each): each for state in self._states for each in state.passes}
        left = [each for each in open_passes.values() if not each.used]
        if left:
            norms = {n: norm for state in self._states for n, norm in state.norms.items()}
            clips = [clip for state in self._states for clip in state.clips]
            outside = {n: norm for state in self._states for n, norm in state.outside.items()}
            loss = sum(each.loss for each in left)
            self.skipped.append(Skipped("end", len(self.steps) + 1, loss, norms, clips, outside))
        held = {id(p) for o in range(len(self.optimizers)) for p in self._own(o)}
        for name, p in self._named().items():
            dtype = str(p.dtype).removeprefix("torch.")
            shape = tuple(p.shape)
            self.parameters[name] = Parameter(shape, dtype, p.requires_grad, id(p) in held)

    def _named(self) -> dict[str, torch.Tensor]:
        return {name: p for net in self.nets.values() for name, p in net.named_parameters()}

    def _own(self, optimizer: int) -> list[torch.Tensor]:
        return [p for group in self.optimizers[optimizer].param_groups for p in group["params"]]

    def _everything(self) -> dict[int, torch.Tensor]:
        found = {id(p): p for p in self._named().values()}
        for number in range(len(self.optimizers)):
            found |= {id(p): p for p in self._own(number)}
        return found

    # ------------------------------------------------------------ backward

    @contextmanager
    def backward(
        self,
        *losses: torch.Tensor,
        scaled: bool = False,
        replaces: bool = False,
        again: Callable[..., torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Wrap a backward pass of `losses`, which are given without a loss scale.

        `again(*nets)` recomputes their sum from copies of the models in float64. `replaces`: the
        gradients replace the existing ones.
        """
        self.events += 1
        everything = self._everything()
        before = {key: _copy(p.grad) for key, p in everything.items()}
        marks = {key: _mark(p.grad) for key, p in everything.items()}
        yield
        factor = self.loss_scale if scaled else 1.0
        touched = {key for key, p in everything.items() if _mark(p.grad) != marks[key]}
        if again is not None:
            self._check(again, factor, {} if replaces else before, touched)
        made = Backward(sum(_number(loss) for loss in losses), set())
        for number, state in enumerate(self._states):
            if any(id(p) in touched for p in self._own(number)):
                made.claims.add(number)
                state.passes.append(made)
                self._measure(number, factor)

    def _measure(self, number: int, factor: float) -> None:
        state, named = self._states[number], self._named()
        own = {id(p) for p in self._own(number)}
        held = {id(p) for o in range(len(self.optimizers)) for p in self._own(o)}
        state.norms = {n: _scaled(p.grad, factor) for n, p in named.items() if id(p) in own}
        state.outside = {n: _scaled(p.grad, factor) for n, p in named.items() if id(p) not in held}
        inside = {id(p) for p in named.values()}
        gone = [_scaled(p.grad, factor) for p in self._own(number) if id(p) not in inside]
        state.gone = [norm for norm in gone if norm is not None]
        seen = {n: p for n, p in named.items() if n in state.norms or n in state.outside}
        state.poisoned = {n: bad for n, p in seen.items() if (bad := _poison(p.grad))}

    def _check(
        self,
        again: Callable[..., torch.Tensor],
        factor: float,
        before: dict[int, torch.Tensor | None],
        touched: set[int],
    ) -> None:
        """Compare the gradients with autograd in float64."""
        named = self._named()
        nets = copy.deepcopy(self.nets)
        copies = {n: p for net in nets.values() for n, p in net.double().named_parameters()}
        wanted = {n: p for n, p in copies.items() if id(named[n]) in touched}
        with torch.enable_grad():
            total = again(*nets.values())
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            found, earlier = named[name].grad, before.get(id(named[name]))
            assert found is not None
            assert gradient is not None, f"{name} has a gradient, but not in float64"
            change = _wide(found) if earlier is None else _wide(found) - _wide(earlier)
            tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 0.2
            expected = _wide(gradient) * factor
            if torch.isfinite(change).all() and torch.isfinite(expected).all():
                reference = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-300)
                if earlier is not None and earlier.numel():
                    # Adding to a far larger number loses the last digits.
                    reference = max(reference, float(_wide(earlier).abs().max()))
                worst = float((change - expected).abs().max()) if expected.numel() else 0.0
                near = (
                    worst <= tolerance * reference or worst <= 1e-5 * abs(_number(total)) * factor
                )
                assert near, f"{name}: {change} is not {expected}"

    # ------------------------------------------------------------ clipping and zeroing

    @contextmanager
    def clip(
        self,
        kind: str,
        parameters: Iterable[torch.Tensor],
        limit: float | None = None,
        norm_type: float = 2.0,
    ) -> Iterator[SimpleNamespace]:
        """Wrap a call that clips the gradients of these parameters; the caller sets `total` of the
        yielded object to the result of `clip_grad_norm_`.

        Of a change through `.data` (kind `data`) what leaves the norm of a gradient as it was is no
        part: it cannot be seen.
        """
        self.events += kind not in ("hand", "data")
        clipped = [p for p in dict.fromkeys(parameters) if p.grad is not None]
        if kind in ("hand", "data"):
            clipped = [p for p in clipped if self._waits(p)]
        norms_before = {id(p): _norm(p.grad) for p in clipped}
        names = {id(p): n for n, p in self._named().items()}
        squares = {names[id(p)]: _norm(p.grad) ** 2 for p in clipped if id(p) in names}
        whole = sum(squares.values())
        shares = {n: square / whole for n, square in squares.items()} if whole > 0 else {}
        before = _total([p.grad for p in clipped], norm_type)
        call = SimpleNamespace(total=None)
        yield call
        if kind == "data":
            kind = "hand"
            clipped = [p for p in clipped if _differs(norms_before[id(p)], _norm(p.grad))]
            norms_before = {id(p): norms_before[id(p)] for p in clipped}
            squares = {names[k]: norm**2 for k, norm in norms_before.items() if k in names}
            before, whole = _length(norms_before.values()), sum(squares.values())
            shares = {n: square / whole for n, square in squares.items()} if whole > 0 else {}
        after = _total([p.grad for p in clipped], norm_type)
        returned = before if call.total is None else _number(call.total)
        if kind == "norm" and limit is not None:
            # Use the function's own result: in float32 a sum of squares may be infinite.
            scale = returned if math.isnan(returned) else min(1.0, limit / (returned + 1e-6))
        else:
            scale = after / before if before else 1.0
        rounded = any(p.dtype in (torch.bfloat16, torch.float16) for p in clipped)
        made = Clip(kind, limit, before, after, scale, shares, self.loss_scale, returned, rounded)
        if kind == "hand":
            made.at = self.events
            made.norms = norms_before, {id(p): _norm(p.grad) for p in clipped}
            self._change_by_hand(made, names)
        else:
            self._clip(made, {id(p) for p in clipped})

    def _change_by_hand(self, made: Clip, names: Mapping[int, str]) -> None:
        """Changes right after each other are one, of all gradients that they changed."""
        last = self._last_change
        if last is not None and (last.at, last.loss_scale) == (made.at, made.loss_scale):
            made = _together(last, made, names)
            for state in self._states:
                state.clips = [clip for clip in state.clips if clip is not last]
        self._last_change = made
        self._clip(made, set(made.norms[0]))

    def _clip(self, made: Clip, ids: set[int]) -> None:
        for number, state in enumerate(self._states):
            if state.passes and any(id(p) in ids for p in self._own(number)):
                state.clips.append(made)

    def _waits(self, parameter: torch.Tensor) -> bool:
        """Whether its gradient waits for the step of an optimizer, or it is in none."""
        holders = [
            state
            for number, state in enumerate(self._states)
            if any(parameter is p for p in self._own(number))
        ]
        return not holders or any(state.passes for state in holders)

    def zeroed(self, by_hand: bool = False) -> None:
        """Call after gradients were zeroed or released; it finds out which. `by_hand`: without a
        call of `zero_grad`."""
        last = self._last_change
        unseen = last if by_hand and last is not None and last.at == self.events else None
        self.events += 1
        lost: list[Backward] = []
        for number, state in enumerate(self._states):
            gone = all(p.grad is None or not _dense(p.grad).any() for p in self._own(number))
            if not gone or not state.passes:
                continue
            taken = state.taken()
            for each in taken.passes:
                each.claims.discard(number)
                each.used |= number == self._stepping  # a closure begins its next evaluation
                each.norms |= taken.norms
                each.outside |= taken.outside
                each.clips += [clip for clip in taken.clips if clip not in each.clips]
                if not each.claims and not each.used:
                    lost.append(each)
        if lost:
            last = lost[-1]
            self.skipped.append(
                Skipped(
                    "hand",
                    len(self.steps) + 1,
                    sum(b.loss for b in lost),
                    last.norms,
                    last.clips,
                    last.outside,
                )
            )
        if unseen is not None:
            self._leave_out_released(unseen)

    def _leave_out_released(self, made: Clip) -> None:
        """Gradients that were changed by hand have been released or zeroed by hand right after."""
        everything = self._everything()
        gradients = {key: everything[key].grad for key in made.norms[0]}
        left = {key for key, g in gradients.items() if g is not None and _dense(g).any()}
        if len(left) == len(gradients):
            return
        names = {id(p): n for n, p in self._named().items()}
        before, after = ({k: norms[k] for k in made.norms[0] if k in left} for norms in made.norms)
        rest = _by_hand(made, before, after, names)
        for number, state in enumerate(self._states):
            if any(clip is made for clip in state.clips):
                state.clips = [clip for clip in state.clips if clip is not made]
                if any(id(p) in left for p in self._own(number)):
                    state.clips.append(rest)
        self._last_change = rest

    # ------------------------------------------------------------ steps

    def evaluation(self) -> None:
        """Call at the start of a closure."""
        self._evaluations += 1
        if self._evaluations == 2 and self._stepping is not None:
            state = self._states[self._stepping]
            self._first = replace(state, passes=[*state.passes], clips=[*state.clips])

    @contextmanager
    def step(self, optimizer: Any, scaler: Any = None) -> Iterator[None]:
        """Wrap an optimizer's step. `scaler`: the GradScaler that decides whether it happens."""
        self.events += 1
        number = next(i for i, o in enumerate(self.optimizers) if o is optimizer)
        self._stepping, self._evaluations, self._first = number, 0, None
        named = {n: p for n, p in self._named().items() if any(p is q for q in self._own(number))}
        before = {n: p.detach().clone() for n, p in named.items()}
        rate = optimizer.param_groups[0]["lr"]
        if not self._states[number].passes:
            self._measure(number, 1.0)  # left by an earlier step, or by a closure's first call
        yield
        self._stepping = None
        last = self._states[number].taken()
        taken = self._first or last
        shared = bool(taken.passes) and all(each.used for each in taken.passes)
        for each in [*taken.passes, *last.passes]:
            each.claims.discard(number)
            each.used = True
        loss = sum(b.loss for b in taken.passes) if taken.passes else None
        if scaler is not None and _skips(scaler, optimizer):
            assert loss is not None
            at = len(self.steps) + 1
            self.skipped.append(
                Skipped("scaler", at, loss, taken.norms, taken.clips, taken.outside)
            )
            return
        ratios: dict[str, float | None] = {}
        for name, p in named.items():
            length = _norm(before[name])
            moved = _norm(_wide(p) - _wide(before[name]))
            ratios[name] = moved / length if length else None
        norms = {name: taken.norms.get(name) for name in named}
        phases = {"step"} if rate is not None else set()
        if taken.passes:
            phases |= {"backward"}
        self.steps.append(
            Step(
                optimizer=number,
                loss=loss,
                lr=None if rate is None else float(rate),
                norms=norms,
                outside=taken.outside,
                gone=taken.gone,
                clips=taken.clips,
                weights={n: _norm(p.detach()) for n, p in named.items()},
                ratios=ratios,
                poisoned=taken.poisoned,
                phases=phases,
                evaluations=self._evaluations,
                shared=shared,
            )
        )


def _together(first: Clip, second: Clip, names: Mapping[int, str]) -> Clip:
    """Two changes by hand, one right after the other, as one."""
    before = second.norms[0] | first.norms[0]
    after = first.norms[1] | second.norms[1]
    rounded = first.rounded or second.rounded
    return replace(_by_hand(second, before, after, names), rounded=rounded)


def _by_hand(
    clip: Clip, before: dict[int, float], after: dict[int, float], names: Mapping[int, str]
) -> Clip:
    """The clip with these norms of the gradients, each by the id of its parameter."""
    whole, left = _length(before.values()), _length(after.values())
    shares = {names[p]: (norm / whole) ** 2 for p, norm in before.items() if whole and p in names}
    return replace(
        clip,
        before=whole,
        after=left,
        scale=left / whole if whole else 1.0,
        shares=shares,
        returned=whole,
        norms=(before, after),
    )


class Silence:
    """Replaces `Truth` in a script that only trains."""

    def __init__(self) -> None:
        self.loss_scale = 1.0

    def watch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    end = zeroed = evaluation = watch

    @contextmanager
    def backward(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Wrap nothing."""
        yield

    step = backward

    @contextmanager
    def clip(self, *args: Any) -> Iterator[SimpleNamespace]:
        """Wrap nothing."""
        yield SimpleNamespace()


def _skips(scaler: Any, optimizer: Any) -> bool:
    """Whether the scaler has just found gradients of the optimizer that are not finite."""
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(float(value) > 0 for value in found.values())


def _mark(gradient: torch.Tensor | None) -> tuple[int, int] | None:
    return None if gradient is None else (id(gradient), gradient._version)


def _copy(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.detach().clone()


def _number(loss: torch.Tensor) -> float:
    return float(loss.detach().double())


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_sparse else tensor


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in double precision, as real numbers."""
    tensor = _dense(tensor)
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor)))


def _differs(before: float, after: float) -> bool:
    return before != after and not (math.isnan(before) and math.isnan(after))


def _length(norms: Iterable[float]) -> float:
    found = list(norms)
    return math.nan if any(map(math.isnan, found)) else math.hypot(*found)


def _scaled(gradient: torch.Tensor | None, factor: float) -> float | None:
    return None if gradient is None else _norm(gradient) / factor


def _total(gradients: Sequence[torch.Tensor], norm_type: float) -> float:
    if not gradients:
        return 0.0
    flat = torch.cat([_wide(g).flatten() for g in gradients])
    return float(torch.linalg.vector_norm(flat, norm_type)) if flat.numel() else 0.0


def _poison(gradient: torch.Tensor | None) -> str:
    if gradient is None or torch.isfinite(_wide(gradient)).all():
        return ""
    return "nan" if torch.isnan(_wide(gradient)).any() else "inf"
