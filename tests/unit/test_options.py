"""Options: every key is checked once, with one clear message, and nothing secret is ever shown."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
import string
import sys
import threading
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wove.environment import WebSocketEnvironmentExecutor

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync._address import check_headers
from wove_ws_sync._secrets import Headers, Secret
from wove_ws_sync._security_config import SecurityConfig
from wove_ws_sync.options import DeliveryOptions, LinkOptions

CANARY = "cAnArY-5ecret"
HUGE = 10**5000  # an int whose repr() raises


def build(**config: Any) -> LinkOptions:
    """Return the options for a local URL and *config*."""
    return LinkOptions.from_config({"url": "ws://localhost/wove", **config})


def refusal(config: dict[str, Any]) -> Exception:
    """Return the error that *config* gets."""
    with pytest.raises((TypeError, ValueError)) as caught:
        LinkOptions.from_config(config)
    return caught.value


def shown(error: BaseException) -> str:
    """Return all that a log, a debugger or a chained traceback would show of *error*."""
    texts, seen = [], set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            texts += [repr(each), str(each), repr(each.args), *traceback.format_exception(each)]
            todo += [each.__cause__, each.__context__]
    return "\n".join(texts)


# URL


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ws://host", (False, "host", 80, "/")),
        ("wss://host", (True, "host", 443, "/")),
        ("WSS://Host.Example:8443/Path", (True, "host.example", 8443, "/Path")),
        ("ws://host:8765/wove", (False, "host", 8765, "/wove")),
        ("ws://host:/wove", (False, "host", 80, "/wove")),
        ("ws://host?", (False, "host", 80, "/")),
        ("ws://host?a=b", (False, "host", 80, "/?a=b")),
        ("ws://host/a?b=?c/d", (False, "host", 80, "/a?b=?c/d")),
        ("ws://host//x/../y;p=1", (False, "host", 80, "//x/../y;p=1")),
        ("ws://host/wové x", (False, "host", 80, "/wov%C3%A9%20x")),
        ("ws://host/a%2Fb%20c%zz%", (False, "host", 80, "/a%2Fb%20c%25zz%25")),
        ("ws://host/?q=%3F?[1]&é=\U0001f600", (False, "host", 80, "/?q=%3F?%5B1%5D&%C3%A9=%F0%9F%98%80")),
        ('ws://host/<"^`{|}>', (False, "host", 80, "/%3C%22%5E%60%7B%7C%7D%3E")),
        ("ws://host/a@b:c", (False, "host", 80, "/a@b:c")),
        ("ws://[::1]:9/x", (False, "::1", 9, "/x")),
        ("ws://[2001:DB8:0:0::1]", (False, "2001:db8::1", 80, "/")),
        ("ws://127.0.0.1:1", (False, "127.0.0.1", 1, "/")),
        ("ws://my_worker:65535", (False, "my_worker", 65535, "/")),
        ("ws://Bücher.Example", (False, "xn--bcher-kva.example", 80, "/")),
        ("ws://xn--bcher-kva.example", (False, "xn--bcher-kva.example", 80, "/")),
        ("ws://host.example.", (False, "host.example.", 80, "/")),
    ],
)
def test_url_becomes_one_normal_address(url: str, expected: tuple[bool, str, int, str]) -> None:
    """Scheme and host are normalised, path and query are encoded once, what is encoded stays as it is."""
    options = LinkOptions.from_config({"url": url})
    assert (options.secure, options.host, options.port, options.target) == expected
    assert options.url == url


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("ws://user@host", "user name"),
        ("ws://user:pw@host", "user name"),
        ("ws://@host", "user name"),
        ("ws://host#", "fragment"),
        ("ws://host/x?y#z", "fragment"),
        ("ws://evil.com\\@localhost", "backslash"),
        ("ws://host/a\\b", "backslash"),
        ("ws://ho\tst", "control"),
        ("ws://host/a\r\nX: y", "control"),
        ("ws://host/\x00", "control"),
        ("ws://host/\x7f", "control"),
        ("ws://host/\x85", "control"),
        ("ws://host/\ud800", "control"),
        ("ws://ho st", "host"),
        ("ws:// host", "host"),
        ("ws://host :80", "host"),
        ("ws://ho%73t", "host"),
        ("ws://ho[st", "host"),
        ("ws://[::1", "host"),
        ("ws://::1", "host"),
        ("ws://[::1]x", "host"),
        ("ws://[fe80::1%eth0]", "host"),
        ("ws://[1.2.3.4]", "host"),
        ("ws://[::g]", "host"),
        ("ws://[v1.x]", "host"),
        ("ws://:80", "host"),
        ("ws://.", "host"),
        ("ws://a..b", "host"),
        ("ws://-a", "host"),
        ("ws://a!b", "host"),
        (f"ws://{'a' * 64}", "host"),
        (f"ws://{'a.' * 127}example", "host"),
        ("ws://ⓛocalhost", "look-alike"),
        ("ws://\uff11\uff12\uff17.0.0.1", "look-alike"),
        ("ws://127。0。0。1", "look-alike"),
        ("ws://ä。b", "host"),
        ("ws://straße.example", "look-alike"),
        ("ws://loca\u00adlhost", "look-alike"),
        ("ws://host:0", "port"),
        ("ws://host:65536", "port"),
        ("ws://host:999999", "port"),
        pytest.param(f"ws://host:{'1' * 5000}", "invalid port", id="endless-port"),
        ("ws://host:-1", "host:port"),
        ("ws://host:\uff18\uff10", "host:port"),
        ("ws://host:80:80", "host:port"),
    ],
)
def test_bad_url_is_refused_by_its_part(url: str, part: str) -> None:
    """What two parsers could read in two ways is refused, and the message names the part."""
    error = refusal({"url": url})
    assert type(error) is ValueError
    assert str(error).startswith("executor_config.url ")
    assert part in str(error)


@given(st.one_of(st.text(), st.from_regex(r"[wW]ss?://[^/]{0,30}/?.{0,30}", fullmatch=True)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_sound_address_or_refused(url: str) -> None:
    """No text gets past the checks with anything in it that could end a request line."""
    try:
        options = LinkOptions.from_config({"url": url})
    except (TypeError, ValueError):
        return
    visible = set(string.ascii_letters + string.digits + string.punctuation)
    assert options.target.startswith("/")
    assert set(options.target) <= visible - set('#\\"<>^`{|}[]')
    assert set(options.host) <= set(string.ascii_lowercase + string.digits + "-_.:")
    assert 0 < options.port < 65536
    host = f"[{options.host}]" if ":" in options.host else options.host
    again = f"ws{'s' * options.secure}://{host}:{options.port}{options.target}"
    assert LinkOptions.from_config({"url": again}) == options


# What Wove refuses too


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"url": None},
        {"url": ""},
        {"url": 5},
        {"url": b"ws://localhost"},
        {"url": "http://localhost"},
        {"url": "localhost:80"},
        {"url": "ws:localhost"},
        {"url": "ws:///path"},
        {"url": "ws://localhost", "security": "hunter2"},
        {"url": "ws://localhost", "security": ""},
        {"url": "ws://localhost", "security": 5},
        {"url": "ws://localhost", "security": ["env:X"]},
        {"url": "ws://localhost", "security": {"type": "magic"}},
        {"url": "ws://localhost", "security": {"type": None}},
        {"url": "ws://localhost", "headers": [("A", "b")]},
        {"url": "ws://localhost", "headers": "A: b"},
    ],
)
def test_refusals_of_wove_stay_word_for_word(config: dict[str, Any]) -> None:
    """Type and text of the error are those of Wove's own executor, asked here and now."""
    start = WebSocketEnvironmentExecutor().start(
        environment_name="e", environment_config=config, run_config={}
    )
    with pytest.raises((TypeError, ValueError)) as theirs:
        start.send(None)  # it refuses before it awaits anything
    ours = refusal(config)
    assert (type(ours), str(ours)) == (theirs.type, str(theirs.value))


