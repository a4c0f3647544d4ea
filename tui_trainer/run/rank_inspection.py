"""Inspects the tensors of another rank: rank 0 passes the requests of viewers on to the process of
that rank, which answers them at its own gate."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from msgspec import structs

from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.framing import ProtocolError
from tui_trainer.protocol.inspection import Inspect, Inspected, OfRank
from tui_trainer.protocol.ranks import InspectedThere, InspectThere
from tui_trainer.run.inspection import WAIT_S, Inspections
from tui_trainer.run.rank_client import RankClient
from tui_trainer.run.rank_server import Peer, RankServer


@dataclass
class _Passed:
    """The latest request of a viewer to another rank."""

    peer: Peer
    id: int
    awaited: bool = False
    """Whether the rank has been asked and has not answered."""
    answer: Inspected | None = None


class RankInspections:
    """Rank 0's side. Thread-safe: each viewer's requests come on its own thread."""

    def __init__(self, ranks: RankServer) -> None:
        self._ranks = ranks
        self._passed: dict[int, _Passed] = {}
        self._arrived = threading.Condition()
        ranks.hooks.inspected = self._take

    def answer(self, viewer: int, number: int, request: OfRank) -> Inspected:
        """The answer of another rank, or `pending`. Raises UserError where it cannot answer."""
        peer = self._peer(request.rank)
        with self._arrived:
            passed = self._passed.get(viewer)
            if passed is None or passed.peer is not peer or passed.id != number:
                passed = self._passed[viewer] = _Passed(peer, number)
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
            raise UserError("this run trains in one process", "without a rank it is looked into")
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
    """Have the requests that rank 0 passes on answered, each on a thread of its own: the thread
    that reads must not wait for the training."""

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
