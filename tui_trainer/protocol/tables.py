"""Names, columns and meanings of the tables: the one place that says what is measured.

Gradients are those *before* clipping and after un-scaling. ‖·‖ is the Frobenius (2-) norm.
"""

from __future__ import annotations

from tui_trainer.protocol import PHASES
from tui_trainer.protocol.describe import Column

STEP = "step"
CLIP = "clip"
PHASE_MS = "phase_ms"
GRAD_NORM = "grad_norm"
WEIGHT_NORM = "weight_norm"
UPDATE_RATIO = "update_ratio"
VALIDATION = "validation"
MEMORY = "memory"
OVERHEAD = "overhead_ms"
ATTENTION = "attention"
ATTENTION_SPECTRUM = "attention_spectrum"
ATTENTION_HEALTH = "attention_health"
ATTENTION_HEADS = "attention_heads"

TABLE_NAMES = (
    STEP,
    CLIP,
    PHASE_MS,
    GRAD_NORM,
    WEIGHT_NORM,
    UPDATE_RATIO,
    VALIDATION,
    MEMORY,
    OVERHEAD,
    ATTENTION,
    ATTENTION_SPECTRUM,
    ATTENTION_HEALTH,
    ATTENTION_HEADS,
)

STEP_COLUMNS = (
    Column("loss", "", "lower"),
    Column("learning_rate"),
    Column("grad_norm_preclip"),  # √Σ‖gᵢ‖² over the optimizer's parameters
    Column("step_ms", "ms", "lower"),  # wall clock, from the end of the previous step to this one's
)

CLIP_COLUMNS = (
    Column("max_norm"),  # the threshold: max_norm, or clip_value for clipping by value
    Column("norm_before"),
    Column("norm_after"),
    Column("scale"),  # min(1, max_norm / (norm_before + 1e-6)); by value: norm_after / norm_before
)

PHASE_COLUMNS = tuple(Column(phase, "ms", "lower") for phase in PHASES)

MEMORY_COLUMNS = (
    Column("device_bytes", "bytes"),  # allocated on the accelerator; NaN on the CPU
    Column("device_peak_bytes", "bytes"),
    Column("host_bytes", "bytes"),  # resident set of the training process
)

ATTENTION_STATISTICS = (
    *("norm_q", "norm_k", "norm_v"),  # ‖W‖
    *("mean_q", "mean_k", "mean_v"),
    *("std_q", "std_k", "std_v"),
    *("cos_qk", "cos_qv", "cos_kv"),  # ⟨Wa,Wb⟩ / (‖Wa‖‖Wb‖)
    *("distance_qk", "distance_qv", "distance_kv"),  # ‖Wa−Wb‖ / √(‖Wa‖²+‖Wb‖²): 1 at random start
    *("drift_q", "drift_k", "drift_v"),  # ‖W−W₀‖ / ‖W₀‖
    *("grad_cos_qk", "grad_cos_qv", "grad_cos_kv"),  # the same cosines between gradients
    "growth",  # (‖Wq‖‖Wk‖/‖Wv‖) against the same at the start: early sign of logit blow-up
)
"""Per layer, each step. The columns of table `attention` are these for layer 0, then layer 1, …"""

SPECTRUM_STATISTICS = (
    *("sigma_max_q", "sigma_max_k", "sigma_max_v"),  # largest singular value
    *("stable_rank_q", "stable_rank_k", "stable_rank_v"),  # ‖W‖² / σ_max²
    *("effective_rank_q", "effective_rank_k", "effective_rank_v"),  # exp of the entropy of σ/Σσ
)
"""Per layer, on a slower cadence (Roy & Vetterli 2007 for the effective rank)."""

HEALTH_STATISTICS = ("max_logit", "entropy", "cos_qk_activations")
"""Per layer, sampled: largest attention logit, mean entropy of the attention rows in nats, mean
cosine between queries and keys."""

HEAD_STATISTICS = (
    *("norm_q", "norm_k", "norm_v"),
    *("cos_qk", "cos_qv", "cos_kv"),
    *("drift_q", "drift_k", "drift_v"),
)
"""Per layer and head while a viewer watches topic `attention_heads`; columns ordered layer, head,
statistic. With grouped queries, query head h is compared with the key/value head it shares."""


def attention_columns(layers: tuple[str, ...], statistics: tuple[str, ...]) -> tuple[Column, ...]:
    """Columns of an attention table: `layer.statistic`, every statistic of layer 0 first."""
    return tuple(Column(f"{layer}.{name}") for layer in layers for name in statistics)


def head_columns(layers: tuple[tuple[str, int], ...]) -> tuple[Column, ...]:
    """Columns of table `attention_heads` for (layer, number of heads) pairs."""
    return tuple(
        Column(f"{layer}.{head}.{name}")
        for layer, heads in layers
        for head in range(heads)
        for name in HEAD_STATISTICS
    )
