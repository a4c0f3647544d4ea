"""The residual stream of one example as the sum of the contributions of heads and blocks, and the
direct effect of each contribution on a logit.

Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"):
the logit is linear in the stream once the divisor of the final norm is held at its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tui_trainer.inspector.attention.calls import AttentionCall, deviation, tolerance
from tui_trainer.inspector.attention.trace import Added, AttentionTrace, FinalNorm, TailLinear
from tui_trainer.protocol.attention import Contribution, ContributionKind, ResidualStream

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)
"""Values to try for norms that do not expose their epsilon."""
NO_NORM = "no norm after the blocks reads a sum of the form x + f(x)"
NO_SUM = "what was added to the stream does not sum to it: it is changed in another way as well"
NO_HEAD = "no linear layer reads the final norm"


class StreamError(Exception):
    """The residual stream cannot be decomposed; the message has the reason."""


@dataclass(frozen=True)
class _Summand:
    """A summand of the stream: (rows, width) in float64."""

    name: str
    kind: ContributionKind
    values: torch.Tensor
    head: int = -1
    within: bool = False
    """Whether this is a part of another summand."""


def residual_stream(trace: AttentionTrace, query: int, queries: int) -> ResidualStream:
    """The stream at the position of the query, or where the model reads it out. Raises
    StreamError."""
    norm = trace.norm
    if norm is None or norm.output is None or not norm.stream.added:
        raise StreamError(NO_NORM)
    rows = norm.input.shape[0]
    stream = norm.input.double()
    notes: list[str] = []
    parts = list(_parts(trace, norm, rows, queries, query, notes))
    total = sum((part.values for part in parts if not part.within), torch.zeros_like(stream))
    difference = _relative(total, stream)
    if not difference <= 4 * tolerance(norm.input.dtype):
        raise StreamError(f"{NO_SUM} (by {difference:.1e} of it)")
    readout, no_logit = None, ""
    try:
        readout = _readout(trace, norm, query if rows == queries else 0, rows == queries)
    except StreamError as reason:
        no_logit = str(reason)
    place = readout.rows if readout is not None else _one(query if rows == queries else 0)
    shown = [_described(part, stream, place, readout) for part in parts]
    here = stream[place].mean(0)
    if readout is None:
        return ResidualStream(
            tuple(shown), float(here.norm()), difference, query, no_logit=no_logit,
            notes=tuple(notes),
        )  # fmt: skip
    shown.append(Contribution("biases", "readout", math.nan, math.nan, readout.constant))
    effects = sum(each.logit for each, part in zip(shown, [*parts, None], strict=True)
                  if part is None or not part.within)  # fmt: skip
    pooled = len(range(*place.indices(rows))) > 1
    position = -1 if pooled else readout.position if readout.position >= 0 else query
    return ResidualStream(
        tuple(shown),
        float(here.norm()),
        difference,
        position,
        readout.target,
        readout.correct,
        readout.logit,
        abs(effects - readout.logit),
        notes=tuple(notes),
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    size = float(theirs.norm())
    return float((ours - theirs).norm()) / size if size else float((ours - theirs).norm())


def _one(row: int) -> slice:
    return slice(row, row + 1)


def _described(
    part: _Summand, stream: torch.Tensor, rows: slice, readout: _Readout | None
) -> Contribution:
    here, whole = part.values[rows].mean(0), stream[rows].mean(0)
    lengths = float(here.norm()) * float(whole.norm())
    return Contribution(
        part.name,
        part.kind,
        float(here.norm()),
        float(here @ whole) / lengths if lengths else math.nan,
        readout.effect(part.values) if readout is not None else math.nan,
        part.head,
    )


# ---------------------------------------------------------------- summands


def _parts(
    trace: AttentionTrace,
    norm: FinalNorm,
    rows: int,
    queries: int,
    query: int,
    notes: list[str],
) -> Iterator[_Summand]:
    stream = norm.stream
    yield _Summand(stream.start.name or "embedding", "start", stream.start.values.double())
    waiting = sorted(
        (call for call in trace.attends.values() if call.out is not None),
        key=lambda call: call.out_index,
    )
    named: dict[str, int] = {}
    listed = 0
    for added in stream.added:
        while waiting and waiting[0].out_index < stream.start.index:
            waiting.pop(0)
        kind: ContributionKind = "module"
        if waiting and waiting[0].out_index <= added.index:
            call = waiting.pop(0)
            while waiting and waiting[0].out_index <= added.index:
                call = waiting.pop(0)
            kind = "attention"
            heads = _heads(call, added, rows, queries, query)
            listed += bool(heads)
            yield from heads
        named[added.name] = named.get(added.name, 0) + 1
        repeat_heads = f" ({named[added.name]})" if named[added.name] > 1 else ""
        yield _Summand(f"{added.name}{repeat_heads}", kind, added.values.double())
    attentions = len(trace.calls)
    if listed < attentions:
        notes.append(
            f"the heads of {attentions - listed} of {attentions} layers are not listed: their "
            "output projection is not seen, or it is not what is added to this stream"
        )


def _heads(
    call: AttentionCall, added: Added, rows: int, queries: int, query: int
) -> list[_Summand]:
    """The contributions of heads and bias; empty where they do not sum to `added`."""
    z, weight, out = call.z, call.out_weight, call.out
    if z is None or weight is None or out is None or out.shape != added.values.shape:
        return []
    factor = _factor(out.double(), added.values.double())
    if factor is None:
        return []
    chosen = z if rows == queries else z[:, query : query + 1]
    split = weight.double().view(weight.shape[0], z.shape[0], z.shape[2])  # (width, heads, size)
    by_head = torch.einsum("hrd,chd->hrc", chosen.double(), split) * factor
    bias = call.out_bias
    rest = torch.zeros_like(by_head[0]) if bias is None else bias.double() * factor
    off = deviation(by_head.sum(0) + rest, added.values.double())
    if not off <= 8 * tolerance(_least_precise(call, added)):
        return []
    found = [
        _Summand(f"head {head}", "head", values, head, within=True)
        for head, values in enumerate(by_head)
    ]
    if bias is not None:
        found.append(_Summand("bias", "bias", rest.expand_as(by_head[0]), within=True))
    return found


def _least_precise(call: AttentionCall, added: Added) -> torch.dtype:
    tensors = [t for t in (call.z, call.out, added.values) if t is not None]
    return max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)


def _factor(out: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """The factor between the projection's output and the tensor added: 1, a dropout mask, one
    factor, or one for each channel. None where it is none of these."""
    limit = 1e-4 * float(added.abs().max()) if added.numel() else 0.0
    one = torch.ones_like(out)

    def fits(factor: torch.Tensor) -> bool:
        return float((out * factor - added).abs().max()) <= limit

    if fits(one):
        return one
    kept = added != 0
    if bool(kept.any()):
        scale = float((added[kept] * out[kept]).sum() / (out[kept] ** 2).sum())
        if fits(scale * kept):  # dropout: 0 or 1 / (1 - p)
            return scale * kept
    squares = (out**2).sum(0)
    channels = torch.where(squares > 0, (out * added).sum(0) / squares, torch.ones_like(squares))
    if out.shape[0] > 1 and fits(channels.expand_as(out)):
        return channels.expand_as(out)
    return None


# ---------------------------------------------------------------- the logit


class _Readout:
    """The logit of one target as a linear function of the stream."""

    def __init__(
        self, scale: torch.Tensor, centred: bool, rows: slice, direction: torch.Tensor
    ) -> None:
        """`scale` (rows, 1): the divisor of the norm. `direction` (width,): gradient of the logit
        with respect to the norm's output, times the norm's weight."""
        self._scale = scale
        self._centred = centred
        self.rows = rows
        self._direction = direction
        self.position = -1
        """The only position that the model reads out; -1: the query's, or all of them."""
        self.target = -1
        self.correct = True
        self.logit = math.nan
        self.constant = 0.0

    def effect(self, values: torch.Tensor) -> float:
        """Effect of a summand (rows, width)."""
        chosen = values[self.rows]
        if self._centred:
            chosen = chosen - chosen.mean(-1, keepdim=True)
        return float((chosen / self._scale[self.rows] @ self._direction).mean())


