"""The loops around a call, read from the source: their lengths, and why they are not known."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import textwrap

import pytest
import torch
from torch.utils.data import DataLoader

from tui_trainer.run.loop_length import loop_nest
from tui_trainer.run.progress import EPOCHS, TOTAL, length_of


@pytest.fixture
def run(tmp_path):
    """Run the source of a loop that calls `step()`; returns what the first steps tell."""

    def execute(source, steps=4, forwards=None, **names):
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location("train", path)
        module = importlib.util.module_from_spec(spec)
        samples = []
        counted = []
        calls = 0

        def forward():
            nonlocal calls
            calls += 1

        class Enough(Exception):
            pass

        def step():
            nonlocal calls
            frames, frame = [], sys._getframe(1)
            while frame.f_code.co_filename == str(path):
                frames.append(frame)
                frame = frame.f_back
            samples.append(loop_nest(frames))
            counted.append(calls)
            calls = 0
            if len(samples) == steps:
                raise Enough

        module.__dict__.update(names, step=step, forward=forward)
        with contextlib.suppress(Enough):
            spec.loader.exec_module(module)
        return length_of(samples, counted)

    return execute


def loader(length, batch):
    return DataLoader(torch.zeros(length * batch, 1), batch)


class Namespace:
    def __init__(self, **values):
        self.__dict__.update(values)

    calls = 0

    @property
    def computed(self):
        Namespace.calls += 1
        return 20


@pytest.mark.parametrize(
    ("source", "total", "per_epoch"),
    [
        ("for i in range(30): step()", 30, None),
        ("for i in range(10, 30, 2): step()", 10, None),
        ("for epoch in range(3):\n    for i in range(7): step()", 21, 7),
        ("for epoch in range(3):\n    for x in data: step()", 15, 5),
        ("for epoch in range(args.epochs):\n    for x in data: step()", 20, 5),
        ("for e in range(1, args.epochs + 1):\n  for i, x in enumerate(data, 1): step()", 20, 5),
        ("def f(data):\n  for x in data: step()\nfor e in range(2): f(data)", 10, 5),
        ("class T:\n  def __init__(s): s.n = 6\n  def go(s):\n    for i in range(s.n): step()\n"
         "T().go()", 6, None),
        ("i = 0\nwhile i < 12:\n    step(); i += 1", 12, None),
        ("i = 0\nwhile True:\n    step(); i += 1\n    if i > args.last: break", 9, None),
        ("for epoch in range(3):\n  for x in zip(data, range(4)): step()", 12, 4),
        ("for epoch in range(2):\n  for x in data:\n    if args.amp:\n      step()\n    forward()",
         10, 5),
        # Two optimizers take turns.
        ("for epoch in range(2):\n  for x in data:\n    step()\n    step()", 20, 10),
        # Every second batch, by the number of the batch and by the calls of the model.
        ("for epoch in range(3):\n  for i, x in enumerate(six):\n    forward()\n"
         "    if i % 2: step()", 9, 3),
        ("n = 0\nfor epoch in range(3):\n  for x in six:\n    forward(); n += 1\n"
         "    if n % 2 == 0: step()", 9, 3),
        ("try:\n  for i in range(5):\n    with open('/dev/null'): step()\nfinally: pass", 5, None),
    ],
)  # fmt: skip
def test_what_is_known(run, source, total, per_epoch):
    given = Namespace(epochs=4, last=8, amp=True)
    found = run(source, data=loader(5, 2), six=loader(6, 2), args=given)
    assert (found.total_steps, found.steps_per_epoch) == (total, per_epoch), found.unseen


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("step()", "not called in a loop"),
        ("while True: step()", r"while True: step\(\) \(train.py, line 1\): `True` does not"),
        ("for i in iter(int, 1): step()", "iter"),
        ("for x in make(): step()", r"make\(\)"),
        ("for i in range(args.computed): step()", "args.computed is computed"),
        ("for i in range(missing()): step()", r"missing\(\) is computed"),
        (
            "for e in range(2):\n  for i, x in enumerate(data):\n    if i % 3 == 0: step()",
            "multiple",
        ),
        ("for i in range(9):\n  step()\nfor i in range(9):\n  step()", None),
    ],
)
def test_why_it_is_not_known(run, source, why):
    found = run(
        source,
        steps=3,
        data=loader(5, 2),
        args=Namespace(),
        make=lambda: (x for x in range(99)),
        missing=lambda: 20,
    )
    if why is None:
        assert found.total_steps == 9
        return
    assert found.total_steps is None
    assert Namespace.calls == source.count("args.computed")  # the script's own
    Namespace.calls = 0
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.unseen[TOTAL])
    assert found.unseen[EPOCHS]


def test_steps_in_different_loops(run):
    found = run("for i in range(9):\n  for j in range(1): step()\n  for k in range(1): step()")
    assert "different loops" in found.unseen[TOTAL]


def test_tqdm_knows_its_total(run):
    tqdm = pytest.importorskip("tqdm").tqdm
    bar = tqdm(iter([1] * 6), total=6, disable=True)
    names = {"bar": bar, "tqdm": tqdm, "data": [1] * 8}
    assert run("for x in bar: step()", **names).total_steps == 6
    assert run("for x in tqdm(data, disable=True): step()", **names).total_steps == 8
    source = "for x in tqdm(iter(data), total=8, disable=True): step()"
    assert run(source, **names).total_steps == 8


def test_no_variable_is_kept_alive():
    import weakref

    def loop():
        for _ in range(1):
            held = Namespace()
            found = loop_nest([sys._getframe()])
        reference = weakref.ref(held)
        del held
        return found, reference()

    found, kept = loop()
    assert found.loops[0].length == 1
    assert kept is None


def test_a_first_step_that_comes_late(run):
    """As that of an agent that learns after it has acted for a while."""
    source = """
        for number in range(700):
            if number > 500:
                if number % 10 == 0:
                    step()
    """
    assert run(source).total_steps == len(range(510, 700, 10))
