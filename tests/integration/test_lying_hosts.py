"""A hosts file that lies: ``localhost`` is the name of another machine's address.

In a network and a view of the file system of its own, so that the resolver, the hosts file and
the address are real.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fault_helpers import python

PROGRAM = """
import json, socket, subprocess, sys, threading
from wove_ws_sync import security
from wove_ws_sync.timing import Clock
from wove_ws_sync.transport import dial

ip, mount, hosts = sys.argv[1:]
for command in (
    [ip, "link", "set", "lo", "up"],
    [ip, "address", "add", "192.0.2.7/32", "dev", "lo"],
    [mount, "--bind", hosts, "/etc/hosts"],
):
    subprocess.run(command, check=True)
signed = {"security": {"secret": "0123456789abcdef"}}


def outcome(scheme, host="localhost", proxied=False, **config):
    first = []

    def accept():
        peer, _ = server.accept()
        with peer:
            first.append(peer.recv(4).decode("latin-1"))

    with socket.create_server(("192.0.2.7", 0)) as server:
        port = server.getsockname()[1]
        if proxied:
            config["proxy"] = f"http://localhost:{port}"
        thread = threading.Thread(target=accept)
        thread.start()
        options = security.link_options({"url": f"{scheme}://{host}:{port}/", **config})
        try:
            dial(options, security.handshake_headers(options), clock=Clock())
        except Exception as exc:
            error = [type(exc).__name__, str(exc)]
        thread.join()
    return [*error, first[0]]


print(json.dumps({
    "plain": outcome("ws"),
    "plain, signed": outcome("ws", **signed),
    "TLS, no security": outcome("wss"),
    "proxy": outcome("ws", host="127.0.0.1", proxied=True),
    "TLS, signed": outcome("wss", **signed),
    "TLS, signed, pinned": outcome("wss", pinned_keys="sha256//" + "A" * 43 + "=", **signed),
    "insecure": outcome("ws", insecure=True),
}))
"""


def test_localhost_elsewhere_hears_nothing(tmp_path: Path) -> None:
    """Where loopback is what makes a target acceptable, not a byte goes to another address.

    With TLS and a secret the certificate decides, so the TLS handshake begins; with insecure=True
    nothing is asked.
    """
    unshare, ip, mount = (shutil.which(name) for name in ("unshare", "ip", "mount"))
    if not (unshare and ip and mount):
        pytest.skip("needs unshare, ip and mount")
    own = [unshare, "--map-root-user", "--net", "--mount"]
    if subprocess.run([*own, ip, "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.7 localhost\n")
    out, err, status = python(PROGRAM, ip, mount, str(hosts), prefix=own)
    assert (status, err) == (0, "")
    seen = json.loads(out)
    for case in ("plain", "plain, signed", "TLS, no security", "proxy"):
        kind, text, first = seen[case]
        assert (kind, first) == ("ValueError", ""), case
        assert text.startswith("websocket executor uses an insecure network transport. ")
        assert text.endswith("localhost was reached at 192.0.2.7, which is not a loopback address.)")
    for case in ("TLS, signed", "TLS, signed, pinned"):
        assert seen[case][0] != "ValueError"
        assert seen[case][2].startswith("\x16\x03")  # the TLS handshake
    assert seen["insecure"][2] == "GET "
