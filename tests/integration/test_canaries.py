"""Planted secrets, arguments and results are searched wherever something is told: they are in none of it.

Where a canary may be found, on purpose: ``LinkOptions.url`` and ``.target`` hold the query of the URL;
``reveal()`` of a holder, ``SecurityConfig.value`` and ``dict()`` of the headers return what is asked
for; a traceback with local variables shows what the caller passed in (the configuration, the
arguments of ``submit``) in the frames that it was passed through, and what a host sent as headers in
those of the worker that judge them; the status page shows the errors of tasks, which are theirs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import gc
import json
import logging
import os
import pickle
import re
import socket
import ssl
import threading
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import trustme
import websocket
import wove
from fault_helpers import WAIT, link_of, python, until
from fuzz_targets import Headers as WireHeaders
from service_thread import ServiceThread, fetch
from ws_peer import TEXT, Listener, Peer, frame

import wove_ws_sync
from wove_ws_sync import WebSocketExecutor, security
from wove_ws_sync._handshake import upgrade
from wove_ws_sync._route import _tunnel
from wove_ws_sync._secrets import Headers, Secret
from wove_ws_sync._wire import Wire
from wove_ws_sync.cli import main
from wove_ws_sync.timing import Clock, Deadline
from wove_ws_sync.worker.auth import Authenticator

SECRET, TOKEN, PASSWORD = "Zq7secretKfW2xLp", "Hv3bearerYtR9mNs", "Gd5proxyUjB8wQe"
HEADER, QUERY = "Xc4headerMkT6zVr", "Bn2queryPlS1hJy"
ARGUMENT, RESULT = "Rw8argumentDfG3kC", "Lm6resultOiU4tXa"
SECRETS = (SECRET, TOKEN, PASSWORD, HEADER, QUERY)
CANARIES = (*SECRETS, ARGUMENT, RESULT)

SIGNED = {"type": "signed", "secret": SECRET, "key": "team"}
BEARER = {"type": "bearer", "token": TOKEN}

# What a running task waits for; the service runs in this process.
GATE, BEGUN = threading.Event(), threading.Event()


def forms(canary: str) -> Iterator[str]:
    """Yield how *canary* looks as it is, in hexadecimal digits and in base64, wherever it begins there."""
    raw = canary.encode()
    yield canary
    yield raw.hex()
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + raw)
        # The characters that neither what is before it nor what is behind has a part in.
        yield encoded[-(-offset * 8 // 6) : (offset + len(raw)) * 8 // 6].decode()


FORMS = {form: canary for canary in CANARIES for form in forms(canary)}
PATTERN = re.compile("|".join(re.escape(form) for form in FORMS))


def found(*texts: object) -> set[str]:
    """Return the canaries that are in *texts*."""
    whole = "\n".join(text.decode("latin-1") if isinstance(text, bytes) else str(text) for text in texts)
    return {FORMS[match] for match in PATTERN.findall(whole) + PATTERN.findall(urllib.parse.unquote(whole))}


def test_the_search_finds() -> None:
    """The canaries are found in each form in which they could get out."""
    for canary in CANARIES:
        for prefix in ("", "x", "xy", "xyz"):
            assert found(base64.b64encode(f"{prefix}{canary}{prefix}".encode())) == {canary}
            assert found(base64.b64encode(pickle.dumps([prefix, canary]))) == {canary}
        assert found(f"a {canary}!") == found(canary.encode().hex()) == {canary}
        assert found(repr([canary]), "x") == {canary}


def told(error: BaseException | None, *, whose: str = "wove_ws_sync") -> str:
    """Return all that can be told of *error* and what is behind it, local variables of our frames included.

    Frames of the tests are left out: they plant the canaries.
    """
    parts = []
    while error is not None:
        parts += [repr(error), str(error), repr(vars(error)), repr(error.args)]
        parts += traceback.format_exception(error)
        # One at a time, as a chain would be told without the choice of frames.
        stack = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), capture_locals=True)
        parts += [repr((entry.name, entry.locals)) for entry in stack if "/tests/" not in entry.filename]
        with contextlib.suppress(Exception):
            parts.append(pickle.dumps(error).decode("latin-1"))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


@pytest.fixture(autouse=True)
def records() -> Iterator[list[logging.LogRecord]]:
    """Take every record of every logger, whatever its level is."""
    taken: list[logging.LogRecord] = []

    class Taker(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            taken.append(record)

    root, handler = logging.getLogger(), Taker(logging.NOTSET)
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    websocket._logging._logger.setLevel(logging.NOTSET)
    yield taken
    root.removeHandler(handler)
    root.setLevel(before)
    formatter = logging.Formatter("%(name)s %(message)s")
    for record in taken:
        error = record.exc_info[1] if record.exc_info else None
        assert not found(formatter.format(record), record.__dict__, told(error)), record


def our_objects() -> list[Any]:
    """Return every object of this process whose class is of this package, or knows secrets for it."""
    gc.collect()
    kinds = (wove.NetworkExecutorSecurity,)  # by type(): a proxy may say that it is another's, or fail to
    return [
        item
        for item in gc.get_objects()
        if str(type(item).__module__).partition(".")[0] == "wove_ws_sync" or issubclass(type(item), kinds)
    ]


def search_objects(least: set[str]) -> None:
    """Look at every object of ours; those named in *least* must be among them."""
    seen = set()
    for item in our_objects():
        name = type(item).__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not found(repr(item), str(item), f"{item}"), name
        seen.add(name)
        for dump in (pickle.dumps, cloudpickle.dumps):
            with contextlib.suppress(Exception):
                kept = found(dump(item)) & set(SECRETS)
                assert not kept or isinstance(item, wove.NetworkExecutorSecurity), name
    assert least <= seen, least - seen


def work(argument: str) -> str:
    """Wait for the test, then return the result's canary. Runs in the service."""
    assert argument == ARGUMENT
    BEGUN.set()
    assert GATE.wait(WAIT)
    return RESULT


