from __future__ import annotations

import io
import math

import pytest
import torch

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.training import resolve
from tui_trainer.tasks.definition import Training, build, find_task
from tui_trainer.tasks.gpt.data import TextBatches, cut_blocks, load_corpus
from tui_trainer.tasks.gpt.training import ValidationLoss

TINY = {
    "layers": 2,
    "heads": 2,
    "width": 16,
    "block_size": 8,
    "batch_size": 4,
    "warmup_steps": 5,
    "eval_batches": 3,
    "sample_length": 12,
    "threads": 1,
    "device": "cpu",
}


def tiny(steps: int = 30, **changes) -> Training:
    definition = find_task("gpt")
    return build(definition, resolve(definition, "light", {**TINY, "steps": steps, **changes}))


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def assert_equal(some: dict, other: dict) -> None:
    assert some.keys() == other.keys()
    assert all(torch.equal(some[name], other[name]) for name in some)


@pytest.mark.parametrize("clip", ["norm", "value", "off"])
@pytest.mark.slow
def test_same_seed_same_weights(clip):
    runs = []
    for seed in (1, 1, 2):
        training = tiny(20, seed=seed, dropout=0.1, clip=clip)
        training.loop()
        runs.append(weights(training))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["norm.weight"], runs[2]["norm.weight"])


def test_evaluations_change_nothing():
    plain = tiny(dropout=0.1)
    plain.loop()
    watched = tiny(dropout=0.1)

    def look(*_: object) -> None:
        for evaluation in watched.evaluations:
            evaluation.run()

    handle = watched.stateful["optimizer"].register_step_post_hook(look)
    watched.loop()
    handle.remove()
    assert_equal(weights(plain), weights(watched))
    assert watched.model.training


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"optimizer": "sgd"}])
@pytest.mark.slow
def test_resume_in_the_middle_equals_going_on(options):
    """The state is taken inside the optimizer's step, where a checkpoint is taken."""
    whole = tiny(60, dropout=0.1, **options)
    saved = io.BytesIO()
    steps = 0

    def save(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 40:
            parts = {name: part.state_dict() for name, part in whole.stateful.items()}
            torch.save([weights(whole), parts, torch.get_rng_state()], saved)

    handle = whole.stateful["optimizer"].register_step_post_hook(save)
    whole.loop()
    handle.remove()

    resumed = tiny(60, dropout=0.1, **options)
    saved.seek(0)
    model, parts, generator = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(model)
    for name, part in resumed.stateful.items():
        part.load_state_dict(parts[name])
    torch.set_rng_state(generator)
    resumed.loop()
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.slow
def test_it_learns():
    training = tiny(200, width=32, learning_rate=1e-2)
    before = training.evaluations[0].run()[0]["loss"]
    training.loop()
    after = training.evaluations[0].run()[0]["loss"]
    assert before == pytest.approx(math.log(training.facts["vocabulary"]), abs=0.2)
    assert after < before - 1


def test_facts_and_lengths():
    training = tiny(steps=None, epochs=2)
    facts = training.facts
    assert facts["training characters"] + facts["validation characters"] == facts["characters"]
    assert facts["training characters"] == int(0.9 * facts["characters"])
    assert training.items_per_step == 32
    assert training.steps_per_epoch == (facts["training characters"] - 8) // 8 // 4
    assert training.total_steps == 2 * training.steps_per_epoch


def test_validation_loss_is_the_mean_over_its_batches():
    training = tiny()
    evaluation = training.evaluations[0].run
    assert isinstance(evaluation, ValidationLoss)
    places = evaluation.starts().tolist()
    assert len(places) == 12
    assert places[0] == 0
    assert places[-1] + 9 == len(evaluation.tokens)
    losses = []
    training.model.eval()
    for start in places:
        piece = evaluation.tokens[start : start + 9].long()
        chances = training.model(piece[None, :-1]).log_softmax(-1)[0]
        losses += [-chances[place, piece[place + 1]].item() for place in range(8)]
    assert evaluation()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_short_validation_text_is_taken_whole(tmp_path):
    file = tmp_path / "text"
    file.write_text("".join(chr(97 + number % 26) for number in range(410)))
    evaluation = tiny(data=str(file), eval_batches=100).evaluations[0].run
    assert isinstance(evaluation, ValidationLoss)
    assert evaluation.starts().tolist() == [0, 8, 16, 24, 32]


def test_sample_continues_the_prompt_and_repeats():
    training = tiny(prompt="The ")
    metrics, (sample,) = training.evaluations[1].run()
    assert metrics == {}
    assert sample.prompt == "The "
    assert len(sample.text) == 12
    assert training.evaluations[1].run()[1] == [sample]


def test_targets_are_the_next_characters():
    inputs, targets = cut_blocks(torch.arange(100), torch.tensor([0, 17]), 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [17, 18, 19, 20]]
    assert targets.tolist() == [[1, 2, 3, 4], [18, 19, 20, 21]]


def test_an_epoch_takes_every_piece_once():
    options = {"batch_size": 2, "block_size": 4, "total": 15, "seed": 3}
    batches = TextBatches(torch.arange(45), **options, device=torch.device("cpu"))
    assert batches.batches_per_epoch == 5
    targets = [targets for _, targets in batches]
    offsets = set()
    for epoch in range(3):
        seen = torch.cat(targets[5 * epoch : 5 * epoch + 5]).flatten().sort().values
        assert torch.equal(seen, torch.arange(seen[0], seen[0] + 40))
        offsets.add(int(seen[0]))
    assert len(offsets) > 1
    assert not torch.equal(targets[0], targets[5])


def test_a_text_of_less_than_a_batch_is_drawn_from_anywhere():
    options = {"batch_size": 2, "block_size": 4, "total": 50, "seed": 3}
    batches = TextBatches(torch.arange(6), **options, device=torch.device("cpu"))
    seen = [targets for _, targets in batches]
    assert len(seen) == 50
    assert max(int(targets.max()) for targets in seen) == 5


def test_batches_continue_from_a_state():
    options = {"batch_size": 2, "block_size": 4, "total": 50, "seed": 3}
    first = TextBatches(torch.arange(1000), **options, device=torch.device("cpu"))
    sequence = iter(first)
    for _ in range(20):
        next(sequence)
    second = TextBatches(torch.arange(1000), **options, device=torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    rest, other = list(sequence), list(second)
    assert len(rest) == len(other) == 30
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, other, strict=True))


