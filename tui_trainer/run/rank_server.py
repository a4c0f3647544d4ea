"""Rank 0's side of a run with several training processes: records the measurements of the other
processes in tables `ranks`, and reports when a process dies.

One thread per connected process reads its messages; the training thread waits for none of them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tui_trainer.config.ranks import Rank
from tui_trainer.history.ranks import rank_row
from tui_trainer.history.records import Floats
from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol.framing import ConnectionClosed, ProtocolError, encode, read_as
from tui_trainer.protocol.messages import EndState, Join, ProcessAt, Refused, Status
from tui_trainer.protocol.ranks import (
    MAX_ANSWER_BYTES,
    MAX_BYTES,
    SHARED,
    InspectedThere,
    Joined,
    Leave,
    RankAt,
    RankLine,
    RankNotice,
    RankPosition,
    RankRows,
    StopWanted,
    ToRank,
    ToRankZero,
    to_rank_zero,
)
from tui_trainer.protocol.schema import ProcessInfo, ProcessState, Table
from tui_trainer.protocol.text import single_line
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.sink_items import InfoChanged, Item, StepRecorded

MAX_PROCESSES = 1024
SEND_TIMEOUT_S = 10.0
CLOCK_MESSAGES = 64
"""How many recent messages the difference between two machines' clocks is estimated from."""
MATCH_S = 10.0
"""How long a row waits for rank 0 to end the same step, which determines its lag."""
STEPS_REMEMBERED = 4096
LEAVE_S = 20.0
"""How long the end of the run waits for the other processes to end …"""
FAILED_LEAVE_S = 5.0
"""… and how long after rank 0 has failed, when they may wait for it in a collective."""
FAILURE_WAIT_S = 1.5
"""How long a failed rank 0 waits for news of another process whose death may be the cause."""
REASON_CHARACTERS = 300


@dataclass(eq=False)
class Peer:
    """Another training process of the run."""

    rank: int
    label: str
    pid: int
    stream: socket.socket
    child: bool
    """Whether this is a child process of a script, whose steps are independent of rank 0's."""
    step: int = 0
    """Steps completed."""
    at: RankAt | None = None
    notified: int = 0
    """Number of the last `Hold` or `Go` that was sent to the process."""
    shared: mmap.mmap | None = None
    """Memory in which the process keeps its position; see `protocol.ranks.SHARED`."""
    host: str = ""
    """The machine that the process runs on; "" for this one."""
    sent: tuple[RankPosition, float] | None = None
    """The last position received from the process, and when (`time.monotonic`)."""
    clock_differences: deque[float] = field(default_factory=lambda: deque(maxlen=CLOCK_MESSAGES))
    """Arrival minus sending time, in seconds, of the last messages from another machine, each time
    by the clock of its own machine."""
    left: Leave | None = None
    sending: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Not `settimeout`: it makes the socket non-blocking for the thread that reads, too.
        limit = struct.pack("ll", *divmod(int(SEND_TIMEOUT_S * 1e6), 1_000_000))
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    @property
    def name(self) -> str:
        return self.label or f"rank {self.rank}"

    def on_our_clock(self, moment: float) -> float:
        """Convert a time on the clock of the process's machine to this machine's clock; nan while
        the difference between the clocks is unknown.

        The result is late by the shortest latency among the recent messages.
        """
        if not self.host:
            return moment
        return moment + min(self.clock_differences) if self.clock_differences else math.nan

    def position(self) -> ProcessAt | None:
        """The present position of the process; None if unknown."""
        held = self.at is not None and self.at.held
        if self.shared is not None:
            step, number, phase, since = struct.unpack_from(SHARED, self.shared)
            if not 0 <= phase < len(PHASES) or not number:
                return None
            for_s = max(0.0, (time.monotonic_ns() - since) / 1e9)
            ended: Phase = PHASES[phase]
            return ProcessAt(self.rank, step, ended, for_s, held)
        if self.sent is not None and not held:
            position, received = self.sent
            for_s = position.for_s + time.monotonic() - received
            return ProcessAt(self.rank, position.boundary[0], position.phase, for_s, held)
        if self.at is None:
            return None
        return ProcessAt(self.rank, self.at.boundary[0], self.at.phase, 0.0, held)

    def step_in_progress(self) -> int:
        at = self.position()
        return max(self.step + 1, at.step + (at.phase == "step") if at else 0)

    def send(self, message: ToRank) -> None:
        """Send a message. Raises OSError, also when it cannot be sent within SEND_TIMEOUT_S."""
        with self.sending:
            self.stream.sendall(encode(message, MAX_BYTES))


