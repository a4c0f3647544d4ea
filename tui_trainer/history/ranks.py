"""Tables `ranks`, with a row for each step of every training process: makes a row, and compares the
processes (which one is slow in which phase, whose gradients or losses stand out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.history import History
from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import BETWEEN, PHASES, schema
from tui_trainer.protocol.absent import Absent, absent, why_absent
from tui_trainer.protocol.formatting import milliseconds, nonfinite
from tui_trainer.protocol.messages import ProcessAt, Status
from tui_trainer.protocol.schema import ProcessInfo, RunInfo, Table

_SOURCES: dict[str, dict[str, str]] = {
    schema.STEP: {"loss": "loss", "grad_norm_preclip": "grad_norm_preclip", "step_ms": "step_ms"},
    schema.PHASE_MS: {phase: f"phase_ms.{phase}" for phase in (*PHASES, *BETWEEN)},
    schema.MEMORY: {"device_bytes": "device_bytes", "host_bytes": "host_bytes"},
    schema.CLIP: {"scale": "clip_scale"},
    schema.REPLICA: {column.name: column.name for column in schema.REPLICA_COLUMNS},
    schema.REPLICA_SAMPLE: {column.name: column.name for column in schema.REPLICA_SAMPLE_COLUMNS},
}
"""Table → its column → the column in table `ranks`."""


WINDOW = 20
"""Newest steps that times are averaged over."""
MEMORY_WINDOW = 1024
"""Newest steps that are searched for memory, which is measured once a second."""
SLOW_SHARE, SLOW_MS = 0.1, 1.0
"""A process is slow if it needs this share of a step, and this time, more than any other."""
STANDS_OUT = 3.0
"""A gradient norm stands out if it is more than this many times the median of all, or less than the
median divided by it."""
WAITS_S = 1.0
"""A process that has not reached its next phase for this long may be waiting for another."""
MAY_WAIT = ("backward", "clip", "step")
"""Phases that contain collectives of data-parallel trainings: a long one does not mean that the
process is slow."""

_PHASES = [schema.RANK_INDEX[f"phase_ms.{phase}"] for phase in PHASES]


@dataclass
class RankSummary:
    """The present state of one process."""

    process: ProcessInfo
    step: int | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    """Column of `schema.RANK_COLUMNS` → value, None where it is not known. Times are means of the
    last WINDOW steps."""
    at: ProcessAt | None = None
    remarks: list[str] = field(default_factory=list)
    standing_out: set[str] = field(default_factory=set)
    """The columns whose values a remark is about."""

    @property
    def name(self) -> str:
        """`rank 1`, or the name of a child process."""
        return self.process.label or f"rank {self.process.rank}"


def summarize_ranks(info: RunInfo, status: Status, history: History) -> list[RankSummary]:
    """The processes of a run, by rank; empty for a run of one."""
    tables = {table.table.rank: table for table in history.tables_named(schema.RANKS)}
    places = {at.rank: at for at in status.processes}
    found = [
        _summary(process, tables.get(process.rank), places.get(process.rank))
        for process in info.processes
    ]
    together = [each for each in found if not each.process.label and each.step is not None]
    _remark_endings(found)
    _remark_losses(found)
    _remark_slowest(together)
    _remark_gradients(together)
    if not status.ended:
        _remark_waiting(together)
    return found


def skew_ms(ranks: Sequence[RankSummary]) -> float | None:
    """Milliseconds from the first process's end of a step to the last one's."""
    lags = [lag for each in ranks if (lag := each.values.get("lag_ms")) is not None]
    return max(lags) - min(lags) if len(lags) > 1 else None


def _summary(process: ProcessInfo, table: SeriesReader | None, at: ProcessAt | None) -> RankSummary:
    made = RankSummary(process, at=at)
    if table is None or not table.rows:
        return made
    steps, measured = table.tail(MEMORY_WINDOW)
    rows = measured[-WINDOW:]
    made.step = int(steps[-1])
    names = [column.name for column in table.table.columns]
    timed = [name.endswith("_ms") or name.startswith("phase_ms.") for name in names]
    for index, name in enumerate(names):
        column = rows[:, index]
        value = _mean(column) if timed[index] else float(column[-1])
        if name.endswith("_bytes") and not math.isfinite(value):
            value = _newest(measured[:, index])
        made.values[name] = None if why_absent(value) is not None else value
    return made


def _mean(column: NDArray[np.float32]) -> float:
    finite = column[np.isfinite(column)]
    return float(np.mean(finite, dtype=np.float64)) if len(finite) else float(column[-1])


def _newest(column: NDArray[np.float32]) -> float:
    finite = column[np.isfinite(column)]
    return float(finite[-1] if len(finite) else column[-1])


def _remark_endings(ranks: Sequence[RankSummary]) -> None:
    for each in ranks:
        if each.process.state in ("killed", "crashed", "lost"):
            each.remarks.append(each.process.reason or each.process.state)
        elif each.process.state == "waiting":
            each.remarks.append("has not joined the run")


def _remark_losses(ranks: Sequence[RankSummary]) -> None:
    for each in ranks:
        for name, what in (("loss", "loss"), ("grad_norm_preclip", "gradient")):
            value = each.values.get(name)
            if value is not None and not math.isfinite(value):
                each.remarks.append(f"{what} is {nonfinite(value)}")


def _remark_slowest(ranks: Sequence[RankSummary]) -> None:
    """Remark on the first phase without collectives in which one process is slow: the others wait
    in a later phase."""
    if len(ranks) < 2:
        return
    step_ms = np.median([each.values.get("step_ms") or 0.0 for each in ranks])
    for phase in PHASES:
        times = [each.values.get(f"phase_ms.{phase}") or 0.0 for each in ranks]
        order = np.argsort(times)
        more = times[order[-1]] - times[order[-2]]
        if phase not in MAY_WAIT and more > max(SLOW_MS, SLOW_SHARE * float(step_ms)):
            slow = ranks[int(order[-1])]
            slow.remarks.append(f"slow in {phase}, +{milliseconds(more, 0)}")
            slow.standing_out.add(f"phase_ms.{phase}")
            return


def _remark_gradients(ranks: Sequence[RankSummary]) -> None:
    norms = [each.values.get("grad_norm_preclip") for each in ranks]
    known = [norm if norm is not None and math.isfinite(norm) else None for norm in norms]
    finite = [norm for norm in known if norm is not None]
    if len(finite) < 2:
        return
    # With two processes, the smaller norm is the reference.
    middle = float(np.median(finite)) if len(finite) > 2 else min(finite)
    for each, norm in zip(ranks, known, strict=True):
        if norm is None:
            continue
        if middle > 0 and norm > STANDS_OUT * middle:
            each.remarks.append(f"gradient {norm / middle:.2g} times the others'")
        elif len(finite) > 2 and norm * STANDS_OUT < middle:
            each.remarks.append(f"gradient {norm / middle:.2g} of the others'")
        else:
            continue
        each.standing_out.add("grad_norm_preclip")


def _remark_waiting(ranks: Sequence[RankSummary]) -> None:
    """Remark on processes that are ahead of another one and do not proceed."""
    there = [(each, each.at) for each in ranks if each.at is not None and each.at.phase]
    if len(there) < 2:
        return
    places = [(at.step, PHASES.index(at.phase)) for _, at in there if at.phase]
    last = int(np.argmin([step * len(PHASES) + phase for step, phase in places]))
    for (each, at), place in zip(there, places, strict=True):
        if place > places[last] and at.for_s > WAITS_S and not at.held:
            each.remarks.append(f"waits for {there[last][0].name}")


def rank_row(tables: tuple[Table, ...], record: StepRecord) -> Floats:
    """The row of one step of any process, without its lag."""
    row = np.full(len(schema.RANK_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
    for number, values in record.rows:
        table = tables[number]
        source = _SOURCES.get(table.name)
        if source is None:
            continue
        for column, value in zip(table.columns, values, strict=True):
            if column.name in source:
                row[schema.RANK_INDEX[source[column.name]]] = value
    if record.clip is not None and record.clip.kind == "hand":
        # A script that averages gradients itself changes them without clipping.
        row[schema.RANK_INDEX["clip_scale"]] = absent(Absent.NOT_MEASURED)
    if record.batch is not None:
        inputs = [each.checksum for each in record.batch.tensors if each.role == "input"]
        row[schema.RANK_INDEX["batch_checksum"]] = hash(tuple(inputs)) & 0xFFFFFF
    return row
