"""How long a request takes whose view runs a weave: this package beside Wove's own executor.

A program, no test: ``python tests/web_latency.py --requests 2000``. One worker service with TLS
and a secret, and for each executor a gunicorn with 2 processes of 4 threads that serves the
Django project of ``web_site.py``. The requests go in turns of 100 to each of them, so that
whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from web_server import WebServer, hosts

from wove_ws_sync.testing import LoopbackWorker

GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "fd://FD", "--workers", "2", "--threads", "4"]
SITES = {
    "wove's own": {"PLAIN_WOVE": "1"},
    "sealed": {"SEAL": "auto"},
    "not sealed": {"SEAL": "off"},
    "no weave": {},
}
TURN = 100


def timed(server: WebServer, path: str, value: int | None) -> float:
    started = time.perf_counter()
    answer = server.ask(path)
    took = time.perf_counter() - started
    if answer.get("value") != value:
        raise SystemExit(f"wrong answer: {answer}")
    return took


def measure(servers: dict[str, WebServer], requests: int, at_once: int) -> dict[str, list[float]]:
    """Return the seconds of each request by site."""
    found: dict[str, list[float]] = {name: [] for name in servers}
    with ThreadPoolExecutor(at_once) as pool:
        for begin in range(0, requests, TURN):
            for name, server in servers.items():
                numbers = range(begin, min(begin + TURN, requests))
                paths = ["/about" if name == "no weave" else f"/weave/{number}" for number in numbers]
                values = [None if name == "no weave" else number**2 + number**3 for number in numbers]
                found[name] += pool.map(timed, [server] * len(numbers), paths, values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000, help="for each site (default: %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 8], help="default: 1 8")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = stack.enter_context(LoopbackWorker(workers=8, tls=True))
        servers = {
            name: stack.enter_context(WebServer(folder, [*GUNICORN, "web_site"], worker, variables))
            for name, variables in SITES.items()
        }
        measure(servers, TURN, 8)  # so that every process and thread has begun
        for at_once in options.at_once:
            found = measure(servers, options.requests, at_once)
            base = statistics.median(found["wove's own"])
            print(f"{options.requests} requests, {at_once} at once: median, 95 %, ratio of medians")
            for name, seconds in found.items():
                middle, late = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
                print(f"  {name:12} {middle * 1e3:7.1f} ms {late * 1e3:7.1f} ms {middle / base:6.2f}")
        now, ever = hosts(worker)
        print(f"connections at the worker: {now} now, {ever} in all")


if __name__ == "__main__":
    main()
