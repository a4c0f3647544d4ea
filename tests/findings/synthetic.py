"""Runs made of numbers: an engine that is given steps without any training."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.findings.rule import parse_settings
from tui_trainer.findings.rules import RULES
from tui_trainer.history.records import NonFiniteRecord, SkipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import in_order
from tui_trainer.protocol.schema import (
    AttentionInfo,
    Column,
    ParameterInfo,
    ProcessInfo,
    RunInfo,
    Table,
    attention_columns,
)

NAMES = tuple(f"layer{i}.weight" for i in range(8))
LAYERS = ("blocks.0.attention", "blocks.1.attention")
TABLES = (
    Table(0, schema.STEP, schema.STEP_COLUMNS),
    Table(1, schema.GRAD_NORM, tuple(map(Column, NAMES))),
    Table(2, schema.UPDATE_RATIO, tuple(map(Column, NAMES))),
    Table(3, schema.CLIP, schema.CLIP_COLUMNS),
    Table(4, schema.PHASE_MS, schema.PHASE_COLUMNS),
    Table(5, schema.MEMORY, schema.MEMORY_COLUMNS),
    Table(6, schema.ATTENTION_HEALTH, attention_columns(LAYERS, schema.HEALTH_STATISTICS)),
    Table(7, schema.ATTENTION, attention_columns(LAYERS, ("growth",))),
    Table(8, schema.VALIDATION, (Column("loss"),)),
    Table(20, schema.WEIGHT_NORM, tuple(map(Column, NAMES))),
    *(Table(9 + rank, schema.RANKS, schema.RANK_COLUMNS, rank=rank) for rank in range(3)),
)
NO_LOSS = absent(Absent.NO_LOSS)
NO_EVALUATION = absent(Absent.NO_PHASE)


class Run:
    """Gives steps to an engine. Every argument of `step` has a healthy default."""

    def __init__(
        self,
        *,
        outside=(),
        frozen=(),
        attention=False,
        optimizers=("adamw",),
        rules="",
        facts=None,
        total_steps=None,
        steps_per_epoch=None,
        ranks=0,
        dtype="float32",
        kinds=RULES,
        names=NAMES,
        shapes=None,
    ):
        """`names`: of eight parameters; `shapes`: of those that are not (16, 16)."""
        self.faults: list[str] = []
        self.engine = FindingsEngine(parse_settings(rules, RULES), self.faults.append, kinds)
        self.info = RunInfo(
            name="run",
            task="script",
            tables=tuple(
                msgspec.structs.replace(table, columns=tuple(map(Column, names)))
                if len(table.columns) == len(NAMES) and table.columns[0].name == NAMES[0]
                else table
                for table in TABLES
            ),
            optimizers=tuple(optimizers),
            facts=facts or {},
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            processes=tuple(ProcessInfo(rank, pid=1, state="running") for rank in range(ranks)),
            attention=tuple(
                AttentionInfo(layer, "separate", "q", "k", "v") for layer in LAYERS if attention
            ),
            parameters=tuple(
                ParameterInfo(
                    name,
                    (shapes or {}).get(name, (16, 16)),
                    dtype,
                    math.prod((shapes or {}).get(name, (16, 16))),
                    "" if name in outside else optimizers[0],
                    name not in frozen,
                )
                for name in names
            ),
        )
        self.engine.describe(self.info)
        self.number = 0
        self.random = np.random.default_rng(0)

    def step(
        self,
        loss=None,
        *,
        rate=1e-3,
        norm=1.0,
        ms=30.0,
        gradients=None,
        updates=None,
        weights=None,
        clip=None,
        data_ms=1.0,
        eval_ms=NO_EVALUATION,
        memory=None,
        health=None,
        growth=None,
        nonfinite=(),
        signs=(),
        optimizer="",
        classes=None,
        **further,
    ):
        """`further`: fields of StepRecord."""
        self.number += 1
        if loss is None:
            loss = 2.3 * 0.99**self.number + 0.01 * self.random.standard_normal() + 0.1
        phases = [data_ms, *[absent(Absent.NO_PHASE)] * (len(schema.PHASE_COLUMNS) - 1)]
        phases[[column.name for column in schema.PHASE_COLUMNS].index("eval")] = eval_ms
        rows = {
            0: [loss, rate, norm, ms, absent(Absent.NO_CLOSURE)],
            1: [norm / 3] * len(NAMES) if gradients is None else gradients,
            2: [1e-3] * len(NAMES) if updates is None and self.number % 10 == 1 else updates,
            3: clip,
            4: phases,
            5: memory,
            6: health,
            7: growth,
            20: weights,
        }
        self.engine.step(
            StepRecord(
                self.number,
                1000.0 + self.number,
                optimizer,
                tuple(
                    (table, np.array(values, np.float32))
                    for table, values in rows.items()
                    if values is not None
                ),
                nonfinite=tuple(NonFiniteRecord(*each) for each in nonfinite),
                signs=frozenset(signs),
                classes=classes,
                **further,
            )
        )

    def skip(self, reason="hand", loss_scale=None, loss=None, producer=None, **further):
        row = np.full(len(schema.STEP_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
        row[schema.STEP_INDEX["loss"]] = NO_LOSS if loss is None else loss
        self.engine.skipped(
            SkipRecord(
                step=self.number + 1,
                time=1000.0,
                reason=reason,
                text="skipped",
                optimizer="",
                rows=((0, row),),
                loss_scale=loss_scale,
                producer=producer,
                **further,
            )
        )

    def ranks(self, *rows):
        """One row of table `ranks` for each rank, by column; others are absent."""
        for rank, row in enumerate(rows):
            values = np.full(len(schema.RANK_COLUMNS), absent(Absent.NOT_MEASURED), np.float32)
            for column, value in row.items():
                values[schema.RANK_INDEX[column]] = value
            self.engine.row(9 + rank, self.number, values, 1000.0)

    def validate(self, loss):
        self.engine.row(8, self.number, np.array([loss], np.float32), 1000.0)

    @property
    def found(self):
        """Rule → finding."""
        return {finding.rule: finding for finding in self.engine.findings}

    @property
    def causes(self):
        return [f.rule for f in in_order(self.engine.findings) if f.cause is None]
