"""Reads, splits and tokenizes the text that a GPT trains on, and draws batches from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tui_trainer.config.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_NAME = "Python's language reference"
MAX_NAMED_FILES = 5
"""Maximum number of skipped files that a warning names."""


@dataclass(frozen=True)
class Corpus:
    """A text as tokens."""

    name: str
    alphabet: str
    """Every character that occurs, sorted; the index of a character is its token."""
    tokens: Tensor
    """int32 of shape (characters,)."""

    def encode(self, text: str) -> Tensor:
        """Tokens, int64 of shape (len(text),). Raises KeyError for an unknown character."""
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        return torch.tensor([numbers[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens of shape (n,)."""
        return "".join(self.alphabet[number] for number in tokens.tolist())

    def split(self, validation_share: float, block_size: int) -> tuple[Tensor, Tensor]:
        """Training and validation tokens; the end of the text validates, as in nanoGPT.

        Raises ConfigurationError if either part is shorter than a block and its last target.
        """
        border = int(len(self.tokens) * (1 - validation_share))
        training, validation = self.tokens[:border], self.tokens[border:]
        for part, name in ((training, "training"), (validation, "validation")):
            if len(part) <= block_size:
                raise ConfigurationError(
                    f"{self.name} is too short: of its {len(self.tokens):,} characters the {name} "
                    f"part has {len(part):,}, and a block needs {block_size + 1:,}",
                    _short_text_hint(len(part)),
                )
        return training, validation


def _short_text_hint(characters: int) -> str:
    if characters < 9:
        return "give it more text"
    return f"give it more text, or try --block-size {characters // 2}"


def load_corpus(data: str | None) -> Corpus:
    """The corpus at the path `data`, or the default one. Raises ConfigurationError."""
    name, text = _read_default() if data is None else _read(Path(data).expanduser())
    if not text:
        raise ConfigurationError(f"{name} is empty", "give it a file with some text in it")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    known = np.zeros(int(codes.max()) + 1, np.bool_)
    known[codes] = True
    present = np.flatnonzero(known)
    numbers = np.zeros(len(known), np.int32)
    numbers[present] = np.arange(len(present))
    alphabet = "".join(map(chr, present.tolist()))
    return Corpus(name, alphabet, torch.from_numpy(numbers[codes]))


def _read_default() -> tuple[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigurationError(
            "this Python was installed without its language reference (pydoc_data)",
            "give it a text of yours with --data FILE",
        ) from None
    return DEFAULT_NAME, "\n\n".join(topics[name].strip() for name in sorted(topics))


def _read(path: Path) -> tuple[str, str]:
    try:
        if path.is_dir():
            return str(path), _read_folder(path)
        return str(path), _decode(path)
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no file or folder {path}", "--data takes a text file, or a folder of them"
        ) from None
    except _NotTextError as error:
        raise ConfigurationError(f"{path} is not text: {error}", "it must be UTF-8") from None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}", "--data takes a file that you may read"
        ) from None


def _read_folder(folder: Path) -> str:
    """All text files below a folder, in the order of their paths; logs the files it skips."""
    texts, skipped = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            texts.append(_decode(path))
        except (_NotTextError, OSError):
            skipped.append(str(path.relative_to(folder)))
    if skipped:
        rest = len(skipped) - MAX_NAMED_FILES
        more = f" and {rest:,} more" if rest > 0 else ""
        logger.warning(
            "skipped, not readable text: %s%s", ", ".join(skipped[:MAX_NAMED_FILES]), more
        )
    if not texts:
        raise ConfigurationError(
            f"{folder} has no text file in it", "give it a folder of UTF-8 text files, or one file"
        )
    return "\n".join(text for text in texts if text)


class _NotTextError(Exception):
    pass


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise _NotTextError("it contains zero bytes")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _NotTextError(f"byte {error.start:,} is not UTF-8") from None


# ---------------------------------------------------------------- batches

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, int64 of shape (B, T)."""


def cut_blocks(tokens: Tensor, starts: Tensor, block_size: int) -> Batch:
    """The blocks that begin at `starts`, shape (B,); each token's target is the next token."""
    offsets = torch.arange(block_size + 1)  # (T + 1,)
    blocks = tokens[starts[:, None] + offsets].long()  # (B, 1) + (T + 1,) -> (B, T + 1)
    return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()


class TextBatches:
    """`total` batches of blocks of a text.

    Every epoch takes each block once, in a new order and cut from a new offset: a model sees more
    of the text than in as many steps with blocks drawn at random. Iterating continues from
    `position`, and a batch depends on the seed, the batch size and the position alone.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        batch_size: int,
        block_size: int,
        total: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.total = total
        self.seed = seed
        self.device = device
        self.position = 0
        """Number of batches taken so far."""

    def __len__(self) -> int:
        return self.total

    @property
    def blocks_per_epoch(self) -> int:
        """Number of blocks, which is the same for every offset."""
        return (len(self.tokens) - self.block_size) // self.block_size

    @property
    def batches_per_epoch(self) -> int:
        return max(1, self.blocks_per_epoch // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts, order = torch.empty(0), (-1, 0, 0)
        while self.position < self.total:
            epoch, index = divmod(self.position, self.batches_per_epoch)
            if order != (epoch, self.seed, self.batch_size):
                starts, order = self._starts(epoch), (epoch, self.seed, self.batch_size)
            chosen = starts[index * self.batch_size : (index + 1) * self.batch_size]
            inputs, targets = cut_blocks(self.tokens, chosen, self.block_size)
            self.position += 1
            yield self._to_device(inputs), self._to_device(targets)

    def _starts(self, epoch: int) -> Tensor:
        """Positions at which the blocks of an epoch begin, in order, int64 of shape (≥ B,)."""
        generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
        if self.blocks_per_epoch < self.batch_size:  # too short for a batch of distinct blocks
            positions = len(self.tokens) - self.block_size
            return torch.randint(positions, (self.batch_size,), generator=generator)
        offset = torch.randint(self.block_size, (), generator=generator)
        return offset + self.block_size * torch.randperm(self.blocks_per_epoch, generator=generator)

    def _to_device(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the last step
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def change(self, batch_size: int, seed: int) -> None:
        """Change batch size and seed from the next batch on, as if all earlier batches had had
        them."""
        self.batch_size, self.seed = batch_size, seed

    def check(self, batch_size: int) -> None:
        """Raises ConfigurationError for a batch that is larger than the text has positions."""
        positions = len(self.tokens) - self.block_size
        if not 1 <= batch_size <= positions:
            raise ConfigurationError(
                f"batch_size cannot be {batch_size:,}",
                f"the text has {positions:,} different blocks: give a number from 1 to that",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])
