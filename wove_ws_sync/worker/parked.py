"""Commands of one connection that were read and not obeyed yet, as pure state.

Owns: their order, what may be obeyed before its turn, how much waits, when which run among
them owes a heartbeat. Never: a socket or a clock (``now`` is an argument), never obeys a
command itself.

==================== ==========================================================
command              read while runs wait here
==================== ==========================================================
event_ack, resume    obeyed at once
what is ignored      counted at once
cancel_task          obeyed at once; a run that waits here never begins
shutdown             the same, for every run that waits here
detach_task          obeyed at once, unless its run waits here
malformed run_task   refused at once, unless something about its run waits here
any other            waits for its turn
==================== ==========================================================

An attach_task or a detach_task that waits here, with its run if that waits too, is obeyed right
before a cancel_task or detach_task of the same run, and before a shutdown.
"""

from __future__ import annotations

import collections
from typing import Any

from ..frames import InvalidMessage
from .commands import (
    AttachTask,
    CancelTask,
    Command,
    DetachTask,
    EventAck,
    Ignored,
    MalformedRun,
    Resume,
    RunTask,
    Shutdown,
    Withdrawn,
)
from .runs import BeatSchedule, Run, RunState

__all__ = ["Parked"]

#: What a command takes besides its message, about.
_OVERHEAD = 512


class Parked:
    """Commands that wait, or what was read instead of one; ``bytes`` is about what they take.

    ``beats`` has the runs whose host wants to hear of them; they are no accepted ones yet.
    """

    def __init__(self) -> None:
        self.bytes = 0
        # An OrderedDict finds its first entry at once, also when many before it are gone.
        self._items: collections.OrderedDict[int, tuple[int, Command | InvalidMessage]]
        self._items = collections.OrderedDict()
        self._runs: dict[str, int] = {}
        # What attaches a run, or lets it go, by its id.
        self._handovers: dict[str, list[int]] = {}
        self._beating: dict[int, Run] = {}
        self._number = 0
        self.beats = BeatSchedule()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Command | InvalidMessage, size: int, now: float, owner: Any = None) -> bool:
        """Have *item*, a message of *size* bytes, wait; False if it is a run that waits already.

        *owner* is the host that gets its heartbeats.
        """
        self._number += 1
        if isinstance(item, RunTask):
            if item.run_id in self._runs:
                return False
            self._runs[item.run_id] = self._number
            if item.beat_interval is not None:
                run = self._beating[self._number] = Run(item, owner)
                self.beats.add(run, now)
        elif isinstance(item, AttachTask | DetachTask):
            self._handovers.setdefault(item.run_id, []).append(self._number)
        self._items[self._number] = (size + _OVERHEAD, item)
        self.bytes += size + _OVERHEAD
        return True

    def take(self) -> Command | InvalidMessage:
        """Return what has waited for longest."""
        return self._remove(next(iter(self._items)))

    def clear(self) -> None:
        """Forget everything."""
        while self._items:
            self.take()

    def __contains__(self, run_id: str) -> bool:
        """Tell whether a run of this id waits."""
        return run_id in self._runs

    def overtakes(self, item: Command | InvalidMessage) -> list[Command]:
        """Return what is to be obeyed now that *item* has been read; nothing if it has to wait."""
        if isinstance(item, EventAck | Resume | Ignored):
            return [item]
        if isinstance(item, MalformedRun):
            return [] if item.run_id in self._runs or item.run_id in self._handovers else [item]
        if isinstance(item, DetachTask):
            return [] if item.run_id in self._runs else [*self._hand_over(item.run_id), item]
        if isinstance(item, CancelTask):
            before = self._hand_over(item.run_id)
            number = self._runs.get(item.run_id)
            return [*before, item] if number is None else [self._withdraw(number, item)]
        if isinstance(item, Shutdown):
            before = [command for run_id in list(self._handovers) for command in self._hand_over(run_id)]
            return [*before, *(self._withdraw(number, None) for number in list(self._runs.values())), item]
        return []

    def _hand_over(self, run_id: str) -> list[Command]:
        """Take out what attaches the run or lets it go, with the run itself, in their order."""
        numbers = self._handovers.get(run_id, [])[:]
        if numbers and run_id in self._runs:
            numbers.append(self._runs[run_id])
        return [
            item for number in sorted(numbers) if not isinstance(item := self._remove(number), InvalidMessage)
        ]

    def _withdraw(self, number: int, cancel: CancelTask | None) -> Withdrawn:
        run = self._remove(number)
        assert isinstance(run, RunTask)
        return Withdrawn(run.run_id, run.task_id, None if cancel is None else cancel.cancel_mode)

    def _remove(self, number: int) -> Command | InvalidMessage:
        size, item = self._items.pop(number)
        self.bytes -= size
        if isinstance(item, RunTask):
            del self._runs[item.run_id]
        elif isinstance(item, AttachTask | DetachTask):
            self._handovers[item.run_id].remove(number)
            if not self._handovers[item.run_id]:
                del self._handovers[item.run_id]
        beating = self._beating.pop(number, None)
        if beating is not None:
            beating.state = RunState.ENDED  # as one that waits
        return item
