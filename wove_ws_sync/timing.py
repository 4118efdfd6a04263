"""Deadlines and delays as values.

Owns: arithmetic on moments and durations, seconds as float. Never: sleeps, never asks
what time it is; ``now`` is an argument everywhere but in :class:`Clock`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

__all__ = ["Backoff", "Clock", "Deadline"]


class Clock:
    """Tell the time and how long to wait for a moment. Tests put a manual one in its place."""

    def monotonic(self) -> float:
        """Return the moment now, in seconds."""
        return time.monotonic()

    def wait_time(self, moment: float | None) -> float | None:
        """Return the seconds until *moment*; None, which waits without limit, for None."""
        return None if moment is None else max(0.0, moment - self.monotonic())

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have *wake* called whenever time jumps; real time never does."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deadline:
    """A moment after which an operation has failed; ``at`` is None for no limit."""

    at: float | None = None

    @classmethod
    def after(cls, timeout: float | None, now: float) -> Deadline:
        """Return the deadline *timeout* seconds from *now*."""
        return cls(None if timeout is None else now + timeout)

    def remaining(self, now: float) -> float | None:
        """Return the seconds left, never negative; None for no limit."""
        return None if self.at is None else max(0.0, self.at - now)

    def expired(self, now: float) -> bool:
        """Tell whether the moment has come."""
        return self.at is not None and now >= self.at

    def earliest(self, other: Deadline) -> Deadline:
        """Return the one of the two that comes first."""
        if self.at is None:
            return other
        if other.at is None:
            return self
        return self if self.at <= other.at else other


@dataclasses.dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between dials: *initial* × 1.6ⁿ up to *maximum* seconds, ± 20 % jitter."""

    initial: float
    maximum: float
    factor: float = 1.6
    jitter: float = 0.2

    def delay(self, attempt: int, spread: float) -> float:
        """Return the seconds to wait before dial number *attempt* (from 0).

        *spread* is a random number from [-1, 1]; it is an argument so that tests choose it.
        """
        raw = min(self.maximum, self.initial * self.factor ** min(attempt, 64))
        return min(self.maximum, raw * (1.0 + self.jitter * spread))
