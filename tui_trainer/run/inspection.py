"""Passes viewers' requests to inspect tensors to the training thread, and its answers back. A
request about another rank goes to that rank's process, which answers it at its own gate."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import structs

from tui_trainer.protocol import Phase
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.framing import ProtocolError
from tui_trainer.protocol.inspection import (
    Inspect,
    Inspected,
    InspectionRequest,
    InspectionResult,
    OfRank,
    ReadTensor,
    TensorData,
)
from tui_trainer.protocol.ranks import InspectedThere, InspectThere
from tui_trainer.protocol.settings import ReadSettings
from tui_trainer.protocol.text import single_line
from tui_trainer.protocol.travel import (
    EstimateCost,
    Experiment,
    ExperimentResult,
    FindLearningRate,
    MeasureLandscape,
    ReadTimeline,
    WhatIf,
)
from tui_trainer.run.rank_client import RankClient
from tui_trainer.run.rank_server import Peer, RankServer
from tui_trainer.trace.gate import Gate

if TYPE_CHECKING:
    from tui_trainer.inspector.inspector import Inspector, TensorCopy
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.travel.time_travel import TimeTravel

WAIT_S = 0.2
"""How long a viewer's thread waits before it answers that a request is pending."""
NO_MODEL = "no model has been called yet"


@dataclass(frozen=True)
class _Answer:
    """The training thread's answer to a request, with the step and phase in which it was found."""

    result: InspectionResult | TensorCopy
    step: int
    phase: Phase | Literal[""]
    took_ms: float


@dataclass
class _RunningRequest:
    """The latest request of a viewer."""

    id: int
    future: Future[_Answer]


class OtherRanks(Protocol):
    """Answers requests about the tensors of other ranks."""

    def answer(self, viewer: int, number: int, request: OfRank) -> Inspected:
        """The answer to request `number` of a viewer. Raises UserError."""

    def left(self, viewer: int) -> None:
        """Forget a viewer that has disconnected."""


class Inspections:
    """Carries out requests at the gate: at once while paused, otherwise after the current step.

    Each viewer has one request at a time. Thread-safe: each viewer's requests arrive on that
    viewer's thread.
    """

    def __init__(self, gate: Gate) -> None:
        self.inspector: Inspector | None = None
        self.edits: LiveEdits | None = None
        self.travel: TimeTravel | None = None
        """`inspector`, `edits` and `travel` are None until the training begins."""
        self.others: OtherRanks | None = None
        """None in a process other than rank 0's."""
        self._gate = gate
        self._lock = threading.Lock()
        self._requests: dict[int, _RunningRequest] = {}
        self._copies: dict[int, TensorCopy] = {}
        """Viewer → copy of the tensor that it fetches in parts."""

    def answer(self, viewer: int, message: Inspect) -> Inspected:
        """The answer to a message; never raises."""
        try:
            match message.request:
                case OfRank(rank=0, request=request):
                    return self.answer(viewer, Inspect(message.id, request))
                case OfRank():
                    return self._of_rank(viewer, message.id, message.request)
                case ReadTensor(offset=offset) if offset > 0:
                    return self._next_part(viewer, message.id, offset)
            begun = self._begun(viewer, message)
            answer = begun.future.result(WAIT_S)
        except NotYet:
            paused = self._gate.mode == "paused"
            waiting = "" if paused else "waiting for the end of the current step"
            return Inspected(message.id, "pending", message=waiting)
        except CancelledError:
            return _failed(message, "the training has ended")
        except UserError as error:
            return _failed(message, error.message, error.hint)
        except Exception as error:
            return _failed(message, f"{type(error).__name__}: {single_line(str(error), 300)}")
        finally:
            self._forget_done(viewer)
        return self._inspected(viewer, message.id, answer)

    def _of_rank(self, viewer: int, number: int, request: OfRank) -> Inspected:
        if self.others is None:
            raise UserError("requests about other ranks go to rank 0")
        return self.others.answer(viewer, number, request)

    def left(self, viewer: int) -> None:
        """Forget a viewer that has disconnected."""
        if self.others is not None:
            self.others.left(viewer)
        with self._lock:
            request = self._requests.pop(viewer, None)
            self._copies.pop(viewer, None)
        if request is not None:
            request.future.cancel()

    def _begun(self, viewer: int, message: Inspect) -> _RunningRequest:
        """The request of `message`: the pending one if it has the same id, otherwise a new one."""
        with self._lock:
            known = self._requests.get(viewer)
            if known is not None and known.id == message.id:
                return known
            self._copies.pop(viewer, None)
        if known is not None:
            known.future.cancel()
        if self.inspector is None:
            raise UserError(NO_MODEL)
        experiment = message.request
        if isinstance(experiment, WhatIf | FindLearningRate | MeasureLandscape):
            future = self._experiment(experiment)
        else:
            future = self._gate.call_soon(lambda: self._run(message.request), when_paused=True)
        request = _RunningRequest(message.id, future)
        with self._lock:
            self._requests[viewer] = request
        return request

    def _experiment(self, experiment: Experiment) -> Future[_Answer]:
        """Begin an experiment. Raises UserError."""
        if self.travel is None:
            raise UserError(NO_MODEL)
        began = time.perf_counter()

        def answered(result: ExperimentResult) -> _Answer:
            took_ms = (time.perf_counter() - began) * 1e3
            return _Answer(result, self._gate.current_step, self._gate.phase, took_ms)

        return self.travel.experiment(experiment, answered)

    def _run(self, request: InspectionRequest) -> _Answer:
        """Carry out a request. Called on the training thread."""
        assert self.inspector is not None
        began = time.perf_counter()
        result: InspectionResult | TensorCopy
        if isinstance(request, ReadSettings) and self.edits is not None:
            result = self.edits.settings()
        elif isinstance(request, ReadTimeline) and self.travel is not None:
            result = self.travel.timeline()
        elif isinstance(request, EstimateCost):
            if self.travel is None:
                raise UserError(NO_MODEL)
            result = self.travel.cost(request.experiment)
        else:
            result = self.inspector.answer(request)
        took_ms = (time.perf_counter() - began) * 1e3
        return _Answer(result, self._gate.current_step, self._gate.phase, took_ms)

    def _forget_done(self, viewer: int) -> None:
        with self._lock:
            known = self._requests.get(viewer)
            if known is not None and known.future.done():
                del self._requests[viewer]

    def _inspected(self, viewer: int, number: int, answer: _Answer) -> Inspected:
        result = answer.result
        if not isinstance(result, InspectionResult):
            with self._lock:
                self._copies[viewer] = result
            result = self._part_of(viewer, result, 0)
        return Inspected(number, "done", result, answer.step, answer.phase, answer.took_ms)

    def _next_part(self, viewer: int, number: int, offset: int) -> Inspected:
        with self._lock:
            copy = self._copies.get(viewer)
        if copy is None:
            raise UserError("the copy of the tensor is gone", "fetch it again from its beginning")
        return Inspected(number, "done", self._part_of(viewer, copy, offset))

    def _part_of(self, viewer: int, copy: TensorCopy, offset: int) -> TensorData:
        """The part of `copy` at `offset` (bytes). The last part releases the copy."""
        data = copy.part(offset)
        if offset + len(data) >= copy.info.bytes:
            with self._lock:
                self._copies.pop(viewer, None)
        return TensorData(copy.info, copy.info.bytes, offset, data)


