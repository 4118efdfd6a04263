"""The checks and commands of the Django app, as ``manage.py`` runs them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django")
import django_host  # first: it sets Django up
import django_work
from django.core.checks import CheckMessage, run_checks
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings
from fault_helpers import WAIT

import wove_ws_sync
from wove_ws_sync.contrib.django.testing import DjangoWorker

GOOD = {"URL": "wss://worker.example/wove", "SECURITY": "env:WOVE_WORKER_SECRET", "DELIVERY_TIMEOUT": 20}
LOCAL = {**GOOD, "URL": "ws://127.0.0.1:8765/wove"}


@pytest.fixture(scope="module", autouse=True)
def environ() -> Iterator[None]:
    with django_host.environ():
        yield


@pytest.fixture(autouse=True)
def secret(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WOVE_WORKER_SECRET", django_host.SECRET)
    yield
    connections.close_all()


def _found(setting: Any, *, deploy: bool = True) -> dict[str, CheckMessage]:
    """Return the app's messages by their ids."""
    with override_settings(WOVE_WS=setting):
        messages = run_checks(tags=["wove_ws"], include_deployment_checks=deploy)
    return {str(message.id): message for message in messages}


@pytest.mark.parametrize("alias", [GOOD, LOCAL, {**GOOD, "ENVIRONMENT": "workers", "PING_INTERVAL": 5}])
def test_what_is_right_is_not_remarked(alias: dict[str, Any]) -> None:
    assert _found({"default": alias}) == {}


# What is set, the id of the one message, the key that it is about, a part of text and remedy.
WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"CA_FIEL": "x"}, "E002", "", "Did you mean 'CA_FILE'?"),
    ({"url": "x"}, "E002", "", "Did you mean 'URL'?"),
    ({"BACKEND": "redis"}, "E002", "", "'websocket', 'immediate'"),
    ({"URL": "http://worker.example"}, "E003", "URL", "must be a ws:// or wss:// URL"),
    ({"PING_INTERVAL": "often"}, "E003", "PING_INTERVAL", "a number of seconds"),
    ({"SECURITY": {"type": "magic"}}, "E003", "SECURITY", "must be one of"),
    ({"SECURITY": {"type": "signed", "secrt": "xxxx"}}, "E003", "SECURITY", "requires a secret"),
    ({"SECURITY": {"type": "bearer"}}, "E003", "SECURITY", "requires a token"),
    (
        {"SECURITY": {"type": "bearer", "token_env": "TOKEN_WITH_NEWLINE"}},
        "E003",
        "SECURITY",
        "control characters",
    ),
    ({"HEADERS": {"X": "xxxx\n"}}, "E003", "HEADERS", "control characters"),
    ({"CONTEXT_VARS": ["nope:nope"]}, "E003", "CONTEXT_VARS", "cannot be imported"),
    ({"DELIVERY_TIMEOUT": -1}, "E004", "DELIVERY_TIMEOUT", "use None for no limit"),
    ({"DELIVERY_ORPHAN_POLICY": "hope"}, "E004", "DELIVERY_ORPHAN_POLICY", "'requeue'"),
    ({"CA_FILE": "/nowhere/ca.pem"}, "E005", "CA_FILE", "No such file"),
    ({"BACKEND": "immediate"}, "E010", "BACKEND", "Set it to 'websocket'"),
    ({"SECURITY": "env:NOT_SET_ANYWHERE"}, "E011", "SECURITY", "NOT_SET_ANYWHERE"),
    ({"INSECURE": True}, "W010", "INSECURE", "Remove it"),
    ({"SECURITY": {"type": "signed", "secret": "x" * 40}}, "W013", "SECURITY", "secret_env"),
    ({"DELIVERY_TIMEOUT": None}, "W014", "DELIVERY_TIMEOUT", "Set it to the seconds"),
    ({"SECURITY": "env:SHORT_SECRET"}, "W015", "SECURITY", "token_urlsafe"),
]


