"""A training that is changed while it runs equals the same loop with the change written into it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.travel.support import Edited, equal, tiny, weights
from tui_trainer.settings import learning_rates
from tui_trainer.settings.learning_rates import KnownSchedulers
from tui_trainer.trace.gate import Refusal

AT = 5


def coded_by_hand(training, change) -> dict[str, torch.Tensor]:
    """The task's loop, written out; `change(step)` is called before each step and returns the
    factor on the scheduled learning rate and the clip threshold."""
    optimizer, model = training.stateful["optimizer"], training.model
    for step, (inputs, targets) in enumerate(training.batches):
        value, max_norm = change(step)
        for group in optimizer.param_groups:
            group["lr"] = value
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs)
        F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return weights(model)


def _schedule(training):
    rate = training.schedule
    return lambda step: (rate.at(step), 1.0)


def _lr(training):
    rate = training.schedule
    return lambda step: (
        rate.at(step) if step < AT else rate.at(step) / rate.at(AT) * 3e-4,
        1.0,
    )


def _clip(training):
    rate = training.schedule
    return lambda step: (rate.at(step), 1.0 if step < AT else 0.01)


def _groups(key, value, only_nonzero=False):
    def make(training):
        rate, optimizer = training.schedule, training.stateful["optimizer"]

        def change(step):
            if step == AT:
                for group in optimizer.param_groups:
                    if group[key] or not only_nonzero:
                        group[key] = value
            return rate.at(step), 1.0

        return change

    return make


def _freeze(training):
    rate = training.schedule

    def change(step):
        if step == AT:
            for name, parameter in training.model.named_parameters():
                if name.startswith("blocks.0."):
                    parameter.requires_grad_(False)
        return rate.at(step), 1.0

    return change


def _data(**values):
    def make(training):
        rate, batches = training.schedule, training.batches

        def change(step):
            if step == AT - 1:  # seen by the batch after this one
                for name, value in values.items():
                    setattr(batches, name, value)
            return rate.at(step), 1.0

        return change

    return make


CASES = {
    "lr=3e-4": _lr,
    "clip=0.01": _clip,
    "weight_decay=0.5": _groups("weight_decay", 0.5, only_nonzero=True),
    "beta1=0.5 beta2=0.9": _groups("betas", (0.5, 0.9)),
    "freeze=blocks.0.*": _freeze,
    "batch_size=7": _data(batch_size=7),
    "seed=5": _data(seed=5),
}


@pytest.mark.parametrize("text", CASES)
def test_a_changed_training_equals_the_loop_with_the_change_in_it(text):
    changed = tiny()
    edited = Edited(changed.loop, {AT: text}, changed)
    assert len(edited.answers) == 1, edited.notices
    assert edited.answers[0].endswith(f"from step {AT + 1} on")
    by_hand = tiny()
    assert equal(weights(changed.model), coded_by_hand(by_hand, CASES[text](by_hand)))
    plain = tiny()
    assert not equal(weights(changed.model), coded_by_hand(plain, _schedule(plain)))


def test_a_change_that_is_undone_at_once_changes_nothing():
    everything = "lr=1 weight_decay=3 betas=0.1,0.2 clip=off eps=1 seed=4 batch_size=9 freeze=norm*"

    def settings(run):
        listed = {each.name: each.value for each in run.edits.settings().settings}
        listed.pop("lr")  # that of the next step, once it was changed
        return listed

    def change(run):
        before = settings(run)
        run.apply(everything)
        assert settings(run) != before
        run.apply("undo")
        assert settings(run) == before

    training = tiny()
    undone = Edited(training.loop, {AT: change}, training)
    assert [a.startswith("undone: ") for a in undone.answers] == [False, True], undone.notices
    assert undone.notices[1].startswith("undone: lr ")
    plain = tiny()
    assert Edited(plain.loop, {}, plain).notices == []
    assert equal(weights(training.model), weights(plain.model))


def test_images_of_another_batch_size_and_seed():
    changed = tiny("vit")
    edited = Edited(changed.loop, {AT: "batch_size=6 seed=9"}, changed)
    (answer,) = edited.answers
    assert answer == (
        "batch_size 4 → 6 (an epoch has about 239 steps instead of 359); seed 1,337 → 9, "
        f"from step {AT + 1} on"
    ), edited.notices
    other = tiny("vit", batch_size=6, seed=9)
    rate = other.schedule
    by_hand = tiny("vit")
    optimizer = by_hand.stateful["optimizer"]
    batches = iter(by_hand.batches)
    for step in range(12):
        if step == AT:
            by_hand.batches.plan = other.batches.plan
            by_hand.batches.seed = 9
            batches = iter(by_hand.batches)
        images, labels = next(batches)
        assert len(images) == (4 if step < AT else 6)
        for group in optimizer.param_groups:
            group["lr"] = rate.at(step)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(by_hand.model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        optimizer.step()
    assert equal(weights(changed.model), weights(by_hand.model))


# ---------------------------------------------------------------- scripts


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def script(model, optimizer, scheduler=None, before=lambda step: None, after=lambda step: None):
    def loop():
        for step in range(1, 11):
            before(step)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            after(step)
            if scheduler is not None:
                scheduler.step()

    return loop


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 20, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=3),
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_from_the_new_rate(name):
    rates: dict[bool, list[float]] = {True: [], False: []}
    for changed in (True, False):
        model, optimizer = make()
        scheduler = SCHEDULERS[name](optimizer)

        def note(step, seen=rates[changed], optimizer=optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

        loop = script(model, optimizer, scheduler, before=note)
        if changed:
            edited = Edited(loop, {4: "lr=0.01"})
            assert f"(the schedule of {name}" in edited.answers[0], edited.notices
            assert "continues from it)" in edited.answers[0]
        else:
            loop()
    before = rates[False]
    assert rates[True][:4] == before[:4]
    factor = 0.01 / before[3]
    for got, was in zip(rates[True][4:], before[4:], strict=True):
        assert got == pytest.approx(was * factor)


def test_schedulers_are_searched_for_once_and_new_ones_of_the_script_are_found(monkeypatch):
    searches = []
    search = learning_rates.schedulers_of
    monkeypatch.setattr(
        learning_rates, "schedulers_of", lambda o: (searches.append(o), search(o))[1]
    )
    _, optimizer = make()
    holder = [[[SCHEDULERS["StepLR"](optimizer)]]]  # too deep for what variables hold
    known = KnownSchedulers()
    for _ in range(12):
        assert known.of([optimizer]) == holder[0][0]
    assert len(searches) == 4, "the 1st, 2nd, 4th and 8th time"
    added = SCHEDULERS["OneCycleLR"](optimizer)
    assert known.of([optimizer]) == [*holder[0][0], added]
    _, other = make()
    of_other = [[[SCHEDULERS["LambdaLR"](other)]]]
    assert known.of([other]) == of_other[0][0]
    assert len(searches) == 5


def test_without_a_scheduler_the_rate_stays():
    model, optimizer = make()
    Edited(script(model, optimizer), {4: "lr=0.02 momentum=0.5", 7: "undo"})
    by_hand, its = make()

    def change(step):
        for group in its.param_groups:
            group["lr"] = 0.02 if 5 <= step <= 7 else 0.1
            group["momentum"] = 0.5 if 5 <= step <= 7 else 0.9

    script(by_hand, its, before=change)()
    assert equal(weights(model), weights(by_hand))


def test_what_a_script_sets_itself_is_multiplied_from_the_second_step_on():
    model, optimizer = make()

    def set_rate(step, group=optimizer.param_groups[0]):
        group["lr"] = 0.1 / step

    edited = Edited(script(model, optimizer, before=set_rate), {4: "lr=0.0025", 8: "undo"})
    warned = next(text for text in edited.notices if "itself" in text)
    assert warned == (
        "the script itself set the learning rate of step 5 to 0.02; "
        "from step 6 on its values are multiplied by 0.1"
    )
    by_hand, its = make()

    def change(step):
        its.param_groups[0]["lr"] = 0.1 / step * (0.1 if 6 <= step <= 8 else 1.0)

    script(by_hand, its, before=change)()
    assert equal(weights(model), weights(by_hand))


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("betas=0.9,0.99", "sgd has no betas", "it has lr, weight_decay, momentum"),
        ("lr[3]=1", "there is no parameter group 3", "there is only 0"),
        ("clip=1", "no call of torch.nn.utils.clip_grad_norm_ was seen", "clips with it"),
        ("batch_size=4", "batch_size can be changed in the shipped tasks only", "its own"),
        ("freeze=0.wieght", "no parameter matches 0.wieght", "did you mean 0.weight?"),
        ("freeze=*", "that would leave sgd nothing to train", "lr=0"),
        ("unfreeze=*", "all 4 parameters of * are trained", ""),
    ],
)
def test_what_cannot_be_changed_is_refused_and_nothing_else_changes(text, reason, hint):
    model, optimizer = make()
    errors = []

    def refuse(run):
        try:
            run.apply(f"lr=0.5 {text}")
        except Refusal as refusal:
            errors.append(refusal)

    run = Edited(script(model, optimizer), {3: refuse})
    (error,) = errors
    assert reason in error.message
    assert hint in error.hint
    assert run.edits.state.undoable == []
    by_hand, its = make()
    script(by_hand, its)()
    assert equal(weights(model), weights(by_hand))


def test_the_settings_are_listed():
    training = tiny()
    edited = Edited(training.loop, {AT: "lr=3e-4 clip=0.5"}, training)
    before, after = edited.listed[AT], edited.listed[AT + 1]
    assert before["clip"] == 1.0
    assert before["batch_size"] == 4
    assert before["betas"] == (0.9, 0.99)
    assert (before["weight_decay[0]"], before["weight_decay[1]"]) == (0.1, 0.0)
    assert after["clip"] == 0.5
    assert math.isclose(after["lr"], 3e-4)
