"""A GPT made ready to train."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.models.gpt import GPT
from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.tasks.definition import Evaluation, Training
from tui_trainer.tasks.devices import autocast, choose_threads, evaluating, make_scaler, prepare
from tui_trainer.tasks.gpt import data as corpora
from tui_trainer.tasks.gpt.config import GptConfig
from tui_trainer.tasks.gpt.data import Corpus, TextBatches, cut
from tui_trainer.tasks.gpt.loop import train
from tui_trainer.tasks.optimizers import LearningRate, make_optimizer

# ---- evaluations
# What is looked at between the steps of a GPT: its validation loss and a text that it writes.


Result = tuple[Mapping[str, float], list[TextSample | ImageSample | ConfusionMatrix]]


@dataclass
class ValidationLoss:
    """Mean cross-entropy, in nats per character, over the same pieces of the validation text each
    time: `eval_batches` batches of them, spread evenly over it, or all of it where that is less."""

    model: GPT
    tokens: Tensor
    config: GptConfig
    device: torch.device

    def starts(self) -> Tensor:
        """Where the pieces start, int64 of shape (pieces,)."""
        last = len(self.tokens) - 1 - self.config.block_size  # its last target is the last token
        wanted = self.config.eval_batches * self.config.batch_size
        pieces = min(wanted, 1 + last // self.config.block_size)
        return torch.arange(pieces) * last // max(1, pieces - 1)

    def __call__(self) -> Result:
        """{"loss": nats}."""
        total = torch.zeros((), device=self.device)
        starts = self.starts()
        with evaluating(self.model), autocast(self.config, self.device):
            for first in range(0, len(starts), self.config.batch_size):
                some = starts[first : first + self.config.batch_size]  # (≤ B,)
                inputs, targets = cut(self.tokens, some, self.config.block_size)
                logits = self.model(inputs.to(self.device)).float()  # (B, T, V)
                targets = targets.to(self.device)
                total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return {"loss": total.item() / (len(starts) * self.config.block_size)}, []


@dataclass
class Continuation:
    """A prompt, continued by the model; the same draws each time, so that texts can be compared."""

    model: GPT
    corpus: Corpus
    config: GptConfig
    device: torch.device

    def __post_init__(self) -> None:
        alphabet = self.corpus.alphabet
        start = "\n" if "\n" in alphabet else alphabet[0]
        self.prompt = start if self.config.prompt is None else self.config.prompt
        strange = sorted(set(self.prompt) - set(alphabet))
        if strange:
            raise ConfigurationError(
                f"--prompt has characters that {self.corpus.name} has not: "
                + " ".join(map(repr, strange)),
                "use characters of the corpus",
            )
        self._prompt = self.corpus.encode(self.prompt)[None]  # (1, T)

    def __call__(self) -> Result:
        """No metric, one text."""
        generator = torch.Generator().manual_seed(self.config.seed)
        with evaluating(self.model), autocast(self.config, self.device):
            tokens = self.model.generate(
                self._prompt,
                self.config.sample_length,
                temperature=self.config.temperature,
                vocabulary=len(self.corpus.alphabet),
                generator=generator,
            )[0]
        text = self.corpus.decode(tokens[self._prompt.shape[1] :])
        return {}, [TextSample(id=0, step=0, prompt=self.prompt, text=text)]


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
