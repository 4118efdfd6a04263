"""What has happened lately, in numbers, as pure state.

Owns: how many runs there are and were, their times, the last of them and the last errors,
all of it bounded. Never: a clock (``now`` is an argument), a lock (one loop calls), a name
of a host; never reads what a task returned or raised before somebody asks to see it.

Everything that happens for each run is a few dictionary operations: it is on the path of
every task.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from .runs import Run

__all__ = ["BOUNDS", "OUTCOMES", "Bin", "Failure", "Histogram", "Record", "Statistics", "quantile"]

#: How a run can end. "abandoned": its host was gone, or said that it wants no more of it.
OUTCOMES = ("ok", "error", "cancelled", "abandoned")
#: The upper ends of the classes of times, in seconds: two for each doubling.
BOUNDS = tuple(0.0005 * 2 ** (step / 2) for step in range(43))

#: How many seconds the curves go back.
_SECONDS = 600
_RECENT = 50
_FAILURES = 20
#: A larger event is not kept to be shown: its exception or result may be of any size.
_MAX_EVENT = 256 * 1024
_MAX_NAME = 200
_MAX_MESSAGE = 300

#: By what stands behind ``{"type":"`` in a terminal event.
_OUTCOME_OF = {b"task_r": "ok", b"task_e": "error", b"task_c": "cancelled"}


class Record:
    """One run and its times; ``started``, ``ended`` and ``outcome`` are None until they are known.

    Its *number* is its own: hosts may give several runs the same run_id.
    """

    __slots__ = (
        "accepted",
        "done",
        "ended",
        "message",
        "number",
        "outcome",
        "run_id",
        "started",
        "task_id",
        "total",
    )

    def __init__(self, run: Run, number: int, now: float) -> None:
        self.number = number
        self.run_id = run.run_id
        self.task_id = run.task_id
        self.accepted = now
        self.started: float | None = None
        self.ended: float | None = None
        self.outcome: str | None = None
        self.done: float | None = None
        self.total: float | None = None
        self.message = ""

    @property
    def name(self) -> str:
        """Return the task, bounded."""
        return self.task_id[:_MAX_NAME]

    @property
    def ran(self) -> float | None:
        """Return how long the task took, None if it did not begin or has not ended."""
        return None if self.started is None or self.ended is None else self.ended - self.started


class Failure(NamedTuple):
    """One run that ended with an error. ``event`` is its message, b"" if that is too large to be kept."""

    record: Record
    event: bytes

    def __repr__(self) -> str:
        return f"Failure({self.record!r}, {len(self.event)} bytes)"


class Histogram:
    """Times by class: ``counts[i]`` took at most ``BOUNDS[i]``, the last one more than that."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds


class Bin:
    """What happened within one second, or several: ends by outcome, and times from acceptance to end."""

    __slots__ = ("accepted", "ends", "second", "times")

    def __init__(self, second: int) -> None:
        self.second = second
        self.accepted = 0
        self.ends: dict[str, int] = {}
        self.times: dict[int, int] = {}

    def add(self, other: Bin) -> None:
        """Count what *other* counts."""
        self.accepted += other.accepted
        _add(self.ends, other.ends)
        _add(self.times, other.times)


_Key = TypeVar("_Key", str, int)


def _add(mine: dict[_Key, int], theirs: dict[_Key, int]) -> None:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count


