"""OAuth 2.0 on the host: what a configuration may say, one fetch for everybody, and what a refusal means.

``responses`` plays the token endpoint; what takes time or socket is in integration/test_oauth2.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import copy
import os
import pickle
import socket
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import responses

from wove_ws_sync import _oauth2, errors, security
from wove_ws_sync._oauth2 import TokenSource
from wove_ws_sync._reconnect import is_final
from wove_ws_sync._security_config import SecurityConfig
from wove_ws_sync.options import LinkOptions

URL = "https://login.example/oauth/token"
CANARY = "cAnArY-5ecret-0123456789"
TOKEN = "t0ken.cAnArY-abc_def~+/=="
CONFIG = {"type": "oauth2", "token_url": URL, "client_id": "billing", "client_secret": CANARY}
PATIENCE = 30.0


def shown(error: BaseException | None) -> str:
    """Return all that a log or a traceback could show of *error* and of what is behind it."""
    texts = []
    while error is not None:
        texts += [repr(error), str(error), *traceback.format_exception(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def refusal(changes: dict[str, Any], **options: Any) -> Exception:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        security.link_options({"url": "wss://w.example", "security": {**CONFIG, **changes}, **options})
    assert CANARY not in shown(caught.value)
    return caught.value


class Clock:
    """Time that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def source(clock: Clock | None = None, **changes: Any) -> TokenSource:
    return TokenSource(SecurityConfig({**CONFIG, **changes}), None, clock or Clock())


@pytest.fixture
def endpoint() -> Iterator[responses.RequestsMock]:
    """A token endpoint that says what a test tells it to, and nothing else."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture(autouse=True)
def no_sources() -> Iterator[None]:
    """No token of a test is there in another."""
    _oauth2._sources.clear()
    security._known.clear()
    yield
    _oauth2._sources.clear()


def grant(endpoint: responses.RequestsMock, token: Any = TOKEN, **fields: Any) -> None:
    document = {"access_token": token, "token_type": "Bearer", "expires_in": 3600, **fields}
    endpoint.post(URL, json={key: value for key, value in document.items() if value is not ...})


def failure(endpoint: responses.RequestsMock, **answer: Any) -> Exception:
    """Return the error that an answer of the endpoint comes to."""
    endpoint.post(URL, **answer)
    with pytest.raises(Exception) as caught:
        source().token(PATIENCE)
    assert CANARY not in shown(caught.value)
    return caught.value


# The configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_uri": "x"}, "no key 'token_uri'. Did you mean 'token_url'?"),
        ({"clientid": "x"}, "Did you mean 'client_id'?"),
        ({"token_url": None}, "needs 'token_url'"),
        ({"client_id": None}, "needs 'client_id'"),
        ({"client_id": ""}, "client_id must be text that is not empty"),
        ({"client_id": 7}, "client_id must be text"),
        ({"client_secret": None}, "no client secret"),
        ({"client_secret": ""}, "client_secret must be text that is not empty"),
        ({"client_secret": "\ud800"}, "valid Unicode"),
        ({"client_secret": b"bytes"}, "client_secret must be text"),
        ({"client_secret_env": "X"}, "has 'client_secret' and 'client_secret_env'; give one of"),
        ({"client_secret_file": "x"}, "has 'client_secret' and 'client_secret_file'"),
        ({"scope": "a  b"}, "one space"),
        ({"scope": 'a"b'}, "scope"),
        ({"audience": ""}, "audience"),
        ({"auth_method": "private_key_jwt"}, "'client_secret_basic' or 'client_secret_post'"),
        ({"leeway": -1}, "leeway"),
        ({"leeway": "5"}, "leeway"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"ca_file": ""}, "ca_file"),
        ({"token_url": "login.example"}, "must be an https:// or http:// URL"),
        ({"token_url": "wss://login.example"}, "must be an https:// or http:// URL"),
        ({"token_url": 5}, "must be an https:// or http:// URL"),
        ({"token_url": f"https://{CANARY}@login.example/"}, "user name or password"),
        ({"token_url": "https://login.example/#x"}, "fragment"),
        ({"token_url": "https://login.example\\@localhost/"}, "backslash"),
        ({"token_url": "http://login.example/token"}, "https://"),
        ({"token_url": "http://localhost.example/token"}, "https://"),
        ({"token_url": "http://127.1/token"}, "https://"),
        ({"token_url": "http://0.0.0.0/token"}, "https://"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    """The error names the key and the remedy, and never the secret."""
    assert words in str(refusal(changes))


@pytest.mark.parametrize(
    ("token_url", "insecure"),
    [
        (URL, False),
        ("http://localhost:8080/token", False),
        ("http://127.0.0.2/token", False),
        ("http://[::1]/token", False),
        ("http://login.example/token", True),
    ],
)
def test_plain_text_is_for_this_machine(token_url: str, insecure: bool) -> None:
    """http:// is accepted on loopback, or with insecure=True."""
    config = {"url": "wss://w.example", "security": {**CONFIG, "token_url": token_url}, "insecure": insecure}
    assert security.link_options(config).security.mode == "oauth2"


