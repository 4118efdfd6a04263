"""JSON Web Tokens at the worker service: which are accepted, where the keys come from, who owns a run."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.server
import json
import logging
import os
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
import responses
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from raw_host import RawHost, block_until, wait_until
from service_thread import ServiceThread, fetch
from websockets.exceptions import InvalidStatus

from wove_ws_sync import WebSocketExecutor, _oauth2
from wove_ws_sync.worker import WorkerService
from wove_ws_sync.worker import jwks as published
from wove_ws_sync.worker.jwks import KeySet, KeySource
from wove_ws_sync.worker.tokens import TokenVerifier

WAIT = 60.0
ISSUER = "https://login.example/"
RSA = {name: rsa.generate_private_key(65537, 2048) for name in ("one", "two")}
CURVE = ec.generate_private_key(ec.SECP256R1())
CURVE384 = ec.generate_private_key(ec.SECP384R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **fields: Any) -> dict[str, Any]:
    """Return the public part as it stands in a JWKS."""
    kind: Any = jwt.algorithms.RSAAlgorithm
    if isinstance(key, ec.EllipticCurvePrivateKey):
        kind = jwt.algorithms.ECAlgorithm
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        kind = jwt.algorithms.OKPAlgorithm
    document = {**json.loads(kind.to_jwk(key.public_key())), "kid": kid, **fields}
    if isinstance(key, ec.EllipticCurvePrivateKey):
        # RFC 7518 wants coordinates of full length; old versions of PyJWT leave out zeros in front.
        for name in ("x", "y"):
            number = jwt.utils.base64url_decode(document[name])
            padded = number.rjust((key.key_size + 7) // 8, b"\0")
            document[name] = jwt.utils.base64url_encode(padded).decode()
    return {name: value for name, value in document.items() if value is not None}


def jwks(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(entries)}).encode()


PUBLISHED = jwks(
    jwk(RSA["one"], "one", use="sig"),
    jwk(CURVE, "curve"),
    jwk(CURVE384, "curve384"),
    jwk(EDWARDS, "edwards", alg="EdDSA"),
    {"kty": "oct", "kid": "shared", "k": "c2hhcmVkLXNlY3JldC1zaGFyZWQtc2VjcmV0LXNoYXJlZA"},
    {"kty": "unheard-of", "kid": "strange"},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A JWKS file."""
    path = tmp_path / "jwks.json"
    path.write_bytes(PUBLISHED)
    return path


def config(source: Any, **changes: Any) -> dict[str, Any]:
    made = {"type": "jwt", "jwks": str(source), "audience": "workers", "issuer": ISSUER, **changes}
    return {key: value for key, value in made.items() if value is not ...}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    made = {"iss": ISSUER, "aud": "workers", "sub": "billing", "iat": now, "exp": now + 600, **changes}
    return {key: value() if callable(value) else value for key, value in made.items() if value is not ...}


def from_now(seconds: int) -> Callable[[], int]:
    """Return what a claim is when its token is made, which may be long after the test was collected."""
    return lambda: int(time.time()) + seconds