class Statistics:
    """The numbers of one service, which began at *now*. Call it from the service's loop only."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.accepted_total = 0
        self.ended_total = dict.fromkeys(OUTCOMES, 0)
        self.run_seconds = Histogram()
        self.wait_seconds = Histogram()
        self.recent: collections.deque[Record] = collections.deque(maxlen=_RECENT)
        self.failures: collections.deque[Failure] = collections.deque(maxlen=_FAILURES)
        self.received_bytes = self.sent_bytes = 0  # over connections that are gone
        self._queued: dict[Record, None] = {}  # in the order of acceptance
        self._running: dict[Record, None] = {}  # in the order of beginning
        self._bin = Bin(int(now))
        self._bins = collections.deque([self._bin], maxlen=_SECONDS)

    @property
    def queued(self) -> int:
        """Return how many runs wait for a slot."""
        return len(self._queued)

    @property
    def running(self) -> int:
        """Return how many tasks have begun and not ended."""
        return len(self._running)

    def accepted(self, run: Run, now: float) -> None:
        """Note that *run* was taken."""
        self.accepted_total += 1
        record = run.record = Record(run, self.accepted_total, now)
        self._queued[record] = None
        self._bin_of(now).accepted += 1

    def started(self, run: Run, now: float) -> None:
        """Note that the task of *run* began, at ``run.began_at`` if that is known."""
        record = run.record
        if record is None or record.started is not None:
            return
        began = run.began_at
        record.started = began = now if began is None else max(record.accepted, min(began, now))
        del self._queued[record]
        self._running[record] = None
        self.wait_seconds.add(began - record.accepted)

    def progressed(
        self, run: Run, done: float | None, total: float | None, message: str | None, now: float
    ) -> None:
        """Note how far *run* is, as it said at *now*; what is None it did not say."""
        record = run.record
        if record is not None:
            record.done, record.total = done, total
            record.message = (message or "")[:_MAX_MESSAGE]

    def ended(self, run: Run, event: bytes | None, now: float) -> None:
        """Note the end of *run* by its terminal event, None if nobody was there to get one. Counts once."""
        record = run.record
        if record is None:
            return
        run.record = None
        outcome = "abandoned" if event is None else _OUTCOME_OF.get(event[9:15], "abandoned")
        record.ended, record.outcome = now, outcome
        if record.started is None:
            del self._queued[record]
        else:
            del self._running[record]
            self.run_seconds.add(now - record.started)
        self.ended_total[outcome] += 1
        bin_ = self._bin_of(now)
        bin_.ends[outcome] = bin_.ends.get(outcome, 0) + 1
        index = bisect_left(BOUNDS, now - record.accepted)
        bin_.times[index] = bin_.times.get(index, 0) + 1
        self.recent.append(record)
        if outcome == "error" and event is not None:
            self.failures.append(Failure(record, event if len(event) <= _MAX_EVENT else b""))

    def left(self, received_bytes: int, sent_bytes: int) -> None:
        """Note that a connection is gone, over which so much went."""
        self.received_bytes += received_bytes
        self.sent_bytes += sent_bytes

    def _bin_of(self, now: float) -> Bin:
        second = int(now)
        if self._bin.second != second:
            self._bin = Bin(second)
            self._bins.append(self._bin)
        return self._bin

    def longest_running(self, count: int) -> list[Record]:
        """Return the *count* runs that began first."""
        return list(islice(self._running, count))

    def longest_queued(self, count: int) -> list[Record]:
        """Return the *count* runs that wait for longest."""
        return list(islice(self._queued, count))

    def series(self, now: float, *, step: int, count: int) -> list[Bin]:
        """Return the last *count* bins of *step* seconds each; the last one is not over yet."""
        last = int(now) // step
        bins = [Bin((last - count + 1 + number) * step) for number in range(count)]
        for each in self._since(bins[0].second):
            number = each.second // step - (last - count + 1)
            if number < count:
                bins[number].add(each)
        return bins

    def over_last(self, now: float, seconds: int, *, whole: bool = True) -> Bin:
        """Return what happened within the last *seconds*, with the one that is not over unless *whole*."""
        total = Bin(int(now) - seconds)
        for each in self._since(total.second):
            if each.second < int(now) or not whole:
                total.add(each)
        return total

    def _since(self, second: int) -> Iterator[Bin]:
        for each in reversed(self._bins):
            if each.second < second:
                return
            yield each


def quantile(times: dict[int, int], share: float) -> float | None:
    """Return the time in seconds that *share* of the counted ones do not exceed, None without any.

    It is exact to the width of a class, in which times are taken to lie evenly.
    """
    left = share * sum(times.values())
    for index in sorted(times):
        count = times[index]
        if left <= count:
            lower = BOUNDS[index - 1] if index else 0.0
            upper = BOUNDS[min(index, len(BOUNDS) - 1)]
            return lower + (upper - lower) * left / count
        left -= count
    return None
