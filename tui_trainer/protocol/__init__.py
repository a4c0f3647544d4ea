"""Everything that crosses between the training side and the viewing side.

`messages` has the messages, `schema` the static description of a run with the names and columns
of its tables, `framing` how messages travel over a byte stream, `text` and `formatting` how text
and numbers are shown.
"""

from __future__ import annotations

from typing import Literal, get_args

PROTOCOL_VERSION = 8
"""Raised on every change that an older peer cannot read."""

Phase = Literal["data", "zero_grad", "forward", "loss", "backward", "clip", "step"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of one optimizer step, in the order of the textbook loop."""
BETWEEN = ("eval", "checkpoint", "tracing", "other")
"""Names for the time of a step between its phases: evaluations, checkpoints that the script saves,
our own work on the training thread, and everything else."""