def token(
    key: Any = RSA["one"], algorithm: str = "RS256", kid: str | None = "one", head: Any = (), **changes: Any
) -> str:
    headers = {**dict(head), **({} if kid is None else {"kid": kid})}
    return jwt.encode(claims(**changes), key, algorithm, headers)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def made_up(header: Any, payload: Any, sign: Callable[[bytes], bytes] = lambda data: b"not one") -> str:
    """Return a token that no library would make."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    signed = ".".join(map(b64, parts))
    return f"{signed}.{b64(sign(signed.encode()))}"


def headers(*authorizations: str) -> Callable[[str], list[str]]:
    return lambda name: list(authorizations) if name == "Authorization" else []


def bearer(text: str) -> Callable[[str], list[str]]:
    return headers(f"Bearer {text}")


def refusal(verifier: TokenVerifier, text: str) -> str:
    """Return why a token is refused; nothing of the token is in it."""
    with pytest.raises(PermissionError) as caught:
        verifier.verify(bearer(text))
    for part in text.split("."):
        assert len(part) < 12 or part not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


# Tokens


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [
        (RSA["one"], "RS256", "one"),
        (RSA["one"], "RS512", "one"),
        (RSA["one"], "PS256", "one"),
        (CURVE, "ES256", "curve"),
        (CURVE384, "ES384", "curve384"),
        (EDWARDS, "EdDSA", "edwards"),
        (CURVE, "ES256", None),  # the only one for that algorithm
    ],
)
def test_good_tokens_name_their_owner(file: Path, key: Any, algorithm: str, kid: str | None) -> None:
    """Every asymmetric algorithm is accepted by default."""
    verifier = TokenVerifier(config(file))
    assert verifier.verify(bearer(token(key, algorithm, kid))) == "billing"


@pytest.mark.parametrize(
    ("changes", "owner"),
    [
        ({"sub": "alice", "client_id": "c", "azp": "a"}, "alice"),
        ({"sub": ..., "client_id": "c", "azp": "a"}, "c"),
        ({"sub": ..., "azp": "a"}, "a"),
        ({"aud": ["others", "workers"]}, "billing"),
        ({"exp": from_now(-10)}, "billing"),  # within the leeway
        ({"nbf": from_now(10)}, "billing"),
    ],
)
def test_claims_that_will_do(file: Path, changes: dict[str, Any], owner: str) -> None:
    """The owner is sub, or else client_id or azp; times have some leeway."""
    assert TokenVerifier(config(file)).verify(bearer(token(**changes))) == owner


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": ...}, "it has no exp"),
        ({"exp": from_now(-100)}, "it has expired"),
        ({"exp": None}, "refused"),
        ({"exp": "soon"}, "refused"),
        ({"exp": float("inf")}, "refused"),
        ({"exp": [1]}, "refused"),
        ({"nbf": from_now(100)}, "not valid yet"),
        ({"iat": from_now(100)}, "not valid yet"),
        ({"aud": "others"}, "another audience"),
        ({"aud": ...}, "it has no aud"),
        ({"aud": 7}, "refused"),
        ({"iss": "https://evil.example/"}, "another issuer"),
        ({"iss": ...}, "it has no iss"),
        ({"sub": ...}, "names its owner"),
        ({"sub": ""}, "names its owner"),
        ({"sub": "a\nb"}, "names its owner"),
        ({"sub": "x" * 256}, "names its owner"),
        ({"sub": ["billing"]}, "refused"),
        ({"sub": ..., "client_id": 7}, "names its owner"),
        ({"key": RSA["two"]}, "its signature is wrong"),
        ({"kid": "gone"}, "names no key that is known"),
        ({"kid": None, "key": CURVE, "algorithm": "ES384"}, "refused"),
        ({"kid": "curve"}, "names no key that is known for its algorithm"),
        ({"kid": "shared"}, "names no key that is known"),
        ({"head": {"crit": ["exp"]}}, "The token"),  # PyJWT says so itself, or we do
    ],
)
def test_claims_that_will_not(file: Path, changes: dict[str, Any], words: str) -> None:
    """The log hears why, without the token."""
    given = {"key": RSA["one"], **changes}
    if changes.get("algorithm") == "ES384":
        given["key"] = CURVE384
        file.write_bytes(jwks(jwk(CURVE, "a"), jwk(CURVE384, "b"), jwk(CURVE384, "c")))
    assert words in refusal(TokenVerifier(config(file)), token(**given))


def hmac_by(key: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.new(key, data, hashlib.sha256).digest()


PEM = RSA["one"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
DER = RSA["one"].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SHARED = b"shared-secret-shared-secret-shared"

FORGERIES = {
    "none": (made_up({"alg": "none", "kid": "one"}, claims()), "algorithm"),
    "None": (made_up({"alg": "None", "kid": "one"}, claims()), "algorithm"),
    "no alg": (made_up({"kid": "one"}, claims()), "algorithm"),
    "alg of another type": (made_up({"alg": ["RS256"], "kid": "one"}, claims()), "algorithm"),
    "signed with the public key": (
        made_up({"alg": "HS256", "kid": "one"}, claims(), hmac_by(PEM)),
        "algorithm",
    ),
    "with its DER": (made_up({"alg": "HS256", "kid": "one"}, claims(), hmac_by(DER)), "algorithm"),
    "with the key that is shared": (
        made_up({"alg": "HS256", "kid": "shared"}, claims(), hmac_by(SHARED)),
        "algorithm",
    ),
    "RS256 by HMAC": (made_up({"alg": "RS256", "kid": "one"}, claims(), hmac_by(PEM)), "signature is wrong"),
    "no signature": (
        made_up({"alg": "RS256", "kid": "one"}, claims(), lambda data: b""),
        "not a JSON Web Token",
    ),
    "another signature": (made_up({"alg": "RS256", "kid": "one"}, claims()), "signature is wrong"),
    "alg that is an object": (made_up({"alg": {"RS256": 1}, "kid": "one"}, claims()), "algorithm"),
    "a key of its own": (
        made_up({"alg": "RS256", "jwk": jwk(RSA["two"], "two")}, claims()),
        "signature is wrong",
    ),
    "kid of another type": (made_up({"alg": "RS256", "kid": 7}, claims()), "token"),
    "kid like a path": (made_up({"alg": "RS256", "kid": "../../dev/null"}, claims()), "names no key"),
    "no header": (made_up(b"nothing", claims()), "malformed"),
    "a header that is a list": (made_up([], claims()), "malformed"),
    "deep": (made_up(b"[" * 3000, claims()), "malformed"),
    "a payload that is none": (made_up({"alg": "RS256", "kid": "one"}, b"\xff"), "signature is wrong"),
    "empty parts": ("..", "not a JSON Web Token"),
}


@pytest.mark.parametrize(("text", "words"), FORGERIES.values(), ids=FORGERIES)
def test_forgeries(file: Path, text: str, words: str) -> None:
    """Whatever it is: a PermissionError and nothing else, each for its reason."""
    assert words in refusal(TokenVerifier(config(file)), text)


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        ("Basic YTpi",),
        ("Bearer a b.c.d",),
        ("Bearer ä.b.c",),
        ("Bearer a.b.c\n",),
        ("Bearer a.b",),
        ("Bearer a.b.c.d.e",),
        (f"Bearer {token()}", f"Bearer {token()}"),
        (f"Bearer {token()}, Bearer {token()}",),
    ],
)
def test_headers_that_are_none(file: Path, values: tuple[str, ...]) -> None:
    """There must be one header with one token; no key is asked for without."""
    verifier = TokenVerifier(config(file))
    with pytest.raises(PermissionError):
        verifier.verify(headers(*values))
    assert verifier.refresh(headers(*values)) is None


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_ignores_case(file: Path, scheme: str) -> None:
    """RFC 9110, 11.1."""
    assert TokenVerifier(config(file)).verify(headers(f"{scheme} {token()}")) == "billing"


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"scope": "runs.write runs.read"}, True),
        ({"scope": ["runs.read", "runs.write", 7]}, True),
        ({"scp": "runs.write runs.read"}, True),
        ({"scope": "runs.read", "scp": ["runs.write"]}, True),
        ({"scope": "runs.read"}, False),
        ({"scope": "runs.write.all runs.read"}, False),
        ({"scope": 7}, False),
        ({}, False),
    ],
)
def test_a_scope_that_is_required(file: Path, changes: dict[str, Any], allowed: bool) -> None:
    """All its parts must be there."""
    verifier = TokenVerifier(config(file, required_scope="runs.read runs.write"))
    if allowed:
        assert verifier.verify(bearer(token(**changes))) == "billing"
    else:
        assert "lacks the scope" in refusal(verifier, token(**changes))


def test_algorithms_can_be_fewer(file: Path) -> None:
    """What is not listed is refused before a key is looked for."""
    verifier = TokenVerifier(config(file, algorithms=["ES256"]))
    assert verifier.verify(bearer(token(CURVE, "ES256", "curve"))) == "billing"
    assert "its algorithm is not among" in refusal(verifier, token())


# The configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audience": ...}, "audience"),
        ({"audience": []}, "audience"),
        ({"audience": ["a", ""]}, "audience"),
        ({"issuer": ...}, "issuer"),
        ({"issuer": ["a"]}, "issuer"),
        ({"jwks": ...}, "jwks"),
        ({"jwks": "/nowhere/at/all.json"}, "cannot be read: No such file"),
        ({"jwks": "http://login.example/jwks"}, "https://"),
        ({"jwks": "https://user@login.example/jwks"}, "user name"),
        ({"algorithms": ["none"]}, "must not have 'none'"),
        ({"algorithms": ["HS256"]}, "must not have 'HS256'"),
        ({"algorithms": ["RS256", "HS512"]}, "must not have 'HS512'"),
        ({"algorithms": []}, "algorithms"),
        ({"algorithms": "RS257"}, "Did you mean 'RS256'?"),
        ({"leeway_seconds": -1}, "leeway_seconds"),
        ({"leeway_seconds": float("nan")}, "leeway_seconds"),
        ({"required_scope": ""}, "required_scope"),
        ({"audiance": "x"}, "Did you mean 'audience'?"),
    ],
)
def test_what_is_wrong_is_named(file: Path, changes: dict[str, Any], words: str) -> None:
    """At the start of the service, not at the first host."""
    with pytest.raises(ValueError, match=words.replace("?", r"\?").replace("(", r"\(")):
        WorkerService(security=config(file, **changes))


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(RuntimeError, match=r'pip install "wove_ws_sync\[jwt\]"'):
        TokenVerifier(config(file))


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": []}',
        b"[" * 9000,
        jwks({"kty": "oct", "k": "c2VjcmV0"}),
        jwks(jwk(RSA["one"], "one", use="enc")),
        jwks(jwk(RSA["one"], "one", key_ops=["encrypt"])),
        jwks(jwk(RSA["one"], "one", alg="RSA-OAEP")),
        jwks(jwk(CURVE, "curve", crv="secp256k1")),
        jwks(jwk(CURVE, "curve", x="AAAA")),
        jwks({**jwk(RSA["one"], "one"), "d": "private"}),
        jwks(jwk(rsa.generate_private_key(65537, 1024), "short")),
        jwks(*[jwk(RSA["one"], str(number)) for number in range(101)]),
    ],
)
def test_documents_without_a_usable_key(document: bytes) -> None:
    """Symmetric, private, short and foreign keys are no keys."""
    with pytest.raises(ValueError):
        KeySet(document)


# Where the keys come from


class Publisher(http.server.ThreadingHTTPServer):
    """Publishes a JWKS, the way a test wants."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.document = PUBLISHED
        self.status = 200
        self.asked = 0
        self.hold = threading.Event()
        self.hold.set()
        self.gone = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.server_address[1]}/jwks"
        self._thread = threading.Thread(target=self.serve_forever, name="publisher")
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hold.set()
        self.shutdown()
        self.server_close()
        self._thread.join(WAIT)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Publisher

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        if not server.hold.wait(WAIT):
            return
        self.send_response(server.status)
        self.send_header("Location", "/other")
        self.end_headers()
        try:
            if server.document:
                self.wfile.write(server.document)
            else:  # without end
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
        finally:
            server.gone.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Clock:
    """Time that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A publisher over plain HTTP, which is for this machine."""
    with Publisher() as running:
        yield running


