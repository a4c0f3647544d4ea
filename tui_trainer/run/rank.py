"""A training process that another one records: rank 1 and above, or a child process of a script.

Its script runs as under `Host`, with fewer probes, and what they measure goes to rank 0.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from tui_trainer.config.machine import OtherLoad
from tui_trainer.config.ranks import Rank
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.ranks import StopWanted
from tui_trainer.record.events import Sink
from tui_trainer.run.host import Host, run_to_end
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.rank_client import RankClient
from tui_trainer.run.rank_control import STOP_S, RankObedience
from tui_trainer.trace.gate import Refusal

FLUSH_S = 5.0


def say_once(text: str) -> None:
    """One line on stderr, which a script may have closed."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"tui-trainer: {text}\n".encode())


class RankHost(Host):
    """The `RunContext` of a training process other than rank 0: it serves and stores nothing."""

    recording = False

    def __init__(
        self,
        spec: RunSpec,
        rank: Rank,
        locate: Callable[[], Path | None],
        others: OtherLoad | None = None,
    ) -> None:
        super().__init__(spec, others=others)
        self._obedience = RankObedience(self.gate)
        self._client = RankClient(
            rank.rank, rank.world_size, "", locate, say_once, self._obedience.descriptor
        )
        self._obedience.follow(self._client)
        self.stops.stop_gate = self._ask_to_stop

    def open(self, sink: Sink | None) -> None:
        """Connect to rank 0."""
        self.recorder.subscribe(self._client)
        self._client.start()

    def _ask_to_stop(self, checkpoint: bool) -> None:
        """A signal: all processes stop at the same step, or this one alone without rank 0."""
        threading.Thread(target=self._client.send, args=(StopWanted(),), daemon=True).start()
        alone = threading.Timer(STOP_S if self._client.connected else 0.0, self._stop_alone)
        alone.daemon = True
        alone.start()

    def _stop_alone(self) -> None:
        with contextlib.suppress(Refusal):
            self.gate.stop()

    def close(self, outcome: Outcome, first_viewer_s: float = 0.0) -> None:
        """Tell rank 0 how it ended."""
        self.gate.end()
        status: Status = self.recorder.status
        with contextlib.suppress(KeyboardInterrupt):
            self.recorder.close(FLUSH_S)
            self._client.leave(outcome.state, outcome.reason, status.step)


def spec_of_rank(spec: RunSpec, rank: Rank) -> RunSpec:
    """What a rank other than 0 runs: the script of `spec`, in no directory of its own."""
    import msgspec

    return msgspec.structs.replace(spec, name=f"rank-{rank.rank}", directory="")


def train_rank(spec: RunSpec, rank: Rank, locate: Callable[[], Path | None]) -> int:
    """Train on the main thread as a rank of the run that `locate` finds; the exit status."""
    return run_to_end(RankHost(spec, rank, locate), None)
