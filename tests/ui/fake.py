"""A session without a run: deterministic, pausable, in every state that a screen must handle.

    session = fake_gpt(steps=300)          # a GPT after 300 steps, running
    session.advance(10)                    # ten more, as if the run had made them
    session.send(Pause())                  # answered at once

Nothing moves by itself: `advance` is the only clock (or `steps_per_poll`, for demonstrations).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import msgspec
import numpy as np

from tests.ui.fake_run import MAX_NORM, STARTED_AT, FakeRun, describe, synthesise
from tests.ui.fake_tensors import FakeTensors
from tui_trainer.client.api import Link, Snapshot
from tui_trainer.history import MemoryHistory
from tui_trainer.history.columns import STATISTICS
from tui_trainer.protocol import PHASES, actions, messages, schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    TextSample,
)
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.protocol.messages import Ack, PhaseReport, Quantity, Rows, Status
from tui_trainer.protocol.schema import Column, Table

STEP_MS = 46.0


class FakeSession:
    """A `session.api.Session` over a synthetic run."""

    def __init__(self, run: FakeRun | None, steps: int = 0, steps_per_poll: int = 0) -> None:
        self.run = run
        self.steps_per_poll = steps_per_poll
        self.sent: list[Action] = []
        self.topics: frozenset[str] = frozenset()
        self.rate = 0.0
        self.closed = False
        self.link = Link("live", latency_ms=0.4, viewer_id=1)
        self.status = Status(state="running", viewers=("you",), controller=1)
        self.history = MemoryHistory()
        self.events: list[Event] = []
        self.log: list[LogLine] = []
        self.artifacts: list[Artifact] = []
        self.report: PhaseReport | None = None
        self.tensors = FakeTensors()
        self.inspected: list[InspectionRequest] = []
        self.held: list[Future[Inspected]] = []
        self.hold_answers = False
        self.refuse = ""
        """Set to have every command refused with this reason."""
        self._version = 1
        self._arrival: Callable[[], None] | None = None
        self._polled: Snapshot | None = None
        if run is None:
            self.status = Status(state="starting", waiting_for="importing torch")
            return
        for table in run.info.tables:
            self.history.declare(table)
        self._notice("state", "training began")
        self._say("stderr", "note: 3 of 4 cores are used")
        self.advance(steps)

    # ------------------------------------------------------------ the Session protocol

    def poll(self) -> Snapshot:
        """The current snapshot."""
        if self.steps_per_poll and self.status.state == "running":
            self.advance(self.steps_per_poll)
        if self._polled is None or self._polled.version != self._version:
            self._polled = Snapshot(
                link=self.link,
                status=self.status,
                info=self.run.info if self.run else None,
                history=self.history,
                events=tuple(self.events[-2000:]),
                log=tuple(self.log[-5000:]),
                artifacts=tuple(self.artifacts),
                report=self.report,
                version=self._version,
            )
        return self._polled

    def send(self, action: Action) -> Future[Ack]:
        """Answered at once."""
        self.sent.append(action)
        answer: Future[Ack] = Future()
        if self.refuse or self.status.ended or self.run is None:
            ended = "the run has ended" if self.status.ended else "the training has not begun"
            reason = self.refuse or ended
            ack = Ack(len(self.sent), False, self.status, reason, "take control first")
        else:
            message = self._obey(action)
            ack = Ack(len(self.sent), True, self.status, message)
        answer.set_result(ack)
        self._changed()
        return answer

    def inspect(self, request: InspectionRequest) -> Future[Inspected]:
        """Answered at once by `tensors`, unless the answer is held back by `hold_answers`."""
        answer: Future[Inspected] = Future()
        self.inspected.append(request)
        if not self.hold_answers:
            answer.set_result(self.tensors.answer(request, self.status))
        self.held.append(answer)
        return answer

    def watch(self, topics: frozenset[str]) -> None:
        """Record the call."""
        self.topics = topics

    def set_rate(self, polls_per_second: float) -> None:
        """Record the call."""
        self.rate = polls_per_second

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        """Called whenever the snapshot changes."""
        self._arrival = callback

    def close(self) -> None:
        """Record the call."""
        self.closed = True

    # ------------------------------------------------------------ the run's side

    def advance(self, steps: int = 1) -> None:
        """Make `steps` optimizer steps."""
        if self.run is None or not steps:
            return
        first, last = self.status.step + 1, self.status.step + steps
        last = min(last, self.run.info.total_steps or last)
        for table in self.run.info.tables:
            self._apply(table.id, first, last)
        for step in range(first, last + 1):
            self._happenings(step)
        self._status(step=last, phase="step" if self.status.state == "paused" else "backward")
        if last == self.run.info.total_steps:
            self.end("finished", "all steps made")
        self._changed()

    def end(self, state: str, reason: str, hint: str = "") -> None:
        """The run ends: finished, stopped or crashed."""
        self.status = msgspec.structs.replace(self.status, state=state, reason=reason, hint=hint)
        self.report = None
        self._changed()

    def lose_link(self) -> None:
        """The connection breaks."""
        self.link = replace(self.link, state="lost", message="connection lost, trying again in 4 s")
        self._changed()

    def phase(self) -> None:
        """Continue to the next phase boundary."""
        after = self.status.phase if self.status.phase in PHASES else "step"
        phase = PHASES[(PHASES.index(after) + 1) % len(PHASES)]
        if phase == "step":
            self.advance(1)
        self._status(state="paused", phase=phase, reason=f"after {phase}")
        self.report = self._make_report(phase)
        self._changed()

    def _obey(self, action: Action) -> str:
        status = self.status
        match action:
            case actions.Pause():
                self._status(state="paused", phase="step", reason="paused after step")
                self.report = self._make_report("step")
                return f"paused at step {status.step}"
            case actions.Resume():
                self.report = None
                self._status(state="running", phase="forward", reason="", run_to=None)
                return "running"
            case actions.Step(count):
                self._status(state="paused")
                self.advance(count)
                if not self.status.ended:
                    self._status(state="paused", phase="step", reason="stepped")
                    self.report = self._make_report("step")
                return f"{count} step" if count == 1 else f"{count} steps"
            case actions.StepPhase():
                self.phase()
                return f"after {self.status.phase}"
            case actions.RunToEpochEnd():
                per_epoch = (self.run.info.steps_per_epoch if self.run else None) or 100
                end = (status.step // per_epoch + 1) * per_epoch
                self._status(state="running", run_to=end)
                return f"running to step {end}"
            case actions.Throttle(rate):
                self._status(throttle=rate)
                return f"at most {rate:g} steps/s" if rate else "full speed"
            case actions.AddBreakpoint(condition):
                number = len(status.breakpoints) + 1
                added = messages.Breakpoint(number, condition)
                self._status(breakpoints=(*status.breakpoints, added))
                return f"breakpoint {number}: {condition}"
            case actions.ChangeBreakpoint(number, enabled, ignore):
                given = {"enabled": enabled, "ignore": ignore}
                fields = {name: value for name, value in given.items() if value is not None}
                changed = [
                    msgspec.structs.replace(each, **fields) if each.number == number else each
                    for each in status.breakpoints
                ]
                self._status(breakpoints=tuple(changed))
            case actions.DeleteBreakpoint(number):
                left = [each for each in status.breakpoints if each.number != number]
                self._status(breakpoints=tuple(left))
            case actions.ChangeSettings(changes):
                self._notice("edit", "; ".join(change.text for change in changes), status.step)
            case actions.Stop(checkpoint):
                self.end("stopped", "stopped by you", "checkpoint written" if checkpoint else "")
                return "stopping"
        return "done"

    # ------------------------------------------------------------ what a step brings

    def _apply(self, table: int, first: int, last: int) -> None:
        assert self.run is not None
        steps = self.run.steps[table]
        low, high = int(np.searchsorted(steps, first)), int(np.searchsorted(steps, last + 1))
        if high > low:
            values = np.ascontiguousarray(self.run.values[table][low:high], np.float32)
            rows = Rows(table, low, high - low, steps[low:high].tobytes(), values.tobytes())
            self.history.apply(rows)

    def _happenings(self, step: int) -> None:
        run = self.run
        assert run is not None
        clip = run.values[run.table(schema.CLIP)][step - 1]
        if clip[3] < 1:
            norms = run.values[run.table(schema.GRAD_NORM)][step - 1].astype(float) ** 2
            shares = norms / norms.sum()
            top = np.argsort(shares)[::-1][:3]
            self.events.append(
                Clip(
                    id=len(self.events),
                    step=step,
                    time=self._time(step),
                    max_norm=MAX_NORM,
                    norm_before=float(clip[1]),
                    scale=float(clip[3]),
                    parameters=tuple(int(i) for i in top),
                    shares=tuple(float(shares[i]) for i in top),
                )
            )
        loss = run.values[run.table(schema.STEP)][step - 1][0]
        if not np.isfinite(loss):
            name = run.info.parameters[3].name
            kind = "nan" if np.isnan(loss) else "inf"
            self.events.append(
                NonFinite(len(self.events), step, self._time(step), "loss", name, kind)
            )
        if step % 100 == 0:
            self._notice("evaluation", f"validation loss {float(self._validation(step)):.4f}", step)
            self._say("stdout", f"step {step}: val loss {float(self._validation(step)):.4f}", step)
            if run.info.task == "vit":
                self.artifacts += [self._images(step), self._confusion(step)]
            else:
                text = f"def forward(self, x):\n    return self.head(x)  # step {step}\n" * 3
                self.artifacts.append(TextSample(len(self.artifacts), step, "The ", text))
            self.artifacts = self.artifacts[-20:]

    def _validation(self, step: int) -> float:
        assert self.run is not None
        return float(self.run.values[self.run.table(schema.VALIDATION)][step // 100 - 1][0])

    def _images(self, step: int) -> ImageSample:
        random = np.random.default_rng(step)
        ramp = np.linspace(0, 255, 8)[None, :, None] * np.ones((8, 1, 3))
        shift = random.integers(0, 8, 12)
        pixels = np.stack([np.roll(ramp, int(s), axis=1) for s in shift]).astype(np.uint8)
        truths = tuple(str(d) for d in random.integers(0, 10, 12))
        predictions = tuple(t if i % 5 else str((int(t) + 3) % 10) for i, t in enumerate(truths))
        confidences = tuple(float(c) for c in random.uniform(0.4, 1.0, 12))
        return ImageSample(
            len(self.artifacts), step, 8, 8, pixels.tobytes(), predictions, confidences, truths
        )

    def _confusion(self, step: int) -> ConfusionMatrix:
        counts = np.random.default_rng(step).integers(0, 3, (10, 10)) + 30 * np.eye(10, dtype=int)
        labels = tuple(str(digit) for digit in range(10))
        table = tuple(tuple(int(count) for count in row) for row in counts)
        return ConfusionMatrix(len(self.artifacts) + 1, step, labels, table)

    def _make_report(self, phase: str) -> PhaseReport:
        run = self.run
        assert run is not None
        step = self.status.step + (0 if phase == "step" else 1)
        at = min(step, len(run.steps[0])) - 1
        loss, rate, norm, *_ = (float(v) for v in run.values[run.table(schema.STEP)][at])
        clip = run.values[run.table(schema.CLIP)][at]
        count = len(run.info.parameters)
        summary, quantities, table = {
            "data": ("a batch of 12 × 64 tokens", [("inputs", "int64 [12, 64]", "")], None),
            "zero_grad": (f"gradients of {count} parameters set to None", [], None),
            "forward": ("logits of 12 × 64 × 96", [("logits", "float32 [12, 64, 96]", "")], None),
            "loss": (f"cross-entropy {loss:.4f}", [("loss", loss, "")], None),
            "backward": (
                f"gradients of {count} parameters, total norm {norm:.3f}",
                [("total norm", norm, ""), ("largest", "blocks.0.mlp.up.weight", "")],
                schema.GRAD_NORM,
            ),
            "clip": (
                f"norm {norm:.3f} → {float(clip[2]):.3f}, threshold {MAX_NORM:g}",
                [
                    ("before", norm, ""),
                    ("after", float(clip[2]), ""),
                    ("scale", float(clip[3]), ""),
                ],
                schema.CLIP,
            ),
            "step": (
                f"AdamW moved {count} parameters, learning rate {rate:.2e}",
                [("learning rate", rate, ""), ("largest update ratio", 1.4e-3, "")],
                schema.UPDATE_RATIO,
            ),
        }[phase]
        rows: tuple[Rows, ...] = ()
        if table is not None and table != schema.UPDATE_RATIO:
            index = run.table(table)
            values = np.ascontiguousarray(run.values[index][at : at + 1], np.float32)
            rows = (Rows(index, at, 1, np.array([step], np.int64).tobytes(), values.tobytes()),)
        duration = float(run.values[run.table(schema.PHASE_MS)][at][PHASES.index(phase)])
        named = tuple(Quantity(*quantity) for quantity in quantities)
        return PhaseReport(step, phase, duration, summary, named, rows)

    def _status(self, **changes: object) -> None:
        run = self.run
        assert run is not None
        status = msgspec.structs.replace(self.status, **changes)
        total = run.info.total_steps or 0
        clipped = run.values[run.table(schema.CLIP)][max(0, status.step - 100) : status.step, 3] < 1
        self.status = msgspec.structs.replace(
            status,
            epoch=status.step / (run.info.steps_per_epoch or 1),
            steps_per_second=1000 / STEP_MS,
            items_per_second=1000 / STEP_MS * (run.info.items_per_step or 1),
            elapsed_s=status.step * STEP_MS / 1000,
            remaining_s=(total - status.step) * STEP_MS / 1000,
            cost_share=0.0072,
            clipped_share=float(clipped.mean()) if len(clipped) else None,
        )

    def _notice(self, kind: str, text: str, step: int = 0, level: str = "info") -> None:
        self.events.append(Notice(len(self.events), step, self._time(step), kind, text, level))

    def _say(self, stream: str, text: str, step: int = 0) -> None:
        self.log.append(LogLine(len(self.log), self._time(step), step, stream, text))

    def _time(self, step: int) -> float:
        return STARTED_AT + step * STEP_MS / 1000

    def _changed(self) -> None:
        self._version += 1
        if self._arrival is not None:
            self._arrival()


def fake_gpt(steps: int = 300, total_steps: int = 2000) -> FakeSession:
    """A GPT of 27 parameters and 4 attention layers after `steps` steps."""
    return FakeSession(synthesise(describe(total_steps=total_steps)), steps)


def fake_vit(steps: int = 300, total_steps: int = 2000) -> FakeSession:
    """A ViT, with images, accuracy and a confusion matrix."""
    return FakeSession(synthesise(describe(total_steps=total_steps, task="vit")), steps)


def fake_empty() -> FakeSession:
    """Nothing has arrived but that torch is being imported."""
    return FakeSession(None)


def fake_one_point() -> FakeSession:
    """One step was made."""
    return fake_gpt(steps=1)


def fake_non_finite(steps: int = 300) -> FakeSession:
    """The loss becomes NaN at step 201, infinite at 203, and is well again; so do the gradients."""
    run = synthesise(describe())
    for name in (schema.STEP, schema.GRAD_NORM, schema.CLIP, schema.ATTENTION):
        values = run.values[run.table(name)]
        values[200:202, :3] = np.nan
        values[202, :3] = np.inf
    return FakeSession(run, steps)


def fake_extremes(steps: int = 300) -> FakeSession:
    """Losses of 1e30 that fall to 1e-30, and gradients alike."""
    run = synthesise(describe())
    fall = np.geomspace(1e30, 1e-30, len(run.steps[0])).astype(np.float32)[:, None]
    for name in (schema.STEP, schema.GRAD_NORM, schema.CLIP):
        values = run.values[run.table(name)]
        values[:] = fall[: len(values)]
    return FakeSession(run, steps)


def fake_two_optimizers(steps: int = 300) -> FakeSession:
    """A GAN, say: `sgd` and `adam`, each with its own loss and parameters."""
    run = synthesise(describe())
    tables_of_adam = []
    for name in (schema.STEP, schema.GRAD_NORM):
        first = run.info.tables[run.table(name)]
        columns = first.columns
        if name == schema.GRAD_NORM:
            columns = tuple(replace_name(column, f"generator.{column.name}") for column in columns)
        number = len(run.info.tables) + len(tables_of_adam)
        tables_of_adam.append(
            msgspec.structs.replace(first, id=number, columns=columns, optimizer="adam")
        )
        run.steps.append(run.steps[first.id])
        run.values.append(run.values[first.id] * np.float32(0.5))
    run.info = msgspec.structs.replace(
        run.info, tables=(*run.info.tables, *tables_of_adam), optimizers=("sgd", "adam")
    )
    return FakeSession(run, steps)


def fake_two_transformers(steps: int = 300, layers: int = 3) -> FakeSession:
    """A GAN of two transformers: `adam` has `layers` attention layers of its own, with half the
    values of the first ones of `AdamW`."""
    run = synthesise(describe())
    own: list[Table] = []
    names = tuple(f"generator.blocks.{layer}.attention" for layer in range(layers))
    for name, statistics in STATISTICS.items():
        first = run.info.tables[run.table(name)]
        if name == schema.ATTENTION_HEADS:
            columns = schema.head_columns(tuple((layer, 4) for layer in names))
        else:
            columns = schema.attention_columns(names, statistics)
        number = len(run.info.tables) + len(own)
        own.append(msgspec.structs.replace(first, id=number, columns=columns, optimizer="adam"))
        run.steps.append(run.steps[first.id])
        run.values.append(run.values[first.id][:, : len(columns)] * np.float32(0.5))
    attention = tuple(
        msgspec.structs.replace(layer, layer=name)
        for layer, name in zip(run.info.attention, names, strict=False)
    )
    run.info = msgspec.structs.replace(
        run.info,
        tables=(*run.info.tables, *own),
        attention=(*run.info.attention, *attention),
        optimizers=("AdamW", "adam"),
    )
    return FakeSession(run, steps)


def fake_logging(steps: int = 300) -> FakeSession:
    """A script that logs two values, the second at every tenth step."""
    run = synthesise(describe(task="script"))
    number = len(run.info.tables)
    columns = (Column("val/accuracy", "", "higher"), Column("temperature"))
    table = Table(number, schema.LOGGED, columns, every=0)
    every = np.arange(1, len(run.steps[0]) + 1)
    values = np.full((len(every), 2), absent(Absent.NOT_MEASURED), np.float32)
    values[:, 0] = 1 - np.exp(-every / 200)
    values[9::10, 1] = 1 / every[9::10]
    run.steps.append(every)
    run.values.append(values)
    run.info = msgspec.structs.replace(run.info, tables=(*run.info.tables, table))
    return FakeSession(run, steps)


def replace_name(column: Column, name: str) -> Column:
    """The column under another name."""
    return msgspec.structs.replace(column, name=name)


def fake_large(parameters: int = 10_000, steps: int = 60) -> FakeSession:
    """A model of `parameters` tensors (and a sixth as many attention layers)."""
    layers = max(1, (parameters - 3) // 6)
    return FakeSession(synthesise(describe(layers, total_steps=200)), steps)
