"""Examines what an attention layer attends to, from a re-run of the forward pass. The weights are
verified first: softmax(QKᵀ·scale + mask)V must equal the layer's own result, to the precision of
its dtype. If it does not, or if Q and K are unknown, the answer contains the reason instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from tui_trainer.inspector.attention.calls import (
    MULTIHEAD,
    PROJECTED,
    SDPA,
    SOFTMAX,
    AttentionCall,
    LayerToTrace,
    at_least_float32,
    deviation,
    repeat_heads,
    scores_of,
    tolerance,
)
from tui_trainer.inspector.attention.heads import (
    MAX_ELEMENTS,
    NO_HEADS,
    head_matrices,
    head_spectra,
    head_weights,
)
from tui_trainer.inspector.attention.residual_stream import StreamError, residual_stream
from tui_trainer.inspector.attention.trace import AttentionTrace
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.heat_map import heat_map
from tui_trainer.inspector.rerun import StepCapture
from tui_trainer.probes.attention.layers import AttentionLayer, Projection, find_layers
from tui_trainer.protocol.attention import (
    MAX_POSITIONS,
    AttentionExamination,
    ExamineAttention,
    ExampleImage,
    HeadAttention,
    HeadSpectra,
    HeadWeights,
    PatchGrid,
    QueryRow,
    ResidualStream,
)
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.torch_private import tensors_of
from tui_trainer.trace.tracer import Tracer

MAX_MAP = 1 << 26
"""Queries times keys of one head, up to which its whole map is computed."""
MAX_ALL = 1 << 24
"""Queries times keys of all heads, up to which the mean entropy is over all queries."""
SOME_QUERIES = 64
"""Evenly spaced queries over which the mean entropy of a larger layer is computed."""
MAX_PICTURE = 64
"""Pixels on the longer side of an image that is sent."""
WITHOUT_LOSS = "without the loss"
ROTARY = ("rotary", "rope")
CHECKED = {
    SDPA: f"what {SDPA} returned",
    MULTIHEAD: "the output of the module",
    SOFTMAX: "the weighted values that the layer computed",
    PROJECTED: "what the output projection reads",
}
"""How the attention was traced → text about what softmax(QKᵀ·scale)V was compared with."""


@dataclass(frozen=True)
class FoundLayer:
    """An attention layer, and the tracked parameters that include its own."""

    tracked: TrackedParameters
    layer: AttentionLayer


def attention_layers(tracer: Tracer) -> list[FoundLayer]:
    """The attention layers of every model. Raises InspectionError where there are none."""
    found: dict[str, FoundLayer] = {}
    why = "no optimizer has made a step yet"
    names = tracer.registry.names
    modules = {path: module for root in tracer.roots for path, module in names.modules(root)}
    for measurer in tracer.registry.measurers:
        # Modules are forgotten once the probes have been made.
        tracked = dataclasses.replace(measurer.tracked, modules=modules, models=tracer.roots)
        layers = find_layers(tracked, tracer.registry.options.attention_pattern)
        for layer in layers.layers:
            found.setdefault(layer.path, FoundLayer(tracked, layer))
        why = layers.nothing or why
    if not found:
        raise InspectionError(why)
    return list(found.values())


def chosen_layer(layers: Sequence[FoundLayer], path: str) -> FoundLayer:
    """The layer that `path` names: by path, by number, or by a part of a path that only one layer
    has. Raises InspectionError."""
    if not path:
        return layers[0]
    exact = [each for each in layers if each.layer.path == path]
    if not exact and path.isdecimal() and int(path) < len(layers):
        exact = [layers[int(path)]]
    matching = exact or [each for each in layers if path in each.layer.path]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(each.layer.path for each in (matching or layers)[:8])
    if matching:
        raise InspectionError(f"{len(matching)} attention layers match {path}", names)
    raise InspectionError(f"no attention layer matches {path}", f"there are {names}")


def new_trace(layers: Sequence[FoundLayer], request: ExamineAttention, path: str) -> AttentionTrace:
    """A trace to observe a forward pass for `request`."""
    traced: list[LayerToTrace] = []
    paths: dict[int, str] = {}
    for each in layers:
        modules, tracked = each.tracked.modules, each.tracked
        paths.update({id(module): name for name, module in modules.items()})
        pairs = zip(tracked.parameters, tracked.names, strict=True)
        paths.update({id(parameter): name for parameter, name in pairs})
        module = modules.get(each.layer.path)
        if module is not None:
            weights = tuple(_parameter(each.tracked, part) for part in each.layer.parts)
            heads = each.layer.heads, each.layer.key_value_heads
            traced.append(LayerToTrace(each.layer.path, module, *heads, weights))  # type: ignore[arg-type]
    return AttentionTrace(
        traced, paths, path, max(0, request.sample), request.query, request.residual
    )


def _parameter(tracked: TrackedParameters, part: Projection) -> torch.Tensor | None:
    """The parameter of a projection; None for a weight computed from several parameters."""
    return tracked.parameters[part.parameter] if part.parameter < len(tracked.parameters) else None


def examine_attention(
    tracer: Tracer,
    capture: StepCapture,
    request: ExamineAttention,
    tokens: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> AttentionExamination:
    """Answer `request` from a re-run of the current step's forward pass. Raises
    InspectionError."""
    layers = attention_layers(tracer)
    found = chosen_layer(layers, request.layer)
    trace = new_trace(layers, request, found.layer.path)
    examiner = AttentionExaminer(layers, found, request)
    with trace, capture.rerun(trace.called, trace.returned, gradients=False) as run:
        given = tensors_of((run.call.args, run.call.kwargs))
        if request.residual and run.call.returned:
            with contextlib.suppress(Exception):  # without a loss the largest logit is explained
                run.call.loss.recompute(run.output, run.model)  # gives cross_entropy its targets
        notes = [note for note in run.notes if not note.startswith(WITHOUT_LOSS)]
    device = next((tensor.device.type for tensor in given), "cpu")
    with torch.autocast(device, enabled=False):  # the training loop may be inside an `autocast`
        return examiner.answer(trace, given, tokens, classes, notes)


class AttentionExaminer:
    """Makes the answer from a trace, under no_grad on the training thread."""

    def __init__(
        self, layers: Sequence[FoundLayer], found: FoundLayer, request: ExamineAttention
    ) -> None:
        """Raises InspectionError for a head that the layer does not have."""
        self._layers, self._found, self._request = layers, found, request
        heads = found.layer.heads
        if heads is not None and not 0 <= request.head < heads:
            raise InspectionError(f"there is no head {request.head}", f"{_to(heads)} are there")
        self._notes: list[str] = []
        self._classes: Sequence[str] = ()

    def answer(
        self,
        trace: AttentionTrace,
        given: Sequence[torch.Tensor],
        tokens: Sequence[str] = (),
        classes: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> AttentionExamination:
        """`given`: the tensors that the model was called with; `tokens` and `classes`: names of its
        inputs and outputs, by number."""
        layer, request = self._found.layer, self._request
        self._notes, self._classes = list(notes), classes
        calls = trace.calls.get(layer.path, 0)
        if calls > 1:
            self._notes.append(f"the layer is called {calls} times: this is the last one")
        call, missing = self._attend(trace)
        samples = max(1, trace.batch)
        if call is not None and request.sample >= samples:
            raise InspectionError(f"there is no example {request.sample}", f"{_to(samples)} are")
        weights, no_weights, spectra = self._weights(call)
        if call is None or missing:
            return AttentionExamination(
                layer=layer.path, layers=self._paths, head=request.head, heads=layer.heads or 0,
                sample=request.sample, samples=samples, query=0, queries=0, keys=0,
                head_dim=layer.q.rows // layer.heads if layer.heads else 0, scale=math.nan,
                missing=missing, notes=tuple(self._notes), weights=weights, no_weights=no_weights,
                spectra=spectra,
            )  # fmt: skip
        return self._examined(trace, call, given, tokens, (weights, no_weights, spectra))

    @property
    def _paths(self) -> tuple[str, ...]:
        return tuple(each.layer.path for each in self._layers)

    def _examined(
        self,
        trace: AttentionTrace,
        call: AttentionCall,
        given: Sequence[torch.Tensor],
        tokens: Sequence[str],
        weights: tuple[tuple[HeadWeights, ...], str, HeadSpectra | None],
    ) -> AttentionExamination:
        request, layer = self._request, self._found.layer
        assert call.q is not None
        assert call.k is not None
        heads, queries, size = call.q.shape
        keys = call.k.shape[1]
        if not 0 <= request.head < heads:
            raise InspectionError(f"there is no head {request.head}", f"{_to(heads)} are there")
        query = queries - 1 if request.query is None else request.query
        if not 0 <= query < queries:
            raise InspectionError(f"there is no position {query}", f"{_to(queries)} are there")
        off, checked, missing = self._check(call)
        if missing:
            return AttentionExamination(
                layer=layer.path, layers=self._paths, head=request.head, heads=heads,
                sample=request.sample, samples=call.batch, query=query, queries=queries,
                keys=keys, head_dim=size, scale=call.scale, missing=missing,
                notes=tuple(self._notes), weights=weights[0], no_weights=weights[1],
                spectra=weights[2],
            )  # fmt: skip
        if call.dropout:
            share = "" if math.isnan(call.dropout) else f" {call.dropout:g}"
            self._notes.append(f"weights before dropout{share}")
        residual, no_residual = self._residual(trace, query, queries)
        whole = queries * keys <= MAX_MAP
        attention = _weights_of(call, request.head) if whole else None
        picture = None
        if request.window is not None and attention is not None:
            picture = heat_map(attention, request.window)
        elif request.window is not None:
            self._notes.append(f"without its map: it has {queries:,} by {keys:,} entries")
        return AttentionExamination(
            layer=layer.path,
            layers=self._paths,
            head=request.head,
            heads=heads,
            sample=request.sample,
            samples=call.batch,
            query=query,
            queries=queries,
            keys=keys,
            head_dim=size,
            scale=self._scale(call, query),
            how=call.how,
            checked=checked,
            deviation=off,
            labels=_labels(given, request.sample, call.batch, keys, tokens),
            grid=_grid(given, request.sample, call.batch, keys),
            map=picture,
            row=_query_row(call, request.head, query),
            entropies=_floats(entropy(attention).cpu()) if attention is not None else b"",
            by_head=tuple(_head(call, head, query) for head in range(heads)),
            weights=weights[0],
            no_weights=weights[1],
            spectra=weights[2],
            residual=residual,
            no_residual=no_residual,
            notes=tuple(self._notes),
        )

    # ------------------------------------------------------------ verification

    def _attend(self, trace: AttentionTrace) -> tuple[AttentionCall | None, str]:
        """(traced call of the layer, ""), or why its Q and K are unknown."""
        path = self._found.layer.path
        call = trace.attends.get(path)
        if call is not None:
            if not call.problem and call.q is None:
                return call, "its Q and K cannot be traced"
            return call, call.problem
        if trace.fault is not None:
            return None, f"tracing it failed: {type(trace.fault).__name__}: {trace.fault}"
        if path not in trace.calls:
            if path not in self._found.tracked.modules:
                return None, "no module of the model is this layer: its calls cannot be traced"
            return None, "the layer is not called in the forward pass of this batch"
        return _from_projections(self._found, trace)

    def _check(self, call: AttentionCall) -> tuple[float, str, str]:
        """(deviation, what the weights were compared with, why they are not shown)."""
        checked = CHECKED[call.how]
        if not math.isnan(call.off):
            return call.off, checked, ""
        reference = call.plain_z if call.plain_z is not None else call.z
        assert reference is not None
        assert call.v is not None
        assert call.q is not None
        head = self._request.head
        values = repeat_heads(call.v, call.q.shape[0])[head]
        if call.q.shape[1] * values.shape[0] > MAX_MAP:
            self._notes.append("not checked: it is too large")
            return math.nan, "", ""
        ours = _weights_of(call, head) @ at_least_float32(values)
        off = deviation(ours, torch.nan_to_num(at_least_float32(reference[head])))
        if not off <= tolerance(reference.dtype):
            return (
                off,
                checked,
                (
                    f"softmax(QKᵀ·scale)V differs from {checked} by {off:.1e} of it: "
                    "the attention of this layer is computed in another way"
                ),
            )
        return off, checked, ""

    def _scale(self, call: AttentionCall, query: int) -> float:
        """The factor between q·k and the scores; nan where more than a factor lies between."""
        if not math.isnan(call.scale):
            return call.scale
        assert call.q is not None
        assert call.k is not None
        head, rows = self._request.head, slice(query, query + 1)
        keys = at_least_float32(repeat_heads(call.k, call.q.shape[0])[head])
        found, _ = products(at_least_float32(call.q[head, query]), keys)
        scores = scores_of(call, rows, head)[0, 0]
        allowed = torch.isfinite(scores)
        found, scores = found[allowed].double(), scores[allowed].double()
        scale = float((found @ scores) / (found @ found)) if found.any() else math.nan
        if deviation(scale * found, scores) > math.sqrt(tolerance(call.q.dtype)):
            self._notes.append("more than a scale lies between q·k and the scores")
            return math.nan
        return scale

    # ------------------------------------------------------------ further parts

    def _weights(
        self, call: AttentionCall | None
    ) -> tuple[tuple[HeadWeights, ...], str, HeadSpectra | None]:
        if not self._request.weights:
            return (), "", None
        found = self._found
        size = sum(part.rows * part.columns for part in found.layer.parts)
        matrices = head_matrices(found.tracked, found.layer)
        if matrices is None:
            return (), NO_HEADS, None
        head = self._request.head
        if size > MAX_ELEMENTS:
            self._notes.append("the weights of the chosen head alone are compared: they are large")
            return tuple(head_weights(matrices, head)), "", head_spectra(matrices, head)
        return tuple(head_weights(matrices)), "", head_spectra(matrices, head)

    def _residual(
        self, trace: AttentionTrace, query: int, queries: int
    ) -> tuple[ResidualStream | None, str]:
        if not self._request.residual:
            return None, ""
        try:
            stream = residual_stream(trace, query, queries)
        except StreamError as reason:
            return None, str(reason)
        if 0 <= stream.target < len(self._classes):
            name = self._classes[stream.target]
            return msgspec.structs.replace(stream, target_name=name), ""
        return stream, ""


def _to(count: int) -> str:
    return "0" if count == 1 else f"0 to {count - 1:,}"


# ---------------------------------------------------------------- from the projections


def _from_projections(found: FoundLayer, trace: AttentionTrace) -> tuple[AttentionCall | None, str]:
    """Q, K and V from the projections, for attention that is not computed by a function of PyTorch.
    They are used only where they reproduce the input of the output projection."""
    layer, unseen = found.layer, "its attention is computed by a function that is not torch's"
    if not layer.heads or not layer.key_value_heads:
        return None, f"{unseen}, and {NO_HEADS}"
    if len(trace.projections) < 3:
        return None, f"{unseen}, and the outputs of its projections cannot be traced"
    q, k, v = (
        _split(trace.projections[place], part, heads)
        for place, part, heads in zip(
            range(3),
            layer.parts,
            (layer.heads, layer.key_value_heads, layer.key_value_heads),
            strict=True,
        )
    )
    best = math.inf
    for causal in (False, True):
        call = AttentionCall(layer.path, 0, PROJECTED, trace.batch or 1, q, k, v)
        call.scale, call.causal = 1 / math.sqrt(q.shape[-1]), causal
        z = torch.softmax(scores_of(call), -1) @ at_least_float32(repeat_heads(v, layer.heads))
        merged = z.transpose(0, 1).reshape(z.shape[1], -1)
        for read in trace.inputs_of_linears:
            if read.shape == merged.shape:
                off = deviation(merged, read)
                best = min(best, off)
                if off <= tolerance(read.dtype):
                    call.z, call.off = z.to(read.dtype), off
                    return call, ""
    if math.isinf(best):
        return None, f"{unseen}, and no output projection was found to compare it with"
    modules = found.tracked.modules
    rotary = any(word in f"{name} {type(module).__name__}".lower() for word in ROTARY
                 for name, module in modules.items())  # fmt: skip
    changed = "the model has rotary position embeddings" if rotary else (
        "Q and K are changed in between, masked or scaled in another way"
    )  # fmt: skip
    return None, (
        f"{unseen}, and softmax(QKᵀ/√d)V of its projections is not what its output projection "
        f"reads (off by {best:.1e}): {changed}"
    )


def _split(output: torch.Tensor, part: Projection, heads: int) -> torch.Tensor:
    """Output (positions, features) of a projection → (heads, positions, head_dim) of `part`."""
    numbers = torch.arange(output.shape[1], device=output.device)
    try:
        rows = part.view(numbers[:, None].expand(-1, part.columns))[:, 0]
        if rows.numel() != part.rows:
            raise RuntimeError
    except (RuntimeError, IndexError):
        rows = part.view(numbers[None].expand(part.columns, -1))[:, 0]
    chosen = output[:, rows]
    return chosen.view(chosen.shape[0], heads, -1).transpose(0, 1)


# ---------------------------------------------------------------- values


def _weights_of(call: AttentionCall, head: int, rows: slice = slice(None)) -> torch.Tensor:
    """softmax of the scores of a head: (queries, keys), 0 where masked."""
    return torch.nan_to_num(torch.softmax(scores_of(call, rows, head)[0], -1))


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """The entropy of rows (…, keys) of attention weights, in nats."""
    found: torch.Tensor = torch.special.entr(weights).sum(-1)
    return found


def _head(call: AttentionCall, head: int, query: int) -> HeadAttention:
    assert call.q is not None
    assert call.k is not None
    heads, queries, _ = call.q.shape
    row = _weights_of(call, head, slice(query, query + 1))[0]
    keys = call.k.shape[1]
    if heads * queries * keys <= MAX_ALL:
        mean = float(entropy(_weights_of(call, head)).mean())
    else:
        chosen = torch.linspace(0, queries - 1, SOME_QUERIES).round().long().tolist()
        each = [float(entropy(_weights_of(call, head, slice(q, q + 1))).mean()) for q in chosen]
        mean = sum(each) / len(each)
    key = int(row.argmax())
    return HeadAttention(float(entropy(row)), mean, float(row[key]), key)


def _query_row(call: AttentionCall, head: int, query: int) -> QueryRow:
    assert call.q is not None
    assert call.k is not None
    q = at_least_float32(call.q[head, query])
    k = at_least_float32(repeat_heads(call.k, call.q.shape[0])[head])
    rows = slice(query, query + 1)
    scores = scores_of(call, rows, head)[0, 0]
    weights = _weights_of(call, head, rows)[0]
    scores = scores.masked_fill(torch.isneginf(scores), math.nan)
    return QueryRow(*(_floats(each[:MAX_POSITIONS]) for each in (*products(q, k), scores, weights)))


def products(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (d,), k (keys, d) → q · k and the angle between them in degrees, (keys,) each."""
    found = k @ q
    lengths = q.norm() * k.norm(dim=-1)
    return found, torch.rad2deg(torch.acos((found / lengths).clamp(-1, 1)))


