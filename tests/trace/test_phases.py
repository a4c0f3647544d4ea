"""The phases of many shapes of loop, in their order."""

from __future__ import annotations

import gc
import math
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.trace.support import (
    CountingGate,
    SmallGpt,
    batch,
    close,
    mlp,
    plain_loop,
    trace,
)
from tui_trainer.protocol import PHASES

TEXTBOOK = list(PHASES)


def make(kind=torch.optim.AdamW, **options):
    torch.manual_seed(1)
    model = mlp()
    return model, kind(model.parameters(), **({"lr": 1e-2} | options))


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adam([{"params": list(p), "lr": 0.1}]),
    ],
)
def test_textbook_loop_has_the_seven_phases_in_order(kind):
    model = mlp()
    optimizer = kind(model.parameters())
    recorder, gate = trace(lambda: plain_loop(model, optimizer, 3))
    for step in (1, 2, 3):
        assert gate.phases(step) == TEXTBOOK
    assert [record.step for record in recorder.records] == [1, 2, 3]


def test_without_clipping_there_is_no_clip_phase_and_the_panel_says_why():
    model, optimizer = make()
    recorder, gate = trace(lambda: plain_loop(model, optimizer, 6, max_norm=None))
    assert gate.phases(6) == [phase for phase in PHASES if phase != "clip"]
    assert "never clips" in recorder.info["unseen"]["clip"]
    assert recorder.rows("clip") == {}


BATCH_FIRST = ["data", "zero_grad", "forward", "loss", "backward", "step"]


def test_data_comes_before_zero_grad_wherever_the_loop_zeroes():
    """The batch is certainly there where the model is called: no boundary is passed before."""
    model, optimizer = make()
    whole, targets = torch.randn(12, 6), torch.randint(0, 3, (12,))

    def at_the_end():
        for first in range(0, 12, 4):
            F.cross_entropy(model(whole[first : first + 4]), targets[first : first + 4]).backward()
            optimizer.step()
            optimizer.zero_grad()

    _, gate = trace(at_the_end)
    assert gate.phases(1) == ["data", "forward", "loss", "backward", "step"]
    assert gate.phases(2) == gate.phases(3) == BATCH_FIRST

    def before_the_batch():
        for _ in range(3):
            optimizer.zero_grad()
            picked = torch.randint(0, 12, (4,))
            F.cross_entropy(model(whole[picked]), targets[picked]).backward()
            optimizer.step()

    _, gate = trace(before_the_batch)
    assert gate.phases(1) == gate.phases(3) == BATCH_FIRST


def train_step(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def test_zero_grad_in_a_function_that_is_given_the_batch():
    def loop():
        for _ in range(2):
            model, optimizer = make()
            for _ in range(2):
                train_step(model, optimizer, *batch())

    _, gate = trace(loop)
    for step in range(1, 5):
        assert gate.phases(step) == BATCH_FIRST


def test_zero_grad_without_forward_and_backward_is_passed_before_the_step():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            weight.grad = torch.ones(3)
            optimizer.step()

    _, gate = trace(loop)
    assert gate.phases(2) == ["zero_grad", "step"]


def test_zero_grad_between_loss_and_backward():
    model, optimizer = make()

    def loop():
        for _ in range(2):
            inputs, targets = batch()
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    _, gate = trace(loop)
    assert gate.phases(2) == ["data", "forward", "zero_grad", "loss", "backward", "step"]


def test_no_zero_grad_at_all():
    model, optimizer = make()

    def loop():
        for _ in range(6):
            inputs, targets = batch()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None

    recorder, gate = trace(loop)
    assert gate.phases(6) == ["data", "forward", "loss", "backward", "step"]
    assert "zero_grad" in recorder.info["unseen"]


def test_accumulation_repeats_phases_and_sums_the_losses():
    model, optimizer = make()
    sums = []

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(3):
                inputs, targets = batch()
                loss = F.cross_entropy(model(inputs), targets) / 3
                loss.backward()
                total += loss.item()
            sums.append(total)
            optimizer.step()

    recorder, gate = trace(loop)
    micro = ["data", "forward", "loss", "backward"]
    assert gate.phases(2) == ["data", "zero_grad", *micro[1:], *micro, *micro, "step"]
    close(recorder.series("step", "loss"), sums)


def test_two_optimizers_of_a_gan_take_turns():
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-2)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-2)
    losses = []

    def loop():
        for _ in range(3):
            real, noise = torch.randn(8, 6), torch.randn(8, 4)
            of_critic.zero_grad()
            good = F.softplus(-critic(real)).mean()
            good.backward()
            bad = F.softplus(critic(generator(noise).detach())).mean()
            bad.backward()
            of_critic.step()
            of_generator.zero_grad()
            fooled = F.softplus(-critic(generator(noise))).mean()
            fooled.backward()
            of_generator.step()
            losses.append((good.item() + bad.item(), fooled.item()))

    recorder, _ = trace(loop)
    assert [r.optimizer for r in recorder.records] == ["", "of_generator"] * 3
    assert recorder.info["optimizers"] == ("adam", "of_generator")
    close(recorder.series("step", "loss"), [a for a, _ in losses])
    close(recorder.series("step", "loss", "of_generator"), [b for _, b in losses])
    names = [column.name for column in recorder.table("grad_norm", "of_generator").columns]
    assert names == ["generator.weight", "generator.bias"]
    owners = {p.name: p.optimizer for p in recorder.info["parameters"]}
    assert owners["0.weight"] == "adam"
    assert owners["generator.weight"] == "of_generator"


