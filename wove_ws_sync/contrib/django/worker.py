"""What a worker service needs to run tasks of a Django project: ``--around``'s object.

Owns: that Django is set up in every process that runs tasks, and that a task leaves no database
connection behind that is broken or too old. Never: serves; ``manage.py wove_ws_worker`` does, and
``wove-ws-sync worker --around wove_ws_sync.contrib.django.worker:around`` with DJANGO_SETTINGS_MODULE.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Awaitable, Iterator
from typing import Any

import django
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.apps import apps
from django.db import close_old_connections, connections, reset_queries

__all__ = ["TEST_DATABASES", "around"]

#: The variable by which a test tells its worker service the names of its databases, as JSON.
TEST_DATABASES = "WOVE_WS_TEST_DATABASES"


class _Around:
    """Do for a task what Django does for a request."""

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        return self._entered()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        _tidy()
        try:
            yield
        finally:
            _tidy()

    async def awaited(self, awaitable: Awaitable[Any]) -> Any:
        """Await what a task returned; its database work is done in a thread of its own, as a request's is."""
        async with ThreadSensitiveContext():
            await sync_to_async(_tidy)()
            try:
                return await awaitable
            finally:
                await sync_to_async(_close)()  # the thread ends


def _tidy() -> None:
    reset_queries()
    close_old_connections()


def _close() -> None:
    reset_queries()
    connections.close_all()


def _use_test_databases() -> None:
    """Connect to the databases of the test that started this process."""
    for alias, name in json.loads(os.environ.get(TEST_DATABASES, "{}")).items():
        connections[alias].close()
        connections.databases[alias]["NAME"] = name
        connections[alias].settings_dict["NAME"] = name


if not apps.ready:
    django.setup()
_use_test_databases()
around = _Around()
