"""The first step and quantity at which two recorded runs differ.

Tables are compared column by column at the steps that both runs measured. A long table is compared
from a coarse level of its buckets down to its rows, so that a run of a million steps is not read as
a whole. Where the two tables have different steps, blocks of rows are merged by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.history import History
from tui_trainer.history.records import Floats
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.absent import Absent, absent, absent_mask, why_absent
from tui_trainer.protocol.formatting import counted, milliseconds, nonfinite

MAX_VALUES = 4_000_000
"""Maximum number of values read from one table of each run; of a longer table, buckets are read."""
BLOCK_VALUES = 500_000
"""Values compared at once."""
PROBES = 32
"""Blocks read from tables that have different steps and are too long to be merged."""
PROBE_ROWS = 64
AROUND = 2
"""Steps shown before and after the first difference."""

StepPart = Phase | Literal["evaluation", "log"]
ORDER: tuple[StepPart, ...] = (*PHASES, "evaluation", "log")
"""Order in which the quantities of one step become known."""


@dataclass(frozen=True)
class FirstDifference:
    """The first difference of two runs."""

    step: int
    phase: StepPart
    """Where in the step the quantity becomes known."""
    quantity: str
    """Name in words, such as `gradient norm of blocks.0.attention.W_query`."""
    table: str
    column: str
    values: tuple[float, float]
    equal_until: int | None
    """The last earlier step at which both runs measured the quantity; None if there is none."""
    others: int
    """Further quantities that differ at the same step."""
    around: tuple[tuple[int, float, float], ...]
    """Step and values of the quantity in both runs, at the nearest steps that both measured."""

    def short_texts(self, x: float, y: float) -> tuple[str, str]:
        """Both values for a narrow column, with as many digits as it takes to distinguish them;
        `none` for one that is absent."""
        if x == y or not (math.isfinite(x) and math.isfinite(y)) or self.table == schema.PHASE_MS:
            return _short(x), _short(y)
        for digits in range(3, 9):
            a, b = f"{x:.{digits}g}", f"{y:.{digits}g}"
            if a != b:
                break
        return a, b

    def text_of(self, value: float) -> str:
        """The value with every digit of a float32, or why there is none."""
        if self.table == schema.PHASE_MS:
            return milliseconds(value, 0) if math.isfinite(value) else "no such phase"
        if (why := why_absent(value)) is not None:
            return why.reason
        return str(np.float32(value)) if math.isfinite(value) else nonfinite(value)


@dataclass(frozen=True)
class RunsCompared:
    """The first difference of two runs, and the extent of the comparison."""

    first: FirstDifference | None
    """None: no difference was found."""
    steps: int
    """Steps of which both runs have a loss, or else any measurement."""
    quantities: int
    only_in: tuple[tuple[str, ...], tuple[str, ...]]
    """Tables that only one of the runs has measured."""
    group: int = 1
    """Rows per bucket where a table was too long to be read as a whole. Only the lowest, highest
    and last value of a bucket are compared, so a difference that changes none of them is missed."""

    def title(self, a: str, b: str, tolerance: float) -> str:
        """`calm and eager first differ at step 12, in backward: gradient norm of head.weight`"""
        if self.first is not None:
            where = f"at step {self.first.step:,}, in {self.first.phase}"
            return f"{a} and {b} first differ {where}: {self.first.quantity}"
        if not self.quantities or not self.steps:
            return f"{a} and {b} measured nothing at a common step"
        beyond = f" by more than {tolerance:g}" if tolerance else ""
        return f"{a} and {b} do not differ{beyond} in {counted(self.steps, 'step')}"

    def notes(self, a: str, b: str) -> list[str]:
        """Notes on the result, one sentence a line."""
        notes = []
        first = self.first
        if first is not None and first.others:
            more = counted(first.others, "further quantity", "further quantities")
            verb = "differs" if first.others == 1 else "differ"
            notes.append(f"{more} {verb} at step {first.step:,}")
        if first is not None and (first.equal_until or first.step) < first.step - 1:
            notes.append(
                f"both runs measured it at step {first.equal_until:,}, and at no step between"
            )
        for name, tables in zip((a, b), self.only_in, strict=True):
            if tables:
                notes.append(f"only {name} measured {', '.join(tables)}")
        if self.group > 1:
            notes.append(
                f"of long tables, the lowest, highest and last value of every {self.group:,} rows "
                "were compared"
            )
        return notes


def first_difference(a: History, b: History, tolerance: float = 0.0) -> RunsCompared:
    """Compare two runs. With a `tolerance` t, values differ where |x − y| > t·max(|x|, |y|). Values
    of parameters and layers may differ by a further 10⁻³·t of the largest value of the row, since a
    gradient that should be zero is rounding noise. Two nan are equal."""
    pairs = sorted(_pairs(a, b, tolerance), key=lambda pair: pair.columns)
    found: list[_Hit] = []
    limit: int | None = None
    for pair in pairs:
        hit = pair.search(limit)
        if hit is not None:
            found.append(hit)
            limit = hit.step if limit is None else min(limit, hit.step)
    hits = [hit for hit in found if hit.step == limit]
    first = _describe(hits) if hits else None
    if first is not None and ORDER.index(first.phase) > ORDER.index("clip"):
        first = _clipped_in_one(a, b, first) or first
    return RunsCompared(
        first,
        max((pair.common_steps for pair in pairs), default=0),
        sum(pair.columns for pair in pairs),
        (_only_in(a, b), _only_in(b, a)),
        max((pair.group for pair in pairs), default=1),
    )


# ---------------------------------------------------------------- what is compared

COMPARED_COLUMNS = {
    schema.STEP: ("loss", "learning_rate", "grad_norm_preclip", "evaluations"),
    schema.RANKS: ("loss", "grad_norm_preclip"),
    schema.PHASE_MS: PHASES,
}
"""Compared columns of tables that also hold durations and memory, which always differ."""
NOT_COMPARED = (schema.OVERHEAD, schema.MEMORY, schema.REPLICA)
ROW_SCALED = (
    schema.GRAD_NORM,
    schema.WEIGHT_NORM,
    schema.UPDATE_RATIO,
    schema.ATTENTION,
    schema.ATTENTION_HEADS,
)
"""Tables whose values are also compared with the largest value of their row."""


def _pairs(a: History, b: History, tolerance: float) -> Iterator[_TablePair]:
    """Pairs of tables of the same name, optimizer and rank, with at least one common column."""
    for one in _measured(a):
        for other in _measured(b):
            if _key(one) == _key(other):
                pair = _TablePair(one, other, tolerance)
                if pair.columns:
                    yield pair


def _measured(history: History) -> list[SeriesReader]:
    return [
        series
        for series in history.tables.values()
        if series.rows and series.table.name not in NOT_COMPARED
    ]


def _key(series: SeriesReader) -> tuple[str, str, int | None]:
    return series.table.name, series.table.optimizer, series.table.rank


def _only_in(a: History, b: History) -> tuple[str, ...]:
    others = {_key(series) for series in _measured(b)}
    names = (series.table.name for series in _measured(a) if _key(series) not in others)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class _Hit:
    """A row in which two tables differ."""

    pair: _TablePair
    step: int
    differs: NDArray[np.bool_]
    """(columns,)"""
    values: tuple[Floats, Floats]


class _NotAlignedError(Exception):
    """The buckets of two levels cover different steps."""


class _TablePair:
    """One table of two runs: the columns that both have."""

    def __init__(self, a: SeriesReader, b: SeriesReader, tolerance: float) -> None:
        self.a, self.b = a, b
        self.name = a.table.name
        self._tolerance = tolerance
        places = {column.name: index for index, column in enumerate(b.table.columns)}
        wanted = COMPARED_COLUMNS.get(self.name)
        self.names = [
            column.name
            for column in a.table.columns
            if column.name in places and (wanted is None or column.name in wanted)
        ]
        mine = {column.name: index for index, column in enumerate(a.table.columns)}
        self.a_columns = np.array([mine[name] for name in self.names], np.intp)
        self.b_columns = np.array([places[name] for name in self.names], np.intp)
        self.columns = len(self.names)
        self.group = 1
        self._block = min(4096, max(64, BLOCK_VALUES // max(1, self.columns)))

    @property
    def common_steps(self) -> int:
        """Upper bound: the number of rows of the shorter recording."""
        first = max(self.a.first_step or 0, self.b.first_step or 0)
        last = min(self.a.last_step or 0, self.b.last_step or 0)
        if last < first:
            return 0
        counts = (self._rows(s, last) - self._rows(s, first - 1) for s in (self.a, self.b))
        return min(*counts)

    def search(self, limit: int | None) -> _Hit | None:
        """The first row that differs, up to step `limit`."""
        last = min(self.a.last_step or 0, self.b.last_step or 0)
        if limit is not None:
            last = min(last, limit)
        rows = min(self._rows(self.a, last), self._rows(self.b, last))
        try:
            return self._search_levels(rows)
        except _NotAlignedError:
            return self._merge(max(self.a.first_step or 0, self.b.first_step or 0), last)

    @staticmethod
    def _rows(series: SeriesReader, step: int) -> int:
        """Number of rows up to `step`."""
        return series.levels()[0].find(step + 1)

    # ------------------------------------------------------------ tables with the same steps

    def _search_levels(self, rows: int) -> _Hit | None:
        a, b = self.a.levels(), self.b.levels()
        top = 0
        while (rows >> 3 * top) * self.columns > MAX_VALUES and top + 1 < min(len(a), len(b)):
            top += 1
        self.group = max(self.group, a[top].size)
        start = 0
        for level in range(top, -1, -1):
            size = a[level].size
            stop = min(a[level].stop, b[level].stop, rows // size)
            hit = self._descend(level, -(-start // size), stop)
            if hit is not None:
                return hit
            start = max(start, stop * size)
        return None

    def _descend(self, level: int, start: int, stop: int) -> _Hit | None:
        """The first row that differs within the buckets start..stop of a level."""
        a, b = self.a.levels()[level], self.b.levels()[level]
        for begin in range(start, stop, self._block):
            end = min(stop, begin + self._block)
            one = a.buckets(begin, end, self.a_columns)
            other = b.buckets(begin, end, self.b_columns)
            aligned = np.array_equal(one.last, other.last) and np.array_equal(
                one.first, other.first
            )
            if not aligned:
                raise _NotAlignedError
            differs = self._differs(one.value, other.value)
            if level:
                low, high = self._differs(one.low, other.low), self._differs(one.high, other.high)
                differs |= low | high | (one.flags != other.flags)
            for index in np.flatnonzero(differs.any(axis=1)).tolist():
                if not level:
                    return _Hit(self, int(one.last[index]), differs[index],
                                (one.value[index], other.value[index]))  # fmt: skip
                first = (begin + index) * a.size // self.a.levels()[level - 1].size
                count = a.size // self.a.levels()[level - 1].size
                if (hit := self._descend(level - 1, first, first + count)) is not None:
                    return hit
        return None

    # ------------------------------------------------------------ tables with different steps

    def _merge(self, first: int, last: int) -> _Hit | None:
        """The first row that differs between the steps `first` and `last`."""
        level = self.a.levels()[0]
        start, stop = level.find(first), level.find(last + 1)
        other = self.b.levels()[0]
        count = max(stop - start, other.find(last + 1) - other.find(first))
        if count * self.columns <= MAX_VALUES or stop - start <= PROBES * PROBE_ROWS:
            for begin in range(start, stop, self._block):
                if (hit := self._merge_rows(begin, min(stop, begin + self._block))) is not None:
                    return hit
            return None
        probes = np.linspace(start, stop - PROBE_ROWS, PROBES).astype(np.int64).tolist()
        self.group = max(self.group, probes[1] - probes[0])
        seen = start
        for probe in probes:
            if self._merge_rows(probe, probe + PROBE_ROWS) is not None:
                steps = level.bounds(seen, probe + PROBE_ROWS)[1]
                return self._merge(int(steps[0]), int(steps[-1]))
            seen = probe
        return None

    def _merge_rows(self, start: int, stop: int) -> _Hit | None:
        one = self.a.levels()[0].buckets(start, stop, self.a_columns)
        if not len(one.last):
            return None
        level = self.b.levels()[0]
        first, last = int(one.last[0]), int(one.last[-1])
        other = level.buckets(level.find(first), level.find(last + 1), self.b_columns)
        steps, mine, theirs = np.intersect1d(one.last, other.last, return_indices=True)
        x, y = one.value[mine], other.value[theirs]
        differs = self._differs(x, y)
        at = np.flatnonzero(differs.any(axis=1))
        if not len(at):
            return None
        index = int(at[0])
        return _Hit(self, int(steps[index]), differs[index], (x[index], y[index]))

    # ------------------------------------------------------------ values

    def _differs(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Mask of the values that differ, (n, columns). A value that only one run measured does
        not differ."""
        if self.name == schema.PHASE_MS:  # whether the step had the phase, not how long it took
            x, y = _presence(x), _presence(y)
        known = ~(_is(x, Absent.NOT_MEASURED) | _is(y, Absent.NOT_MEASURED))
        missing_x, missing_y = absent_mask(x), absent_mask(y)
        with np.errstate(invalid="ignore"):
            equal = (x == y) | (np.isnan(x) & np.isnan(y) & (missing_x == missing_y))
            if self._tolerance:
                size = np.maximum(np.abs(x), np.abs(y)).astype(np.float64)
                allowed = self._tolerance * size
                if self.name in ROW_SCALED:
                    rows = np.where(np.isfinite(size), size, 0).max(axis=1, keepdims=True)
                    allowed = allowed + 1e-3 * self._tolerance * rows
                near = np.abs(x.astype(np.float64) - y) <= allowed
                equal |= near & np.isfinite(x) & np.isfinite(y)
        differs: NDArray[np.bool_] = known & ~equal
        return differs

    def around(self, column: int, step: int) -> list[tuple[int, float, float]]:
        """The values of a column at the nearest steps that both runs measured."""
        a, b = self.a.levels()[0], self.b.levels()[0]
        at = a.find(step)
        one = a.buckets(max(0, at - 64), min(a.stop, at + 64), self.a_columns[[column]])
        if not len(one.last):
            return []
        low, high = b.find(int(one.last[0])), b.find(int(one.last[-1]) + 1)
        other = b.buckets(low, high, self.b_columns[[column]])
        steps, mine, theirs = np.intersect1d(one.last, other.last, return_indices=True)
        place = int(np.searchsorted(steps, step))
        chosen = slice(max(0, place - AROUND), place + AROUND + 1)
        return [
            (int(s), float(x), float(y))
            for s, x, y in zip(
                steps[chosen],
                one.value[mine, 0][chosen],
                other.value[theirs, 0][chosen],
                strict=True,
            )
        ]


