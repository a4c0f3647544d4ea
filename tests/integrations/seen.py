"""What is compared with the numbers of each framework: the tests assert it, and docs/scripts.md
shows it as a table."""

from __future__ import annotations

QUANTITIES = {
    "steps": "steps and weights",
    "loss": "loss, clipping",
    "total": "total steps",
    "epoch": "epochs",
    "items": "samples a step",
    "evaluation": "evaluations",
    "logged": "logged values",
    "attention": "attention",
    "ranks": "several processes",
}
"""Quantities, and their titles."""
LENGTH = {"steps", "total", "epoch", "items"}
SEEN = {
    "transformers": ("Hugging Face `Trainer`", {*LENGTH, "loss", "evaluation", "logged"}),
    "accelerate": ("accelerate", {*LENGTH, "loss", "ranks"}),
    "lightning": ("Lightning", {*LENGTH, "loss", "evaluation", "logged"}),
    "peft": ("PEFT: LoRA, DoRA", {"steps", "attention"}),
    "ddp": ("`DistributedDataParallel`", {"steps", "loss", "ranks"}),
    "fsdp2": ("FSDP2: `fully_shard`", {"steps", "loss", "ranks"}),
    "loop": ("a plain loop", {*LENGTH, "loss", "evaluation"}),
    "by hand": ("a loop without an optimizer", {"steps", "loss", "evaluation"}),
}
"""Title of each framework, and the quantities that its tests compare."""


def table() -> str:
    lines = ["| | " + " | ".join(QUANTITIES.values()) + " |", "|---" * (len(QUANTITIES) + 1) + "|"]
    for title, seen in SEEN.values():
        cells = ("✓" if name in seen else "" for name in QUANTITIES)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
