"""The pages of `tui-trainer learn`, in the order in which they are best read."""

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
"""Names of the pages. The text of each is in `pages/en` and `pages/fr`, and the experiment that
measures its numbers in `experiments/`."""

PAGE_OF_PHASE: dict[Phase, str] = {
    "zero_grad": "accumulation",
    "forward": "loss-graph",
    "loss": "loss-graph",
    "backward": "gradient",
    "clip": "clipping",
    "step": "updates",
}
"""The page about what happens in a phase, offered first while a run is paused there."""


class UnknownPage(UserError):
    """No page has this name."""


def find_page(name: str) -> str:
    """The name of a page, given with any case and with `_` for `-`. Raises UnknownPage."""
    found = name.strip().lower().replace("_", "-")
    if found not in PAGES:
        raise UnknownPage(f"there is no page {name}", did_you_mean(found, PAGES))
    return found