def _short(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.5g}"
    return nonfinite(value) if why_absent(value) is None else "none"


def _presence(values: Floats) -> Floats:
    """1 where a step had the phase, else the reason why there is no time."""
    there = np.isfinite(values)
    gone = np.where(_is(values, Absent.NOT_MEASURED), values, absent(Absent.NO_PHASE))
    return np.where(there, np.float32(1), gone).astype(np.float32)


def _is(values: Floats, why: Absent) -> NDArray[np.bool_]:
    pattern = np.float32(absent(why)).view(np.uint32)
    mask: NDArray[np.bool_] = np.equal(np.ascontiguousarray(values).view(np.uint32), pattern)
    return mask


# ---------------------------------------------------------------- which quantity comes first


def _describe(hits: Sequence[_Hit]) -> FirstDifference:
    """The quantity that becomes known first among those that differ in one step."""
    places = [
        (_order(hit.pair, name), index, number)
        for number, hit in enumerate(hits)
        for index, name in enumerate(hit.pair.names)
        if hit.differs[index]
    ]
    # The backward pass computes the gradients of the last parameters first.
    (_, _), index, number = min(places, key=lambda place: (place[0], _backward(hits, place)))
    hit = hits[number]
    pair, column = hit.pair, hit.pair.names[index]
    around = pair.around(index, hit.step)
    before = [step for step, _, _ in around if step < hit.step]
    return FirstDifference(
        hit.step,
        ORDER[_order(pair, column)[0]],
        _in_words(pair, column),
        pair.name,
        column,
        (float(hit.values[0][index]), float(hit.values[1][index])),
        before[-1] if before else None,
        len(places) - 1,
        tuple(around),
    )


