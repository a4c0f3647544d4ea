"""Requests of viewers over a real socket: pending, done, failed, replaced, and the end."""

from __future__ import annotations

import itertools
import threading

import pytest

from tests.run.test_server import Peer, Rig, wait_for
from tui_trainer.protocol import PHASES
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.inspection import (
    Inspect,
    ListTensors,
    ReadTensor,
    Summarize,
    TensorInfo,
    TensorList,
    TensorRef,
)
from tui_trainer.protocol.messages import Poll, Update
from tui_trainer.run.control import CommandHandler
from tui_trainer.run.inspection import Inspections
from tui_trainer.run.server import Server

WEIGHT = TensorInfo(TensorRef("weight"), (10,), "uint8", "cpu", 10)


class Copy:
    info = WEIGHT

    def part(self, offset):
        return bytes(range(offset, min(10, offset + 4)))


class FakeInspector:
    def __init__(self):
        self.asked = []
        self.threads = set()

    def answer(self, request):
        self.asked.append(request)
        self.threads.add(threading.get_ident())
        match request:
            case ReadTensor():
                return Copy()
            case Summarize(tensor=ref) if ref.name == "odd":
                raise NotImplementedError("aten::odd")
            case Summarize(tensor=ref):
                raise UserError(f"there is no {ref.name}", "look it up")
        return TensorList((WEIGHT,))


class InspectedRig(Rig):
    def __init__(self, path):
        super().__init__(path / "unused.sock")
        self.server.close()
        self.inspections = Inspections(self.gate)
        self.inspector = self.inspections.inspector = FakeInspector()
        control = CommandHandler(self.gate, self.recorder, lambda _: None, lambda: None)
        self.path = path / "run.sock"
        self.server = Server("r", self.recorder, control, inspections=self.inspections)
        self.server.listen(self.path)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._train, daemon=True)

    def _train(self):
        for step in itertools.count(1):
            for phase in PHASES:
                if self.over.wait(0.001):
                    return self.gate.end()
                self.gate.reached(phase, step)

    def inspect(self, peer: Peer, request, number: int):
        while True:
            answer = peer.ask(Inspect(number, request))
            assert answer.id == number
            if answer.state != "pending":
                return answer


@pytest.fixture
def rig(tmp_path):
    made = InspectedRig(tmp_path)
    yield made
    made.over.set()
    made.gate.end()
    made.server.close()
    made.recorder.close(240)


def test_a_request_is_carried_out_on_the_training_thread_after_a_step(rig):
    rig.thread.start()
    with rig.viewer(read_only=True) as peer:
        answer = rig.inspect(peer, ListTensors(), 1)
        assert answer.state == "done"
        assert answer.result == TensorList((WEIGHT,))
        assert answer.phase == "step"
        assert answer.step > 0
        assert rig.inspector.threads == {rig.thread.ident}


def test_while_paused_it_is_carried_out_within_the_step(rig):
    rig.thread.start()
    with rig.viewer() as peer:
        rig.gate.pause()
        wait_for(lambda: rig.gate.mode == "paused")
        while rig.gate.phase != "backward":
            rig.gate.step_phase()
            wait_for(lambda: rig.gate.mode == "paused")
        answer = rig.inspect(peer, ListTensors(), 1)
        assert (answer.state, answer.phase) == ("done", "backward")
        assert answer.step == rig.gate.step_in_progress


def test_it_is_pending_while_there_is_no_boundary_and_polls_are_answered(rig):
    with rig.viewer() as peer:  # nothing trains yet
        for _ in range(3):
            pending = peer.ask(Inspect(1, ListTensors()))
            assert pending.state == "pending"
            assert pending.message == "waiting for the end of the current step"
            assert isinstance(peer.ask(Poll()), Update)
        rig.thread.start()
        assert rig.inspect(peer, ListTensors(), 1).state == "done"
        assert rig.inspector.asked == [ListTensors()]


def test_a_new_request_replaces_the_pending_one(rig):
    with rig.viewer() as peer:
        assert peer.ask(Inspect(1, ListTensors())).state == "pending"
        assert peer.ask(Inspect(2, Summarize(TensorRef("bias")))).state == "pending"
        rig.thread.start()
        answer = rig.inspect(peer, Summarize(TensorRef("bias")), 2)
        assert (answer.message, answer.hint) == ("there is no bias", "look it up")
        assert rig.inspector.asked == [Summarize(TensorRef("bias"))]


def test_a_viewer_that_leaves_takes_its_request_with_it(rig):
    with rig.viewer() as peer:
        assert peer.ask(Inspect(1, ListTensors())).state == "pending"
    wait_for(lambda: not rig.server._connections)
    assert not rig.inspections._requests
    rig.thread.start()
    wait_for(lambda: rig.gate.completed > 2)
    assert rig.inspector.asked == []


def test_a_fault_is_an_answer_and_the_training_continues(rig):
    rig.thread.start()
    with rig.viewer() as peer:
        answer = rig.inspect(peer, Summarize(TensorRef("odd")), 1)
        assert (answer.state, answer.message) == ("failed", "NotImplementedError: aten::odd")
        before = rig.gate.completed
        wait_for(lambda: rig.gate.completed > before)
        assert rig.inspect(peer, ListTensors(), 2).state == "done"


def test_a_tensor_is_copied_once_and_sent_in_parts(rig):
    rig.thread.start()
    ref = WEIGHT.ref
    with rig.viewer() as peer:
        parts = [rig.inspect(peer, ReadTensor(ref, offset), 1 + offset) for offset in (0, 4, 8)]
        assert b"".join(part.result.data for part in parts) == bytes(range(10))
        assert {part.result.total for part in parts} == {10}
        assert rig.inspector.asked == [ReadTensor(ref)]
        assert not rig.inspections._copies
        gone = rig.inspect(peer, ReadTensor(ref, 4), 20)
        assert (gone.state, gone.message) == ("failed", "the copy of the tensor is gone")


def test_before_the_training_and_after_its_end_the_reason_is_given(rig):
    with rig.viewer() as peer:
        rig.inspections.inspector, kept = None, rig.inspections.inspector
        answer = rig.inspect(peer, ListTensors(), 1)
        assert (answer.state, answer.message) == ("failed", "no model has been called yet")
        rig.inspections.inspector = kept
        assert peer.ask(Inspect(2, ListTensors())).state == "pending"
        rig.gate.end()
        for number in (2, 3):
            answer = rig.inspect(peer, ListTensors(), number)
            assert (answer.state, answer.message) == ("failed", "the training has ended")


def test_a_run_without_tensors_says_so(tmp_path):
    rig = Rig(tmp_path / "run.sock")
    try:
        with rig.viewer() as peer:
            answer = peer.ask(Inspect(1, ListTensors()))
            assert (answer.state, answer.message) == ("failed", "this run has no tensors")
    finally:
        rig.server.close()
        rig.recorder.close(240)
