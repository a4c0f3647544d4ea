"""JSON lines: what `--json` printed, or would have printed."""

from __future__ import annotations

from tui_trainer.history.store.reader import RecordedHistory
from tui_trainer.protocol.messages import Status
from tui_trainer.recording.retelling import retell
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.run.sinks.output import Output

AT_ONCE = 256


def write_jsonl(history: RecordedHistory, descriptor: int) -> None:
    """Tell the run again to a file descriptor, which is closed. Raises OSError and StoreFault."""
    lines = JsonLines(Output(descriptor))
    status = history.store.status() or Status()
    try:
        batch = []
        for item in retell(history):
            batch.append(item)
            if len(batch) == AT_ONCE:
                lines.take(batch, status)
                batch = []
        lines.take(batch, status)
    finally:
        lines.close()
