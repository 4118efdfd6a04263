"""What Celery's tasks have done at the worker service, which needs no Celery for it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path


def square(number: int) -> int:
    """Return the square."""
    return number * number


async def hold(gate: str) -> str:
    """Wait until the file *gate* exists."""
    while not Path(gate).exists():
        await asyncio.sleep(0.02)
    return "opened"


def end_service_once(mark: str) -> str:
    """End the process of the worker service unless the file *mark* exists, which is made first."""
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(9)
    return "done"


async def sleep_long(seconds: float) -> None:
    """End at once for 0; otherwise a cancellation has to end it."""
    await asyncio.sleep(60 if seconds else 0)
