"""Images in the terminal: two pixels a cell with half blocks, or a ramp of characters in ASCII.

`▀` has the upper pixel as its foreground and the lower as its background, so a cell, twice as high
as wide, shows two square pixels.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

Pixels = NDArray[np.uint8]

RAMP = " .:-=+*#%@"
"""From dark to bright, one pixel of two in height a cell."""

_styles: dict[bytes, Style] = {}
_STYLES_KEPT = 65_536


def fit(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The largest (width, height) in pixels of an image drawn in `columns` × `rows` cells.

    Small images are enlarged by a whole factor, so that their pixels stay square and equal.
    """
    room_x, room_y = max(1, columns), max(1, rows) * 2
    scale = min(room_x / max(1, width), room_y / max(1, height))
    if scale >= 1:
        scale = float(int(scale))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """`image` (h, w, 3) at (height, width, 3): repeated where larger, averaged where smaller."""
    rows, columns = image.shape[:2]
    if (height, width) == (rows, columns):
        return image
    if height >= rows and width >= columns:
        return image[_nearest(rows, height)][:, _nearest(columns, width)]
    averaged = _average(_average(image.astype(np.float32), height, 0), width, 1)
    return np.clip(np.rint(averaged), 0, 255).astype(np.uint8)


def half_blocks(
    image: Pixels, ascii_only: bool = False, plain: Style | None = None
) -> list[list[Segment]]:
    """Lines of segments for `image` (h, w, 3): ⌈h/2⌉ of them, each `w` cells wide. `plain` is the
    style of characters under `ascii_only`."""
    rows = image.shape[0]
    if rows % 2:
        image = np.concatenate([image, image[-1:]])
    upper, lower = image[0::2], image[1::2]
    if ascii_only:
        return [_ramp(line, plain) for line in _luminance(upper, lower)]
    pairs = np.concatenate([upper, lower], axis=2)  # (h/2, w, 6)
    return [_blocks(line) for line in pairs]


def _blocks(line: Pixels) -> list[Segment]:
    """One row of cells; equal neighbours share a segment, which is what makes flat images cheap."""
    segments: list[Segment] = []
    starts = np.flatnonzero(np.any(line[1:] != line[:-1], axis=1)) + 1
    edges = [0, *starts.tolist(), len(line)]
    for start, stop in pairwise(edges):
        segments.append(Segment("▀" * (stop - start), _style(line[start].tobytes())))
    return segments


def _style(pair: bytes) -> Style:
    found = _styles.get(pair)
    if found is None:
        if len(_styles) >= _STYLES_KEPT:
            _styles.clear()
        found = Style.from_color(Color.from_rgb(*pair[:3]), Color.from_rgb(*pair[3:]))
        _styles[pair] = found
    return found


def _luminance(upper: Pixels, lower: Pixels) -> NDArray[np.float32]:
    mean = (upper.astype(np.float32) + lower) / 2
    weights = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    return np.asarray(mean @ weights, dtype=np.float32)


def _ramp(line: NDArray[np.float32], plain: Style | None) -> list[Segment]:
    places = np.clip(line / 256 * len(RAMP), 0, len(RAMP) - 1).astype(int)
    return [Segment("".join(RAMP[place] for place in places), plain)]


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    return (np.arange(new, dtype=np.int64) * old) // new


def _average(image: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    old = image.shape[axis]
    if size >= old:
        return np.take(image, _nearest(old, size), axis=axis)
    edges = (np.arange(size, dtype=np.int64) * old) // size
    counts = np.diff(np.append(edges, old)).astype(np.float32)
    shape = [1] * image.ndim
    shape[axis] = size
    return np.asarray(np.add.reduceat(image, edges, axis=axis) / counts.reshape(shape))
