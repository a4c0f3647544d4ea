"""The engine: joining of causes and effects, faults, settings."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.findings.synthetic import Run
from tui_trainer.findings.document import PAGE, page
from tui_trainer.findings.observation import Observation
from tui_trainer.findings.rule import Found, Rule, SettingsError, parse_settings
from tui_trainer.findings.rules import RULES
from tui_trainer.protocol.events import Finding, newest_findings
from tui_trainer.store.codec import decode_event, encode


def test_effects_follow_their_cause():
    run = Run()
    for number in range(1, 100):
        run.step(
            2.3 * 1.05**number,
            updates=[2.0] * 8 if number % 10 == 1 else None,
            signs=["kept_gradients"] if number > 1 else [],
        )
    assert run.causes == ["gradients-kept"]
    found = run.found
    assert found["update-ratio-high"].cause == found["gradients-kept"].number
    assert found["loss-diverges"].cause == found["gradients-kept"].number


def test_cause_that_is_found_after_its_effect_takes_it_over():
    run = Run()
    for number in range(1, 120):
        late = number > 60
        run.step(
            2.0 + 3.0 * (number - 60) if late else None,
            updates=[0.3] * 8 if late and number % 10 == 1 else None,
        )
    found = run.found
    assert found["update-ratio-high"].number > found["loss-diverges"].number
    assert found["loss-diverges"].cause == found["update-ratio-high"].number
    assert run.causes == ["update-ratio-high"]


def test_a_learning_rate_far_too_high_is_not_said_to_lack_a_warm_up():
    run = Run(attention=True)
    for number in range(1, 60):
        run.step(min(2.9 * 2.0**number, 1300.0), rate=0.3, updates=[3.0] * 8)
    assert run.causes == ["update-ratio-high"]
    cause = run.found["update-ratio-high"]
    assert cause.level == "error"
    assert run.found["no-warm-up"].cause == run.found["loss-diverges"].cause == cause.number


class Slight(Rule):
    """A warning from the first step on."""

    name = "slight"
    title = "slight"
    needs = explanation = advice = source = "nothing"

    def step(self, seen):
        return [Found(1, f"at step {seen.step}")] if seen.step in (1, 6) else []


class Grave(Slight):
    """Its effect, which is an error from the fourth step on."""

    name = "grave"
    explained_by = ("slight",)

    def step(self, seen):
        return [Found(2, "grave", level="error" if seen.step > 3 else "info")]


def test_a_cause_has_the_worst_level_of_itself_and_its_effects():
    run = Run(kinds=[Slight, Grave])
    levels = []
    for _ in range(7):
        run.step()
        levels.append(run.found["slight"].level)
    assert levels == ["warning"] * 3 + ["error"] * 4
    assert run.found["slight"].text == "at step 6"
    assert run.found["grave"].cause == run.found["slight"].number


class Root(Slight):
    """The cause of `slight`, which is found after it and its effects."""

    name = "root"

    def step(self, seen):
        return [Found(1, "root")] if seen.step == 5 else []


def test_a_cause_that_turns_out_to_be_an_effect_has_its_own_level_again():
    kind = type("Slight", (Slight,), {"explained_by": ("root",)})
    run = Run(kinds=[kind, Grave, Root])
    for _ in range(5):
        run.step()
    assert run.causes == ["root"]
    levels = {rule: found.level for rule, found in run.found.items()}
    assert levels == {"root": "error", "slight": "warning", "grave": "error"}


class Failing(Rule):
    name = "failing"
    title = "fails"
    needs = explanation = advice = source = "nothing"

    def step(self, seen):
        if seen.step == 3:
            raise ZeroDivisionError("3")
        return [Found(seen.step, "said")] if seen.step == 1 else []


class Symptom(Rule):
    """Is seen at the first step."""

    name = "symptom"
    title = needs = explanation = advice = source = "nothing"
    explained_by = ("non-finite",)

    def step(self, seen):
        return [Found(1, "said")] if seen.step == 1 else []


@pytest.mark.parametrize("bad", [1, 11])
def test_nan_is_no_cause_of_what_began_before_it(bad):
    run = Run(kinds=[Symptom, *RULES])
    for number in range(1, 13):
        value = math.nan if number >= bad else None
        run.step(value, nonfinite=[("loss", "", "nan", None)] if value else ())
    found = run.found
    assert (found["symptom"].onset, found["non-finite"].onset) == (1, bad)
    assert (found["symptom"].cause is not None) == (bad == 1)


def test_rule_that_fails_is_switched_off_and_reported_once():
    run = Run(kinds=[Failing, *RULES])
    for _ in range(10):
        run.step(signs=["kept_gradients"])
    assert run.faults == ["rule failing is switched off: ZeroDivisionError: 3"]
    assert set(run.found) == {"failing", "gradients-kept"}


class Escalating(Failing):
    """Reports the same six times, other texts six times, and then an error."""

    name = "escalating"

    def step(self, seen):
        texts = ["same"] * 6 + [f"text {number}" for number in range(6)]
        if seen.step <= len(texts):
            return [Found(1, texts[seen.step - 1], level="warning")]
        return [Found(1, "worse", level="error")] if seen.step == len(texts) + 1 else []


def test_only_changes_count_as_updates_and_a_higher_level_is_always_reported():
    run = Run(kinds=[Escalating])
    texts = []
    for _ in range(13):
        run.step()
        texts.append([(finding.text, finding.level) for finding in run.engine.findings])
    assert texts[6] == [("text 0", "warning")]
    assert texts[11] == [("text 4", "warning")]
    assert texts[12] == [("worse", "error")]


def test_rules_read_what_observations_have():
    fields = {field.name for field in dataclasses.fields(Observation)}
    assert {rule.reads for rule in RULES} - {""} <= fields


def test_steps_without_any_sign_end_a_streak():
    run = Run()
    for number in range(1, 40):
        run.step(signs=["eval_mode"] if number % 3 else [])  # two in a row, and three are reported
    assert not run.found
    for _ in range(3):
        run.step(signs=["eval_mode"])
    assert run.found["eval-mode"].onset == 40


def test_new_parameters_start_over():
    run = Run()
    for fold in range(2):
        for number in range(60):
            run.step(
                2.3 * 0.9**number + 0.01, signs=["new_parameters"] if fold and not number else []
            )
    assert not run.found


def test_nothing_is_judged_before_the_run_is_described():
    run = Run(rules="off")
    run.step(signs=["kept_gradients"])
    assert not run.found


def test_findings_survive_the_store():
    run = Run()
    for _ in range(4):
        run.step(signs=["kept_gradients"])
    (finding,) = run.engine.findings
    assert decode_event(encode(finding)) == finding


def test_newest_event_of_a_finding_counts():
    run = Run()
    for _ in range(4):
        run.step(signs=["kept_gradients"])
    (first,) = run.engine.findings
    changed = Finding(**{n: getattr(first, n) for n in first.__struct_fields__} | {"text": "new"})
    assert newest_findings([first, changed]) == [changed]


def test_thresholds_are_changed():
    run = Run(rules="gradients-kept.steps=8")
    for _ in range(7):
        run.step(signs=["kept_gradients"])
    assert not run.found
    run.step(signs=["kept_gradients"])
    assert "gradients-kept" in run.found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense=off", "there is no rule nonsense"),
        ("over-fitting=perhaps", "over-fitting can be on or off, not perhaps"),
        ("over-fitting.rise=high", "over-fitting.rise needs a number, not high"),
        ("over-fitting.fall=1", "over-fitting has no threshold fall"),
        ("over-fitting", "over-fitting can be on or off, not nothing"),
    ],
)
def test_settings_that_cannot_be_understood(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings(text, RULES)


def test_settings():
    settings = parse_settings("off, over-fitting=on ,over-fitting.rise=0.2", RULES)
    running = [rule for rule in RULES if settings.runs(rule)]
    assert [rule.name for rule in running] == ["over-fitting", "ranks-diverge"]
    assert settings.limits_of(running[0])["rise"] == 0.2
    without = parse_settings("off,ranks-diverge=off", RULES)
    assert not [rule for rule in RULES if without.runs(rule)]


def test_replicas_that_part_are_reported_without_the_rules():
    run = Run(ranks=2, rules="off")
    for number in range(1, 6):
        run.step(signs=["kept_gradients"])
        run.ranks(*({"sample_high": 5.0 + (number > 3) * rank} for rank in range(2)))
    assert not run.found  # half a checksum
    for number in range(6, 12):
        run.step()
        run.ranks(*({"sample_high": 5.0, "sample_low": (number > 8) * rank} for rank in range(2)))
    assert list(run.found) == ["ranks-diverge"]


def test_rules_are_documented():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule.title
        assert rule.explanation.endswith(".")
        assert rule.needs
        assert rule.source
        assert set(rule.explained_by) <= set(names)


def test_page_is_up_to_date():
    wanted = page()
    assert PAGE.read_text(encoding="utf-8") == wanted, "python -m tui_trainer.findings.document"
