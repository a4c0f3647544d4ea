"""What the rules cost: the same training with and without them, in turn, in one process.

    .venv/bin/python benchmarks/findings/cost.py [--blocks 30] [--steps 20]

nanoGPT's CPU shape (4 layers, 4 heads, width 128, block 64, batch 12) on one thread. Three tracers
take turns: without the rules, the probes that only they need and what a re-run of a step needs;
with them; and with the outputs of all modules watched (`--watch-nonfinite`). Time is the CPU time
of the whole process, so that the recorder's thread counts and other load counts little. A spike of
the gradient norm, which this training has now and then, arms the watching of outputs for a while:
blocks in which the second tracer was armed are left out of its figures, and their share is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import begin, finish

from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.inspector.checked_rerun import CheckedRerun
from tui_trainer.inspector.inspector import Inspector
from tui_trainer.probes import PROBES, RULE_PROBES
from tui_trainer.probes.nonfinite import OutputSums
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.step_measurer import StepMeasurer
from tui_trainer.trace.tracer import Tracer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Milliseconds of CPU time a step."""
    began = time.process_time()
    for _ in range(steps):
        tokens = torch.randint(0, 65, (12, 65))
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (time.process_time() - began) * 1e3 / steps


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--blocks", type=int, default=30)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    begin()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(vocabulary=65, block_size=64, layers=4, heads=4, width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    plain = tuple(probe for probe in PROBES if probe not in RULE_PROBES)
    variants: dict[str, Tracer] = {}
    for name, probes, judged, watched in (
        ("without rules", plain, False, False),
        ("rules", PROBES, True, False),
        ("rules, outputs watched", PROBES, True, True),
    ):
        recorder = Recorder(RunInfo(name="benchmark", task="gpt"))
        if judged:
            recorder.evaluate_with(FindingsEngine())
        tracer = Tracer(
            recorder, Gate(), probes, ProbeOptions(budget=0.01, watch_nonfinite=watched)
        )
        inspector = Inspector(tracer)
        if judged:
            inspector.capture.checked = tracer.origins.rerun = CheckedRerun(tracer, 3)
        with tracer:
            train(model, optimizer, 20)
        variants[name] = tracer
    taken: dict[str, list[float]] = {name: [] for name in variants}
    armed: list[bool] = []
    for block in range(chosen.blocks):
        order = list(variants)
        for name in order if block % 2 else reversed(order):
            with variants[name] as tracer:
                taken[name].append(train(model, optimizer, chosen.steps))
                tracer.flush()
                if name == "rules":
                    armed.append(any(map(_is_armed, tracer.registry.measurers)))
    first = taken["without rules"]
    measured = []
    for name, times in taken.items():
        pairs = zip(times, first, armed, strict=True)
        ratios = sorted(a / b for a, b, was in pairs if not (was and name == "rules"))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(set(ratios)) > 1 else (1, 1, 1)
        print(
            f"{name:<24} {statistics.median(times):7.2f} ms  {middle:.4f}× ({low:.3f}–{high:.3f})"
        )
        measured.append({"name": name, "ms": statistics.median(times), "ratio": middle})
    print(f"outputs were watched for a while in {sum(armed)} of {len(armed)} blocks of `rules`")
    finish(chosen.json, {"variants": measured, "armed_blocks": sum(armed)})


def _is_armed(measurer: StepMeasurer) -> bool:
    """Whether outputs are watched now."""
    outputs = measurer.probes.named(OutputSums.name)
    return isinstance(outputs, OutputSums) and outputs.armed


if __name__ == "__main__":
    main()