@dataclass
class _Waiting:
    """A row whose lag is not known yet."""

    table: int
    step: int
    ended_at: float
    values: Floats
    since: float


def _ignore_row(rank: int, step: int, values: Floats) -> None:
    pass


def _do_nothing() -> None:
    pass


def _ignore_answer(peer: Peer, message: InspectedThere) -> None:
    pass


@dataclass
class RankServerHooks:
    """Callbacks of the server, called on the thread of a connected process."""

    changed: Callable[[], None] = _do_nothing
    """Called when a process has joined, sent its position, or left."""
    stop_wanted: Callable[[], None] = _do_nothing
    """Called when a process has received a signal to end."""
    row_received: Callable[[int, int, Floats], None] = _ignore_row
    """Called with rank, step and values of each row of another rank."""
    inspected: Callable[[Peer, InspectedThere], None] = _ignore_answer
    """Called with each answer of a process to an inspection request."""


class RankServer:
    """The other training processes of a run. Also a sink of rank 0's recorder, to record rank 0's
    own rows."""

    def __init__(self, recorder: Recorder, own: Rank | None = None) -> None:
        """`own`: rank 0, in a run whose number of processes is known."""
        self._recorder = recorder
        self._own = own
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        self._peers: dict[int, Peer] = {}
        """The connected processes. Replaced, never modified: it is read without the lock."""
        self._processes: dict[int, ProcessInfo] = {}
        self._tables: dict[int, int] = {}
        """Rank → id of its table."""
        self._declared: tuple[Table, ...] = ()
        self._own_ends: OrderedDict[int, float] = OrderedDict()
        """Step → time at which rank 0 ended it."""
        self._waiting: deque[_Waiting] = deque()
        self._failures: list[tuple[float, str]] = []
        """(when a process failed, how); the likely cause of the other failures comes first."""
        self._examined = 0
        """Processes whose end is still being examined and may precede the known failures."""
        self._closing = False
        self.hooks = RankServerHooks()
        self.steps_of_children = 0
        """The largest number of steps that any child process has completed."""
        if own is not None:
            for rank in range(own.world_size):
                state: ProcessState = "waiting" if rank else "running"
                pid = 0 if rank else os.getpid()
                self._processes[rank] = ProcessInfo(rank, pid=pid, state=state)
            self._describe()

    # ------------------------------------------------------------ state, for any thread

    @property
    def several(self) -> bool:
        """Whether the run has, or had, more than one training process."""
        return bool(self._processes)

    @property
    def peers(self) -> list[Peer]:
        """The processes that are currently connected.

        Takes no lock: the recorder reads `peers` while it holds its own lock, and this class takes
        the recorder's lock while it holds `_lock`.
        """
        return list(self._peers.values())

    def positions(self, own: ProcessAt) -> tuple[ProcessAt, ...]:
        """The position of each process; `own` is rank 0's."""
        found = [at for peer in self.peers if (at := peer.position()) is not None]
        if found and self._own is not None:
            found.append(own)
        return tuple(sorted(found, key=lambda at: at.rank))

    def own_ended(self, state: EndState, reason: str) -> None:
        """Record how the training of rank 0 has ended."""
        if self._own is not None:
            self._processes[0] = ProcessInfo(0, "", os.getpid(), state, reason)
            self._describe()

    def first_failure(self, wait_s: float = 0.0) -> str:
        """How the first failed process ended; "" if none has failed."""
        with self._left:
            known = lambda: (self._failures and not self._examined) or not self._peers  # noqa: E731
            self._left.wait_for(known, wait_s)
            return self._failures[0][1] if self._failures else ""

    def wait_until_left(self, timeout: float) -> None:
        """Wait, at the end of the run, until the other processes have sent everything."""
        with self._left:
            self._left.wait_for(lambda: not self._peers, timeout)
            self._closing = True
            peers = list(self._peers.values())
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.stream.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------ a connected process

    def serve(self, stream: socket.socket, join: Join) -> None:
        """Handle the messages of one process until it leaves or dies."""
        peer = self._admit(stream, join)
        if peer is None:
            return
        try:
            peer.send(Joined(peer.rank))
            peer.shared = _receive_shared(stream)
            self.hooks.changed()
            while peer.left is None:
                self._take(peer, read_as(stream.recv, to_rank_zero, MAX_ANSWER_BYTES))
        except (ConnectionClosed, OSError):
            pass
        except ProtocolError as error:
            self._recorder.notice("rank", f"{peer.name} was disconnected: {error}", "error")
        finally:
            self._gone(peer)

    def _admit(self, stream: socket.socket, join: Join) -> Peer | None:
        with self._lock:
            rank, child = join.rank, join.rank < 0
            if child:
                rank = max(self._processes, default=0) + 1
            refusal = ""
            if self._closing or rank >= MAX_PROCESSES:
                refusal = "the run accepts no further processes"
            elif not child and (self._own is None or not 0 < rank < self._own.world_size):
                refusal = f"this run has no rank {rank}"
            elif rank in self._peers:
                refusal = f"rank {rank} is already connected"
            if refusal:
                with contextlib.suppress(OSError):
                    stream.sendall(encode(Refused(refusal)))
                return None
            label = single_line(join.label, 40)
            host = single_line(join.host, 40)
            peer = Peer(rank, label, join.pid, stream, child, host=host)
            self._peers = {**self._peers, rank: peer}
            self._processes[rank] = ProcessInfo(rank, label, join.pid, "running", host=host)
            self._describe()
        return peer

    def _take(self, peer: Peer, message: ToRankZero) -> None:
        match message:
            case RankRows(rows=rows):
                for row in rows:
                    values = np.frombuffer(row.values, "<f4").astype(np.float32)
                    if len(values) != len(schema.RANK_COLUMNS):
                        raise ProtocolError("a row has the wrong number of columns")
                    peer.step = max(peer.step, row.step)
                    if peer.child:
                        self.steps_of_children = max(self.steps_of_children, row.step)
                    self._add(peer.rank, row.step, peer.on_our_clock(row.time), values, peer.child)
                    if not peer.child:
                        self.hooks.row_received(peer.rank, row.step, values)
                self._match()
                if peer.child and not self._own_ends:
                    self._recorder.set_status(step=self.steps_of_children)
            case RankLine(stream=stream, text=text):
                self._recorder.log(stream, f"[{peer.name}] {text}")
            case RankNotice():
                text = f"{peer.name}: {message.text}"
                self._recorder.notice(message.kind, text, message.level, message.step)
            case RankAt():
                peer.at = message
                self.hooks.changed()
            case RankPosition():
                peer.sent = message, time.monotonic()
                peer.clock_differences.append(time.time() - message.time)
            case StopWanted():
                self.hooks.stop_wanted()
            case Leave():
                peer.left = message
            case InspectedThere():
                self.hooks.inspected(peer, message)

    def _gone(self, peer: Peer) -> None:
        ended_at = time.monotonic()
        with self._lock:
            self._examined += 1
        try:
            self._record_end(peer, ended_at)
        finally:
            with self._left:
                self._examined -= 1
                self._left.notify_all()
        self.hooks.changed()

    def _record_end(self, peer: Peer, ended_at: float) -> None:
        """Record how a process ended. A killed process causes the errors in collectives that the
        others report, so it comes before them even if they are reported first."""
        state: ProcessState = "killed"
        if peer.left is not None:
            state, reason = peer.left.state, peer.left.reason[:REASON_CHARACTERS]
            failed = state == "crashed"
            failure = f"{peer.name} crashed at step {peer.left.step:,}: {reason}"
        elif self._closing:
            state, reason, failed, failure = "stopped", "", False, ""
        else:
            if peer.host:  # a process on another machine cannot be examined
                state, ending = "lost", f"closed its connection from {peer.host}"
            else:
                ending = ending_of(peer.pid)
            step = peer.step_in_progress()
            reason, failed = ending, True
            failure = f"{peer.name} {ending} at step {step:,}"
        with self._left:
            self._peers = {r: each for r, each in self._peers.items() if each is not peer}
            self._processes[peer.rank] = ProcessInfo(
                peer.rank, peer.label, peer.pid, state, reason, peer.host
            )
            self._describe()
            if failed and failure not in [text for _, text in self._failures]:
                cause = FAILURE_WAIT_S if peer.left is None else 0.0
                self._failures = sorted([*self._failures, (ended_at - cause, failure)])
                # A lost connection to another machine may be a fault of the network alone.
                self._recorder.notice("rank", failure, "warning" if state == "lost" else "error")
                if not peer.child and state != "lost":
                    self._recorder.set_status(reason=self._failures[0][1])

    def _describe(self) -> None:
        self._recorder.describe(processes=tuple(p for _, p in sorted(self._processes.items())))

    # ------------------------------------------------------------ rows

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Record rank 0's own steps; called at least twice a second."""
        for item in items:
            if isinstance(item, InfoChanged):
                self._declared = item.info.tables
            elif isinstance(item, StepRecorded) and self._processes:
                record = item.record
                values = rank_row(self._declared, record)
                with self._lock:
                    self._own_ends[record.step] = record.time
                    while len(self._own_ends) > STEPS_REMEMBERED:
                        self._own_ends.popitem(last=False)
                if self._own is not None:
                    self._add(0, record.step, record.time, values, False)
        self._match()

    def close(self) -> None:
        """Record the rows whose lag will never be known."""
        self._match(everything=True)

    def _add(self, rank: int, step: int, ended_at: float, values: Floats, alone: bool) -> None:
        with self._lock:
            table = self._tables.get(rank)
            if table is None:
                table = self._tables[rank] = self._recorder.new_table(
                    schema.RANKS, schema.RANK_COLUMNS, rank=rank
                )
            if alone:
                self._recorder.row(table, step, values)
            else:
                self._waiting.append(_Waiting(table, step, ended_at, values, time.monotonic()))

    def _match(self, everything: bool = False) -> None:
        """Record the rows whose lag is known, each table's in order."""
        with self._lock:
            deadline = time.monotonic() - MATCH_S
            blocked: set[int] = set()
            kept: deque[_Waiting] = deque()
            for row in self._waiting:
                own_end = self._own_ends.get(row.step)
                late = everything or row.since < deadline
                if row.table in blocked or (own_end is None and not late):
                    blocked.add(row.table)
                    kept.append(row)
                    continue
                if own_end is not None and not math.isnan(row.ended_at):
                    row.values[schema.RANK_INDEX["lag_ms"]] = (row.ended_at - own_end) * 1e3
                self._recorder.row(row.table, row.step, row.values)
            self._waiting = kept


def _receive_shared(stream: socket.socket) -> mmap.mmap | None:
    """Receive the memory in which a process keeps its position. Raises OSError."""
    _, descriptors, _, _ = socket.recv_fds(stream, 1, 1)
    if not descriptors:
        return None
    try:
        return mmap.mmap(descriptors[0], struct.calcsize(SHARED), prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptors[0])


def ending_of(pid: int, wait_s: float = 0.5) -> str:
    """How a process that closed its connection without a `Leave` has ended.

    The exit status disappears from /proc once the parent has waited for the process, so this is
    called at once.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "died without an exit status (killed by a signal, or os._exit)"
        if fields[0] in ("Z", "X"):
            return _ending(int(fields[49]))
        if time.monotonic() > deadline:
            return "closed its connection"
        time.sleep(0.001)


def _ending(status: int) -> str:
    number = status & 0x7F
    if not number:
        return f"exited with status {status >> 8}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(number).name}"
    return f"was killed by signal {number}"
