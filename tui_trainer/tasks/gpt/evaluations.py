"""What is looked at between the steps of a GPT: its validation loss and a text that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.models.gpt import GPT
from tui_trainer.protocol.messages import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.tasks.devices import autocast
from tui_trainer.tasks.evaluating import evaluating
from tui_trainer.tasks.gpt.batches import cut
from tui_trainer.tasks.gpt.config import GptConfig
from tui_trainer.tasks.gpt.corpus import Corpus

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
