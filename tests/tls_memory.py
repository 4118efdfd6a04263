"""TLS between two sides of one thread, over memory: no socket, no waiting.

For tests of certificates and of the settings of a worker service.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from wove_ws_sync._certificates import Authority, Pair

__all__ = ["Ends", "client_context", "handshake", "write_pair", "write_set"]


class Ends(NamedTuple):
    """Both ends after the handshake."""

    client: ssl.SSLObject
    server: ssl.SSLObject

    @property
    def serial(self) -> object:
        """Return the serial number of the certificate that the server showed."""
        return (self.client.getpeercert() or {})["serialNumber"]


def handshake(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    name: str = "localhost",
    session: ssl.SSLSession | None = None,
) -> Ends:
    """Do the handshake, and pass a byte each way when both have accepted it. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    open_ends = [one, other]
    while open_ends:
        for end in list(open_ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            open_ends.remove(end)
    for writer, reader in ((one, other), (other, one)):
        writer.write(b".")
        assert reader.read(1) == b"."  # brings the alert of a certificate that was refused late, and tickets
    return Ends(one, other)


def client_context(ca: Path, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Return the settings of a client as strict as Python 3.13 makes them, with a certificate or without."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


def write_pair(folder: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    """Write a certificate and its key; return both paths."""
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    for path, content in zip(paths, pair, strict=True):
        path.write_bytes(content)
    return paths


def write_set(folder: Path, authority: Authority, *, days: Mapping[str, float] | None = None) -> Path:
    """Write ca.pem and pairs for a server and a client, as the command ``certs`` does; return the folder."""
    folder.mkdir(exist_ok=True)
    valid = {"server": 90.0, "client": 90.0, **(days or {})}
    write_pair(folder, "ca", authority.pair)
    write_pair(folder, "server", authority.server(["localhost", "127.0.0.1"], valid["server"]))
    write_pair(folder, "client", authority.client("a host", valid["client"]))
    return folder