# Our own keys


def test_defaults_are_the_documented_ones() -> None:
    """A config with nothing but a URL gives the documented defaults."""
    options = build()
    assert dataclasses.asdict(options) == {
        "url": "ws://localhost/wove",
        "secure": False,
        "host": "localhost",
        "port": 80,
        "target": "/wove",
        "headers": (),
        "security": SecurityConfig(),
        "open_timeout": 10.0,
        "insecure": False,
        "ca_file": None,
        "client_cert_file": None,
        "client_key_file": None,
        "server_hostname": None,
        "tls_min_version": "1.2",
        "pinned_keys": None,
        "proxy": None,
        "ping_interval": 10.0,
        "pong_timeout": 5.0,
        "close_timeout": 2.0,
        "idle_timeout": 60.0,
        "max_message_bytes": 268435456,
        "send_buffer_bytes": 67108864,
        "reconnect_initial_delay": 0.1,
        "reconnect_max_delay": 30.0,
        "resume_window": 10.0,
        "max_requeues": 3,
        "cancel_ack_timeout": 10.0,
        "seal": "auto",
        "worker_auth": "auto",
        "result_format": "pickle",
        "context_vars": (),
    }


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("open_timeout", None, 10.0),
        ("open_timeout", 3, 3.0),
        ("open_timeout", Fraction(1, 2), 0.5),
        ("insecure", None, False),
        ("insecure", True, True),
        ("idle_timeout", None, None),
        ("idle_timeout", 0, 0.0),
        ("close_timeout", 0, 0.0),
        ("resume_window", 0, 0.0),
        ("cancel_ack_timeout", 0, 0.0),
        ("ping_interval", threading.TIMEOUT_MAX, threading.TIMEOUT_MAX),
        ("max_message_bytes", 1, 1),
        ("send_buffer_bytes", 2**40, 2**40),
        ("max_requeues", 0, 0),
        ("reconnect_initial_delay", 30, 30.0),
        ("security", None, SecurityConfig("none")),
        ("headers", None, ()),
        ("headers", {}, ()),
        ("headers", {"X-B": 5, "X-A": "é"}, (("X-A", Secret("é")), ("X-B", Secret("5")))),
        ("proxy", None, None),
        ("proxy", "HTTP://Proxy.Example:3128/", Secret("http://proxy.example:3128")),
        ("proxy", "http://me:p%40ss@[::1]:1", Secret("http://me:p%40ss@[::1]:1")),
        ("seal", "off", "off"),
        ("worker_auth", "off", "off"),
        ("result_format", "pickle", "pickle"),
        ("result_format", "json", "json"),
    ],
)
def test_good_values_are_kept_in_one_form(key: str, value: Any, kept: Any) -> None:
    """A value is stored as one type, so that equal settings make equal options."""
    stored = getattr(build(**{key: value}), key)
    assert stored == kept
    assert type(stored) is type(kept)


