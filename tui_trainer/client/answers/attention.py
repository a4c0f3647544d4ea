"""The examination of an attention layer, decoded and labelled for screens, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.protocol.attention import (
    PAIRS,
    PARTS,
    AttentionExamination,
    Contribution,
    HeadWeights,
    PatchGrid,
    ResidualStream,
)

Floats = npt.NDArray[np.float32]
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"})


@dataclass(frozen=True)
class KeyRow:
    """One key of the examined query's row of attention weights."""

    key: int
    label: str
    product: float
    angle: float
    """Angle between query and key, in degrees."""
    score: float
    """nan where the query may not attend to the key."""
    weight: float

    @property
    def masked(self) -> bool:
        return math.isnan(self.score)


def floats(data: bytes) -> Floats:
    """Decode packed float32 values. Raises ValueError when `data` ends within a value."""
    return np.frombuffer(data, "<f4")


def key_rows(found: AttentionExamination) -> list[KeyRow]:
    """A row for every key of the examined query, in order of position."""
    row = found.row
    if row is None:
        return []
    packed = (row.products, row.angles, row.scores, row.weights)
    columns = [floats(each).tolist() for each in packed]
    return [
        KeyRow(key, position_label(found, key), *values)
        for key, values in enumerate(zip(*columns, strict=True))
    ]


def visible(text: str) -> str:
    """A token with symbols in place of its whitespace."""
    return text.translate(VISIBLE)


def position_label(found: AttentionExamination, position: int) -> str:
    """The token at a position, the row and the column of a patch, or ""."""
    if position < len(found.labels):
        return visible(found.labels[position])
    if found.grid is not None:
        return patch_label(found.grid, position)
    return ""


def patch_label(grid: PatchGrid, position: int) -> str:
    """`row 2, col 3`, or `class` for a token before the patches."""
    place = position - grid.first
    if place < 0:
        return "class" if grid.first == 1 else f"token {position}"
    return f"row {place // grid.columns}, col {place % grid.columns}"


def short_patch_label(grid: PatchGrid, position: int) -> str:
    """`2, 3`, or `class`."""
    place = position - grid.first
    if place < 0:
        return patch_label(grid, position)
    return f"{place // grid.columns}, {place % grid.columns}"


def entropy_text(entropy: float, keys: int) -> str:
    """`1.773 of 3.871 nats`: the second number is the entropy of equal weights."""
    if keys < 2 or not math.isfinite(entropy):
        return f"{entropy:.3f} nats"
    return f"{entropy:.3f} of {math.log(keys):.3f} nats"


def allowed_keys(found: AttentionExamination) -> int:
    """Number of keys that the query may attend to."""
    if found.row is None:
        return 0
    return int((~np.isnan(floats(found.row.scores))).sum())


def target_text(stream: ResidualStream) -> str:
    """`the target ‘e’ (5)`, or `the largest logit, 7`"""
    name = f"‘{visible(stream.target_name)}’ ({stream.target})" if stream.target_name else str(
        stream.target
    )  # fmt: skip
    return f"the target {name}" if stream.correct else f"the largest logit, {name}"


def place_text(found: AttentionExamination, stream: ResidualStream) -> str:
    """The position in the sequence at which the stream is read."""
    if stream.position < 0:
        return "the mean over all positions, which the model reads out"
    label = position_label(found, stream.position)
    place = f"position {stream.position:,}" + (f" {label}" if label else "")
    if stream.position != found.query:
        return f"{place}, which the model reads out"
    return place


def summands(stream: ResidualStream) -> list[Contribution]:
    """The contributions that add up to the stream and to the logit. Heads and biases are left out,
    since the contribution of their attention layer includes them."""
    return [each for each in stream.contributions if each.kind not in ("head", "bias")]


# ---------------------------------------------------------------- plain data


def as_data(found: AttentionExamination) -> dict[str, Any]:
    """The whole examination without packed bytes, for JSON."""
    data: dict[str, Any] = msgspec.structs.asdict(found)
    row = found.row
    data["row"] = None if row is None else {
        name: floats(getattr(row, name)).tolist()
        for name in ("products", "angles", "scores", "weights")
    }  # fmt: skip
    data["entropies"] = floats(found.entropies).tolist()
    if found.map is not None:
        heat: dict[str, Any] = msgspec.structs.asdict(found.map)
        data["map"] = {**heat, "cells": cells_of(found.map).tolist()}
    data["by_head"] = [msgspec.structs.asdict(each) for each in found.by_head]
    data["weights"] = [weights_as_data(each) for each in found.weights]
    if found.spectra is not None:
        data["spectra"] = {
            "singular": dict(zip(PARTS, found.spectra.singular, strict=True)),
            "angles": dict(zip(PAIRS, found.spectra.angles, strict=True)),
        }
    if found.residual is not None:
        stream: dict[str, Any] = msgspec.structs.asdict(found.residual)
        each = [msgspec.structs.asdict(one) for one in found.residual.contributions]
        data["residual"] = {**stream, "contributions": each}
    if found.grid is not None:
        grid: dict[str, Any] = msgspec.structs.asdict(found.grid)
        data["grid"] = {key: value for key, value in grid.items() if key != "picture"}
    return data


def weights_as_data(weights: HeadWeights) -> dict[str, dict[str, float]]:
    """`{"cosines": {"qk": 0.1, …}, …}`"""
    names: Sequence[tuple[str, Sequence[str]]] = (
        ("cosines", PAIRS),
        ("distances", PAIRS),
        ("angles", PAIRS),
        ("largest", PARTS),
        ("stable_ranks", PARTS),
    )
    return {name: dict(zip(keys, getattr(weights, name), strict=True)) for name, keys in names}
