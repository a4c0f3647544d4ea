"""The pages of `tui-trainer learn` in reading order, and the pages that explain each phase and
rule. `ui/lessons.py` has the pages about each screen."""

from __future__ import annotations

from tui_trainer.config.errors import did_you_mean
from tui_trainer.protocol import Phase
from tui_trainer.protocol.errors import UserError

PAGES = (
    "scalar-tensor",
    "loss-graph",
    "gradient",
    "accumulation",
    "forward-backward",
    "param-groups",
    "updates",
    "clipping",
    "device",
    "qkv",
    "attention-scores",
    "residual-stream",
    "vit-arithmetic",
)
"""Names of the pages. The text of each is in `pages/en` and `pages/fr`, and a module of the same
name in `measurements/` measures its numbers."""

PAGE_OF_PHASE: dict[Phase, str] = {
    "zero_grad": "accumulation",
    "forward": "loss-graph",
    "loss": "loss-graph",
    "backward": "gradient",
    "clip": "clipping",
    "step": "updates",
}
"""The page about each phase, offered first while a run is paused after it."""


PAGE_OF_RULE = {
    "gradients-kept": "accumulation",
    "zeroed-before-step": "accumulation",
    "backward-twice": "accumulation",
    "no-gradients": "gradient",
    "mostly-frozen": "gradient",
    "zero-gradients": "gradient",
    "gradients-vanish": "gradient",
    "never-reached": "loss-graph",
    "memory-growth": "loss-graph",
    "not-in-optimizer": "param-groups",
    "part-not-updated": "param-groups",
    "part-updated-too-much": "param-groups",
    "learning-rate-zero": "updates",
    "update-ratio-high": "updates",
    "update-ratio-low": "updates",
    "updates-small": "updates",
    "no-warm-up": "updates",
    "weights-shrink": "updates",
    "loss-diverges": "forward-backward",
    "loss-oscillates": "forward-backward",
    "no-progress": "forward-backward",
    "loss-plateau": "forward-backward",
    "gradients-explode": "clipping",
    "overflow-ahead": "clipping",
    "always-clipped": "clipping",
    "clipped-to-nothing": "clipping",
    "clips-alone": "clipping",
    "attention-logits": "attention-scores",
    "attention-entropy": "attention-scores",
}
"""The page that explains the subject of each rule of the findings."""


class UnknownPage(UserError):
    """No page has this name."""


def find_page(name: str) -> str:
    """The name of a page, from a name in any case and with `_` or `-`. Raises UnknownPage."""
    found = name.strip().lower().replace("_", "-")
    if found not in PAGES:
        raise UnknownPage(f"there is no page {name}", did_you_mean(found, PAGES))
    return found
