"""A Redis server of a test's own, where the program is installed.

``WOVE_WS_REDIS_SERVER`` names it if it is not on the PATH.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_helpers import until

PROGRAM = os.environ.get("WOVE_WS_REDIS_SERVER") or shutil.which("redis-server")
needs_redis = pytest.mark.skipif(PROGRAM is None, reason="there is no redis-server here")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False


@contextlib.contextmanager
def redis_server(
    directory: Path, *args: str, port: int | None = None
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server on loopback that writes nothing to disk; yield its port and its process."""
    port = free_port() if port is None else port
    assert PROGRAM is not None
    command = [
        PROGRAM,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(directory),
        *args,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or _answers(port))
            assert process.poll() is None, "redis-server did not start"
            yield port, process
        finally:
            process.kill()
