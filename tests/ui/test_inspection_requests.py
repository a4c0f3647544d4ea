"""Only the answer to the newest request of a screen is used."""

from __future__ import annotations

from types import SimpleNamespace

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.inspection import DescribeUse, Inspected, ListTensors, TensorList
from tui_trainer.ui.screens.inspection_requests import InspectionRequests


def requests_of_a_screen():
    sent = []
    app = SimpleNamespace(
        inspect=lambda request, *then: sent.append((request, *then)),
        snapshot=Snapshot(),
        inspected_rank=0,
    )
    return InspectionRequests(SimpleNamespace(app=app, is_mounted=True)), sent


def test_an_answer_that_comes_after_the_next_request_is_dropped():
    requests, sent = requests_of_a_screen()
    answers, given_up = [], []
    requests.send(ListTensors(), answers.append, lambda: given_up.append("list"))
    requests.send(DescribeUse(), answers.append, lambda: given_up.append("use"))
    assert given_up == ["list"]
    (_, first, _), (_, second, _) = sent
    first(Inspected(0, "failed", message="late"))
    assert not answers
    assert isinstance(requests.pending, DescribeUse)
    second(Inspected(1, "done", message="in time"))
    assert [each.message for each in answers] == ["in time"]
    assert requests.pending is None


def test_a_request_that_another_screen_replaces_is_given_up_once():
    requests, sent = requests_of_a_screen()
    given_up = []
    requests.send(ListTensors(), lambda answer: None, lambda: given_up.append(1))
    _, _, replaced = sent[0]
    replaced()
    replaced()
    assert given_up == [1]
    assert requests.pending is None


def test_a_result_takes_the_place_of_a_refusal():
    requests, _ = requests_of_a_screen()
    refused = Inspected(0, "failed", message="no tensors", hint="wait")
    assert requests.result(refused, TensorList) is None
    assert requests.refusal == ("no tensors", "wait")
    tensors = TensorList(())
    assert requests.result(Inspected(1, "done", tensors, step=3), TensorList) is tensors
    assert requests.refusal == ("", "")
    assert requests.read_at == "step 3"


def test_another_screen_that_inspects_comes_first():
    requests, _ = requests_of_a_screen()
    screen = requests._screen
    screen.app.screen = screen
    assert requests.in_front
    screen.app.screen = SimpleNamespace()  # a dialog
    assert requests.in_front
    screen.app.screen = SimpleNamespace(requests=InspectionRequests(screen))
    assert not requests.in_front
