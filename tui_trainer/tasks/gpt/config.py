"""Options of the GPT task, and its presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import option
from tui_trainer.config.training import DATA, EVALUATION, MODEL, TrainingConfig, check_heads
from tui_trainer.protocol.schema import Scalar


@dataclass(frozen=True, kw_only=True)
class GptConfig(TrainingConfig):
    """Options of a character-level GPT and its training."""

    data: str | None = option(
        None, "a text file, or a folder of them; default: Python's language reference", group=DATA
    )
    block_size: int = option(
        64, "context length", group=MODEL, unit="characters", minimum=1, maximum=1 << 20
    )
    layers: int = option(4, "transformer blocks", group=MODEL, minimum=1, maximum=1000)
    heads: int = option(4, "attention heads per block", group=MODEL, minimum=1)
    width: int = option(128, "size of the embedding", group=MODEL, minimum=1, maximum=1 << 17)
    dropout: float = option(0.0, "dropout probability", group=MODEL, minimum=0, below=1)
    bias: bool = option(False, "biases in linear layers and layer norms", group=MODEL)
    vocabulary: int | None = option(
        None,
        "rows of the token embedding; default: one for each character of the corpus",
        group=MODEL,
        minimum=1,
        maximum=1 << 22,
    )
    prompt: str | None = option(
        None, "prompt of the sampled text; default: the start of a line", group=EVALUATION
    )
    sample_every: int = option(
        250, "steps between sampled texts; 0: none", group=EVALUATION, unit="steps", minimum=0
    )
    sample_length: int = option(
        200, "length of a sampled text", group=EVALUATION, unit="characters", minimum=1
    )
    temperature: float = option(
        0.8,
        "sampling temperature; 1: as the model predicts",
        group=EVALUATION,
        above=0,
    )

    def check(self) -> None:
        """Check combinations of fields. Raises ConfigurationError."""
        super().check()
        check_heads(self.width, self.heads)
        if self.validation_share == 0:
            raise ConfigurationError(
                "--validation-share is 0", "the GPT needs some text to validate on: try 0.1"
            )


_NANOGPT: Mapping[str, Scalar] = {
    # config/train_shakespeare_char.py over the defaults of train.py
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "clip": "norm",
    "max_norm": 1.0,
    "bias": False,
    "eval_every": 250,
    "seed": 1337,
}

PRESETS: Mapping[str, Mapping[str, Scalar]] = {
    "light": {
        "steps": 3000,
        "batch_size": 16,
        "block_size": 64,
        "layers": 3,
        "heads": 4,
        "width": 64,
        "learning_rate": 3e-3,
        "min_learning_rate": 3e-4,
        "warmup_steps": 50,
        "eval_every": 100,
        "sample_every": 100,
        "sample_length": 160,
    },
    "nanogpt-cpu": {
        # The command that nanoGPT's README gives for a machine without a GPU. Its loss of 1.88 is
        # from when the default weight decay was 0.01; it is now 0.1.
        **_NANOGPT,
        "weight_decay": 0.01,
        "steps": 2000,
        "batch_size": 12,
        "block_size": 64,
        "layers": 4,
        "heads": 4,
        "width": 128,
        "dropout": 0.0,
        "eval_batches": 150,  # all of tiny Shakespeare's validation text
        "device": "cpu",
    },
    "nanogpt-gpu": {
        **_NANOGPT,
        "steps": 5000,
        "batch_size": 64,
        "block_size": 256,
        "layers": 6,
        "heads": 6,
        "width": 384,
        "dropout": 0.2,
        "eval_batches": 200,
        "dtype": "bf16",
        "compile": True,
    },
    "gpt2": {
        # config/train_gpt2.py: GPT-2's shapes, its 50,257 tokens padded to a multiple of 64
        "steps": 600_000,
        "batch_size": 12,
        "block_size": 1024,
        "layers": 12,
        "heads": 12,
        "width": 768,
        "vocabulary": 50_304,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "warmup_steps": 2000,
        "beta2": 0.95,
        "eval_every": 1000,
        "sample_every": 1000,
        "eval_batches": 200,
        "dtype": "bf16",
        "compile": True,
    },
}
