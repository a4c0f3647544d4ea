"""Compares everything written about a run with the truth of its script, number by number.

A number is correct or absent; it may be absent only where the truth has none either.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.oracle.adapter import Object, Output
from tests.oracle.generator import Loop
from tests.oracle.truth import Clip, Skipped, Step, Truth

TOLERANCE = 1e-4
ROUNDED = 1e-2
"""Tolerance of values computed in half precision."""
SHARE_TOLERANCE = 2e-3
"""Shares are stored in half precision."""
LARGEST, SMALLEST = 3.4e38, 1e-37
"""The normal range of float32."""
WORDS = {"nan", "inf", "-inf"}


@dataclass(frozen=True)
class Difference:
    """A written value that is wrong, or a true value that is missing."""

    check: str
    """Which of `CHECKS` found it."""
    text: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.text}"


def differences(loop: Loop, truth: Truth, output: Output) -> list[Difference]:
    """The differences found by all checks."""
    comparison = Comparison(loop, truth, output)
    return [Difference(name, text) for name, check in CHECKS.items() for text in check(comparison)]


class Comparison:
    """A run and its truth, step by step."""

    def __init__(self, loop: Loop, truth: Truth, output: Output) -> None:
        self.loop = loop
        self.truth = truth
        self.output = output
        self.headers = [line for line in output.live if line["type"] == "run"]
        self.steps = [line for line in output.live if line["type"] == "step"]
        self.events = [line for line in output.live if line["type"] == "event"]
        self.skipped = [line for line in output.live if line["type"] == "skipped"]
        self.pairs = list(zip(self.steps, truth.steps, strict=False))


Found = Iterator[str]
Check = Callable[[Comparison], Found]


# ---------------------------------------------------------------- the steps


def steps(comparison: Comparison) -> Found:
    """All steps are written, numbered from 1."""
    found = [step["step"] for step in comparison.steps]
    made = len(comparison.truth.steps)
    if found != list(range(1, made + 1)):
        yield f"{made} steps were made, and {found} are written"
    ends = [line["steps"] for line in comparison.output.live if line["type"] == "end"]
    if ends != [made]:
        yield f"{made} steps were made, and the end line has {ends}"
    faults = [event["text"] for event in comparison.events if event["kind"] == "fault"]
    if faults:
        yield f"the tracer failed: {faults}"


def optimizers(comparison: Comparison) -> Found:
    """Each optimizer has its own name throughout the run."""
    names: dict[int, str] = {}
    for step, true in comparison.pairs:
        name = step["optimizer"]
        if names.setdefault(true.optimizer, name) != name:
            yield f"step {step['step']}: {names[true.optimizer]} is now called {name}"
    if len(set(names.values())) != len(names):
        yield f"several optimizers share a name: {names}"
    if comparison.headers:
        described = comparison.headers[-1]["optimizers"]
        stepped = set(names.values())
        idle = [name for name in described if name not in stepped]
        if idle and not comparison.truth.skipped:
            yield f"{idle} never steps"


def losses(comparison: Comparison) -> Found:
    """The loss of each step; a loss that was not seen is absent, not NaN."""
    for step, true in comparison.pairs:
        yield from _number(step, "loss", step["loss"], true.loss)


def learning_rates(comparison: Comparison) -> Found:
    """The learning rate of the optimizer's first group."""
    for step, true in comparison.pairs:
        yield from _number(step, "lr", step["lr"], true.lr)


def total_norms(comparison: Comparison) -> Found:
    """√Σ‖g‖² over the optimizer's gradients; absent at a step that did not measure it."""
    for step, true in comparison.pairs:
        if comparison.loop.measured_every > 1 and step["grad_norm_preclip"] is None:
            continue
        there = any(norm is not None for norm in true.norms.values())
        total = true.total if there else None
        yield from _number(step, "grad_norm_preclip", step["grad_norm_preclip"], total)


