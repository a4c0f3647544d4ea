"""Pauses all training processes of a run at the same boundary of the same step, and resumes them.

No process may wait in a collective for a process that is paused. So rank 0 asks all processes to
stop at their next boundary, and each reports its position: stopped at a boundary B, or past B and
not yet at the next one, perhaps because it waits for others in a collective. All processes pause at
the first boundary that none has passed; a process that stopped earlier continues up to it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
from typing import Literal

from tui_trainer.protocol import PHASES, Phase
from tui_trainer.protocol.ranks import SHARED, Boundary, Go, Hold, RankAt, RankPosition, ToRank
from tui_trainer.run.rank_client import RankClient
from tui_trainer.run.rank_server import Peer, RankServer
from tui_trainer.trace.gate import Gate, Refusal

STOP_S = 20.0
"""Time after which a stop no longer waits for all processes to reach the same boundary."""

GRACE_S, SETTLE_S = 0.02, 5.0
"""How long a running process may take to reach its next boundary, and a process at a boundary to
stop there, since it may still be measuring the phase."""

Goal = Literal["go", "hold", "steps", "stop", "end"]
"""`steps`, `stop`: run to the end of a step, and pause or end there; `end`: end now, since all
processes have arrived at that step's end, or `STOP_S` has passed."""


class RankControl:
    """The controls of a run's gate, applied to all of its processes. Thread-safe; nothing is sent
    on the calling thread."""

    def __init__(self, gate: Gate, ranks: RankServer) -> None:
        self._gate = gate
        self._ranks = ranks
        self._changed = threading.Condition(threading.RLock())
        self._dirty = False
        self._thread: threading.Thread | None = None
        self._goal: Goal = "hold" if gate.armed else "go"
        self._boundary: Boundary = (0, 0)
        self._step = 0
        self._checkpoint = False
        self._stop_by = 0.0
        self._number = 1
        ranks.hooks.changed = self.wake

    def wake(self) -> None:
        """Called on any thread when a process or the gate has changed."""
        with self._changed:
            self._dirty = True
            if self._thread is None and self._ranks.peers:
                self._thread = threading.Thread(
                    target=self._work, name="tui-trainer rank control", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    # ------------------------------------------------------------ controls

    def pause(self) -> None:
        """Pause all processes at the first boundary that none has passed."""
        if not self._ranks.peers:
            self._goal = "hold"
            return self._gate.pause()
        with self._changed:  # otherwise `_align` may move the boundary before rank 0 is held
            self._set("hold")
            return self._gate.pause_at((0, 0))

    def pause_at_breakpoint(self) -> None:
        """Pause all processes, unless they are about to stop."""
        with self._changed:
            if self._goal not in ("stop", "end"):
                self.pause()

    def resume(self) -> None:
        with self._changed:
            self._set("go")
            self._gate.resume()

    def step(self, count: int = 1) -> None:
        """Pause all processes after `count` more steps."""
        if not self._ranks.peers:
            self._goal = "hold"
            return self._gate.step(count)
        first = self._step if self._goal == "steps" else max(self._completed())
        return self._run_to(first + count)

    def step_phase(self) -> None:
        """Pause all processes at the boundary after the current one."""
        if not self._ranks.peers:
            self._goal = "hold"
            return self._gate.step_phase()
        step, number = self._gate.boundary
        boundary = (step, number + 1) if self._gate.mode == "paused" else (0, 0)
        self._set("hold", boundary)
        return self._gate.pause_at(boundary)

    def run_to_epoch_end(self) -> None:
        if not self._ranks.peers:
            self._goal = "hold"
            return self._gate.run_to_epoch_end()
        steps = self._gate.steps_per_epoch
        if not steps:
            raise Refusal("this run has no epochs")
        return self._run_to((max(self._completed()) // steps + 1) * steps)

    def stop(self, checkpoint: bool = False) -> None:
        """Stop all processes at the end of the same step."""
        if not self._ranks.peers:
            return self._gate.stop(checkpoint)
        with self._changed:
            if self._goal in ("stop", "end"):
                return None
            self._checkpoint = checkpoint
            self._stop_by = time.monotonic() + STOP_S
            self._step = max(self._completed()) + 1
            self._set("stop")
        return self._gate.run_until(self._step)

    def _run_to(self, step: int) -> None:
        with self._changed:
            self._step = step
            self._set("steps")
        self._gate.run_until(step)

    def _set(self, goal: Goal, boundary: Boundary = (0, 0)) -> None:
        with self._changed:
            self._goal, self._boundary = goal, boundary
            self._number += 1
            self.wake()

    def _completed(self) -> list[int]:
        return [self._gate.completed, *(p.step for p in self._ranks.peers if not p.child)]

    # ------------------------------------------------------------ the other processes

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty, 0.2)
                self._dirty = False
            with contextlib.suppress(Refusal):  # the training has ended
                self._align()
                self._send_goal()

    def _send_goal(self) -> None:
        """Send the current goal to the processes that have not received it, without the lock."""
        with self._changed:
            number, ends, message = self._number, self._goal == "end", self._message()
        for peer in self._ranks.peers:
            if peer.notified < number:
                peer.notified = number
                with contextlib.suppress(OSError):  # the process has ended, or does not read
                    peer.send(message)
        if ends:
            self._gate.stop(self._checkpoint)

    def _message(self) -> ToRank:
        match self._goal:
            case "go" | "end":
                return Go(self._number, stop=self._goal == "end")
            case "hold":
                return Hold(self._number, self._boundary)
            case _:
                return Hold(self._number, step=self._step)

    def _align(self) -> None:
        """Move the boundary forward if a process has passed it."""
        with self._changed:
            if self._goal in ("go", "end"):
                return
            if self._goal == "stop" and time.monotonic() > self._stop_by:
                self._set("end")
            peers = [peer for peer in self._ranks.peers if not peer.child]
            if not all(p.at is not None and p.at.answers == self._number for p in peers):
                return
            if self._gate.in_gate and self._gate.mode == "running":
                return  # rank 0 is about to stop or to continue: `_work` tries again
            needed, settled = self._needed(peers)
            if settled:
                if self._goal == "stop":
                    self._set("end")
            elif self._goal == "hold" and needed > self._boundary:
                self._set("hold", needed)
                self._gate.pause_at(needed)
            elif self._goal != "hold" and needed > (self._step + 1, 0):
                self._step = needed[0]
                self._set(self._goal)
                self._gate.run_until(self._step)

    def _needed(self, peers: list[Peer]) -> tuple[Boundary, bool]:
        """(first boundary that no process has passed, whether all are stopped at it)."""
        boundary, phase, paused = _gate_position(self._gate)
        held, boundaries, ends = [paused], [boundary], [phase == "step"]
        for peer in peers:
            at = peer.at  # once: the next message replaces it
            assert at is not None
            boundaries.append(at.boundary)
            held.append(at.held)
            ends.append(at.phase == "step")
        needed = max(
            boundary if stopped else (boundary[0] + end, 1 if end else boundary[1] + 1)
            for boundary, stopped, end in zip(boundaries, held, ends, strict=True)
        )
        return needed, all(held) and len(set(boundaries)) == 1


def _gate_position(gate: Gate) -> tuple[Boundary, Phase | Literal[""], bool]:
    """(boundary, phase that ended there, held) of the training thread.

    While held, the boundary at which the thread waits; otherwise the last one that it has left. A
    boundary that it has reached but not left does not count: it may be about to stop there.
    """
    held = gate.mode == "paused"  # read first: the thread may stop before its boundary is read
    if held:
        return gate.boundary, gate.phase, True
    return *gate.passed, False


class RankFollower:
    """Applies rank 0's `Hold` and `Go` messages to this process's gate, and reports its
    position."""

    def __init__(self, gate: Gate, report_s: float | None = None) -> None:
        """`report_s`: interval at which to send the position to a rank 0 on another machine, which
        cannot read it from shared memory; None: never."""
        self._gate = gate
        self._report_s = report_s
        self._changed = threading.Event()
        self._number = 0
        self._client: RankClient | None = None
        self.descriptor = -1
        with contextlib.suppress(OSError, AttributeError):  # only on Linux
            self.descriptor = os.memfd_create("tui-trainer", os.MFD_CLOEXEC)
            size = struct.calcsize(SHARED)
            os.ftruncate(self.descriptor, size)
            gate.shared = memoryview(mmap.mmap(self.descriptor, size)).cast("q")
            gate.times_boundaries = True

    def follow(self, client: RankClient) -> None:
        """Apply the messages that `client` receives."""
        self._client = client
        client.hooks.message = self._apply
        client.hooks.lost = self._alone
        before = self._gate.hooks.changed

        def changed() -> None:
            self._changed.set()
            before()

        self._gate.hooks.changed = changed
        threading.Thread(target=self._report, name="tui-trainer boundary", daemon=True).start()

    def _apply(self, message: ToRank) -> None:
        with contextlib.suppress(Refusal):  # the training has ended
            match message:
                case Hold(number=number, boundary=boundary, step=step):
                    if step is None:
                        self._gate.pause_at(boundary)
                    else:
                        self._gate.run_until(step)
                    self._number = number
                    self._changed.set()
                case Go(number=number, stop=stop):
                    self._number = number
                    if stop:
                        self._gate.stop()
                    else:
                        self._gate.resume()
                case _:
                    pass

    def _report(self) -> None:
        """Send this process's boundary after each change of its gate."""
        gate, client = self._gate, self._client
        assert client is not None
        while gate.mode != "ended":
            if not self._changed.wait(self._report_s):
                client.send(self._position())
                continue
            self._changed.clear()
            number = 0
            while number != self._number:  # answers a message that arrived meanwhile as well
                number = self._number
                self._settle()
                client.send(RankAt(*_gate_position(gate), number))

    def _position(self) -> RankPosition:
        shared = self._gate.shared
        if shared is None or not shared[1]:
            return RankPosition(self._gate.boundary, self._gate.phase, 0.0, time.time())
        step, number, phase, since = shared
        for_s = max(0.0, (time.monotonic_ns() - since) / 1e9)
        return RankPosition((step, number), PHASES[phase], for_s, time.time())

    def _settle(self) -> None:
        """Wait until a training thread that has just reached a boundary stops there or leaves it.
        A position reported too early would move the common boundary one further."""
        gate, deadline = self._gate, time.monotonic() + SETTLE_S
        if gate.armed and gate.mode == "running":
            self._changed.wait(GRACE_S)
            self._changed.clear()
        while gate.in_gate and gate.mode == "running" and time.monotonic() < deadline:
            self._changed.wait(GRACE_S)
            self._changed.clear()

    def _alone(self) -> None:
        """Resume the training: without rank 0, nothing else can."""
        with contextlib.suppress(Refusal):
            self._gate.resume()