def test_two_optimizers_that_take_turns_are_measured_alike():
    """At their own cadence, with phases of their own; one optimizer's loss goes through the other
    one's model."""
    torch.manual_seed(0)
    maker, judge = torch.nn.Linear(2, 4), torch.nn.Sequential(torch.nn.Linear(4, 1))
    of_maker = torch.optim.SGD(maker.parameters(), lr=0.1)
    of_judge = torch.optim.SGD(judge.parameters(), lr=0.1)

    def loop():
        for _ in range(21):
            of_judge.zero_grad()
            fake = maker(torch.randn(3, 2))
            (judge(fake.detach()).mean() - judge(torch.randn(3, 4)).mean()).backward()
            of_judge.step()
            of_maker.zero_grad()
            (-judge(fake).mean()).backward()
            of_maker.step()

    recorder, _ = trace(loop)
    for key, first in (("", 1), ("of_maker", 2)):
        assert list(recorder.rows("grad_norm", key)) == list(range(first, 43, 2))
        every_tenth = [first, first + 20, first + 40]
        assert list(recorder.rows("weight_norm", key)) == every_tenth
        # Besides its cadence, the update ratio is measured in the first five steps.
        first_five = list(range(first, first + 10, 2))
        assert list(recorder.rows("update_ratio", key)) == sorted({*every_tenth, *first_five})
        for step, took in list(recorder.rows("phase_ms", key).items())[1:]:
            assert all(took[phase] > 0 for phase in ("zero_grad", "forward", "loss", "backward"))
            assert math.isnan(took["clip"]), (step, took)


def test_two_optimizers_of_one_model_clipped_together():
    model, _ = make()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    norms = []

    def loop():
        for _ in range(3):
            inputs, targets = batch()
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            norms.append(
                [
                    sum(p.grad.square().sum() for p in layer.parameters()).sqrt().item()
                    for layer in (model[0], model[2])
                ]
            )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            second.step()
            first.step()

    recorder, _ = trace(loop)
    by_layer = {recorder.table("grad_norm", key).columns[0].name: key for key in ("", "second")}
    # Both were read before they were clipped, although one stepped after the other.
    for position, layer in enumerate(("0.weight", "2.weight")):
        close(
            recorder.series("step", "grad_norm_preclip", by_layer[layer]),
            [pair[position] for pair in norms],
        )
    for key in ("", "second"):
        close(
            recorder.series("clip", "norm_before", key),
            [float(torch.tensor(n).norm()) for n in norms],
        )


