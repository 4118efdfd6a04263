"""The upgrade of a connected wire to a WebSocket.

Owns: the request as it is sent, and the judgement on the response. Never: follows a
redirect, reads a response body, keeps or sends a cookie of the library's process-wide jar.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import websocket

from . import security
from ._address import check_headers
from ._retry_after import retry_after
from ._route import Witness, nobody, place, warn
from ._secrets import Headers
from ._wire import NotHTTP, Wire
from .errors import AuthenticationRejected, HandshakeRejected
from .options import LinkOptions

if TYPE_CHECKING:
    from ._proof import HostProof
    from ._seal import SealKeys

__all__ = ["Answer", "upgrade"]

_ACCEPT_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_INSTANCE = re.compile(r"[0-9a-f]{32}")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: .*)?")
_NO_JSON = (
    "cannot do without pickles: it did not agree to the extension json, which "
    "executor_config.result_format='json' needs. Use a worker service that has it "
    "(wove-ws-sync worker of a newer version), or leave result_format out."
)
_REMEDIES = {
    401: "Check executor_config.security: secret, key and clock must match the worker's.",
    403: "Check executor_config.security and what this host may do there.",
    404: "Check the path of executor_config.url.",
    429: "It takes no more connections for now; try again later, or share executors.",
    502: "The proxy before it does not reach it; check that it runs and where the proxy looks.",
    503: "It takes no connections for now; see whether it is stopping or starting, and try again later.",
    504: "The proxy before it got no answer; check that it runs and is not stuck.",
}
_ELSE = "Check that executor_config.url is that of a worker service; 'wove-ws-sync check' says more."


class Answer(NamedTuple):
    """What the worker service said of itself: the extensions it agreed to (None if it does not know
    of any), the largest message it accepts (None if it did not say), which instance it is ("" likewise)
    and which runs it can stop (None likewise). The keys seal every message; None: none is sealed.
    """

    features: frozenset[str] | None
    max_message_bytes: int | None
    worker: str = ""
    cancels: frozenset[str] | None = None
    keys: SealKeys | None = None


def upgrade(
    wire: Wire, options: LinkOptions, headers: Mapping[str, str], witness: Witness = nobody
) -> Answer:
    """Do the opening handshake, and have the worker service prove itself if it can.

    Raises HandshakeRejected for every answer but a valid upgrade with a valid proof, and what the
    wire raises.
    """
    if websocket.isEnabledForTrace():
        warn("websocket.enableTrace(True) was called: what passes through websocket-client is logged")
    key = base64.b64encode(os.urandom(16)).decode()
    proof = security.host_proof(options, headers)
    headers = Headers(headers if proof is None else proof.headers)
    check_headers(headers)
    seam = _Seam(wire, options, headers, key, witness)
    ws = websocket.WebSocket(enable_multithread=False, skip_utf8_validation=True)
    try:
        ws.connect(  # type: ignore[no-untyped-call]
            f"ws://{place(options)}/",  # what matters of it the seam puts in
            socket=seam,
            host=_host_header(options),
            header={"Sec-WebSocket-Key": key},
            timeout=options.open_timeout,
            redirect_limit=0,
            suppress_origin=True,
        )
    except websocket.WebSocketTimeoutException:
        raise TimeoutError("timed out during opening handshake") from None
    except websocket.WebSocketException:
        # The library's own text may hold headers.
        raise seam.invalid("the upgrade headers are missing or wrong") from None
    limit = seam.response.get("x-wove-max-message", "")
    readable = limit.isascii() and limit.isdigit() and len(limit) < 20
    worker = seam.response.get("x-wove-worker", "")
    worker = worker if _INSTANCE.fullmatch(worker) else ""
    features = _features(seam.response.get("x-wove-sync", ""))
    offered = _features(headers.get("X-Wove-Sync", "")) or frozenset()
    if features is not None:
        features &= offered
        if not worker:
            features -= {"resume"}  # nobody could tell whether it is the one from before
    cancels = seam.response.get("x-wove-cancels")
    stoppable = None if cancels is None else frozenset(name.strip() for name in cancels.split(","))
    keys = _judge_proof(proof, seam, options, sealed=features is not None and "seal" in features)
    if options.result_format == "json" and "json" not in (features or ()):
        raise seam.rejected(101, _NO_JSON)
    return Answer(features, int(limit) if readable else None, worker, stoppable, keys)


def _judge_proof(
    proof: HostProof | None, seam: _Seam, options: LinkOptions, *, sealed: bool
) -> SealKeys | None:
    """Return the keys of a connection that is sealed; refuse a worker service that should prove itself."""
    fault = "it proves nothing"
    try:
        keys = None if proof is None else proof.judge(seam.response)
    except ValueError as exc:
        keys, must = None, True
        fault = str(exc)
    else:
        must = options.worker_auth == "require" or sealed
    if keys is None and must:
        raise seam.rejected(
            101,
            f"did not prove that it has the key of executor_config.security: {fault}. Check that the key "
            "is the same on both sides, and what is between them: it may have changed the handshake.",
        )
    if options.seal == "require" and not sealed:
        raise seam.rejected(
            101,
            "does not seal messages, and executor_config.seal is 'require'. Use a worker service of this "
            "package with the same key, and check what is between: it may have changed the handshake.",
        )
    return keys if sealed else None


def _features(field: str) -> frozenset[str] | None:
    """Return the extensions that an X-Wove-Sync header lists; None for another version or no header."""
    version, _, parameters = field.partition(";")
    if version.strip() != "1":
        return None
    name, _, value = parameters.partition("=")
    listed = value.split(",") if name.strip() == "f" else []
    return frozenset(item.strip() for item in listed if item.strip())


def _host_header(options: LinkOptions) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return host if options.port == (443 if options.secure else 80) else f"{host}:{options.port}"


class _Seam:
    """The socket that websocket-client sees while it shakes hands.

    On the way out it puts in what the library must not touch: the exact target (the
    library drops some of it) and the headers with secrets (its trace would log them), and
    takes out the cookies of other connections. On the way in it judges the response first
    and shows the library only the lines it checks.
    """

    def __init__(
        self, wire: Wire, options: LinkOptions, headers: Mapping[str, str], key: str, witness: Witness
    ) -> None:
        self._witness = witness
        self.response: dict[str, str] = {}
        self._wire = wire
        self._place = place(options)
        self._request_line = f"GET {options.target} HTTP/1.1\r\n".encode("latin-1")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        self._accept = base64.b64encode(hashlib.sha1((key + _ACCEPT_GUID).encode()).digest()).decode()
        self._answer = b""

    def send(self, data: bytes) -> int:
        """Send the library's request with our target and headers."""
        lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]
        kept = [line + b"\r\n" for line in lines if not line.startswith(b"Cookie:")]
        # A view: the traceback of a send that fails must not show what the variable holds.
        self._wire.send(memoryview(b"".join([self._request_line, *kept, self._headers, b"\r\n"])))
        return len(data)

    def recv(self, size: int) -> bytes:
        """Return the next bytes of the part of the response that the library checks."""
        if not self._answer:
            self._answer = self._judge()
        piece, self._answer = self._answer[:size], self._answer[size:]
        return piece

    def _judge(self) -> bytes:
        try:
            head = self._wire.read_head()
        except NotHTTP as exc:
            raise self.rejected(None, f"did not answer the handshake properly: {exc}.") from None
        status_line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        fields = [line.partition(b":") for line in lines]
        if match is None or not all(colon and name.strip() == name != b"" for name, colon, _ in fields):
            raise self.rejected(None, "did not answer the handshake properly: malformed headers.")
        for name, _, value in fields:
            lower, text = name.decode("latin-1").lower(), value.strip().decode("latin-1")
            self.response[lower] = f"{self.response[lower]}, {text}" if lower in self.response else text
        self._witness("answer", (int(match[1]), dict(self.response)))
        if match[1] != b"101":
            raise self._refusal(int(match[1]))
        for unasked in ("sec-websocket-extensions", "sec-websocket-protocol"):
            if unasked in self.response:
                raise self.invalid(f"it has a {unasked} header, which was not asked for")
        # The library compares without regard to case; RFC 6455, 4.1 does not.
        if self.response.get("sec-websocket-accept") != self._accept:
            raise self.invalid("its Sec-WebSocket-Accept does not fit the request")
        checked = (b"upgrade", b"connection", b"sec-websocket-accept")
        shown = [line for line, (name, _, _) in zip(lines, fields, strict=True) if name.lower() in checked]
        return b"\r\n".join([b"HTTP/1.1 101 Switching Protocols", *shown, b"", b""])

    def _refusal(self, status: int) -> HandshakeRejected:
        remedy = _REMEDIES.get(status, _ELSE)
        if 300 <= status < 400:
            remedy = "Redirects are not followed; set executor_config.url to the final address."
        text = f"rejected the handshake with HTTP {status}. {remedy}"
        return self.rejected(status, text, retry_after(self.response))

    def invalid(self, fault: str) -> HandshakeRejected:
        """Return the error for a 101 that is no valid upgrade."""
        return self.rejected(101, f"answered the handshake with an invalid upgrade: {fault}.")

    def rejected(self, status: int | None, text: str, retry_after: float | None = None) -> HandshakeRejected:
        """Return the error for an answer that is not accepted."""
        kind = AuthenticationRejected if status in (401, 403) else HandshakeRejected
        return kind(f"The worker service at {self._place} {text}", status=status, retry_after=retry_after)

    def gettimeout(self) -> None:
        """Return None: the wire keeps the deadline."""

    def settimeout(self, timeout: Any) -> None:
        """Ignore the library's timeout."""

    def fileno(self) -> int:
        """Return the wire's descriptor."""
        return self._wire.fileno()

    def shutdown(self, how: int = 0) -> None:
        """Leave the wire alone: it belongs to the dial."""

    def close(self) -> None:
        """Leave the wire alone: it belongs to the dial."""