SECONDS = (
    "open_timeout",
    "ping_interval",
    "pong_timeout",
    "close_timeout",
    "idle_timeout",
    "reconnect_initial_delay",
    "reconnect_max_delay",
    "resume_window",
    "cancel_ack_timeout",
)
NOT_SECONDS: list[Any] = [
    (True, TypeError),
    ("5", TypeError),
    (b"5", TypeError),
    ([5], TypeError),
    (5j, TypeError),
    (-1, ValueError),
    (-0.001, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (1e300, ValueError),
    pytest.param(HUGE, ValueError, id="huge"),
]


NOT_COUNTS: list[tuple[Any, type[Exception]]] = [
    (None, TypeError),
    (True, TypeError),
    (1.0, TypeError),
    ("1", TypeError),
    (-1, ValueError),
    (sys.maxsize + 1, ValueError),
    (HUGE, ValueError),
]


@pytest.mark.parametrize("key", SECONDS)
@pytest.mark.parametrize(("value", "kind"), NOT_SECONDS)
def test_seconds_are_finite_numbers(key: str, value: Any, kind: type[Exception]) -> None:
    """What is no finite span of time is refused with key, value and remedy."""
    error = refusal({"url": "ws://localhost", key: value})
    assert type(error) is kind
    text = "<int>" if value is HUGE else repr(value)
    assert f"executor_config.{key} must be a number of seconds" in str(error)
    assert f"got {text}; leave the key out for the default" in str(error)


@pytest.mark.parametrize(
    "key", ["open_timeout", "ping_interval", "pong_timeout", "reconnect_initial_delay", "reconnect_max_delay"]
)
def test_zero_seconds_are_refused_where_they_mean_nothing(key: str) -> None:
    """A zero that could only spin or fail at once is refused."""
    error = refusal({"url": "ws://localhost", key: 0})
    assert type(error) is ValueError
    assert f"executor_config.{key} must be a number of seconds above 0" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        *((key, value, TypeError) for key in SECONDS[1:] if key != "idle_timeout" for value in (None,)),
        *(
            pytest.param(key, value, kind, id=f"{key}-{kind.__name__}-{number}")
            for key in ("max_message_bytes", "send_buffer_bytes", "max_requeues")
            for number, (value, kind) in enumerate(NOT_COUNTS)
        ),
        ("max_message_bytes", 0, ValueError),
        ("send_buffer_bytes", 0, ValueError),
        *(("insecure", value, TypeError) for value in (1, 0, "true", "false", "")),
        *(
            (key, value, kind)
            for key in ("ca_file", "client_cert_file", "client_key_file")
            for value, kind in [(5, TypeError), (b"/x", TypeError), ("", ValueError), ("a\0b", ValueError)]
        ),
        ("server_hostname", 5, TypeError),
        ("server_hostname", "", ValueError),
        ("server_hostname", "a b", ValueError),
        ("server_hostname", "host:80", ValueError),
        ("server_hostname", "[::1]", ValueError),
        ("server_hostname", "fe80::1%eth0", ValueError),
        ("seal", "on", ValueError),
        ("seal", None, ValueError),
        ("worker_auth", True, ValueError),
        ("result_format", "JSON", ValueError),
        ("result_format", None, ValueError),
    ],
)
def test_bad_values_are_refused_by_key(key: str, value: Any, kind: type[Exception]) -> None:
    """Every other key of ours refuses what it is not, naming itself and the way out."""
    error = refusal({"url": "wss://host", key: value})
    assert type(error) is kind
    assert str(error).startswith(f"executor_config.{key}")
    if key != "server_hostname" or kind is TypeError:
        assert "leave the key out" in str(error)


