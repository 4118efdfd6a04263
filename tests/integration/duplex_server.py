"""A TLS server that talks and listens at once, and changes its TLS keys all the time; run as a script.

Arguments: certificate file, key file. Prints its port. Each client message is "<sender>
<count> <payload>"; the server checks their order and content, and sends messages of its
own, "<count> <payload>", until it is told "end"; then it answers "total <messages>
<key updates>" or "wrong <what>". What the payload is, follows from the two numbers.
"""

from __future__ import annotations

import _ssl
import asyncio
import ctypes
import ssl
import sys
from typing import Any

from websockets.asyncio.server import ServerConnection, serve

KEY_UPDATE_EVERY = 20
SIZES = (200, 3, 5_000, 70_000, 200, 17_000, 1_200_000, 900)


def payload(sender: int, count: int) -> bytes:
    """Return the payload of one message; it differs from the ones before."""
    word = b"%d.%d " % (sender, count)
    size = SIZES[(sender + count) % len(SIZES)]
    return (word * (size // len(word) + 1))[:size]


class Keys:
    """Asks OpenSSL to change the keys of a connection, which Python's ssl module has no way to."""

    def __init__(self, connection: ServerConnection) -> None:
        tls: Any = connection.transport.get_extra_info("ssl_object")
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        # CPython's _ssl._SSLSocket: object header (two words), socket, SSL*.
        self._pointer = ctypes.c_void_p.from_address(id(tls._sslobj) + 3 * ctypes.sizeof(ctypes.c_void_p))
        self._update = library.SSL_key_update
        self._update.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.SSL_version.argtypes = [ctypes.c_void_p]
        assert library.SSL_version(self._pointer) == 0x0304, "not TLS 1.3"
        self._tls = tls
        self.updates = 0

    def update(self) -> None:
        """Change this side's keys with the next message; every other time ask the peer to do so too."""
        self.updates += self._update(self._pointer, self.updates % 2)


async def talk(connection: ServerConnection, keys: Keys) -> None:
    """Send until cancelled."""
    count = 0
    while True:
        if count % KEY_UPDATE_EVERY == 0:
            keys.update()
        await connection.send((b"%d " % count + payload(99, count)).decode())
        count += 1
        await asyncio.sleep(0)


async def handle(connection: ServerConnection) -> None:
    """Talk and listen to one client."""
    keys = Keys(connection)
    talking = asyncio.create_task(talk(connection, keys))
    expected: dict[int, int] = {}
    verdict = ""
    async for message in connection:
        assert isinstance(message, str)
        if message == "end":
            break
        sender, count, rest = message.encode().split(b" ", 2)
        if int(count) != expected.get(int(sender), 0) or rest != payload(int(sender), int(count)):
            verdict = verdict or f"wrong {message[:40]!r}, expected {expected.get(int(sender), 0)}"
        expected[int(sender)] = int(count) + 1
    talking.cancel()
    await asyncio.gather(talking, return_exceptions=True)
    await connection.send(verdict or f"total {sum(expected.values())} {keys.updates}")
    await connection.wait_closed()


async def main(certificate: str, key: str) -> None:
    """Serve until killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with serve(handle, "127.0.0.1", 0, ssl=context, max_size=None, compression=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