def gradient_norms(comparison: Comparison) -> Found:
    """The norm of every parameter of the optimizer that has a gradient."""
    for step, true in comparison.pairs:
        if comparison.loop.measured_every > 1 and not step.get("grad_norm"):
            continue
        found = step.get("grad_norm", {})
        for name, norm in true.norms.items():
            key = _key(found, name)
            if norm is None or name == "empty":
                continue
            if key is None:
                yield f"step {step['step']}: no gradient norm of {name}, which is {norm:.6g}"
            else:
                yield from _number(step, f"grad_norm.{key}", found[key], norm)


def absent_gradients(comparison: Comparison) -> Found:
    """A missing gradient has no norm."""
    for step, true in comparison.pairs:
        found = step.get("grad_norm", {})
        for name, norm in [*true.norms.items(), *true.outside.items()]:
            key = _key(found, name)
            if norm is None and key is not None:
                yield from _number(step, f"grad_norm.{key}", found[key], None)
        for key in found:
            known = any(_is(key, name) for name in [*true.norms, *true.outside])
            if not known and not any(
                math.isclose(found[key] or 0.0, n, rel_tol=TOLERANCE) for n in true.gone
            ):
                yield from _number(step, f"grad_norm.{key}", found[key], None)


def outside_gradients(comparison: Comparison) -> Found:
    """Parameters in no optimizer are watched too, in the steps of one of several optimizers."""
    measured = {
        (step["optimizer"], name)
        for step, true in comparison.pairs
        for name in true.outside
        if _key(step.get("grad_norm", {}), name) is not None
    }
    somewhere = {name for _, name in measured}
    for step, true in comparison.pairs:
        found = step.get("grad_norm", {})
        for name, norm in true.outside.items():
            if norm is None or (comparison.loop.measured_every > 1 and not found):
                continue
            if name in somewhere and (step["optimizer"], name) not in measured:
                continue
            key = _key(found, name)
            if key is None:
                yield f"step {step['step']}: no gradient norm of {name}, which is {norm:.6g}"
            else:
                yield from _number(step, f"grad_norm.{key}", found[key], norm)


def reasons(comparison: Comparison) -> Found:
    """Absent values are null with a reason; impossible values are null, not left out."""
    for step, true in comparison.pairs:
        known = {**step.get("nonfinite", {}), **step.get("absent", {})}
        found = {name: step[name] for name in ("loss", "lr", "grad_norm_preclip")}
        for table in ("grad_norm", "weight_norm", "update_ratio"):
            found |= {f"{table}.{name}": value for name, value in step.get(table, {}).items()}
        for name, value in found.items():
            if value is None and not known.get(name):
                yield f"step {step['step']}: {name} is null without a reason"
        if step.get("grad_norm"):
            for name, norm in true.norms.items():
                if norm is None and _key(step["grad_norm"], name) is None:
                    yield f"step {step['step']}: the gradient of {name} is left out"


def weight_norms(comparison: Comparison) -> Found:
    """After the update."""
    yield from _by_parameter(comparison, "weight_norm", lambda true: true.weights)


def update_ratios(comparison: Comparison) -> Found:
    """‖update‖ / ‖weights before‖; none where the weights were 0."""
    yield from _by_parameter(comparison, "update_ratio", lambda true: true.ratios)


def _by_parameter(
    comparison: Comparison, name: str, of: Callable[[Step], Mapping[str, float | None]]
) -> Found:
    for step, true in comparison.pairs:
        if name not in step:
            if comparison.output.every_step and of(true):
                yield f"step {step['step']}: no {name}"
            continue
        for parameter, value in of(true).items():
            key = _key(step[name], parameter)
            if key is None:
                if value is not None:
                    yield f"step {step['step']}: no {name} of {parameter}, which is {value:.6g}"
                continue
            # Weights in low precision move by whole units in the last place: the difference of two
            # rounded norms is not the rounded difference.
            yield from _number(step, f"{name}.{key}", step[name][key], value)