def test_default_corpus_is_the_language_reference():
    loaded = load_corpus(None)
    assert len(loaded.tokens) > 300_000
    assert "lambda" in loaded.decode(loaded.tokens)


def test_text_survives_as_numbers(tmp_path):
    text = "naïve — 日本語 🙂\nend"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    loaded = load_corpus(str(file))
    assert loaded.decode(loaded.tokens) == text
    assert loaded.decode(loaded.encode("naïve 🙂")) == "naïve 🙂"
    assert list(loaded.alphabet) == sorted(set(text))


def test_folder_of_text_leaves_out_the_rest(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b" / "c.md").write_text("second")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("never")
    loaded = load_corpus(str(tmp_path))
    assert loaded.decode(loaded.tokens) == "first\nsecond"
    assert "picture.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        (b"", "is empty"),
        (b"too short", "is too short"),
        (b"\xff\xfe\xfd binary", "is not text: byte 0 is not UTF-8"),
        (b"text\0with zeros", "zero bytes"),
    ],
)
def test_bad_text_files(tmp_path, content, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        tiny(data=str(file))
    assert caught.value.hint


def test_folder_without_text(tmp_path):
    with pytest.raises(ConfigurationError, match="has no text file"):
        tiny(data=str(tmp_path))


def test_a_short_corpus_suggests_a_block_that_fits(tmp_path):
    file = tmp_path / "text"
    file.write_text("abcdefgh" * 50)
    with pytest.raises(ConfigurationError) as caught:
        tiny(data=str(file), block_size=64)
    block = int(caught.value.hint.split()[-1])
    tiny(data=str(file), block_size=block)


def test_strange_prompt_and_small_vocabulary():
    with pytest.raises(ConfigurationError, match="prompt has characters"):
        tiny(prompt="\u2603")
    with pytest.raises(ConfigurationError, match="--vocabulary 5 is less than"):
        tiny(vocabulary=5)


def test_spare_vocabulary_is_never_sampled():
    training = tiny(vocabulary=2000)
    assert training.model.token_embedding.weight.shape == (2000, 16)
    training.evaluations[1].run()
