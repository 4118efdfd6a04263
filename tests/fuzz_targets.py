"""What fuzzers throw bytes at: each target says by an assertion, or an unexpected error, what broke.

For hypothesis (``test_fuzz``) and for atheris (``fuzz/run.py``). A target may be called any number of
times in one process, and lets only those errors pass that its part of the package promises.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import pickle
import socket
from collections.abc import Callable, Iterable
from typing import Any

from wove_ws_sync import HandshakeRejected, _handshake, _seal, frames, payloads, security
from wove_ws_sync._wire import Wire
from wove_ws_sync.options import LinkOptions
from wove_ws_sync.timing import Clock, Deadline
from wove_ws_sync.transport import TransportClosed, WebSocketTransport
from wove_ws_sync.worker import commands
from wove_ws_sync.worker.auth import Authenticator
from wove_ws_sync.worker.greeting import SMALLEST_LIMIT, Greeting

SECRET = "pL4nted-secret-uG7"
LIMIT = 64 * 1024
_SEALED = b'{"type":"shutdown"}'
# Of no use to a peer: what is signed is over before anybody else could use it.
_KEY = bytes(16)
ACCEPT = base64.b64encode(
    hashlib.sha1((base64.b64encode(_KEY).decode() + _handshake._ACCEPT_GUID).encode()).digest()
).decode()

LOADED: list[str] = []


def load(tag: str) -> str:
    """Note that a pickle was loaded."""
    LOADED.append(tag)
    return tag


class Planted:
    """A value whose pickle tells when it is loaded."""

    def __reduce__(self) -> Any:
        return load, ("planted",)


PICKLE = base64.b64encode(pickle.dumps(Planted())).decode()

_OPTIONS = LinkOptions.from_config(
    {
        "url": "ws://127.0.0.1:1/wove",
        "security": {"secret": SECRET},
        "headers": {"X-Api-Key": SECRET},
        "max_message_bytes": LIMIT,
        "open_timeout": 30,
    }
)
_HEADERS = security.handshake_headers(_OPTIONS)


@contextlib.contextmanager
def _wire(data: bytes) -> Any:
    """Give a wire on which *data* has arrived, and then the end."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    wire = Wire(ours, Clock(), Deadline.after(30.0, Clock().monotonic()))
    try:
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.sendall(data[: 3 * LIMIT])
        theirs.shutdown(socket.SHUT_WR)
        yield wire
    finally:
        wire.close()
        theirs.close()


def _modest(error: Exception, length: int) -> None:
    """Fail if the text of *error* is long, or has the secret in it."""
    if SECRET in str(error) or len(str(error)) > length:
        raise AssertionError(f"an error says too much: {error}") from None


def response_head(data: bytes) -> None:
    """A host reads *data* as the answer to its handshake."""
    before, _handshake.os = _handshake.os, _Fixed  # type: ignore[assignment]
    try:
        with _wire(data) as wire:
            try:
                answer = _handshake.upgrade(wire, _OPTIONS, _HEADERS)
            except HandshakeRejected as exc:
                _modest(exc, 500)
                if not 0 <= (exc.retry_after or 0) <= 60:
                    raise AssertionError("a server may ask for a minute at most") from None
                return
            except OSError:
                return
            assert answer.features is None or answer.features <= set(frames.FEATURES) | {"seal", "json"}
            assert answer.max_message_bytes is None or answer.max_message_bytes >= 0
            assert ACCEPT.encode() in data
    finally:
        _handshake.os = before


class _Fixed:
    """The part of os that the handshake uses, without chance."""

    @staticmethod
    def urandom(count: int) -> bytes:
        return _KEY[:count]


def event_message(data: bytes) -> None:
    """A host reads *data* as a message; what is no answer of a task is not unpickled."""
    try:
        decoded = frames.decode(data)
    except frames.InvalidMessage as exc:
        _modest(exc, 200)
        return
    for event in decoded.events:
        assert event["type"] in frames.EVENTS | frames.EXTENDED_EVENTS | frames.NOTICES
        del LOADED[:]
        asked = dict(payloads._LOADED_FIELDS).get(event["type"], ())
        wanted = [field for field in asked if event.get(f"{field}_pickle") == PICKLE]
        plain = {key: value for key, value in event.items() if value == PICKLE or not key.endswith("_pickle")}
        shown = payloads.decode_event(plain)
        assert len(LOADED) <= len(wanted), event
        assert not any(key.endswith("_pickle") for key in shown)
        error = shown.get("exception")
        assert shown["type"] != "task_error" or isinstance(error, Exception)


def frame_stream(data: bytes) -> None:
    """A host reads *data* as WebSocket frames, to the end; no message is larger than it allows."""
    with _wire(data) as wire:
        transport = WebSocketTransport(wire, _handshake.Answer(None, None), _OPTIONS, Clock())
        with contextlib.suppress(TransportClosed):
            while True:
                message = transport.recv()
                assert len(message) <= LIMIT
                event_message(bytes(message))
        transport.dispose()


