"""Runs a task's evaluations between its steps, on the training thread, and records the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from tui_trainer.protocol.schema import VALIDATION, Better, Column
from tui_trainer.record.recorder import Recorder
from tui_trainer.tasks.definition import Evaluation

BETTER: dict[str, Better] = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}
"""The direction in which a metric improves."""


class Evaluations:
    """The evaluations of a task; those due after the same step fill one row of `validation`."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        recorder: Recorder,
        on_loss: Callable[[int, float], None],
    ) -> None:
        """`on_loss(step, loss)` is called after each evaluation that measures a loss."""
        self._evaluations = evaluations
        self._recorder = recorder
        self._on_loss = on_loss
        self._tables: dict[tuple[str, ...], int] = {}
        self._last_step: dict[str, int] = {}

    @property
    def cadences(self) -> tuple[int, ...]:
        """In steps: when to call `after_step`."""
        return tuple(evaluation.every for evaluation in self._evaluations)

    def before_first_step(self) -> None:
        self._run([each for each in self._evaluations if each.at_start], 0)

    def after_step(self, step: int) -> None:
        due = [each for each in self._evaluations if each.every and step % each.every == 0]
        self._run(due, step)

    def after_last_step(self, step: int) -> None:
        """Run the evaluations that have not seen the final weights."""
        due = [each for each in self._evaluations if self._last_step.get(each.name) != step]
        self._run(due, step)

    def _run(self, due: list[Evaluation], step: int) -> None:
        if not due:
            return
        metrics: dict[str, float] = {}
        with self._recorder.excluded():
            for evaluation in due:
                self._last_step[evaluation.name] = step
                self._recorder.set_status(waiting_for=f"evaluating: {evaluation.name}")
                started = time.perf_counter()
                try:
                    measured, artifacts = evaluation.run()
                except Exception as error:
                    self._recorder.fault(f"evaluation {evaluation.name}", error)
                    continue
                metrics.update(measured)
                for artifact in artifacts:
                    self._recorder.artifact(msgspec.structs.replace(artifact, step=step))
                self._log(evaluation.name, measured, step, time.perf_counter() - started)
        self._recorder.set_status(waiting_for="")
        if metrics:
            self._record(metrics, step)

    def _record(self, metrics: Mapping[str, float], step: int) -> None:
        names = tuple(metrics)
        if names not in self._tables:
            columns = tuple(Column(name, "", BETTER.get(name, "")) for name in names)
            self._tables[names] = self._recorder.new_table(VALIDATION, columns, every=0)
        values = np.array([metrics[name] for name in names], np.float32)
        self._recorder.row(self._tables[names], step, values)
        if "loss" in metrics:
            self._on_loss(step, metrics["loss"])

    def _log(self, name: str, metrics: Mapping[str, float], step: int, took_s: float) -> None:
        listed = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        text = f"{name}: {listed}" if listed else name
        self._recorder.notice("evaluation", f"{text} ({took_s:.2g} s)", step=step)