@pytest.mark.parametrize("config", [SIGNED, BEARER], ids=["signed", "bearer"])
def test_a_day_without_trouble(config: dict[str, Any]) -> None:
    """Logs at DEBUG, asyncio's debug mode, every object while a run is under way, pages and pickles."""
    GATE.clear()
    BEGUN.clear()
    with ServiceThread(security=config) as service:
        service.loop.slow_callback_duration = 0.0  # every callback is told of
        service.loop.call_soon_threadsafe(service.loop.set_debug, True)
        url = f"{service.url}?token={QUERY}"
        with WebSocketExecutor(url, security=config, headers={"X-Api-Key": HEADER}) as pool:
            # The link keeps the message of a run that may have to be sent again.
            future = pool.with_options(delivery_orphan_policy="requeue").submit(work, ARGUMENT)
            assert BEGUN.wait(WAIT)
            search_objects(
                {
                    "WebSocketExecutor",
                    "RunFuture",
                    "Link",
                    "Session",
                    "Connection",
                    "WebSocketTransport",
                    "Wire",
                    "LinkOptions",
                    "SecurityConfig",
                    "Secret",
                    "Run",
                    "WorkerService",
                    "Authenticator",
                    "HostConnection",
                    "Dispatcher",
                }
            )
            GATE.set()
            assert future.result(WAIT) == RESULT
            assert not found(repr(future), str(future), repr(pool), repr(link_of(pool).stats()))
            search_objects({"RunFuture"})
            secret = base64.b64encode(f"x:{config.get('secret') or config.get('token')}".encode()).decode()
            for path in ("/", "/status.json", "/metrics", "/readyz"):
                answer = fetch(service.port, path, {"Authorization": f"Basic {secret}"})
                assert answer.status == 200
                assert not found(answer.body, answer.headers), path


