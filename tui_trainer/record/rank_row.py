"""What every training process of a run contributes to tables `ranks`: one row for each step."""

from __future__ import annotations

import numpy as np

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol import BETWEEN, PHASES, schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.schema import Table

_SOURCES: dict[str, dict[str, str]] = {
    schema.STEP: {"loss": "loss", "grad_norm_preclip": "grad_norm_preclip", "step_ms": "step_ms"},
    schema.PHASE_MS: {phase: f"phase_ms.{phase}" for phase in (*PHASES, *BETWEEN)},
    schema.MEMORY: {"device_bytes": "device_bytes", "host_bytes": "host_bytes"},
    schema.CLIP: {"scale": "clip_scale"},
    schema.REPLICA: {column.name: column.name for column in schema.REPLICA_COLUMNS},
    schema.REPLICA_SAMPLE: {column.name: column.name for column in schema.REPLICA_SAMPLE_COLUMNS},
}
"""Table to its columns, and where they are in a row of `ranks`."""


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
        # Gradients that the script averages by itself change as well.
        row[schema.RANK_INDEX["clip_scale"]] = absent(Absent.NOT_MEASURED)
    if record.batch is not None:
        inputs = [each.checksum for each in record.batch.tensors if each.role == "input"]
        row[schema.RANK_INDEX["batch_checksum"]] = hash(tuple(inputs)) & 0xFFFFFF
    return row
