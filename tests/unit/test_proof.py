"""Host and worker service prove in the handshake that they know each other, and notice every change of it."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from wove_ws_sync import _proof
from wove_ws_sync._keys import Key, KeyPair, SharedKey
from wove_ws_sync._proof import HOST_NONCE, HOST_PROOF, BadProof, HostProof, WorkerProof

GIVEN = {
    "X-Wove-Sync": "1; f=resume,seal",
    "X-Wove-Key": "caf\xe9",
    "X-Wove-Nonce": "n",
    "User-Agent": "curl",
}
ANSWER = {"X-Wove-Sync": "1; f=resume,seal", "X-Wove-Worker": "ab", "X-Wove-Max-Message": "5"}
SECRET = SharedKey("caf\xe9", b"0123456789abcdef")


def pairs() -> tuple[Key, Key]:
    """Return the key of a host, and that of a worker service that knows it."""
    host, worker = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    return KeyPair("h", host, worker.public_key()), KeyPair("h", worker, host.public_key())


class Handshake:
    """The whole of it; each step may be changed on its way by a test."""

    def __init__(self, host_key: Key = SECRET, worker_key: Key = SECRET) -> None:
        self.target = "/wove?a=1"
        self.host = HostProof(host_key, self.target, GIVEN)
        self.request = dict(self.host.headers)
        self.worker_key = worker_key

    def answer(self) -> dict[str, str]:
        proof = self.request.get(HOST_PROOF, "")
        # Latin-1 in headers comes as surrogates out of websockets.
        fields = [
            (name, value.encode("latin-1").decode("ascii", "surrogateescape"))
            for name, value in self.request.items()
        ]
        self.worker = WorkerProof(self.worker_key, self.target, fields, proof)
        answer, self.worker_keys = self.worker.answer(ANSWER)
        return {name.lower(): value for name, value in answer.items()}

    def conclude(self, answer: dict[str, str]) -> Any:
        return self.host.judge(answer)


@pytest.mark.parametrize("keys", [lambda: (SECRET, SECRET), pairs], ids=["secret", "pairs"])
def test_both_get_the_same_keys(keys: Callable[[], tuple[Key, Key]]) -> None:
    handshake = Handshake(*keys())
    host_keys = handshake.conclude(handshake.answer())
    worker_keys = handshake.worker_keys
    assert worker_keys.incoming.open(host_keys.outgoing.seal(b"up")) == b"up"
    assert host_keys.incoming.open(worker_keys.outgoing.seal(b"down")) == b"down"


def test_no_two_handshakes_have_the_same_keys() -> None:
    first, second = Handshake(), Handshake()
    one, other = (handshake.conclude(handshake.answer()) for handshake in (first, second))
    assert one.outgoing.seal(b"same") != other.outgoing.seal(b"same")


def test_proxies_may_do_what_proxies_do() -> None:
    """Order, capitals and white space of headers change, and others are added; nothing else matters."""
    handshake = Handshake()
    changed = {name.upper(): f" {value} " for name, value in reversed(handshake.request.items())}
    proof = changed.pop(HOST_PROOF.upper()).strip()
    fields = [*changed.items(), ("X-Forwarded-For", "192.0.2.1"), ("user-agent", "other")]
    worker = WorkerProof(SECRET, handshake.target, fields, proof)
    answer, _ = worker.answer(ANSWER)
    assert (
        handshake.conclude({"via": "1.1 proxy", **{key.lower(): answer[key] for key in answer}}) is not None
    )


def edited(name: str, value: str | None) -> Callable[[dict[str, str]], None]:
    def edit(headers: dict[str, str]) -> None:
        if value is None:
            del headers[name]
        else:
            headers[name] = value

    return edit


OTHER_NONCE = base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("=")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Wove-Sync", "1; f=resume"),
        ("X-Wove-Sync", None),
        ("X-Wove-Key", "other"),
        ("X-Wove-Nonce", "m"),
        ("X-Wove-Host", "added"),
        (HOST_NONCE, OTHER_NONCE),
        (HOST_NONCE, None),
        (HOST_PROOF, "v1=AAAA"),
        (HOST_PROOF, ""),
        (HOST_PROOF, "v2=AAAA"),
        (HOST_PROOF, "v1=" + "A" * 4000),
    ],
)
def test_a_changed_request_is_noticed(name: str, value: str | None) -> None:
    handshake = Handshake()
    edited(name, value)(handshake.request)
    with pytest.raises(BadProof):
        handshake.answer()


def test_a_request_to_another_target_is_noticed() -> None:
    handshake = Handshake()
    handshake.target = "/other"
    with pytest.raises(BadProof):
        handshake.answer()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-wove-sync", "1; f=resume"),
        ("x-wove-worker", "cd"),
        ("x-wove-max-message", "6"),
        ("x-wove-cancels", "all"),
        ("x-wove-server-nonce", OTHER_NONCE),
        ("x-wove-server-signature", "v1=AAAA"),
        ("x-wove-server-signature", "\xff"),
    ],
)
def test_a_changed_answer_is_noticed(name: str, value: str) -> None:
    handshake = Handshake()
    answer = handshake.answer()
    answer[name] = value
    with pytest.raises(BadProof):
        handshake.conclude(answer)


@pytest.mark.parametrize("name", ["x-wove-server-nonce", "x-wove-server-signature"])
def test_a_stripped_answer_proves_nothing(name: str) -> None:
    handshake = Handshake()
    answer = handshake.answer()
    del answer[name]
    assert handshake.conclude(answer) is None


def test_an_answer_to_another_request_is_noticed() -> None:
    first, second = Handshake(), Handshake()
    with pytest.raises(BadProof):
        first.conclude(second.answer())


def test_a_proof_does_not_come_back() -> None:
    """What the host signed is no signature of the worker service."""
    handshake = Handshake()
    answer = handshake.answer()
    answer["x-wove-server-signature"] = handshake.request[HOST_PROOF]
    with pytest.raises(BadProof):
        handshake.conclude(answer)


@pytest.mark.parametrize("nonce", [bytes(32), b"\1" + bytes(31), bytes(31), b""])
def test_nonces_that_make_keys_known_are_refused(nonce: bytes) -> None:
    """Points of low order would give the same keys to everybody; not even a holder of the secret may."""
    handshake = Handshake()
    handshake.host.headers = {**GIVEN, HOST_NONCE: base64.urlsafe_b64encode(nonce).decode().rstrip("=")}
    handshake.request = dict(handshake.host.headers)
    handshake.request[HOST_PROOF] = "v1=" + base64.urlsafe_b64encode(
        SECRET.sign(_request_of(handshake))
    ).decode().rstrip("=")
    with pytest.raises(BadProof, match="nonce"):
        handshake.answer()


def _request_of(handshake: Handshake) -> bytes:
    return _proof._request(handshake.target, handshake.host.headers.items())


def test_other_keys() -> None:
    with pytest.raises(BadProof):
        Handshake(worker_key=SharedKey("caf\xe9", b"another secret!!")).answer()
    host, _ = pairs()
    with pytest.raises(BadProof):
        Handshake(host, pairs()[1]).answer()
    stranger = Handshake(host, KeyPair("h", Ed25519PrivateKey.generate(), host._private.public_key()))  # type: ignore[attr-defined]
    with pytest.raises(BadProof):  # it knows the host, and is not the worker service that the host knows
        stranger.conclude(stranger.answer())


@pytest.mark.parametrize("space", ["\xa0", "\x85", "\x1c"])
def test_what_only_some_take_for_white_space_is_a_change(space: str) -> None:
    """What is read later is what was signed: those who read strip more than HTTP does."""
    handshake = Handshake()
    answer = handshake.answer()
    answer["x-wove-worker"] += space
    with pytest.raises(BadProof):
        handshake.conclude(answer)


def test_the_format_of_proofs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts and worker services of different versions understand each other.

    The values are those of another implementation, of OpenSSL through Node.
    """

    class Fixed(X25519PrivateKey):  # type: ignore[misc]
        octets = iter((b"\x11" * 32, b"\x22" * 32))

        @classmethod
        def generate(cls) -> X25519PrivateKey:
            return X25519PrivateKey.from_private_bytes(next(cls.octets))

    monkeypatch.setattr(_proof, "X25519PrivateKey", Fixed)
    key = SharedKey("k", b"0123456789abcdef")
    host = HostProof(key, "/wove", {"X-Wove-Sync": "1; f=seal", "X-Wove-Key": "k"})
    assert host.headers[HOST_NONCE] == "e06Qm75__kTEZaIgA31gjuNYl9Me-XLwf3SJLLD3PxM"
    assert host.headers[HOST_PROOF] == "v1=Uo_rCmsiRKwGL4bxf7z9el7TOauo2ycVkKdcAEbe2Yo"
    answer, keys = WorkerProof(key, "/wove", host.headers.items(), host.headers[HOST_PROOF]).answer(
        {"X-Wove-Sync": "1; f=seal"}
    )
    assert answer["X-Wove-Server-Signature"] == "v1=7Elf80410LXTN0z1OyNtALxBy0GcZeIECl3oZwmdGDo"
    assert keys.outgoing.seal(b"hello").hex() == "88bda0497e10500d23dc07551076eb88a11a9ff804"


@pytest.mark.parametrize("key", [SECRET, pairs()[0]], ids=["secret", "pair"])
def test_keys_are_neither_shown_nor_pickled(key: Key) -> None:
    assert repr(key) in ("SharedKey('caf\xe9')", "KeyPair('h')")
    with pytest.raises(TypeError, match="is not pickled"):
        pickle.dumps(key)
