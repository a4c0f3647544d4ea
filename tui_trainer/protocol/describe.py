"""The static description of a run: what is trained, on what, and which quantities are measured.

A description is discovered piece by piece (the parameters are known only once the first optimizer
steps), so `RunInfo.revision` grows with every change and viewers are sent it again when theirs is
old.
"""

from __future__ import annotations

import msgspec

Scalar = str | int | float | bool | None


class ParameterInfo(msgspec.Struct, frozen=True):
    """One parameter tensor, in the order in which every per-parameter table lists its columns."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    optimizer: str = ""
    """Name of the optimizer that updates it; "" when none does."""
    trainable: bool = True


class AttentionInfo(msgspec.Struct, frozen=True):
    """One attention layer, in the order in which the attention tables list their columns."""

    layer: str
    """Module path, such as `blocks.0.attention`."""
    kind: str
    """`separate`, `fused`, `grouped` (K and V smaller than Q) or `multihead`
    (nn.MultiheadAttention)."""
    query: str
    key: str
    value: str
    """Names of the parameters that hold Wq, Wk, Wv: three times the same one when fused."""
    heads: int | None = None
    key_value_heads: int | None = None
    head_dim: int | None = None
    note: str = ""
    """What cannot be compared or seen in this layer, and why; "" when everything can."""
    incomparable: tuple[str, ...] = ()
    """The pairs (`qk`, `qv`, `kv`) that `note` is about: their statistics are NaN."""

    def comparable(self, part: str) -> bool:
        """Whether a NaN of this part (`q`, `qk`, …; "" for the layer) was measured: false for a
        pair whose comparison has no meaning."""
        if self.note and not self.incomparable:  # recorded before the pairs were told
            return part not in ("qk", "qv")
        return part not in self.incomparable


class Column(msgspec.Struct, frozen=True):
    """One series of a table, declared before its first value arrives."""

    name: str
    unit: str = ""
    """`ms`, `bytes`, `nats`, `tokens/s`, …; "" for a pure number."""
    better: str = ""
    """`lower`, `higher`, or "" where neither is better."""


class Table(msgspec.Struct, frozen=True):
    """A set of series that are measured together, so that they share one column of step numbers.

    A table has rows only for the steps at which it was measured: a NaN in it is a measured NaN (or
    a comparison that has no meaning, said in `AttentionInfo`), never a missing value.
    """

    id: int
    """Dense, from 0, in order of declaration."""
    name: str
    """One of `tables.TABLE_NAMES`."""
    columns: tuple[Column, ...]
    every: int = 1
    """Its cadence now: measured every so many steps. 0: on request or by the clock. It changes
    while the run goes on, told by `Update.cadences`."""
    optimizer: str = ""
    """Set when a run has several optimizers and each has its own such table."""
    natural: int = 0
    """Its cadence while nothing is stretched to stay within the budget; of what is measured only
    while somebody watches: its cadence then. 0: not known, or by the clock."""

    @property
    def stretched(self) -> bool:
        """Whether it is measured less often now than it naturally would be."""
        return self.every > self.natural > 0


class DeviceInfo(msgspec.Struct, frozen=True):
    """The device that trains."""

    kind: str
    """`cpu`, `cuda`, `mps`, `xpu`, …"""
    name: str
    memory_bytes: int | None = None
    threads: int | None = None
    """torch's intra-op threads."""


class SourceInfo(msgspec.Struct, frozen=True):
    """The version of the code in the working directory, as git knows it."""

    commit: str
    dirty: bool | None = None
    """Whether tracked files differ from the commit; None: git did not say in time."""
    branch: str = ""
    """"" when no branch is checked out."""


class RunInfo(msgspec.Struct, frozen=True):
    """What there is to know of a run besides its measurements."""

    name: str
    task: str
    """`gpt`, `vit`, a third party's task, or `script`."""
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
    """What the task wants said of its data: characters, vocabulary, images, batches per epoch, …"""
    device: DeviceInfo | None = None
    parameters: tuple[ParameterInfo, ...] = ()
    attention: tuple[AttentionInfo, ...] = ()
    tables: tuple[Table, ...] = ()
    optimizers: tuple[str, ...] = ()
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    items_per_step: int | None = None
    item_unit: str = "items"
    """`tokens`, `images`, `samples`: what speed is counted in."""
    unseen: dict[str, str] = {}
    """Panel or quantity name to the reason why it cannot be seen in this run (`clip`: "this script
    never clips"); `quantity@optimizer` where others of several optimizers show it. The panel shows
    the reason in place of its values."""
    working_directory: str = ""
    """Where the command was given."""
    source: SourceInfo | None = None
    """The code's version, once git has said it; None outside of a git working tree."""
    parent: str = ""
    """Directory of the run that this one goes on from: the history of runs is a tree."""
    branch_step: int | None = None
    """The parent's step that this run went on from: its own first step is the one after."""
    budget: float = 0.0
    """Share of step time that measuring may take; 0: as much as it takes."""

    def with_cadences(self, cadences: tuple[int, ...]) -> RunInfo:
        """The same with these `Table.every`, by table id; this very object where they are known."""
        if len(cadences) != len(self.tables):
            return self
        pairs = list(zip(self.tables, cadences, strict=True))
        if all(table.every == every for table, every in pairs):
            return self
        changed = (msgspec.structs.replace(table, every=every) for table, every in pairs)
        return msgspec.structs.replace(self, tables=tuple(changed))