def test_closure_measures_its_first_evaluation():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    inputs, targets = batch(16)
    evaluations: list[list[tuple[float, float]]] = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        evaluations[-1].append((loss.item(), norm))
        return loss

    def loop():
        for _ in range(2):
            evaluations.append([])
            optimizer.step(closure)

    recorder, gate = trace(loop)
    assert all(len(found) > 1 for found in evaluations)
    close(recorder.series("step", "loss"), [found[0][0] for found in evaluations])
    close(recorder.series("step", "grad_norm_preclip"), [found[0][1] for found in evaluations])
    close(recorder.series("step", "evaluations"), [len(found) for found in evaluations])
    assert gate.phases(1)[-1] == "step"
    assert gate.phases(1).count("step") == 1
    assert gate.phases(1).count("backward") == len(evaluations[0])


def test_evaluation_without_gradients_is_no_phase():
    model, optimizer = make()

    def loop():
        for _ in range(2):
            plain_loop(model, optimizer, 1)
            with torch.no_grad():
                model(torch.randn(2, 6))

    _, gate = trace(loop)
    assert gate.phases(2) == TEXTBOOK


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    model, optimizer = make()
    data = DataLoader(
        TensorDataset(torch.randn(12, 6), torch.randint(0, 3, (12,))), 4, num_workers=workers
    )

    def loop():
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    _, gate = trace(loop)
    assert gate.phases(3) == [phase for phase in PHASES if phase != "clip"]


def test_autograd_backward_and_several_tensors():
    model, optimizer = make()
    values = []

    def loop():
        optimizer.zero_grad()
        inputs, targets = batch()
        logits = model(inputs)
        first, second = F.cross_entropy(logits, targets), logits.square().mean()
        torch.autograd.backward([first, second])
        values.append(first.item() + second.item())
        optimizer.step()

    recorder, _ = trace(loop)
    close(recorder.series("step", "loss"), values)


def test_names_are_the_models_own_under_compile_wrappers():
    torch.manual_seed(0)
    model = SmallGpt()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters())

    def loop():
        for _ in range(2):
            tokens = torch.randint(0, 11, (2, 5))
            compiled(tokens).sum().backward()
            optimizer.step()

    recorder, gate = trace(loop)
    assert [p.name for p in recorder.info["parameters"]] == [n for n, _ in model.named_parameters()]
    assert "forward" in gate.phases(2)


def test_parameters_of_no_module_are_numbered():
    weight = torch.randn(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loop():
        for _ in range(6):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()

    recorder, gate = trace(loop)
    assert [c.name for c in recorder.table("grad_norm").columns] == ["param_0"]
    assert gate.phases(6) == ["data", "zero_grad", "loss", "backward", "step"]
    assert "forward" in recorder.info["unseen"]


def test_bare_forward_method_is_named_all_the_same():
    model, optimizer = make()

    def loop():
        for _ in range(2):
            inputs, targets = batch()
            F.cross_entropy(model.forward(inputs), targets).backward()
            optimizer.step()

    recorder, _ = trace(loop)
    assert recorder.table("grad_norm").columns[0].name == "0.weight"


def test_times_of_the_phases_lie_within_the_step():
    model, optimizer = make()
    recorder, _ = trace(lambda: plain_loop(model, optimizer, 20))
    for step, row in recorder.rows("phase_ms").items():
        assert not any(value < 0 for value in row.values())
        if step > 1:
            total = recorder.rows("step")[step]["step_ms"]
            assert sum(ms for ms in row.values() if ms == ms) <= total * 1.001
            assert row["forward"] > 0
            assert row["backward"] > 0


def test_time_of_an_environment_between_calls_of_a_policy_is_data(monkeypatch):
    now = [1.0]
    monkeypatch.setattr("tui_trainer.trace.phase_clocks.perf_counter", lambda: now[0])
    model, optimizer = make()

    def passes(seconds):
        now[0] += seconds

    def rollouts():
        for _ in range(3):
            chosen = []
            for _ in range(4):
                chosen.append(model(batch()[0]).log_softmax(1)[:, 0].mean())
                passes(1)  # the environment's step
            optimizer.zero_grad()
            torch.stack(chosen).sum().backward()
            passes(16)
            optimizer.step()

    def accumulates():
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                passes(4)
                inputs, targets = batch()
                F.cross_entropy(model(inputs), targets)  # of a batch that is left out
                passes(1)
                loss = F.cross_entropy(model(inputs), targets)
                passes(1)
                loss.backward()
            optimizer.step()

    recorder, _ = trace(rollouts)
    row = recorder.rows("phase_ms")[2]
    assert (row["data"], row["loss"], row["other"]) == (3000, 1000, 16000)
    recorder, _ = trace(accumulates)
    row = recorder.rows("phase_ms")[2]
    assert (row["data"], row["loss"]) == (8000, 4000)


def test_other_threads_pass_by():
    import threading

    model, optimizer = make()

    def loop():
        thread = threading.Thread(target=plain_loop, args=(model, optimizer, 2))
        thread.start()
        thread.join()

    recorder, gate = trace(loop)
    assert gate.reached_boundaries == []
    assert recorder.records == []


def test_failed_forward_is_no_boundary_and_the_loop_goes_on():
    model, optimizer = make()

    def loop():
        plain_loop(model, optimizer, 1)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5))
        plain_loop(model, optimizer, 1)

    _, gate = trace(loop)
    assert gate.phases(2)[-5:] == ["forward", "loss", "backward", "clip", "step"]