@pytest.mark.parametrize("key", ["seal", "worker_auth", "result_format"])
def test_a_choice_names_what_there_is(key: str) -> None:
    """A value that is none of the few says which they are."""
    assert "must be one of '" in str(refusal({"url": "ws://localhost", key: "always"}))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("pingg_interval", "Did you mean 'ping_interval'?"),
        ("URL ", "Known are: ca_file, "),
        ("zzz", "Known are: ca_file, "),
        (5, "Known are: ca_file, "),
    ],
)
def test_unknown_key_names_the_nearest(key: Any, hint: str) -> None:
    """A key that nobody reads is an error with a proposal."""
    error = refusal({"url": "ws://localhost", key: 1})
    assert type(error) is ValueError
    assert str(error).startswith(f"executor_config has no key {key!r}. ")
    assert hint in str(error)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("delivery_timout", "Did you mean 'delivery_timeout'?"),
        ("enviroment", "Did you mean 'environment'?"),
        ("open_timout", "Did you mean 'open_timeout'?"),
    ],
)
def test_an_unknown_keyword_of_an_executor_names_the_nearest(key: str, hint: str) -> None:
    """Among all keywords that it takes, not among the keys of executor_config alone."""
    with pytest.raises(ValueError, match=re.escape(f"no key {key!r}. {hint}")):
        WebSocketExecutor("ws://localhost", **{key: 1})


def test_a_delivery_setting_in_executor_config_is_told_its_place() -> None:
    """Its name is right, only the place is wrong."""
    assert "stand beside executor_config" in str(refusal({"url": "ws://localhost", "delivery_timeout": 1}))


@pytest.mark.parametrize("config", [None, [], "ws://localhost", 5])
def test_config_is_a_mapping(config: Any) -> None:
    """Anything but a mapping is a TypeError that says what came."""
    with pytest.raises(TypeError, match="executor_config must be a dictionary, got "):
        LinkOptions.from_config(config)


