"""A recorder that keeps everything, small models, and plain loops to trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.history.records import SkipRecord, StepRecord
from tui_trainer.probes import PROBES
from tui_trainer.protocol.messages import PhaseReport
from tui_trainer.protocol.schema import Column, Table
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import Probe, ProbeOptions
from tui_trainer.trace.tracer import Tracer

EVERYTHING = ProbeOptions(budget=0.0)


class KeepingRecorder:
    def __init__(self) -> None:
        self.tables: list[Table] = []
        self.records: list[StepRecord] = []
        self.skips: list[SkipRecord] = []
        self.notices: list[tuple[str, str]] = []
        self.info: dict[str, Any] = {}
        self.reports: list[PhaseReport] = []
        self.topics: frozenset[str] = frozenset()

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        number = len(self.tables)
        self.tables.append(Table(number, name, tuple(columns), every, optimizer, natural))
        return number

    def declare(self, tables: Sequence[Table]) -> None:
        for table in tables:
            self.tables[table.id] = table

    def describe(self, **changes: Any) -> None:
        self.info |= changes

    def record(self, record: StepRecord) -> None:
        self.records.append(record)

    def skip(self, record: SkipRecord) -> None:
        self.skips.append(record)

    def notice(
        self, kind: str, text: str, level: str = "info", step: int | None = None, who: str = ""
    ) -> None:
        self.notices.append((kind, text))

    def report(self, report: PhaseReport | None) -> None:
        if report is not None:
            self.reports.append(report)

    def watched(self, step: int) -> frozenset[str]:
        return self.topics

    # ------------------------------------------------------------ reading back

    def notices_of(self, kind: str) -> list[str]:
        return [text for found, text in self.notices if found == kind]

    def table(self, name: str, optimizer: str = "") -> Table:
        return next(t for t in self.tables if t.name == name and t.optimizer == optimizer)

    def rows(self, name: str, optimizer: str = "") -> dict[int, dict[str, float]]:
        """Step to column to value."""
        table = self.table(name, optimizer)
        columns = [column.name for column in table.columns]
        return {
            record.step: dict(zip(columns, values.tolist(), strict=True))
            for record in self.records
            for table_id, values in record.rows
            if table_id == table.id
        }

    def series(self, name: str, column: str, optimizer: str = "") -> list[float]:
        return [row[column] for row in self.rows(name, optimizer).values()]


class CountingGate(Gate):
    """Notes every boundary that is passed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reached_boundaries: list[tuple[str, int]] = []

    def reached(self, phase: str, step: int) -> None:
        self.reached_boundaries.append((phase, step))
        super().reached(phase, step)

    def phases(self, step: int) -> list[str]:
        return [phase for phase, at in self.reached_boundaries if at == step]


def trace(
    loop: Callable[[], Any],
    probes: Sequence[type[Probe]] = PROBES,
    options: ProbeOptions = EVERYTHING,
    recorder: KeepingRecorder | None = None,
    gate: Gate | None = None,
) -> tuple[KeepingRecorder, CountingGate]:
    """Run `loop` under a tracer; no fault of ours may have happened."""
    recorder = recorder or KeepingRecorder()
    chosen = gate or CountingGate()
    with Tracer(recorder, chosen, probes, options):
        loop()
    assert recorder.notices_of("fault") == []
    return recorder, chosen  # type: ignore[return-value]


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class SmallGpt(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Attention(width) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return self.head(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    max_norm: float | None = 0.5,
    losses: list[torch.Tensor] | None = None,
) -> None:
    """The textbook's."""
    for _ in range(steps):
        inputs, targets = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if losses is not None:
            losses.append(loss.detach().clone())


def gpt_loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 11, (3, 9))
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
