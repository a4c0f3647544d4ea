"""Measures attention on sampled steps: largest logit, entropy, and cosine of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention.layers import find_layers
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import HEALTH_STATISTICS, attention_columns
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values
from tui_trainer.trace.torch_private import is_compiled

FUNCTION = "scaled_dot_product_attention"
NOT_CALLED = (
    f"{FUNCTION} is not called through torch.nn.functional: attention is computed in another way, "
    "or the function was imported by name"
)
NOT_ONCE = f"{FUNCTION} is not called exactly once for each of these layers"
OTHER_MODEL = "attention is measured in the first forward of a step, which is that of another model"
COMPILED = "the model is compiled: attention inside it cannot be measured"
NO_FORWARD = "attention is measured in the model's forward, which was not called from outside"
PATIENCE = 2
"""Consecutive failed samples after which the reason is shown."""
EXAMPLES = 2
ROWS = 32
"""Number of examples, and of evenly spaced query rows, that are measured of each call, with every
key."""

Attend = Callable[..., torch.Tensor]


class AttentionHealth(Probe):
    """Table `attention_health`: largest logit, mean entropy of the attention rows (nats), mean
    cosine between queries and keys, over a sample of the first forward of the step.

    `scaled_dot_product_attention` is replaced during that forward only; its n-th call belongs to
    the n-th layer. If it is not called exactly once per layer, nothing is measured and the panel
    says why. In a compiled model it is not replaced, since the model would be compiled again.
    """

    name = schema.ATTENTION_HEALTH
    every = 20
    first_steps = 3  # the optimizer may not be known yet at the first model call
    topic = schema.ATTENTION_HEALTH
    watched_every = 5
    importance = 15
    max_stretch = 16
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        found = find_layers(tracked, options.attention_pattern)
        self._layers, self.unseen = found.layers, found.nothing
        if self.unseen:
            return
        if any(is_compiled(module) for module in tracked.modules.values()):
            self.unseen = COMPILED
            return
        paths = tuple(layer.path for layer in self._layers)
        self.tables = (TableSpec(self.name, attention_columns(paths, HEALTH_STATISTICS)),)
        self._original: Attend | None = None
        self._ours: Attend | None = None
        self._seen: list[torch.Tensor] = []
        queries = [each.q.parameter for each in self._layers]
        # It is unknown from which of the parameters the weights of an adapted layer are computed.
        adapted = max(queries) >= len(tracked.parameters)
        own = tracked.parameters if adapted else [tracked.parameters[q] for q in queries]
        self._own = {id(parameter) for parameter in own}
        self._reason = NO_FORWARD
        """Why this step was not measured, if so."""
        self._missed, self._patience = 0, PATIENCE

    def before_forward(self, root: torch.nn.Module) -> None:
        """Replace the function."""
        self._seen = []
        if is_compiled(root):
            self._reason = COMPILED
            return
        if not any(id(parameter) in self._own for parameter in root.parameters()):
            self._reason = OTHER_MODEL
            return
        self._reason = NOT_CALLED
        original = self._original = functional.scaled_dot_product_attention

        def attend(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(self._seen) <= len(self._layers) and not torch.compiler.is_compiling():
                self._measure(query, key, args, kwargs)
            return original(query, key, *args, **kwargs)

        self._ours = attend
        functional.scaled_dot_product_attention = attend

    def after_forward(self) -> None:
        """Restore the function."""
        if self._original is not None:
            if functional.scaled_dot_product_attention is self._ours:
                functional.scaled_dot_product_attention = self._original
            self._original = self._ours = None

    def _measure(
        self, query: torch.Tensor, key: torch.Tensor, args: Any, kwargs: dict[str, Any]
    ) -> None:
        try:
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                self._seen.append(health(query, key, *_settings(args, kwargs)))
        except Exception:  # unusual shapes: the layer is not measured
            self._seen.append(query.new_full((3,), torch.nan, dtype=torch.float32))

    def after_update(self) -> Readings:
        """Three readings per layer, if the function was called once for each."""
        seen, self._seen = self._seen, []
        reason, self._reason = self._reason, NO_FORWARD
        if len(seen) == len(self._layers):
            self._missed = 0
            if self.unseen:
                self._patience *= 2  # measurements succeed only now and then
                self.set_unseen("")
            return seen
        self._missed += 1
        if self._missed == self._patience:
            self.set_unseen(NOT_ONCE if seen else reason)
        return ()

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (values.astype(np.float32) if values.size else None,)


def _settings(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, bool, float | None]:
    """(mask, causal, scale) of a call scaled_dot_product_attention(query, key, value, mask,
    dropout_p, is_causal, *, scale, enable_gqa)."""
    mask = args[1] if len(args) > 1 else kwargs.get("attn_mask")
    causal = args[3] if len(args) > 3 else kwargs.get("is_causal", False)
    return mask, bool(causal), kwargs.get("scale")


def health(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """(3,): largest logit, mean row entropy, mean cosine of allowed query-key pairs.

    query (…, H, T, D), key (…, Hkv, S, D); with fewer key heads each serves a group of queries.
    """
    rows = _sample(query.shape[-2], query.device)
    q = _few(query)[..., rows, :].float()
    k = _few(key).float()
    if q.dim() >= 3 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    products = q @ k.transpose(-1, -2)  # (…, H, rows, S)
    logits = products * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    if causal:
        allowed = rows[:, None] >= torch.arange(k.shape[-2], device=rows.device)[None]
    if mask is not None:
        seen = _few(mask.expand(*query.shape[:-1], k.shape[-2]))[..., rows, :]
        if seen.dtype == torch.bool:
            allowed = allowed & seen
        else:
            logits = logits + seen
            allowed = allowed & torch.isfinite(seen)
    hidden = ~allowed
    logits = logits.masked_fill(hidden, -math.inf)
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(hidden, 0.0)).sum(-1)
    lengths = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).unsqueeze(-2)
    cosine = (products / lengths.clamp_min(1e-30)).masked_fill(hidden, 0.0)
    pairs = allowed.expand_as(cosine).sum().clamp_min(1)
    return torch.stack([logits.amax(), entropy.mean(), cosine.sum() / pairs])


def _few(tensor: torch.Tensor) -> torch.Tensor:
    """The first examples of a batch."""
    return tensor.detach()[:EXAMPLES] if tensor.dim() > 3 else tensor.detach()


def _sample(rows: int, device: torch.device) -> torch.Tensor:
    """Up to ROWS evenly spaced row numbers, the last one among them."""
    count = min(rows, ROWS)
    return torch.linspace(0, rows - 1, count, device=device).round().long()
