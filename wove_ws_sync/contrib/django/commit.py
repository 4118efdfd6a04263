"""Submitting when the transaction commits.

Owns: :func:`submit_on_commit`. Never: waits for the run.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

from django.db import transaction

from ...futures import RunFuture, WebSocketExecutor
from . import conf
from .executors import executors

__all__ = ["left_alone", "submit_on_commit"]

_numbers = itertools.count(1)
_logger = logging.getLogger("wove_ws_sync.host")


def submit_on_commit(
    fn: Callable[..., object],
    /,
    *args: Any,
    using: str | None = None,
    alias: str = conf.DEFAULT_ALIAS,
    robust: bool = False,
    **kwargs: Any,
) -> None:
    """Submit ``fn(*args, **kwargs)`` to the executor *alias* on commit, or now if there is no transaction.

    *using* names the database, *robust* is that of ``transaction.on_commit``. After a rollback nothing
    is submitted. Nobody waits for the run: a failure is an ERROR in the log ``wove_ws_sync.host``, and
    unless the alias says otherwise the run goes on when this process ends (``delivery_orphan_policy``
    "detach"). Pass ids, not model instances, as they are read after the commit.
    """

    def submit() -> None:  # no partial: when a robust one fails, Django asks for its __qualname__
        left_alone(alias).submit(fn, *args, **kwargs).add_done_callback(_tell)

    transaction.on_commit(submit, using=using, robust=robust)


def left_alone(alias: str) -> WebSocketExecutor:
    """Return the executor of *alias* for runs that nobody waits for."""
    if "delivery_orphan_policy" in conf.read(alias).delivery:
        return executors[alias]
    return executors[alias].with_options(delivery_orphan_policy="detach")


def _tell(future: Any) -> None:
    """Log a failure; runs in the reader thread, where nothing is unpickled, and a result nowhere."""
    run: RunFuture[Any] = future
    event = run._event or {}
    if run.cancelled() or event.get("type") == "task_result":
        return
    if any(key.endswith("_pickle") for key in event):
        name = f"wove-ws-told-{next(_numbers)}"
        threading.Thread(target=_log, args=[run], name=name, daemon=True).start()
    else:
        _log(run)


def _log(run: RunFuture[Any]) -> None:
    error = run.exception()
    if error is not None:
        _logger.error(
            "Run '%s', submitted on commit, failed: %r",
            run.run_id,
            error,
            exc_info=error,
            extra={"run_id": run.run_id},
        )