def _clipped_in_one(a: History, b: History, found: FirstDifference) -> FirstDifference | None:
    """The clipping that only one of the runs did at the step of a later difference. A script may
    scale gradients by hand, outside any clip phase, so the phases do not show it."""
    keys = {_key(series) for run in (a, b) for series in run.tables_named(schema.CLIP)}
    for key in sorted(keys, key=str):
        values = [_clipping(run, key, found.step) for run in (a, b)]
        if (values[0] is None) == (values[1] is None):
            continue
        missing = absent(Absent.NO_PHASE)
        both = tuple(missing if value is None else value for value in values)
        _, optimizer, rank = key
        quantity = "gradient norm after clipping" + (f" of rank {rank}" if rank is not None else "")
        return FirstDifference(
            found.step,
            "clip",
            f"{quantity} ({optimizer})" if optimizer else quantity,
            schema.CLIP,
            "norm_after",
            (both[0], both[1]),
            None,
            found.others + 1,
            ((found.step, both[0], both[1]),),
        )
    return None


def _clipping(run: History, key: tuple[str, str, int | None], step: int) -> float | None:
    """The gradient norm after clipping, possibly an `Absent` value; None for a step without
    clipping."""
    for series in run.tables_named(schema.CLIP):
        names = [column.name for column in series.table.columns]
        if _key(series) != key or "norm_after" not in names:
            continue
        column = names.index("norm_after")
        level = series.levels()[0]
        start, stop = level.find(step), level.find(step + 1)
        if stop > start:
            return float(level.buckets(start, stop, np.array([column], np.intp)).value[-1, 0])
    return None


