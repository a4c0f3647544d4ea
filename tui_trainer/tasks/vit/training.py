"""What is looked at between the steps of a ViT: loss, accuracy, images and confusions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.models.vit import ViT
from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.protocol.schema import Scalar
from tui_trainer.tasks.definition import Evaluation, Training
from tui_trainer.tasks.devices import autocast, choose_threads, evaluating, make_scaler, prepare
from tui_trainer.tasks.optimizers import LearningRate, make_optimizer
from tui_trainer.tasks.vit.config import EpochPlan, VitConfig
from tui_trainer.tasks.vit.data import (
    Decoder,
    ImageBatches,
    Images,
    LoadedBatch,
    SkippedImages,
    UnreadableImageError,
    collate,
    load_images,
    normalise,
)
from tui_trainer.tasks.vit.loop import train

logger = logging.getLogger(__name__)

Result = tuple[Mapping[str, float], list[TextSample | ImageSample | ConfusionMatrix]]

SHOWN = 12
"""Images of a sample."""
THUMBNAIL = 64
"""Their largest side, in pixels."""
MOST_CLASSES = 64
"""Classes of a confusion matrix at most."""


class Classification:
    """Loss and accuracy over the same images each time, some of them to see, and the confusions.

    An image that cannot be read is left out: nothing stands in for it.
    """

    def __init__(
        self,
        model: ViT,
        images: Images,
        config: VitConfig,
        device: torch.device,
        skipped: SkippedImages,
        prefix: str = "",
    ) -> None:
        """`prefix`: put before the metrics' names, where the images are not held out ones."""
        self.model = model
        self.images = images
        self.config = config
        self.device = device
        self.prefix = prefix
        self._skipped = skipped
        self._loaded = False
        self._batches: list[LoadedBatch] = []

    def __call__(self) -> Result:
        """{"loss": nats, "accuracy": share}, an ImageSample and a ConfusionMatrix; nothing where
        no image can be read."""
        batches = self._load()
        if not batches:
            return {}, []
        with evaluating(self.model), autocast(self.config, self.device):
            outputs = [self.model(normalise(batch.pixels.to(self.device))) for batch in batches]
        logits = torch.cat(outputs).float().cpu()  # (images, classes)
        labels = torch.cat([batch.label for batch in batches])  # (images,)
        predictions = logits.argmax(dim=1)
        metrics = {
            f"{self.prefix}loss": F.cross_entropy(logits, labels).item(),
            f"{self.prefix}accuracy": (predictions == labels).float().mean().item(),
        }
        return metrics, [self._sample(batches, logits, labels), self._matrix(labels, predictions)]

    def _load(self) -> list[LoadedBatch]:
        """The images, decoded at first use and kept: at most `eval_batches` batches of them."""
        if not self._loaded:
            size = self.config.batch_size
            count = min(len(self.images), size * self.config.eval_batches)
            readable = [image for index in range(count) if (image := self._image(index))]
            starts = range(0, len(readable), size)
            self._batches = [collate(readable[start : start + size]) for start in starts]
            self._loaded = True
            if len(readable) < count:
                missing = f"{count - len(readable)} of {count} images"
                rest = f"over the other {len(readable)}" if readable else "not measured"
                logger.warning("%s cannot be read: accuracy is %s", missing, rest)
        return self._batches

    def _image(self, index: int) -> LoadedBatch | None:
        try:
            pixels = self.images.load(index)
        except UnreadableImageError as fault:
            self._skipped.note(self.images.name_of(index), str(fault))
            return None
        return LoadedBatch(pixels, self.images.labels[index], [])

    def _sample(self, batches: list[LoadedBatch], logits: Tensor, labels: Tensor) -> ImageSample:
        pixels = torch.cat([batch.pixels for batch in batches[:SHOWN]])[:SHOWN]
        if pixels.shape[-1] > THUMBNAIL:
            small = F.interpolate(
                pixels.float(), size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True
            )
            pixels = small.round().clamp(0, 255).to(torch.uint8)
        rgb = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()  # -> (n, S, S, 3)
        confidences, predictions = logits[: len(rgb)].softmax(dim=1).max(dim=1)
        names = self.images.classes
        return ImageSample(
            id=0,
            step=0,
            width=rgb.shape[2],
            height=rgb.shape[1],
            pixels=rgb.numpy().tobytes(),
            predictions=tuple(names[index] for index in predictions.tolist()),
            confidences=tuple(confidences.tolist()),
            truths=tuple(names[index] for index in labels[: len(rgb)].tolist()),
        )

    def _matrix(self, labels: Tensor, predictions: Tensor) -> ConfusionMatrix:
        """Counts among the most frequent classes; what was taken for another class is left out."""
        classes = len(self.images.classes)
        frequent = torch.bincount(labels, minlength=classes).argsort(descending=True, stable=True)
        shown = frequent[:MOST_CLASSES].sort().values  # (k,)
        place = torch.full((classes,), -1)
        place[shown] = torch.arange(len(shown))
        truth, guess = place[labels], place[predictions]
        both = (truth >= 0) & (guess >= 0)
        cells = truth[both] * len(shown) + guess[both]
        counts = torch.bincount(cells, minlength=len(shown) ** 2).view(len(shown), len(shown))
        return ConfusionMatrix(
            id=0,
            step=0,
            labels=tuple(self.images.classes[index] for index in shown.tolist()),
            counts=tuple(tuple(row) for row in counts.tolist()),
        )


