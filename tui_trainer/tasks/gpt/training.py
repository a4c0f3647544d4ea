"""A GPT made ready to train."""

from __future__ import annotations

import functools

import torch

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.models.gpt import GPT
from tui_trainer.tasks.definition import Evaluation, Training
from tui_trainer.tasks.devices import choose_threads, make_scaler, prepare
from tui_trainer.tasks.gpt import corpus as corpora
from tui_trainer.tasks.gpt.batches import TextBatches
from tui_trainer.tasks.gpt.config import GptConfig
from tui_trainer.tasks.gpt.evaluations import Continuation, ValidationLoss
from tui_trainer.tasks.gpt.loop import train
from tui_trainer.tasks.optimizers import make_optimizer
from tui_trainer.tasks.schedules import LearningRate


def build(config: GptConfig) -> Training:
    """Read the corpus, make the model and all that trains it. Raises ConfigurationError."""
    device = prepare(config)
    corpus = corpora.load(config.data)
    training, validation = corpus.split(config.validation_share, config.block_size)
    model = make_model(config, corpus).to(device)
    tokens_per_step = config.batch_size * config.block_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    torch.set_num_threads(choose_threads(config.threads, parameters * tokens_per_step))

    batches = TextBatches(
        training,
        batch_size=config.batch_size,
        block_size=config.block_size,
        total=config.steps or 0,
        seed=config.seed,
        device=device,
    )
    batches.total = total = config.steps or (config.epochs or 1) * batches.per_epoch
    optimizer = make_optimizer(model, config, device)
    scaler = make_scaler(config, device)
    evaluations = [
        Evaluation(
            "validation loss",
            config.eval_every,
            ValidationLoss(model, validation, config, device),
            at_start=True,
        )
    ]
    sample = Continuation(model, corpus, config, device)
    if config.sample_every:
        evaluations.append(Evaluation("sample", config.sample_every, sample, at_start=True))
    if config.compile:
        model.compile()
    rate = LearningRate(config, total)
    return Training(
        model=model,
        loop=functools.partial(train, model, batches, optimizer, rate, scaler, config),
        total_steps=total,
        steps_per_epoch=batches.per_epoch,
        items_per_step=tokens_per_step,
        item_unit="tokens",
        evaluations=tuple(evaluations),
        facts={
            "data": corpus.name,
            "characters": len(corpus.tokens),
            "vocabulary": len(corpus.alphabet),
            "training characters": len(training),
            "validation characters": len(validation),
            "parameters": parameters,
            "tokens per step": tokens_per_step,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        stateful={"optimizer": optimizer, "scaler": scaler, "batches": batches},
    )


def make_model(config: GptConfig, corpus: corpora.Corpus) -> GPT:
    """The configured GPT, freshly initialised, on the CPU. Raises ConfigurationError."""
    characters = len(corpus.alphabet)
    if config.vocabulary is not None and config.vocabulary < characters:
        raise ConfigurationError(
            f"--vocabulary {config.vocabulary:,} is less than the {characters:,} different "
            f"characters of {corpus.name}",
            f"try --vocabulary {characters}, or leave it out",
        )
    return GPT(
        vocabulary=config.vocabulary or characters,
        block_size=config.block_size,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        dropout=config.dropout,
        bias=config.bias,
    )