def test_tls_files_are_paths_kept_as_text(tmp_path: Path) -> None:
    """Paths may be path objects; whether they exist is a question for the dial."""
    missing = tmp_path / "missing.pem"
    options = LinkOptions.from_config(
        {
            "url": "wss://host",
            "ca_file": missing,
            "client_cert_file": str(missing),
            "client_key_file": missing,
            "server_hostname": "Other.Example",
        }
    )
    assert options.ca_file == options.client_cert_file == options.client_key_file == str(missing)
    assert options.server_hostname == "other.example"
    assert LinkOptions.from_config({"url": "wss://h", "server_hostname": "::1"}).server_hostname == "::1"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"url": "wss://h", "client_key_file": "k"}, "client_key_file needs"),
        ({"url": "ws://h", "ca_file": "c"}, "ca_file needs TLS; use a wss:// URL"),
        ({"url": "ws://h", "client_cert_file": "c"}, "client_cert_file needs TLS; use a wss:// URL"),
        (
            {"url": "ws://h", "client_cert_file": "c", "client_key_file": "k"},
            "client_cert_file needs TLS; use a wss:// URL",
        ),
        ({"url": "ws://h", "server_hostname": "c"}, "server_hostname needs TLS; use a wss:// URL"),
        ({"url": "ws://h", "reconnect_initial_delay": 31}, "reconnect_max_delay must be at least"),
        ({"url": "ws://h", "reconnect_max_delay": 0.05}, "reconnect_max_delay must be at least"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(config: dict[str, Any], text: str) -> None:
    """A key that would have no effect beside the others is an error, not a surprise."""
    error = refusal(config)
    assert type(error) is ValueError
    assert f"executor_config.{text}" in str(error)


@pytest.mark.parametrize(
    "proxy",
    [
        5,
        b"http://h:1",
        "",
        "h:1",
        "http://h",
        "http://h:",
        "http://h:0",
        "http://:1",
        "http://h:1/path",
        "http://h:1?q",
        "http://h:1#f",
        "https://h:1",
        "socks5://h:1",
        f"https://u:{CANARY}@h:1",
        f"http://u:{CANARY}@h",
        f"http://u:{CANARY}@h:99999",
        f"http://u:{CANARY}@-h:1",
        f"http://u:{CANARY}@a@h:1",
        f"http://u:{CANARY}/@h:1",
        f"http://u:{CANARY} @h:1",
        f"http://u:{CANARY}é@h:1",
        f"http://u:{CANARY}\r\n@h:1",
        f"http://u:{CANARY}%zz@h:1",
    ],
)
def test_bad_proxy_is_refused_unseen(proxy: Any) -> None:
    """Only a plain HTTP proxy is taken, and its credentials are in no error."""
    error = refusal({"url": "ws://h", "proxy": proxy})
    assert str(error).startswith("executor_config.proxy ")
    assert CANARY not in shown(error)


def test_proxy_address_is_free_of_credentials() -> None:
    """The address of the proxy can be had, and logged, without its password."""
    assert build().proxy_address is None
    assert build(proxy=f"http://u:{CANARY}@[::1]:3128").proxy_address == ("::1", 3128)


# Headers


@pytest.mark.parametrize("name", ["", "A B", "A:", "A\r\nB", "Ä", "A\0", "(A)", 'A"', "A\n"])
def test_bad_header_name_is_refused(name: str) -> None:
    """A header name is a token of RFC 9110."""
    error = refusal({"url": "ws://h", "headers": {name: CANARY}})
    assert repr(name) in str(error)
    assert CANARY not in shown(error)


@pytest.mark.parametrize("tail", ["\r\nX-Evil: 1", "\n", "\r", "\0", "\t", "\x7f", "\x85", "€", "\ud800"])
def test_bad_header_value_is_refused_unseen(tail: str) -> None:
    """A value that could end the header, or not be sent, is refused by the name of its header."""
    error = refusal({"url": "ws://h", "headers": {"X-Token": CANARY + tail}})
    assert type(error) is ValueError
    assert "'X-Token'" in str(error)
    assert CANARY not in shown(error)


@pytest.mark.parametrize(
    "name",
    [
        "Host",
        "HOST",
        "Connection",
        "Upgrade",
        "Content-Length",
        "transfer-encoding",
        "Sec-WebSocket-Key",
        "sec-fetch-mode",
        "Sec-",
        "X-Wove-Signature",
        "x-wove-sync",
    ],
)
def test_headers_of_the_handshake_are_not_the_users(name: str) -> None:
    """A user's header cannot replace one that the handshake or the signature is made of."""
    error = refusal({"url": "ws://h", "headers": {name: CANARY}})
    assert repr(name) in str(error)
    assert CANARY not in shown(error)


def test_a_header_comes_once() -> None:
    """Two spellings of one name are refused, as one of them would win by chance."""
    assert "'x-a' twice" in str(refusal({"url": "ws://h", "headers": {"X-A": "1", "x-a": "2"}}))


@given(st.dictionaries(st.text(), st.text()))
@settings(max_examples=300, deadline=None)
def test_any_headers_are_sound_or_refused(headers: dict[str, str]) -> None:
    """No dictionary of text gets anything past the checks that could become a second header."""
    try:
        pairs = [(name, value.reveal()) for name, value in build(headers=headers).headers]
    except ValueError:
        return
    assert dict(pairs) == headers
    for name, value in pairs:
        line = f"{name}: {value}".encode("latin-1")
        assert line.splitlines() == [line]
        assert not any(byte < 32 or 127 <= byte < 160 for byte in line)


@given(st.text(), st.text())
@settings(max_examples=300, deadline=None)
def test_check_header_lets_one_line_through(name: str, value: str) -> None:
    """What passes is exactly one line, by every notion of a line."""
    try:
        check_headers(Headers({name: value}))
    except ValueError:
        return
    assert f"{name}: {value}".splitlines() == [f"{name}: {value}"]


# Equality, repr, pickle


def test_equal_settings_are_one_key() -> None:
    """Options are values: the spelling of a URL and the order of a dict make no second link."""
    one = LinkOptions.from_config(
        {"url": "WS://LOCALHOST:80/a b", "headers": {"A": "1", "B": "2"}, "open_timeout": 5}
    )
    other = LinkOptions.from_config(
        {"url": "ws://localhost/a%20b", "headers": {"B": "2", "A": "1"}, "open_timeout": 5.0}
    )
    assert one == other
    assert len({one, other}) == 1
    assert one != dataclasses.replace(one, port=81)


def test_options_are_frozen() -> None:
    """Neither options nor what they hold can be changed behind a link's back."""
    config = {"url": "ws://localhost", "headers": {"A": "1"}, "security": {"secret": "s" * 16}}
    options = LinkOptions.from_config(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.port = 1  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        options.security.mode = "none"
    options.security.value["secret"] = "other"
    config["security"]["secret"] = "other"  # type: ignore[index]
    assert options.security.value == {"secret": "s" * 16}


@pytest.mark.parametrize(
    "config",
    [
        {"security": {"secret": CANARY}},
        {"security": {"secret": CANARY.encode()}},
        {"security": {"type": "bearer", "token": CANARY}},
        {"headers": {"Authorization": f"Bearer {CANARY}"}},
        {"headers": {"Cookie": CANARY}},
        {"proxy": f"http://user:{CANARY}@h:1"},
        {"url": f"ws://localhost/wove?token={CANARY}"},
    ],
)
def test_secrets_are_in_no_repr(config: dict[str, Any]) -> None:
    """Options can be logged: whatever may be a secret is left out."""
    options = build(**config)
    for text in (repr(options), str(options), f"{options}", repr(options.security), repr({options: 1})):
        assert CANARY not in text
        assert CANARY.encode().hex() not in text


def test_repr_says_what_is_special() -> None:
    """The repr shows where it goes, how it is authenticated and what differs from the defaults."""
    options = LinkOptions.from_config(
        {
            "url": "WSS://[::1]/wove?x=1",
            "security": "env:WORKER_SECRET",
            "headers": {"X-Team": "a"},
            "proxy": "http://u:p@proxy:3128",
            "ping_interval": 3,
        }
    )
    assert repr(options) == (
        "LinkOptions(url='wss://[::1]:443/wove?...', security=SecurityConfig('env:WORKER_SECRET'), "
        "headers=['X-Team'], proxy_address=('proxy', 3128), ping_interval=3.0)"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "SecurityConfig('none')"),
        ("none", "SecurityConfig('none')"),
        ({"type": "none", "secret": CANARY}, "SecurityConfig('none')"),
        ("env:NAME", "SecurityConfig('env:NAME')"),
        ({"secret": CANARY}, "SecurityConfig(type='signed', key='default')"),
        ({"type": "signed", "secret": CANARY, "key": 7}, "SecurityConfig(type='signed', key='7')"),
        ({"type": "bearer", "token": CANARY}, "SecurityConfig(type='bearer')"),
    ],
)
def test_security_repr_is_safe(value: Any, text: str) -> None:
    """The holder shows how, never with what."""
    assert repr(SecurityConfig(value)) == text


