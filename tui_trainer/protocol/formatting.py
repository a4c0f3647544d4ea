"""Formatting of numbers, durations and settings, for the app, the command line and reports.

Functions with a `width` return exactly that many cells, right-aligned, so that a value that
changes does not move its neighbours; width 0 means as wide as needed. None is shown as MISSING,
and what is not finite as `nan`, `inf` or `-inf`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tui_trainer.protocol.events import (
    Clip,
    Event,
    Finding,
    NonFinite,
    NonFiniteValue,
    Notice,
    Skipped,
)
from tui_trainer.protocol.schema import Scalar
from tui_trainer.protocol.travel import ExperimentCost

MISSING = "–"


def nonfinite(value: float) -> NonFiniteValue:
    """`nan`, `inf` or `-inf`, for a value that is not finite."""
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def number(value: float | None, width: int = 8, digits: int = 4) -> str:
    """About `digits` significant digits, fewer where `width` is too small for them.

    Fixed-point down to 0.001 (0.01 with three digits), with the decimals of values below 1 in line,
    and scientific beyond.
    """
    shown = _number(value, digits)
    while width and len(shown) > width and digits > 1 and value is not None:
        digits -= 1
        shown = _number(value, digits) if digits > 1 else _bare(value)
    return _fit(shown, width)


def short(value: float | None, digits: int = 5) -> str:
    """At most `digits` significant digits, without zeros at the end: `0.25`, `1e-07`."""
    return MISSING if value is None else f"{value:.{digits}g}"


def trim_exponent(text: str) -> str:
    """`1e-4` for `1e-04`, `1e5` for `1e+05`."""
    mantissa, separator, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else text


def _bare(value: float) -> str:
    """One digit and the exponent: `1e30`."""
    return trim_exponent(f"{value:.0e}")


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value):
        from tui_trainer.protocol.absent import why_absent  # which imports NumPy

        return MISSING if why_absent(value) is not None else nonfinite(value)
    if value == 0:
        return f"{0:.{digits - 1}f}"
    size = abs(value)
    if max(1e-3, 10.0 ** (1 - digits)) <= size < 10**digits:
        decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size >= 1 else digits - 1
        return f"{value:.{decimals}f}"
    if 10**digits <= size < 1e6:
        return f"{value:.0f}"
    return trim_exponent(f"{value:.{max(0, digits - 2)}e}")


def loss(value: float | None, width: int = 8) -> str:
    """Four decimals (`1.4203`), scientific outside 0.0001 … 1000."""
    if value is None or not math.isfinite(value) or value == 0 or 1e-4 <= abs(value) < 1000:
        shown = f"{value:.4f}" if value is not None and math.isfinite(value) else _number(value, 4)
        return _fit(shown, width)
    return number(value, width)


def signed(value: float | None, width: int = 7, decimals: int = 4) -> str:
    """A signed number such as a cosine, always with its sign and with aligned decimals."""
    if value is None or not math.isfinite(value):
        return _fit(_number(value, decimals), width)
    shown = f"{value:+.{decimals}f}"
    return _fit(shown if not width or len(shown) <= width else _number(value, 3), width)


def scientific(value: float | None, width: int = 8, digits: int = 2) -> str:
    """`1.2e-03`: for learning rates and update ratios."""
    if value is None or not math.isfinite(value):
        return _fit(_number(value, digits), width)
    return _fit(f"{value:.{digits}e}", width)


def percent(share: float | None, width: int = 6, decimals: int = 1) -> str:
    """`12.5%` of a share of 0.125 in a column; in text (width 0) `12.5 %`, and `1 %` of 0.01."""
    if share is None or not math.isfinite(share):
        return _no_number(share, width)
    shown = f"{100 * share:.{decimals}f}"
    if width:
        return _fit(f"{shown}%", width)
    return f"{shown.rstrip('0').rstrip('.') if decimals else shown} %"


def count(value: float | None, width: int = 7) -> str:
    """`27`, `1,234`, `494k`, `154.4M`: at most four digits."""
    if value is None or not math.isfinite(value):
        return _no_number(value, width)
    if abs(value) < 10_000:
        return _fit(f"{value:,.0f}", width)
    for unit in ("k", "M", "G", "T"):
        value /= 1000
        if abs(value) < 999.95 or unit == "T":
            break
    return _fit(f"{value:.1f}{unit}", width)


def bytes_(value: float | None, width: int = 9) -> str:
    """`611.2 MB`: as everywhere here, a MB is 1024² bytes."""
    if value is None or not math.isfinite(value):
        return _no_number(value, width)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            return _fit(f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}", width)
        value /= 1024
    return _fit(f"{value:.1f} PB", width)


def duration(seconds: float | None, width: int = 9) -> str:
    """`0:47`, `3:05`, `2:03:04`, `3d 04:05`."""
    if seconds is None or not math.isfinite(seconds):
        return _no_number(seconds, width)
    if seconds < 0:
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


def rough_duration(seconds: float | None) -> str:
    """`42 s`, `3 min`, `2 h 05`, `4 d`: for ages in tables."""
    if seconds is None or not math.isfinite(seconds):
        return _no_number(seconds, 0)
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d}"
    return f"{seconds / 86400:.0f} d"


def long_duration(seconds: float) -> str:
    """`0.3 s`, `3 min 05 s`, `2 h 03 min`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minute} min {second:02} s" if minute else f"{seconds:.1f} s"