def test_options_keep_to_themselves() -> None:
    """Copies, dictionaries and variables of the options hold holders, but for the query of the URL."""
    options = security.link_options(
        {
            "url": f"wss://h/wove?token={QUERY}",
            "security": SIGNED,
            "headers": {"X-Api-Key": HEADER},
            "proxy": f"http://me:{PASSWORD}@127.0.0.1:3128",
        }
    )
    for one in (options, copy.copy(options), copy.deepcopy(options), dataclasses.replace(options, port=81)):
        assert not found(repr(one), str(one), repr([one]))
    assert found(repr(dataclasses.asdict(options))) == {QUERY}
    assert found(repr(dataclasses.astuple(options))) == {QUERY}
    for dump in (pickle.dumps, cloudpickle.dumps):
        with pytest.raises(TypeError):
            dump(options)
    assert not found(repr(vars(security)))  # what is known of earlier configurations
    headers = security.handshake_headers(options)
    assert not found(repr(headers), repr(headers | {"X-Other": HEADER}), f"{headers}")
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(headers)


def test_a_secret_is_a_value() -> None:
    """It compares and hashes by its content, without showing it, and is not changed."""
    one = Secret(HEADER)
    assert one == Secret(HEADER) and hash(one) == hash(Secret(HEADER)) and one != Secret(HEADER + "x")
    assert one != HEADER and Secret("é\ud800") == Secret("é\ud800")
    assert copy.copy(one) is one and copy.deepcopy([one])[0] is one
    assert not found(repr(one), str(one), f"{one}", repr({one: one}), hash(one))
    assert one.reveal() == HEADER
    with pytest.raises(AttributeError, match="frozen"):
        one.text = "x"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(one)
    assert isinstance(Headers(a="b") | {"c": "d"}, Headers)


# What goes wrong


def answering(text: str) -> Callable[[Peer], None]:
    """Return a script that answers the request with *text*, canaries of its own included."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(text.encode())
        peer.drain()

    return script


def hanging_up(peer: Peer) -> None:
    """Read the request and be gone."""
    peer.read_request()


def resetting(peer: Peer) -> None:
    """Be gone without reading it."""
    peer.reset()


def lying(peer: Peer) -> None:
    """Answer each run with something that is no pickle, and has the result in it."""
    peer.upgrade("X-Wove-Sync: 1")
    while True:
        command = json.loads(peer.recv_message())
        if command["type"] == "run_task":
            text = base64.b64encode(b"\x80\x04\x8c\x10" + RESULT.encode() + b"\xff\xff").decode()
            event = {
                "type": "task_result",
                "run_id": command["run_id"],
                "task_id": "t",
                "result_pickle": text,
            }
            peer.send(frame(TEXT, json.dumps(event).encode()))


def breaking_off(peer: Peer) -> None:
    """Take a run and be gone."""
    peer.upgrade("X-Wove-Sync: 1")
    peer.recv_message()


def babbling(peer: Peer) -> None:
    """Send what is no JSON."""
    peer.upgrade("X-Wove-Sync: 1", behind=frame(TEXT, f"{{{RESULT}".encode()))
    peer.drain()


@pytest.mark.parametrize("credentials", [SIGNED, BEARER], ids=["signed", "bearer"])
@pytest.mark.parametrize(
    "script",
    [
        answering(f"HTTP/1.1 401 No\r\nX-Echo: {RESULT}\r\n\r\n{RESULT}"),
        answering(f"HTTP/1.1 503 No\r\nRetry-After: 0\r\n\r\n{RESULT}"),
        answering(f"HTTP/1.1 301 Moved\r\nLocation: ws://h/{RESULT}\r\n\r\n"),
        answering(f"HTTP/1.1 101 Yes\r\nSec-WebSocket-Accept: {RESULT}\r\n\r\n"),
        answering(f"{RESULT}\r\n\r\n"),
        answering(f"HTTP/1.1 200 {RESULT}\r\n {RESULT}\r\n\r\n"),
        hanging_up,
        resetting,
        lying,
        breaking_off,
        babbling,
    ],
    ids=["401", "503", "301", "101", "no http", "folded", "eof", "reset", "decode", "lost", "no json"],
)
def test_a_worker_that_misbehaves(script: Callable[[Peer], None], credentials: dict[str, Any]) -> None:
    """Whatever it answers, the error has nothing of what was sent in it, nor of the answer's body."""
    with (
        Listener(script) as listener,
        WebSocketExecutor(
            f"ws://127.0.0.1:{listener.port}/wove?token={QUERY}",
            security=credentials,
            headers={"X-Api-Key": HEADER},
        ) as pool,
    ):
        error = pool.submit(len, ARGUMENT).exception(WAIT)
        assert error is not None
        with pytest.raises(type(error)):
            raise error
        shown = told(error)
        search_objects({"Link"})
    assert not found(shown), shown
    assert "(" in shown and len(shown) > 500  # there was something to search


