"""Reads total steps, epochs, evaluation results and logged values from Hugging Face's Trainer and
from Lightning, and observes how DeepSpeed clips. This module imports none of them: it patches their
modules once the script has imported them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tui_trainer.run.context import RunContext
from tui_trainer.run.import_hook import after_import
from tui_trainer.run.progress import EPOCHS, TOTAL, Progress
from tui_trainer.trace.module_calls import Patches

if TYPE_CHECKING:
    from tui_trainer.trace.tracer import Tracer

HUGGING_FACE = "transformers.trainer_callback"
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
DEEPSPEED_UTILITIES = "deepspeed.runtime.utils"
DEEPSPEED_ZERO = {
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
}
CONNECTOR = "trainer.connectors.logger_connector.logger_connector"
LOSS_NAMES = ("loss", "loss_epoch", "epoch_loss")
PREFIXES = ("validation", "valid", "val", "eval", "test")
SPEED_METRICS = ("runtime", "per_second", "preparation_time")


def observe_frameworks(run: RunContext, progress: Progress, tracer: Tracer) -> Callable[[], None]:
    """Patch the frameworks that this process has imported or will import. Returns a function that
    removes the patches."""
    patches = Patches()

    def observing(install: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                install()
            except Exception as error:
                run.recorder.fault("observing a framework", error)

        return guarded

    found = _HuggingFace(run, progress, patches)
    ends = [after_import(HUGGING_FACE, observing(found.install))]
    for package in LIGHTNING:
        lightning = _Lightning(run, progress, patches, package)
        ends.append(after_import(f"{package}.trainer.call", observing(lightning.observe_hooks)))
        ends.append(after_import(f"{package}.{CONNECTOR}", observing(lightning.observe_values)))

    deepspeed = _DeepSpeed(run, progress, patches, tracer)
    ends.append(after_import(DEEPSPEED_UTILITIES, observing(deepspeed.observe_clipping)))
    for module, name in DEEPSPEED_ZERO.items():
        ends.append(after_import(module, observing(partial(deepspeed.observe_zero, module, name))))

    def leave() -> None:
        for end in ends:
            end()
        patches.restore()

    return leave


def split_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split metrics into (results of an evaluation, other values), without those of speed.

    `val_loss` and `eval/loss` become the `loss` of an evaluation.
    """
    evaluated: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in metrics.items():
        if any(name.endswith(each) for each in SPEED_METRICS):
            continue
        prefix = next((p for p in PREFIXES if name.startswith((f"{p}_", f"{p}/", f"{p}."))), None)
        if prefix is None:
            others[name] = value
            continue
        rest = name[len(prefix) + 1 :]
        rest = "loss" if rest in LOSS_NAMES else rest
        # Both `val_loss` and `test_loss`: the first keeps the short name.
        evaluated[rest if rest not in evaluated else name] = value
    return evaluated, others


class _Framework:
    """Observes a framework. An error in an observer is reported and never reaches the framework."""

    name = ""

    def __init__(self, run: RunContext, progress: Progress, patches: Patches) -> None:
        self._run = run
        self._progress = progress
        self._patches = patches
        self._reported: tuple[Any, ...] = ()

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:
            self._run.recorder.fault(f"observing {self.name}", error)

    def _report(self, *facts: Any) -> None:
        if facts != self._reported:
            self._reported = facts
            self._progress.report(*facts)


