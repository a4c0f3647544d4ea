"""Builds the training of a GPT: corpus, model, optimizer and evaluations."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.models.gpt import GPT
from tui_trainer.protocol.events import TextSample
from tui_trainer.tasks.definition import Evaluation, EvaluationResult, Training
from tui_trainer.tasks.devices import (
    autocast,
    choose_threads,
    create_scaler,
    evaluation_mode,
    set_up,
)
from tui_trainer.tasks.gpt.config import GptConfig
from tui_trainer.tasks.gpt.data import Corpus, TextBatches, cut_blocks, load_corpus
from tui_trainer.tasks.gpt.loop import train
from tui_trainer.tasks.optimizers import LearningRate, create_optimizer


def build(config: GptConfig) -> Training:
    """Build the training. Raises ConfigurationError if data or configuration cannot be used."""
    device = set_up(config)
    corpus = load_corpus(config.data)
    training, validation = corpus.split(config.validation_share, config.block_size)
    model = create_model(config, corpus).to(device)
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
    batches.total = total = config.steps or (config.epochs or 1) * batches.batches_per_epoch
    optimizer = create_optimizer(model, config, device)
    scaler = create_scaler(config, device)
    evaluations = [
        Evaluation(
            "validation loss",
            config.eval_every,
            ValidationLoss(model, validation, config, device),
            at_start=True,
        )
    ]
    sample = Sample(model, corpus, config, device)  # checks the prompt
    if config.sample_every:
        evaluations.append(Evaluation("sample", config.sample_every, sample, at_start=True))
    if config.compile:
        model.compile()
    rate = LearningRate(config, total)
    return Training(
        model=model,
        loop=functools.partial(train, model, batches, optimizer, rate, scaler, config),
        total_steps=total,
        steps_per_epoch=batches.batches_per_epoch,
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
        tokens=corpus.alphabet,
        classes=corpus.alphabet,
        stateful={"optimizer": optimizer, "scaler": scaler, "batches": batches},
        schedule=rate,
        batches=batches,
    )


def create_model(config: GptConfig, corpus: Corpus) -> GPT:
    """The configured GPT, newly initialised, on the CPU. Raises ConfigurationError."""
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


@dataclass
class ValidationLoss:
    """Mean cross-entropy in nats per character, over the same blocks of the validation text each
    time: `eval_batches` batches of them, evenly spaced, or the whole text if it is shorter."""

    model: GPT
    tokens: Tensor
    config: GptConfig
    device: torch.device

    def starts(self) -> Tensor:
        """Positions at which the blocks begin, int64 of shape (blocks,)."""
        last = len(self.tokens) - 1 - self.config.block_size  # its last target is the last token
        wanted = self.config.eval_batches * self.config.batch_size
        blocks = min(wanted, 1 + last // self.config.block_size)
        return torch.arange(blocks) * last // max(1, blocks - 1)

    def __call__(self) -> EvaluationResult:
        total = torch.zeros((), device=self.device)
        starts = self.starts()
        with evaluation_mode(self.model), autocast(self.config, self.device):
            for first in range(0, len(starts), self.config.batch_size):
                chosen = starts[first : first + self.config.batch_size]  # (≤ B,)
                inputs, targets = cut_blocks(self.tokens, chosen, self.config.block_size)
                logits = self.model(inputs.to(self.device)).float()  # (B, T, V)
                targets = targets.to(self.device)
                total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return {"loss": total.item() / (len(starts) * self.config.block_size)}, []


@dataclass
class Sample:
    """The model's continuation of a prompt, with the same random draws each time, so that the
    texts of different steps can be compared."""

    model: GPT
    corpus: Corpus
    config: GptConfig
    device: torch.device

    def __post_init__(self) -> None:
        """Raises ConfigurationError for a prompt with characters that the corpus does not have."""
        alphabet = self.corpus.alphabet
        default = "\n" if "\n" in alphabet else alphabet[0]
        self.prompt = default if self.config.prompt is None else self.config.prompt
        unknown = sorted(set(self.prompt) - set(alphabet))
        if unknown:
            raise ConfigurationError(
                f"--prompt has characters that {self.corpus.name} does not have: "
                + " ".join(map(repr, unknown)),
                "use characters of the corpus",
            )
        self._prompt = self.corpus.encode(self.prompt)[None]  # (1, T)

    def __call__(self) -> EvaluationResult:
        generator = torch.Generator().manual_seed(self.config.seed)
        with evaluation_mode(self.model), autocast(self.config, self.device):
            tokens = self.model.generate(
                self._prompt,
                self.config.sample_length,
                temperature=self.config.temperature,
                vocabulary=len(self.corpus.alphabet),
                generator=generator,
            )[0]
        text = self.corpus.decode(tokens[self._prompt.shape[1] :])
        return {}, [TextSample(id=0, step=0, prompt=self.prompt, text=text)]