def clips(comparison: Comparison) -> Found:
    """The clip of the gradients that the step used: of several calls the hardest."""
    for step, true in comparison.pairs:
        found, where = step["clip"], f"step {step['step']}"
        if not true.clips:
            if found is not None:
                yield f"{where}: nothing clipped its gradients, and {_short(found)} is written"
            continue
        if found is None:
            # Of updates by hand, gradients may be gone before the step is seen.
            if not (comparison.loop.by_hand and all(c.kind == "hand" for c in true.clips)):
                yield f"{where}: a clip is not written: {true.clips[-1]}"
            continue
        seen = _hardest(true.clips)
        if comparison.loop.by_hand and any(clip.kind == "hand" for clip in true.clips):
            seen = true.clips  # the last may have gone unseen
        if not any(_same_clip(found, step, clip) for clip in seen):
            yield f"{where}: the clip was {_hardest(true.clips)}, and {_short(found)} is written"
        alike = [clip for clip in seen if _same_clip(found, step, clip)]
        clipped = any(clip.scale < 1 for clip in _hardest(alike or seen))
        if found["clipped"] != clipped:
            yield f"{where}: clipped is {found['clipped']}, and it is {clipped}"
        elif clipped and found["kind"] not in {clip.kind for clip in _hardest(true.clips)}:
            yield f"{where}: the kind of clip is {found['kind']}: {_hardest(true.clips)}"


def shares(comparison: Comparison) -> Found:
    """A parameter's share of the sum of squares of the clipped gradients."""
    for step, true in comparison.pairs:
        found = step["clip"]
        if not found or not found.get("dominant") or not true.clips:
            continue
        alike = [c for c in _hardest(true.clips) if _same_clip(found, step, c)]
        if not alike:
            continue  # reported by `clips`
        for each in found["dominant"]:
            parameter, share = each["parameter"], each["share"]
            fits = [
                clip.shares[name] for clip in alike for name in clip.shares if _is(parameter, name)
            ]
            # The clipping of a model in half precision computes norms of three digits.
            tolerance = ROUNDED if any(clip.rounded for clip in alike) else SHARE_TOLERANCE
            if share is None or not any(abs(share - fit) <= tolerance for fit in fits):
                yield f"step {step['step']}: share of {parameter} is {share}, and it is {fits}"


def _hardest(clips: list[Clip]) -> list[Clip]:
    """The clips with the smallest scale, or with a scale of NaN."""
    known = [clip for clip in clips if not math.isnan(clip.scale)]
    if len(known) < len(clips):
        return [clip for clip in clips if math.isnan(clip.scale)]
    least = min(clip.scale for clip in clips)
    return [clip for clip in clips if clip.scale <= least * (1 + 1e-5)]


def _same_clip(found: Object, step: Object, clip: Clip) -> bool:
    if found["gradient_scale"] != clip.loss_scale:
        return False
    words = step.get("nonfinite", {})
    before = found["norm_before"]
    # Either the true norm, or the function's own result in the precision of the gradients.
    own = before is not None and math.isclose(before, clip.returned, rel_tol=TOLERANCE)
    own |= math.isinf(clip.returned) and words.get("clip.norm_before") == "inf"
    if not own and any(_number(step, "clip.norm_before", before, clip.before)):
        return False
    expected: dict[str, float] = {"norm_after": clip.after, "scale": clip.scale}
    if clip.limit is not None:
        expected["max_norm"] = clip.limit
    tolerance = ROUNDED if clip.rounded else TOLERANCE
    if found["norm_after"] is None and 0 < clip.before * clip.scale < SMALLEST:
        del expected["norm_after"]  # out of the range of float32
    return not any(
        text
        for name, value in expected.items()
        for text in _number(step, f"clip.{name}", found[name], value, tolerance)
    )


def phases(comparison: Comparison) -> Found:
    """Every phase that a step must have had, and no other."""
    clipping = any(true.clips for true in comparison.truth.steps) or comparison.loop.clips
    booked: set[int] = set()
    for step, true in comparison.pairs:
        missing = true.phases - step["phase_ms"].keys()
        if missing and not (missing == {"backward"} and true.shared):
            yield f"step {step['step']}: {sorted(missing)} is missing in {sorted(step['phase_ms'])}"
        if "clip" in step["phase_ms"] and not clipping:
            yield f"step {step['step']}: nothing is ever clipped, and it took time"
        booked.add(true.optimizer)


