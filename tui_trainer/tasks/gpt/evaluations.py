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
    """Mean cross-entropy, in nats per character, over the same batches each time."""

    model: GPT
    tokens: Tensor
    config: GptConfig
    device: torch.device

    def __call__(self) -> Result:
        """{"loss": nats}."""
        generator = torch.Generator().manual_seed(self.config.seed)
        total = torch.zeros((), device=self.device)
        size = (self.config.eval_batches, self.config.batch_size)
        places = len(self.tokens) - self.config.block_size
        with evaluating(self.model), autocast(self.config, self.device):
            for starts in torch.randint(places, size, generator=generator):  # (B,)
                inputs, targets = cut(self.tokens, starts, self.config.block_size)
                logits = self.model(inputs.to(self.device))  # (B, T, V)
                targets = targets.to(self.device)
                total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return {"loss": total.item() / self.config.eval_batches}, []


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