class _HuggingFace(_Framework):
    """`transformers.Trainer`, and trainers derived from it (TRL, sentence-transformers, …)."""

    name = "transformers.Trainer"

    def install(self) -> None:
        handler = sys.modules[HUGGING_FACE].CallbackHandler
        original = handler.call_event

        def call_event(
            handler: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> Any:
            result = original(handler, event, args, state, control, **kwargs)
            self._guarded(self._happened, handler, event, args, state, kwargs)
            return result

        self._patches.replace(handler, "call_event", call_event)

    def _happened(
        self, handler: Any, event: str, args: Any, state: Any, kwargs: Mapping[str, Any]
    ) -> None:
        match event:
            case "on_init_end":
                self._progress.framework_found(self.name)
            case "on_train_begin" | "on_epoch_begin" | "on_step_begin":
                if event != "on_step_begin" or not self._reported:
                    self._progress.framework_found(self.name)
                    self._report_progress(args, state, handler.train_dataloader)
            case "on_evaluate":
                self._log_evaluation(kwargs.get("metrics") or {})
            case "on_log":
                logs = kwargs.get("logs") or {}
                _, others = split_metrics(logs)
                for name in ("epoch", "total_flos"):
                    others.pop(name, None)
                self._progress.scalars.log(others)

    def _report_progress(self, args: Any, state: Any, loader: Any) -> None:
        accumulated = max(1, int(args.gradient_accumulation_steps))
        total = int(state.max_steps) if state.max_steps and state.max_steps > 0 else None
        per_epoch, unseen = None, {}
        try:
            per_epoch = max(1, math.ceil(len(loader) / accumulated))
        except TypeError:
            unseen[EPOCHS] = "the training dataloader has no length"
        if total is None:
            unseen[TOTAL] = f"{self.name} does not know its total steps"
        items = int(args.train_batch_size) * accumulated
        self._report(total, per_epoch, items, unseen)

    def _log_evaluation(self, metrics: Mapping[str, Any]) -> None:
        evaluated, _ = split_metrics(metrics)
        self._progress.validation.log(evaluated, self._run.gate.completed)


class _Lightning(_Framework):
    """`lightning.pytorch.Trainer` or `pytorch_lightning.Trainer`."""

    name = "Lightning"

    def __init__(self, run: RunContext, progress: Progress, patches: Patches, package: str) -> None:
        super().__init__(run, progress, patches)
        self._package = package

    def observe_hooks(self) -> None:
        module = sys.modules[f"{self._package}.trainer.call"]
        original = module._call_callback_hooks

        def call_callback_hooks(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._happened, trainer, hook_name)
            return original(trainer, hook_name, *args, **kwargs)

        self._patches.replace(module, "_call_callback_hooks", call_callback_hooks)

    def observe_values(self) -> None:
        connector = sys.modules[f"{self._package}.{CONNECTOR}"]._LoggerConnector
        original = connector.log_metrics

        def log_metrics(connector: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._logged, metrics)
            return original(connector, metrics, *args, **kwargs)

        self._patches.replace(connector, "log_metrics", log_metrics)

    def _happened(self, trainer: Any, hook: str) -> None:
        if hook == "setup":
            self._progress.framework_found(self.name)
        elif hook in ("on_train_start", "on_train_epoch_start"):
            self._progress.framework_found(self.name)
            self._report_progress(trainer)

    def _report_progress(self, trainer: Any) -> None:
        unseen: dict[str, str] = {}
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        total: int | None = None
        per_epoch: int | None = None
        if not trainer.lightning_module.automatic_optimization:
            why = "optimization is manual: Lightning does not know the number of steps"
            unseen = {TOTAL: why, EPOCHS: why}
        else:
            if math.isfinite(batches):
                per_epoch = math.ceil(batches / accumulated)
            else:
                unseen[EPOCHS] = "the training dataloader has no length"
            steps = trainer.estimated_stepping_batches
            if math.isfinite(steps) and steps > 0:
                total = int(steps)
            else:
                unseen[TOTAL] = "neither max_epochs nor max_steps ends the training"
        size = getattr(trainer.train_dataloader, "batch_size", None)
        items = size * accumulated if isinstance(size, int) else None
        self._report(total, per_epoch, items, unseen)

    def _logged(self, metrics: Mapping[str, Any]) -> None:
        evaluated, others = split_metrics(metrics)
        others.pop("epoch", None)
        if evaluated:
            self._progress.validation.log(evaluated, self._run.gate.completed)
        if others:
            self._progress.scalars.log(others)


class _DeepSpeed(_Framework):
    """DeepSpeed's engine, which clips gradients with its own function. Its ZeRO optimizers clip the
    partitions to which they copy gradients."""

    name = "DeepSpeed"

    def __init__(
        self, run: RunContext, progress: Progress, patches: Patches, tracer: Tracer
    ) -> None:
        super().__init__(run, progress, patches)
        self._tracer = tracer

    def observe_clipping(self) -> None:
        module = sys.modules[DEEPSPEED_UTILITIES]
        observed = self._tracer.observed_clipping(module.clip_grad_norm_)
        self._patches.replace(module, "clip_grad_norm_", observed)

    def observe_zero(self, module: str, name: str) -> None:
        optimizer_class = getattr(sys.modules[module], name)
        original = optimizer_class.unscale_and_clip_grads

        def unscale_and_clip_grads(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._tracer.gradients_rescaled, optimizer.optimizer)
            return original(optimizer, *args, **kwargs)

        self._patches.replace(optimizer_class, "unscale_and_clip_grads", unscale_and_clip_grads)
