"""Keys between real hosts and real worker services: several, rotated, in files, pairs of Ed25519 keys."""

from __future__ import annotations

import contextlib
import operator
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wove
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fault_helpers import WAIT, link_of, until
from middle import Middle
from raw_host import RawHost, signed
from scripted_worker import ScriptedWorker
from service_thread import ServiceThread
from websockets.exceptions import InvalidStatus
from wove.environment import EnvironmentExecutionError
from ws_peer import TEXT, Listener, Peer, dialled, frame

from wove_ws_sync import AuthenticationRejected, HandshakeRejected, WebSocketExecutor, security
from wove_ws_sync._keys import KeyPair, private_key, public_key
from wove_ws_sync._proof import HostProof
from wove_ws_sync._seal import PIECE_BYTES
from wove_ws_sync.frames import encode
from wove_ws_sync.link import LinkState
from wove_ws_sync.payloads import encode_value
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.transport import TransportClosed
from wove_ws_sync.worker import keyring
from wove_ws_sync.worker.keyring import Keyring

OLD, NEW, OTHER = (f"{name} secret, 0123456789abcdef" for name in ("old", "new", "other"))


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=2) as running:
        yield running


def adds(url: str, **config: Any) -> frozenset[str]:
    """Have a sum computed by the worker service; return the extensions that were used."""
    with WebSocketExecutor(url, **config) as pool:
        assert pool.submit(operator.add, 20, 22).result(WAIT) == 42
        transport = link_of(pool)._connection.transport  # type: ignore[union-attr]
        features = transport.features
    assert features is not None
    return features


def sharing(*keys: tuple[str, str]) -> dict[str, Any]:
    return {"type": "signed", "keys": [{"key": name, "secret": secret} for name, secret in keys]}


# -- what is sealed, and what is asked for ----------------------------------------------------


@pytest.mark.parametrize(("seal", "sealed"), [("auto", True), ("require", True), ("off", False)])
@pytest.mark.parametrize("worker_auth", ["auto", "require", "off"])
def test_every_setting_with_a_worker_service_of_ours(
    worker: LoopbackWorker, seal: str, sealed: bool, worker_auth: str
) -> None:
    assert ("seal" in adds(**worker.config, seal=seal, worker_auth=worker_auth)) == sealed


def test_it_seals_by_default(worker: LoopbackWorker) -> None:
    """Where both sides have a key; over TLS as well, which a proxy may end."""
    assert "seal" in adds(**worker.config)
    with LoopbackWorker(workers=2, tls=True) as other:
        assert "seal" in adds(**other.config)
    with LoopbackWorker(workers=2, security=False) as other:
        assert "seal" not in adds(**other.config)


def test_large_messages_are_sealed_in_both_directions(worker: LoopbackWorker) -> None:
    blob = os.urandom(5 * 1024 * 1024 + 3)
    with WebSocketExecutor(**worker.config, seal="require") as pool:
        assert pool.submit(operator.add, blob, b"x").result(WAIT) == blob + b"x"


@pytest.mark.parametrize("limit", [100_000, 2 * PIECE_BYTES])
@pytest.mark.parametrize("seal", ["require", "off"])
def test_a_worker_takes_a_message_of_exactly_its_limit(seal: str, limit: int) -> None:
    """Though it travels with some bytes more when it is sealed; one of a byte more ends the connection."""
    with ServiceThread(security={"secret": OLD}, max_message_bytes=limit) as service:
        options = security.link_options({"url": service.url, "security": {"secret": OLD}, "seal": seal})
        for size in (limit, limit + 1):
            command = b'{"type":"run_task","run_id":"r","unknown":"%b"}'
            command %= b"x" * (size - len(command) + 2)
            assert len(command) == size
            with dialled(options) as transport:
                assert transport.pump(transport.post(command), WAIT)
                if size == limit:
                    assert b"run_task needs a task_id" in transport.recv()
                else:
                    with pytest.raises(TransportClosed) as caught:
                        transport.recv()
                    assert caught.value.close_code == 1009


