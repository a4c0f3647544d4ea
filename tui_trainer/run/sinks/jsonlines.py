"""One JSON object a line, for programs. The schema is docs/json-lines.md."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import (
    Clip,
    ConfusionMatrix,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Status,
    TextSample,
)
from tui_trainer.recording.items import Described, Ended, Item, Lost, Rowed, Stepped
from tui_trainer.run.sinks import encoding
from tui_trainer.run.sinks.output import Output

HELD_BACK = 10_000


class JsonLines:
    """The header comes first, so what happens before the first step (evaluations at the start,
    notices) is held back until the parameters are known; nothing is reordered."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._encoder = msgspec.json.Encoder()
        self._info: RunInfo | None = None
        self._headed: tuple[object, ...] | None = None
        self._waiting: list[encoding.Object] = []

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write these items."""
        objects: list[encoding.Object] = []
        for item in items:
            objects += self._objects(item)
        if objects:
            self._output.write(self._encoder.encode_lines(objects))

    def close(self) -> None:
        """Close the output."""
        self._output.close()

    def _objects(self, item: Item) -> list[encoding.Object]:
        match item:
            case Described():
                self._info = item.info
                return []
            case Stepped():
                assert self._info is not None, "the recorder describes before it tells"
                return [*self._head(), encoding.step_object(self._info, item.record)]
            case Ended():
                return [*self._head(), encoding.end_object(item.status)]
            case Clip() | LogLine():
                return []  # part of the step; on stderr
        made = self._other(item)
        if self._headed is None:
            self._waiting = [*self._waiting[-HELD_BACK:], made]
            return []
        return [made]

    def _other(
        self, item: Rowed | Lost | NonFinite | Notice | TextSample | ImageSample | ConfusionMatrix
    ) -> encoding.Object:
        match item:
            case Rowed():
                assert self._info is not None, "the recorder describes before it tells"
                return encoding.row_object(self._info, item)
            case Lost():
                return {"type": "lost", "steps": item.steps}
            case NonFinite() | Notice():
                return encoding.event_object(item)
            case _:
                return encoding.sample_object(item)

    def _head(self) -> list[encoding.Object]:
        """The header when it is due: at first, and again when what it says of the model or the
        optimizers has changed."""
        info = self._info
        if info is None:
            return []
        said = (
            *(info.parameters, info.attention, info.optimizers, info.device, info.total_steps),
            info.unseen,
        )
        if said == self._headed:
            return []
        first, self._headed = self._headed is None, said
        held, self._waiting = self._waiting, []
        return [encoding.run_object(info), *held] if first else [encoding.run_object(info)]
