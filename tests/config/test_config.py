from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.options import options_of, parse
from tui_trainer.config.training import GROUPS, TrainingConfig, from_flat, resolve, to_flat
from tui_trainer.tasks.gpt import GptConfig
from tui_trainer.tasks.gpt import task as gpt
from tui_trainer.tasks.vit import VitConfig
from tui_trainer.tasks.vit import task as vit

ALL_PRESETS = [(task, preset) for task in (gpt, vit) for preset in task.presets]


@pytest.mark.parametrize(("task", "preset"), ALL_PRESETS)
def test_every_preset_is_valid_and_survives_flattening(task, preset):
    data = "somewhere" if task is vit and preset != "digits" else None
    config = resolve(task, preset, {"data": data})
    assert config.preset == preset
    assert from_flat(task.config, to_flat(config)) == config


def test_first_preset_is_the_default():
    assert resolve(gpt).preset == "light"
    assert resolve(vit).preset == "digits"


def test_own_images_have_their_own_default_preset():
    assert resolve(vit, None, {"data": "photos"}).preset == "images"
    assert resolve(vit, "digits", {"data": "photos"}).preset == "digits"
    assert resolve(gpt, None, {"data": "book.txt"}).preset == "light"


def assert_of_nanogpt(config, shape, weight_decay):
    """What both configurations have in common, and their shapes: context, batch, layers, …"""
    assert isinstance(config, GptConfig)
    shapes = (config.block_size, config.batch_size, config.layers, config.heads, config.width)
    assert (*shapes, config.steps, config.dropout) == shape
    rates = (config.learning_rate, config.min_learning_rate, config.warmup_steps)
    assert rates == (1e-3, 1e-4, 100)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.99, weight_decay)
    assert (config.optimizer, config.schedule, config.bias) == ("adamw", "cosine", False)
    assert (config.clip, config.max_norm) == ("norm", 1)


def test_nanogpt_cpu_is_that_of_the_readme():
    config = resolve(gpt, "nanogpt-cpu")
    assert_of_nanogpt(config, (64, 12, 4, 4, 128, 2000, 0.0), weight_decay=0.01)


def test_nanogpt_gpu_is_that_of_the_configuration_file():
    config = resolve(gpt, "nanogpt-gpu")
    assert_of_nanogpt(config, (256, 64, 6, 6, 384, 5000, 0.2), weight_decay=0.1)
    assert (config.dtype, config.compile, config.eval_every) == ("bf16", True, 250)


def test_face_s14_is_as_specified():
    config = resolve(vit, "face-s14", {"data": "faces"})
    assert isinstance(config, VitConfig)
    assert config.patches == 256
    assert (config.image_size, config.patch_size, config.channels) == (224, 14, "3")
    assert (config.width, config.layers, config.embedding) == (384, 12, 512)
    assert (config.batch_size, config.epochs) == (128, 40)