def test_security_is_compared_by_content() -> None:
    """Two holders are equal if, and only if, what they hold is."""
    one = SecurityConfig({"type": "signed", "secret": "a" * 16})
    assert one == SecurityConfig({"secret": "a" * 16, "type": "signed"})
    assert hash(one) == hash(SecurityConfig({"secret": "a" * 16, "type": "signed"}))
    assert one != SecurityConfig({"type": "signed", "secret": "b" * 16})
    assert one != SecurityConfig({"type": "signed", "secret": b"a" * 16})
    assert one != SecurityConfig("env:A")
    assert SecurityConfig("env:A") == SecurityConfig("env:A") != SecurityConfig("env:B")
    assert SecurityConfig(None) == SecurityConfig("none") == SecurityConfig({"type": "none"})
    assert one != "SecurityConfig(type='signed', key='default')"
    assert len({one, SecurityConfig({"type": "signed", "secret": "b" * 16})}) == 2


class Masked(str):
    """Text that hides itself, as settings libraries have it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'****'"

    __str__ = __repr__


def test_masked_secrets_are_not_all_equal() -> None:
    """A str that shows asterisks is held by its content: other secret, other link."""
    one, other = (SecurityConfig({"secret": Masked(text)}) for text in ("a" * 16, "b" * 16))
    assert one != other
    assert one.value == {"secret": "a" * 16}
    assert type(one.value["secret"]) is str


@pytest.mark.parametrize("secret", [object(), ["s"], {"s": 1}, bytearray(b"s")])
def test_security_holds_plain_values_only(secret: Any) -> None:
    """An object whose str() is anybody's guess is no secret, and the refusal does not show it."""
    error = refusal({"url": "ws://h", "security": {"secret": secret, "token": CANARY}})
    assert type(error) is TypeError
    assert "executor_config.security['secret']" in str(error)
    assert repr(secret) not in shown(error)
    assert CANARY not in shown(error)


