"""Calls of a root model: the forward phase, and evaluations, which are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.guard import Guarded, guarded
from tui_trainer.tracing.interface import RecorderLike
from tui_trainer.tracing.meter import Meter
from tui_trainer.tracing.patching import Patches
from tui_trainer.tracing.phases import FORWARD, LOSS, Phases
from tui_trainer.tracing.probe import Options, Probe
from tui_trainer.tracing.registration import Registry
from tui_trainer.tracing.reports import Reporter
from tui_trainer.tracing.roots import Roots

Original = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class HearsCalls(Guarded):
    """The part of the tracer that hears of a model's calls."""

    def __init__(
        self,
        recorder: RecorderLike,
        gate: Gate,
        probes: list[type[Probe]],
        options: Options,
        reporter: Reporter,
    ) -> None:
        super().__init__(recorder, gate)
        self.reporter = reporter
        self.phases = Phases(gate, reporter.passed)
        self.patches = Patches()
        self._roots = Roots(
            self.patches,
            lambda: self.owner,
            lambda: self.phases.open is not None,
            self._call,
        )
        self.registry = Registry(recorder, self._roots, probes, options)
        self._sampling: list[Meter] = []

    @property
    def roots(self) -> list[torch.nn.Module]:
        """The models that were called from outside, in order of their first call."""
        return self._roots.modules

    def fault(self, where: str, fault: Exception) -> None:
        """See `Guarded`."""
        super().fault(where, fault)
        self.phases.drop()

    def _call(self, original: Original, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """A root is called."""
        if not torch.is_grad_enabled():
            return self._evaluate(original, module, args, kwargs)
        if not self._forward_begins(module, args, kwargs):
            return original(module, *args, **kwargs)
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self._forward_sampled()
            self.phases.fail()
            raise
        self._forward_ends(result)
        return result

    def _evaluate(
        self, original: Original, module: torch.nn.Module, args: Args, kwargs: Kwargs
    ) -> Any:
        if self.phases.open is not None:
            return original(module, *args, **kwargs)
        self._record_what_is_made()
        self.phases.pause_clock()
        try:
            return original(module, *args, **kwargs)
        finally:
            self.phases.go_on()

    @guarded
    def _record_what_is_made(self) -> None:
        """No step comes for a while."""
        self.registry.outbox.drain()

    @guarded
    def _forward_begins(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> bool:
        first = FORWARD not in self.phases.seen
        if not self.phases.enter(FORWARD):
            return False
        if self.gate.armed:
            self.reporter.inputs(args, kwargs)
        self.registry.register_pending()
        self.phases.forwarding(module, args, kwargs)
        if first:
            for meter in self.registry.meters:
                meter.prepare(self.phases.step, self.gate.stops_soon)
                if meter.forward_begins(module):
                    self._sampling.append(meter)
        self.phases.run()
        return True

    @guarded
    def _forward_sampled(self) -> None:
        self._end_sampling()

    def _end_sampling(self) -> None:
        sampling, self._sampling = self._sampling, []
        for meter in sampling:
            meter.forward_ends()

    @guarded
    def _forward_ends(self, result: Any) -> None:
        if self._sampling:
            self._end_sampling()
        if self.gate.armed:
            self.reporter.output(result)
        self.phases.leave(LOSS)