def test_suspended_sees_nothing():
    from tests.trace.support import EVERYTHING, KeepingRecorder
    from tui_trainer.probes import PROBES
    from tui_trainer.trace.tracer import Tracer

    model, optimizer = make()
    gate = CountingGate()
    recorder = KeepingRecorder()
    with Tracer(recorder, gate, PROBES, EVERYTHING) as tracer:
        plain_loop(model, optimizer, 1)
        with tracer.suspended():
            plain_loop(model, optimizer, 3)
        plain_loop(model, optimizer, 1)
    assert [record.step for record in recorder.records] == [1, 2]


def test_group_added_later_is_the_same_optimizer_with_further_columns():
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)

    def loop():
        for parameter in model[2].parameters():
            parameter.requires_grad_(False)
        plain_loop(model, optimizer, 2)
        for parameter in model[2].parameters():
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": model[2].parameters()})
        plain_loop(model, optimizer, 2)

    recorder, _ = trace(loop)
    assert recorder.info["optimizers"] == ("sgd",)
    tables = [table for table in recorder.tables if table.name == "grad_norm"]
    assert [len(table.columns) for table in tables] == [2, 4]
    assert {table.optimizer for table in recorder.tables} == {""}
    steps = {table.id: [] for table in tables}
    for record in recorder.records:
        for number, _ in record.rows:
            if number in steps:
                steps[number].append(record.step)
    assert list(steps.values()) == [[1, 2], [3, 4]]
    assert all(p.optimizer == "sgd" and p.trainable for p in recorder.info["parameters"])


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "kept alive by its scheduler"])
def test_folds_of_one_model_after_another_go_on_in_the_same_tables(scheduled):
    def loop():
        for fold in range(3):
            torch.manual_seed(fold)
            model = mlp()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            if scheduled:
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            plain_loop(model, optimizer, 4)
            if scheduled:
                scheduler.step()

    gc.disable()
    try:
        recorder, gate = trace(loop)
    finally:
        gc.enable()
    assert list(recorder.rows("grad_norm")) == list(range(1, 13))
    assert {table.optimizer for table in recorder.tables} == {""}
    assert len([table for table in recorder.tables if table.name == "grad_norm"]) == 1
    assert recorder.info["optimizers"] == ("adamw",)
    assert [p.name for p in recorder.info["parameters"]] == [n for n, _ in mlp().named_parameters()]
    assert len(recorder.notices_of("state")) == 2
    assert [gate.phases(step) for step in (2, 6, 10)] == [gate.phases(2)] * 3


def test_trials_of_another_size_get_tables_of_their_own():
    def loop():
        for width in (8, 16):
            model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
            plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)

    recorder, _ = trace(loop)
    assert list(recorder.rows("grad_norm")) == [1, 2, 3]
    assert list(recorder.rows("grad_norm", "sgd#2")) == [4, 5, 6]
    shapes = {p.name: p.shape for p in recorder.info["parameters"]}
    assert shapes["0.weight"] == (8, 6)
    assert shapes["Sequential.0.weight"] == (16, 6)


