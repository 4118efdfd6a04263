"""A plain WebSocket in front of Wove's own stdio worker: one process a connection, lines copied both ways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from websockets.asyncio.server import ServerConnection, serve


async def bridge(connection: ServerConnection) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "wove.stdio_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def outward() -> None:
        while line := await stdout.readline():
            await connection.send(line.decode())

    copying = asyncio.create_task(outward())
    try:
        async for message in connection:
            stdin.write(message.encode() + b"\n" if isinstance(message, str) else message)
            await stdin.drain()
    finally:
        copying.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def main() -> None:
    async with serve(bridge, "127.0.0.1", 0, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"ws://127.0.0.1:{port}/", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