def test_checking_fetches_nothing(endpoint: responses.RequestsMock) -> None:
    """A configuration is checked without a connection."""
    security.link_options({"url": "wss://w.example", "security": CONFIG})
    assert len(endpoint.calls) == 0


def test_a_worker_beyond_loopback_needs_tls_all_the_same() -> None:
    """A token must not be sent in the clear."""
    with pytest.raises(ValueError, match="insecure network transport"):
        security.link_options({"url": "ws://w.example", "security": CONFIG})


def test_a_header_beside_the_token_is_refused() -> None:
    """As with a bearer token."""
    assert "keep one of the two" in str(refusal({}, headers={"authorization": "x"}))


def test_a_variable_that_is_not_set_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Wove's words, when the configuration is read."""
    changes = {"client_secret": None, "client_secret_env": "WOVE_WS_SYNC_UNSET"}
    monkeypatch.delenv("WOVE_WS_SYNC_UNSET", raising=False)
    error = refusal(changes)
    assert type(error) is RuntimeError
    assert str(error).endswith("environment variable 'WOVE_WS_SYNC_UNSET' is not set.")
    monkeypatch.setenv("WOVE_WS_SYNC_UNSET", CANARY)
    security.link_options({"url": "wss://w.example", "security": {**CONFIG, **changes}})


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, "requests", None)
    assert 'pip install "wove_ws_sync[oauth2]"' in str(refusal({}))


def test_equal_configurations_share_a_link() -> None:
    """The order of keys, defaults written out and the form of the URL make no difference; a secret does."""
    one = LinkOptions.from_config({"url": "ws://localhost", "security": CONFIG})
    same = {"client_secret": CANARY, "scope": None, "auth_method": "client_secret_basic", **CONFIG}
    same["token_url"] = "HTTPS://Login.Example:443/oauth/token"
    other = LinkOptions.from_config({"url": "ws://localhost", "security": same})
    assert one == other and hash(one) == hash(other)
    assert one != LinkOptions.from_config(
        {"url": "ws://localhost", "security": {**CONFIG, "client_secret": CANARY + "x"}}
    )


def test_nothing_prints_or_pickles_a_secret(endpoint: responses.RequestsMock) -> None:
    """Not the holder, nor the source of the tokens, nor the token."""
    grant(endpoint)
    holder = SecurityConfig(CONFIG)
    tokens = source()
    tokens.token(PATIENCE)
    for thing in (holder, tokens, tokens._token):
        assert CANARY not in repr(thing) and TOKEN not in repr(thing)
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    assert copy.deepcopy(holder) is holder


# The request