def _readout(trace: AttentionTrace, norm: FinalNorm, row: int, all_rows: bool) -> _Readout:
    """The readout of the final norm. Raises StreamError where the logit is not a linear function of
    the norm's output."""
    if not trace.tail:
        raise StreamError(NO_HEAD)
    weight, bias, scale, centred = _linear_norm(norm)
    output = norm.output
    assert output is not None
    rows, position = _rows_read(trace.tail[0], output, row, all_rows)
    chain = _chain(trace.tail)
    logits = _row_of(chain[-1].output, rows, row)
    target, correct = _target(trace, chain[-1], row, position, logits)
    last = chain[-1]
    direction = last.weight[target].double()
    constant = float(last.bias[target]) if last.bias is not None else 0.0
    for read in reversed(chain[:-1]):
        if read.bias is not None:
            constant += float(read.bias.double() @ direction)
        direction = direction @ read.weight.double()
    constant += float(bias @ direction)
    readout = _Readout(scale, centred, rows, direction * weight)
    readout.constant, readout.position = constant, position
    readout.target, readout.correct, readout.logit = target, correct, float(logits[target])
    return readout


def _row_of(output: torch.Tensor, rows: slice, row: int) -> torch.Tensor:
    return output[0] if output.shape[0] == 1 else output[row]


