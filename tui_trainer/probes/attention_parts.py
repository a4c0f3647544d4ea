"""Where Wq, Wk and Wv lie in their parameters: each in one of its own, or fused in one.

A fused matrix is taken apart only where it is known how: a wrong split would be shown as fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

View = Callable[[torch.Tensor], torch.Tensor]
"""Takes a parameter (or its gradient) to the matrix (output features, input features) in it."""


@dataclass(frozen=True)
class Part:
    """Wq, Wk or Wv of a layer: a parameter and where in it."""

    parameter: int
    """Position in the subject."""
    view: View
    rows: int
    columns: int
    first: int | None = None
    """Where it begins in a contiguous parameter, when it lies there in one piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        return self.rows, self.columns

    def lies_in(self, tensor: torch.Tensor) -> bool:
        """Whether `flat` is a view."""
        return self.first is not None and tensor.is_contiguous()

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its elements (rows · columns,), a view where possible; their order is that of `view`."""
        if self.first is not None and tensor.is_contiguous():
            size = self.rows * self.columns
            whole = tensor.view(-1)
            return whole if whole.numel() == size else whole[self.first : self.first + size]
        return self.view(tensor).reshape(-1)


@dataclass(frozen=True)
class Heads:
    """What a layer's module, or its configuration, says of its heads."""

    query: int | None
    key_value: int | None
    dim: int | None


@dataclass(frozen=True)
class Matrix:
    """A parameter that holds Wq, Wk or Wv, or several of them."""

    position: int
    outputs: int
    inputs: int
    transposed: bool
    """(inputs, outputs), as Hugging Face's Conv1D has it."""

    @classmethod
    def of(cls, position: int, parameter: torch.Tensor, transposed: bool) -> Matrix:
        """Its sides."""
        outputs = parameter.shape[1] if transposed else parameter.shape[0]
        return cls(position, outputs, parameter.numel() // outputs, transposed)

    def by_rows(self, sizes: tuple[int, ...]) -> tuple[Part, ...]:
        """One after the other, so many output features each."""
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self._part(start, size) for start, size in zip(starts, sizes, strict=True))

    def _part(self, start: int, size: int) -> Part:
        if self.transposed:
            return Part(self.position, lambda t: t[:, start : start + size].t(), size, self.inputs)
        return Part(
            self.position,
            lambda t: t[start : start + size].reshape(size, -1),
            size,
            self.inputs,
            first=start * self.inputs,
        )

    def interleaved(self, heads: int) -> tuple[Part, ...]:
        """Rows are (head, q|k|v, head_dim)."""
        size, inputs = self.outputs // 3, self.inputs

        def part(which: int) -> Part:
            def view(tensor: torch.Tensor) -> torch.Tensor:
                each = tensor.reshape(heads, 3, size // heads, inputs)
                return each[:, which].reshape(size, inputs)

            return Part(self.position, view, size, inputs)

        return part(0), part(1), part(2)


def split(
    matrix: Matrix, heads: Heads, mixed: bool, projected: Callable[[int], bool]
) -> tuple[Part, ...] | str:
    """Wq, Wk and Wv; or why they cannot be told apart.

    They are equal thirds where the heads say so, where the outputs are three times the inputs, or
    where the layer's output projection reads a third of them (`projected`). `mixed`: fused per
    head, as GPT-NeoX and BLOOM have them.
    """
    h, kv, outputs = heads.query, heads.key_value, matrix.outputs
    if h and kv:
        each = heads.dim or outputs // (h + 2 * kv)
        if each * (h + 2 * kv) == outputs:
            if not mixed or kv == 1:  # one key head: no order to mix them in but this one
                return matrix.by_rows((h * each, kv * each, kv * each))
            if kv == h:
                return matrix.interleaved(h)
            return "the order of its heads is not known"
    third, rest = divmod(outputs, 3)
    if rest or not (
        third == matrix.inputs or (h and heads.dim and third == h * heads.dim) or projected(third)
    ):
        unknown = "key/value heads" if h else "heads"
        if h and kv:
            return f"it does not hold {h} heads and twice {kv} key/value heads"
        return f"the number of its {unknown} is unknown"
    if not mixed:
        return matrix.by_rows((third, third, third))
    return matrix.interleaved(h) if h and third % h == 0 else "the number of its heads is unknown"