# ---- training
# A vision transformer made ready to train.


def build(config: VitConfig) -> Training:
    """Find the images, make the model and all that trains it. Raises ConfigurationError."""
    device = prepare(config)
    training, validation = load_images(config)
    plan = EpochPlan(len(training), config.batch_size, config.epochs, config.steps)
    model = make_model(config, len(training.classes)).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = parameters * config.batch_size * config.patches
    torch.set_num_threads(choose_threads(config.threads, work))

    decoder = Decoder(training, config.flip, config.shift)
    batches = ImageBatches(decoder, plan, config.seed, device, _workers(config))
    optimizer = make_optimizer(model, config, device)
    scaler = make_scaler(config, device)
    if config.compile:
        model.compile()
    rate = LearningRate(config, plan.updates)
    return Training(
        model=model,
        loop=functools.partial(train, model, batches, optimizer, rate, scaler, config),
        total_steps=plan.updates,
        steps_per_epoch=plan.batches_per_epoch,
        items_per_step=config.batch_size,
        item_unit="images",
        evaluations=(_evaluation(config, model, training, validation, batches),),
        facts={
            **facts(training, validation, plan),
            "parameters": parameters,
            "patches per image": config.patches,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        stateful={"optimizer": optimizer, "scaler": scaler, "batches": batches},
    )


def make_model(config: VitConfig, classes: int) -> ViT:
    """The configured ViT, freshly initialised, on the CPU."""
    return ViT(
        classes=classes,
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=int(config.channels),
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        pooling=config.pooling,
        embedding=config.embedding,
        dropout=config.dropout,
    )


def _evaluation(
    config: VitConfig, model: ViT, training: Images, validation: Images, batches: ImageBatches
) -> Evaluation:
    """On the held out images; where there are none, on a fixed sample of the training images,
    which the metrics' names then say."""
    device = batches.device
    if len(validation):
        run = Classification(model, validation, config, device, SkippedImages("held out image"))
        return Evaluation("validation", config.eval_every, run, at_start=True)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))
    some = training.subset(order[: config.batch_size * config.eval_batches])
    run = Classification(model, some, config, device, batches.skipped, prefix="training_sample_")
    return Evaluation("training sample", config.eval_every, run, at_start=True)


def facts(training: Images, validation: Images, plan: EpochPlan) -> dict[str, Scalar]:
    """What to say of the data; the arithmetic of an epoch first."""
    return {
        "data": training.name,
        "images": len(training) + len(validation),
        "batches per epoch": plan.batches_per_epoch,
        "updates": plan.updates,
        "classes": len(training.classes),
        "training images": len(training),
        "validation images": len(validation),
        "left out per epoch": plan.left_out,
    }


def _workers(config: VitConfig) -> int:
    """Processes that decode: none for the digits, which are in memory."""
    if config.workers is not None:
        return config.workers
    if config.data is None:
        return 0
    return max(1, min(8, choose_threads(0, float("inf"))))
