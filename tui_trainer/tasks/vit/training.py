"""Builds the training of a ViT: images, model, optimizer and evaluation."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.models.vit import ViT
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample
from tui_trainer.protocol.schema import Scalar
from tui_trainer.tasks.definition import Evaluation, EvaluationResult, Training
from tui_trainer.tasks.devices import (
    autocast,
    choose_threads,
    create_scaler,
    evaluation_mode,
    set_up,
)
from tui_trainer.tasks.optimizers import LearningRate, create_optimizer
from tui_trainer.tasks.vit.batches import (
    Decoder,
    EpochPlan,
    ImageBatches,
    LoadedBatch,
    collate,
    normalise,
)
from tui_trainer.tasks.vit.config import VitConfig
from tui_trainer.tasks.vit.images import Images, SkippedImages, UnreadableImageError, load_images
from tui_trainer.tasks.vit.loop import train

logger = logging.getLogger(__name__)

SAMPLE_IMAGES = 12
THUMBNAIL_SIZE = 64
"""Maximum side of a sample's images, in pixels."""
MAX_CLASSES = 64
"""Maximum number of classes in a confusion matrix."""


def build(config: VitConfig) -> Training:
    """Build the training. Raises ConfigurationError if data or configuration cannot be used."""
    device = set_up(config)
    training, validation = load_images(config)
    plan = EpochPlan(len(training), config.batch_size, config.epochs, config.steps)
    model = create_model(config, len(training.classes)).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = parameters * config.batch_size * config.patches
    torch.set_num_threads(choose_threads(config.threads, work))

    decoder = Decoder(training, config.flip, config.shift)
    batches = ImageBatches(decoder, plan, config.seed, device, _worker_count(config))
    optimizer = create_optimizer(model, config, device)
    scaler = create_scaler(config, device)
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
            **data_facts(training, validation, plan),
            "parameters": parameters,
            "patches per image": config.patches,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        classes=training.classes,
        stateful={"optimizer": optimizer, "scaler": scaler, "batches": batches},
        schedule=rate,
        batches=batches,
    )


def create_model(config: VitConfig, classes: int) -> ViT:
    """The configured ViT, newly initialised, on the CPU."""
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


def data_facts(training: Images, validation: Images, plan: EpochPlan) -> dict[str, Scalar]:
    """Facts about the data, the arithmetic of an epoch first."""
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


def _worker_count(config: VitConfig) -> int:
    """Number of processes that decode images; 0 for the digits, which are in memory."""
    if config.workers is not None:
        return config.workers
    if config.data is None:
        return 0
    return max(1, min(8, choose_threads(0, float("inf"))))


def _evaluation(
    config: VitConfig, model: ViT, training: Images, validation: Images, batches: ImageBatches
) -> Evaluation:
    """An evaluation on the validation images; without any, on a fixed sample of the training
    images, with metrics called `training_sample_…`."""
    device = batches.device
    if len(validation):
        run = Classification(model, validation, config, device, SkippedImages("validation image"))
        return Evaluation("validation", config.eval_every, run, at_start=True)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))
    sample = training.subset(order[: config.batch_size * config.eval_batches])
    run = Classification(model, sample, config, device, batches.skipped, "training_sample_")
    return Evaluation("training sample", config.eval_every, run, at_start=True)


class Classification:
    """Loss and accuracy over the same images each time, a sample of them, and a confusion matrix.

    Unreadable images are left out and not replaced.
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
        """`prefix`: beginning of the metrics' names."""
        self.model = model
        self.images = images
        self.config = config
        self.device = device
        self.prefix = prefix
        self._skipped = skipped
        self._batches: list[LoadedBatch] | None = None

    def __call__(self) -> EvaluationResult:
        """{"loss": nats, "accuracy": share}, an ImageSample and a ConfusionMatrix; nothing if no
        image can be read."""
        if self._batches is None:
            self._batches = self._load()
        batches = self._batches
        if not batches:
            return {}, []
        with evaluation_mode(self.model), autocast(self.config, self.device):
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
        """Decode the images, at most `eval_batches` batches of them, into memory."""
        size = self.config.batch_size
        count = min(len(self.images), size * self.config.eval_batches)
        readable = [image for index in range(count) if (image := self._load_image(index))]
        if len(readable) < count:
            unreadable = f"{count - len(readable)} of {count} images"
            rest = f"over the other {len(readable)}" if readable else "not measured"
            logger.warning("%s cannot be read: accuracy is %s", unreadable, rest)
        return [collate(readable[start : start + size]) for start in range(0, len(readable), size)]

    def _load_image(self, index: int) -> LoadedBatch | None:
        try:
            pixels = self.images.load(index)
        except UnreadableImageError as error:
            self._skipped.add(self.images.name_of(index), str(error))
            return None
        return LoadedBatch(pixels, self.images.labels[index], [])

    def _sample(self, batches: list[LoadedBatch], logits: Tensor, labels: Tensor) -> ImageSample:
        pixels = torch.cat([batch.pixels for batch in batches[:SAMPLE_IMAGES]])[:SAMPLE_IMAGES]
        if pixels.shape[-1] > THUMBNAIL_SIZE:
            size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
            small = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
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
        """Counts among the most frequent classes; predictions of other classes are left out."""
        classes = len(self.images.classes)
        frequent = torch.bincount(labels, minlength=classes).argsort(descending=True, stable=True)
        shown = frequent[:MAX_CLASSES].sort().values  # (k,)
        position = torch.full((classes,), -1)
        position[shown] = torch.arange(len(shown))
        truth, prediction = position[labels], position[predictions]
        both = (truth >= 0) & (prediction >= 0)
        cells = truth[both] * len(shown) + prediction[both]
        counts = torch.bincount(cells, minlength=len(shown) ** 2).view(len(shown), len(shown))
        return ConfusionMatrix(
            id=0,
            step=0,
            labels=tuple(self.images.classes[index] for index in shown.tolist()),
            counts=tuple(tuple(row) for row in counts.tolist()),
        )