@pytest.mark.parametrize(("change", "number", "key", "remedy"), WRONG, ids=[row[1] for row in WRONG])
def test_each_wrong_setting_is_named_with_its_remedy(
    change: dict[str, Any], number: str, key: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mistake is one message, which names the key and says what to do, and shows no secret."""
    monkeypatch.setenv("SHORT_SECRET", "guess-me")
    monkeypatch.setenv("TOKEN_WITH_NEWLINE", "guess-me\n")
    [(found, message)] = _found({"default": {**GOOD, **change}}).items()
    assert found == f"wove_ws.{number}"
    assert remedy in f"{message.msg} {message.hint}" and message.hint
    place = f"WOVE_WS['default']['{key}']" if key else "WOVE_WS['default']"
    assert message.obj == place and place in message.msg
    assert (
        "executor_config." not in message.msg
        and "guess-me" not in str(message)
        and "xxxx" not in str(message)
    )


def test_no_tls_and_no_security_are_named() -> None:
    """Beyond this machine they are errors, unless INSECURE allows it; on it, the deployment is warned."""
    far = {"URL": "ws://worker.example/wove", "SECURITY": "env:WOVE_WORKER_SECRET", "DELIVERY_TIMEOUT": 1}
    assert set(_found({"default": far})) == {"wove_ws.E003", "wove_ws.W011"}
    assert set(_found({"default": {**far, "INSECURE": True}})) == {"wove_ws.W010", "wove_ws.W011"}
    assert set(_found({"default": {**LOCAL, "SECURITY": None}})) == {"wove_ws.W012"}
    open_door = _found({"default": {**GOOD, "SECURITY": None}})
    assert set(open_door) == {"wove_ws.E003", "wove_ws.W012"}
    assert open_door["wove_ws.E003"].obj == "WOVE_WS['default']['SECURITY']"


def test_a_build_without_secrets_passes_the_ordinary_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WOVE_WORKER_SECRET")
    assert _found({"default": GOOD}, deploy=False) == {}
    assert set(_found({"default": GOOD})) == {"wove_ws.E011"}
    backend = django_work.add.get_backend()
    with override_settings(WOVE_WS={"default": GOOD}):
        assert list(backend.check()) == []


@pytest.mark.parametrize(
    ("options", "number", "text"),
    [
        ({"ALIASS": "default"}, "E020", "Did you mean 'ALIAS'?"),
        ({"ALIAS": "reports"}, "E021", "no alias 'reports'"),
        ({"DELIVERY_TIMEOUT": -1}, "E021", "delivery_timeout must be"),
    ],
)
def test_the_options_of_tasks_are_checked(options: dict[str, Any], number: str, text: str) -> None:
    backend = type(django_work.add.get_backend())("default", {"OPTIONS": options})
    with override_settings(WOVE_WS={"default": GOOD}):
        [message] = backend.check()
    assert message.id == f"wove_ws.{number}" and text in f"{message.msg} {message.hint}"


def test_the_whole_setting_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dictionary, no alias, two aliases with one environment, a variable that sets nothing."""
    assert set(_found(["wss://worker.example"])) == {"wove_ws.E001"}
    assert set(_found({"default": "wss://worker.example"})) == {"wove_ws.E002"}
    assert set(_found({"worker": GOOD})) == {"wove_ws.E002"}
    assert set(_found({})) == {"wove_ws.W001"}
    both = {"default": {**GOOD, "ENVIRONMENT": "w"}, "reports": {**GOOD, "ENVIRONMENT": "w"}}
    assert set(_found(both)) == {"wove_ws.E006"}
    monkeypatch.setenv("WOVE_WS_DEFAULT_CA_FIEL", "x")
    stray = _found({"default": GOOD, "default_ca": GOOD})["wove_ws.W002"]
    assert "WOVE_WS_DEFAULT_CA_FIEL" in stray.msg and "CA_FILE" in str(stray.hint)


def test_a_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WOVE_WS_DEFAULT_URL", "nonsense")
    hint = _found({"default": GOOD})["wove_ws.E003"].hint
    assert "WOVE_WS_DEFAULT_URL" in str(hint)
    monkeypatch.delenv("WOVE_WS_DEFAULT_URL")
    monkeypatch.setenv("WOVE_WS_DEFAULT_SECURITY", '{"type": "signed", "secret": "xxxx')
    message = _found({"default": GOOD})["wove_ws.E002"]
    assert "WOVE_WS_DEFAULT_SECURITY" in message.msg and "xxxx" not in str(message)


# -- commands --------------------------------------------------------------------------------


def _manage(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=django_host.PROJECT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings", **env},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_check_deploy_names_every_wrong_setting_at_once() -> None:
    """``manage.py check --deploy`` in a real project, its variables wrong in three ways."""
    env = {
        "WOVE_WS_DEFAULT_URL": "ws://worker.example/wove",
        "WOVE_WS_DEFAULT_SECURITY": "env:NOT_SET_ANYWHERE",
        "WOVE_WS_DEFAULT_DELIVERY_TIMEOUT": "-3",
    }
    done = _manage("check", "--deploy", env=env)
    assert done.returncode == 1
    for number in ("E003", "E004", "E011", "W011"):
        assert f"(wove_ws.{number})" in done.stderr
    for name in env:
        assert name in done.stderr


@pytest.fixture(scope="module")
def service(environ: None) -> Iterator[DjangoWorker]:
    with DjangoWorker() as worker:
        yield worker


def test_wove_ws_check_goes_the_way_to_the_worker(service: DjangoWorker) -> None:
    """It says the steps of ``wove-ws-sync check`` for an alias, as text or as JSON."""
    out = io.StringIO()
    with service.settings():
        call_command("wove_ws_check", stdout=out)
        assert "handshake   HTTP 101" in out.getvalue()
        out = io.StringIO()
        call_command("wove_ws_check", "default", json=True, stdout=out)
    report = json.loads(out.getvalue())
    assert {step["status"] for step in report["steps"]} <= {"ok", "skip"}


def test_wove_ws_check_says_what_is_wrong(service: DjangoWorker) -> None:
    """The exit code is that of the step; settings that cannot be used are the code 2."""
    for setting, code, text in (
        ({"default": {"URL": "ws://127.0.0.1:1/wove"}}, 11, "the step tcp failed"),
        ({"default": {"URL": service.url}}, 14, "the step handshake failed"),
        ({"default": {"URL": "ws://127.0.0.1:1", "SEAL": "so so"}}, 2, "WOVE_WS['default']['SEAL']"),
        ({"default": {"WHAT": 1}}, 2, "no key 'WHAT'"),
        ({}, 2, "no alias 'default'"),
    ):
        with override_settings(WOVE_WS=setting), pytest.raises(CommandError) as caught:
            call_command("wove_ws_check", stdout=io.StringIO())
        assert caught.value.returncode == code and text in str(caught.value)


def test_wove_ws_worker_serves_the_alias(tmp_path: Path) -> None:
    """Path and secret are the alias's, the project is set up, SIGTERM ends it with 0."""
    variables = {
        "WOVE_WS_DEFAULT_URL": "ws://127.0.0.1:8765/tasks/of/django",
        "WOVE_WS_DEFAULT_SECURITY": json.dumps({"type": "signed", "secret": "in the settings, for a test"}),
    }
    process = subprocess.Popen(
        [sys.executable, "manage.py", "wove_ws_worker", "--port", "0"],
        cwd=django_host.PROJECT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.endswith("/tasks/of/django") and ":8765" not in url
        security = {"type": "signed", "secret": "in the settings, for a test"}
        with wove_ws_sync.WebSocketExecutor(url, security=security) as pool:
            assert pool.submit(django_work.database_name).result(WAIT) == os.environ["DJANGO_DATABASE"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"SECURITY": {"type": "bearer", "token_env": "X"}}, "give --security file:PATH"),
        ({"SECURITY": {"type": "signed", "secret_file": "/nowhere"}}, "give --security file:PATH"),
        ({"SECURITY": {"keys": [{"key": "a", "secret_env": "X"}]}}, "give --security file:PATH"),
        ({"URL": "nonsense"}, r"WOVE_WS\['default'\]\['URL'\] must be"),
    ],
)
def test_wove_ws_worker_needs_an_alias_that_it_can_serve(setting: dict[str, Any], text: str) -> None:
    with override_settings(WOVE_WS={"default": {**LOCAL, **setting}}):
        with pytest.raises(CommandError, match=text):
            call_command("wove_ws_worker", skip_checks=True)
