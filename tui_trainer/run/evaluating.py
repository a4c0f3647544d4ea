"""Running a task's evaluations on their cadence, between steps, on the training thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from tui_trainer.protocol.describe import Column
from tui_trainer.protocol.tables import VALIDATION
from tui_trainer.recording.recorder import Recorder
from tui_trainer.tasks.definition import Evaluation

_BETTER = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}


class Evaluations:
    """Those that are due at one step make one row of table `validation`."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        recorder: Recorder,
        on_loss: Callable[[int, float], None],
    ) -> None:
        self._evaluations = evaluations
        self._recorder = recorder
        self._on_loss = on_loss
        self._tables: dict[tuple[str, ...], int] = {}
        self._last: dict[str, int] = {}

    def at_start(self, step: int) -> None:
        """Before the first step."""
        self._run([one for one in self._evaluations if one.at_start], step)

    @property
    def cadences(self) -> tuple[int, ...]:
        """Multiples of which steps end with `between_steps`."""
        return tuple(one.every for one in self._evaluations)

    def between_steps(self, step: int) -> None:
        """On the cadence of each."""
        self._run([one for one in self._evaluations if one.every and step % one.every == 0], step)

    def at_end(self, step: int) -> None:
        """Those that have not seen the weights as they are now."""
        self._run([one for one in self._evaluations if self._last.get(one.name) != step], step)

    def _run(self, due: list[Evaluation], step: int) -> None:
        if not due:
            return
        metrics: dict[str, float] = {}
        with self._recorder.aside():
            for evaluation in due:
                self._last[evaluation.name] = step
                self._recorder.status(waiting_for=f"evaluating: {evaluation.name}")
                began = time.perf_counter()
                try:
                    found, artifacts = evaluation.run()
                except Exception as fault:
                    self._recorder.fault(f"evaluation {evaluation.name}", fault)
                    continue
                metrics.update(found)
                for artifact in artifacts:
                    self._recorder.artifact(msgspec.structs.replace(artifact, step=step))
                self._say(evaluation.name, found, step, time.perf_counter() - began)
        self._recorder.status(waiting_for="")
        if metrics:
            self._record(metrics, step)

    def _record(self, metrics: Mapping[str, float], step: int) -> None:
        names = tuple(metrics)
        if names not in self._tables:
            columns = tuple(Column(name, "", _BETTER.get(name, "")) for name in names)
            self._tables[names] = self._recorder.new_table(VALIDATION, columns, every=0)
        values = np.array([metrics[name] for name in names], np.float32)
        self._recorder.row(self._tables[names], step, values)
        if "loss" in metrics:
            self._on_loss(step, metrics["loss"])

    def _say(self, name: str, metrics: Mapping[str, float], step: int, took_s: float) -> None:
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        text = f"{name}: {said}" if said else name
        self._recorder.notice("evaluation", f"{text} ({took_s:.2g} s)", step=step)