def forwards(comparison: Comparison) -> Found:
    """Every step with a loss calls the model, except for further optimizers of a joint step."""
    for step, true in comparison.pairs:
        if "backward" not in true.phases or (true.optimizer and comparison.loop.rounds == "joint"):
            continue
        for phase in ("forward", "loss"):
            if phase not in step["phase_ms"]:
                yield f"step {step['step']}: no {phase} in {sorted(step['phase_ms'])}"
    for header in comparison.headers:
        if "forward" in header["unseen"]:
            yield f"the model is called, and unseen has: {header['unseen']['forward']}"


def own_phases(comparison: Comparison) -> Found:
    """The time of a clip counts for the step whose gradients it clipped."""
    for step, true in comparison.pairs:
        if true.clips and "clip" not in step["phase_ms"] and true.clips[-1].kind != "hand":
            others = [t for t in comparison.truth.steps if t is not true]
            if not any(clip in other.clips for clip in true.clips for other in others):
                yield f"step {step['step']}: its clip took no time"


def times(comparison: Comparison) -> Found:
    """The phases of a step add up to it, what it cost to measure adds up too, and the steps follow
    one another."""
    before = 0.0
    for step in comparison.steps:
        yield from _parts(step)
        costs = step.get("overhead_ms", {}).values()
        if min(costs, default=0.0) < 0 or not sum(costs) <= step["own_ms"] + 1e-3:
            yield f"step {step['step']}: {step['overhead_ms']} is not {step['own_ms']} ms"
        if not before <= step["time"] <= time.time():
            yield f"step {step['step']} is at {step['time']}, and the one before it at {before}"
        before = step["time"]


def _parts(line: Object) -> Found:
    whole, parts = line["step_ms"], line["phase_ms"].values()
    if min(parts, default=0.0) < 0:
        yield f"step {line['step']}: negative times in {line['phase_ms']}"
    if not whole or abs(whole - sum(parts)) > 0.01 * whole + 0.02:
        yield f"step {line['step']}: phases of {sum(parts)} ms, step of {whole} ms"


def shared_phases(comparison: Comparison) -> Found:
    """Phases that are counted in another optimizer's step are said to be: those of a backward that
    an earlier step has used too, and of its clip."""
    for step, true in comparison.pairs:
        found = step.get("shared", [])
        if found and (not true.shared or set(found) & step["phase_ms"].keys()):
            yield f"step {step['step']} shares {found}; it has {sorted(step['phase_ms'])}"
        if true.shared and not {"forward", "loss", "backward"} <= {*found, *step["phase_ms"]}:
            yield f"step {step['step']} has {sorted(step['phase_ms'])} and shares {found}"