def _failed(message: Inspect, why: str, hint: str = "") -> Inspected:
    return Inspected(message.id, "failed", message=why, hint=hint)


@dataclass
class _ForwardedRequest:
    """The latest request of a viewer to another rank."""

    peer: Peer
    id: int
    awaited: bool = False
    """Whether the rank has been asked and has not answered."""
    answer: Inspected | None = None


class RankInspections:
    """Forwards viewers' requests from rank 0 to other ranks. Thread-safe: each viewer's requests
    arrive on that viewer's thread."""

    def __init__(self, ranks: RankServer) -> None:
        self._ranks = ranks
        self._passed: dict[int, _ForwardedRequest] = {}
        self._arrived = threading.Condition()
        ranks.hooks.inspected = self._take

    def answer(self, viewer: int, number: int, request: OfRank) -> Inspected:
        """The answer of another rank, or `pending`. Raises UserError where it cannot answer."""
        peer = self._peer(request.rank)
        with self._arrived:
            passed = self._passed.get(viewer)
            if passed is None or passed.peer is not peer or passed.id != number:
                passed = self._passed[viewer] = _ForwardedRequest(peer, number)
            asks = passed.answer is None and not passed.awaited
            passed.awaited = passed.awaited or asks
        if asks:
            self._send(peer, InspectThere(viewer, Inspect(number, request.request)))
        with self._arrived:
            self._arrived.wait_for(lambda: passed.answer is not None, 2 * WAIT_S)
            answer, passed.answer = passed.answer, None
        return answer or Inspected(number, "pending", message=f"waiting for {peer.name}")

    def left(self, viewer: int) -> None:
        """Forget a viewer that has disconnected."""
        with self._arrived:
            passed = self._passed.pop(viewer, None)
        if passed is not None and passed.peer in self._ranks.peers:
            self._send(passed.peer, InspectThere(viewer, None))

    def _peer(self, rank: int) -> Peer:
        peers = self._ranks.peers
        found = next((peer for peer in peers if peer.rank == rank), None)
        if found is not None:
            return found
        if not self._ranks.several:
            raise UserError("this run trains in one process", "leave out the rank")
        others = ", ".join(str(peer.rank) for peer in sorted(peers, key=lambda peer: peer.rank))
        hint = f"connected are 0, {others}" if others else "only rank 0 is connected"
        raise UserError(f"rank {rank} is not connected", hint)

    def _send(self, peer: Peer, message: InspectThere) -> None:
        try:
            peer.send(message)
        except (OSError, ProtocolError) as error:
            if message.message is not None:
                raise UserError(f"{peer.name} cannot be asked: {error}") from error

    def _take(self, peer: Peer, message: InspectedThere) -> None:
        """Called on the thread of the connected process."""
        with self._arrived:
            passed = self._passed.get(message.viewer)
            if passed is not None and passed.peer is peer and passed.id == message.answer.id:
                passed.answer = structs.replace(message.answer, rank=peer.rank)
                passed.awaited = False
                self._arrived.notify_all()


def answer_rank_zero(inspections: Inspections, client: RankClient) -> None:
    """Answer the requests that rank 0 forwards to this process, each on its own thread: the thread
    that reads from the connection must not wait for the training."""

    def answer(viewer: int, message: Inspect) -> None:
        client.send(InspectedThere(viewer, inspections.answer(viewer, message)))

    def asked(request: InspectThere) -> None:
        if request.message is None:
            inspections.left(request.viewer)
            return
        threading.Thread(
            target=answer,
            args=(request.viewer, request.message),
            name="tui-trainer rank inspection",
            daemon=True,
        ).start()

    client.hooks.asked = asked
