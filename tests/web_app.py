"""A WSGI application that uses a worker service, for the tests of web servers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import web_tasks
import wove

import wove_ws_sync
import wove_ws_sync.session

CONFIG: dict[str, Any] = {
    "url": os.environ["WORKER_URL"],
    "security": {"type": "signed", "secret": os.environ["WORKER_SECRET"]},
    "ca_file": os.environ.get("WORKER_CA"),
}
# Made when the application is loaded, also before a fork: nothing is dialled here.
pool = wove_ws_sync.WebSocketExecutor(**CONFIG)
wove_ws_sync.config(
    default_environment="far", environments={"far": {"executor": "websocket", "executor_config": CONFIG}}
)


def run(number: int) -> int:
    """Run on the worker through the executor."""
    return pool.submit(pow, number, 2).result(web_tasks.WAIT)


def weave(number: int) -> int:
    """Run on the worker through a weave."""
    with wove.weave() as w:

        @w.do
        def square() -> int:
            return number * number

    return int(w.result.square)


def both(number: int) -> int:
    """Run on the worker both ways: they share the connection."""
    assert run(number) == weave(number)
    return run(number)


def meet(parties: int) -> int:
    """Wait on the worker for others who do the same."""
    return pool.submit(web_tasks.meet, parties).result(web_tasks.WAIT)


def wait_for(path: str) -> bool:
    """Wait on the worker until a file is there."""
    return pool.submit(web_tasks.wait_for, path).result(web_tasks.WAIT)


def weave_for(path: str) -> bool:
    """Wait on the worker until a file is there, in a weave."""
    with wove.weave() as w:

        @w.do
        def came() -> bool:
            import web_tasks

            return web_tasks.wait_for(path)

    return bool(w.result.came)


WAYS: dict[str, Callable[[Any], Any]] = {
    "run": lambda text: run(int(text)),
    "weave": lambda text: weave(int(text)),
    "both": lambda text: both(int(text)),
    "meet": lambda text: meet(int(text)),
    "wait_for": lambda text: wait_for(f"/{text}"),
    "weave_for": lambda text: weave_for(f"/{text}"),
}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer ``/way/argument`` with the value, or the error, and who answers."""
    way, _, argument = environ["PATH_INFO"].lstrip("/").partition("/")
    answer: dict[str, Any] = {"pid": os.getpid()}
    try:
        answer["value"] = WAYS[way](argument)
    except Exception as exc:
        answer["error"] = f"{type(exc).__name__}: {exc}"
    answer["links"] = [link.stats()["dials"] for link in wove_ws_sync.session.links()]
    monkey = sys.modules.get("gevent.monkey")
    answer["green"] = monkey is not None and monkey.is_module_patched("threading")
    start_response("200 OK", [("Content-Type", "application/json"), ("Connection", "close")])
    return [json.dumps(answer).encode()]