@pytest.mark.parametrize(
    "answer", ["HTTP/1.1 407 No\r\nX: y\r\n\r\n", "HTTP/1.1 403 No\r\n\r\n", "nonsense\r\n\r\n", ""]
)
def test_a_proxy_that_refuses(answer: str) -> None:
    """Its password went out, and nowhere else."""
    with Listener(answering(answer) if answer else hanging_up) as listener:
        proxy = f"http://me:{PASSWORD}@127.0.0.1:{listener.port}"
        with WebSocketExecutor("ws://127.0.0.1:1/wove", security=SIGNED, proxy=proxy) as pool:
            error = pool.submit(len, ARGUMENT).exception(WAIT)
            search_objects({"Link"})
    with pytest.raises(OSError):
        raise error  # type: ignore[misc]
    assert not found(told(error)), told(error)


def test_a_request_that_cannot_be_sent() -> None:
    """The frames of a failed send do not hold what was to be sent."""
    options = security.link_options(
        {
            "url": f"ws://127.0.0.1/wove?token={QUERY}",
            "security": BEARER,
            "headers": {"X-Api-Key": HEADER},
            "proxy": f"http://me:{PASSWORD}@127.0.0.1:3128",
        }
    )
    assert options.proxy is not None
    headers = security.handshake_headers(options)
    ours, theirs = socket.socketpair()
    theirs.close()
    wire = Wire(ours, Clock(), Deadline())
    for send in (lambda: upgrade(wire, options, headers), lambda: _tunnel(wire, options, options.proxy)):
        with pytest.raises(OSError, match="pipe") as caught:
            send()  # type: ignore[no-untyped-call]
        assert not found(told(caught.value)), told(caught.value)
    wire.close()


def test_a_certificate_that_is_refused() -> None:
    """So do names and keys of TLS: the error names the certificate's fault."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with ServiceThread(security=SIGNED, ssl_context=context) as service:
        url = f"{service.url}?token={QUERY}"
        with WebSocketExecutor(url, security=SIGNED, headers={"X-Api-Key": HEADER}) as pool:
            error = pool.submit(len, ARGUMENT).exception(WAIT)
    assert isinstance(error, ssl.SSLCertVerificationError)
    assert not found(told(error)), told(error)


def test_a_worker_that_refuses(records: list[logging.LogRecord]) -> None:
    """The service's own log of a wrong secret, a replay and malformed credentials."""
    for config, wrong in ((SIGNED, {**SIGNED, "secret": HEADER * 2}), (BEARER, {**BEARER, "token": HEADER})):
        with ServiceThread(security=config) as service:
            with WebSocketExecutor(service.url, security=wrong) as pool:
                error = pool.submit(len, ARGUMENT).exception(WAIT)
                assert isinstance(error, PermissionError) and not found(told(error))
            until(lambda: any("401" in record.getMessage() for record in records))
        records_of_this = [record for record in records if "with 401" in record.getMessage()]
        assert records_of_this