def memory(comparison: Comparison) -> Found:
    """The memory of this process, which has no accelerator."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for step in comparison.steps:
        if "memory" in step and comparison.output.every_step:
            found = step["memory"]
            if (
                found.keys() != {"host_bytes"}
                or not most / 100 < found["host_bytes"] <= most * 1.05
            ):
                yield f"step {step['step']}: the memory is {found}, and at most {most}"


def evaluations(comparison: Comparison) -> Found:
    """How often the closure was called; absent without one."""
    for step, true in comparison.pairs:
        if step.get("evaluations") != (true.evaluations or None):
            found = step.get("evaluations")
            yield f"step {step['step']} has {found} evaluations, and it is {true.evaluations}"


COMPARED = {
    "step": "",
    "time": "times",
    "loss": "losses",
    "lr": "learning_rates",
    "grad_norm_preclip": "total_norms",
    "grad_norm": "gradient_norms",
    "weight_norm": "weight_norms",
    "update_ratio": "update_ratios",
    "clip": "clips",
    "phase_ms": "times",
    "step_ms": "times",
    "own_ms": "times",
    "overhead_ms": "times",
    "memory": "memory",
    "evaluations": "evaluations",
    "loss_scale": "skipped_by_scaler",
}
"""What has numbers in the lines of steps and skipped iterations, and the check that compares it."""


def everything(comparison: Comparison) -> Found:
    """Every number in the lines of steps is compared by some check."""
    for line in [*comparison.steps, *comparison.skipped]:
        for name, value in line.items():
            if name not in COMPARED and _has_numbers(value):
                yield f"step {line['step']}: {name} is not compared: {value}"


def _has_numbers(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_numbers, value.values()))
    if isinstance(value, list):
        return any(map(_has_numbers, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------- skipped steps and alarms


def skipped_steps(comparison: Comparison) -> Found:
    """Every step that a GradScaler skipped is reported, in its place."""
    true = [skipped.before_step for skipped in comparison.truth.skipped if skipped.why == "scaler"]
    found = [event["step"] for event in comparison.events if event["kind"] == "skipped_step"]
    found += [line["step"] for line in comparison.skipped if line["reason"] == "scaler"]
    if sorted(set(found)) != sorted(set(true)) or (found and len(found) < len(true)):
        yield f"steps {true} were skipped, and {found} are reported"


def skipped_iterations(comparison: Comparison) -> Found:
    """Gradients that `zero_grad` discards are listed with their own numbers."""
    true = [s for s in comparison.truth.skipped if s.why == "hand"]
    found = [line for line in comparison.skipped if line["reason"] == "hand"]
    if len(found) != len(true):
        yield f"{len(true)} iterations were skipped by hand, and {len(found)} are listed"
    for line, skipped in zip(found, true, strict=False):
        yield from _skipped(line, skipped)


def skipped_by_scaler(comparison: Comparison) -> Found:
    """Steps that a GradScaler skipped are listed with their own numbers."""
    true = [s for s in comparison.truth.skipped if s.why == "scaler"]
    found = [line for line in comparison.skipped if line["reason"] == "scaler"]
    if len(found) != len(true):
        yield f"{len(true)} iterations were skipped by the scaler, and {len(found)} are listed"
    for line, skipped in zip(found, true, strict=False):
        yield from _skipped(line, skipped)


def unfinished(comparison: Comparison) -> Found:
    """A step that never completed is listed with its known values."""
    true = [s for s in comparison.truth.skipped if s.why == "end"]
    found = [line for line in comparison.skipped if line["reason"] == "end"]
    if len(found) != len(true):
        yield f"{len(true)} steps were not finished, and {len(found)} are listed"
    for line, skipped in zip(found, true, strict=False):
        yield from _skipped(line, skipped)


def _skipped(line: Object, skipped: Skipped) -> Found:
    if line["step"] != skipped.before_step:
        yield f"skipped before step {skipped.before_step}, and {line['step']} is written"
    yield from _number(line, "loss", line["loss"], skipped.loss)
    for name, norm in [*skipped.norms.items(), *skipped.outside.items()]:
        key = _key(line.get("grad_norm", {}), name)
        if key is not None:
            yield from _number(line, f"grad_norm.{key}", line["grad_norm"][key], norm)
        elif norm is not None:
            yield f"skipped before step {line['step']}: no gradient norm of {name}"
    found, where = line["clip"], f"skipped before step {line['step']}"
    if found is not None and not any(_same_clip(found, line, c) for c in skipped.clips):
        yield f"{where}: {_short(found)} is written, and the clips are {skipped.clips}"
    yield from _parts(line)


def alarms(comparison: Comparison) -> Found:
    """An alarm is raised where a loss or gradient is not finite, and nowhere else."""
    raised = [event for event in comparison.events if event["kind"] == "nonfinite"]
    bad: dict[str, dict[int, set[str]]] = {"loss": {}, "gradient": {}, "weight": {}}

    def note(quantity: str, step: int, names: Iterable[str]) -> None:
        bad[quantity].setdefault(step, set()).update(names)

    for step, true in enumerate(comparison.truth.steps, 1):
        if true.loss is not None and not math.isfinite(true.loss):
            note("loss", step, [""])
        note("gradient", step, true.poisoned)
        note("weight", step, [n for n, norm in true.weights.items() if not math.isfinite(norm)])
    for true_skip in comparison.truth.skipped:
        if not math.isfinite(true_skip.loss):
            note("loss", true_skip.before_step, [""])
        for norms in (true_skip.norms, true_skip.outside):
            wrong = [n for n, norm in norms.items() if norm is not None and not math.isfinite(norm)]
            note("gradient", true_skip.before_step, wrong)
    for event in raised:
        names = bad[event["quantity"]].get(event["step"], set())
        blamed = event["parameter"] or ""
        if not names:
            yield f"a false alarm: {event['text']} at step {event['step']}"
        elif names != {""} and not any(_is(blamed, name) for name in names):
            yield f"{blamed} is blamed at step {event['step']}, and {sorted(names)} are not finite"
    reported = {event["quantity"] for event in raised}
    for quantity in ("loss", "gradient"):
        stepped = any(
            (true.loss is not None and not math.isfinite(true.loss))
            if quantity == "loss"
            else true.poisoned
            for true in comparison.truth.steps
        )
        if stepped and quantity not in reported:
            yield f"the {quantity} is not finite, and no alarm is raised"


# ---------------------------------------------------------------- the header, show and export


def header(comparison: Comparison) -> Found:
    """The final state of the parameters."""
    if not comparison.headers:
        yield "there is no header"
        return
    described = {p["name"]: p for p in comparison.headers[-1]["parameters"]}
    for name, true in comparison.truth.parameters.items():
        key = _key(described, name)
        if key is None:
            yield f"{name} is not described"
            continue
        found = described[key]
        expected = {
            "shape": list(true.shape),
            "dtype": true.dtype,
            "numel": math.prod(true.shape),
            "trainable": true.trainable,
        }
        for field, value in expected.items():
            if found[field] != value:
                yield f"{name}: {field} is {value}, and {found[field]} is written"
        if bool(found["optimizer"]) != true.held and not comparison.loop.by_hand:
            yield f"{name}: its optimizer is written as {found['optimizer']!r}, held: {true.held}"


def shown(comparison: Comparison) -> Found:
    """`show` gives the last step's values, and those of the last step of each optimizer."""
    show, made = comparison.output.show, comparison.truth.steps
    if show["step"] != len(made):
        yield f"show has step {show['step']} of {len(made)}"
    if not made:
        return
    last = made[-1]
    where = {"step": "show", "nonfinite": {}}
    if last.loss is not None and not math.isfinite(last.loss):
        if show["loss"] is not None or not show["loss_text"]:
            yield f"show gives the loss as {show['loss']}, and it is {last.loss}"
    else:
        yield from _number(where, "loss", show["loss"], last.loss)
    yield from _number(where, "learning_rate", show["learning_rate"], last.lr)
    newest = {true.optimizer: number for number, true in enumerate(made, 1)}
    if {each["step"] for each in show["optimizers"]} != set(newest.values()):
        yield f"show gives steps {show['optimizers']}, and they are {newest}"
    for each in show["optimizers"]:
        if each["step"] > len(made):
            continue
        yield from _shown_optimizer(comparison, each, made[each["step"] - 1])
        if each["step"] == len(made):
            found = {n: show[n] for n in ("loss", "learning_rate", "grad_norm_preclip")}
            if found != {name: each[name] for name in found}:
                yield f"show gives {found}, and for the last optimizer {each}"
    if comparison.steps:
        found = {name: ms for name, ms in show["phase_ms"].items() if ms is not None}
        expected = comparison.steps[-1]["phase_ms"]
        if found.keys() != expected.keys() or any(
            not math.isclose(found[name], expected[name], rel_tol=1e-5) for name in found
        ):
            yield f"show gives the phases as {found}, and the last step has {expected}"
    clips = {step["step"]: step["clip"] for step in comparison.steps if step["clip"] is not None}
    share = sum(clip["clipped"] for clip in clips.values()) / len(clips) if clips else None
    if len(made) < 60 and show["clipped_share"] != share:
        yield f"show has {show['clipped_share']} as the share of clipped steps, and it is {share}"
    for event in show["events"]:
        if event["kind"] == "clip" and np.float32(event["scale"]) != clips[event["step"]]["scale"]:
            yield f"show has {event}, and the step {clips[event['step']]}"
    yield from _curve(comparison, "loss_curve", "loss")
    yield from _curve(comparison, "grad_norm_curve", "grad_norm_preclip")
    elements = sum(math.prod(p.shape) for p in comparison.truth.parameters.values() if p.trainable)
    gone = comparison.loop.replaced_at is not None
    if not gone and (show["parameters"] or 0) != elements:
        yield f"show counts {show['parameters']} elements, and there are {elements}"


