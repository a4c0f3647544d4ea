"""Everything that crosses between the training side and the viewing side.

`messages` holds what is said, `describe` the static description of a run, `tables` the names and
columns of what is measured, `framing` how messages travel over a byte stream.
"""

from __future__ import annotations

PROTOCOL_VERSION = 2
"""Raised on every change that an older peer cannot read."""

PHASES = ("data", "zero_grad", "forward", "loss", "backward", "clip", "step")
"""The phases of one optimizer step, in the order of the textbook loop."""