@pytest.mark.parametrize("value", ["é", "\ud800", "v1=", "", "\0", "Bearer é", "v1=" + "é" * 64])
@pytest.mark.parametrize("config", [SIGNED, BEARER], ids=["signed", "bearer"])
def test_malformed_credentials_are_a_permission_error(config: dict[str, Any], value: str) -> None:
    """What compare_digest or an encoder would not take is refused like any other wrong credential."""
    authenticator = Authenticator(config)
    helper = wove.NetworkExecutorSecurity.from_config(config)
    right = helper.headers_for(transport="websocket", target="/wove", body=b"")
    for name in right:
        headers = {**right, name: value}
        with pytest.raises(PermissionError) as caught:
            authenticator.verify(WireHeaders(headers.items()), "/wove")
        assert not found(told(caught.value)), told(caught.value)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(authenticator)
    assert not authenticator.knows_secret([f"Bearer {value}"])


def test_a_replay_does_not_show_the_signature() -> None:
    """It was right, and would be for others."""
    helper = wove.NetworkExecutorSecurity.from_config(SIGNED)
    headers = helper.headers_for(transport="websocket", target="/wove", body=b"")
    authenticator = Authenticator(SIGNED)
    authenticator.verify(WireHeaders(headers.items()), "/wove")
    for target, why in (("/wove", "Replayed"), ("/other", "Invalid")):
        with pytest.raises(PermissionError, match=why) as caught:
            authenticator.verify(WireHeaders(headers.items()), target)
        assert headers["X-Wove-Signature"] not in told(caught.value)


def test_a_wrong_token_does_not_show_the_right_one() -> None:
    """Nor do the frames that compared the two."""
    authenticator = Authenticator(BEARER)
    with pytest.raises(PermissionError) as caught:
        authenticator.verify(WireHeaders([("Authorization", "Bearer x")]), "/wove")
    assert not found(told(caught.value))


def test_a_variable_that_became_wrong_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with a line break in it is refused at the dial, by frames that do not hold it."""
    monkeypatch.setenv("CANARY_TOKEN", "good")
    options = security.link_options(
        {"url": "ws://localhost", "security": {"type": "bearer", "token_env": "CANARY_TOKEN"}}
    )
    monkeypatch.setenv("CANARY_TOKEN", f"{TOKEN}\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="'Authorization'") as caught:
        security.handshake_headers(options)
    assert not found(told(caught.value)), told(caught.value)


def test_an_argument_that_cannot_be_pickled_is_in_no_log() -> None:
    """The error is the pickler's; what the other arguments were is in none of its text."""
    with ServiceThread(security=SIGNED) as service, WebSocketExecutor(service.url, security=SIGNED) as pool:
        error = pool.submit(print, ARGUMENT, threading.Lock()).exception(WAIT)
        assert isinstance(error, TypeError)
        assert not found(str(error), repr(error), *traceback.format_exception(error))


# The command line


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out + err


