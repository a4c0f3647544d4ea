"""A bounded list whose entries are numbered densely from 0: a viewer asks for the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


RARE_KEPT = 5_000


class Journal(Generic[T]):
    """Keeps the newest entries, at most `limit` of them and at most `weight` units in all; of
    those that must make room, the newest RARE_KEPT that are `rare` stay."""

    def __init__(
        self,
        limit: int,
        weight: int = 0,
        weigh: Callable[[T], int] = lambda entry: 0,
        rare: Callable[[T], bool] = lambda entry: False,
    ) -> None:
        self._limit = limit
        self._is_rare = rare
        self._rare: deque[tuple[int, T]] = deque(maxlen=RARE_KEPT)
        """(number, entry) of what stays from before the first of `_entries`."""
        self._weight_limit = weight
        self._weigh = weigh
        self._entries: list[T] = []
        self._first = 0
        self._weight = 0

    @property
    def next_id(self) -> int:
        """The number that the next entry gets."""
        return self._first + len(self._entries)

    def append(self, entry: T) -> None:
        """Keep `entry`, which carries the number `next_id`; the oldest make room, in batches."""
        self._entries.append(entry)
        self._weight += self._weigh(entry)
        over_weight = self._weight_limit and self._weight > self._weight_limit
        if len(self._entries) > self._limit + self._limit // 4 or over_weight:
            self._trim()

    def since(self, number: int, limit: int, weight: int = 0) -> tuple[tuple[T, ...], bool]:
        """Entries from `number` on, oldest first, and whether there are more than these.

        At most `limit` entries; with `weight`, as many as weigh no more than that (at least one).
        Numbers that are no longer held are skipped.
        """
        before = [entry for place, entry in self._rare if place >= number]
        start = max(0, number - self._first)
        all_there = len(before) + max(0, len(self._entries) - start)
        found = [*before, *self._entries[start : start + limit]][:limit]
        if weight:
            total = 0
            for index, entry in enumerate(found):
                total += self._weigh(entry)
                if total > weight and index:
                    found = found[:index]
                    break
        return tuple(found), len(found) < all_there

    def within(self, number: int, weight: int) -> int:
        """The first number, from `number` on, after which all entries together weigh no more than
        `weight`; the newest entry's at the latest."""
        place = len(self._entries)
        first = max(0, number - self._first)
        while place > first:
            weight -= self._weigh(self._entries[place - 1])
            if weight < 0 and place < len(self._entries):
                break
            place -= 1
        return self._first + place if place > first else number

    def _trim(self) -> None:
        surplus = max(0, len(self._entries) - self._limit)
        weight = self._weight - sum(map(self._weigh, self._entries[:surplus]))
        while self._weight_limit and weight > self._weight_limit * 3 // 4:
            if surplus == len(self._entries) - 1:
                break
            weight -= self._weigh(self._entries[surplus])
            surplus += 1
        for place, entry in enumerate(self._entries[:surplus], self._first):
            if self._is_rare(entry):
                self._rare.append((place, entry))
        del self._entries[:surplus]
        self._first += surplus
        self._weight = weight