def sealed_stream(data: bytes) -> None:
    """A host reads *data* as frames of a sealed connection: nobody without the keys gets a message in."""
    keys = _seal.derive_keys(b"host", b"this connection", of_host=True)
    answer = _handshake.Answer(frozenset({"seal"}), None, keys=keys)
    with _wire(data) as wire:
        transport = WebSocketTransport(wire, answer, _OPTIONS, Clock())
        with contextlib.suppress(TransportClosed):
            raise AssertionError(f"a message that nobody sealed was opened: {transport.recv()!r}")
        transport.dispose()


def sealed_message(data: bytes) -> None:
    """A worker opens *data*, or the right message with those bits flipped: only the right one opens."""
    right = _seal.derive_keys(b"both", b"this connection", of_host=True).outgoing.seal(_SEALED)
    for box in (data, bytes(one ^ other for one, other in itertools.zip_longest(right, data, fillvalue=0))):
        way = _seal.derive_keys(b"both", b"this connection", of_host=False).incoming
        try:
            assert way.open(box) == _SEALED and box == right
        except _seal.BrokenSeal:
            assert box != right


def command_message(data: bytes) -> None:
    """A worker reads *data* as a command; nothing is unpickled by that."""
    del LOADED[:]
    try:
        command = commands.read(data)
    except frames.InvalidMessage as exc:
        _modest(exc, 200)
        return
    assert not LOADED
    if isinstance(command, commands.RunTask):
        assert command.run_id and isinstance(command.callable_pickle, str) and PICKLE not in repr(command)
        assert command.beat_interval is None or command.beat_interval > 0
        assert command.cancel_mode in ("best_effort", "require_ack")
    assert len(repr(command)) < 10 * len(data) + 500


class Headers:
    """What *pairs* say, unchecked: whatever a server lets through, this does."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = list(pairs)

    def get_all(self, key: str) -> list[str]:
        return [value for name, value in self._pairs if name.lower() == key.lower()]

    def raw_items(self) -> Iterable[tuple[str, str]]:
        return iter(self._pairs)


def headers_of(data: bytes) -> Headers:
    """Return what *data* says as headers: lines of ``name: value``, as a server reads them."""
    parts = (line.partition(":") for line in data.decode("utf-8", "surrogateescape").split("\n"))
    return Headers((name.strip(), value.strip()) for name, _, value in parts)


def greeting(data: bytes) -> None:
    """A worker reads *data* as the headers of a host, and answers."""
    found = Greeting.read(headers_of(data).get_all, seals=True)
    assert found.limit >= SMALLEST_LIMIT and 0.0 <= found.window <= 3600.0
    for name, value in found.answer("0" * 32, LIMIT, {"async"}).items():
        assert f"{name}: {value}".isascii() and f"{name}: {value}".isprintable()


_AUTHENTICATORS = (
    Authenticator({"secret": SECRET}),
    Authenticator({"keys": [{"key": "a", "secret": SECRET}, {"key": "default", "secret": SECRET}]}),
    Authenticator({"type": "bearer", "token": SECRET}),
)


def credentials(data: bytes) -> None:
    """A worker reads *data* as the credentials of a stranger, who has none."""
    given = headers_of(data)
    for authenticator in _AUTHENTICATORS:
        try:
            authenticator.verify(given, "/wove")
        except PermissionError as exc:
            _modest(exc, 500)
        else:
            assert SECRET.encode() in data, "somebody without the secret got in"
        known = authenticator.knows_secret(given.get_all("Authorization"))
        assert not known or SECRET.encode() in _decoded(data)


def _decoded(data: bytes) -> bytes:
    """Return *data* with each word of it as base64 says it is, too."""
    words = [data]
    for word in data.split():
        with contextlib.suppress(ValueError):
            words.append(base64.b64decode(word))
    return b"\n".join(words)


#: Options whose value may be a secret; a text of any other is shown in a refusal, so that one sees it.
MAY_BE_SECRET = frozenset({"url", "security", "headers", "proxy"})


def without_shown(config: dict[str, Any]) -> dict[str, Any]:
    """Return *config* without texts that have the secret where none belongs."""
    return {
        key: value
        for key, value in config.items()
        if SECRET not in key
        and (key in MAY_BE_SECRET or isinstance(value, dict) or SECRET not in repr(value))
    }


def options_of(config: Any) -> None:
    """A host is configured with *config*; a refusal shows no secret of it."""
    for build in (LinkOptions.from_config, security.link_options):
        try:
            options = build(config)
        except (TypeError, ValueError, RuntimeError) as exc:
            error: BaseException | None = exc
            while error is not None:
                assert SECRET not in f"{error!r} {error}", error
                error = error.__cause__ or error.__context__
        else:
            assert SECRET not in f"{options!r} {options}"
            hash(options)


def configuration(data: bytes) -> None:
    """A host is configured with the JSON in *data*, the secret in some of its values."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return
    options_of(without_shown(config) if isinstance(config, dict) else config)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        response_head,
        event_message,
        frame_stream,
        sealed_stream,
        sealed_message,
        command_message,
        greeting,
        credentials,
        configuration,
    )
}
