"""One line of eight levels: the trend of a series beside its number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tui_trainer.ui.glyphs import UNICODE, Glyphs

BAD = "!"


def sparkline(
    values: NDArray[np.float32],
    bad: NDArray[np.bool_] | None = None,
    glyphs: Glyphs = UNICODE,
    floor: float | None = None,
) -> str:
    """One character a value; blank where it is NaN, `!` where `bad` (a NaN or infinity was seen).

    The smallest value is the lowest bar and the largest the highest, unless `floor` is given as the
    value of the lowest. A series that does not move is drawn low, not magnified to noise.
    """
    return sparklines(values[None, :], None if bad is None else bad[None, :], glyphs, floor)[0]


def sparklines(
    values: NDArray[np.float32],
    bad: NDArray[np.bool_] | None = None,
    glyphs: Glyphs = UNICODE,
    floor: float | None = None,
    hold: bool = False,
) -> list[str]:
    """One sparkline for each row of `values`, (rows, cells). With `hold`, what is measured now and
    then stays as it was until it is measured again, instead of leaving gaps."""
    if values.size == 0:
        return [""] * len(values)
    numbers = np.asarray(values, np.float64)
    if hold:
        seen = ~np.isnan(numbers) if bad is None else ~np.isnan(numbers) | bad
        cells = np.arange(numbers.shape[1])
        newest = np.maximum.accumulate(np.where(seen, cells, 0), axis=1)
        last = np.where(seen, cells, -1).max(1, keepdims=True)
        newest = np.where(cells <= last, newest, cells)  # what is to come stays empty
        numbers = np.take_along_axis(numbers, newest, axis=1)
        bad = None if bad is None else np.take_along_axis(bad, newest, axis=1)
    known = np.isfinite(numbers)
    low = np.where(known, numbers, np.inf).min(1, keepdims=True)
    high = np.where(known, numbers, -np.inf).max(1, keepdims=True)
    if floor is not None:
        low = np.minimum(low, floor)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        spread = high / 2 - low / 2
        flat = ~(spread > 1e-3 * np.abs(high))
        share = (numbers / 2 - low / 2) / np.where(flat, 1.0, spread)
    share = np.where(flat, 0.0, np.where(known, share, 0.0))
    levels = np.clip((share * 8).astype(np.int64), 0, 7)
    signs = np.array([ord(sign) for sign in glyphs.sparks], np.uint32)
    codes = np.where(known, signs[levels], 0x20).astype(np.uint32)
    if bad is not None:
        codes[bad] = ord(BAD)
    return [row.tobytes().decode("utf-32-le") for row in codes]
