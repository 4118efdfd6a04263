"""A bar for runs on their way, with the progress inside each of them.

Owns: :func:`track` and the two libraries that draw: tqdm and rich. Never: imports either
before a bar is asked for, never starts a thread.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TextIO, TypeVar

from ._progress import Progress

__all__ = ["Progress", "track"]

_F = TypeVar("_F", bound="concurrent.futures.Future[Any]")
_LIBRARIES = ("tqdm", "rich")
# When nothing has come for so many seconds, what was not drawn yet is drawn.
_SETTLED = 0.2


def track(
    futures: Iterable[_F],
    total: int | None = None,
    description: str = "",
    *,
    bar: str | None = None,
    file: TextIO | None = None,
) -> Iterator[_F]:
    """Yield futures as they end, as ``concurrent.futures.as_completed`` does, and draw a bar meanwhile.

    The bar counts runs: those that have ended, and of those under way the part that their
    tasks report (``current_run().progress(done, total)``); the newest message stands beside
    it. Futures of other executors count when they end. *total* is the number of runs (default:
    that of the futures), *description* stands before the bar. *bar* is "tqdm" or "rich"
    (default: whichever is installed, in this order); *file* is where it is drawn (default:
    stderr).

    Raises ValueError for another *bar*, ModuleNotFoundError if it is not installed. Use the
    iterator from one thread.
    """
    if bar is not None and bar not in _LIBRARIES:
        raise ValueError(f"bar must be one of: 'tqdm', 'rich'; not {bar!r}.")
    wanted = _LIBRARIES if bar is None else (bar,)
    library = next((name for name in wanted if importlib.util.find_spec(name) is not None), None)
    if library is None:
        package = "wove_ws_sync[progress]" if "tqdm" in wanted else "rich"
        names = " or ".join(wanted)
        raise ModuleNotFoundError(
            f'track() needs {names} for its bar, which is not installed: pip install "{package}"',
            name=wanted[0],
        )
    waiting = dict.fromkeys(futures)  # each once, in order
    count = len(waiting) if total is None else total
    make = _Tqdm if library == "tqdm" else _Rich
    return _tracked(waiting, lambda: make(count, description, file or sys.stderr))


class _Bar(Protocol):
    def show(self, position: float, message: str) -> None:
        """Move to *position*, in runs."""

    def settle(self) -> None:
        """Draw what was shown a moment ago, as nothing more may come for long."""

    def close(self) -> None:
        """Leave the bar as it is."""


class _News:
    """What the callbacks of futures put, until nobody takes it any more."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._is_closed = False

    def put(self, future: Any) -> None:
        """Note that there is something new about *future*. Any thread, never blocks."""
        if not self._is_closed:
            self._queue.put(future)

    def get(self, timeout: float | None) -> set[Any]:
        """Wait for news, and return every future that they are about; none when *timeout* is over."""
        try:
            fresh = {self._queue.get(timeout=timeout)}
        except Empty:
            return set()
        while not self._queue.empty():  # nobody else takes from it
            fresh.add(self._queue.get())
        return fresh

    def close(self) -> None:
        self._is_closed = True
        self._queue = SimpleQueue()


def _tracked(waiting: dict[_F, None], make_bar: Any) -> Iterator[_F]:
    news = _News()
    for future in waiting:
        add = getattr(future, "add_progress_callback", None)
        if add is not None:
            add(news.put)
        future.add_done_callback(news.put)
    parts = {future: _fraction(future) for future in waiting}
    ended = 0
    bar: _Bar = make_bar()
    is_drawn = False
    try:
        bar.show(sum(parts.values()), _message(waiting))
        while waiting:
            fresh = news.get(None if is_drawn else _SETTLED)
            if not fresh:
                bar.settle()
                is_drawn = True
                continue
            fresh &= waiting.keys()
            for future in fresh:
                parts[future] = 0.0 if future.done() else _fraction(future)
            message = _message(fresh)
            done = [future for future in fresh if future.done()]
            for future in done:
                del waiting[future], parts[future]
            ended += len(done)
            bar.show(ended + sum(parts.values()), message)
            is_drawn = False
            fresh.clear()
            while done:
                yield done.pop()  # what is yielded is forgotten here
    finally:
        news.close()
        bar.close()


def _message(futures: Iterable[Any]) -> str:
    """Return what one of the runs says; "" if none says anything."""
    reports = (getattr(future, "progress", None) for future in futures)
    return next((report.message for report in reports if report is not None and report.message), "")


def _fraction(future: Any) -> float:
    progress: Progress | None = getattr(future, "progress", None)
    return 0.0 if progress is None else progress.fraction


class _Tqdm:
    def __init__(self, total: int, description: str, file: TextIO) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=description or None, file=file, unit="run")

    def show(self, position: float, message: str) -> None:
        if message:
            self._bar.set_postfix_str(message, refresh=False)
        self._bar.n = round(position, 2)
        self._bar.update(0)  # draws, unless it did a moment ago

    def settle(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


class _Rich:
    def __init__(self, total: int, description: str, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:g}/{task.total:g}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", markup=False),  # a task's text is no markup
        ]
        self._bar = Progress(*columns, console=Console(file=file))
        self._task = self._bar.add_task(description, total=total, message="")
        self._bar.start()

    def show(self, position: float, message: str) -> None:
        if message:
            self._bar.update(self._task, message=message)
        self._bar.update(self._task, completed=round(position, 2))

    def settle(self) -> None:
        pass  # rich draws ten times a second by itself

    def close(self) -> None:
        self._bar.stop()
