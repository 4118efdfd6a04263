"""An address book of awkward targets: each is refused for what is wrong in it, local, or not local.

A local one needs no TLS and no secret, so this is the list of what gets by without. A refusal
names its reason; what is not local is refused without TLS and a secret in Wove's own words.
tests/integration/test_lying_hosts.py has the check on the peer that answers.
"""

from __future__ import annotations

from typing import Any

import pytest

from wove_ws_sync import security
from wove_ws_sync.options import LinkOptions
from wove_ws_sync.worker.auth import check_listening

SIGNED = {"secret": "0123456789abcdef"}
NOT_LOCAL = "websocket executor uses an insecure network transport. "
NO_SECURITY = "websocket executor requires executor_config.security for non-local endpoints. "
URL = "must be a ws:// or wss:// URL"
USER, FRAGMENT, CONTROL = "user name or password", "a fragment", "backslash or control characters"
HOST, FORM, LOOK_ALIKE, PORT = "empty or invalid host", "must name the host as", "look-alike", "invalid port"

# What is written, and what is dialled for it.
LOCAL = [
    ("localhost", "localhost"),
    ("LOCALHOST", "localhost"),
    ("LocalHost", "localhost"),
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.2", "127.0.0.2"),
    ("127.255.255.254", "127.255.255.254"),
    ("[::1]", "::1"),
    ("[::01]", "::1"),
    ("[0:0:0:0:0:0:0:1]", "::1"),
    ("[0000:0000:0000:0000:0000:0000:0000:0001]", "::1"),
    ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
    ("[::FFFF:7F00:1]", "::ffff:127.0.0.1"),
    ("[::ffff:127.9.9.9]", "::ffff:127.9.9.9"),
]

ELSEWHERE = [
    # names that a resolver may take for this machine
    ("localhost.", "localhost."),
    ("LOCALHOST.", "localhost."),
    ("a.localhost", "a.localhost"),
    ("localhost.localdomain", "localhost.localdomain"),
    ("localhost.example", "localhost.example"),
    ("localhost6", "localhost6"),
    ("ip6-localhost", "ip6-localhost"),
    ("local_host", "local_host"),
    ("127.0.0.1.example", "127.0.0.1.example"),
    # IPv4 as inet_aton(3) reads it: short, hexadecimal, octal, decimal, padded, with a dot behind it
    ("127.1", "127.1"),
    ("127.0.1", "127.0.1"),
    ("127", "127"),
    ("0", "0"),
    ("0x7f000001", "0x7f000001"),
    ("0X7F000001", "0x7f000001"),
    ("0x7f.0.0.1", "0x7f.0.0.1"),
    ("0x7F.1", "0x7f.1"),
    ("0177.0.0.1", "0177.0.0.1"),
    ("017700000001", "017700000001"),
    ("2130706433", "2130706433"),
    ("127.0.0.01", "127.0.0.01"),
    ("127.000.000.001", "127.000.000.001"),
    ("127.0.0.256", "127.0.0.256"),
    ("127.0.0.1.", "127.0.0.1."),
    # addresses that the kernel may take to this machine, or that hold another
    ("0.0.0.0", "0.0.0.0"),
    ("255.255.255.255", "255.255.255.255"),
    ("[::]", "::"),
    ("[::ffff:0.0.0.0]", "::ffff:0.0.0.0"),
    ("[::ffff:10.0.0.1]", "::ffff:10.0.0.1"),
    ("[::127.0.0.1]", "::7f00:1"),
    ("[64:ff9b::127.0.0.1]", "64:ff9b::7f00:1"),
    ("[2002:7f00:1::]", "2002:7f00:1::"),
    ("[fe80::1]", "fe80::1"),
    # the usual ones
    ("10.0.0.1", "10.0.0.1"),
    ("169.254.169.254", "169.254.169.254"),
    ("Worker.Example", "worker.example"),
    ("bücher.example", "xn--bcher-kva.example"),
    ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
    ("lo\u0441alhost", "xn--loalhost-gch"),  # with a Cyrillic letter
    ("\u0131.example", "xn--cfa.example"),  # a Turkish one
    ("\u0661\u0662\u0667.0.0.1", "xn--9hbcp.0.0.1"),  # Arabic digits
    (f"{'a' * 63}.example", f"{'a' * 63}.example"),
]

