"""Security: which targets are acceptable, what the handshake says, and that secrets stay inside."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import wove
from hypothesis import given, settings
from hypothesis import strategies as st
from wove.environment import WebSocketEnvironmentExecutor

from wove_ws_sync import security
from wove_ws_sync.options import LinkOptions

CANARY = "cAnArY-5ecret-0123456789"
SIGNED = {"secret": CANARY}
BEARER = {"type": "bearer", "token": CANARY}


def refusal(config: dict[str, Any]) -> Exception:
    """Return the error that *config* gets; nothing of it, or behind it, shows the canary."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        security.link_options(config)
    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in "\n".join([repr(error), str(error), *traceback.format_exception(error)])
        error = error.__cause__ or error.__context__
    return caught.value


def verify(headers: dict[str, str], target: str, config: Any) -> None:
    """Check *headers* as a worker service does."""
    wove.NetworkExecutorSecurity.from_config(config).verify_headers(
        headers=headers, transport="websocket", target=target, body=b""
    )


# Local


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:7f00:2", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("127.1", False),
        ("127.0.1", False),
        ("0x7f000001", False),
        ("0x7f.0.0.1", False),
        ("0177.0.0.1", False),
        ("127.0.0.01", False),
        ("2130706433", False),
        ("127.0.0.1.", False),
        ("localhost.", False),
        ("my.localhost", False),
        ("localhost.example", False),
        ("localhost.localdomain", False),
        ("127.0.0.1.example", False),
        ("ⓛocalhost", False),
        ("\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", False),
        ("loca\u0131host", False),
        ("\uff11\uff12\uff17.0.0.1", False),
        ("[::1]", False),
        ("10.0.0.1", False),
        ("", False),
        (" localhost", False),
        ("127.0.0.1\n", False),
    ],
)
def test_local_is_loopback_or_localhost(host: str, local: bool) -> None:
    """Only a loopback address in its usual form, or exactly that one name, is local."""
    assert security.is_local_host(host) is local
    if not host.lower().startswith("l"):
        assert security.is_loopback_address(host) is local


def test_a_name_is_no_loopback_address() -> None:
    """The check on the connected peer takes addresses only."""
    assert not security.is_loopback_address("localhost")


# Who may be dialled


@pytest.mark.parametrize(
    ("config", "only_by_loopback"),
    [
        ({"url": "ws://localhost"}, True),
        ({"url": "ws://127.0.0.9"}, True),
        ({"url": "ws://[::ffff:127.0.0.1]"}, True),
        ({"url": "ws://localhost", "security": SIGNED}, True),
        ({"url": "wss://localhost"}, True),
        ({"url": "wss://localhost", "security": SIGNED}, False),
        ({"url": "wss://workers.internal", "security": SIGNED}, False),
        ({"url": "wss://workers.internal", "security": BEARER}, False),
        ({"url": "ws://workers.internal", "insecure": True}, False),
        ({"url": "wss://workers.internal", "insecure": True}, False),
        ({"url": "ws://localhost", "insecure": True}, False),
        ({"url": "ws://localhost", "proxy": "http://127.0.0.1:3128"}, True),
    ],
)
def test_acceptable_targets(config: dict[str, Any], only_by_loopback: bool) -> None:
    """TLS and authentication, or this machine, or an explicit insecure=True."""
    assert security.loopback_only(security.link_options(config)) is only_by_loopback


