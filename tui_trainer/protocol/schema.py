"""The static description of a run, and the names, columns and meanings of its tables.

The description is discovered piece by piece (the parameters are known once the first optimizer
steps). Every change raises `RunInfo.revision`, and a viewer with an older revision is sent the
description again.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tui_trainer.protocol import BETWEEN, PHASES

Scalar = str | int | float | bool | None
AttentionKind = Literal["separate", "fused", "grouped", "multihead"]
"""How a layer holds Wq, Wk and Wv: `grouped` means K and V smaller than Q, `multihead` an
nn.MultiheadAttention."""
DeviceKind = Literal["cpu", "cuda", "mps", "xpu", "other", ""]
"""A type of device as torch names it; `other` for any further one, "" when it is not known."""
Better = Literal["lower", "higher", ""]
"""The direction in which a series improves; "" where neither is better."""
SCRIPT = "script"
"""The task of a run that trains a user's own script."""
ProcessState = Literal["waiting", "running", "finished", "stopped", "crashed", "killed", "lost"]
"""`waiting`: the process has not connected yet; `killed`: its connection ended without a message;
`lost`: the same on another machine, where the process may still be training."""


class ParameterInfo(msgspec.Struct, frozen=True):
    """One parameter tensor, in the order in which every per-parameter table lists its columns."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    optimizer: str = ""
    """Name of the optimizer that updates the parameter; "" when none does."""
    trainable: bool = True
    sharded: bool = False
    """Whether each process has only a shard: norms are then those of rank 0's shard."""


class AttentionInfo(msgspec.Struct, frozen=True):
    """One attention layer, in the order in which the attention tables list their columns."""

    layer: str
    """Module path, such as `blocks.0.attention`."""
    kind: AttentionKind
    query: str
    key: str
    value: str
    """Names of the parameters that hold Wq, Wk, Wv: three times the same name when fused."""
    heads: int | None = None
    key_value_heads: int | None = None
    head_dim: int | None = None
    note: str = ""
    """What cannot be compared or measured in this layer, and why; "" when everything can."""
    incomparable: tuple[str, ...] = ()
    """The pairs (`qk`, `qv`, `kv`) that cannot be compared: their statistics are nan."""

    def comparable(self, part: str) -> bool:
        """Whether `part` (`q`, `qk`, …; "" for the layer) can be measured at all, so that its nan
        is a measured nan."""
        return part not in self.incomparable


class Column(msgspec.Struct, frozen=True):
    """One series of a table, declared before its first value arrives."""

    name: str
    unit: str = ""
    """`ms`, `bytes`, `nats`, `tokens/s`, …; "" for a pure number."""
    better: Better = ""


class Table(msgspec.Struct, frozen=True):
    """A set of series that are measured together, so that they share one column of step numbers.

    A table has rows only for the steps at which it was measured. A nan is a measured nan, or a
    comparison without a meaning (see `AttentionInfo`).
    """

    id: int
    """Dense, from 0, in order of declaration."""
    name: str
    """One of TABLE_NAMES."""
    columns: tuple[Column, ...]
    every: int = 1
    """Current cadence in steps; 0: on request or by the clock. It changes during the run, see
    `Update.cadences`."""
    optimizer: str = ""
    """Key of the optimizer, if a run has several and each has its own table of this name."""
    natural: int = 0
    """Cadence while the overhead is within the budget; for a table that is measured only while it
    is watched, the cadence while it is watched. 0: unknown, or by the clock."""
    rank: int | None = None
    """The process that measured a table `ranks`; None: the recording one."""

    @property
    def stretched(self) -> bool:
        """Whether the table is measured less often to stay within the overhead budget."""
        return self.every > self.natural > 0


class DeviceInfo(msgspec.Struct, frozen=True):
    """The device that trains."""

    kind: DeviceKind
    name: str
    """Name of the processor or the GPU; for any other device, its type in torch."""
    memory_bytes: int | None = None
    threads: int | None = None
    """torch's intra-op threads."""


class SourceInfo(msgspec.Struct, frozen=True):
    """The version of the code in the working directory, as git knows it."""

    commit: str
    dirty: bool | None = None
    """Whether tracked files differ from the commit; None: unknown."""
    branch: str = ""
    """"" when no branch is checked out."""


class ProcessInfo(msgspec.Struct, frozen=True):
    """One of the training processes of a run with several."""

    rank: int
    """Rank in the process group; child processes of a script are numbered from 1."""
    label: str = ""
    """Name of a child process; "" for a rank."""
    pid: int = 0
    state: ProcessState = "waiting"
    reason: str = ""
    """How the process ended."""
    host: str = ""
    """The machine that the process runs on; "" for rank 0's."""


