"""How an event loop that ran the user's coroutines comes to its end.

Owns: what is done about tasks and generators that are left, and how long that may take.
Never: waits for a thread that a coroutine has started.
"""

from __future__ import annotations

import asyncio
import logging

__all__ = ["finish"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: What tasks that are left may take to end, in seconds; as much again for generators.
_GRACE = 0.2


def finish(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on *loop*, the current one of this thread, and close it. Never raises.

    ``asyncio.run`` would wait for what ignores its cancellation, and for threads, without a limit.
    """
    try:
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=_GRACE))
        loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), _GRACE))
    except BaseException:
        _logger.debug("A task loop did not end in order.", exc_info=True)
    finally:
        asyncio.set_event_loop(None)
        loop.close()