@pytest.mark.parametrize("value", [bytes(30_000), bytes(2 * PIECE_BYTES)], ids=["small", "large"])
@pytest.mark.parametrize("seal", ["require", "off"])
def test_a_host_takes_a_message_of_exactly_its_limit(worker: LoopbackWorker, seal: str, value: bytes) -> None:
    """What is a byte larger is an error of its run only."""
    event = {"type": "task_result", "run_id": f"bytes:{'0' * 32}", "task_id": "bytes"}
    limit = len(encode({**event, "result_pickle": encode_value(value)}))
    with WebSocketExecutor(**worker.config, seal=seal, max_message_bytes=limit) as pool:
        future = pool.submit(bytes, len(value))
        assert len(future.run_id) == len(event["run_id"])
        assert future.result(WAIT) == value
    with WebSocketExecutor(**worker.config, seal=seal, max_message_bytes=limit - 1) as pool:
        with pytest.raises(EnvironmentExecutionError, match="Return less"):
            pool.submit(bytes, len(value)).result(WAIT)
        assert link_of(pool).stats()["losses"] == 0


@pytest.mark.parametrize("name", ["seal", "worker_auth"])
def test_a_foreign_worker_is_refused_where_it_must_prove_itself(name: str) -> None:
    """By default it is not: it speaks plain Wove."""
    known = {"security": {"type": "signed", "secret": OLD}}
    with ScriptedWorker(foreign=True) as foreign:
        with WebSocketExecutor(foreign.url, **known) as pool:
            future = pool.submit(abs, -1)
            foreign.connection().commands(1)
            future.cancel()
        with WebSocketExecutor(foreign.url, **known, **{name: "require"}) as pool:
            with pytest.raises(HandshakeRejected, match=name.replace("worker_auth", "prove")):
                pool.submit(abs, -1).result(WAIT)


@pytest.mark.parametrize("name", ["seal", "worker_auth"])
@pytest.mark.parametrize("value", [None, "none", {"type": "bearer", "token": "t"}])
def test_what_cannot_be_checked_cannot_be_required(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"executor_config.{name}='require' has nothing to check with"):
        security.link_options({"url": "ws://127.0.0.1:1/", "security": value, name: "require"})


ROGUE = (
    "X-Wove-Sync: 1; f=seal",
    "X-Wove-Server-Nonce: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
    "X-Wove-Server-Signature: v1=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
)


@pytest.mark.parametrize("config", [{}, {"worker_auth": "require", "seal": "off"}, {"seal": "require"}])
@pytest.mark.parametrize("lines", [ROGUE, ROGUE[:1]], ids=["a wrong proof", "no proof"])
def test_a_worker_with_another_secret_gets_nothing_decoded(
    lines: tuple[str, ...], config: dict[str, str]
) -> None:
    """One that lets everybody in and answers as if it knew the secret; by default, too."""
    sent = []

    def rogue(peer: Peer) -> None:
        peer.upgrade(*lines)
        peer.send(frame(TEXT, b'{"type": "task_result", "run_id": "r", "result_pickle": "gARLAS4="}'))
        with contextlib.suppress(OSError):
            sent.append(peer.recv_frame())

    with Listener(rogue) as listener:
        with WebSocketExecutor(
            f"ws://127.0.0.1:{listener.port}/wove", security={"secret": OLD}, **config
        ) as pool:
            with pytest.raises(HandshakeRejected, match="did not prove that it has the key"):
                pool.submit(abs, -1).result(WAIT)
            assert link_of(pool).stats()["events"] == 0
        listener.result()
    assert sent == []


def test_hosts_of_wove_are_served_as_before(worker: LoopbackWorker) -> None:
    """They neither offer nor see anything of it."""
    with RawHost(worker, headers=signed(worker)) as host:
        assert host.socket.response is not None
        names = [name.lower() for name, _ in host.socket.response.headers.raw_items()]
        assert not [name for name in names if name.startswith("x-wove")]


# -- several keys -------------------------------------------------------------------------------


def test_rotation_without_downtime() -> None:
    """The first key signs, each is verified; taking the old one away ends nothing that is connected."""
    with ServiceThread(security=sharing(("2026-11", NEW), ("2026-05", OLD))) as service:
        for keys in ((("2026-05", OLD),), (("2026-11", NEW), ("2026-05", OLD)), (("2026-11", NEW),)):
            assert "seal" in adds(service.url, security=sharing(*keys), seal="require")
        with WebSocketExecutor(service.url, security=sharing(("2026-05", NEW))) as pool:
            with pytest.raises(AuthenticationRejected):
                pool.submit(abs, -1).result(WAIT)


