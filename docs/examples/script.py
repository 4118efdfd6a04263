"""A plain script: calls on a worker service, in all the ways that concurrent.futures has.

Start a worker service, or let this script start one for itself:

    wove-ws-sync worker &
    WOVE_WS_URL=ws://127.0.0.1:8765/wove python script.py
"""

import contextlib
import os
import time
from concurrent.futures import as_completed

from wove_ws_sync import DeliveryCancelled, WebSocketExecutor, current_run
from wove_ws_sync.testing import LoopbackWorker


def area(width, height):
    return width * height


def slow_area(width, seconds):
    time.sleep(seconds)
    return width * width


def count_slowly(limit):
    run = current_run()
    for number in range(limit):
        if run.cancelled():
            return number
        run.progress(number, limit)
        time.sleep(0.01)
    return limit


def main():
    with contextlib.ExitStack() as stack:
        if os.environ.get("WOVE_WS_URL"):
            settings = {}  # url, security and so on are in the environment
        else:
            settings = stack.enter_context(LoopbackWorker(workers=4)).config
        pool = stack.enter_context(WebSocketExecutor(**settings))

        # One call.
        print("one:", pool.submit(area, 6, 7).result(timeout=30))

        # Many calls, results in order; eight runs ahead of the loop at most.
        print("map:", list(pool.map(area, range(5), range(5), buffersize=8)))

        # Results as they come.
        waits = {pool.submit(slow_area, n, 0.2 / (n + 1)): n for n in range(4)}
        for future in as_completed(waits, timeout=30):
            print("as completed:", waits[future], future.result())

        # Settings of one kind of run.
        hasty = pool.with_options(delivery_timeout=0.2)
        error = hasty.submit(slow_area, 1, 2).exception()
        print("too slow:", type(error).__name__)

        # A running task is cancelled, and looks for that itself.
        future = pool.submit(count_slowly, 10_000)
        while future.progress is None:
            time.sleep(0.01)
        print("cancelled:", future.cancel())
        try:
            future.result()
        except DeliveryCancelled as exc:
            print(f"its run was {exc.run_id.partition(':')[0]}")


if __name__ == "__main__":
    main()
