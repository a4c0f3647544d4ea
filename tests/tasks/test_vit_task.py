from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests import processes
from tests.cli.calling import call
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.training import resolve
from tui_trainer.tasks.definition import Training, build, find_task
from tui_trainer.tasks.vit import images as image_files
from tui_trainer.tasks.vit.batches import BatchOrder, Decoder, EpochPlan, ImageBatches
from tui_trainer.tasks.vit.images import (
    FolderImages,
    UnreadableImageError,
    decode,
    load_images,
)
from tui_trainer.tasks.vit.training import data_facts

TINY = {"layers": 1, "heads": 2, "width": 16, "threads": 1, "device": "cpu", "warmup_steps": 5}
FOLDER = {**TINY, "image_size": 16, "patch_size": 8, "batch_size": 4, "workers": 0, "steps": 10}


def tiny(preset: str = "digits", **changes) -> Training:
    definition = find_task("vit")
    return build(definition, resolve(definition, preset, {**TINY, **changes}))


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def assert_equal(some: dict, other: dict) -> None:
    assert some.keys() == other.keys()
    assert all(torch.equal(some[name], other[name]) for name in some)


@pytest.fixture
def folder(tmp_path):
    """Three classes of twelve images each, of several sizes, modes and formats; two are damaged."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name / "more").mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 100, (20 + number, 30, 3), dtype=np.uint8)
            pixels[..., label] += 150
            image = Image.fromarray(pixels)
            if number % 3 == 0:
                image.convert("P").save(tmp_path / name / f"{number}.png")
            elif number % 3 == 1:
                image.save(tmp_path / name / f"{number}.JPG")
            else:
                image.convert("L").save(tmp_path / name / "more" / f"{number}.webp")
        (tmp_path / name / "notes.txt").write_text("not an image")
    (tmp_path / "bee" / "0.png").write_bytes(b"not an image at all")
    whole = (tmp_path / "cat" / "4.JPG").read_bytes()
    (tmp_path / "cat" / "4.JPG").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def test_epoch_arithmetic():
    plan = EpochPlan(images=494_149, batch_size=128, epochs=40)
    assert plan.batches_per_epoch == 3_860
    assert plan.updates == 154_400
    assert plan.left_out == 494_149 - 3_860 * 128
    assert EpochPlan(images=100, batch_size=10, steps=7).updates == 7
    with pytest.raises(ConfigurationError, match="do not fill one batch"):
        EpochPlan(images=9, batch_size=10, epochs=1)


def test_digits_are_those_of_scikit_learn_without_importing_it():
    code = "import sys; from tui_trainer.tasks.vit.images import read_digits; read_digits()"
    code += "; assert 'sklearn' not in sys.modules"
    processes.run([sys.executable, "-c", code], check=True)
    from sklearn.datasets import load_digits

    scans, labels = image_files.read_digits()
    assert np.array_equal(scans, load_digits().images)
    assert np.array_equal(labels, load_digits().target)
    assert all(map(np.array_equal, (scans, labels), image_files._load_with_sklearn()))


def test_epoch_arithmetic_is_among_the_facts_of_a_training():
    plan = EpochPlan(images=494_149, batch_size=128, epochs=40)
    images = FolderImages(
        root=Path("faces"),
        files=("a",) * 494_149,
        labels=torch.empty(0),
        classes=("a", "b"),
        image_size=224,
        channels=3,
    )
    found = data_facts(images, images.subset(torch.empty(0, dtype=torch.long)), plan)
    assert list(found.items())[:4] == [
        ("data", "faces"),
        ("images", 494_149),
        ("batches per epoch", 3_860),
        ("updates", 154_400),
    ]
    assert found["left out per epoch"] == 69


def test_digits_facts():
    training = tiny()
    assert training.facts["images"] == 1797
    assert training.facts["classes"] == 10
    assert training.facts["validation images"] == 359
    assert training.steps_per_epoch == 1438 // 64
    assert training.total_steps == training.facts["updates"]
    assert training.item_unit == "images"


@pytest.mark.parametrize("options", [{}, {"shift": 1, "dropout": 0.2}])
def test_same_seed_same_weights(options):
    runs = []
    for seed in (1, 1, 2):
        training = tiny(steps=30, seed=seed, **options)
        training.loop()
        runs.append(weights(training))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_resume_across_an_epoch_equals_going_on():
    whole = tiny(steps=50, dropout=0.1, shift=1)
    saved = io.BytesIO()

    def save(*_: object) -> None:
        if whole.stateful["batches"].position == 30:
            parts = {name: part.state_dict() for name, part in whole.stateful.items()}
            torch.save([weights(whole), parts, torch.get_rng_state()], saved)

    handle = whole.stateful["optimizer"].register_step_post_hook(save)
    whole.loop()
    handle.remove()
    resumed = tiny(steps=50, dropout=0.1, shift=1)
    saved.seek(0)
    model, parts, generator = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(model)
    for name, part in resumed.stateful.items():
        part.load_state_dict(parts[name])
    torch.set_rng_state(generator)
    resumed.loop()
    assert_equal(weights(whole), weights(resumed))


def test_evaluation_changes_nothing_and_counts_right():
    plain = tiny(steps=30, dropout=0.1)
    plain.loop()
    watched = tiny(steps=30, dropout=0.1)
    handle = watched.stateful["optimizer"].register_step_post_hook(
        lambda *_: watched.evaluations[0].run() and None
    )
    watched.loop()
    handle.remove()
    assert_equal(weights(plain), weights(watched))

    metrics, (sample, matrix) = watched.evaluations[0].run()
    counts = np.array(matrix.counts)
    assert counts.sum() == 359
    assert metrics["accuracy"] == pytest.approx(np.trace(counts) / 359)
    assert len(sample.predictions) == len(sample.truths) == len(sample.confidences) == 12
    assert len(sample.pixels) == 12 * sample.width * sample.height * 3
    assert all(0 < confidence <= 1 for confidence in sample.confidences)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_it_learns_digits(tmp_path):
    """Three of the preset's eighty epochs bring 46 % of the held out ones, five 74 %, ten 89 %,
    thirty 97 %, all 98 %."""
    done = call("vit", "--epochs", "3", "--threads", "1", cwd=tmp_path, timeout=450)
    assert done.returncode == 0, done.stderr
    accuracies = [float(found) for found in re.findall(r"accuracy ([0-9.]+)", done.stdout)]
    assert accuracies[0] < 0.25
    assert accuracies[-1] >= 0.38


def test_every_epoch_is_a_new_order_of_all_images():
    plan = EpochPlan(images=20, batch_size=4, epochs=3)
    order = list(BatchOrder(plan, seed=5))
    epochs = [[index for batch in order[at : at + 5] for index, _ in batch] for at in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(BatchOrder(plan, seed=5, start=7)) == order[7:]
    assert list(BatchOrder(plan, seed=6)) != order
    keys = [key for batch in order for _, key in batch]
    assert len(set(keys)) == len(keys)


def test_folder_is_read_whatever_the_format(folder):
    training = tiny("images", data=str(folder), **FOLDER)
    assert training.facts["classes"] == 3
    assert training.facts["images"] == 36
    training.loop()
    training.evaluations[0].run()


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_counted_and_named(folder, caplog, workers):
    definition = find_task("vit")
    options = {**FOLDER, "data": str(folder), "validation_share": 0.0, "shift": 2, "flip": True}
    config = resolve(definition, "images", options)
    images, _ = load_images(config)
    plan = EpochPlan(len(images), 4, epochs=2)
    found = []
    for count in (workers, 0):
        decoder = Decoder(images, flip=True, shift=2)
        batches = ImageBatches(decoder, plan, 1, torch.device("cpu"), count)
        found.append(list(batches))
        assert set(batches.skipped.reasons) == {"bee/0.png", "cat/4.JPG"}
    assert "bee/0.png" in caplog.text
    assert "(2 so far)" in caplog.text
    assert all(images.shape == (4, 3, 16, 16) for images, _ in found[0])
    # the same batches, however many processes decode them
    for (some, labels), (other, other_labels) in zip(*found, strict=True):
        assert torch.equal(some, other)
        assert torch.equal(labels, other_labels)


def test_corrupt_held_out_images_are_named_once_and_count_for_nothing(folder, caplog):
    options = {**FOLDER, "data": str(folder), "validation_share": 1 / 3, "eval_batches": 99}
    _, validation = load_images(resolve(find_task("vit"), "images", options))
    held_out = [validation.name_of(index) for index in range(len(validation))]
    for name in held_out[:3]:
        (folder / name).write_bytes(b"not an image any more")
    damaged = {*held_out[:3], *({"bee/0.png", "cat/4.JPG"} & set(held_out))}
    assert len(held_out) == 12
    evaluation = tiny("images", **options).evaluations[0]
    for _ in range(2):
        metrics, (_, matrix) = evaluation.run()
    counts = np.array(matrix.counts)
    assert counts.sum() == 12 - len(damaged)  # the next image does not stand in
    assert metrics["accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
    for name in damaged:
        assert caplog.text.count(name) == 1
    assert f"{len(damaged)} of 12 images cannot be read" in caplog.text
    assert f"over the other {12 - len(damaged)}" in caplog.text


def test_corrupt_images_of_the_training_sample_are_named_once_with_those_of_the_batches(
    folder, caplog
):
    options = {**FOLDER, "data": str(folder), "validation_share": 0.0, "eval_batches": 99}
    training = tiny("images", **options)
    metrics, _ = training.evaluations[0].run()
    assert metrics["training_sample_accuracy"] <= 1
    training.loop()
    for name in ("bee/0.png", "cat/4.JPG"):
        assert caplog.text.count(name) == 1


def test_nothing_is_measured_on_images_none_of_which_can_be_read(folder, caplog):
    options = {**FOLDER, "data": str(folder), "validation_share": 1 / 3}
    _, validation = load_images(resolve(find_task("vit"), "images", options))
    evaluation = tiny("images", **options).evaluations[0]
    for index in range(len(validation)):
        (folder / validation.name_of(index)).write_bytes(b"")
    assert evaluation.run() == ({}, [])
    assert "accuracy is not measured" in caplog.text


def test_decoding_brings_to_size_and_keeps_the_middle(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = (255, 0, 0)  # the middle square is red
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    tensor = decode(tmp_path / "wide.png", 10, 3)
    assert tensor.shape == (3, 10, 10)
    assert tensor.dtype == torch.uint8
    assert torch.all(tensor[0, :, 1:-1] == 255)
    assert torch.all(tensor[1:] == 0)
    assert decode(tmp_path / "wide.png", 10, 1).shape == (1, 10, 10)
    with pytest.raises(UnreadableImageError):
        decode(tmp_path / "missing.png", 10, 3)


def test_imagenets_layout_has_its_own_validation_set(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    (root / "train").symlink_to(folder)
    (root / "val" / "bee").mkdir(parents=True)
    (folder / "bee" / "1.JPG").rename(root / "val" / "bee" / "1.JPG")
    training = tiny("images", data=str(root), **FOLDER)
    assert training.facts["training images"] == 35
    assert training.facts["validation images"] == 1
    _, (sample, _) = training.evaluations[0].run()
    assert sample.truths == ("bee",)


def test_face_preset_trains_on_every_image(folder):
    small = {key: FOLDER[key] for key in ("batch_size", "workers", "steps")}
    training = tiny("face-s14", data=str(folder), **small)
    assert training.facts["training images"] == 36
    assert training.facts["patches per image"] == 256
    assert training.model.embed(torch.zeros(1, 3, 224, 224)).shape == (1, 512)
    metrics, (sample, _) = training.evaluations[0].run()
    assert set(metrics) == {"training_sample_loss", "training_sample_accuracy"}
    assert (sample.width, sample.height) == (64, 64)


def make(root, layout):
    for path, content in layout.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if content == "image":
            Image.new("RGB", (8, 8)).save(root / path)
        else:
            (root / path).write_bytes(b"broken")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "no sub-folders of images: there are no classes"),
        ({"a.png": "image"}, "images but no sub-folders: there are no classes"),
        ({"a/notes.txt": ""}, "no sub-folder of .* has an image"),
        ({"a/1.png": "image"}, "only one class, a"),
        ({"a/1.png": "", "b/1.png": ""}, "none of the 2 images .* can be read"),
        ({"a/1.png": "image", "b/1.png": "image"}, "do not fill one batch"),
    ],
)
def test_bad_folders(tmp_path, layout, message):
    make(tmp_path, layout)
    with pytest.raises(ConfigurationError, match=message) as caught:
        tiny("images", data=str(tmp_path), **FOLDER)
    assert caught.value.hint


def test_data_that_is_not_a_folder(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no"):
        tiny("images", data=str(tmp_path / "nowhere"), **FOLDER)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        tiny("images", data=str(tmp_path / "file"), **FOLDER)


@pytest.mark.slow
def test_workers_end_when_the_training_is_killed(folder):
    code = f"""
import torch, psutil
from tui_trainer.config.training import resolve
from tui_trainer.tasks.definition import find_task
from tui_trainer.tasks.vit.batches import Decoder, EpochPlan, ImageBatches
from tui_trainer.tasks.vit.images import load_images
images, _ = load_images(resolve(find_task("vit"), "images", {{"data": {str(folder)!r}}}))
batches = iter(ImageBatches(Decoder(images), EpochPlan(32, 4, steps=10**6), 0,
                            torch.device("cpu"), 2))
next(batches)
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
while True:
    next(batches)
"""
    command = [sys.executable, "-c", code]
    with processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as training:
        assert training.stdout is not None
        children = [psutil.Process(int(pid)) for pid in training.stdout.readline().split()]
        assert len(children) >= 3  # the fork server and two workers
        training.kill()
    _, alive = psutil.wait_procs(children, timeout=240)
    for child in alive:
        child.kill()
    assert not alive