REFUSED = [
    # who reads what in front of the host
    ("user@localhost", USER),
    ("user:password@localhost", USER),
    ("@localhost", USER),
    ("localhost@evil.example", USER),
    ("127.0.0.1:80@evil.example", USER),
    ("evil.example#@localhost", FRAGMENT),
    ("localhost#@evil.example", FRAGMENT),
    ("localhost#", FRAGMENT),
    ("evil.example\\@localhost", CONTROL),
    ("localhost\\.evil.example", CONTROL),
    ("localhost\\@evil.example", CONTROL),
    ("\\\\localhost", CONTROL),
    ("evil.example/\\@localhost", CONTROL),
    # characters that end or split a host somewhere
    ("localhost\tevil", CONTROL),
    ("localhost\n", CONTROL),
    ("localhost\r\nHost: evil", CONTROL),
    ("localhost\0", CONTROL),
    ("localhost\x85", CONTROL),
    ("localhost evil.example", HOST),
    ("localhost ", HOST),
    ("localhost,evil.example", HOST),
    ("localhost;evil.example", HOST),
    ("localhost&evil.example", HOST),
    ("localhost|evil.example", HOST),
    ("local%68ost", HOST),
    ("%31%32%37.0.0.1", HOST),
    ("localhost%00.evil.example", HOST),
    ("localhost%2eevil.example", HOST),
    ("127.0.0.1%2f.evil.example", HOST),
    # labels
    ("localhost..", HOST),
    (".localhost", HOST),
    ("a..localhost", HOST),
    (".", HOST),
    ("-localhost", HOST),
    ("localhost-", HOST),
    ("*.localhost", HOST),
    ("$(hostname)", HOST),
    (f"{'a' * 64}.example", HOST),
    (f"{'a.' * 124}example", HOST),
    (f"{'é' * 63}.example", LOOK_ALIKE),
    # characters that fold into others
    ("\u24dbocalhost", LOOK_ALIKE),
    ("\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", LOOK_ALIKE),
    ("\uff11\uff12\uff17.0.0.1", LOOK_ALIKE),
    ("127\u30020\u30020\u30021", LOOK_ALIKE),
    ("localhost\u3002", LOOK_ALIKE),
    ("localhost\uff0eexample", LOOK_ALIKE),
    ("\u2113ocalhost", LOOK_ALIKE),
    ("loca\u017fhost", LOOK_ALIKE),
    ("straße.example", LOOK_ALIKE),
    ("loca\u00adlhost", LOOK_ALIKE),
    ("localhost\u200b", LOOK_ALIKE),
    ("localhost\u202e", LOOK_ALIKE),
    ("localhost\u00a0", LOOK_ALIKE),
    ("[\uff1a:1]", FORM),
    # brackets
    ("[::1%eth0]", FORM),
    ("[::1%25eth0]", FORM),
    ("[fe80::1%lo]", FORM),
    ("[localhost]", FORM),
    ("[127.0.0.1]", HOST),
    ("[::1", FORM),
    ("::1]", FORM),
    ("::1", FORM),
    ("[]", FORM),
    ("[[::1]]", FORM),
    ("[::1]evil.example", FORM),
    ("[::1].evil.example", FORM),
    ("[v1.a]", FORM),
    ("[::g]", FORM),
    ("[::1::]", HOST),
    ("[1:2:3:4:5:6:7:8:9]", HOST),
    # ports
    ("localhost:0", PORT),
    ("localhost:65536", PORT),
    ("localhost:99999999999999999999", PORT),
    ("[::1]:0", PORT),
    ("localhost:-1", FORM),
    ("localhost:+80", FORM),
    ("localhost:8_0", FORM),
    ("localhost:0x50", FORM),
    ("localhost: 80", FORM),
    ("localhost:80:80", FORM),
    ("localhost:\u0668\u0660", FORM),
    ("[::1]80", FORM),
    (":80", HOST),
    # no host at all
    ("", URL),
    ("/localhost", URL),
    ("?localhost", URL),
]


def options_of(scheme: str, authority: str, **config: Any) -> LinkOptions:
    return security.link_options({"url": f"{scheme}://{authority}", **config})


