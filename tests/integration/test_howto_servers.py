"""What the pages on gunicorn, uWSGI and gevent show runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_helpers import until
from script_host import PATIENCE
from web_server import WebServer, hosts, surroundings

from wove_ws_sync.testing import LoopbackWorker

PAGES = Path(__file__).parent.parent.parent / "docs" / "howto"
SCRIPTS = Path(sys.executable).parent
_BLOCK = re.compile(r"^```(\w+)\n(?:# (\S+\.\w+)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return language, file name ("" for none) and text of what a page shows."""
    return [
        (kind, name or "", text) for kind, name, text in _BLOCK.findall((PAGES / page).read_text("utf-8"))
    ]


def commands() -> list[tuple[str, str]]:
    """Return the commands that the pages show, each with its page."""
    pages = ("run-under-gunicorn.md", "run-under-uwsgi.md", "use-gevent.md")
    found = [
        (page, line)
        for page in pages
        for kind, _, text in blocks(page)
        if kind == "sh"
        for line in text.splitlines()
    ]
    assert len(found) == 6
    return found


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker() as running:
        yield running


def lay_out(folder: Path, page: str) -> None:
    """Write the files of a page; one that another page shows comes from there."""
    for _, name, text in [*blocks("run-under-gunicorn.md"), *blocks(page)]:
        if name:
            (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_server_of_a_page_serves_and_ends(
    tmp_path: Path, worker: LoopbackWorker, page: str, line: str
) -> None:
    """Each command serves the application of its page; SIGTERM ends it, and its connections with it."""
    program, *args = shlex.split(line)
    if not (SCRIPTS / program).exists():
        pytest.skip(f"{program} is not installed")
    lay_out(tmp_path, page)
    if program == "uwsgi":
        ini = tmp_path / "uwsgi.ini"
        ini.write_text(ini.read_text("utf-8").replace("127.0.0.1:8000", "fd://FD"), encoding="utf-8")
        args += ["--home", sys.prefix]  # an environment of one's own
    else:
        args += ["--bind", "fd://FD"]
    with WebServer(tmp_path, [str(SCRIPTS / program), *args], worker, files=["uwsgi.ini"]) as server:
        until(lambda: _used_by_both(server, worker))
        status, log = server.stop()
    assert status == 0 and "Traceback" not in log, log
    until(lambda: hosts(worker)[0] == 0)


def _used_by_both(server: WebServer, worker: LoopbackWorker) -> bool:
    """Send requests; tell whether both processes have answered: uWSGI's do not hear a signal before that."""
    assert server.ask_all(["/"] * 8) == [{"power": 1024, "total": 45}] * 8
    connected = hosts(worker)[0]
    assert 1 <= connected <= 2
    return connected == 2


def test_the_program_of_the_page_on_gevent(tmp_path: Path, worker: LoopbackWorker) -> None:
    """A hundred greenlets get their results."""
    pytest.importorskip("gevent")
    lay_out(tmp_path, "use-gevent.md")
    done = subprocess.run(
        [sys.executable, "fetch.py"],
        cwd=tmp_path,
        env=surroundings(worker, tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{sum(n * n for n in range(100))}{os.linesep}", "")


def test_the_errors_of_the_pages_are_those_of_the_package() -> None:
    """What the page on uWSGI quotes is what is raised."""
    source = (Path(__file__).parent.parent.parent / "wove_ws_sync" / "session.py").read_text("utf-8")
    text = next(text for kind, _, text in blocks("run-under-uwsgi.md") if kind == "text")
    said = "".join(re.findall(r'"(.*?)"\n', source[source.index("has_threads") :]))
    assert text.strip().removeprefix("RuntimeError: ") in said