def test_steps_and_epochs_replace_each_other():
    assert resolve(gpt, "light", {"epochs": 3}).steps is None
    config = resolve(vit, "digits", {"steps": 10})
    assert (config.steps, config.epochs) == (10, None)
    with pytest.raises(ConfigurationError, match="both --steps and --epochs"):
        resolve(gpt, "light", {"steps": 5, "epochs": 1})


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ({"width": 65}, "65 cannot be divided among 4 heads", "--width 64 or 68"),
        ({"steps": -3}, "--steps cannot be -3", "at least 1"),
        ({"steps": 1.5}, "--steps cannot be 1.5", "whole number"),
        ({"steps": "many"}, "--steps cannot be 'many'", "whole number"),
        ({"batch_size": 0}, "--batch-size cannot be 0", "at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate cannot be nan", "at least 0"),
        ({"learning_rate": "inf"}, "--learning-rate cannot be 'inf'", "a number"),
        ({"beta2": 1.0}, "--beta2 cannot be 1.0", "less than 1"),
        ({"dropout": -0.1}, "--dropout cannot be -0.1", "at least 0"),
        ({"optimizer": "adamv"}, "--optimizer cannot be 'adamv'", "did you mean adam"),
        ({"dtype": "bf61"}, "--dtype cannot be 'bf61'", "did you mean bf16?"),
        ({"compile": "perhaps"}, "--compile cannot be 'perhaps'", "on or off"),
        ({"lerning_rate": 1}, "no option --lerning-rate", "did you mean learning-rate?"),
        ({"seed": None}, "--seed needs a value", "whole number"),
        ({"min_learning_rate": 1}, "--min-learning-rate 1 is above", "--schedule constant"),
        ({"optimizer": "rmsprop", "implementation": "fused"}, "no fused RMSprop", "foreach"),
        ({"steps": True}, "--steps cannot be True", "whole number"),
    ],
)
def test_bad_values_get_one_clear_message(overrides, message, hint):
    with pytest.raises(ConfigurationError) as caught:
        resolve(gpt, "light", overrides)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_misspelt_preset_suggests_the_near_one():
    with pytest.raises(ConfigurationError) as caught:
        resolve(gpt, "nanogpt-cup")
    assert "no preset 'nanogpt-cup'" in caught.value.message
    assert "did you mean nanogpt-cpu?" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": 3}, "patches of 3 pixels do not tile an image of 8"),
        ({"patch_size": 16}, "patches of 16 pixels do not tile an image of 8"),
        ({"heads": 5}, "64 cannot be divided among 5 heads"),
        ({"shift": 8}, "--shift 8 moves the whole image of 8 pixels out"),
        ({"channels": "3"}, "trains on your own images"),
    ],
)
def test_bad_vit_shapes(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve(vit, "digits", overrides)


def test_suggested_values_are_valid():
    for width in range(1, 70):
        for heads in range(1, 20):
            try:
                resolve(gpt, "light", {"width": width, "heads": heads})
            except ConfigurationError as fault:
                words = fault.hint.replace(",", "").split()
                numbers = [int(word) for word in words if word.isdigit()]
                border = words.index("--heads") if "--heads" in words else len(words)
                wide = [int(word) for word in words[:border] if word.isdigit()]
                assert all(value % heads == 0 and value > 0 for value in wide)
                assert all(width % value == 0 for value in numbers[len(wide) :])


def test_values_typed_in_a_form_are_understood():
    config = resolve(
        gpt,
        "light",
        {"steps": "1e3", "learning_rate": " 0.01 ", "compile": "off", "data": "", "threads": "2"},
    )
    assert (config.steps, config.learning_rate, config.compile) == (1000, 0.01, False)
    assert (config.data, config.threads) == (None, 2)


def test_a_prompt_of_white_space_is_a_prompt():
    config = resolve(gpt, "light", {"prompt": " "})
    assert isinstance(config, GptConfig)
    assert config.prompt == " "


def test_every_option_explains_itself():
    for config in (TrainingConfig, GptConfig, VitConfig):
        options = options_of(config)
        assert {option.name for option in options} | {"preset"} == {
            item.name for item in fields(config)
        }
        for option in options:
            assert option.help
            assert option.group in GROUPS
            if option.default is not None:
                assert parse(option, option.default) == option.default


@given(st.sampled_from(options_of(GptConfig)), st.one_of(st.text(), st.floats(), st.integers()))
def test_any_value_is_taken_or_refused_clearly(option, value):
    fault, taken = None, None
    try:
        taken = parse(option, value)
    except ConfigurationError as refusal:
        fault = refusal
    if fault is None:
        assert taken is None or type(taken).__name__ == option.kind
    else:
        assert option.flag in fault.message
        assert fault.hint


def test_tasks_and_configuration_do_not_import_torch():
    code = (
        "import sys, tui_trainer.config, tui_trainer.tasks.gpt, tui_trainer.tasks.vit\n"
        "sys.exit(int(any(name in sys.modules for name in ('torch', 'numpy', 'textual'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_similar_name_is_suggested():
    hint = did_you_mean("lite", ["light", "large"])
    assert hint == "did you mean light? (choose from light, large)"
    assert did_you_mean("lop.py", ["loop.py"]) == "did you mean loop.py?"
    assert did_you_mean("x", ["loop.py"]) == "there is only loop.py"