def test_two_secrets_of_one_name() -> None:
    """Hosts that do not name their key can be rotated, too: all of theirs is named "default"."""
    with ServiceThread(security=sharing(("default", NEW), ("default", OLD))) as service:
        for secret in (OLD, NEW):
            assert "seal" in adds(service.url, security={"type": "signed", "secret": secret})
        with WebSocketExecutor(service.url, security={"type": "signed", "secret": OTHER}) as pool:
            with pytest.raises(AuthenticationRejected):
                pool.submit(abs, -1).result(WAIT)


def test_owners_are_told_apart_by_their_keys() -> None:
    """What a host with one key has let go of, one with another key does not get."""
    with ServiceThread(security=sharing(("a", NEW), ("b", OLD))) as service:
        with WebSocketExecutor(
            service.url, security=sharing(("a", NEW)), delivery_orphan_policy="detach"
        ) as pool:
            future = pool.submit(time.sleep, 0.2)
            until(lambda: pool.link is not None and pool.link.state is LinkState.READY)
            pool.shutdown(wait=False)
        with WebSocketExecutor(service.url, security=sharing(("b", OLD))) as other:
            with pytest.raises(EnvironmentExecutionError, match="no such run to attach to"):
                other.attach(future.run_id).result(WAIT)
        with WebSocketExecutor(service.url, security=sharing(("a", NEW))) as again:
            assert again.attach(future.run_id).result(WAIT) is None


def test_wove_verifies_what_several_keys_sign() -> None:
    """The handshake is Wove's; a verifier of its own takes it."""
    options = security.link_options(
        {"url": "ws://127.0.0.1:1/wove", "security": sharing(("new", NEW), ("o", OLD))}
    )
    verifier = wove.NetworkExecutorSecurity(mode="signed", secret=NEW, key="new")
    verifier.verify_headers(
        headers=security.handshake_headers(options), transport="websocket", target="/wove", body=b""
    )


# -- files ------------------------------------------------------------------------------------------


def toml(*keys: tuple[str, str]) -> str:
    return "".join(f'[[keys]]\nkey = "{name}"\nsecret = "{secret}"\n' for name, secret in keys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(toml(("old", OLD)))
    return path


def test_a_worker_takes_over_the_keys_of_its_file(file: Path) -> None:
    """Without a restart, and without losing who is connected; a broken file changes nothing."""
    with LoopbackWorker(workers=2, security=False, args=["--security", f"file:{file}"]) as worker:
        with WebSocketExecutor(worker.url, security=sharing(("old", OLD))) as kept:
            assert kept.submit(abs, -1).result(WAIT) == 1
            file.write_text(toml(("new", NEW), ("old", OLD)))
            until(lambda: _gets_in(worker.url, ("new", NEW)))
            file.write_text("no TOML at all")
            until(lambda: _gets_in(worker.url, ("new", NEW)) and "stay as they were" in worker.log)
            assert NEW not in worker.log and OLD not in worker.log
            file.write_text(toml(("new", NEW)))
            until(lambda: not _gets_in(worker.url, ("old", OLD)))
            assert kept.submit(abs, -2).result(WAIT) == 2
            assert link_of(kept).stats()["dials"] == 1


def _gets_in(url: str, key: tuple[str, str]) -> bool:
    try:
        with RawHost(
            _Url(url),
            headers=wove.NetworkExecutorSecurity(mode="signed", secret=key[1], key=key[0]).headers_for(
                transport="websocket", target="/wove", body=b""
            ),
        ):
            return True
    except InvalidStatus:
        return False


class _Url:
    security = None

    def __init__(self, url: str) -> None:
        self.url = url


def test_a_change_is_taken_over_whenever_it_comes(tmp_path: Path) -> None:
    """Also one that comes while the file is read, and a file that is there only later."""
    path, secret = tmp_path / "keys.toml", tmp_path / "secret"
    path.write_text(toml(("a", OLD)))
    ring = Keyring(f"file:{path}")
    read = keyring.Keys

    class Slow(read):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if not secret.exists() and "later" not in path.read_text():
                path.write_text(toml(("b", NEW)) + f'[[keys]]\nkey = "later"\nsecret_file = "{secret}"\n')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyring, "Keys", Slow)
        patch.setattr(keyring, "_LOOK_EVERY", 0.0)
        path.write_text(toml(("a", NEW)))
        for _ in range(3):
            assert sorted(ring.keys().by_id) == ["a"]  # as the file for "later" is not there
        secret.write_text(OTHER)
        ring.keys()
        assert sorted(ring.keys().by_id) == ["b", "later"]


