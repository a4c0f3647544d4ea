"""The statistics of attention layers: what each means, what is healthy, where its values are."""

from __future__ import annotations

from dataclasses import dataclass

from tui_trainer.history.layers import STATISTICS as COLUMNS
from tui_trainer.history.layers import Place, place_of
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.series_chart import Series

MATRICES = ("q", "k", "v")
PAIRS = ("qk", "qv", "kv")
STYLES = {"q": "q", "k": "k", "v": "v", "qk": "v", "qv": "k", "kv": "q", "": "norm"}
"""Wq, Wk and Wv have the same colours everywhere; a pair has that of the one that it lacks."""


@dataclass(frozen=True)
class Statistic:
    """One quantity of every attention layer, for q, k, v, for their pairs, or for the layer."""

    key: str
    title: str
    table: str
    parts: tuple[str, ...]
    means: str
    healthy: str
    signed: bool = False

    def column(self, part: str) -> str:
        """Name of the column within its layer's."""
        return f"{self.key}_{part}" if part else self.key

    def index(self, part: str) -> int:
        """Its number among a layer's columns."""
        return COLUMNS[self.table].index(self.column(part))

    def place(self, snapshot: Snapshot, layer: AttentionInfo) -> Place | None:
        """Where a layer is: in the table of the optimizer that trains it."""
        return place_of(snapshot.history, self.table, layer.layer)

    def series(self, layer: AttentionInfo, place: Place) -> list[Series]:
        """Its curves for one layer, less those of pairs whose comparison has no meaning."""
        return [
            Series(part, STYLES[part], place.columns[self.index(part)])
            for part in self.parts
            if layer.comparable(part)
        ]


STATISTICS = (
    Statistic(
        "drift", "drift", tables.ATTENTION, MATRICES,
        "‖W−W₀‖/‖W₀‖: how far each matrix has moved from its initialisation",
        "rises fast, then levels off; q and k alike, v slower",
    ),
    Statistic(
        "cos", "cosine", tables.ATTENTION, PAIRS,
        "⟨Wa,Wb⟩/(‖Wa‖‖Wb‖): 1 the same direction, 0 unrelated, as at a random start",
        "near 0; q and k may align slowly, a jump is worth a look", True,
    ),
    Statistic(
        "distance", "distance", tables.ATTENTION, PAIRS,
        "‖Wa−Wb‖/√(‖Wa‖²+‖Wb‖²): 1 for unrelated matrices, 0 for equal ones",
        "near 1; towards 0 two projections do the same work",
    ),
    Statistic(
        "norm", "norm", tables.ATTENTION, MATRICES,
        "‖W‖ (Frobenius): the size of each projection",
        "grows slowly; q and k that run away blow up the logits",
    ),
    Statistic(
        "grad_cos", "∇ cosine", tables.ATTENTION, PAIRS,
        "the cosine between the gradients of two projections: why they part or align",
        "noise around 0; a lasting + moves the two together, a − apart", True,
    ),
    Statistic(
        "growth", "growth", tables.ATTENTION, ("",),
        "‖Wq‖‖Wk‖/‖Wv‖ against the start: early sign of attention logits that blow up",
        "1 to a few; a steep rise comes before entropy collapses",
    ),
    Statistic(
        "sigma_max", "σ max", tables.ATTENTION_SPECTRUM, MATRICES,
        "the largest singular value: the most that the matrix can stretch a vector",
        "grows slowly; a single one that runs away is a spectral spike",
    ),
    Statistic(
        "stable_rank", "stable rank", tables.ATTENTION_SPECTRUM, MATRICES,
        "‖W‖²/σ_max²: how many directions carry the matrix, robust to small ones",
        "falls as structure is learned; near 1 one direction does it all",
    ),
    Statistic(
        "effective_rank", "effective rank", tables.ATTENTION_SPECTRUM, MATRICES,
        "exp(entropy of σ/Σσ), Roy & Vetterli 2007: how many directions are in use",
        "stays a good share of the width; a collapse loses capacity",
    ),
    Statistic(
        "max_logit", "max logit", tables.ATTENTION_HEALTH, ("",),
        "the largest attention logit q·k/√d of a sampled batch",
        "below about 50; beyond it softmax saturates and gradients vanish",
    ),
    Statistic(
        "entropy", "entropy", tables.ATTENTION_HEALTH, ("",),
        "mean entropy of the attention rows in nats: how spread the attention is",
        "above 0 (one token alone), below ln of the context (all alike)",
    ),
    Statistic(
        "cos_qk_activations", "cos(q, k)", tables.ATTENTION_HEALTH, ("",),
        "mean cosine between the queries and keys themselves, not their weights",
        "small; near 1 every query looks at every key alike", True,
    ),
    Statistic(
        "std", "std", tables.ATTENTION, MATRICES,
        "standard deviation of the matrix' entries",
        "starts at the initialisation's and follows the norm",
    ),
    Statistic(
        "mean", "mean", tables.ATTENTION, MATRICES,
        "mean of the matrix' entries",
        "stays near 0: a lasting offset is unusual", True,
    ),
)  # fmt: skip
"""In the order in which the screen offers them."""


def why_nothing(statistic: Statistic, snapshot: Snapshot, optimizer: str = "") -> str:
    """What to say where `statistic` has no values for the layers that `optimizer` trains (as
    `Table.optimizer` names it)."""
    info = snapshot.info
    if info is not None:
        name = optimizer or next(iter(info.optimizers), "")
        for key in (
            statistic.table,
            f"{statistic.table}@{name}",
            statistic.column(statistic.parts[0]),
            "attention",
        ):
            if key in info.unseen:
                return info.unseen[key]
        if snapshot.status.step and not info.attention:
            return "no attention layer was found in this model"
    if snapshot.status.ended:
        return "the run ended before this was measured"
    if snapshot.status.step and statistic.table != tables.ATTENTION:
        return "measured now and then, more often while this is open: a value is on its way"
    return "waiting for the first step"