def refusal(scheme: str, authority: str, **config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        options_of(scheme, authority, **config)
    return str(caught.value)


@pytest.mark.parametrize(("written", "dialled"), LOCAL)
def test_local(written: str, dialled: str) -> None:
    """It needs neither TLS nor a secret; then the peer's address is checked as well."""
    for scheme, config in (("ws", {}), ("ws", {"security": SIGNED}), ("wss", {})):
        options = options_of(scheme, written, **config)
        assert options.host == dialled
        assert security.loopback_only(options)
    assert not security.loopback_only(options_of("wss", written, security=SIGNED))


@pytest.mark.parametrize(("written", "dialled"), ELSEWHERE)
def test_not_local(written: str, dialled: str) -> None:
    """It needs both, or insecure=True, and is dialled as it is checked here."""
    assert refusal("ws", written).startswith(NOT_LOCAL)
    assert refusal("ws", written, security=SIGNED).startswith(NOT_LOCAL)
    assert refusal("wss", written).startswith(NO_SECURITY)
    options = options_of("wss", written, security=SIGNED)
    assert options.host == dialled
    assert not security.loopback_only(options)
    assert not security.loopback_only(options_of("ws", written, insecure=True))


@pytest.mark.parametrize(("written", "reason"), REFUSED)
def test_refused(written: str, reason: str) -> None:
    """Whatever else is configured, insecure=True included; the reason does not repeat what was written."""
    for scheme, config in (("ws", {}), ("wss", {"security": SIGNED}), ("ws", {"insecure": True})):
        text = refusal(scheme, written, **config)
        assert text.startswith("executor_config.url ")
        assert reason in text
        assert "evil" not in text and "password@" not in text


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("ws://localhost?@evil.example", "localhost", "/?@evil.example"),
        ("ws://localhost/@evil.example", "localhost", "/@evil.example"),
        ("ws://localhost/..//evil.example", "localhost", "/..//evil.example"),
        ("ws://localhost//evil.example", "localhost", "//evil.example"),
        ("WS://localhost:/", "localhost", "/"),
        ("ws://localhost:0080/", "localhost", "/"),
        ("ws://127.0.0.1:65535/[::1]", "127.0.0.1", "/%5B::1%5D"),
    ],
)
def test_what_stands_behind_the_host_is_the_target(url: str, host: str, target: str) -> None:
    """The first slash or question mark ends the host, for us and for everybody."""
    options = security.link_options({"url": url})
    assert (options.host, options.target) == (host, target)


@pytest.mark.parametrize("behind", ["/@localhost", "?@localhost", "/localhost", "//localhost"])
def test_what_stands_behind_another_host_makes_it_no_local_one(behind: str) -> None:
    """Nor does anything else than the host."""
    assert refusal("ws", f"evil.example{behind}").startswith(NOT_LOCAL)


@pytest.mark.parametrize(
    "url",
    ["", " ", "localhost", "//localhost", "ws:localhost", "ws:/localhost", "ws:///localhost", "ws://",
     "http://localhost", "https://localhost", "ws+unix://localhost", " ws://localhost", "wsss://localhost",
     "ws//localhost", "url:ws://localhost"],
)  # fmt: skip
def test_other_schemes(url: str) -> None:
    """Two schemes, with their two slashes, and nothing in front of them."""
    with pytest.raises((ValueError, TypeError), match=r"must be a (non-empty )?ws:// or wss:// URL"):
        security.link_options({"url": url})


@pytest.mark.parametrize("host", [dialled for _, dialled in ELSEWHERE])
def test_behind_a_proxy(host: str) -> None:
    """A proxy elsewhere makes no target local, and its own name is taken no more kindly."""
    bracketed = f"[{host}]" if ":" in host else host
    assert refusal("ws", "localhost", proxy=f"http://{bracketed}:3128").startswith(NOT_LOCAL)


@pytest.mark.parametrize("host", [dialled for _, dialled in ELSEWHERE])
def test_a_worker_service_does_not_listen_there(host: str) -> None:
    """The same rule on the other side: without TLS and a secret it listens on loopback only."""
    with pytest.raises(ValueError, match="Refusing to listen on"):
        check_listening(host, tls=False, authenticated=True, insecure=False)


@pytest.mark.parametrize("host", [dialled for _, dialled in LOCAL])
def test_a_worker_service_listens_on_loopback(host: str) -> None:
    """With neither of them."""
    check_listening(host, tls=False, authenticated=False, insecure=False)