def _shown_optimizer(comparison: Comparison, each: Object, true: Step) -> Found:
    where = {"step": f"show {each['name']}", "nonfinite": each["notes"]}
    there = any(norm is not None for norm in [*true.norms.values(), *true.gone])
    expected = {
        "loss": true.loss,
        "learning_rate": true.lr,
        "grad_norm_preclip": true.total if there else None,
    }
    for name, value in expected.items():
        note = each["notes"].get(name)
        if each[name] is None and not note:
            yield f"show: {name} of {each['name']} is null without a reason"
        if name == "grad_norm_preclip" and note and comparison.loop.measured_every > 1:
            continue
        words = {n: word for n, word in each["notes"].items() if word in WORDS}
        yield from _number(where | {"nonfinite": words}, name, each[name], value)


def _curve(comparison: Comparison, curve: str, name: str) -> Found:
    """Each bucket of the curve has the values of the first optimizer's steps in it."""
    found = comparison.output.show[curve]
    first = comparison.headers[-1]["optimizers"][0] if comparison.headers else ""
    steps = [step for step in comparison.steps if step["optimizer"] == first]
    ends = [*found["steps"][1:], math.inf]
    for start, end, low, high in zip(
        found["steps"], ends, found["low"], found["high"], strict=True
    ):
        values = [step[name] for step in steps if start <= step["step"] < end]
        known = [np.float32(value) for value in values if value is not None]
        if (low, high) != (min(known, default=None), max(known, default=None)):
            yield f"{curve} from {start} is {low} … {high}, and the steps have {values}"
    measured = [s for s in steps if s[name] is not None or name in s.get("nonfinite", {})]
    # Of a longer run some buckets may have no measured step.
    least = len(measured) if len(steps) <= 60 else 60 * (len(measured) == len(steps))
    if not comparison.steps or len(found["steps"]) < least:
        yield f"{curve} has {found['steps']}, and the steps are {[s['step'] for s in steps]}"


