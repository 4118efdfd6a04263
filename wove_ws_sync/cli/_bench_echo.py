"""The bare echo server that ``bench`` measures against, in a process of its own.

Owns: nothing but the echo: ``python -m wove_ws_sync.cli._bench_echo`` prints its URL and
ends when its stdin does. Never: runs in the process that measures.
"""

from __future__ import annotations

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve

__all__: list[str] = []


async def _echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def _main() -> None:
    # No pings: the connection may rest while other cases are measured.
    async with serve(_echo, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"ws://127.0.0.1:{port}/", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