def _floats(tensor: torch.Tensor) -> bytes:
    values = tensor[:MAX_POSITIONS].detach().to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(values, "<f4").tobytes()


# ---------------------------------------------------------------- names of the positions


def _labels(
    given: Sequence[torch.Tensor], sample: int, batch: int, keys: int, tokens: Sequence[str]
) -> tuple[str, ...]:
    """The tokens of the example: their texts if known, otherwise their numbers."""
    for tensor in given:
        if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            for each in (tensor, tensor.t()):
                if tuple(each.shape) == (batch, keys):
                    numbers = each[sample, :MAX_POSITIONS].tolist()
                    return tuple(tokens[n] if 0 <= n < len(tokens) else f"#{n}" for n in numbers)
    return ()


def _grid(given: Sequence[torch.Tensor], sample: int, batch: int, keys: int) -> PatchGrid | None:
    """The patches of an image, if the keys are its patches after at most a few other tokens."""
    for image in given:
        if image.dim() != 4 or image.shape[0] != batch or not image.is_floating_point():
            continue
        height, width = image.shape[-2:]
        if image.shape[1] > 4:
            continue
        for first in (1, 0, 2, 5):
            shape = _tiling(keys - first, height, width)
            if shape is not None:
                return PatchGrid(*shape, first, _picture(image[sample]))
    return None


def _tiling(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """(rows, columns) of `patches` square patches that tile an image; None if they cannot."""
    if patches < 1:
        return None
    side = math.sqrt(height * width / patches)
    for size in {math.floor(side), math.ceil(side)}:
        if size and height % size == 0 and width % size == 0:
            rows, columns = height // size, width // size
            if rows * columns == patches:
                return rows, columns
    return None


def _picture(image: torch.Tensor) -> ExampleImage:
    """An image (channels, height, width) as RGB, with values scaled to 0 … 255."""
    image = image.float()
    step = max(1, -(-max(image.shape[-2:]) // MAX_PICTURE))
    small = image[:, ::step, ::step]
    low, high = float(small.min()), float(small.max())
    scaled = ((small - low) / ((high - low) or 1.0) * 255).round().clamp(0, 255).to(torch.uint8)
    rgb = scaled[:3] if scaled.shape[0] >= 3 else scaled[:1].expand(3, -1, -1)
    pixels = rgb.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()
    return ExampleImage(rgb.shape[2], rgb.shape[1], pixels)
