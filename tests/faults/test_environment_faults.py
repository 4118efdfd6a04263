"""What the environment of a process may bring along: proxies, key logs, the library's trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_helpers import python
from ws_peer import Listener, Peer

from wove_ws_sync.testing import LoopbackWorker

HOST = """
    import logging, sys
    import websocket
    from wove_ws_sync import WebSocketExecutor

    url, secret, ca_file = sys.argv[1:4]
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    websocket.enableTrace(True)

    def shout(word):
        return word[::-1]

    config = {
        "url": url,
        "security": {"type": "signed", "secret": secret},
        "headers": {"X-Api-Key": "canary-header", "Authorization": "Bearer canary-token"},
    }
    if ca_file:
        config["ca_file"] = ca_file
    with WebSocketExecutor(**config) as pool:
        print(pool.submit(shout, "canary-argument").result(30))
        print(repr(pool))
        try:
            pool.submit(divmod, 1, 0).result(30)
        except ZeroDivisionError as exc:
            print(repr(exc))
    wrong = {**config, "security": {"type": "signed", "secret": "canary-secret-that-is-wrong"}}
    with WebSocketExecutor(**wrong) as pool:
        print(repr(pool.submit(shout, "canary-argument").exception(30)))
"""

CANARIES = ("canary-header", "canary-token", "canary-argument", "canary-secret", "canary-proxy")


@pytest.mark.parametrize("tls", [False, True], ids=["ws", "wss"])
def test_f43_an_environment_that_meddles(tls: bool, tmp_path: Path) -> None:
    """No proxy is asked, key log and trace are named in a warning, and no secret is in any output."""
    seen: list[bytes] = []

    def proxy_script(peer: Peer) -> None:
        seen.append(peer.sock.recv(100))

    with LoopbackWorker(workers=2, tls=tls) as worker, Listener(proxy_script) as proxy:
        address = f"http://me:canary-proxy@127.0.0.1:{proxy.port}"
        names = ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy")
        env = dict.fromkeys((*names, *map(str.upper, names)), address)
        env.update(no_proxy="", NO_PROXY="", SSLKEYLOGFILE=str(tmp_path / "keys"))
        env.update(WEBSOCKET_CLIENT_CA_BUNDLE=str(tmp_path / "nothing.pem"))
        secret = (worker.security or {})["secret"]
        out, err, status = python(HOST, worker.url, secret, worker.ca_file or "", env=env)
        assert status == 0, err
        lines = out.splitlines()
        assert lines[0] == "tnemugra-yranac"
        assert lines[2].startswith("ZeroDivisionError")
        assert "AuthenticationRejected" in lines[3]
        assert (proxy.accepted, seen) == (0, [])
        for secret_word in (secret, *CANARIES):
            assert secret_word not in out + err
        warnings = [line for line in err.splitlines() if line.startswith("WARNING:wove_ws_sync.host:")]
        assert sum("enableTrace" in line for line in warnings) == 2  # at each dial
        assert sum("SSLKEYLOGFILE" in line for line in warnings) == (2 if tls else 0)


def test_f43_a_proxy_that_is_configured_is_used() -> None:
    """It is asked once, by its own address; what the environment names is not."""
    code = """
        import sys
        from wove_ws_sync import WebSocketExecutor
        with WebSocketExecutor("ws://127.0.0.1:9/wove", proxy=sys.argv[1], insecure=True) as pool:
            print(repr(pool.submit(len, "123").exception(30)))
    """
    requests: list[str] = []

    def refuse(peer: Peer) -> None:
        requests.append(peer.read_request().splitlines()[0])
        peer.send(b"HTTP/1.1 403 No\r\n\r\n")

    with Listener(refuse) as configured, Listener(lambda peer: peer.sock.recv(1)) as other:
        env = {"http_proxy": f"http://127.0.0.1:{other.port}"}
        address = f"http://me:canary-proxy@127.0.0.1:{configured.port}"
        out, err, status = python(code, address, env=env)
        assert (err, status) == ("", 0)
        assert "ConnectionError" in out and "403" in out and "canary" not in out
        assert requests == ["CONNECT 127.0.0.1:9 HTTP/1.1"]
        assert other.accepted == 0