def test_two_models_of_one_shape_side_by_side_stay_two():
    def loop():
        pairs = []
        for _ in range(2):
            model = mlp()
            pairs.append((model, torch.optim.SGD(model.parameters(), lr=0.1)))
        for _ in range(3):
            for model, optimizer in pairs:
                plain_loop(model, optimizer, 1)

    recorder, _ = trace(loop)
    assert list(recorder.rows("grad_norm")) == [1, 3, 5]
    assert list(recorder.rows("grad_norm", "sgd#2")) == [2, 4, 6]
    assert recorder.notices_of("state") == []


def test_several_models_and_optimizers_have_the_names_of_their_variables():
    class Gan:
        def __init__(self):
            self.maker, self.judge = nn.Linear(4, 6), nn.Linear(6, 1)
            self.parts = {
                "of_judge": torch.optim.Adam(self.judge.parameters()),
                "of_maker": torch.optim.Adam(self.maker.parameters()),
            }

        def fit(self):
            for _ in range(2):
                fake = self.maker(torch.randn(3, 4))
                self.judge(fake.detach()).mean().backward()
                self.update(self.parts["of_judge"])
                self.judge(fake).mean().backward()
                self.update(self.parts["of_maker"])

        def update(self, optimizer):
            optimizer.step()
            optimizer.zero_grad()

    recorder, _ = trace(lambda: Gan().fit())
    assert recorder.info["optimizers"] == ("parts.of_judge", "parts.of_maker")
    owners = {p.name: p.optimizer for p in recorder.info["parameters"]}
    assert owners == {
        "judge.weight": "parts.of_judge",
        "judge.bias": "parts.of_judge",
        "maker.weight": "parts.of_maker",
        "maker.bias": "parts.of_maker",
    }


def test_variables_of_what_called_the_script_name_nothing():
    from tui_trainer.trace.script_frames import objects_of_script, variable_of

    callers, callers_alone = nn.Linear(2, 2), nn.Linear(2, 2)
    names = {"__name__": "__main__", "variable_of": variable_of, "mine": callers}
    names |= {"objects_of_script": objects_of_script, "Module": nn.Module}
    exec("found = variable_of(mine)", names)
    exec("modules = objects_of_script(Module)", names)
    assert names["found"] == "mine"
    assert names["modules"] == [callers]
    assert callers_alone not in names["modules"]


def test_the_optimizers_of_one_model_leave_its_names_alone():
    def loop():
        model = mlp()
        decayed = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.1)
        others = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1)
        for _ in range(2):
            model(torch.randn(4, 6)).sum().backward()
            for optimizer in (decayed, others):
                optimizer.step()
                optimizer.zero_grad()

    recorder, _ = trace(loop)
    assert set(recorder.info["optimizers"]) == {"decayed", "others"}
    names = {p.name for p in recorder.info["parameters"]}
    assert names == {name for name, _ in mlp().named_parameters()}


def test_attention_is_measured_in_the_first_steps_where_the_optimizer_comes_late():
    """`zero_grad` at the end: the optimizer is not known before the first call of the model."""
    model = SmallGpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loop():
        for _ in range(5):
            inputs = torch.randint(0, 11, (2, 6))
            F.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    recorder, _ = trace(loop)
    assert set(recorder.rows("attention_health")) & {1, 2, 3}


def test_no_variable_of_a_function_is_kept_alive():
    """What is read of the script's frames must not outlive the variable."""
    kept = []

    def loop():
        maker, judge = nn.Linear(4, 6), nn.Linear(6, 1)
        of_judge = torch.optim.SGD(judge.parameters(), lr=0.1)
        of_maker = torch.optim.SGD(maker.parameters(), lr=0.1)
        for _ in range(2):
            batch = torch.randn(3, 4)
            for optimizer in (of_judge, of_maker):
                judge(maker(batch)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        reference = weakref.ref(batch)
        del batch
        kept.append(reference())

    recorder, _ = trace(loop)
    assert set(recorder.info["optimizers"]) == {"of_judge", "of_maker"}
    assert kept == [None]


def test_a_copy_of_the_variables_that_the_script_holds_is_left_alone():
    from tui_trainer.trace.script_frames import forget_variables

    value = 5
    mine = locals()
    forget_variables(sys._getframe())
    assert mine["value"] == value
