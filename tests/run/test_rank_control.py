"""All processes stop at the same boundary, whatever they wait for: threads in place of processes,
barriers in place of collectives."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.runs.starting import until
from tui_trainer.protocol import PHASES
from tui_trainer.run.rank_client import RankClientHooks
from tui_trainer.run.rank_control import RankControl, RankFollower
from tui_trainer.run.rank_server import RankServerHooks
from tui_trainer.trace.gate import Gate, StopTraining


class Link:
    """The connection of one process, without a socket: both ends."""

    child = False

    def __init__(self, rank, changed, paused):
        self.rank = rank
        self.at = None
        self.notified = 0
        self.gate = Gate(paused)
        self.hooks = RankClientHooks()
        self._changed = changed
        RankFollower(self.gate).follow(self)

    @property
    def step(self):
        return self.gate.completed

    def send(self, message):
        """Of rank 0 to the process, or of the process to rank 0."""
        if type(message).__name__ == "RankAt":
            self.at = message
            self._changed()
        else:
            self.hooks.message(message)


class Group:
    """Processes that make steps together until they are stopped."""

    def __init__(self, size, seed=0, paused=False):
        self.peers = []
        self.hooks = RankServerHooks()
        self.gate = Gate(paused)
        self.control = RankControl(self.gate, self)
        self.gate.hooks.changed = self.control.wake
        self.peers = [Link(rank, self.control.wake, paused) for rank in range(1, size)]
        self.gates = [self.gate, *(link.gate for link in self.peers)]
        self.barrier = threading.Barrier(size)
        self.ended = []
        self.threads = [
            threading.Thread(target=self._train, args=(gate, seed + number), daemon=True)
            for number, gate in enumerate(self.gates)
        ]
        for thread in self.threads:
            thread.start()
        self.control.wake()

    def _train(self, gate, seed):
        chance = random.Random(seed)
        step = 0
        try:
            while True:
                step += 1
                for phase in PHASES:
                    if chance.random() < 0.05:
                        time.sleep(chance.random() * 0.002)
                    if phase in ("forward", "backward"):
                        self.barrier.wait(240)
                    gate.reached(phase, step)
        except (StopTraining, threading.BrokenBarrierError) as end:
            self.ended.append((type(end), step))
            self.barrier.abort()

    def together(self):
        """The boundary at which all are held; None while they are not."""
        places = {gate.boundary for gate in self.gates}
        held = all(gate.mode == "paused" for gate in self.gates)
        return places.pop() if held and len(places) == 1 else None

    def held(self):
        return until(self.together, "all are held at one boundary")

    def moves_on(self):
        before = self.gate.completed
        until(lambda: self.gate.completed > before + 1, "steps are made")

    def close(self):
        self.barrier.abort()
        for gate in self.gates:
            gate.end()


@pytest.fixture(params=[2, 5])
def group(request):
    made = Group(request.param)
    yield made
    made.close()


def test_pauses_hold_all_at_one_boundary(group):
    for _ in range(20):
        group.moves_on()
        group.control.pause()
        group.held()
        group.control.resume()


def test_phases_are_stepped_by_all(group):
    step_phases(group, 2 * len(PHASES))


def test_one_that_has_reached_its_boundary_and_not_stopped_there_yet_is_not_past_it(monkeypatch):
    """Or the boundary would be moved one further."""
    chance = random.Random(0)
    monkeypatch.setattr(Gate, "_note_time", lambda *_: time.sleep(0.03 * (chance.random() < 0.2)))
    group = Group(3)
    group.gate.times_boundaries = True
    try:
        step_phases(group, 2 * len(PHASES))
    finally:
        group.close()


def test_one_that_leaves_its_boundary_late_is_not_waited_for_there(monkeypatch):
    """It would wait for the others in the collective of the forward, and they for it at the
    boundary before."""
    first, leave, reached = [], Gate._leave, Gate.reached

    def late(gate, phase):
        if gate in first and phase == "zero_grad":
            time.sleep(0.3)
        leave(gate, phase)

    def behind(gate, phase, step):
        if gate not in first and phase == "zero_grad":
            time.sleep(0.15)
        reached(gate, phase, step)

    monkeypatch.setattr(Gate, "_leave", late)
    monkeypatch.setattr(Gate, "reached", behind)
    group = Group(3)
    first.append(group.peers[0].gate)
    try:
        for _ in range(3):
            group.moves_on()
            until(lambda: group.gate.boundary < first[0].boundary, "rank 0 is behind")
            group.control.pause()
            group.held()
            group.control.resume()
    finally:
        group.close()


def step_phases(group, count):
    group.moves_on()
    group.control.pause()
    step, number = group.held()
    for _ in range(count):
        group.control.step_phase()
        following = (step, number + 1) if number < len(PHASES) else (step + 1, 1)
        until(lambda wanted=following: group.together() == wanted, f"{following} is reached")
        step, number = following


def test_steps_are_made_by_all(group):
    group.moves_on()
    for count in (1, 3, 1):
        group.control.step(count)
        step, number = group.held()
        assert number == len(PHASES)
        group.control.step(count)
        until(lambda s=step, n=count: group.together() == (s + n, len(PHASES)), "the steps")
        group.control.resume()


def test_all_end_at_the_same_step(group):
    group.moves_on()
    group.control.stop()
    for thread in group.threads:
        thread.join(240)
    assert len(set(group.ended)) == 1
    assert group.ended[0][0] is StopTraining


class AlwaysMet:
    """Breakpoints of which one is met at every step."""

    def reached(self, phase, step):
        return True


def test_a_breakpoint_that_is_met_again_does_not_keep_all_from_stopping(group):
    group.moves_on()
    group.gate.hooks.breakpoint_reached = group.control.pause_at_breakpoint
    group.gate.breakpoints = AlwaysMet()
    group.gate.break_phases = frozenset({"step"})
    group.held()
    group.control.stop()
    for thread in group.threads:
        thread.join(240)
    assert len(set(group.ended)) == 1
    assert group.ended[0][0] is StopTraining


def test_a_run_that_starts_paused_is_held_before_its_first_step():
    group = Group(3, paused=True)
    try:
        assert group.held() == (1, 1)
        group.control.resume()
        group.moves_on()
    finally:
        group.close()
