"""``wove-ws-sync demo``: a real weave on a worker service of this machine, and its events.

Owns: the demo's tasks, the timeline and the check of what came out. Never: reaches into a
link; it sees what every program sees that attaches a logging handler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.resources
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import wove

from .. import plugin
from ..session import close_links
from ..testing import LoopbackWorker

__all__ = ["register"]

_ENVIRONMENT = "demo_workers"
_EVENTS = ("task_started", "heartbeat", "log", "task_result", "task_error", "task_cancelled")
_COLOURS = {"heartbeat": "2", "log": "36", "task_result": "32", "task_error": "31", "task_cancelled": "33"}
_LOGGERS = tuple(logging.getLogger(f"wove_ws_sync.{name}") for name in ("host", "task"))
_MALFORMED = '{"price": 12,}'


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="show the main job on this machine",
        description="Start a worker service on a free loopback port with a fresh secret, run two weaves "
        "on it and print every event as it arrives; this takes about five seconds.",
    )
    parser.add_argument("--json", action="store_true", help="print one object a line, nothing else")
    parser.set_defaults(run=_run)


# -- the work: plain weaves, as in any program ---------------------------------------


def count_words(texts: list[str]) -> Any:
    """Weave mapped tasks, a long one that logs and an async one there, and a last one here."""
    with wove.weave(delivery_heartbeat_seconds=2.0, delivery_timeout=8.0) as w:

        @w.do(texts, environment=_ENVIRONMENT)
        def words(item: str) -> Counter[str]:
            return Counter(re.findall(r"[a-z]{4,}", item.lower()))

        @w.do(environment=_ENVIRONMENT)
        def slow() -> int:
            log = logging.getLogger("demo")
            for second in range(1, 4):
                time.sleep(1.0)
                log.info("%d of 3 seconds done", second)
            return 3

        @w.do(environment=_ENVIRONMENT)
        async def nap() -> str:
            await asyncio.sleep(0.3)
            return "awake"

        @w.do
        def most_used(words: list[Counter[str]]) -> list[tuple[str, int]]:
            return sum(words, Counter()).most_common(3)

    return w.result


def read_price(text: str) -> Any:
    """Weave a task that fails on *text* and one that never ends, which Wove then cancels."""
    with wove.weave(delivery_timeout=8.0) as w:

        @w.do(environment=_ENVIRONMENT)
        def price() -> int:
            time.sleep(0.5)
            return int(json.loads(text)["price"])

        @w.do(environment=_ENVIRONMENT)
        async def endless() -> None:
            await asyncio.sleep(600.0)

    return w.result


def _modules() -> list[str]:
    """Return the demo's input: the source of the five longest modules of this package."""
    files = importlib.resources.files(__package__.partition(".")[0]).iterdir()
    texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".py")]
    return sorted(texts, key=len)[-5:]


# -- the timeline --------------------------------------------------------------------