@pytest.mark.parametrize(
    "config",
    [
        {"url": "ws://workers.internal"},
        {"url": "ws://workers.internal", "security": SIGNED},
        {"url": "ws://0.0.0.0", "security": SIGNED},
        {"url": "ws://127.1", "security": SIGNED},
        {"url": "ws://localhost.", "security": SIGNED},
        {"url": "wss://workers.internal"},
        {"url": "wss://workers.internal", "security": "none"},
        {"url": "wss://workers.internal", "security": {"type": "none"}, "insecure": False},
        {"url": "wss://localhost.example"},
        {"url": "ws://localhost", "security": {}},
        {"url": "ws://localhost", "security": {"type": "bearer"}},
        {"url": "ws://localhost", "security": {"type": "bearer", "token": ""}},
        {"url": "ws://localhost", "security": "env:"},
        {"url": "ws://localhost", "security": "env:WOVE_WS_SYNC_UNSET"},
        {"url": "ws://localhost", "security": {"secret_env": "WOVE_WS_SYNC_UNSET"}},
        {"url": "ws://localhost", "security": {"type": "bearer", "token_env": "WOVE_WS_SYNC_UNSET"}},
        {"url": "ws://localhost", "security": {"secret": CANARY, "clock_skew_seconds": "soon"}},
    ],
)
def test_refusals_of_wove_stay_word_for_word(config: dict[str, Any]) -> None:
    """Type and text of the error are those of Wove's own executor, asked here and now."""
    start = WebSocketEnvironmentExecutor().start(
        environment_name="e", environment_config=config, run_config={}
    )
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        start.send(None)  # it refuses before it awaits anything
    ours = refusal(config)
    assert (type(ours), str(ours)) == (theirs.type, str(theirs.value))


def test_localhost_behind_a_proxy_is_not_this_machine() -> None:
    """The loopback exemption is for this machine, not for the proxy's."""
    error = refusal({"url": "ws://localhost", "proxy": "http://proxy.internal:3128"})
    assert "insecure network transport" in str(error)


@pytest.mark.parametrize("empty", ["", b""])
def test_empty_secret_is_refused(empty: Any) -> None:
    """A signature with an empty key proves nothing."""
    error = refusal({"url": "ws://localhost", "security": {"secret": empty}})
    assert type(error) is ValueError
    assert "executor_config.security has an empty secret; set 16 random bytes" in str(error)


def test_short_secret_is_accepted() -> None:
    """A secret that Wove accepts goes on working."""
    options = security.link_options({"url": "ws://localhost", "security": {"secret": "x"}})
    verify(security.handshake_headers(options), options.target, {"secret": "x"})


@pytest.mark.parametrize("skew", [0, -1, float("nan"), float("inf")])
def test_clock_skew_is_positive_and_finite(skew: float) -> None:
    """A clock skew under which nothing, or anything, would be valid is refused."""
    error = refusal({"url": "ws://localhost", "security": {**SIGNED, "clock_skew_seconds": skew}})
    assert type(error) is ValueError
    assert "executor_config.security.clock_skew_seconds" in str(error)


@pytest.mark.parametrize(
    "config",
    [
        {"secret": CANARY + "\ud800"},
        {"type": "bearer", "token": CANARY + "\r\nX-Evil: 1"},
        {"type": "bearer", "token": CANARY + "€"},
        {"secret": CANARY, "key": "k\r\nX-Evil: 1"},
    ],
)
def test_security_that_cannot_be_sent_is_refused_unseen(config: dict[str, Any]) -> None:
    """A token or a key id that would break the header, or cannot be encoded, fails at once."""
    assert type(refusal({"url": "ws://localhost", "security": config})) is ValueError


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_two_authorizations_are_refused(name: str) -> None:
    """A bearer token and a header of the same name would overwrite each other."""
    error = refusal({"url": "ws://localhost", "security": BEARER, "headers": {name: f"Basic {CANARY}"}})
    assert type(error) is ValueError
    assert "'Authorization'" in str(error)
    security.link_options({"url": "ws://localhost", "security": SIGNED, "headers": {name: "Basic x"}})


def test_config_checks_come_with_it() -> None:
    """The one door for all faces also makes every check that needs no secret."""
    assert "ping_interval" in str(refusal({"url": "ws://localhost", "ping_interval": "5"}))
    with pytest.raises(TypeError, match="non-empty ws:// or wss:// URL"):
        security.link_options({})


# The handshake


