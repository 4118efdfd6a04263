"""``WebSocketExecutor()`` without a URL takes its settings from ``WOVE_WS_*``, and blames them by name."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import wove

from wove_ws_sync import WebSocketExecutor, _variables
from wove_ws_sync.options import DeliveryOptions, LinkOptions

URL = "ws://127.0.0.1:9/wove"
PAGE = Path(__file__).parents[2] / "docs/reference/options.md"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine is seen."""
    for name in _variables.NAMES.values():
        monkeypatch.delenv(name, raising=False)


def _made(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **settings: Any) -> WebSocketExecutor:
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    pool = WebSocketExecutor(**settings)
    pool.shutdown()
    return pool


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WOVE_WS_SECURITY", "env:SOME_SECRET", "env:SOME_SECRET"),
        ("WOVE_WS_SECURITY", '{"type": "bearer", "token": "t"}', {"type": "bearer", "token": "t"}),
        ("WOVE_WS_PING_INTERVAL", " 2.5 ", 2.5),
        ("WOVE_WS_IDLE_TIMEOUT", "none", None),
        ("WOVE_WS_MAX_REQUEUES", "7", 7),
        ("WOVE_WS_INSECURE", "Yes", True),
        ("WOVE_WS_SEAL", "off", "off"),
        ("WOVE_WS_CONTEXT_VARS", "logging:a, os:b", ("logging:a", "os:b")),
        ("WOVE_WS_CONTEXT_VARS", '["logging:a", "os:b"]', ("logging:a", "os:b")),
    ],
)
def test_a_variable_is_a_setting(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any) -> None:
    """Each kind of text becomes the value that the keyword would have."""
    monkeypatch.setenv("SOME_SECRET", "x" * 40)
    found = _variables.read({name: text}).settings
    options = LinkOptions.from_config({"url": URL, **found})
    kept = getattr(options, name.removeprefix("WOVE_WS_").lower())
    assert (kept.value if name == "WOVE_WS_SECURITY" else kept) == value


def test_headers_are_an_object() -> None:
    found = _variables.read({"WOVE_WS_HEADERS": '{"X-Team": "blue"}'}).settings
    [(name, value)] = LinkOptions.from_config({"url": URL, **found}).headers
    assert (name, value.reveal()) == ("X-Team", "blue")


def test_an_executor_without_a_url_is_made_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = _made(monkeypatch, {
        "WOVE_WS_URL": URL, "WOVE_WS_OPEN_TIMEOUT": "3", "WOVE_WS_DELIVERY_TIMEOUT": "4",
        "WOVE_WS_DELIVERY_CANCEL_MODE": "require_ack", "WOVE_WS_DELIVERY_MAX_IN_FLIGHT": "5",
    })  # fmt: skip
    options, delivery = pool._core.options, pool._delivery
    assert (options.host, options.port, options.open_timeout) == ("127.0.0.1", 9, 3.0)
    assert (delivery.delivery_timeout, delivery.delivery_max_in_flight) == (4, 5)
    assert delivery.delivery_cancel_mode == "require_ack"


def test_an_argument_wins_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WOVE_WS_URL": URL, "WOVE_WS_OPEN_TIMEOUT": "never", "WOVE_WS_PING_INTERVAL": " "}
    with pytest.raises(ValueError, match="WOVE_WS_OPEN_TIMEOUT"):
        _made(monkeypatch, variables)
    pool = _made(monkeypatch, {"WOVE_WS_OPEN_TIMEOUT": "3"}, open_timeout=8.0)
    assert (pool._core.options.open_timeout, pool._core.options.ping_interval) == (8.0, 10.0)


def test_a_url_or_an_environment_leaves_the_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is meant for one worker service, a secret above all, is not used for another."""
    monkeypatch.setenv("WOVE_WS_SECURITY", '{"type": "bearer", "token": "secret"}')
    monkeypatch.setenv("WOVE_WS_URL", "ws://127.0.0.1:10/other")
    far = {"executor": "websocket", "executor_config": {"url": URL}}
    wove.config(default_environment="far", environments={"far": far})
    for arguments in ({"url": URL}, {"environment": "far"}):
        pool = _made(monkeypatch, {}, **arguments)
        assert (pool._core.options.port, pool._core.options.security.mode) == (9, "none")


def test_nothing_at_all_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"executor_config\.url .* WOVE_WS_URL\."):
        WebSocketExecutor()


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("WOVE_WS_URL", "http://127.0.0.1", ValueError),
        ("WOVE_WS_PING_INTERVAL", "-1", ValueError),
        ("WOVE_WS_PING_INTERVAL", "none", TypeError),
        ("WOVE_WS_INSECURE", "perhaps", ValueError),
        ("WOVE_WS_MAX_REQUEUES", "1.5", ValueError),
        ("WOVE_WS_SEAL", "maybe", ValueError),
        ("WOVE_WS_SECURITY", "{canary-4711", ValueError),
        ("WOVE_WS_SECURITY", "canary-4711", ValueError),
        ("WOVE_WS_HEADERS", "canary-4711", ValueError),
        ("WOVE_WS_PINNED_KEYS", "[canary-4711", ValueError),
        ("WOVE_WS_HEADERS", '["canary-4711"]', TypeError),
        ("WOVE_WS_DELIVERY_ORPHAN_POLICY", "forget", ValueError),
        ("WOVE_WS_DELIVERY_TIMEOUT", "soon", ValueError),
    ],
)
def test_what_is_wrong_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, kind: type[Exception]
) -> None:
    """And shows nothing that may be a secret."""
    with pytest.raises(kind) as caught:
        _made(monkeypatch, {"WOVE_WS_URL": URL, name: text})
    assert name in str(caught.value) and "canary" not in str(caught.value)


def test_a_secret_that_is_not_there_names_both_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_SECRET", raising=False)
    with pytest.raises(RuntimeError, match="SOME_SECRET"):
        _made(monkeypatch, {"WOVE_WS_URL": URL, "WOVE_WS_SECURITY": "env:SOME_SECRET"})


def test_a_misspelt_variable_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """But no option of a worker service, no variable of the secret, none of an alias of Django's settings."""
    with caplog.at_level(logging.WARNING, "wove_ws_sync.host"):
        _variables.read({
            "WOVE_WS_PING_INTERVALL": "1", "WOVE_WS_WORKER_PORT": "1", "WOVE_WS_URLS": "x",
            "WOVE_WS_SECURITY": "env:WOVE_WS_URLS", "WOVE_WS_DEFAULT_DELIVERY_HEARTBEAT_SECONDS": "3",
        })  # fmt: skip
    [record] = caplog.records
    assert "WOVE_WS_PING_INTERVALL" in record.getMessage() and "WOVE_WS_PING_INTERVAL?" in record.getMessage()


def test_every_setting_has_its_variable() -> None:
    """All keys and delivery settings but the one that needs the arguments of a run."""
    keys = {field.name for kind in (LinkOptions, DeliveryOptions) for field in dataclasses.fields(kind)}
    assert set(_variables.NAMES) == keys - {"secure", "host", "port", "target", "delivery_idempotency_key"}


def test_the_variables_of_the_page_exist() -> None:
    """reference/options shows variables by way of example; each is one."""
    section = (
        PAGE.read_text(encoding="utf-8").partition("## Environment variables\n")[2].partition("\n## ")[0]
    )
    named = set(re.findall(r"\bWOVE_WS_[A-Z_]*[A-Z]\b", section)) - {"WOVE_WS_WORKER"}
    assert len(named) > 5 and named <= set(_variables.NAMES.values())
