"""A run process without torch: the real host, gate, recorder and server over a loop of figures.

python -m tests.runs.fake_host DIRECTORY STEPS SECONDS_PER_STEP
"""

from __future__ import annotations

import math
import os
import sys
import time

import numpy as np

from tests.rows import step_row
from tui_trainer.config.run_spec import read_spec
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import PHASES, schema
from tui_trainer.protocol.schema import Column, ParameterInfo
from tui_trainer.run import host
from tui_trainer.run.host import Host, run_to_end
from tui_trainer.run.outcome import Outcome, outcome_of
from tui_trainer.run.signals import StopHandler

PARAMETERS = tuple(f"blocks.{i}.weight" for i in range(30))


class FakeHost(Host):
    """Makes `steps` steps of `seconds` each; the loss falls as 1/step."""

    def __init__(self, directory: str, steps: int, seconds: float) -> None:
        super().__init__(read_spec(directory))
        assert isinstance(self.stops, StopHandler)
        self.steps, self.seconds = steps, seconds
        self.save_with(self)

    def write(self, step: int, requested: bool = False) -> object:
        """Leave a file, as a checkpoint would."""
        path = os.path.join(self.spec.directory, f"checkpoint-{step}")
        with open(path, "w") as file:
            file.write("weights")
        self.recorder.notice("checkpoint", f"checkpoint of step {step} written", step=step)
        return path

    def train(self) -> Outcome:
        """Everything but torch."""
        recorder = self.recorder
        step = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
        norms = recorder.new_table(schema.GRAD_NORM, [Column(name) for name in PARAMETERS])
        recorder.describe(
            total_steps=self.steps,
            parameters=tuple(ParameterInfo(name, (4, 4), "float32", 16) for name in PARAMETERS),
        )
        try:
            for number in range(1, self.steps + 1):
                time.sleep(self.seconds)
                for phase in PHASES[:-1]:
                    self.gate.reached(phase, number)
                values = step_row(1 / number, 1e-3, math.sqrt(number), 1.0)
                rows = ((step, values), (norms, np.full(len(PARAMETERS), number, np.float32)))
                recorder.record(StepRecord(number, time.time(), "", rows))
                print("step", number, flush=True)
                self.gate.reached(PHASES[-1], number)
        except BaseException as error:
            self.stops.training_ended()
            outcome = outcome_of(error)
            return Outcome("stopped", "stopped on request") if self.stops.requested else outcome
        self.stops.training_ended()
        return Outcome("finished", "all steps are made")


if __name__ == "__main__":
    host.LINGER_S = 240.0  # a viewer on a busy machine takes its time to fetch the end
    sys.exit(run_to_end(FakeHost(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])), None))