def test_headers_without_security() -> None:
    """An open local target gets the user's headers and our two, nothing else."""
    options = security.link_options(
        {"url": "ws://localhost", "headers": {"X-Team": "a"}, "max_message_bytes": 4096}
    )
    assert security.handshake_headers(options) == {
        "X-Team": "a",
        "X-Wove-Sync": "1",
        "X-Wove-Max-Message": "4096",
    }


@pytest.mark.parametrize("path", ["", "/wove", "/wové x?q=ü[1]&r=%2F", "?a=b", "//a;b/../c"])
def test_signature_covers_the_target_that_is_sent(path: str) -> None:
    """A worker that verifies over the request target it reads accepts ours, and no other target."""
    options = security.link_options({"url": f"ws://localhost{path}", "security": {**SIGNED, "key": "k1"}})
    headers = security.handshake_headers(options)
    verify(headers, options.target, {**SIGNED, "key": "k1"})
    with pytest.raises(PermissionError):
        verify(headers, options.target + "x", {**SIGNED, "key": "k1"})
    with pytest.raises(PermissionError):
        verify(headers, options.target, {"secret": CANARY + "x", "key": "k1"})


def test_every_handshake_is_signed_anew() -> None:
    """Two dials never share a nonce, as the worker would take the second for a replay."""
    options = security.link_options({"url": "ws://localhost", "security": SIGNED})
    verifier = wove.NetworkExecutorSecurity.from_config(SIGNED)
    for _ in range(3):
        verifier.verify_headers(
            headers=security.handshake_headers(options), transport="websocket", target="/", body=b""
        )


def test_bearer_token_is_sent() -> None:
    """A bearer token goes out as Wove sends it."""
    options = security.link_options({"url": "ws://localhost", "security": BEARER})
    headers = security.handshake_headers(options)
    assert headers["Authorization"] == f"Bearer {CANARY}"
    verify(headers, options.target, BEARER)


def test_secret_is_read_at_each_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret rotated in the environment counts from the next handshake on; a missing one is named."""
    monkeypatch.setenv("WOVE_WS_SYNC_TEST", "first-secret-0123")
    options = security.link_options({"url": "ws://localhost", "security": "env:WOVE_WS_SYNC_TEST"})
    verify(security.handshake_headers(options), "/", {"secret": "first-secret-0123"})
    monkeypatch.setenv("WOVE_WS_SYNC_TEST", "other-secret-0123")
    verify(security.handshake_headers(options), "/", {"secret": "other-secret-0123"})
    monkeypatch.delenv("WOVE_WS_SYNC_TEST")
    with pytest.raises(RuntimeError, match="environment variable 'WOVE_WS_SYNC_TEST' is not set"):
        security.handshake_headers(options)


def test_token_that_became_bad_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says later is checked like what it said first."""
    monkeypatch.setenv("WOVE_WS_SYNC_TEST", CANARY)
    options = security.link_options(
        {"url": "ws://localhost", "security": {"type": "bearer", "token_env": "WOVE_WS_SYNC_TEST"}}
    )
    monkeypatch.setenv("WOVE_WS_SYNC_TEST", CANARY + "\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="'Authorization'") as caught:
        security.handshake_headers(options)
    assert CANARY not in repr(caught.value)


@given(st.text(), st.dictionaries(st.text(), st.text(), max_size=3), st.text())
@settings(max_examples=200, deadline=None)
def test_nothing_breaks_out_of_a_header(path: str, headers: dict[str, str], key: str) -> None:
    """Whatever path, headers and key id are made of, each header stays one line of Latin-1."""
    config = {"url": f"ws://localhost/{path}", "headers": headers, "security": {**SIGNED, "key": key}}
    try:
        options = security.link_options(config)
    except (TypeError, ValueError):
        return
    for name, value in security.handshake_headers(options).items():
        assert f"{name}: {value}".encode("latin-1").splitlines() == [f"{name}: {value}".encode("latin-1")]


def test_options_stay_comparable() -> None:
    """Two faces with one config share one link."""
    config = {"url": "ws://localhost", "security": SIGNED}
    assert security.link_options(config) == security.link_options(dict(config))
    assert isinstance(security.link_options(config), LinkOptions)
