"""docs/howto/set-up-tls, followed from top to bottom, with another port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fault_helpers import WAIT

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "set-up-tls.md"


def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    """Every command and the program do what the page says, in its order."""
    text = PAGE.read_text(encoding="utf-8").replace(":8765", ":$PORT")
    commands = re.findall(r"^\$ (.+)$", text, re.MULTILINE)
    make, secret, worker, check, show, pin, renew = commands
    assert "worker --security" in worker
    [program] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program = program.replace(":$PORT/", ':" + os.environ["PORT"] + "/')
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    script = [
        "set -eu",
        make,
        secret,
        "exec 3< <(exec timeout 60 " + worker + " --port 0 --log-level error)",
        "trap 'kill $!' EXIT",
        "read -r url <&3",
        "PORT=${url##*:}; export PORT=${PORT%%/*}",
        "echo; echo == url; echo $url",
        "echo == check",
        check,
        "echo == program",
        "python program.py",
        "echo == pin",
        show,
        pin,
        "echo == renew",
        renew,
        "python program.py",
    ]
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parts = dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])
    assert re.fullmatch(r"wss://127\.0\.0\.1:\d+/wove\n?", parts["url"])
    steps = [line.split()[:2] for line in parts["check"].splitlines()]
    assert {status for status, name in steps if name != "proxy"} == {"ok"}
    assert re.fullmatch(r"\d+\n?", parts["program"])
    pins = re.findall(r"[A-Za-z0-9+/]{43}=", parts["pin"])
    assert len(pins) == 2 and pins[0] == pins[1]
    assert f"pin sha256//{pins[0]}" in parts["renew"]
    assert parts["renew"].splitlines()[-1] == parts["program"].strip()