def test_check_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, remedies and JSON, when all is well and when it is not."""
    monkeypatch.setenv("CANARY_SECRET", SECRET)
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    with ServiceThread(security=SIGNED | {"key": "default"}) as service:
        url = f"{service.url}?token={QUERY}"
        common = ("--header", f"X-Api-Key: {HEADER}", "--timeout", "20")
        proxy = ("--proxy", f"http://me:{PASSWORD}@127.0.0.1:{service.port}")
        for arguments, expected in (
            ((url, "--security", "env:CANARY_SECRET"), 0),
            ((url, "--security", "env:CANARY_SECRET", "--json"), 0),
            ((url, "--security", "bearer-env:CANARY_TOKEN"), 14),
            ((url, "--security", "env:CANARY_SECRET", *proxy), 11),
            ((url, "--security", "env:CANARY_SECRET", *proxy, "--json"), 11),
            ((f"wss{service.url[2:]}?token={QUERY}", "--security", "env:CANARY_SECRET"), 12),
            ((url, "--security", SECRET), 2),
            ((url, "--proxy", f"ftp://me:{PASSWORD}@h"), 2),
            ((url, SECRET), 2),
        ):
            code, text = run_cli(capsys, "check", *arguments, *common)
            assert code == expected, text
            assert not found(text), text


def test_demo_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its secret is made for the occasion; this one is planted."""
    monkeypatch.setattr("wove_ws_sync.testing.secrets.token_urlsafe", lambda size: SECRET * 2)
    for arguments in ((), ("--json",)):
        code, text = run_cli(capsys, "demo", *arguments)
        assert code == 0
        assert not found(text), text


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--security", SECRET], 2),
        (["--security", "env:CANARY", "--tls-cert", "/nowhere", "--tls-key", "/nowhere"], 12),
        (["--security", "env:CANARY", "--print-config"], 0),
        (["--security", "env:CANARY", "--engine", "nonsense"], 2),
        (["--security", "env:CANARY", "--host", "192.0.2.1", "--insecure"], 10),
        (["--nonce-store", f"redis://me:{PASSWORD}@h:1/0"], 2),
        (["--security", "env:CANARY", "--nonce-store", "redis:env:CANARY_URL"], 14),
    ],
)
def test_a_worker_that_cannot_start_shows_nothing(arguments: list[str], status: int) -> None:
    """Nor its --print-config: neither secrets of the environment nor those that should not be here."""
    env = {"CANARY": SECRET, "CANARY_URL": f"redis://me:{PASSWORD}@127.0.0.1:1/0"}
    code = "from wove_ws_sync.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    out, err, ended = python(code, "worker", "--port", "0", "--log-level", "debug", *arguments, env=env)
    assert ended == status, err
    assert not found(out, err), out + err


# What the environment may turn on


def test_f43_keys_of_tls_in_a_file_are_warned_of_by_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    """A context that SSLKEYLOGFILE has told to write them is named in the log at the start."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with ServiceThread(security=SIGNED, ssl_context=context):
        pass
    assert [record.levelname for record in records if "SSLKEYLOGFILE" in record.getMessage()] == ["WARNING"]
    monkeypatch.delenv("SSLKEYLOGFILE")
    before = len(records)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with ServiceThread(security=SIGNED, ssl_context=context):
        pass
    assert not [record for record in records[before:] if "SSLKEYLOGFILE" in record.getMessage()]


def test_f43_the_worker_command_writes_no_keys(tmp_path: Path) -> None:
    """Whatever SSLKEYLOGFILE says."""
    from wove_ws_sync.testing import LoopbackWorker

    env = {"SSLKEYLOGFILE": str(tmp_path / "keys")}
    with LoopbackWorker(tls=True, workers=1, env=env) as worker, WebSocketExecutor(**worker.config) as pool:
        assert pool.submit(divmod, 7, 3).result(WAIT) == (2, 1)
    assert not (tmp_path / "keys").exists() or not (tmp_path / "keys").read_text()


def test_asyncio_run_in_debug_mode_shows_nothing() -> None:
    """The shim, driven by Wove on a loop that tells of every callback."""

    async def use(url: str) -> Any:
        asyncio.get_running_loop().slow_callback_duration = 0.0
        executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
        config = {"url": f"{url}?token={QUERY}", "security": SIGNED, "headers": {"X-Api-Key": HEADER}}
        await executor.start(environment_name="e", environment_config=config, run_config={})
        try:
            await executor.send(
                {
                    "type": "run_task",
                    "run_id": "r",
                    "task_id": "t",
                    "callable": str.upper,
                    "args": {},
                    "delivery": {},
                }
            )
            while (event := await executor.recv())["type"] not in ("task_result", "task_error"):
                pass
            search_objects({"AsyncWebSocketEnvironmentExecutor"})
            return event
        finally:
            await executor.stop()

    with ServiceThread(security=SIGNED) as service:
        event = asyncio.run(use(service.url), debug=True)
    assert event["run_id"] == "r"


def test_no_canary_is_left_in_the_environment() -> None:
    """The tests above clean up, or a later one would find what it did not plant."""
    assert not found(repr(dict(os.environ)))