def _backward(hits: Sequence[_Hit], place: tuple[tuple[int, int], int, int]) -> int:
    _, index, number = place
    return -index if hits[number].pair.name == schema.GRAD_NORM else index


def _order(pair: _TablePair, column: str) -> tuple[int, int]:
    """(place in ORDER, place among the quantities of that phase)."""
    last = column.rpartition(".")[2]
    place: StepPart
    within = 0
    match pair.name:
        case schema.PHASE_MS:
            place, within = _phase(column), -1
        case schema.STEP | schema.RANKS:
            found: dict[str, StepPart] = {"loss": "loss", "grad_norm_preclip": "backward"}
            place, within = found.get(column, "step"), int(column == "grad_norm_preclip")
        case schema.ATTENTION_HEALTH:
            place = "forward"
        case schema.GRAD_NORM:
            place = "backward"
        case schema.CLIP:
            place = "clip"
        case schema.ATTENTION if last.startswith("grad_"):
            place, within = "backward", 2
        case schema.VALIDATION:
            place = "evaluation"
        case schema.LOGGED:
            place = "log"
        case _:
            place, within = "step", 1
    return ORDER.index(place), within


def _phase(name: str) -> Phase:
    return next((phase for phase in PHASES if phase == name), "step")


WORDS = {
    (schema.STEP, "learning_rate"): "learning rate",
    (schema.STEP, "grad_norm_preclip"): "gradient norm of all parameters",
    (schema.STEP, "evaluations"): "evaluations of the closure",
    (schema.CLIP, "max_norm"): "limit of the clipping (max_norm)",
    (schema.CLIP, "norm_before"): "gradient norm before clipping",
    (schema.CLIP, "norm_after"): "gradient norm after clipping",
    (schema.CLIP, "scale"): "scale of the clipping",
    (schema.RANKS, "grad_norm_preclip"): "gradient norm",
}
PATTERNS = {
    schema.GRAD_NORM: "gradient norm of {}",
    schema.WEIGHT_NORM: "norm of {}",
    schema.UPDATE_RATIO: "update ratio of {}",
    schema.VALIDATION: "validation {}",
    schema.LOGGED: "logged {}",
    schema.PHASE_MS: "phase {}",
}


def _in_words(pair: _TablePair, column: str) -> str:
    table = pair.a.table
    text = WORDS.get((pair.name, column)) or PATTERNS.get(pair.name, "{}").format(column)
    if table.rank is not None:
        text += f" of rank {table.rank}"
    return f"{text} ({table.optimizer})" if table.optimizer else text
