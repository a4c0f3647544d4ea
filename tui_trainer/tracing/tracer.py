"""The tracer: turns a plain PyTorch loop into phases, from outside.

Attached, it hears of every `zero_grad`, call of the model, `backward`, clipping and `step` on the
training thread, and makes of them the phases data → zero_grad → forward → loss → backward → clip →
step, in whatever order and number a script has them. Rules:

* One optimizer step is one step, whichever optimizer makes it: a GAN's two networks take turns.
* Evaluations (without gradients) are no phase.
* A step for which a GradScaler does not call the optimizer is no step: the next batch belongs to
  the same one. An optimizer that heeds `found_inf` itself (PyTorch's fused ones) is called all the
  same and leaves the weights as they are: that is a step. Both are announced as skipped.
* What a step's loss is, is said in `making.py`; where one phase ends and the next begins, in
  `phases.py`.

Nothing here may ever change or stop the training: see `guard.py`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.hearing import Hearing
from tui_trainer.tracing.hooks import install
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.meter import Meter
from tui_trainer.tracing.probe import Options, Probe
from tui_trainer.tracing.reports import Reporter


class Tracer(Hearing):
    """Watches the training that happens on the thread that attaches it.

    `probes` are the classes of `tui_trainer.probes.PROBES`, or any others.
    """

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: Sequence[type[Probe]],
        options: Options | None = None,
    ) -> None:
        reporter = Reporter(weakref.ref(self))
        super().__init__(recorder, gate, list(probes), options or Options(), reporter)
        self._thread = 0
        self._handles: list[Any] = []

    # ------------------------------------------------------------ life

    def attach(self) -> None:
        """Listen, on the calling thread. Attach before a script is imported: a function that it
        takes from torch by `from … import` is then already ours."""
        if self._thread:
            return
        self._thread = self.owner = threading.get_ident()
        self._handles = install(self, self.patches)
        self._roots.discover()
        self.gate.on_stop_here = self.reporter.make
        self.gate.working = self.suspended
        self.gate.before_work = self._flush_in_gate
        reference = weakref.ref(self)
        # A forked DataLoader worker has a copy of us, and of our thread's identity.
        os.register_at_fork(after_in_child=lambda: _silence(reference()))

    def detach(self) -> None:
        """Put back everything exactly as it was, and record what is still under way."""
        if not self._thread:
            return
        self.owner = self._thread = 0
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._roots.forget()
        self.patches.restore()
        self.flush()

    def __enter__(self) -> Tracer:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Around work that is not training (evaluations, checkpoints): nothing is seen or timed."""
        owner, self.owner = self.owner, 0
        with self.phases.aside():
            try:
                yield
            finally:
                self.owner = owner

    def record_meanwhile(self) -> None:
        """For another thread, many times a second: record the steps that were made, where the
        training thread makes no further one for a while."""
        try:
            with torch.no_grad():
                self.registry.outbox.drain_meanwhile()
        except Exception as fault:
            self.fault("recording", fault)

    def flush(self) -> None:
        """Record every step already made, waiting for its values if need be."""
        try:
            with torch.no_grad():
                self.registry.outbox.drain(everything=True)
        except Exception as fault:
            self.fault("flush", fault)

    def _flush_in_gate(self) -> None:
        """`flush`, its time counted as our own, as the rest of what is done in the gate is not."""
        began = perf_counter()
        self.flush()
        self.own_s += perf_counter() - began

    def expect(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take `model` as it is now for the start of its training, before its weights are set to
        those of a checkpoint: drift counts from here."""
        try:
            self._roots.adopt(model)
            for optimizer in optimizers:
                self.registry.meter_for(optimizer)
        except Exception as fault:
            self.fault("expect", fault)

    # ------------------------------------------------------------ where it is

    @property
    def step(self) -> int:
        """The optimizer step in the making; set before attaching to go on from a checkpoint."""
        return self.phases.step

    @step.setter
    def step(self, step: int) -> None:
        self.phases.step = step

    @property
    def losses(self) -> list[torch.Tensor]:
        """Losses of the step in the making (0-d each)."""
        return self.making.losses

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Only while stopped."""
        return self.phases.duration_ms(phase)

    def gradient_scale(self, meter: Meter) -> float:
        """The factor that a GradScaler still has on this optimizer's gradients. Waits for it."""
        scale = self.scaling.gradient_scale(self.registry.optimizer_of(meter))
        return float(scale) if scale is not None else 1.0


def _silence(tracer: Tracer | None) -> None:
    if tracer is not None:
        tracer.owner = 0
        tracer.registry.outbox.forget_parent()