def test_the_request_is_that_of_the_rfc(endpoint: responses.RequestsMock) -> None:
    """Credentials are encoded as in a form, and then as Basic."""
    grant(endpoint)
    tokens = source(client_id="a b", client_secret="p:w/+ä", scope="runs.write runs.read", audience="workers")
    assert tokens.token(PATIENCE) == TOKEN
    [call] = endpoint.calls
    assert dict(urllib.parse.parse_qsl(call.request.body)) == {
        "grant_type": "client_credentials",
        "scope": "runs.write runs.read",
        "audience": "workers",
    }
    scheme, _, pair = call.request.headers["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(pair)) == ("Basic", b"a+b:p%3Aw%2F%2B%C3%A4")


def test_credentials_in_the_form(endpoint: responses.RequestsMock) -> None:
    """client_secret_post sends no Authorization header."""
    grant(endpoint)
    source(auth_method="client_secret_post").token(PATIENCE)
    [call] = endpoint.calls
    assert dict(urllib.parse.parse_qsl(call.request.body)) == {
        "grant_type": "client_credentials",
        "client_id": "billing",
        "client_secret": CANARY,
    }
    assert "Authorization" not in call.request.headers


def test_a_secret_that_is_rotated_is_read_anew(
    endpoint: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Variables and files are read at each fetch; the file's last line end is not the secret's."""
    grant(endpoint, expires_in=0)
    path = tmp_path / "secret"
    of_file = source(client_secret=None, client_secret_file=str(path), auth_method="client_secret_post")
    of_env = source(client_secret=None, client_secret_env="WOVE_WS_S", auth_method="client_secret_post")
    for secret in ("one", "two"):
        path.write_text(f"{secret}\n", encoding="utf-8")
        monkeypatch.setenv("WOVE_WS_S", secret)
        for tokens in (of_file, of_env):
            tokens.token(PATIENCE)
            sent = dict(urllib.parse.parse_qsl(endpoint.calls[-1].request.body))
            assert sent["client_secret"] == secret
    path.unlink()
    with pytest.raises(RuntimeError, match=r"client_secret_file .* cannot be read: No such file"):
        of_file.token(PATIENCE)


def test_the_handshake_carries_the_token(endpoint: responses.RequestsMock) -> None:
    """As a bearer token, with what else belongs there."""
    grant(endpoint)
    options = security.link_options(
        {"url": "wss://w.example", "security": CONFIG, "headers": {"X-Team": "a"}}
    )
    left, headers = security.ready_to_dial(options)
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["X-Team"] == "a" and headers["X-Wove-Sync"] == "1"
    assert 0 < left.open_timeout < options.open_timeout
    assert left.target == options.target and left.url == options.url


@pytest.mark.parametrize("mode", ["none", {"type": "bearer", "token": "x"}, {"secret": "x" * 16}])
def test_other_modes_are_as_they_were(mode: Any) -> None:
    """No time is taken off where no token is fetched."""
    options = security.link_options({"url": "ws://localhost", "security": mode})
    assert security.ready_to_dial(options)[0] is options


# The answer


@pytest.mark.parametrize("expires_in", [3600, 3600.5, "3600", 10**400, ...])
def test_lifetimes_that_are_understood(endpoint: responses.RequestsMock, expires_in: Any) -> None:
    """A number, its digits, or nothing: then a minute is assumed. It is fetched once meanwhile."""
    grant(endpoint, expires_in=expires_in, token_type="bEARER")
    clock = Clock()
    tokens = source(clock)
    assert tokens.token(PATIENCE) == tokens.token(PATIENCE) == TOKEN
    assert len(endpoint.calls) == 1
    clock.now += 61 if expires_in is ... else 3601
    tokens.token(PATIENCE)
    assert len(endpoint.calls) == (1 if expires_in == 10**400 else 2)


@pytest.mark.parametrize("expires_in", [-1, True, "soon", "-5", "1e3", [], float("nan"), float("inf"), "²"])
def test_lifetimes_that_are_not(endpoint: responses.RequestsMock, expires_in: Any) -> None:
    """What is no number of seconds makes the answer useless; nothing is guessed."""
    document = {"access_token": TOKEN, "token_type": "Bearer", "expires_in": expires_in}
    error = failure(endpoint, json=document)
    assert is_final(error) and "expires_in" in str(error) and TOKEN not in shown(error)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"<html>hello</html>", "not JSON with an access_token"),
        (b"[" * 60000, "not JSON with an access_token"),
        (b'["access_token"]', "not JSON with an access_token"),
        (b'{"access_token": 5, "token_type": "bearer"}', "not JSON with an access_token"),
        (b'{"access_token": "", "token_type": "bearer"}', "characters"),
        (b'{"access_token": "a b", "token_type": "bearer"}', "characters"),
        (b'{"access_token": "a\\r\\nX: y", "token_type": "bearer"}', "characters"),
        ('{"access_token": "ä", "token_type": "bearer"}'.encode(), "characters"),
        (b'{"access_token": "a=b", "token_type": "bearer"}', "characters"),
        (b'{"access_token": "abc"}', "token_type is not bearer"),
        (b'{"access_token": "abc", "token_type": "DPoP"}', "token_type is not bearer"),
        (b"\xff\xfe", "not JSON"),
        (b" " * 70000, "more than 65536 bytes"),
    ],
)
def test_answers_of_no_use(endpoint: responses.RequestsMock, document: bytes, words: str) -> None:
    """They are final, and say what is missing without the body."""
    error = failure(endpoint, body=document)
    assert type(error) is errors.AuthenticationRejected and is_final(error)
    assert words in str(error) and "hello" not in shown(error)


def test_a_compressed_answer_is_refused(endpoint: responses.RequestsMock) -> None:
    """What is unpacked has no bound."""
    error = failure(endpoint, body=b"x", headers={"Content-Encoding": "gzip"})
    assert "compressed" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (401, "invalid_client", "Check client_id, the client secret and auth_method."),
        (400, "invalid_client", "Check client_id, the client secret and auth_method."),
        (400, "invalid_scope", "Check scope"),
        (400, "unauthorized_client", "Allow this client"),
        (400, "unsupported_grant_type", "Allow the grant"),
        (400, "invalid_request", "Check scope, audience and auth_method."),
        (400, "invalid_target", "Check audience."),
        (403, "access_denied", "the log of the authorization server"),
        (418, "teapot (short)", "the log of the authorization server"),
    ],
)
def test_refusals_are_final(endpoint: responses.RequestsMock, status: int, code: str, remedy: str) -> None:
    """The error names the code and the remedy."""
    error = failure(endpoint, json={"error": code, "error_description": "private"}, status=status)
    assert type(error) is errors.AuthenticationRejected and is_final(error)
    assert error.status == status
    assert f"HTTP {status} ({code})" in str(error) and remedy in str(error)
    assert "at https://login.example " in str(error) and "private" not in shown(error)


BASIC = base64.b64encode(f"billing:{CANARY}".encode()).decode()


@pytest.mark.parametrize(
    "code", ["a\nb", 'say "x"', "x" * 65, "", "ä", 7, CANARY, f"no {CANARY}", CANARY[:9], BASIC, BASIC[5:30]]
)
def test_a_code_is_shown_only_if_it_is_one(endpoint: responses.RequestsMock, code: Any) -> None:
    """Neither what the RFC does not allow there, nor the secret sent back."""
    error = failure(endpoint, json={"error": code}, status=400)
    assert str(error).startswith("The token endpoint at https://login.example gave no token: HTTP 400. ")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(endpoint: responses.RequestsMock, status: int) -> None:
    """The secret goes nowhere else."""
    error = failure(endpoint, status=status, headers={"Location": "https://evil.example/"})
    assert is_final(error) and "Redirects are not followed" in str(error)
    assert len(endpoint.calls) == 1


@pytest.mark.parametrize(
    ("status", "retry_after", "seconds"),
    [
        (500, None, None),
        (503, "7", 7.0),
        (429, "3", 3.0),
        (502, "99999", 60.0),
        (408, None, None),
        (503, "soon", None),
    ],
)
def test_what_may_pass_is_tried_again(
    endpoint: responses.RequestsMock, status: int, retry_after: str | None, seconds: float | None
) -> None:
    """An overloaded endpoint costs a delay, as long as it asks for."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    error = failure(endpoint, status=status, headers=headers)
    assert type(error) is errors.HandshakeRejected and not is_final(error)
    assert (error.status, error.retry_after) == (status, seconds)


@pytest.mark.parametrize(
    ("cause", "kind", "final"),
    [
        (requests.ConnectionError("x"), ConnectionError, False),
        (requests.ConnectTimeout("x"), TimeoutError, False),
        (requests.ReadTimeout("x"), TimeoutError, False),
        (requests.exceptions.ChunkedEncodingError("x"), ConnectionError, False),
        (socket.gaierror(-2, "Name or service not known"), ConnectionError, False),
        (LookupError(CANARY), RuntimeError, True),
    ],
)
def test_what_does_not_answer(
    endpoint: responses.RequestsMock, cause: Exception, kind: type[Exception], final: bool
) -> None:
    """What may come back is worth another dial."""
    error = failure(endpoint, body=cause)
    assert type(error) is kind and is_final(error) is final


def test_an_endpoint_that_wants_a_pause_gets_it(endpoint: responses.RequestsMock) -> None:
    """Retry-After holds for all links of the process; then it is asked again."""
    endpoint.post(URL, status=503, headers={"Retry-After": "20"})
    clock = Clock()
    tokens = source(clock)
    for _ in range(3):
        with pytest.raises(errors.HandshakeRejected):
            tokens.token(PATIENCE)
    assert len(endpoint.calls) == 1
    clock.now += 20
    with pytest.raises(errors.HandshakeRejected):
        tokens.token(PATIENCE)
    assert len(endpoint.calls) == 2


# When it is fetched


@pytest.mark.parametrize(
    ("lifetime", "leeway", "lasts"),
    [(3600, None, 3540), (100, None, 90), (3600, 600, 3000), (3600, 0, 3600), (3600, 9999, 0)],
)
def test_a_token_is_renewed_early(
    endpoint: responses.RequestsMock, lifetime: float, leeway: float | None, lasts: float
) -> None:
    """When a minute, or a tenth of its lifetime, is left; or as it is configured."""
    grant(endpoint, expires_in=lifetime)
    clock = Clock()
    tokens = source(clock, leeway=leeway)
    tokens.token(PATIENCE)
    clock.now += max(0.0, lasts - 0.5)
    tokens.token(PATIENCE)
    assert len(endpoint.calls) == (1 if lasts else 2)
    clock.now += 1
    tokens.token(PATIENCE)
    assert len(endpoint.calls) == (2 if lasts else 3)


def test_the_old_token_serves_while_renewal_fails(endpoint: responses.RequestsMock) -> None:
    """Until it expires; the endpoint is left in peace between attempts."""
    grant(endpoint, expires_in=100)
    clock = Clock()
    tokens = source(clock)
    tokens.token(PATIENCE)
    endpoint.replace("POST", URL, status=500)
    clock.now += 91
    assert tokens.token(PATIENCE) == tokens.token(PATIENCE) == TOKEN
    assert len(endpoint.calls) == 2
    clock.now += 5
    assert tokens.token(PATIENCE) == TOKEN
    assert len(endpoint.calls) == 3
    clock.now += 5  # expired now
    with pytest.raises(errors.HandshakeRejected):
        tokens.token(PATIENCE)


def test_a_token_that_was_refused_is_fetched_anew_once(endpoint: responses.RequestsMock) -> None:
    """Who reports the token that is kept drops it; who reports an older one drops nothing."""
    grant(endpoint, token="one")
    tokens = source()
    assert tokens.token(PATIENCE) == "one"
    endpoint.reset()
    grant(endpoint, token="two")
    tokens.drop("one")
    assert tokens.token(PATIENCE) == "two"
    tokens.drop("one")
    assert tokens.token(PATIENCE) == "two"
    assert len(endpoint.calls) == 1


def test_links_share_tokens_by_configuration(endpoint: responses.RequestsMock) -> None:
    """Links to different workers with the same credentials fetch once, other credentials again."""
    grant(endpoint)
    for url in ("wss://a.example", "wss://b.example"):
        security.handshake_headers(security.link_options({"url": url, "security": CONFIG}))
    assert len(endpoint.calls) == 1
    other = {**CONFIG, "scope": "more"}
    security.handshake_headers(security.link_options({"url": "wss://a.example", "security": other}))
    assert len(endpoint.calls) == 2
    assert CANARY not in repr(_oauth2._sources)


def test_one_fetch_for_all_threads(endpoint: responses.RequestsMock) -> None:
    """Who comes while a token is being fetched waits for that one."""
    asked, go = threading.Event(), threading.Event()

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        asked.set()
        assert go.wait(PATIENCE)
        return 200, {}, '{"access_token": "abc", "token_type": "bearer", "expires_in": 60}'

    endpoint.add_callback("POST", URL, answer)
    tokens = source()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        first = pool.submit(tokens.token, PATIENCE)
        assert asked.wait(PATIENCE)
        others = [pool.submit(tokens.token, PATIENCE) for _ in range(15)]
        with pytest.raises(TimeoutError):
            tokens.token(0.05)  # a waiter with less time gives up alone
        go.set()
        assert {future.result(PATIENCE) for future in [first, *others]} == {"abc"}
    assert len(endpoint.calls) == 1


def test_who_waits_longer_than_the_leader_goes_on(endpoint: responses.RequestsMock) -> None:
    """A fetch that its leader gave up is begun again by one who has time left."""
    asked, go, numbers = threading.Event(), threading.Event(), iter(range(9))

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        asked.set()
        if next(numbers) == 0:
            assert go.wait(PATIENCE)
        return 200, {}, '{"access_token": "abc", "token_type": "bearer", "expires_in": 60}'

    endpoint.add_callback("POST", URL, answer)
    tokens = source()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        leader = pool.submit(tokens.token, 1.0)
        assert asked.wait(PATIENCE)
        follower = pool.submit(tokens.token, PATIENCE)
        with pytest.raises(TimeoutError):
            leader.result(PATIENCE)
        assert follower.result(PATIENCE) == "abc"
    go.set()
    assert next(numbers) == 2


def test_threads_that_wait_get_errors_of_their_own(endpoint: responses.RequestsMock) -> None:
    """One exception object must not collect the tracebacks of many threads."""
    asked, go = threading.Event(), threading.Event()

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        asked.set()
        assert go.wait(PATIENCE)
        return 401, {}, '{"error": "invalid_client"}'

    endpoint.add_callback("POST", URL, answer)
    tokens = source()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(tokens.token, PATIENCE)]
        assert asked.wait(PATIENCE)
        futures += [pool.submit(tokens.token, PATIENCE) for _ in range(3)]
        go.set()
        found = [future.exception(PATIENCE) for future in futures]
    assert {type(error) for error in found} == {errors.AuthenticationRejected}
    assert len({id(error) for error in found}) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_inherits_no_lock_and_no_fetch(endpoint: responses.RequestsMock) -> None:
    """A fork while every lock is held and a token is being fetched: the child fetches its own."""
    asked, go = threading.Event(), threading.Event()
    parent = os.getpid()

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        if os.getpid() == parent:
            asked.set()
            assert go.wait(PATIENCE)
        return 200, {}, '{"access_token": "abc", "token_type": "bearer", "expires_in": 60}'

    endpoint.add_callback("POST", URL, answer)
    tokens = _oauth2.source_for(SecurityConfig(CONFIG))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(tokens.token, PATIENCE)
        assert asked.wait(PATIENCE)
        with _oauth2._lock, tokens._lock:
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    code = 0 if _oauth2.source_for(SecurityConfig(CONFIG)).token(PATIENCE) == "abc" else 2
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        go.set()
        assert future.result(PATIENCE) == "abc"