def _linear_norm(norm: FinalNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """(weight, bias, divisor of each row, whether the mean is subtracted) of a LayerNorm or
    RMSNorm, recognized by the formula that reproduces its output, whatever its class."""
    x, y = norm.input.double(), norm.output
    assert y is not None
    width = x.shape[-1]
    plain = torch.ones(width, dtype=torch.float64, device=x.device)
    own = getattr(norm.module, "weight", None)
    weight = own.detach().double() if isinstance(own, torch.Tensor) else plain
    shift = getattr(norm.module, "bias", None)
    bias = shift.detach().double() if isinstance(shift, torch.Tensor) else 0 * plain
    given = (getattr(norm.module, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    epsilons = [each for each in given if isinstance(each, float)] or EPSILONS
    if weight.shape == bias.shape == (width,):
        for centred in (True, False):
            taken = x - x.mean(-1, keepdim=True) if centred else x
            for eps in epsilons:
                scale = (taken.pow(2).mean(-1, keepdim=True) + eps).sqrt()
                for factor in (weight, 1 + weight):
                    if deviation(taken / scale * factor + bias, y.double()) <= tolerance(y.dtype):
                        return factor, bias, scale, centred
    kind = type(norm.module).__name__
    raise StreamError(f"the final norm ({kind}) is neither a LayerNorm nor an RMSNorm")


def _rows_read(
    read: TailLinear, output: torch.Tensor, row: int, all_rows: bool
) -> tuple[slice, int]:
    """(rows of the norm's output that the first linear layer reads, their position if it is the
    same for every query, otherwise -1). Raises StreamError."""
    limit = tolerance(output.dtype)
    if not read.pooled:
        if read.input.shape == output.shape and deviation(read.input, output) <= limit:
            return _one(row), -1
        raise StreamError("the input of the first linear layer is not the output of the final norm")
    if not all_rows:
        raise StreamError("the positions are pooled, and there are too many of them to keep")
    seen = read.input[0]
    if deviation(seen, output[0]) <= limit:
        return _one(0), 0
    if deviation(seen, output.mean(0)) <= 4 * limit:
        return slice(None), -1
    last = output.shape[0] - 1
    if deviation(seen, output[last]) <= limit:
        return _one(last), last
    raise StreamError(
        "the input of the first linear layer is neither one position of the final norm's output "
        "nor the mean of all"
    )


def _chain(tail: Sequence[TailLinear]) -> list[TailLinear]:
    """The traced linear layers, if each reads the output of the one before. Raises StreamError."""
    chain = [tail[0]]
    for read in tail[1:]:
        before = chain[-1].output
        same_shape = read.input.shape == before.shape
        if not same_shape or deviation(read.input, before) > tolerance(before.dtype):
            raise StreamError(
                "there are not only linear layers between the final norm and the logits"
            )
        chain.append(read)
    return chain


def _target(
    trace: AttentionTrace, read: TailLinear, row: int, position: int, logits: torch.Tensor
) -> tuple[int, bool]:
    """(class, True) of the loss's target if known, otherwise (class of the largest logit,
    False)."""
    if trace.targets is not None:
        values, batch = trace.targets.values, max(1, trace.batch)
        place = -1
        if values.numel() == batch:
            place = trace.sample
        elif values.numel() % batch == 0:
            each = values.numel() // batch
            query = trace.chosen_query
            place = trace.sample * each + query if query < each else -1
        if 0 <= place < values.numel():
            target = int(values[place])
            if 0 <= target < len(logits):
                return target, True
    return int(logits.argmax()), False
