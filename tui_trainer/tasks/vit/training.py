"""A vision transformer made ready to train."""

from __future__ import annotations

import functools

import torch

from tui_trainer.models.vit import ViT
from tui_trainer.protocol.describe import Scalar
from tui_trainer.tasks.definition import Evaluation, Training
from tui_trainer.tasks.devices import choose_threads, make_scaler, prepare
from tui_trainer.tasks.optimizers import make_optimizer
from tui_trainer.tasks.schedules import LearningRate
from tui_trainer.tasks.vit.arithmetic import EpochPlan
from tui_trainer.tasks.vit.batches import Decoder, ImageBatches
from tui_trainer.tasks.vit.config import VitConfig
from tui_trainer.tasks.vit.evaluations import Classification
from tui_trainer.tasks.vit.folder import load_images
from tui_trainer.tasks.vit.images import Images
from tui_trainer.tasks.vit.loop import train
from tui_trainer.tasks.vit.skipped import Skipped


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
        run = Classification(model, validation, config, device, Skipped("held out image"))
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
