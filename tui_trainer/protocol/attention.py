"""The examination of an attention layer of a live run: the request and the answer."""

from __future__ import annotations

from typing import Literal

import msgspec

from tui_trainer.protocol.heat_map import HeatMap, HeatMapWindow

ContributionKind = Literal["start", "attention", "head", "bias", "module", "readout"]
"""`readout`: the biases of the final norm and of the head, which only the logit has."""

MAX_POSITIONS = 16_384
"""Maximum number of keys, and of queries, whose values are sent one by one: the first ones."""
PAIRS = ("qk", "qv", "kv")
PARTS = ("q", "k", "v")


class ExamineAttention(msgspec.Struct, tag="examine_attention", frozen=True):
    """Asks what a layer attends to, for one example of the current batch. The run re-runs the
    forward pass."""

    layer: str = ""
    """Path of the layer; "": the first one."""
    head: int = 0
    query: int | None = None
    """None: the last position."""
    sample: int = 0
    """Number of the example in the batch."""
    window: HeatMapWindow | None = None
    """The part of the map, and the size that it is reduced to; None: no map."""
    weights: bool = False
    """Whether to compare Wq, Wk and Wv of every head."""
    residual: bool = False
    """Whether to decompose the residual stream."""


class QueryRow(msgspec.Struct, frozen=True, array_like=True):
    """One query with every key, as arrays of float32 of shape (keys,)."""

    products: bytes
    """q · k"""
    angles: bytes
    """Angles between q and k, in degrees."""
    scores: bytes
    """Input of the softmax: q · k times the scale, plus any bias; nan at masked keys."""
    weights: bytes
    """softmax of the scores; 0 at masked keys."""


class HeadAttention(msgspec.Struct, frozen=True, array_like=True):
    """Statistics of the attention of one head."""

    entropy: float
    """Entropy of the query's weights, in nats."""
    mean_entropy: float
    """Mean of the entropies of all queries, in nats."""
    largest: float
    """Largest weight of the query."""
    key: int
    """The key with the largest weight."""


class HeadWeights(msgspec.Struct, frozen=True, array_like=True):
    """Wq, Wk and Wv of one head, each (head_dim, width). nan where two cannot be compared."""

    cosines: tuple[float, float, float]
    """⟨Wa, Wb⟩ / (‖Wa‖ ‖Wb‖) of qk, qv and kv."""
    distances: tuple[float, float, float]
    """‖Wa − Wb‖ / √(‖Wa‖² + ‖Wb‖²)"""
    angles: tuple[float, float, float]
    """Mean of the principal angles between their row spaces, in degrees."""
    largest: tuple[float, float, float]
    """Largest singular value of Wq, Wk and Wv."""
    stable_ranks: tuple[float, float, float]
    """‖W‖² / σ_max²"""


class HeadSpectra(msgspec.Struct, frozen=True, array_like=True):
    """Singular values and principal angles of one head."""

    singular: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Singular values of Wq, Wk and Wv, descending."""
    angles: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Between the row spaces of qk, qv and kv, in degrees, ascending."""


class Contribution(msgspec.Struct, frozen=True, array_like=True):
    """One summand of the residual stream at the query's position."""

    name: str
    kind: ContributionKind
    norm: float
    """2-norm; nan of the `readout`."""
    cosine: float
    """Cosine with the stream before the final norm."""
    logit: float
    """Direct effect on the logit; nan where it is not known."""
    head: int = -1
    """Number of the head, whose part is also in the attention that follows; -1: not a head."""


class ResidualStream(msgspec.Struct, frozen=True, array_like=True):
    """The stream before the final norm as the sum of what was added to it."""

    contributions: tuple[Contribution, ...]
    """Contributions in order. Heads and biases come before the attention that they sum to."""
    norm: float
    """Norm of the stream."""
    difference: float
    """‖Σ contributions − stream‖ / ‖stream‖, over all positions that are kept."""
    position: int
    """Position of the stream: that of the query, or the one that the model reads out; -1: the mean
    over all positions, if the model reads that out."""
    target: int = -1
    """Number of the token or class of the logit; -1: none."""
    correct: bool = True
    """Whether `target` is the target of the loss; otherwise the largest logit."""
    logit: float = float("nan")
    """Logit of the target, as the model computed it."""
    logit_difference: float = float("nan")
    """|Σ direct effects − logit|"""
    target_name: str = ""
    no_logit: str = ""
    """Why there is no effect on a logit."""
    notes: tuple[str, ...] = ()


class ExampleImage(msgspec.Struct, frozen=True, array_like=True):
    """The image that the patches come from, scaled to the range of its values."""

    width: int
    height: int
    pixels: bytes
    """RGB, row by row."""


class PatchGrid(msgspec.Struct, frozen=True, array_like=True):
    """How the patches of an image became positions."""

    rows: int
    columns: int
    first: int
    """Position of the first patch, after class tokens and the like."""
    picture: ExampleImage | None = None


class AttentionExamination(msgspec.Struct, tag="attention", frozen=True, array_like=True):
    """The answer to `ExamineAttention`."""

    layer: str
    layers: tuple[str, ...]
    """Every attention layer of the model."""
    head: int
    heads: int
    sample: int
    samples: int
    query: int
    queries: int
    keys: int
    head_dim: int
    scale: float
    """Factor of q · k in the scores; nan if something is added as well, such as a bias."""
    missing: str = ""
    """Why Q and K are not known; there is no map then."""
    how: str = ""
    """What computed the attention."""
    checked: str = ""
    """What the map was compared with."""
    deviation: float = 0.0
    """Largest difference from `checked`, relative to its largest value."""
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """Labels of the keys; empty: their numbers."""
    grid: PatchGrid | None = None
    map: HeatMap | None = None
    row: QueryRow | None = None
    entropies: bytes = b""
    """Entropies of the head, for each query: float32 of shape (queries,), in nats."""
    by_head: tuple[HeadAttention, ...] = ()
    weights: tuple[HeadWeights, ...] = ()
    no_weights: str = ""
    """Why the heads' weights cannot be compared."""
    spectra: HeadSpectra | None = None
    residual: ResidualStream | None = None
    no_residual: str = ""
    """Why the residual stream cannot be decomposed."""