def exported(comparison: Comparison) -> Found:
    """`export` repeats the lines of the run."""
    wanted = ("step", "event", "skipped", "end")
    live = [line for line in comparison.output.live if line["type"] in wanted]
    again = [line for line in comparison.output.export if line["type"] in wanted]
    if live != again:
        different = next(
            (a, b) for a, b in zip([*live, None], [*again, None], strict=False) if a != b
        )
        yield f"live and exported differ: {different}"
    live_heads = [line for line in comparison.output.live if line["type"] == "run"]
    again_heads = [line for line in comparison.output.export if line["type"] == "run"]
    if live_heads and again_heads and live_heads[-1] != again_heads[-1]:
        yield "the last header is not exported as it was"


def stored(comparison: Comparison) -> Found:
    """The tables of the store hold the values of the lines."""
    columns = {"loss": "loss", "learning_rate": "lr", "grad_norm_preclip": "grad_norm_preclip"}
    by_step = {step["step"]: step for step in comparison.steps}
    stored_texts: dict[tuple[int, str], str] = {}
    for row in comparison.output.tables.get("steps", []):
        step = int(row["step"])
        for name, text in row.items():
            base = name.rpartition(".")[2]
            if name.startswith("step.") or name in columns:
                stored_texts[step, base] = stored_texts.get((step, base)) or text
    for number, step in by_step.items():
        for column, key in columns.items():
            text = stored_texts.get((number, column), "")
            yield from _cell(number, column, text, step[key], step, key)
    cells: dict[tuple[int, str, str], str] = {}
    for row in comparison.output.tables.get("steps", []):
        for column, text in row.items():
            table, _, rest = column.partition(".")
            if text:
                cells[int(row["step"]), table, rest.rpartition(".")[2]] = text
    for table in ("clip", "phase_ms", "memory"):
        names = {name for _, of, name in cells if of == table}
        for number, step in by_step.items():
            line = step.get(table) or {}
            for name in (names | line.keys()) - {"clipped", "kind", "dominant"}:
                text, key = cells.get((number, table, name), ""), f"{table}.{name}"
                yield from _cell(number, key, text, line.get(name), step, key)
    for name in ("grad_norm", "weight_norm", "update_ratio"):
        found = {
            (int(row["step"]), column): text
            for table, rows in comparison.output.tables.items()
            if table == name or table.startswith(f"{name}.")
            for row in rows
            for column, text in row.items()
            if column != "step"
        }
        for number, step in by_step.items():
            for parameter, value in step.get(name, {}).items():
                text = found.get((number, parameter), "")
                yield from _cell(
                    number, f"{name}.{parameter}", text, value, step, f"{name}.{parameter}"
                )