def test_a_secret_in_a_file_is_read_at_each_dial(tmp_path: Path) -> None:
    """White space at its end does not count; on the worker service a new one is taken over."""
    path = tmp_path / "secret"
    path.write_text(f"{OLD}\n")
    with ServiceThread(security={"secret_file": str(path)}) as service:
        config = {"security": {"secret_file": str(path)}, "idle_timeout": 0.0}
        assert "seal" in adds(service.url, **config)
        path.write_text(NEW)
        until(lambda: _gets_in(service.url, ("default", NEW)))
        assert "seal" in adds(service.url, **config)
        path.unlink()
        with WebSocketExecutor(service.url, **config) as pool:
            with pytest.raises(RuntimeError, match=r"secret_file '.*' cannot be read: No such file"):
                pool.submit(abs, -1).result(WAIT)


# -- pairs of keys ------------------------------------------------------------------------------------


class Pair:
    """An Ed25519 key pair in two PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        key = Ed25519PrivateKey.generate()
        self.private, self.public = (str(folder / f"{name}.{kind}") for kind in ("pem", "pub"))
        Path(self.private).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        Path(self.public).write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )

    def config(self, name: str, worker: Pair) -> dict[str, Any]:
        own = {"type": "ed25519", "key": name, "private_key_file": self.private}
        return {**own, "worker_key_file": worker.public}


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return [Pair(tmp_path, name) for name in ("web", "batch", "worker")]


def knows(worker: Pair, **hosts: Pair) -> dict[str, Any]:
    known = {name: pair.public for name, pair in hosts.items()}
    return {"type": "ed25519", "private_key_file": worker.private, "hosts": known}


def test_pairs_of_keys(pairs: list[Pair]) -> None:
    """Both sides have one, and everything is sealed: nobody can pass a signature on."""
    web, batch, worker = pairs
    with ServiceThread(security=knows(worker, web=web, batch=batch)) as service:
        assert "seal" in adds(service.url, security=web.config("web", worker))
        assert "seal" in adds(service.url, security=batch.config("batch", worker), worker_auth="require")
        with Middle(service.port) as middle:
            middle.on_request = lambda head: head.replace(b",seal", b"")
            with WebSocketExecutor(
                f"ws://127.0.0.1:{middle.port}/wove", security=web.config("web", worker)
            ) as pool:
                with pytest.raises(AuthenticationRejected):
                    pool.submit(abs, -1).result(WAIT)
        # A host that seals nothing, such as no host of this package is.
        signed = HostProof(
            KeyPair("web", private_key(web.private, ""), public_key(worker.public, "")),
            "/wove",
            {"X-Wove-Key": "web", "X-Wove-Nonce": "n" * 16, "X-Wove-Timestamp": str(int(time.time()))},
        )
        with pytest.raises(InvalidStatus, match="403"), RawHost(service, headers=signed.headers):
            pass


def test_a_handshake_with_a_pair_counts_once(pairs: list[Pair]) -> None:
    web, _, worker = pairs
    with ServiceThread(security=knows(worker, web=web)) as service, Middle(service.port) as middle:
        assert "seal" in adds(f"ws://127.0.0.1:{middle.port}/wove", security=web.config("web", worker))
        with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT) as again:
            again.sendall(middle.tapes[0].request[0])
            assert again.recv(1000).startswith(b"HTTP/1.1 401")


def test_pairs_are_rotated_without_downtime(pairs: list[Pair]) -> None:
    """A worker service may know two keys of a host."""
    web, new, worker = pairs
    config = knows(worker, web=web)
    config["hosts"]["web"] = [new.public, web.public]
    with ServiceThread(security=config) as service:
        for pair in (web, new):
            assert "seal" in adds(service.url, security=pair.config("web", worker))


def test_pairs_of_others_are_refused(pairs: list[Pair], tmp_path: Path) -> None:
    """A host with the name of another, one that nobody knows; a worker service that is another one."""
    web, batch, worker = pairs
    with ServiceThread(security=knows(worker, web=web)) as service:
        for config in (batch.config("web", worker), batch.config("batch", worker)):
            with (
                WebSocketExecutor(service.url, security=config) as pool,
                pytest.raises(AuthenticationRejected),
            ):
                pool.submit(abs, -1).result(WAIT)
        with WebSocketExecutor(service.url, security=web.config("web", batch)) as pool:
            with pytest.raises(HandshakeRejected, match="its signature is wrong"):
                pool.submit(abs, -1).result(WAIT)
        headers = wove.NetworkExecutorSecurity(mode="signed", secret=OLD, key="web").headers_for(
            transport="websocket", target="/wove", body=b""
        )
        with pytest.raises(InvalidStatus, match="401"), RawHost(service, headers=headers):
            pass


def test_pairs_on_the_command_line(pairs: list[Pair], tmp_path: Path) -> None:
    """As the manual says it: a TOML file for the worker service."""
    web, _, worker = pairs
    file = tmp_path / "hosts.toml"
    file.write_text(
        f'type = "ed25519"\nprivate_key_file = "{worker.private}"\n[hosts]\nweb = "{web.public}"\n'
    )
    with LoopbackWorker(workers=2, security=False, args=["--security", f"file:{file}"]) as running:
        assert "seal" in adds(running.url, security=web.config("web", worker), seal="require")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key": None}, "security.key must be text"),
        ({"private_key_file": "/nowhere/x.pem"}, "cannot be read: No such file"),
        ({"private_key_file": "PUBLIC"}, "holds no Ed25519 private key"),
        ({"worker_key_file": "PRIVATE"}, "holds no Ed25519 public key"),
        ({"worker_key_file": None}, "security.worker_key_file must be text"),
        ({"privatekey_file": "x"}, "Did you mean 'private_key_file'"),
        ({"secret": "x" * 20}, "has no key 'secret' with type 'ed25519'"),
    ],
)
def test_a_wrong_pair_is_told_at_once(pairs: list[Pair], change: dict[str, Any], text: str) -> None:
    web, _, worker = pairs
    files = {"PUBLIC": web.public, "PRIVATE": web.private}
    changed = {name: files.get(value, value) for name, value in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=text):
        security.link_options(
            {"url": "ws://127.0.0.1:1/", "security": {**web.config("web", worker), **changed}}
        )


def test_pairs_always_seal(pairs: list[Pair]) -> None:
    config = {"url": "ws://127.0.0.1:1/", "security": pairs[0].config("web", pairs[2]), "seal": "off"}
    with pytest.raises(ValueError, match="does not go with key pairs"):
        security.link_options(config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"privat_key_file": "x"}, "Did you mean 'private_key_file'"),
        ({"private_key_file": None}, "private_key_file must be"),
        ({"hosts": {}}, "hosts must be a dictionary"),
        ({"clock_skew_seconds": float("nan")}, "clock_skew_seconds must be a number of seconds above 0"),
    ],
)
def test_a_worker_with_wrong_pairs_does_not_start(
    pairs: list[Pair], change: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Keyring({**knows(pairs[2], web=pairs[0]), **change})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"keys": []}, "keys must be a list"),
        ({"keys": {"a": "b"}}, "keys must be a list"),
        ({"keys": [{"key": "a"}]}, "one of secret, secret_env, secret_file"),
        ({"keys": [{"secret": "x" * 20}]}, "must have a key"),
        ({"keys": [{"key": "a", "secret": "x", "secret_env": "y"}]}, "one of secret"),
        ({"keys": [{"key": "a", "secrets": "x"}]}, "Did you mean 'secret'"),
        ({"keys": [{"key": "a", "secret": ""}]}, "empty secret"),
        ({"keys": [{"key": "a", "secret_env": "NOT_SET_AT_ALL"}]}, "'NOT_SET_AT_ALL' is not set"),
        ({"keys": [{"key": "a", "secret": "x" * 20}], "secret": "y" * 20}, "stands in place of"),
        ({"type": "bearer", "keys": [{"key": "a", "secret": "x" * 20}]}, "is for the type 'signed'"),
    ],
)
def test_wrong_keys_are_told_at_once(value: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match=text) as caught:
        security.link_options({"url": "ws://127.0.0.1:1/", "security": value})
    assert "x" * 20 not in str(caught.value)