class RunInfo(msgspec.Struct, frozen=True):
    """The description of a run: everything that is known of it except its measurements."""

    name: str
    task: str
    """`gpt`, `vit`, a third party's task, or SCRIPT."""
    title: str = ""
    """One line for the header, such as `gpt · nanogpt-cpu` or `train.py --fast`."""
    revision: int = 0
    command: tuple[str, ...] = ()
    directory: str = ""
    host: str = ""
    pid: int = 0
    started_at: float = 0.0
    """Seconds since the epoch."""
    versions: dict[str, str] = {}
    configuration: dict[str, Scalar] = {}
    facts: dict[str, Scalar] = {}
    """Facts of the task about its data: characters, vocabulary, images, batches per epoch, …"""
    device: DeviceInfo | None = None
    parameters: tuple[ParameterInfo, ...] = ()
    attention: tuple[AttentionInfo, ...] = ()
    tables: tuple[Table, ...] = ()
    optimizers: tuple[str, ...] = ()
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    items_per_step: int | None = None
    item_unit: str = "items"
    """`tokens`, `images`, `samples`: the unit of throughput."""
    unseen: dict[str, str] = {}
    """Name of a panel or quantity → the reason why this run lacks it (`clip`: "this script never
    clips"), shown in place of its values; `quantity@optimizer` where another optimizer of the run
    has it."""
    working_directory: str = ""
    """The working directory of the command."""
    source: SourceInfo | None = None
    """None outside of a git working tree."""
    parent: str = ""
    """Directory of the run that this run continues: the history of runs is a tree."""
    branch_step: int | None = None
    """The parent's step that this run continues from; its own first step is the next one."""
    budget: float = 0.0
    """Share of step time that measuring may take; 0: unlimited."""
    processes: tuple[ProcessInfo, ...] = ()
    """The training processes of a distributed run, by rank."""

    @property
    def is_script(self) -> bool:
        """Whether the run trains a user's own script."""
        return self.task == SCRIPT

    def with_cadences(self, cadences: tuple[int, ...]) -> RunInfo:
        """A copy with `cadences` as `Table.every`, by table id; the same object if unchanged."""
        if len(cadences) != len(self.tables):
            return self
        pairs = list(zip(self.tables, cadences, strict=True))
        if all(table.every == every for table, every in pairs):
            return self
        changed = (msgspec.structs.replace(table, every=every) for table, every in pairs)
        return msgspec.structs.replace(self, tables=tuple(changed))


# ---------------------------------------------------------------- tables

# Gradients are those *before* clipping and after unscaling. ‖·‖ is the Frobenius (2-) norm.

STEP = "step"
CLIP = "clip"
PHASE_MS = "phase_ms"
GRAD_NORM = "grad_norm"
WEIGHT_NORM = "weight_norm"
UPDATE_RATIO = "update_ratio"
HEALTHY_UPDATE_RATIO = 1e-4, 1e-1
"""The range outside of which an update ratio is coloured and reported."""
SMALLEST_CLIP_SCALE = 0.01
"""Clipping with a smaller factor leaves almost nothing of the gradients."""
FIRST_NORMS = 20
"""Number of first total gradient norms with whose median later norms are compared."""
EXPLODING_NORM = 100.0
"""Multiple of that median above which gradients count as exploding."""
VALIDATION = "validation"
LOGGED = "logged"
MEMORY = "memory"
OVERHEAD = "overhead_ms"
ATTENTION = "attention"
ATTENTION_SPECTRUM = "attention_spectrum"
ATTENTION_HEALTH = "attention_health"
ATTENTION_HEADS = "attention_heads"
RANKS = "ranks"
REPLICA = "replica"
REPLICA_SAMPLE = "replica_sample"

TABLE_NAMES = (
    STEP,
    CLIP,
    PHASE_MS,
    GRAD_NORM,
    WEIGHT_NORM,
    UPDATE_RATIO,
    VALIDATION,
    LOGGED,
    MEMORY,
    OVERHEAD,
    ATTENTION,
    ATTENTION_SPECTRUM,
    ATTENTION_HEALTH,
    ATTENTION_HEADS,
    RANKS,
    REPLICA,
    REPLICA_SAMPLE,
)

STEP_COLUMNS = (
    Column("loss", "", "lower"),
    Column("learning_rate"),
    Column("grad_norm_preclip"),  # √Σ‖gᵢ‖² over the optimizer's parameters
    Column("step_ms", "ms", "lower"),  # wall clock, from the end of the previous step to this one's
    Column("evaluations"),  # calls of the optimizer's closure
)

STEP_INDEX = {column.name: index for index, column in enumerate(STEP_COLUMNS)}
"""Position of each column in a row of table `step`."""

CLIP_COLUMNS = (
    Column("max_norm"),  # the threshold: max_norm, or clip_value for clipping by value
    Column("norm_before"),
    Column("norm_after"),
    Column("scale"),  # min(1, max_norm / (norm_before + 1e-6)); by value: norm_after / norm_before
    Column("gradient_scale"),  # loss scale still on the gradients, and on both norms
)

PHASE_COLUMNS = tuple(Column(name, "ms", "lower") for name in (*PHASES, *BETWEEN))
"""The columns of a row add up to the step's `step_ms`."""

MEMORY_COLUMNS = (
    Column("device_bytes", "bytes"),  # allocated on the accelerator; nan on the CPU
    Column("device_peak_bytes", "bytes"),
    Column("host_bytes", "bytes"),  # resident set of the training process
)

REPLICA_COLUMNS = (
    Column("checksum_high"),  # of the bits of all weights: the upper and lower 24 bits of 48
    Column("checksum_low"),
)

REPLICA_SAMPLE_COLUMNS = (
    Column("sample_high"),  # the same of some elements, before the update
    Column("sample_low"),
)

RANK_COLUMNS = (
    Column("loss", "", "lower"),
    Column("grad_norm_preclip"),
    Column("step_ms", "ms", "lower"),
    Column("lag_ms", "ms"),  # end of the step relative to that of rank 0; negative: earlier
    *(Column(f"phase_ms.{phase}", "ms", "lower") for phase in (*PHASES, *BETWEEN)),
    Column("device_bytes", "bytes"),
    Column("host_bytes", "bytes"),
    *REPLICA_COLUMNS,
    *REPLICA_SAMPLE_COLUMNS,
    Column("clip_scale"),  # as in table `clip`
    Column("batch_checksum"),  # of the bits of its inputs, 24 bits
)
"""Columns of the tables `ranks`, one for each process of a distributed run."""

RANK_INDEX = {column.name: index for index, column in enumerate(RANK_COLUMNS)}

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