def _cell(step: int, column: str, text: str, value: float | None, line: Object, key: str) -> Found:
    word = line.get("nonfinite", {}).get(key, "")
    if value is None:
        if text != word:
            expected = word or "absent"
            yield f"step {step}: {column} is {expected} in the lines and {text!r} in the store"
    elif not text or np.float32(text) != np.float32(value):
        yield f"step {step}: {column} is {value} in the lines and {text!r} in the store"


# ---------------------------------------------------------------- comparing


def _number(
    line: Object, name: str, found: Any, true: float | None, tolerance: float = TOLERANCE
) -> Found:
    """Compare a number of a line with the truth."""
    where = f"step {line['step']}: {name}"
    word = line.get("nonfinite", {}).get(name)
    if true is None:
        if found is not None:
            yield f"{where} is {found}, and there is none"
        elif word is not None:
            yield f"{where} is written as {word}, and there is none"
        return
    if not math.isfinite(true):
        if found is not None:
            yield f"{where} is {found}, and it is {true}"
        elif word not in WORDS:
            yield f"{where} is absent, and it is {true}"
        return
    if not (true == 0 or SMALLEST < abs(true) < LARGEST) and found is None and word is None:
        return  # out of the range of float32
    if found is None:
        yield f"{where} is {word or 'absent'}, and it is {true:.6g}"
    elif not math.isclose(found, true, rel_tol=tolerance, abs_tol=1e-12 * (abs(true) or 1e-30)):
        yield f"{where} is {found:.6g}, and it is {true:.6g}"


def _is(found: str, name: str) -> bool:
    """Whether `found` is the written name of a parameter: further models have a prefix."""
    return found == name or found.endswith(f".{name}")


def _key(among: Mapping[str, Any], name: str) -> str | None:
    return name if name in among else next((key for key in among if _is(key, name)), None)


def _short(clip: Object) -> Object:
    return {name: value for name, value in clip.items() if name != "dominant"}


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        steps,
        optimizers,
        losses,
        learning_rates,
        total_norms,
        gradient_norms,
        absent_gradients,
        reasons,
        outside_gradients,
        weight_norms,
        update_ratios,
        clips,
        shares,
        phases,
        forwards,
        own_phases,
        times,
        shared_phases,
        memory,
        evaluations,
        everything,
        skipped_steps,
        skipped_iterations,
        skipped_by_scaler,
        unfinished,
        alarms,
        header,
        shown,
        exported,
        stored,
    )
}