def milliseconds(value: float | None, width: int = 7) -> str:
    """`46.1 ms`, and `1.53 s` from a second on."""
    if value is None or not math.isfinite(value):
        return _no_number(value, width)
    if value < 0.995:
        return _fit(f"{value:.2f} ms", width)
    if value < 999.5:
        return _fit(f"{value:.1f} ms", width)
    return _fit(f"{value / 1000:.2f} s", width)


def parameter_name(name: str) -> str:
    """`head` of `head.weight`; `0.weight` is kept, since `0` alone looks like a number."""
    short = name.removesuffix(".weight")
    return name if short.replace(" ", ".").rpartition(".")[2].isdigit() else short


def scalar(value: Scalar) -> str:
    """A setting or fact: `yes`, `494,149`, `0.0003`; MISSING for None and empty text."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(value.split()) or MISSING


def shape_text(shape: Sequence[int]) -> str:
    """`24×11`; `0-d` for a scalar."""
    return "×".join(map(str, shape)) or "0-d"


def step_of(step: int, total: int | None) -> str:
    """`1,240 of 2,000`, or `1,240` without a total."""
    return f"{step:,} of {total:,}" if total else f"{step:,}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 step`, `1,240 steps`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def cost_text(cost: ExperimentCost) -> str:
    """`100 steps in about 4 s, with 24.1 MB of memory and 8.0 MB on cuda:0`."""
    took = f" in about {rough_duration(math.ceil(cost.seconds))}" if cost.seconds else ""
    device = f" and {bytes_(cost.device_bytes, 0)} on {cost.device}" if cost.device_bytes else ""
    return f"{counted(cost.steps, cost.unit)}{took}, with {bytes_(cost.bytes, 0)} of memory{device}"


def cadence(every: int) -> str:
    """`every step`, `every 20 steps`; `not measured` for 0."""
    if every <= 0:
        return "not measured"
    return "every step" if every == 1 else f"every {every:,} steps"


def event_text(event: Event) -> str:
    """An event in one line."""
    match event:
        case Clip():
            return f"clipped: norm {event.norm_before:.4g} over {event.max_norm:.4g}"
        case NonFinite() | Skipped():
            return event.text
        case Finding():
            return f"{event.title}: {event.text}"
        case Notice():
            return f"{event.text} ({event.who})" if event.who else event.text


def _no_number(value: float | None, width: int) -> str:
    """A value that is missing or not finite."""
    return _fit(MISSING if value is None else nonfinite(value), width)


def _fit(text: str, width: int) -> str:
    """Right-aligned; `#` where it does not fit, never a number with digits cut off."""
    if not width or len(text) <= width:
        return text.rjust(width)
    return "#" * width