@pytest.mark.parametrize(
    "value", [CANARY, {"type": CANARY, "secret": CANARY}, (CANARY,), {5: 1, "secret": CANARY}]
)
def test_bad_security_is_refused_unseen(value: Any) -> None:
    """A secret in the wrong place is not printed by the error that says so."""
    assert CANARY not in shown(refusal({"url": "ws://h", "security": value}))


def test_secrets_do_not_travel() -> None:
    """Neither the holder nor options with one can be pickled; copies are the same object."""
    options = build(security={"secret": CANARY})
    for thing in (options, options.security, [options], SecurityConfig(None)):
        with pytest.raises(TypeError, match="not pickled") as caught:
            pickle.dumps(thing)
        assert CANARY not in shown(caught.value)
    assert copy.copy(options.security) is options.security
    assert copy.deepcopy(options) == options


# Delivery


@pytest.mark.parametrize("key", ["delivery_timeout", "delivery_heartbeat_seconds"])
@pytest.mark.parametrize(("value", "kind"), [*NOT_SECONDS, (0, ValueError), (0.0, ValueError)])
def test_f30_delivery_times_are_positive_and_finite(key: str, value: Any, kind: type[Exception]) -> None:
    """What is no span of time is refused before anything is sent, however it comes."""
    ways: list[Callable[..., Any]] = [
        DeliveryOptions,
        DeliveryOptions().replace,
        lambda **given: DeliveryOptions.from_mapping(given),
    ]
    for make in ways:
        with pytest.raises(kind) as caught:
            make(**{key: value})
        assert type(caught.value) is kind
        text = "<int>" if value is HUGE else repr(value)
        assert str(caught.value).startswith(f"{key} must be a number of seconds above 0")
        assert str(caught.value).endswith(f"got {text}; use None for no limit.")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, TypeError), (1.0, TypeError), ("1", TypeError), (0, ValueError), (-1, ValueError)],
)
def test_max_in_flight_is_a_count(value: Any, kind: type[Exception]) -> None:
    """A limit of runs in flight is a whole number from 1 up."""
    with pytest.raises(kind, match="delivery_max_in_flight must be a whole number from 1 up, got ") as caught:
        DeliveryOptions(delivery_max_in_flight=value)
    assert type(caught.value) is kind


