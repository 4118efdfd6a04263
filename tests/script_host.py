"""Programs that tests run in a process of their own, and what stands between them and a worker."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_helpers import search_path

from wove_ws_sync.testing import LoopbackWorker

# Only a failing test spends it, in seconds.
PATIENCE = 60.0
# How long a process may take to end once its script is done, in seconds: close_timeout is 2.
EXIT = 5.0

PRELUDE = """
import asyncio, concurrent.futures, faulthandler, gc, multiprocessing, operator, os, signal, sys
import threading, time, warnings
import wove_ws_sync
from wove import weave
from wove_ws_sync import *

URL, SECRET, *ARGS = sys.argv[1:]
CONFIG = {"url": URL, "security": {"type": "signed", "secret": SECRET}}
# Who hangs says where and ends, forked children too.
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm(50)
os.register_at_fork(after_in_child=lambda: signal.alarm(20))

def executor(**settings):
    return WebSocketExecutor(**CONFIG, **settings)

def add(a, b):
    return a + b

def nap(seconds):
    import time
    time.sleep(seconds)
    return seconds

async def forever():
    import asyncio
    await asyncio.sleep(600)

def unseen_fork():
    # C forks without a word to Python. A thread of the parent that is just then on its way into the
    # interpreter leaves the child's lock of it in pieces, whoever forks: let them all come to rest.
    import ctypes
    time.sleep(0.3)
    return ctypes.PyDLL(None).fork()

def wait_running(*futures):
    for future in futures:
        while not future.running():
            time.sleep(0.01)

def say(*words):
    print(" ".join(map(str, words)) + os.linesep, end="", flush=True)  # one write: threads speak too

def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wove-ws-")]
"""


class Script:
    """A Python process that runs *first*, the prelude and then *code*."""

    def __init__(
        self, path: Path, code: str, target: Any, *args: str, flags: tuple[str, ...] = (), first: str = ""
    ) -> None:
        path.write_text(first + PRELUDE + textwrap.dedent(code), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, *flags, str(path), target.url, (target.security or {})["secret"], *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its children end with it
            env={**os.environ, "PYTHONPATH": search_path()},
        )

    def expect(self, *lines: str) -> None:
        """Read these lines from its output."""
        assert self.process.stdout is not None
        for line in lines:
            said = self.process.stdout.readline().rstrip("\n")
            assert said == line, (said, *self._rest())

    def _rest(self) -> tuple[str, str]:
        self.kill()
        return self.process.communicate()

    def kill(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def tell(self) -> None:
        """Let it go on behind ``input()``."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self, within: float = PATIENCE) -> tuple[str, str, int]:
        """Wait until it ends, *within* seconds; return output, errors and exit code."""
        started = time.monotonic()
        out, err = self.process.communicate(timeout=PATIENCE)
        took = time.monotonic() - started
        assert took <= within, f"took {took:.1f} s to end"
        return out, err, self.process.returncode


@contextlib.contextmanager
def scripts(worker: LoopbackWorker, folder: Path) -> Iterator[Callable[..., Script]]:
    """Start scripts; what still runs at the end is killed."""
    started: list[Script] = []

    def start(
        code: str, *args: str, target: Any = worker, flags: tuple[str, ...] = (), first: str = ""
    ) -> Script:
        path = folder / f"script{len(started)}.py"
        started.append(Script(path, code, target, *args, flags=flags, first=first))
        return started[-1]

    try:
        yield start
    finally:
        for item in started:
            item.kill()
            item.process.communicate()


class Mute:
    """A target that accepts connections and never answers."""

    security = {"secret": "not-asked-for-here"}  # noqa: RUF012  # nobody changes it

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._socket.getsockname()[1]}/wove"

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class Proxy:
    """Copy bytes between hosts and a worker, and count what each connection of a host sent."""

    def __init__(self, target: LoopbackWorker) -> None:
        self._target = int(target.url.rpartition(":")[2].partition("/")[0])
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.security = target.security
        self.url = target.url.replace(f":{self._target}/", f":{self._socket.getsockname()[1]}/")
        self.sent: list[int] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                host, _ = self._socket.accept()
            except OSError:
                return
            self.sent.append(0)
            thread = threading.Thread(target=self._copy, args=(host, len(self.sent) - 1), name="proxy-copy")
            self._threads.append(thread)
            thread.start()

    def _copy(self, host: socket.socket, number: int) -> None:
        with host, socket.create_connection(("127.0.0.1", self._target)) as worker:
            while True:
                for end in select.select([host, worker], [], [])[0]:
                    try:
                        data = end.recv(65536)
                    except OSError:
                        return
                    if not data:
                        return
                    (worker if end is host else host).sendall(data)
                    self.sent[number] += len(data) if end is host else 0

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._socket.close()


QUIET = ("-W", "ignore::DeprecationWarning")  # of fork in a process with threads, since Python 3.12
