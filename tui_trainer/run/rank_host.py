"""A training process that is recorded by rank 0: rank 1 and above.

Its script runs as under `Host`, with fewer probes, whose measurements are sent to rank 0.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading

from tui_trainer.config.machine import OtherLoad
from tui_trainer.config.ranks import Rank
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.ranks import StopWanted
from tui_trainer.record.sink_items import Sink
from tui_trainer.run.host import Host, run_to_end
from tui_trainer.run.inspection import answer_rank_zero
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.rank_client import Connect, RankClient
from tui_trainer.run.rank_control import STOP_S, RankFollower
from tui_trainer.trace.gate import Refusal

FLUSH_S = 10.0
"""How long the end of the training waits for the recorder."""
REPORT_S = 1.0
"""How often a rank on another machine sends its position."""


def print_to_stderr(text: str) -> None:
    """Print a line to stderr, which a script may have closed."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"tui-trainer: {text}\n".encode())


class RankHost(Host):
    """The `RunContext` of a rank other than 0, which neither serves nor stores anything."""

    recording = False

    def __init__(
        self,
        spec: RunSpec,
        rank: Rank,
        connect: Connect,
        others: OtherLoad | None = None,
    ) -> None:
        """`connect`: as for `RankClient`."""
        super().__init__(spec, others=others)
        host = "" if rank.with_rank_zero else platform.node()
        self._follower = RankFollower(self.gate, REPORT_S if host else None)
        self._client = RankClient(
            rank.rank,
            rank.world_size,
            "",
            connect,
            print_to_stderr,
            self._follower.descriptor,
            host,
        )
        self._follower.follow(self._client)
        self.inspections.others = None
        answer_rank_zero(self.inspections, self._client)
        self.stops.stop_gate = self._ask_to_stop

    def open(self, sink: Sink | None) -> None:
        """Connect to rank 0."""
        self.recorder.subscribe(self._client)
        self._client.start()

    def _ask_to_stop(self, checkpoint: bool) -> None:
        """Stop all processes at the same step, or this one alone without rank 0."""
        threading.Thread(target=self._client.send, args=(StopWanted(),), daemon=True).start()
        alone = threading.Timer(STOP_S if self._client.connected else 0.0, self._stop_alone)
        alone.daemon = True
        alone.start()

    def _stop_alone(self) -> None:
        with contextlib.suppress(Refusal):
            self.gate.stop()

    def close(self, outcome: Outcome, first_viewer_s: float = 0.0) -> None:
        """Report to rank 0 how the training ended."""
        self.gate.end()
        status: Status = self.recorder.status
        with contextlib.suppress(KeyboardInterrupt):
            self.recorder.close(FLUSH_S)
            self._client.leave(outcome.state, outcome.reason, status.step)


def spec_of_rank(spec: RunSpec, rank: Rank) -> RunSpec:
    """The spec of a rank other than 0: the script of `spec`, without a run directory."""
    import msgspec

    return msgspec.structs.replace(spec, name=f"rank-{rank.rank}", directory="")


def train_rank(spec: RunSpec, rank: Rank, connect: Connect) -> int:
    """Train on the main thread as a rank of the run that `connect` reaches; returns the exit
    status."""
    return run_to_end(RankHost(spec, rank, connect), None)
