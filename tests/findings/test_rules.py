"""Every rule on a run with its bug, and on the clean twin of that run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.findings.synthetic import NAMES, NO_LOSS, Run
from tui_trainer.findings.observation import RECENT_LOSSES, LossTrend
from tui_trainer.findings.rules import RULES
from tui_trainer.history.records import (
    BadBatch,
    BatchRecord,
    BatchTensor,
    InitialWeight,
    LabelCounts,
    LossGraph,
    Producer,
    UnitsRecord,
    UnitsShare,
    WeightDecay,
)
from tui_trainer.protocol.absent import Absent, absent

nan, inf = math.nan, math.inf
NOT_REACHED = absent(Absent.NOT_REACHED)
Case = Callable[[bool], Run]
"""bug or not → the run."""


def gradients_kept(bug):
    run = Run()
    for number in range(1, 20):
        run.step(signs=["kept_gradients"] if bug and number > 1 else [])
    return run


def zeroed_before_step(bug):
    run = Run()
    for _ in range(10):
        if bug:
            run.skip()
            run.step(NO_LOSS, norm=0.0, gradients=[0.0] * 8)
        else:
            run.step()
    return run


def no_gradients(bug):
    run = Run()
    why = absent(Absent.NOT_REACHED)
    for _ in range(10):
        run.step(
            NO_LOSS if bug else None,
            norm=absent(Absent.NO_GRADIENTS) if bug else 1.0,
            gradients=[why] * 8 if bug else None,
        )
    return run


def not_in_optimizer(bug):
    run = Run(outside=NAMES[2:4])
    for _ in range(10):
        gradients = [0.3] * 8
        if not bug:
            gradients[2] = gradients[3] = absent(Absent.NOT_REACHED)
        run.step(gradients=gradients)
    return run


FORGOTTEN = ("body.weight", "head.weight", "head.bias", "out.bias", *NAMES[:3], "param_7")
"""Names of a model, and of a parameter of the optimizer that no model has."""
BIASES = {"head.bias": (1,), "out.bias": (1,), "param_7": (1,)}


def run_with_orphan(reached=(), **changed):
    """Twenty steps in which backward reaches the model, and param_7 only if it is in `reached`."""
    run = Run(names=FORGOTTEN, **changed)
    for _ in range(20):
        gradients = [0.3 if name != "param_7" or name in reached else NOT_REACHED
                     for name in FORGOTTEN]  # fmt: skip
        run.step(gradients=gradients)
    return run.found


def test_forgotten_head_is_not_said_to_be_replaced_for_a_shape_of_its_bias():
    head = ("head.weight", "head.bias")
    for reached in ((), ("param_7",)):
        found = run_with_orphan(reached, outside=head, shapes={"head.weight": (1, 16), **BIASES})
        assert found["not-in-optimizer"].parameters == head
        assert "keep their initial values" in found["not-in-optimizer"].text
        assert ("never-reached" in found) == (not reached)


@pytest.mark.parametrize("reached", [(), ("param_7",)])
def test_layer_is_said_to_be_replaced_where_the_old_one_gets_no_gradient(reached):
    found = run_with_orphan(reached, outside=("head.weight",))
    assert ("created before they were replaced" in found["not-in-optimizer"].text) == (not reached)
    assert set(found) == {"not-in-optimizer"}


def test_frozen_parameter_of_the_same_shape_does_not_hide_what_is_never_reached():
    found = run_with_orphan(outside=("out.bias",), frozen=("out.bias",), shapes=BIASES)
    assert set(found) == {"never-reached"}
    assert found["never-reached"].parameters == ("param_7",)


def never_reached(bug):
    run = Run()
    for number in range(1, 20):
        gradients = [0.3] * 8
        if bug or number % 3:
            gradients[5] = absent(Absent.NOT_REACHED)
        run.step(gradients=gradients)
    return run


def mostly_frozen(bug):
    run = Run(frozen=NAMES[:7] if bug else NAMES[:2], rules="mostly-frozen.share=0.2")
    run.step()
    return run


def frozen_late(bug):
    run = Run()
    frozen = absent(Absent.FROZEN)
    for number in range(1, 30):
        gradients = [0.3] * 8
        late = number == 5 or number > 20
        if late if bug else number < 10:  # a clean run unfreezes what was frozen
            gradients[0] = gradients[1] = frozen
        run.step(gradients=gradients)
    return run


def eval_mode(bug):
    run = Run()
    for number in range(1, 60):
        run.step(signs=["eval_mode"] if (number >= 5 if bug else number % 10 == 0) else [])
    return run


def softmax_before_cross_entropy(bug):
    run = Run()
    for number in range(1, 10):
        run.step(signs=["softmax_twice"] if number < (6 if bug else 2) else [])
    return run


def learning_rate_zero(bug):
    run = Run()
    for number in range(1, 60):
        zero = number >= 11 if bug else number == 1
        run.step(rate=0.0 if zero else 1e-3, updates=[0.0] * 8 if zero else None)
    return run


def learning_rate_jump(bug):
    run = Run()
    for number in range(1, 120):
        after = bug and number > 60
        run.step(3.0 + 0.1 * (number - 60) if after else None, rate=3e-1 if number > 60 else 1e-3)
    return run


def no_warm_up(bug):
    run = Run(attention=True)
    for number in range(1, 60):
        run.step(min(2.3 + 0.2 * number, 6.0) if bug else None, rate=1e-2)
    return run


def update_ratio_high(bug):
    run = Run()
    for number in range(1, 60):
        loss = 2.3 + 0.01 * math.sin(number) if bug else None
        # As of weights that begin at zero, while the loss falls.
        ratio = 0.3 if bug else 1 / number
        run.step(loss, updates=[ratio] * 8 if number < 6 or number % 10 == 1 else None)
    return run


def update_ratio_low(bug):
    run = Run()
    for number in range(1, 300):
        updates = [1e-8 if bug else 1e-5] * 8 if number % 10 == 1 else None
        run.step(2.3 + 0.01 * math.sin(number), updates=updates)
    return run


def test_updates_that_are_too_small_are_one_finding():
    assert update_ratio_low(True).causes == ["update-ratio-low"]


def test_parameters_in_no_optimizer_do_not_count_as_small_updates():
    run = Run(outside=NAMES[3:])  # a target network, which the script updates by itself
    for number in range(1, 300):
        updates = [1e-3] * 3 + [0.0] * 5 if number % 10 == 1 else None
        run.step(2.3 + 0.01 * math.sin(number), updates=updates)
    assert not {"update-ratio-low", "updates-small"} & run.found.keys()


def updates_small(bug):
    run = Run()
    for number in range(1, 120):
        updates = [5e-5 if bug else 1e-3] * 8 if number % 10 == 1 else None
        run.step(2.3 + 0.01 * math.sin(number), updates=updates)
    return run


STRONG_DECAY = WeightDecay(1.0)


def weights_shrink(bug, decay=STRONG_DECAY, rate=5e-3, **first):
    run = Run()
    for number in range(1, 120):
        norm = 0.993**number if bug else 1 if number < 5 else 0.5  # clamped once
        run.step(
            rate=rate,
            weights=[10 * norm] * 8 if number % 10 == 1 else None,
            **({"weight_decay": decay, **first} if number == 1 else {}),
        )
    return run


@pytest.mark.parametrize(
    ("decay", "rate", "found"),
    [
        (None, 1e-2, False),  # small targets: the data make the weights smaller
        (WeightDecay(1e-2), 1e-2, False),
        (WeightDecay(0.5), 1e-2, True),
        (WeightDecay(1e-4, divided=True), 1e-3, False),
        (WeightDecay(0.5, divided=True), 5e-3, True),
    ],
)
def test_weights_that_shrink_are_reported_where_decay_explains_it(decay, rate, found):
    run = weights_shrink(True, decay, rate)
    assert ("weights-shrink" in run.found) == found
    if found:
        assert run.found["weights-shrink"].advice == "divide weight_decay by 10 or more"


def test_weights_that_shrink_under_a_penalty_are_reported():
    run = weights_shrink(True, None, loss_graph=PLAIN._replace(penalty=True))
    found = run.found["weights-shrink"]
    assert found.text.endswith("the loss has a penalty on them")
    assert "weight_decay" not in found.advice


def gradients_vanish(bug):
    run = Run()
    for _ in range(60):
        factor = 0.1 if bug else 0.6
        run.step(gradients=[factor**depth for depth in range(8, 0, -1)])
    return run


def gradients_explode(bug):
    run = Run()
    for number in range(1, 60):
        norm = 1.5 ** max(0, number - 25) if bug else 1.0 + 20.0 * (number == 40)
        run.step(2.3 + 0.01 * number if bug else None, norm=norm)
    return run


@pytest.mark.parametrize(("case", "found"), [
    ("stands still", True),
    ("falls", False),
    ("falls, then rises", False),
    ("warms up, then falls", False),
    ("sum", False),
])  # fmt: skip
def test_gradients_that_are_huge_inside_are_named_where_nothing_is_learnt(case, found):
    run = Run()
    for number in range(1, 300):
        rate, loss, last = 1e-2, 2.3 + 0.01 * math.sin(number), 0.5
        if case == "falls":
            loss = 2.3 * 0.99**number
        if case == "falls, then rises":
            loss = 2.3 * 0.97**number if number < 60 else min(2.3, 0.4 * 1.02 ** (number - 60))
        if case == "warms up, then falls":
            rate = 1e-2 * min(1.0, number / 150)
            loss = 2.3 if number < 100 else 2.3 * 0.99 ** (number - 100)
        if case == "sum":  # all of the gradients are large
            last = 50.0
        gradients = [300.0, 200.0, 100.0, 0.3, 0.3, 0.3, 0.3, last]
        clip = [5.0, 374.0, 5.0, 5 / 374, 1.0]
        run.step(loss, rate=rate, norm=374.0, gradients=gradients, clip=clip)
    assert ("gradients-explode" in run.found) == found
    if found:
        finding = run.found["gradients-explode"]
        assert (finding.onset, finding.parameters[0]) == (1, NAMES[0])
        assert "orthogonally" in finding.advice


def clipped_to_nothing(bug):
    run = Run()
    for _ in range(150):
        scale = 1e-3 if bug else 0.3
        run.step(norm=1 / scale, clip=[1.0, 1 / scale, 1.0, scale, 1.0])
    return run


def always_clipped(bug):
    run = Run()
    for number in range(600):
        scale = 0.5 if bug or number % 10 else 1.0
        run.step(clip=[1.0, 1 / scale, 1.0, scale, 1.0])
    return run


def loss_scale(bug):
    run = Run()
    for number in range(30):
        run.skip("scaler", loss_scale=65536 / 2 ** min(number, 15))
        if not bug and number % 5 == 4:
            run.step()
    return run


def non_finite(bug):
    run = Run()
    for number in range(1, 20):
        if bug and number == 7:
            gradients = [nan, nan, nan, 0.1, 0.1, 0.1, 0.1, 0.1]
            run.step(0.5, gradients=gradients, nonfinite=[("gradient", NAMES[0], "nan", 6)])
        else:
            run.step()
    return run


def attention_logits(bug):
    run = Run(attention=True)
    for number in range(1, 60):
        logit = (3.0 if number < 20 else 400.0) if bug else 30.0
        run.step(health=[logit, 2.0, 0.1, 4.0, 2.0, 0.1] if number % 10 == 1 else None)
    return run


def attention_entropy(bug):
    run = Run(attention=True)
    for number in range(1, 60):
        entropy = 2.0 if number < 20 or not bug else 0.01
        run.step(health=[5.0, 2.0, 0.1, 5.0, entropy, 0.1] if number % 10 == 1 else None)
    return run


def initial_loss(bug):
    run = Run(facts={"classes": 10})
    run.step(12.0 if bug else 2.4)
    return run


def loss_diverges(bug):
    run = Run()
    for number in range(1, 300):
        run.step(0.5 + 0.03 * (number - 150) if bug and number > 150 else None)
    return run


def loss_oscillates(bug):
    run = Run()
    for number in range(1, 100):
        run.step(1.0 + 0.5 * (-1) ** number if bug else 1.0 + 0.5 * run.random.standard_normal())
    return run


def no_progress(bug):
    run = Run(facts={"classes": 10})
    for number in range(1, 500):
        loss = 2.31 if bug else 2.31 - 0.0005 * number
        run.step(loss + 0.05 * run.random.standard_normal())
    return run


def over_fitting(bug):
    run = Run()
    for number in range(1, 400):
        run.step(2.3 * 0.99**number)
        if number % 25 == 0:
            run.validate(0.5 + 0.003 * (number - 100) if bug and number > 100 else 0.5 + 9 / number)
    return run


def input_bound(bug):
    run = Run()
    for number in range(200):
        run.step(data_ms=25.0 if bug or number % 10 == 0 else 2.0)
    return run


def evaluation_expensive(bug):
    run = Run()
    for number in range(1, 300):
        evaluated = number > 1 and number % 20 == 1
        took = (2000.0 if bug else 200.0) if evaluated else absent(Absent.NO_PHASE)
        run.step(eval_ms=took, ms=100.0 + (took if evaluated else 0.0))
    return run


def memory_growth(bug):
    run = Run()
    for number in range(400):
        grown = number * 2e7 if bug else min(number, 50) * 2e7
        run.step(memory=[1e9 + grown, 2e9 + grown, 1e9])
    return run


def batch_of(*tensors, broadcast="", workers=0):
    return BatchRecord(tensors, broadcast, workers)


def tensor(role="input", low=-2.0, high=2.0, mean=0.0, std=1.0, **changed):
    known = {"name": "", "shape": (32, 8), "kind": "float", "classes": 0, "same_rows": False}
    known |= {"checksum": 1, "left_out": 0}
    return BatchTensor(role=role, low=low, high=high, mean=mean, std=std, **(known | changed))


def of_batches(make):
    """A run whose steps have the batches of `make(number)`."""

    def case(bug):
        run = Run(steps_per_epoch=10)
        for number in range(1, 30):
            run.step(batch=make(bug, number))
        return run

    return case


def input_scale(bug, number):
    scale = 70.0 if bug and number > 3 else 0.3
    return batch_of(tensor("first layer", 0.0, 255.0, scale / 2, scale))


def constant_inputs(bug, number):
    given = tensor(same_rows=bug, checksum=number)
    return batch_of(given, tensor(low=1.0, high=1.0 if bug else 2.0))


def same_batch(bug, number):
    return batch_of(tensor(checksum=7 if bug else number))


def batches_repeat(bug, number):
    return batch_of(tensor(checksum=(number - 1) // 2), workers=2 if bug else 0)


def constant_labels(bug, number):
    label = 3.0 if bug else number // 5
    return batch_of(
        tensor("target", label, label, name="cross_entropy", classes=10, kind="integer")
    )


@pytest.mark.parametrize(
    ("positive", "shape", "calls", "found"),
    [
        (0, (32,), 1, True),
        (20, (32,), 1, False),
        (0, (32, 64, 64), 1, False),  # a mask: few pictures may have what is looked for
        (0, (32,), 2, False),  # positive and negative samples, or a GAN's real and generated ones
    ],
)
def test_constant_targets_of_a_binary_loss_are_remarked_after_a_thousand_examples(
    positive, shape, calls, found
):
    run = Run()
    for number in range(1, 120):
        high = 1.0 if positive and number % positive == 1 else 0.0
        name = "binary_cross_entropy_with_logits"
        target = tensor("target", 0.0, high, name=name, shape=shape)
        run.step(batch=batch_of(tensor(checksum=number), *[target] * calls))
    assert ("constant-labels" in run.found) == found
    if found:
        finding = run.found["constant-labels"]
        assert (finding.onset, finding.level) == (1, "info")
        assert finding.step * 32 >= 1000


def test_constant_classes_are_named_after_a_stage_with_another_loss():
    run = Run()
    for number in range(1, 30):
        regression = batch_of(tensor("target", name="mse_loss"))
        run.step(batch=regression if number < 10 else constant_labels(True, number))
    assert run.found["constant-labels"].onset == 10


def target_scale(bug, number):
    high = 5e5 if bug else 1.0
    return batch_of(tensor("target", 0.0, high, name="mse_loss", mean=high / 2, std=high / 4))


def test_targets_of_some_hundreds_are_remarked_without_a_warning():
    run = Run()
    for _ in range(4):
        run.step(batch=batch_of(tensor("target", 0.0, 500.0, name="mse_loss", mean=250, std=100)))
    assert run.found["target-scale"].level == "info"


def test_inputs_that_hardly_vary_are_named():
    """Images that were normalised twice."""
    run = Run()
    for _ in range(4):
        run.step(batch=batch_of(tensor("first layer", -2.12, -2.1, mean=-2.11, std=0.005)))
    finding = run.found["input-scale"]
    assert finding.evidence[0].quantity == "standard deviation over |mean|"


def label_range(bug, number):
    low = -1.0 if bug else 0.0
    return batch_of(tensor("target", low, 1.0, name="binary_cross_entropy_with_logits"))


def loss_broadcasts(bug, number):
    return batch_of(tensor(checksum=number), broadcast="mse_loss of (8, 1) and (8,)" if bug else "")


def counts(**changed):
    known = {"classes": 10, "total": 640, "different": 10, "largest": 0.12, "largest_class": 3}
    known |= {"entropy": 2.29, "per_example": True, "plain": True, **changed}
    return LabelCounts(**known)


def unbalanced_classes(bug, number):
    labels = counts(total=64 * number, different=6, largest=0.75, entropy=0.8)
    return batch_of(tensor(checksum=number))._replace(labels=labels if bug else counts())


def no_better_than_prior(bug):
    run = Run(facts={"classes": 10})
    for number in range(1, 160):
        batch = batch_of(tensor(checksum=number))._replace(labels=counts(total=64 * number))
        run.step(2.3 if bug or number < 50 else 2.1, batch=batch if number % 10 == 1 else None)
    return run


def adam_epsilon(bug):
    run = Run()
    run.step(epsilon=1e-16 if bug else 1e-8)
    for _ in range(3):
        run.step()
    return run


def test_eps_that_outweighs_the_gradients_is_remarked():
    run = Run()
    run.step(epsilon=1.0)
    finding = run.found["adam-epsilon"]
    assert finding.evidence[0].value == 1.0
    assert "outweighs gradients" in finding.text


def momentum_high(bug):
    run = Run()
    run.step(momentum=0.999 if bug else 0.9)
    for _ in range(3):
        run.step()
    return run


def signal_vanishes(bug):
    run = Run()
    for number in range(1, 120):
        units = UnitsRecord((), "head", 2e-4 if bug or number < 20 else 0.1, 0.9)
        run.step(2.3, units=units if number % 25 == 1 else None)
    return run


def bad_batch(bug):
    run = Run()
    for number in range(1, 60):
        bad = BadBatch(40.0, 2.0, -3.0, 900.0, (), ((4, 0.9), (1, 0.02)))
        run.step(40.0 if number == 40 else None, bad_batch=bad if bug and number == 40 else None)
    return run


def of_units(kind, **changed):
    def case(bug):
        run = Run()
        for number in range(1, 120):
            share = 0.95 if bug else 0.3
            units = UnitsRecord((UnitsShare("layer", kind, 64, share),))
            run.step(units=units if number % 75 == 51 else None)
        return run

    return case


def dropout_off(bug):
    run = Run()
    for number in range(1, 120):
        off = ("encoder.dropout",) if (bug and number > 40) or number == 26 else ()
        run.step(dropout_off=off if number % 30 else None)
    return run


def of_weights(wrong, right):
    def case(bug):
        run = Run()
        for number in range(1, 10):
            run.step(initial=(wrong if bug else right,) if number == 1 else ())
        return run

    return case


NORMAL = InitialWeight("layer0.weight", 100, 16, 0.1, False, False, "")


@pytest.mark.parametrize(("rms", "found"), [(0.0, True), (0.1, False)])
def test_weights_that_are_zero_are_named_where_all_of_them_are(rms, found):
    run = Run()
    zero = NORMAL._replace(rms=0.0, constant=True, same_rows=True)
    run.step(initial=(zero, NORMAL._replace(name="layer1.weight", rms=rms, same_rows=not rms)))
    run.step()
    assert ("constant-weights" in run.found) == found
    if found:
        assert "every weight is zero" in run.found["constant-weights"].text


def not_shuffled(bug, number):
    labels = counts(total=64 * number, batches=number, within=0.2 if bug else 2.1)
    return batch_of(tensor(checksum=number))._replace(labels=labels)


def out_of_reach(bug, number):
    return batch_of(
        tensor(checksum=number), tensor("target", -0.8 if bug else -0.1, 1.1, after="sigmoid")
    )


def updates_rounded(bug):
    run = Run(dtype="bfloat16")
    for number in range(1, 60):
        run.step(updates=[1e-3 if bug else 8e-3] * 8 if number % 10 == 1 else None)
    return run


def updates_undone(bug):
    run = Run()
    for number in range(1, 20):
        run.step(kept_update=(0.01 if bug and number != 3 else 0.9) if number < 8 else None)
    return run


def of_signs(sign, first):
    def case(bug):
        run = Run()
        for number in range(1, 30):
            run.step(signs=[sign] if bug and number >= first else [])
        return run

    return case


PLAIN = LossGraph(64, 10, False, "", False, 0)


def of_graph(loss=None, **wrong):
    def case(bug):
        run = Run()
        graph = PLAIN._replace(**wrong) if bug else PLAIN
        run.step(loss if bug else None, loss_graph=graph)
        for _ in range(3):
            run.step()
        return run

    return case


def schedule_ends(bug):
    run = Run(total_steps=1000)
    for number in range(1, 700):
        run.step(rate=1e-7 if number > (200 if bug else 600) else 1e-3)
    return run


def test_schedule_of_unknown_length_ends_early_once_half_of_the_steps_came_after_it():
    run = Run()
    for number in range(1, 100):
        run.step(rate=1e-3 * 0.8**number)
        assert ("schedule-ends-early" in run.found) == (number >= 64)
    assert run.found["schedule-ends-early"].onset == 32


@pytest.mark.parametrize("rate", [
    lambda number: 1e-2 if number < 200 else 1e-5,  # fine-tuning, or the end of a range test
    lambda number: 0.1 / number,
    lambda number: 1e-2 * 0.1 ** (number // 200) if number < 600 else 1e-5,  # MultiStepLR
])  # fmt: skip
def test_rates_of_a_stage_or_of_a_slow_decay_do_not_end_early(rate):
    run = Run()
    for number in range(1, 2200):
        run.step(rate=rate(number))
    assert "schedule-ends-early" not in run.found


def zero_gradients(bug):
    run = Run()
    for number in range(1, 60):
        gradients = [0.3] * 8
        if bug or number < 10:
            gradients[1] = 0.0
        run.step(gradients=gradients)
    return run


def of_ranks(rows):
    """A run of three ranks with `rows(bug, number)` after each step."""

    def case(bug):
        run = Run(ranks=3)
        for number in range(1, 160):
            run.step()
            run.ranks(*rows(bug, number))
        return run

    return case


def clips_alone(bug, number):
    scale = 0.5 if number % 3 else 1.0
    alone = bug and number > 4
    other = {"clip_scale": 1.0 if alone else scale}
    return {"clip_scale": 0.4 if alone else scale}, other, other


def ranks_part(bug, number):
    if number % 50:
        return {}, {}, {}
    equal = {"checksum_high": 5.0, "checksum_low": number}
    other = {"checksum_high": 6.0, "checksum_low": number}
    return equal, other if bug and number > 100 else equal, equal


def ranks_same_batch(bug, number):
    weights = {"checksum_high": 1.0, "checksum_low": 1.0}
    return tuple({**weights, "batch_checksum": 5.0 if bug else rank} for rank in range(3))


def straggler(bug, number):
    times = [30.0, 30.0, 90.0 if bug else 35.0]
    return tuple({"step_ms": 150.0, "phase_ms.forward": time} for time in times)


def part_not_updated(bug):
    run = Run()
    for _ in range(60):
        run.step(updates=[1e-3] * 5 + [0.0 if bug else 1e-6] * 3)
    return run


def part_updated_too_much(bug):
    run = Run()
    for number in range(1, 120):
        updates = [1e-3] * 6 + [0.5 if bug or number < 30 else 0.05] * 2
        run.step(2.3 + 0.01 * math.sin(number) if bug else None, updates=updates)
    return run


@pytest.mark.parametrize(
    ("falls", "zero", "found"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_group_whose_first_update_is_as_large_as_its_weights_is_remarked(falls, zero, found):
    """As with Adam: the ratio falls with the number of steps."""
    run = Run()
    weights = [
        InitialWeight(name, 16, 16, 0.0 if zero else 0.1, False, False, "") for name in NAMES
    ]
    for number in range(1, 60):
        loss = 2.3 + 0.01 * math.sin(number) if not falls else 2.3 * 0.98**number
        updates = [1e-3] * 7 + [2 / number]
        if zero and number == 1:
            updates = [absent(Absent.ZERO_WEIGHTS)] * 8
        initial = tuple(weights) if number == 1 else ()
        run.step(loss, updates=updates if number < 6 or number % 10 == 1 else None, initial=initial)
    assert ("part-updated-too-much" in run.found) == found
    if found:
        finding = run.found["part-updated-too-much"]
        assert (finding.onset, finding.level, finding.parameters) == (1, "info", NAMES[7:])
        assert finding.text.startswith("step 1 changed layer7.weight by up to 2 of their size")


def test_text_has_no_median_where_no_other_weights_have_a_ratio_that_is_usual():
    """The others start at zero: their first update is as large as they are then."""
    run = Run()
    rms = [0.0] * 7 + [0.1]
    weights = [
        InitialWeight(name, 16, 16, size, False, False, "")
        for name, size in zip(NAMES, rms, strict=True)
    ]
    for number in range(1, 60):
        zero = absent(Absent.ZERO_WEIGHTS) if number == 1 else 1.0
        updates = [zero] * 7 + [0.8] if number < 6 else None
        initial = tuple(weights) if number == 1 else ()
        run.step(2.3 + 0.01 * math.sin(number), updates=updates, initial=initial)
    text = run.found["part-updated-too-much"].text
    assert text == (
        "step 2 changed layer7.weight by up to 0.8 of their size, and the loss does not fall"
    )


def loss_plateau(bug):
    run = Run()
    noise = run.random.standard_normal
    for number in range(1, 700):
        # The twin falls more and more slowly.
        fall = 1.5 * min(1, number / 100) if bug else 0.45 * math.log10(number)
        run.step(2.5 - fall + 0.02 * noise())
    return run


def test_updates_after_which_the_loss_rises_are_the_cause_of_a_divergence():
    run = Run()
    weights = [InitialWeight(name, 16, 16, 0.1, False, False, "") for name in NAMES]
    for number in range(1, 60):
        updates = [1e-3] * 7 + [1.7 / number]
        initial = tuple(weights) if number == 1 else ()
        loss = min(10.0, 1.0 + 0.9 * number)
        run.step(loss, updates=updates if number < 6 or number % 10 == 1 else None, initial=initial)
    finding = run.found["part-updated-too-much"]
    assert (finding.level, finding.onset, finding.cause) == ("warning", 1, None)
    assert finding.text.endswith("and the loss rises")
    assert run.found["loss-diverges"].cause == finding.number


def test_updates_are_not_the_cause_of_a_loss_that_falls_without_bound():
    run = Run()
    for number in range(1, 60):
        run.step(-(2.0**number) if number < 50 else -inf, updates=[0.9] * 8)
    assert "update-ratio-high" not in run.found


def test_updates_are_the_cause_of_a_positive_loss_that_becomes_nan_while_it_falls():
    run = Run()
    for number in range(1, 60):
        run.step(2.3 * 0.9**number if number < 40 else nan, updates=[0.9] * 8)
    assert "update-ratio-high" in run.found


def test_noise_is_not_a_loss_that_rises_after_a_large_update():
    weights = [InitialWeight(name, 16, 16, 0.1, False, False, "") for name in NAMES]
    for mean, scale in ((0.0, 1.0), (2.0, 0.8)):
        for seed in range(30):
            noise = np.random.default_rng(seed).standard_normal(60)
            run = Run()
            for number in range(1, 60):
                updates = [1e-3] * 7 + [1.7 / number]
                loss = mean + scale * float(noise[number])
                run.step(loss, updates=updates if number < 6 or number % 10 == 1 else None,
                         initial=tuple(weights) if number == 1 else ())  # fmt: skip
            found = run.found.get("part-updated-too-much")
            assert found is None or found.level == "info"


def overflow_ahead(bug):
    run = Run()
    for number in range(1, 60):
        # The twin jumps to a thousand times its value, and falls again.
        grown = 3.0 ** (number - 20) if bug else 1e3 * 0.9 ** (number - 20)
        run.step(norm=max(1.0, grown) if number >= 20 else 1.0)
    return run


CASES: dict[str, tuple[Case, int]] = {
    "gradients-kept": (gradients_kept, 2),
    "zeroed-before-step": (zeroed_before_step, 1),
    "no-gradients": (no_gradients, 1),
    "not-in-optimizer": (not_in_optimizer, 1),
    "never-reached": (never_reached, 1),
    "mostly-frozen": (mostly_frozen, 1),
    "frozen-late": (frozen_late, 21),
    "eval-mode": (eval_mode, 5),
    "softmax-before-cross-entropy": (softmax_before_cross_entropy, 1),
    "learning-rate-zero": (learning_rate_zero, 11),
    "learning-rate-jump": (learning_rate_jump, 61),
    "no-warm-up": (no_warm_up, 1),
    "update-ratio-high": (update_ratio_high, 1),
    "update-ratio-low": (update_ratio_low, 1),
    "updates-small": (updates_small, 1),
    "weights-shrink": (weights_shrink, 1),
    "gradients-vanish": (gradients_vanish, 1),
    "gradients-explode": (gradients_explode, 31),
    "clipped-to-nothing": (clipped_to_nothing, 1),
    "always-clipped": (always_clipped, 1),
    "loss-scale": (loss_scale, 1),
    "non-finite": (non_finite, 7),
    "attention-logits": (attention_logits, 21),
    "attention-entropy": (attention_entropy, 21),
    "initial-loss": (initial_loss, 1),
    "loss-diverges": (loss_diverges, 151),
    "loss-oscillates": (loss_oscillates, 1),
    "no-progress": (no_progress, 1),
    "over-fitting": (over_fitting, 125),
    "input-bound": (input_bound, 11),
    "evaluation-expensive": (evaluation_expensive, 21),
    "memory-growth": (memory_growth, 20),
    "input-scale": (of_batches(input_scale), 4),
    "constant-inputs": (of_batches(constant_inputs), 1),
    "same-batch": (of_batches(same_batch), 1),
    "batches-repeat": (of_batches(batches_repeat), 2),
    "constant-labels": (of_batches(constant_labels), 1),
    "unbalanced-classes": (of_batches(unbalanced_classes), 1),
    "no-better-than-prior": (no_better_than_prior, 1),
    "adam-epsilon": (adam_epsilon, 1),
    "momentum-high": (momentum_high, 1),
    "signal-vanishes": (signal_vanishes, 1),
    "label-range": (of_batches(label_range), 1),
    "loss-broadcasts": (of_batches(loss_broadcasts), 1),
    "bad-batch": (bad_batch, 40),
    "dead-units": (of_units("relu"), 1),
    "saturated-units": (of_units("tanh"), 1),
    "dropout-off": (dropout_off, 41),
    "constant-weights": (
        of_weights(NORMAL._replace(constant=True, same_rows=True), NORMAL._replace(rms=0.2)),
        1,
    ),
    "initial-scale": (of_weights(NORMAL._replace(rms=3.0), NORMAL._replace(rms=0.02)), 1),
    "untied-weights": (of_weights(NORMAL._replace(equal_to="embedding.weight"), NORMAL), 1),
    "not-shuffled": (of_batches(not_shuffled), 1),
    "targets-out-of-reach": (of_batches(out_of_reach), 1),
    "target-scale": (of_batches(target_scale), 1),
    "updates-rounded": (updates_rounded, 1),
    "updates-undone": (updates_undone, 3),
    "clipped-after-step": (of_signs("clipped_late", 2), 2),
    "losses-mixed": (of_signs("mixed_losses", 2), 2),
    "schedule-idle": (of_signs("idle_schedule", 2), 2),
    "classes-mixed": (of_graph(mixed_view=(8, 10, 4, 4)), 1),
    "backward-twice": (of_signs("backward_twice", 3), 3),
    "schedule-before-step": (of_signs("schedule_first", 2), 2),
    "train-mode-evaluation": (of_signs("evaluated_in_train_mode", 20), 20),
    "schedule-ends-early": (schedule_ends, 201),
    "zero-gradients": (zero_gradients, 1),
    "softmax-over-batch": (of_graph(over_rows=True), 1),
    "log-of-logits": (of_graph(log_of_outputs="log"), 1),
    "softmax-inside": (of_graph(hidden_softmaxes=2), 1),
    "squared-error-of-softmax": (of_graph(squared_softmax=True), 1),
    "loss-scaled": (of_graph(loss=2.31 * 64 / 10), 1),
    "loss-sign": (of_graph(loss=-2.31), 1),
    "clips-alone": (of_ranks(clips_alone), 5),
    "ranks-diverge": (of_ranks(ranks_part), 101),
    "ranks-same-batch": (of_ranks(ranks_same_batch), 1),
    "straggler": (of_ranks(straggler), 11),
    "part-not-updated": (part_not_updated, 1),
    "part-updated-too-much": (part_updated_too_much, 21),
    "loss-plateau": (loss_plateau, 101),
    "overflow-ahead": (overflow_ahead, 21),
}
NEAR = {"loss-diverges": 45, "loss-oscillates": 1, "gradients-explode": 6, "loss-plateau": 51}
"""Steps by which the onset may be late, where it has to rise out of noise."""


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", CASES)
def test_bug_is_named_with_its_onset(rule):
    case, onset = CASES[rule]
    run = case(True)
    assert rule in run.found, list(run.found)
    finding = run.found[rule]
    assert onset <= finding.onset <= onset + NEAR.get(rule, 0)
    assert finding.text
    assert finding.advice
    bands = [each.low is not None or each.high is not None for each in finding.evidence]
    assert any(bands) or finding.evidence[0].text.endswith("healthy: finite")
    assert not run.faults


@pytest.mark.parametrize("rule", CASES)
def test_clean_twin_has_no_warning(rule):
    run = CASES[rule][0](False)
    warnings = {f.rule: f.text for f in run.engine.findings if f.level != "info"}
    assert not warnings
    assert rule not in run.found or rule == "learning-rate-jump"  # said without a warning
    assert not run.faults


@pytest.mark.parametrize("rule", CASES)
def test_rule_can_be_switched_off(rule):
    kinds = [each for each in RULES if each.name == rule]
    run = Run(rules=f"{rule}=off", kinds=kinds)
    for _ in range(3):
        run.step(nan, nonfinite=[("loss", "", "nan", None)], signs=["kept_gradients"])
    assert not run.found


# ---------------------------------------------------------------- single rules


@pytest.mark.parametrize(
    ("workers", "first", "onset", "found"),
    [(2, 1, 2, 3), (2, 2, 4, 5), (4, 1, 2, 5), (4, 2, 3, 5), (8, 1, 2, 11), (8, 2, 3, 11)],
)
def test_workers_with_the_same_data_are_named_once_each_had_its_turn(workers, first, onset, found):
    run = Run(steps_per_epoch=100)
    for number in range(1, 30):
        # The batch of the very first step may not be seen.
        seen = first <= number < first + 6 or (number > 6 and number % 10 == 1)
        given = batch_of(tensor(checksum=(number - 1) // workers), workers=workers)
        run.step(batch=given if seen else None)
    assert list(run.found) == ["batches-repeat"]
    finding = run.found["batches-repeat"]
    assert (finding.onset, finding.step) == (onset, found)


@pytest.mark.parametrize("kept", [1, 3, 100])
def test_batches_that_are_used_several_times_are_no_fault_of_workers(kept):
    run = Run(steps_per_epoch=None)
    for number in range(1, 30):
        given = batch_of(tensor(checksum=(number - 1) // kept), workers=2)
        run.step(batch=given if number < 7 or number % 10 == 1 else None)
    assert "batches-repeat" not in run.found


@pytest.mark.parametrize("first_bad", [1, 2, 40])
def test_replicas_part_at_the_step_whose_update_differs(first_bad):
    run = Run(ranks=2)
    for number in range(1, 60):
        run.step()
        equal = {"sample_high": 5.0, "sample_low": number}  # before the update of this step
        other = {**equal, "sample_high": 6.0}
        run.ranks(equal, other if number > first_bad else equal)
    finding = run.found["ranks-diverge"]
    assert finding.onset == first_bad
    assert finding.step == first_bad + 1


def test_ranks_that_never_were_equal_are_no_replicas():
    run = Run(ranks=2)
    for number in range(1, 120):
        run.step()
        run.ranks(*({"sample_high": rank, "sample_low": number} for rank in range(2)))
    assert not run.found


def test_gradient_that_is_not_finite_is_blamed_on_the_parameter_nearest_to_the_loss():
    finding = non_finite(True).found["non-finite"]
    assert finding.level == "error"
    assert finding.parameters == (NAMES[2], NAMES[1], NAMES[0])
    assert finding.phase == "backward"
    assert "3 of 8" in finding.text


def test_loss_that_is_not_finite_is_blamed_on_the_forward_pass():
    run = Run()
    run.step(0.5)
    run.step(inf, gradients=[nan] * 8, nonfinite=[("loss", "", "inf", 1)])
    finding = run.found["non-finite"]
    assert (finding.onset, finding.phase) == (2, "loss")
    assert "0.5 at step 1" in finding.text


def test_calls_without_gradients_at_every_step_are_no_evaluations():
    run = Run()
    for _ in range(200):
        run.step(eval_ms=300.0, ms=400.0)
    assert "evaluation-expensive" not in run.found


def test_jump_of_the_learning_rate_that_hurts_nobody_is_no_warning():
    run = learning_rate_jump(False)
    assert run.found["learning-rate-jump"].level == "info"
    assert learning_rate_jump(True).found["learning-rate-jump"].level == "warning"


def test_warm_up_is_no_jump():
    run = Run()
    for number in range(1, 100):
        run.step(rate=1e-6 * number)
    assert not run.found


def test_layer_that_joins_the_optimizer_later_is_not_reported_before():
    run = Run(outside=NAMES[2:4])
    run.step()
    assert not run.found
    run.step()
    assert run.found["not-in-optimizer"].step == 2


def test_losses_of_several_optimizers_are_not_judged():
    run = Run(optimizers=("adam", "adam#2"))
    for number in range(1, 200):
        run.step(0.5 + 0.03 * number)
    assert "loss-diverges" not in run.found


def test_negative_losses_are_not_judged():
    run = Run()
    for number in range(1, 400):
        run.step(-5.0 + 0.05 * number)
    assert "loss-diverges" not in run.found


@pytest.mark.parametrize(("signs", "judged"), [((), True), (("calls_vary",), False)])
def test_sum_over_episodes_is_not_taken_for_a_loss_that_diverges(signs, judged):
    run = Run()
    for number in range(1, 120):
        run.step(1.0 + 0.1 * number, signs=signs)
    assert ("loss-diverges" in run.found) == judged


@pytest.mark.parametrize(("signs", "judged"), [((), True), (("calls_vary",), False)])
def test_episodes_that_the_model_plays_are_not_taken_for_slow_data(signs, judged):
    run = Run()
    for _ in range(120):
        run.step(data_ms=25.0, signs=signs)
    assert ("input-bound" in run.found) == judged


def test_loss_that_is_nan_is_named_where_a_scaler_skips():
    run = Run()
    for _ in range(30):
        run.step()
    origin = Producer("operation", "head", "", "div", "train.py:7")
    scales = [2.0**-number * 1024 for number in range(10)]
    run.skip("scaler", scales[0], nan, origin)
    assert run.found["non-finite"].level == "error"
    for scale in scales[1:]:
        run.skip("scaler", scale, nan, origin)
    cause = run.found["non-finite"]
    assert (cause.level, cause.onset, cause.parameters) == ("error", 31, ("head",))
    assert "`div` (train.py:7) after head" in cause.text
    assert cause.text.endswith("nothing was trained")
    assert run.causes == ["non-finite"]
    effect = run.found["loss-scale"]
    assert "the loss itself is not finite" in effect.text
    assert "bfloat16" not in effect.advice


@pytest.mark.parametrize(("skips", "level"), [(1, "warning"), (10, "error")])
def test_nan_loss_that_a_scaler_skipped_is_a_warning_once_training_goes_on(skips, level):
    run = Run()
    for _ in range(30):
        run.step()
    for _ in range(skips):
        run.skip("scaler", 1.0, nan)
    run.step(rate=1e-3)
    found = run.found["non-finite"]
    assert (found.level, found.onset) == (level, 31)
    # The lowest loss scale was reached for the loss alone: no error under a warning.
    assert run.found["loss-scale"].level == "warning"
    assert ("step 31 was made with a finite loss" in found.text) == (level == "warning")


def skipping(*losses):
    """The last report of `non-finite` after these losses; those that are not finite are skipped,
    and so is an infinite gradient of a finite one ("overflow")."""
    run = Run()
    for loss in losses:
        if loss == "overflow":
            run.skip("scaler", 1024.0, 2.3)
        elif math.isfinite(loss):
            run.step(loss)
        else:
            run.skip("scaler", 1024.0, nan)
    return run.found["non-finite"]


def test_ten_skipped_losses_remain_an_error_after_a_later_single_one():
    found = skipping(2.3, *[nan] * 12, *[2.2] * 5, nan, *[2.1] * 5)
    assert found.level == "error"
    assert found.text.endswith("10 in a row like it: nothing was trained")


def test_overflow_after_a_skipped_loss_does_not_hide_that_training_goes_on():
    found = skipping(2.3, nan, "overflow", 2.2, 2.1)
    assert found.level == "warning"
    assert "step 2 was made with a finite loss" in found.text


def test_ten_skipped_losses_after_a_single_one_are_an_error():
    found = skipping(2.3, nan, 2.2, *[nan] * 12, 2.2)
    assert (found.level, found.onset) == ("error", 2)
    assert found.text.endswith("and 10 in a row like it before step 3: nothing was trained")


@pytest.mark.parametrize("reason", ["scaler", "hand"])
def test_skipped_overflow_of_a_finite_loss_is_no_loss_that_is_nan(reason):
    run = Run()
    for number in range(10):
        run.skip(reason, 2.0**-number * 1024, 2.3 if reason == "scaler" else nan)
    assert "non-finite" not in run.found
    if reason == "scaler":
        assert "at any loss scale from 1024 to 2" in run.found["loss-scale"].text


def test_gradients_that_are_zeroed_now_and_then_are_not_called_never_zeroed():
    run = Run()
    for number in range(1, 10):
        run.step(signs=["kept_gradients"] if number % 3 != 1 else [])
    found = run.found["gradients-kept"]
    assert (found.level, found.onset) == ("warning", 2)
    assert "not called in every step" in found.text


def test_gradients_that_are_zeroed_in_every_second_step_are_a_note():
    run = Run()
    for number in range(1, 20):
        run.step(signs=["kept_gradients"] if number % 2 == 0 else [])
    found = run.found["gradients-kept"]
    assert (found.level, found.onset) == ("info", 2)
    assert "in every second step only" in found.text
    apart = Run()
    for number in range(1, 40):
        apart.step(signs=["kept_gradients"] if number % 3 == 0 else [])
    assert "gradients-kept" not in apart.found


def test_gradients_that_were_zeroed_until_some_step_are_described_so():
    run = Run()
    for number in range(1, 20):
        run.step(signs=["kept_gradients"] if number > 9 else [])
    found = run.found["gradients-kept"]
    assert (found.level, found.onset) == ("error", 10)
    assert "they are not zeroed, as they were before step 10" in found.text


def test_layers_that_take_turns_are_a_remark_once_both_were_reached():
    run = Run()
    levels = []
    for number in range(1, 40):
        gradients = [0.3] * 8
        if number < 20:
            gradients[5] = absent(Absent.NOT_REACHED)
        if number < 30:
            gradients[6] = absent(Absent.NOT_REACHED)
        run.step(gradients=gradients)
        if "never-reached" in run.found:
            levels.append((run.found["never-reached"].level, run.found["never-reached"].parameters))
    assert list(dict.fromkeys(levels)) == [
        ("warning", NAMES[5:7]),
        ("warning", NAMES[6:7]),
        ("info", NAMES[6:7]),
    ]


@pytest.mark.parametrize("operation", ["log", "conv2d"])
def test_advice_names_the_operation_that_was_found(operation):
    run = Run()
    run.step()
    run.step(
        nan,
        nonfinite=[("loss", "", "nan", 1)],
        producer=Producer("operation", "", "", operation, "train.py:7"),
    )
    measured = run.found["non-finite"].evidence[0]
    assert measured.text == "nan, healthy: finite"
    assert (measured.value, measured.low, measured.high) == (None, None, None)
    advice = run.found["non-finite"].advice
    assert advice.startswith(f"look at what `{operation}` at train.py:7 is given")
    assert "learning rate" not in advice


def test_backward_that_makes_gradients_not_finite_is_named_with_what_it_needs():
    run = Run()
    run.step()
    run.step(
        gradients=[nan, *[0.3] * 7],
        nonfinite=[("gradient", NAMES[0], "nan", 1)],
        producer=Producer("operation", "", "", "sqrt", "train.py:7", backward=True),
    )
    found = run.found["non-finite"]
    assert (found.onset, found.phase, found.parameters) == (2, "backward", NAMES[:1])
    assert "the backward of `sqrt` (train.py:7) made it from finite gradients" in found.text
    assert found.advice.startswith("look at what `sqrt` at train.py:7 is given: its slope")


def converging(noise, lowest):
    """A run whose loss falls to `lowest`, with updates that become as small as its slope."""
    run = Run()
    for number in range(1, 700):
        left = 2.3 * 0.95**number
        loss = lowest + left + noise * math.sin(number)
        run.step(loss, updates=[max(1e-3 * left, 1e-9)] * 8 if number % 10 == 1 else None)
    return run


@pytest.mark.parametrize(("noise", "lowest"), [(0.0, 0.0), (0.0, 0.7), (0.02, 0.7)])
def test_small_updates_of_a_training_that_has_converged_are_not_reported(noise, lowest):
    assert not [f for f in converging(noise, lowest).engine.findings if f.level != "info"]


def test_growth_of_small_numbers_is_no_overflow():
    """The first step solves the task, and its momentum lets the loss rise a little."""
    run = Run()
    for number in range(1, 60):
        small = 1e-7 * 2.5 ** min(number, 14)
        run.step(
            2.3 if number == 1 else small, norm=4.0 if number == 1 else small, updates=[1e-9] * 8
        )
    assert not [f for f in run.engine.findings if f.rule in ("overflow-ahead", "loss-diverges")]
    assert not {"no-progress", "updates-small"} & run.found.keys()


def test_first_loss_that_is_an_outlier_hides_nothing():
    stuck, rising = Run(facts={"classes": 10}), Run()
    for number in range(1, 420):
        noise = 0.01 * math.sin(number)
        stuck.step(50.0 if number == 1 else 2.31 + noise)
        rising.step(50.0 if number == 1 else 2.3 + noise + 0.1 * max(0, number - 200))
    assert stuck.found["no-progress"].level == "warning"
    assert rising.found["loss-diverges"].onset > 200


def falling(start, *, to, at=0.97, steps=460, warm_up=0, classes=10):
    run = Run(facts={"classes": classes})
    for number in range(1, steps):
        loss = to + (start - to) * at**number + 0.005 * run.random.standard_normal()
        run.step(loss, rate=1e-3 * min(1.0, number / warm_up) if warm_up else 1e-3)
    return run


def test_a_loss_has_fallen_at_once_only_when_the_first_is_no_longer_recent():
    trend = LossTrend()
    for step in range(1, RECENT_LOSSES // 2 + 1):
        trend.add(step, 1e6 if step == 1 else 1.0)
        assert not trend.fell_at_once
    trend.add(step + 1, 1.0)
    assert trend.fell_at_once


@pytest.mark.parametrize("start", [2.35, 2.4, 3.0, 30.0])
def test_a_loss_that_falls_only_to_that_of_guessing_is_reported(start):
    found = falling(start, to=math.log(10)).found["no-progress"]
    assert found.level == "warning"
    assert "no better than guessing among 10 classes (2.3)" in found.text


@pytest.mark.parametrize(
    "run",
    [
        lambda: falling(2.4, to=2.2),
        lambda: falling(230.0, to=50.0),  # a hundred times the cross-entropy, and it converges
        # From large initial weights, and during a long warm-up.
        lambda: falling(60.0, to=7.0, at=0.995, classes=50_257),
        lambda: falling(11.2, to=7.0, at=0.9998, warm_up=2000, classes=50_257),
    ],
)
def test_a_loss_above_that_of_guessing_which_still_falls_is_not_reported(run):
    assert "no-progress" not in run().found


@pytest.mark.parametrize("loss", [-1.0, -0.2])
def test_a_negative_loss_that_stands_still_is_reported(loss):
    run = Run()
    for number in range(1, 360):
        run.step(loss + 0.001 * math.sin(number), updates=[1e-5] * 8 if number % 10 == 1 else None)
    assert {"no-progress", "updates-small"} <= run.found.keys()


def test_a_negative_loss_that_falls_is_not_reported():
    run = Run()
    for number in range(1, 360):
        run.step(0.9**number - 1.0, updates=[1e-5] * 8 if number % 10 == 1 else None)
    assert not {"no-progress", "updates-small"} & run.found.keys()


@pytest.mark.parametrize("producer", [None, Producer("input", "", "", "mul")])
@pytest.mark.parametrize(("low", "rows"), [(-1.0, ()), (nan, (3,)), (nan, ())])
def test_what_is_not_finite_is_said_to_be_the_batch_only_where_that_was_seen(producer, low, rows):
    texts = []
    for skips in (False, True):
        run = Run()
        run.step()
        bad = BadBatch(nan, 2.3, low, -low, rows, ())
        if skips:
            run.skip("scaler", 1024.0, nan, producer, bad_batch=bad)
        else:
            run.step(nan, nonfinite=[("loss", "", "nan", 1)], producer=producer, bad_batch=bad)
        texts.append(run.found["non-finite"].text)
    assert texts[1].startswith(texts[0])
    if producer is not None:
        assert ("in row 3" in texts[0]) == bool(rows)
        assert ("the batch has" in texts[0]) == bool(rows)
        assert ("a constant or a detached tensor" in texts[0]) == (not rows)


def tensor_of(role, name, shape, kind, classes):
    """All its numbers are 0."""
    return BatchTensor(role, name, shape, kind, classes, 0.0, 0.0, 0.0, 0.0, True, 1, 0)


def test_scores_that_are_concatenated_have_the_same_label_on_purpose():
    def labelled(joined):
        run = Run()
        for number in range(8):
            graph = PLAIN._replace(joined=joined) if not number else None
            label = tensor_of("target", "cross_entropy", (32,), "int", 17)
            run.step(loss_graph=graph, batch=BatchRecord((label,), "", 0))
        return "constant-labels" in run.found

    assert labelled(False)
    assert not labelled(True)


def test_batches_of_a_jump_of_the_learning_rate_are_its_effect():
    run = Run()
    for number in range(1, 130):
        high = number > 100
        loss = 2.0**number / 2.0**100 if high else None
        bad = BadBatch(loss, 0.9, -1.0, 1.0, (), ()) if 102 <= number <= 104 else None
        run.step(loss, rate=5.0 if high else 1e-3, bad_batch=bad)
    assert [f.rule for f in run.engine.findings].count("bad-batch") == 1
    assert run.causes == ["learning-rate-jump"]


def test_what_began_later_is_no_cause_where_onsets_are_exact():
    run = Run()
    for number in range(1, 60):
        loss = 2.3 + 0.3 * number
        run.step(loss, norm=1.0 if number < 15 else 1.0 * 1.6 ** (number - 14))
    found = run.found
    assert found["loss-diverges"].onset < found["gradients-explode"].onset
    assert run.causes == ["loss-diverges"]
    root = found["loss-diverges"].number
    assert {f.cause for f in run.engine.findings} == {None, root}  # every effect is its own


def test_constant_inputs_explain_their_symptoms():
    run = Run()
    tensor = tensor_of("input", "x", (32, 4), "float", 0)
    for _ in range(30):
        run.step(gradients=[0.0] + [0.3] * 7, batch=BatchRecord((tensor,), "", 0))
    assert {"zero-gradients", "same-batch"} <= set(run.found)
    assert run.causes == ["constant-inputs"]


@pytest.mark.parametrize(
    ("highest", "mean", "std", "bytes_"),
    [(254.0, 125.0, 73.0, True), (0.996, 0.49, 0.29, None), (241.5, 125.0, 73.0, False)],
)
def test_bytes_that_nothing_has_divided_are_named(highest, mean, std, bytes_):
    run = Run()
    given = BatchTensor(
        "first layer", "Linear", (32, 64), "float", 0, 0.0, highest, mean, std, False, 1, 0
    )
    for _ in range(5):
        run.step(batch=BatchRecord((given,), "", 0))
    assert ("input-scale" in run.found) == (bytes_ is not None)
    if bytes_ is not None:
        assert ("bytes" in run.found["input-scale"].text) == bytes_


@pytest.mark.parametrize(("highest", "judged"), [(0.11, False), (0.0039, True)])
def test_rows_that_are_nearly_all_zero_are_not_called_too_small(highest, judged):
    run = Run()
    given = BatchTensor(
        "first layer", "Linear", (32, 90000), "float", 0, 0.0, highest, 7e-5, 2e-3, False, 1, 0
    )
    for _ in range(5):
        run.step(batch=BatchRecord((given,), "", 0))
    assert ("input-scale" in run.found) == judged
