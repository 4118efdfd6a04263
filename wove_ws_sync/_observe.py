"""Who else is told of what happens to a run: callbacks beside the end of its future.

Owns: the last known progress of a run and its callbacks. Never: takes a lock, unpickles,
lets an exception of a callback out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self

from ._progress import Progress
from ._tell import host_log, note

__all__ = ["Observed", "OnEvent"]

OnEvent = Callable[[dict[str, Any]], object]


class Observed:
    """What a future knows of its run while that is under way."""

    _progress: Progress | None = None
    _attempt = 1

    @property
    def progress(self) -> Progress | None:
        """Return the last report of the task, ``(done, total, message)``; None before the first.

        A task reports by ``wove_ws_sync.current_run().progress(...)``. When a run is delivered
        again after the loss of its worker, it begins with None again. Needs a worker service of
        this package. Thread-safe.
        """
        return self._progress

    def add_progress_callback(self, fn: Callable[[Self], object]) -> None:
        """Have ``fn(future)`` called after each report, with :attr:`progress` set.

        It is called in the reader thread, which receives nothing meanwhile: be quick, and do not
        wait for a run there. What it raises is logged under ``wove_ws_sync.host``. Thread-safe.
        """
        # setdefault() and append() are atomic, so that a signal handler may come here at any time.
        self.__dict__.setdefault("_progress_callbacks", []).append(fn)

    def _observe(self, event: dict[str, Any], on_event: OnEvent | None) -> None:
        """Take one event frame, before the future does."""
        kind = event["type"]
        if kind == "task_started":
            attempt = event.get("attempt", 1)
            if attempt != self._attempt:  # another execution, which begins at the beginning
                self._attempt, self._progress = attempt, None
        elif kind == "progress":
            self._progress = Progress(event["done"], event["total"], event["message"])
            for fn in tuple(self.__dict__.get("_progress_callbacks", ())):
                _call(fn, self)
        if on_event is not None:
            # The pickles stay with the future: they may be large, and nobody is to load them here.
            _call(on_event, {key: value for key, value in event.items() if not key.endswith("_pickle")})


def _call(fn: Callable[[Any], object], value: Any) -> None:
    try:
        fn(value)
    except Exception:
        note(host_log, logging.ERROR, "a callback for events failed", exc_info=True)