class Timeline(logging.Handler):
    """Turn log records of the host's side into events; *show* gets each one, in the link's threads."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.started: dict[str, float] = {}
        self.connections = 0
        self._show = show
        self._zero = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler, which holds its lock around this."""
        details = vars(record)
        action, kind = details.get("action"), details.get("event_type")
        if action == "connect":
            self.connections += 1
        elif action == "event" and kind != "log":  # a log event comes as a record of the task's, too
            self._event(str(kind), details, {})
        elif action == "log":
            self._event("log", details, {"level": record.levelname, "message": record.getMessage()})
        elif record.levelno >= logging.WARNING:
            print(f"wove-ws-sync demo: {self.format(record)}", file=sys.stderr)

    def _event(self, kind: str, details: dict[str, Any], more: dict[str, Any]) -> None:
        moment, run_id = time.monotonic() - self._zero, details["run_id"]
        self.seen[kind] += 1
        begun = self.started.setdefault(run_id, moment)
        if kind not in ("task_started", "log"):
            more["running"] = round(moment - begun, 3)
        head = {"t": round(moment, 3), "type": kind, "run_id": run_id, "task_id": details["task_id"]}
        self._show({**head, **more})


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Send everything of the host's loggers to *handler*, and leave them as they were."""
    levels = [logger.level for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger, level in zip(_LOGGERS, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _columns(event: dict[str, Any]) -> str:
    """Return one aligned line; the run is named by the start of its id."""
    kind = event["type"]
    name, _, number = event["run_id"].partition(":")
    detail = ""
    if kind == "log":
        detail = f"{event['level']} {event['message']}"
    elif "running" in event:
        detail = f"{'for' if kind == 'heartbeat' else 'after'} {event['running']:.3f} s"
    kind = _coloured(f"{kind:<16}", _COLOURS.get(kind, ""))
    return f"{event['t']:8.3f}  {kind}{f'{name}:{number[:4]}':<18}{detail}".rstrip()


def _coloured(text: str, colour: str) -> str:
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not colour else f"\x1b[{colour}m{text}\x1b[0m"


# -- the command ---------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    format_event = json.dumps if options.json else _columns
    say: Callable[..., None] = (lambda *_: None) if options.json else _print
    try:
        faults = _show_it(lambda event: _print(format_event(event)), say)
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        faults = [f"{type(exc).__name__}: {exc}"]
    for fault in faults:
        print(f"wove-ws-sync demo: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_it(show: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> list[str]:
    """Start the service, run both weaves, sum them up; return what did not come out as it should."""
    with LoopbackWorker(start_timeout=10.0) as worker:
        say(f"A worker service on this machine, with a fresh secret: {worker.url}\n")
        say(f"{'seconds':>8}  {'event':<16}run")
        timeline = Timeline(show)
        environment = {"executor": "websocket", "executor_config": worker.config}
        plugin.config(environments={_ENVIRONMENT: environment})
        try:
            with _attached(timeline):
                texts = _modules()
                good = count_words(texts)
                bad = read_price(_MALFORMED)
        finally:
            close_links()
            plugin.config(environments={_ENVIRONMENT: None})
            plugin.uninstall()
    return [*_sum_up(good, bad, texts, say), *_missing(timeline, say)]


def _sum_up(good: Any, bad: Any, texts: list[str], say: Callable[[str], None]) -> Iterator[str]:
    used = ", ".join(f"{word} {times}" for word, times in good.most_used)
    say(f"\nMost used in {len(texts)} modules of this package: {used}. slow: {good.slow}, nap: {good.nap}.")
    if len(good.words) != len(texts) or good.most_used[0][1] < len(texts):
        yield f"the mapped tasks returned {good.words!r}"
    if (good.slow, good.nap) != (3, "awake"):
        yield f"slow and nap returned {good.slow!r} and {good.nap!r}"
    error = bad.exception
    last = _last_line(error)
    say(f"price raised {type(error).__name__} here; on the worker its traceback ends: {last}")
    if not isinstance(error, json.JSONDecodeError) or type(error).__name__ not in last:
        yield f"price ended with {error!r} and {last!r}"
    if "endless" not in bad.cancelled:
        yield "endless was not cancelled"


def _last_line(exc: BaseException | None) -> str:
    """Return the last line of the worker's traceback, wherever the exception carries it."""
    text = "\n".join([str(getattr(exc, "__cause__", "")), *getattr(exc, "__notes__", [])])
    lines = [line.strip() for line in text.splitlines() if line.strip(' "')]
    return lines[-1] if lines else ""


def _missing(timeline: Timeline, say: Callable[[str], None]) -> Iterator[str]:
    connections, runs = timeline.connections, len(timeline.started)
    many = "one connection" if connections == 1 else f"{connections} connections"
    say(f"{many.capitalize()}, {runs} runs, {sum(timeline.seen.values())} events.")
    say("Read on: docs/tutorial.md, and `wove-ws-sync worker --help` for a worker service elsewhere.")
    if connections != 1:
        yield f"the runs took {connections} connections"
    yield from (f"no {kind} event arrived" for kind in _EVENTS if not timeline.seen[kind])
