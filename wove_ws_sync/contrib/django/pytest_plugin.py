"""Fixtures for pytest: ``pytest_plugins = ["wove_ws_sync.contrib.django.pytest_plugin"]`` in conftest.py.

Owns: ``wove_ws_immediate`` and ``wove_ws_worker``. Never: needs pytest-django, with which it goes well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from .testing import DjangoWorker, immediate

__all__ = ["wove_ws_immediate", "wove_ws_service", "wove_ws_worker"]


@pytest.fixture
def wove_ws_immediate() -> Iterator[None]:
    """Have every alias run in process, at once, while the test runs."""
    with immediate():
        yield


@pytest.fixture(scope="session")
def wove_ws_service(request: pytest.FixtureRequest) -> Iterator[DjangoWorker]:
    """Run one worker service for all tests, on the test databases."""
    with contextlib.suppress(pytest.FixtureLookupError):  # pytest-django makes the test databases
        request.getfixturevalue("django_db_setup")
    with DjangoWorker() as worker:
        yield worker


@pytest.fixture
def wove_ws_worker(wove_ws_service: DjangoWorker) -> Iterator[DjangoWorker]:
    """Have the alias "default" use a real worker service while the test runs; return the service.

    A test of what tasks do in the database needs the fixture ``transactional_db``: they see what
    was committed.
    """
    if wove_ws_service.pid is None:  # an earlier test stopped it
        wove_ws_service.start()
    with wove_ws_service.settings():
        yield wove_ws_service
