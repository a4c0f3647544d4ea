"""The text that a GPT learns: where it comes from, its characters as numbers, its two parts."""

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


@dataclass(frozen=True)
class Corpus:
    """A text as numbers."""

    name: str
    alphabet: str
    """Every character that occurs, sorted: character i has number i."""
    tokens: Tensor
    """int32 of shape (characters,)."""

    def encode(self, text: str) -> Tensor:
        """Character numbers, int64 of shape (len(text),). Raises KeyError for a strange one."""
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        return torch.tensor([numbers[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The text of numbers of shape (n,)."""
        return "".join(self.alphabet[number] for number in tokens.tolist())

    def split(self, validation_share: float, block_size: int) -> tuple[Tensor, Tensor]:
        """Training and validation tokens: the end of the text validates, as nanoGPT has it.

        Raises ConfigurationError where either cannot hold a block and the character after it.
        """
        border = int(len(self.tokens) * (1 - validation_share))
        training, validation = self.tokens[:border], self.tokens[border:]
        for part, name in ((training, "training"), (validation, "validation")):
            if len(part) <= block_size:
                raise ConfigurationError(
                    f"{self.name} is too short: of its {len(self.tokens):,} characters the {name} "
                    f"part has {len(part):,}, and a block needs {block_size + 1:,}",
                    _what_fits(len(part)),
                )
        return training, validation


def _what_fits(characters: int) -> str:
    if characters < 9:
        return "give it more text"
    return f"give it more text, or try --block-size {characters // 2}"


def load(data: str | None) -> Corpus:
    """The corpus of `--data`, or the default one. Raises ConfigurationError."""
    name, text = _read_default() if data is None else _read(Path(data).expanduser())
    if not text:
        raise ConfigurationError(f"{name} is empty", "give it a file with some text in it")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    present, tokens = np.unique(codes, return_inverse=True)
    alphabet = "".join(map(chr, present.tolist()))
    return Corpus(name, alphabet, torch.from_numpy(tokens.astype(np.int32)))


def _read_default() -> tuple[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigurationError(
            "this Python came without its language reference (pydoc_data)",
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
    except _NotTextError as fault:
        raise ConfigurationError(f"{path} is not text: {fault}", "it must be UTF-8") from None
    except OSError as fault:
        raise ConfigurationError(
            f"{path} cannot be read: {fault.strerror}", "--data takes a file that you may read"
        ) from None


def _read_folder(folder: Path) -> str:
    """All text files under a folder, in order of their paths; the others are named in the log."""
    texts, left_out = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            texts.append(_decode(path))
        except (_NotTextError, OSError):
            left_out.append(str(path.relative_to(folder)))
    if left_out:
        more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
        logger.warning("left out, not readable text: %s%s", ", ".join(left_out[:5]), more)
    if not texts:
        raise ConfigurationError(
            f"{folder} has no text file in it", "give it a folder of UTF-8 text files, or one file"
        )
    return "\n".join(text for text in texts if text)


class _NotTextError(Exception):
    """A file is something else than text."""


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise _NotTextError("there are zero bytes in it")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        raise _NotTextError(f"byte {fault.start:,} is not UTF-8") from None


# ---- batches
# Pieces of a text, in random order.


Pair = tuple[Tensor, Tensor]


def cut(tokens: Tensor, starts: Tensor, block_size: int) -> Pair:
    """Inputs and targets, int64 of shape (B, T): the target of each character is the next one."""
    offsets = torch.arange(block_size + 1)  # (T + 1,)
    pieces = tokens[starts[:, None] + offsets].long()  # (B, 1) + (T + 1,) -> (B, T + 1)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


class TextBatches:
    """`total` batches of pieces of a text, the same ones for the same seed.

    An epoch takes every piece once, in a new order, cut from a new offset: at as many steps a
    model has seen more of the text than with pieces drawn from anywhere. Iterating goes on from
    `position`, and what comes is a function of the seed and the position alone.
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
        """Batches handed out so far."""

    def __len__(self) -> int:
        return self.total

    @property
    def pieces(self) -> int:
        """Pieces per epoch, wherever the first one begins."""
        return (len(self.tokens) - self.block_size) // self.block_size

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return max(1, self.pieces // self.batch_size)

    def __iter__(self) -> Iterator[Pair]:
        order, order_epoch = torch.empty(0), -1
        while self.position < self.total:
            epoch, place = divmod(self.position, self.per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            starts = order[place * self.batch_size : (place + 1) * self.batch_size]
            inputs, targets = cut(self.tokens, starts, self.block_size)
            self.position += 1
            yield self._move(inputs), self._move(targets)

    def _order(self, epoch: int) -> Tensor:
        """Where the pieces of an epoch start, int64 of shape (at least B,)."""
        generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
        if self.pieces < self.batch_size:  # a text too short for one batch of different pieces
            places = len(self.tokens) - self.block_size
            return torch.randint(places, (self.batch_size,), generator=generator)
        offset = torch.randint(self.block_size, (), generator=generator)
        return offset + self.block_size * torch.randperm(self.pieces, generator=generator)

    def _move(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the last step
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = int(state["position"])
