"""A ledger of executions that outlives whoever writes it: who ran what, how often.

``record`` runs in a worker, ``executions`` and ``processes`` read what it wrote. A line is
one ``write`` to a file opened with O_APPEND, so lines of several processes never mix, and
one that was killed leaves a whole line or none.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["executions", "processes", "record", "record_and_hold", "serials"]

_serials = itertools.count(1)


def record(folder: str, run: str, answer: Any = None) -> Any:
    """Write down that *run* is executed here, and return *answer*."""
    line = f"{run} {os.getpid()} {next(_serials)} {time.monotonic_ns()}\n"
    descriptor = os.open(os.path.join(folder, run), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode("ascii"))
    finally:
        os.close(descriptor)
    return answer


def record_and_hold(folder: str, run: str, gate: str, limit: float = 60.0) -> str:
    """Write down the execution, hold until the file *gate* exists, and return *run*."""
    record(folder, run)
    ends_at = time.monotonic() + limit
    while not os.path.exists(gate):
        if time.monotonic() > ends_at:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.01)
    return run


def _lines(folder: str | Path) -> list[list[str]]:
    return [line.split() for file in Path(folder).iterdir() for line in file.read_text("ascii").splitlines()]


def executions(folder: str | Path) -> Counter[str]:
    """Return how often each run was executed."""
    return Counter(run for run, *_ in _lines(folder))


def processes(folder: str | Path) -> dict[str, set[int]]:
    """Return which processes executed each run."""
    found: dict[str, set[int]] = {}
    for run, pid, *_ in _lines(folder):
        found.setdefault(run, set()).add(int(pid))
    return found


def serials(folder: str | Path) -> dict[int, list[int]]:
    """Return for each process the serial numbers of its executions, which count up without a gap."""
    found: dict[int, list[int]] = {}
    for _, pid, serial, _ in _lines(folder):
        found.setdefault(int(pid), []).append(int(serial))
    return {pid: sorted(numbers) for pid, numbers in found.items()}
