"""What is around tasks: entered for each, and harmless when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator

import pytest

from wove_ws_sync.worker import surroundings

SEEN: list[str] = []


@contextlib.contextmanager
def noted() -> Iterator[None]:
    SEEN.append("before")
    yield
    SEEN.append("after")


@contextlib.contextmanager
def broken_before() -> Iterator[None]:
    raise LookupError("before the task")
    yield


@contextlib.contextmanager
def gone_before() -> Iterator[None]:
    raise asyncio.CancelledError("before the task")
    yield


@contextlib.contextmanager
def gone_after() -> Iterator[None]:
    yield
    raise SystemExit("after the task")


@contextlib.contextmanager
def broken_after() -> Iterator[None]:
    yield
    raise LookupError("after the task")


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(__import__("sys").modules, "surrounds", __import__("sys").modules[__name__])
    SEEN.clear()
    yield
    surroundings.use("")


def test_each_task_is_surrounded() -> None:
    surroundings.use("surrounds:noted")
    for _ in range(2):
        surroundings.call(SEEN.append, "task")
    assert SEEN == ["before", "task", "after"] * 2
    surroundings.use("")
    surroundings.call(SEEN.append, "alone")
    assert SEEN[-2:] == ["after", "alone"]


@pytest.mark.parametrize("kind", ["broken", "gone"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_fails_around_a_task_harms_no_task(
    kind: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    surroundings.use(f"surrounds:{kind}_{where}")
    with caplog.at_level(logging.ERROR):
        surroundings.call(SEEN.append, "task")
    assert SEEN == ["task"] and f"failed {where} a task" in caplog.text


def test_processes_of_an_engine_are_told_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings.use("surrounds:noted")
    monkeypatch.setattr(surroundings, "_around", None)
    monkeypatch.setattr(surroundings, "_known", False)  # as in another process
    surroundings.call(SEEN.append, "task")
    assert SEEN == ["before", "task", "after"]
    surroundings.use("")
    assert "WOVE_WS_TASKS_AROUND" not in os.environ


def test_a_coroutine_needs_no_surroundings() -> None:
    async def one() -> int:
        return 1

    surroundings.use("surrounds:noted")
    assert asyncio.run(surroundings.awaited(one())) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["surrounds", "surrounds:nobody", "no_such_module:x", "surrounds:SEEN"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        surroundings.use(name)
