"""`tui_trainer.log(name=value, …)`: the user's own numbers, recorded with the current step.

Only standard modules are imported here, so that `log` costs nothing outside of a run. A value on an
accelerator is copied to the host asynchronously.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from tui_trainer.protocol.schema import Better
    from tui_trainer.record.recorder import Recorder
    from tui_trainer.trace.gate import Gate
    from tui_trainer.trace.transfer import HostTransfer

MAX_NAMES = 1_000
"""Maximum number of distinct names per run, in case names contain the step number."""
NAME_CHARACTERS = 200

_active: ScalarLog | None = None
"""The log of the run in this process."""


def log(values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
    """Record numbers with the current step: `log(accuracy=0.93)`, or `log({"val/loss": loss})`.

    A value is a number, or a tensor or array with one element. The current step is the one in
    progress from the call of the model to the end of `optimizer.step`, otherwise the last completed
    one. Outside of a run, `log` does nothing.
    """
    active = _active
    if active is not None:
        active.log({**values, **named} if values else named)


def active_log() -> ScalarLog | None:
    """The log of the run in this process, if there is one."""
    return _active


@contextlib.contextmanager
def activated(recorder: Recorder, gate: Gate) -> Iterator[ScalarLog]:
    """A context in which `log` records into the run of `recorder`."""
    global _active
    before, ours = _active, ScalarLog(recorder, gate)
    _active = ours
    try:
        yield ours
    finally:
        _active = before
        ours.flush()


class _PendingValues(NamedTuple):
    """Values that are being copied to the host."""

    step: int
    names: tuple[str, ...]
    transfer: HostTransfer


class _Place(NamedTuple):
    """The table and column that hold the values of a name."""

    table: int
    column: int
    columns: int


class ScalarLog:
    """The scalars of one run. Thread-safe."""

    def __init__(self, recorder: Recorder, gate: Gate, table: str = "logged") -> None:
        """`table`: name of the tables that the rows go to."""
        self.recorder = recorder
        self._table = table
        self._gate = gate
        self._places: dict[str, _Place] = {}
        self._refused: set[str] = set()
        self._waiting: deque[_PendingValues] = deque()
        self._lock = threading.Lock()
        self._watching = False

    @property
    def current_step(self) -> int:
        """The step to which a value logged now belongs."""
        return self._gate.current_step

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record `values`. Never raises: a value that is not a number is noted in the log."""
        try:
            at = self.current_step if step is None else step
            numbers: dict[str, float] = {}
            tensors: dict[str, torch.Tensor] = {}
            for given, value in values.items():
                name = str(given)[:NAME_CHARACTERS]
                if _is_remote(value):
                    tensors[name] = value.detach()
                elif (number := self._number(name, value)) is not None:
                    numbers[name] = number
            if numbers:
                self._record(at, numbers)
            if tensors:
                self._send(at, tensors)
        except Exception as error:
            self.recorder.fault("tui_trainer.log", error)

    def flush(self) -> None:
        """Record the values that are still being copied to the host."""
        try:
            self._drain(lambda transfer: transfer.arrived(wait=True))
        except Exception as error:
            self.recorder.fault("tui_trainer.log", error)

    def _number(self, name: str, value: Any) -> float | None:
        """`value` as a float; None where it is not one number."""
        count = _element_count(value)
        if count is not None and count != 1:
            self._refuse(name, f"has {count:,} elements: log its mean, for example")
            return None
        try:
            if count is not None and hasattr(value, "detach"):
                value = value.detach()
            return float(value.item() if count is not None else value)
        except (TypeError, ValueError, RuntimeError):
            self._refuse(name, f"is not a number: {type(value).__name__}")
            return None
        except OverflowError:  # an int beyond float64
            return 1.7e308 if value > 0 else -1.7e308

    def _refuse(self, name: str, why: str) -> None:
        if name not in self._refused and len(self._refused) < MAX_NAMES:
            self._refused.add(name)
            text = f"tui_trainer.log: {name} {why}"
            self.recorder.notice("unseen", text, "warning", self.current_step)

    def _send(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        from tui_trainer.trace.transfer import HostTransfer

        for name, tensor in list(tensors.items()):
            if tensor.numel() != 1:
                self._refuse(name, f"has {tensor.numel():,} elements: log its mean, for example")
                del tensors[name]
        if not tensors:
            return
        readings = [tensor.reshape(()) for tensor in tensors.values()]
        transfer = HostTransfer([(readings, False)], on_host=False)
        self._waiting.append(_PendingValues(step, tuple(tensors), transfer))
        if not self._watching:
            self._watching = True
            self.recorder.call_regularly(self.drain_idle)

    def drain_idle(self) -> None:
        """Record the values that have arrived; called regularly on another thread."""
        self._drain(lambda transfer: transfer.arrived_on_host())

    def _drain(self, arrived: Callable[[HostTransfer], bool]) -> None:
        with self._lock:
            while self._waiting and arrived(self._waiting[0].transfer):
                step, names, transfer = self._waiting.popleft()
                values = transfer.values()[0].tolist()
                self._record_locked(step, dict(zip(names, values, strict=True)))

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        with self._lock:
            self._record_locked(step, values)

    def _record_locked(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row to each table that has any of these names."""
        import numpy as np

        from tui_trainer.protocol.absent import Absent, absent, to_float32

        self._declare([name for name in values if name not in self._places])
        converted = to_float32(np.array(list(values.values()), np.float64))
        rows: dict[int, Any] = {}
        for name, value in zip(values, converted, strict=True):
            place = self._places.get(name)
            if place is None:
                continue
            if place.table not in rows:
                rows[place.table] = np.full(place.columns, absent(Absent.NOT_MEASURED), np.float32)
            rows[place.table][place.column] = value
        for table, row in rows.items():
            self.recorder.row(table, step, row)
        if self._gate.break_phases and self._gate.breakpoints is not None:
            self._gate.breakpoints.logged(values, self._table)

    def _declare(self, names: list[str]) -> None:
        """Declare a table for names that are logged together for the first time."""
        from tui_trainer.protocol.schema import Column

        room = MAX_NAMES - len(self._places)
        if len(names) > room:
            for name in names[room:]:
                self._refuse(name, f"is not recorded: a run has at most {MAX_NAMES:,} names")
            names = names[:room]
        if not names:
            return
        columns = [Column(name, "", _better(name)) for name in names]
        table = self.recorder.new_table(self._table, columns, every=0)
        for number, name in enumerate(names):
            self._places[name] = _Place(table, number, len(names))


def _is_remote(value: Any) -> bool:
    """Whether `value` is a tensor on an accelerator."""
    return hasattr(value, "is_cpu") and hasattr(value, "detach") and not value.is_cpu


def _element_count(value: Any) -> int | None:
    """The number of elements of a tensor or array; None for anything else."""
    if hasattr(value, "numel") and callable(value.numel):
        return int(value.numel())
    size = getattr(value, "size", None)
    return size if isinstance(size, int) and hasattr(value, "dtype") else None


def _better(name: str) -> Better:
    """The direction in which a quantity of this name improves, guessed from the name."""
    last = name.lower().replace("-", "_").rpartition("/")[2]
    if last.endswith(("loss", "error", "perplexity", "ppl", "wer", "rmse", "mae", "mse")):
        return "lower"
    return "higher" if last.endswith(("accuracy", "acc", "f1", "bleu", "auc", "reward")) else ""