@pytest.mark.parametrize("value", ["never", "", None, 5, ["cancel"], True])
def test_modes_and_policies_are_woves(value: Any) -> None:
    """The texts for the two choices are Wove's."""
    with pytest.raises(ValueError) as mode:
        DeliveryOptions(delivery_cancel_mode=value)
    assert str(mode.value) == "delivery_cancel_mode must be one of: 'best_effort', 'require_ack'"
    with pytest.raises(ValueError) as policy:
        DeliveryOptions(delivery_orphan_policy=value)
    assert str(policy.value) == "delivery_orphan_policy must be one of: 'cancel', 'detach', 'fail', 'requeue'"


def test_delivery_of_a_frame_is_read_leniently() -> None:
    """None and fields that mean nothing here are passed over; times stay as they were given."""
    options = DeliveryOptions.from_mapping(
        {
            "delivery_timeout": 5,
            "delivery_heartbeat_seconds": None,
            "delivery_orphan_policy": "fail",
            "attempt": 2,
        }
    )
    assert options == DeliveryOptions(delivery_timeout=5, delivery_orphan_policy="fail")
    assert str(options.delivery_timeout) == "5"
    assert DeliveryOptions.from_mapping({}) == DeliveryOptions()
    assert type(DeliveryOptions(delivery_timeout=Fraction(1, 2)).delivery_timeout) is float  # type: ignore[arg-type]


def test_replace_changes_what_exists() -> None:
    """A copy gets the changes, the original stays, an unknown setting is named with its nearest."""
    base = DeliveryOptions(delivery_timeout=5.0)
    changed = base.replace(delivery_timeout=None, delivery_max_in_flight=2)
    assert (base.delivery_timeout, changed.delivery_timeout, changed.delivery_max_in_flight) == (5.0, None, 2)
    with pytest.raises(TypeError, match=r"'delivery_timout'. Did you mean 'delivery_timeout'\?"):
        base.replace(delivery_timout=1)


def test_frame_carries_what_is_set() -> None:
    """The wire gets Wove's five fields, none of them None, and never the local limit."""
    assert DeliveryOptions(delivery_max_in_flight=3).as_frame({}) == {
        "delivery_cancel_mode": "best_effort",
        "delivery_orphan_policy": "cancel",
    }
    full = DeliveryOptions(
        delivery_timeout=1,
        delivery_heartbeat_seconds=0.5,
        delivery_cancel_mode="require_ack",
        delivery_orphan_policy="requeue",
        delivery_idempotency_key="k",
    )
    assert full.as_frame({}) == {
        "delivery_timeout": 1,
        "delivery_idempotency_key": "k",
        "delivery_cancel_mode": "require_ack",
        "delivery_heartbeat_seconds": 0.5,
        "delivery_orphan_policy": "requeue",
    }


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, None),
        ("plain", "plain"),
        ("order-{order}", "order-7"),
        ("order-{missing}", "order-{missing}"),
        (7, "7"),
        (("a", 1), "('a', 1)"),
        (lambda args: args["order"], "7"),
        (lambda args: None, "None"),
    ],
)
def test_idempotency_key_becomes_text_as_in_wove(key: Any, expected: str | None) -> None:
    """A key is text with the arguments in it, a function of them, or anything with a str()."""
    frame = DeliveryOptions(delivery_idempotency_key=key).as_frame({"order": 7})
    assert frame.get("delivery_idempotency_key") == expected


def test_idempotency_key_may_take_the_arguments_by_name() -> None:
    """A function written with the task's own parameters is called with them."""

    def by_name(order: int, *, user: str) -> str:
        return f"{user}-{order}"

    frame = DeliveryOptions(delivery_idempotency_key=by_name).as_frame({"order": 7, "user": "u"})
    assert frame["delivery_idempotency_key"] == "u-7"