def refreshed(found: KeySource) -> KeySet:
    found.refresh().result(WAIT)
    current = found.current()
    assert current is not None
    return current


def test_a_url_is_asked_seldom(publisher: Publisher) -> None:
    """At the first token, then after five minutes, or for a key that is unknown, at most every 10 s."""
    clock = Clock()
    found = KeySource(publisher.url, now=clock)
    assert found.current() is None and found.due("one") and publisher.asked == 0
    assert refreshed(found).knows("one")
    assert not found.due("one") and not found.due("new")
    clock.now += 9
    assert not found.due("new")
    clock.now += 1
    assert found.due("new") and not found.due("one")
    publisher.document = jwks(jwk(RSA["two"], "new"))
    assert refreshed(found).knows("new") and not refreshed(found).knows("one")
    clock.now += 299
    assert not found.due("new")
    clock.now += 1
    assert found.due("new")


def test_keys_outlive_a_url_for_an_hour(publisher: Publisher, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be had or used changes nothing, but a warning is logged."""
    clock = Clock()
    found = KeySource(publisher.url, now=clock)
    refreshed(found)
    clock.now += 3600
    for status, document in ((500, PUBLISHED), (302, PUBLISHED), (200, b"{}"), (200, b" " * 300_000)):
        publisher.status, publisher.document = status, document
        assert refreshed(found).knows("one")
    assert len(caplog.records) == 4 and "HTTP 500" in caplog.text and "HTTP 302" in caplog.text
    assert not found.due("one")
    clock.now += 11
    assert found.due("one") and found.current() is None


def test_nobody_publishes(caplog: pytest.LogCaptureFixture) -> None:
    """A port that is closed is a warning."""
    with Publisher() as gone:
        pass
    found = KeySource(gone.url)
    found.refresh().result(WAIT)
    assert found.current() is None and "Connection refused" in caplog.text


def test_many_threads_ask_once(publisher: Publisher) -> None:
    """Who comes while the keys are under way waits for those."""
    publisher.hold.clear()
    found = KeySource(publisher.url)
    first = found.refresh()
    assert all(found.refresh() is first for _ in range(9)) and found.due("one")
    publisher.hold.set()
    first.result(WAIT)
    assert publisher.asked == 1


def test_a_url_that_drips(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for all of the answer."""
    monkeypatch.setattr(published, "_TIMEOUT", 0.5)
    publisher.document = b""
    found = KeySource(publisher.url)
    found.refresh().result(WAIT)
    assert found.current() is None
    assert publisher.gone.wait(WAIT)


def test_a_url_with_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The certificate is verified; ca_file names who is trusted."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Publisher(context) as publisher:
        untrusting = KeySource(publisher.url)
        untrusting.refresh().result(WAIT)
        assert untrusting.current() is None and publisher.asked == 0
        assert refreshed(KeySource(publisher.url, str(tmp_path / "ca.pem"))).knows("one")


def test_a_file_is_read_again_when_it_changes(file: Path) -> None:
    """At once for a key that is unknown, else within a second; a bad file changes nothing."""
    clock = Clock()
    found = KeySource(str(file), now=clock)
    assert not found.due("one") and found.due("two")
    replacement = file.with_suffix(".new")
    replacement.write_bytes(jwks(jwk(RSA["two"], "two")))
    os.replace(replacement, file)
    assert refreshed(found).knows("two") and not refreshed(found).knows("one")
    clock.now += 1
    assert found.due("two")
    file.write_bytes(b"{")
    assert refreshed(found).knows("two")
    file.unlink()
    assert refreshed(found).knows("two")


# The service


@contextlib.contextmanager
def serving(source: Any, **changes: Any) -> Iterator[ServiceThread]:
    with ServiceThread(security=config(source, **changes)) as running:
        yield running


def connect(service: ServiceThread, text: str, **options: Any) -> RawHost:
    return RawHost(service, headers={"Authorization": f"Bearer {text}"}, **options)


def visit(service: ServiceThread, text: str) -> None:
    with connect(service, text):
        pass


def refused(service: ServiceThread, given: Mapping[str, str]) -> tuple[int, bytes]:
    with pytest.raises(InvalidStatus) as caught:
        RawHost(service, headers=dict(given))
    return caught.value.response.status_code, bytes(caught.value.response.body or b"")


def test_one_answer_for_all_that_is_wrong(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger learns nothing; the log says why, without a token."""
    bad = [
        token(exp=1),
        token(aud="x"),
        token(RSA["two"]),
        token(kid="gone"),
        token(sub=...),
        "a.b.c",
        *[text for name, (text, _) in FORGERIES.items() if name != "deep"],
    ]
    with caplog.at_level(logging.DEBUG), serving(file) as service:
        answers = {refused(service, {"Authorization": f"Bearer {text}"}) for text in bad}
        answers |= {refused(service, {}), refused(service, {"Authorization": "Basic YTpi"})}
        assert answers == {(401, b"401 Unauthorized\n")}
        assert service.service.counters["unauthorized"] == len(bad) + 2
        visit(service, token())
    said = "".join(f"{each.getMessage()}\n" for each in caplog.records if each.name.startswith("wove_ws"))
    for words in ("has expired", "another audience", "signature is wrong", "names no key", "is missing"):
        assert words in said
    for text in [*bad, token()]:
        for part in text.split("."):
            assert len(part) < 12 or part not in said


def test_a_new_key_of_a_file_is_accepted_at_once(file: Path) -> None:
    """And the one that is gone is refused soon after."""
    with serving(file) as service:
        visit(service, token())
        file.write_bytes(jwks(jwk(RSA["two"], "two")))
        visit(service, token(RSA["two"], kid="two"))
        assert refused(service, {"Authorization": f"Bearer {token()}"})[0] == 401


def test_the_configuration_in_a_file(file: Path, tmp_path: Path) -> None:
    """``--security file:PATH`` takes it as TOML, and reads it again."""
    path = tmp_path / "security.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in config(file).items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    with ServiceThread(security=f"file:{path}") as service:
        visit(service, token())
        assert refused(service, {"Authorization": f"Bearer {token(aud='others')}"})[0] == 401
        path.write_text("\n".join(lines).replace('"workers"', '"others"'), encoding="utf-8")
        wait_until(lambda: _outcome(service, token(aud="others")) == 101)
        assert refused(service, {"Authorization": f"Bearer {token()}"})[0] == 401


def test_the_loop_goes_on_while_keys_are_fetched(publisher: Publisher) -> None:
    """A host of a known key gets in, and others are answered, while the publisher is silent."""
    with serving(publisher.url) as service:
        visit(service, token())
        verifier = service.service._auth._keyring.keys().verifier
        assert verifier is not None
        verifier._keys._asked_at -= 60  # long enough ago to ask again
        publisher.hold.clear()
        results: list[Any] = []
        waiter = threading.Thread(target=lambda: results.append(_outcome(service, token(kid="gone"))))
        waiter.start()
        while publisher.asked < 2:
            assert waiter.is_alive() or publisher.asked == 2
            time.sleep(0.005)
        visit(service, token())
        assert fetch(service.port, "/healthz").status == 200
        assert waiter.is_alive()
        publisher.document = jwks(jwk(RSA["one"], "gone"))
        publisher.hold.set()
        waiter.join(WAIT)
        assert results == [101]


def _outcome(service: ServiceThread, text: str) -> int:
    try:
        visit(service, text)
    except InvalidStatus as exc:
        return int(exc.response.status_code)
    return 101


def test_a_service_starts_without_its_publisher() -> None:
    """Hosts are told to try again until there are keys: it is not their fault; the service lives."""
    with Publisher() as gone:
        pass
    with serving(gone.url) as service:
        assert refused(service, {"Authorization": f"Bearer {token()}"})[0] == 503
        assert refused(service, {"Authorization": "Bearer a.b.c"})[0] == 401
        assert fetch(service.port, "/healthz").status == 200


def test_runs_belong_to_the_subject(file: Path, tmp_path: Path) -> None:
    """A host that comes back with another token of the same owner finds its run; another owner does not."""
    options: dict[str, Any] = {"extensions": "resume,ack", "name": "ab" * 16, "window": 600}
    done = tmp_path / "done"
    with serving(file) as service, contextlib.ExitStack() as stack:
        stack.callback(done.touch)
        with connect(service, token(sub="alice", jti="1"), **options) as host:
            host.run(block_until, path=str(done))
            host.wait(kind="task_started")
            host.cut()
        with connect(service, token(sub="bob"), **options) as host:
            assert host.resume("r") == {"lost": ["r"]}
        with connect(service, token(sub="alice", jti="2"), **options) as host:
            assert host.resume("r") == {"alive": ["r"]}
            done.touch()
            host.result()


def test_a_connection_outlives_its_token(file: Path) -> None:
    """A token is looked at in the handshake only."""
    with serving(file, leeway_seconds=0) as service:
        text = token(exp=int(time.time()) + 2)
        with connect(service, text) as host:
            while _outcome(service, text) == 101:
                time.sleep(0.05)
            host.run(dict, late=1)
            assert host.result() == {"late": 1}


def test_readers_of_the_pages_bring_a_token(file: Path) -> None:
    """/metrics of a service for other machines is for whoever has a valid one."""
    with serving(file) as service:
        rule = service.service._pages._rule  # type: ignore[union-attr]
        rule._local = False
        assert fetch(service.port, "/status.json").status == 401
        for text, status in ((token(), 200), (token(aud="x"), 401)):
            given = {"Authorization": f"Bearer {text}"}
            assert fetch(service.port, "/status.json", given).status == status


def test_from_the_token_endpoint_to_a_run(file: Path) -> None:
    """A host that fetches its tokens, and a worker service that verifies them."""
    _oauth2._sources.clear()
    security = {
        "type": "oauth2",
        "token_url": "https://login.example/token",
        "client_id": "billing",
        "client_secret": "not-guessed",
    }
    with serving(file, required_scope="runs") as service, responses.RequestsMock() as endpoint:
        grant = {"access_token": token(scope="runs"), "token_type": "Bearer", "expires_in": 600}
        endpoint.post(security["token_url"], json=grant)
        with WebSocketExecutor(service.url, security=security) as pool:
            assert pool.submit(divmod, 7, 2).result(WAIT) == (3, 1)
    _oauth2._sources.clear()
