"""A synthetic run: every number of every table, made from a seed, without torch or a clock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol import BETWEEN, PHASES, schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.schema import (
    AttentionInfo,
    Column,
    DeviceInfo,
    ParameterInfo,
    RunInfo,
    Table,
)

Array = NDArray[np.float32]
STARTED_AT = 1_760_000_000.0
MAX_NORM = 1.0


@dataclass
class FakeRun:
    """What the run is, and its values: `values[id]` has one row for each of `steps[id]`."""

    info: RunInfo
    steps: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def table(self, name: str) -> int:
        """Id of the table with this name."""
        return next(table.id for table in self.info.tables if table.name == name)


def gpt_parameters(layers: int, width: int = 128) -> tuple[ParameterInfo, ...]:
    """3 + 6 per layer: 27 with four layers."""
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_embedding.weight", (96, width)),
        ("position_embedding.weight", (64, width)),
    ]
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes += [
            (f"{block}.attention.W_{x}.weight", (width, width)) for x in ("query", "key", "value")
        ]
        shapes += [
            (f"{block}.attention.project.weight", (width, width)),
            (f"{block}.mlp.up.weight", (4 * width, width)),
            (f"{block}.mlp.down.weight", (width, 4 * width)),
        ]
    shapes.append(("head.weight", (96, width)))
    return tuple(
        ParameterInfo(name, shape, "float32", int(np.prod(shape)), "AdamW")
        for name, shape in shapes
    )


def describe(layers: int = 4, total_steps: int = 2000, task: str = "gpt") -> RunInfo:
    """The description of a GPT (or ViT) with `layers` attention layers."""
    names = [f"blocks.{layer}.attention" for layer in range(layers)]
    attention = tuple(
        AttentionInfo(
            layer=name,
            kind="separate",
            query=f"{name}.W_query.weight",
            key=f"{name}.W_key.weight",
            value=f"{name}.W_value.weight",
            heads=4,
            key_value_heads=4,
            head_dim=32,
        )
        for name in names
    )
    parameters = gpt_parameters(layers)
    per_parameter = tuple(Column(parameter.name) for parameter in parameters)
    validation = (Column("loss", "", "lower"),)
    if task == "vit":
        validation += (Column("accuracy", "", "higher"),)
    columns: list[tuple[str, tuple[Column, ...], int]] = [
        (schema.STEP, schema.STEP_COLUMNS, 1),
        (schema.CLIP, schema.CLIP_COLUMNS, 1),
        (schema.PHASE_MS, schema.PHASE_COLUMNS, 1),
        (schema.GRAD_NORM, per_parameter, 1),
        (schema.WEIGHT_NORM, per_parameter, 10),
        (schema.UPDATE_RATIO, per_parameter, 10),
        (schema.VALIDATION, validation, 100),
        (schema.MEMORY, schema.MEMORY_COLUMNS, 10),
        (schema.ATTENTION, _attention(names, schema.ATTENTION_STATISTICS), 1),
        (schema.ATTENTION_SPECTRUM, _attention(names, schema.SPECTRUM_STATISTICS), 50),
        (schema.ATTENTION_HEALTH, _attention(names, schema.HEALTH_STATISTICS), 20),
        (schema.ATTENTION_HEADS, schema.head_columns(tuple((name, 4) for name in names)), 10),
    ]
    return RunInfo(
        name=f"{task}-calm-otter",
        task=task,
        title="gpt · light" if task == "gpt" else "vit · digits",
        revision=1,
        command=("tui-trainer", task),
        directory=f"/runs/{task}-calm-otter",
        host="somewhere",
        pid=4242,
        started_at=STARTED_AT,
        versions={"tui-trainer": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        configuration={"learning_rate": 1e-3, "batch_size": 12, "clip": "norm", "max_norm": 1.0},
        facts={"characters": 465_000, "vocabulary": 96},
        device=DeviceInfo("cpu", "EPYC 7B13", 16 << 30, 3),
        parameters=parameters,
        attention=attention,
        tables=tuple(Table(i, name, cols, every) for i, (name, cols, every) in enumerate(columns)),
        optimizers=("AdamW",),
        total_steps=total_steps,
        steps_per_epoch=600,
        items_per_step=768 if task == "gpt" else 128,
        item_unit="tokens" if task == "gpt" else "images",
    )


def _attention(names: list[str], statistics: tuple[str, ...]) -> tuple[Column, ...]:
    return schema.attention_columns(tuple(names), statistics)


_synthesised: dict[tuple[bytes, int], FakeRun] = {}


def synthesise(info: RunInfo, seed: int = 7) -> FakeRun:
    """All values of a run that learns, clips at times, and whose Wq, Wk and Wv slowly diverge."""
    key = msgspec.msgpack.encode(info), seed
    if key not in _synthesised:
        _synthesised[key] = _synthesise(info, seed)
    whole = _synthesised[key]
    steps, values = ([each.copy() for each in arrays] for arrays in (whole.steps, whole.values))
    return FakeRun(info, steps, values)


def _synthesise(info: RunInfo, seed: int) -> FakeRun:
    random = np.random.default_rng(seed)
    total = info.total_steps or 2000
    run = FakeRun(info)
    every = np.arange(1, total + 1, dtype=np.int64)
    for table in info.tables:
        steps = every[table.every - 1 :: table.every] if table.every > 1 else every
        run.steps.append(steps)
        run.values.append(np.empty((len(steps), len(table.columns)), np.float32))
    norms = _gradient_norms(info, every, random)
    total_norm = np.sqrt((norms.astype(np.float64) ** 2).sum(1))
    fill = {
        schema.STEP: lambda s: _step(s, total, total_norm, random),
        schema.CLIP: lambda s: _clip(total_norm),
        schema.PHASE_MS: lambda s: _phases(len(s), random),
        schema.GRAD_NORM: lambda s: norms,
        schema.WEIGHT_NORM: lambda s: _weights(info, s),
        schema.UPDATE_RATIO: lambda s: 1e-3 * norms[s - 1] / norms.mean(0),
        schema.VALIDATION: lambda s: _validation(s, info),
        schema.MEMORY: lambda s: np.stack([s * np.nan, s * np.nan, 6.1e8 + 2e4 * s], 1),
        schema.ATTENTION: lambda s: _attention_values(info, s, random),
        schema.ATTENTION_SPECTRUM: lambda s: _pattern(s, len(info.attention), _SPECTRUM),
        schema.ATTENTION_HEALTH: lambda s: _pattern(s, len(info.attention), _HEALTH),
        schema.ATTENTION_HEADS: lambda s: _pattern(s, 4 * len(info.attention), _HEADS),
    }
    for table in info.tables:
        run.values[table.id][:] = fill[table.name](run.steps[table.id])
    return run


def _curve(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    return 1.42 + 3.1 * np.exp(-steps / 180.0) + 0.1 * np.exp(-steps / 1500.0)


def _step(
    steps: NDArray[np.int64], total: int, norm: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    loss = _curve(steps) + random.normal(0, 0.035, len(steps)) + 0.05 * np.maximum(norm - 1.0, 0.0)
    rate = 1e-3 * np.minimum(1.0, steps / 100) * (0.55 + 0.45 * np.cos(np.pi * steps / total))
    evaluations = np.full_like(norm, absent(Absent.NO_CLOSURE))
    return np.stack([loss, rate, norm, random.normal(46.0, 1.2, len(steps)), evaluations], 1)


def _clip(norm: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.minimum(1.0, MAX_NORM / (norm + 1e-6))
    limit, gradient_scale = np.full_like(norm, MAX_NORM), np.ones_like(norm)
    return np.stack([limit, norm, norm * scale, scale, gradient_scale], 1)


def _gradient_norms(info: RunInfo, steps: NDArray[np.int64], random: np.random.Generator) -> Array:
    count = len(info.parameters)
    base = random.uniform(0.05, 0.3, count) / np.sqrt(count / 27)
    decay = 0.35 + 0.65 * np.exp(-steps / 250.0)
    noise = np.exp(random.normal(0, 0.12, (len(steps), count)))
    common = np.exp(random.normal(0, 0.10, (len(steps), 1)))
    spikes = np.where(
        random.random((len(steps), 1)) < 0.03, random.uniform(2, 5, (len(steps), 1)), 1.0
    )
    return (base * decay[:, None] * noise * common * spikes).astype(np.float32)


def _phases(count: int, random: np.random.Generator) -> NDArray[np.float64]:
    typical = np.array([1.2, 0.2, 14.6, 0.6, 25.1, 0.9, 3.0])
    phases = typical * np.exp(random.normal(0, 0.03, (count, len(PHASES))))
    between = np.full((count, len(BETWEEN)), absent(Absent.NO_PHASE))
    return np.concatenate([phases, between], axis=1)


def _weights(info: RunInfo, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    start = np.array([0.02 * np.sqrt(parameter.numel) for parameter in info.parameters])
    return start[None, :] * (1 + 0.002 * np.sqrt(steps))[:, None]


def _validation(steps: NDArray[np.int64], info: RunInfo) -> NDArray[np.float64]:
    loss = _curve(steps) + 0.06
    if info.task != "vit":
        return loss[:, None]
    return np.stack([loss, 1 - 0.9 * np.exp(-steps / 200.0)], 1)


def _attention_values(
    info: RunInfo, steps: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.float64]:
    t = np.sqrt(steps / 2000.0)
    noise = lambda scale: random.normal(0, scale, len(steps))  # noqa: E731
    parts: list[NDArray[np.float64]] = []
    for layer in range(len(info.attention)):
        gain = 1.0 + 0.15 * (layer % 12)
        norms = [2.56 + 0.9 * gain * t, 2.56 + 0.8 * gain * t, 2.56 + 0.35 * gain * t]
        parts += norms
        parts += [noise(1e-4) for _ in range(3)]
        parts += [norm / 128 for norm in norms]
        parts += [
            0.05 * gain * t + noise(1e-4),
            -0.01 * t + noise(1e-4),
            0.004 * gain * t + noise(1e-4),
        ]
        parts += [1 - 0.04 * gain * t, 1 + 0.01 * t, 1 - 0.004 * t]
        parts += [0.62 * gain * t, 0.55 * gain * t, 0.31 * gain * t]
        parts += [0.12 * gain + noise(0.05), noise(0.04), noise(0.04)]
        parts += [(norms[0] * norms[1] / norms[2]) / 2.56]
    return np.stack(parts, 1)


_SPECTRUM = (1.1, 1.0, 0.8, 18.0, 17.0, 24.0, 96.0, 95.0, 102.0)
_HEALTH = (6.0, 3.1, 0.12)
_HEADS = (1.3, 1.25, 1.28, 0.04, 0.01, 0.005, 0.4, 0.35, 0.2)


def _pattern(
    steps: NDArray[np.int64], groups: int, typical: tuple[float, ...]
) -> NDArray[np.float64]:
    """`typical` values for each group, a little different in each, slowly growing."""
    gain = 1.0 + 0.06 * (np.arange(groups) % 16)
    row = (gain[:, None] * np.array(typical)).reshape(-1)
    return row[None, :] * (1 + 0.2 * np.sqrt(steps / 2000.0))[:, None]


def with_unseen(info: RunInfo, **reasons: str) -> RunInfo:
    """`info` for a run in which some quantities cannot be seen."""
    return msgspec.structs.replace(info, unseen=reasons)


__all__ = ["FakeRun", "describe", "gpt_parameters", "replace", "synthesise", "with_unseen"]
