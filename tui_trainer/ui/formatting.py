"""Numbers as people read them, in a fixed width so that nothing jitters when they change."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float | None, width: int = 8, digits: int = 4) -> str:
    """`value` right-aligned in `width` cells with about `digits` significant digits.

    Fixed-point, with the decimals in line below 1 (so that columns are calm), down to 0.001, and
    scientific beyond; NaN and infinities are spelt out. Where
    the width is too small for that many digits, fewer are shown.
    """
    shown = _number(value, digits)
    while width and len(shown) > width and digits > 1 and value is not None:
        digits -= 1
        shown = _number(value, digits) if digits > 1 else _bare(value)
    return _fit(shown, width)


def _bare(value: float) -> str:
    """The shortest that still says the magnitude: `1e30`."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return f"{0:.{digits - 1}f}"
    size = abs(value)
    if 1e-3 <= size < 10**digits:
        decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size >= 1 else digits - 1
        return f"{value:.{decimals}f}"
    if 10**digits <= size < 1e6:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def loss(value: float | None, width: int = 8) -> str:
    """Four decimals (`1.4203`), scientific outside 0.0001 … 1000."""
    if value is None or not math.isfinite(value) or value == 0 or 1e-4 <= abs(value) < 1000:
        shown = f"{value:.4f}" if value is not None and math.isfinite(value) else _number(value, 4)
        return _fit(shown, width)
    return number(value, width)


def signed(value: float | None, width: int = 7, decimals: int = 4) -> str:
    """A cosine or the like: always with its sign, the decimals always at the same place."""
    if value is None or not math.isfinite(value):
        return _fit(_number(value, decimals), width)
    shown = f"{value:+.{decimals}f}"
    return _fit(shown if len(shown) <= width else _number(value, 3), width)


def scientific(value: float | None, width: int = 8, digits: int = 2) -> str:
    """`1.2e-03`: for learning rates and update ratios."""
    if value is None or not math.isfinite(value):
        return _fit(_number(value, digits), width)
    return _fit(f"{value:.{digits}e}", width)


def percent(share: float | None, width: int = 6, decimals: int = 1) -> str:
    """`12.5 %` of a share of 0.125."""
    if share is None or not math.isfinite(share):
        return MISSING.rjust(width)
    return _fit(f"{100 * share:.{decimals}f}%", width)


def count(value: float | None, width: int = 7) -> str:
    """`27`, `1,234`, `494k`, `154.4M`: at most four digits."""
    if value is None or not math.isfinite(value):
        return MISSING.rjust(width)
    if abs(value) < 10_000:
        return _fit(f"{value:,.0f}", width)
    for unit in ("k", "M", "G", "T"):
        value /= 1000
        if abs(value) < 999.95 or unit == "T":
            return _fit(f"{value:.1f}{unit}", width)
    return MISSING.rjust(width)


def bytes_(value: float | None, width: int = 9) -> str:
    """`611.2 MB`, powers of 1024."""
    if value is None or not math.isfinite(value):
        return MISSING.rjust(width)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(value) < 1000:
            return _fit(f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}", width)
        value /= 1024
    return _fit(f"{value:.1f} TB", width)


def duration(seconds: float | None, width: int = 9) -> str:
    """`47 s`, `3:05`, `2:03:04`, `3d 04:05`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING.rjust(width)
    whole = int(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return _fit(f"{days}d {hour:02}:{minute:02}", width)
    if hours:
        return _fit(f"{hours}:{minute:02}:{second:02}", width)
    return _fit(f"{minute}:{second:02}", width)


def milliseconds(value: float | None, width: int = 7) -> str:
    """`46.1` below 1000 ms, `1.53 s` above."""
    if value is None or not math.isfinite(value):
        return MISSING.rjust(width)
    if value < 0.995:
        return _fit(f"{value:.2f} ms", width)
    if value < 999.5:
        return _fit(f"{value:.1f} ms", width)
    return _fit(f"{value / 1000:.2f} s", width)


def rate(value: float | None, unit: str, width: int = 0) -> str:
    """`21.7 steps/s`, or `9.3 s/step` when slower than one in two seconds."""
    if value is None or not math.isfinite(value) or value <= 0:
        return _fit(f"{MISSING} {unit}/s", width)
    if value < 0.5 and unit == "steps":
        return _fit(f"{1 / value:.1f} s/step", width)
    shown = f"{value:.1f}" if value < 1000 else count(value, 0)
    return _fit(f"{shown} {unit}/s", width)


def shorten(text: str, width: int, ellipsis: str = "…") -> str:
    """`text` in at most `width` cells, its middle left out, since names differ at both ends."""
    if len(text) <= width:
        return text
    if width <= 3:
        return text[:width]
    keep = width - len(ellipsis)
    head = keep // 3
    return text[:head] + ellipsis + text[len(text) - (keep - head) :]


def _fit(text: str, width: int) -> str:
    """Right-aligned; what cannot fit shows as `#`, never as a number with digits cut off."""
    if not width or len(text) <= width:
        return text.rjust(width)
    return "#" * width
