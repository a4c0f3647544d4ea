"""Throughput of a run: steps per second, time left, share of clipped steps, overhead."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

import msgspec

from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo

WINDOW_S = 10.0
"""Training time over which the speed is averaged."""
WINDOW_STEPS = 5
"""Minimum number of steps over which the speed is averaged."""
CLIP_WINDOW = 100
RECENT_STEPS = 1000
WARM_UP_STEPS = 5
"""First steps, whose overhead is not typical."""


@dataclass(frozen=True, slots=True)
class _Point:
    step: int
    time: float
    """Seconds, without pauses and excluded work (evaluations, checkpoints)."""
    own_ms: float


class Throughput:
    """Takes each step in order. All times are seconds since the epoch."""

    def __init__(self) -> None:
        self._points: deque[_Point] = deque(maxlen=4096)
        self._window_from = -math.inf
        """When the speed limit changed last, as `_Point.time`."""
        self._own_ms = 0.0
        self._warming = 0
        """Number of points that are warm-up steps."""
        self._steps = 0
        self._step_ms: deque[float] = deque(maxlen=RECENT_STEPS)
        self._clipped: deque[bool] = deque(maxlen=CLIP_WINDOW)
        self.first_began: float | None = None
        """When the first step began."""
        self.paused_s = 0.0
        """Seconds paused so far, without the current pause."""
        self.excluded_s = 0.0
        """Seconds so far in evaluations and checkpoints."""
        self._paused_since: float | None = None

    def add(self, step: int, time: float, step_ms: float, own_ms: float, excluded_s: float) -> None:
        """Add a step that ended at `time`. `excluded_s` is paused_s + excluded_s at that moment."""
        if self.first_began is None:
            self.first_began = time - (step_ms / 1e3 if step_ms == step_ms else 0.0)
        if step_ms == step_ms:
            self._step_ms.append(step_ms)
        if self._points and step <= self._points[-1].step:
            self._own_ms += own_ms  # another optimizer's part of the same step
            last = self._points.pop()
            at = max(time - excluded_s, self._window_from)
            self._points.append(_Point(last.step, at, last.own_ms + own_ms))
            return
        if len(self._points) == self._points.maxlen:
            self._drop_oldest()
        self._points.append(_Point(step, max(time - excluded_s, self._window_from), own_ms))
        self._own_ms += own_ms
        self._steps += 1
        self._warming += self._steps <= WARM_UP_STEPS
        # Steps that ended before the speed limit changed may be recorded afterwards.
        while len(self._points) > 1 and self._points[1].time <= self._window_from:
            self._drop_oldest()
        newest = self._points[-1].time
        while len(self._points) > WINDOW_STEPS and newest - self._points[0].time > WINDOW_S:
            self._drop_oldest()

    def restart_window(self, at: float | None = None) -> None:
        """Forget the speed so far. `at`: when the speed limit changed, as `_Point.time`; a wait for
        the next step does not count up to this time."""
        while len(self._points) > 1:
            self._drop_oldest()
        if at is not None:
            self._window_from = at
            if self._points and self._points[0].time < at:
                self._points[0] = replace(self._points[0], time=at)

    def _drop_oldest(self) -> None:
        self._own_ms -= self._points.popleft().own_ms
        self._warming = max(0, self._warming - 1)

    def add_clip(self, clipped: bool) -> None:
        """Add a step at which clipping was in force, whether it scaled the gradient or not."""
        self._clipped.append(clipped)

    def pause(self, now: float) -> None:
        if self._paused_since is None:
            self._paused_since = now

    def resume(self, now: float) -> None:
        if self._paused_since is not None:
            self.paused_s += max(0.0, now - self._paused_since)
            self._paused_since = None

    @property
    def paused(self) -> bool:
        return self._paused_since is not None

    def _paused_until(self, now: float) -> float:
        lasting = now - self._paused_since if self._paused_since is not None else 0.0
        return self.paused_s + lasting

    @property
    def longest_step_s(self) -> float:
        """The longest of the last RECENT_STEPS steps; 0 before the first. In a script, a step
        includes an evaluation in its loop."""
        return max(self._step_ms, default=0.0) / 1e3

    def elapsed_s(self, now: float) -> float:
        """Seconds since the first step began, without pauses."""
        if self.first_began is None:
            return 0.0
        return max(0.0, now - self.first_began - self._paused_until(now))

    def steps_per_second(self, now: float | None = None) -> float | None:
        """Mean over the window; None before the second step. With `now`, a running step counts once
        it has taken more than three times the mean, so that a run that hangs does not look fast."""
        if len(self._points) < 2:
            return None
        first, last = self._points[0], self._points[-1]
        duration, steps = last.time - first.time, last.step - first.step
        if now is not None:
            since = now - self._paused_until(now) - self.excluded_s - last.time
            if since > 3 * duration / max(1, steps) and since > 1.0:
                duration += since
        return steps / duration if duration > 0 else None

    def remaining_s(self, steps: int, now: float) -> float | None:
        """Estimated seconds for `steps` more steps, including evaluations."""
        speed = self.steps_per_second(now)
        if not speed:
            return None
        elapsed = self.elapsed_s(now)
        training = max(elapsed - self.excluded_s, 1e-9)
        return steps / speed * max(1.0, min(10.0, elapsed / training))

    def cost_share(self) -> float | None:
        """Overhead: our time on the training thread as a share of all time in the window. Warm-up
        steps count only while there are no others."""
        if len(self._points) < 2:
            return None
        before = max(0, self._warming - 1) if len(self._points) > self._warming else 0
        duration = self._points[-1].time - self._points[before].time
        spent = self._own_ms - sum(point.own_ms for point in islice(self._points, before + 1))
        return spent / 1e3 / duration if duration > 0 else None

    def clipped_share(self) -> float | None:
        """Share of clipped steps of the last CLIP_WINDOW with clipping in force; None without."""
        return sum(self._clipped) / len(self._clipped) if self._clipped else None

    def complete(self, status: Status, info: RunInfo, now: float, ended: bool) -> Status:
        """`status` with the fields that follow from the throughput so far."""
        speed = self.steps_per_second(None if ended else now)
        left = info.total_steps - status.step if info.total_steps is not None else None
        return msgspec.structs.replace(
            status,
            epoch=status.step / info.steps_per_epoch if info.steps_per_epoch else 0.0,
            steps_per_second=speed,
            items_per_second=speed * info.items_per_step if speed and info.items_per_step else None,
            elapsed_s=self.elapsed_s(now),
            remaining_s=self.remaining_s(left, now) if left and left > 0 else left and 0.0,
            cost_share=self.cost_share() if status.cost_share is None else status.cost_share,
            clipped_share=self.clipped_share(),
        )
