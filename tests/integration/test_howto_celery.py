"""docs/howto/celery and docs/howto/migrate-from-celery-get, with a broker of files in place of Redis."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from celery_worker import CeleryWorker, celery_worker, connections
from fault_helpers import WAIT, search_path

from wove_ws_sync import AuthenticationRejected
from wove_ws_sync.contrib.celery import WoveWSTask
from wove_ws_sync.testing import LoopbackWorker

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
SECRET = "WOVE_WORKER_SECRET"
# What takes the place of Redis on the pages.
SETTINGS = """
import json, os, celery_files
app.conf.update(json.loads(os.environ["WOVE_WS_TEST_CELERY"]))
"""


def write_modules(page: str, folder: Path, url: str) -> None:
    """Write every module of the page, by the name in its first line, with *url* for the worker service."""
    text = (HOWTO / page).read_text("utf-8").replace("ws://127.0.0.1:8765/wove", url)
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        settled = re.sub(r"^(app = Celery\(.*\))$", rf"\1{SETTINGS}", code, flags=re.MULTILINE)
        (folder / name).write_text(settled, "utf-8")


def test_celery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of the page run in a real worker, on one connection."""
    monkeypatch.syspath_prepend(tmp_path)  # the worker service finds prices.py there
    with LoopbackWorker() as service:
        write_modules("celery.md", tmp_path, service.url)
        assert service.security is not None
        env = {SECRET: service.security["secret"]}
        settings = {"url": service.url, "security": f"env:{SECRET}"}
        with celery_worker(tmp_path, settings, "-c", "1", app="shop", env=env) as worker:
            assert worker.run("total", [2, 5], [3, 1]) == 11
            assert worker.run("single", 4, 5) == 20
            assert worker.run("offer", 7, 2) == "14 for 2 of 93"
        assert connections(service) == 1


def test_the_tests_of_the_page(tmp_path: Path) -> None:
    """Test code written as the page says passes, without a broker and without warnings."""
    write_modules("celery.md", tmp_path, "ws://127.0.0.1:8765/wove")
    shop = tmp_path / "shop.py"
    shop.write_text(shop.read_text("utf-8").replace(SETTINGS, ""), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_shop.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={**os.environ, SECRET: "s" * 32},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_retries_are_those_of_the_page() -> None:
    """The table of howto/celery has every setting of ``WoveWSTask`` with its value."""
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)`", (HOWTO / "celery.md").read_text("utf-8"), re.MULTILINE)
    known = {"AuthenticationRejected": AuthenticationRejected}
    own = {name: value for name, value in vars(WoveWSTask).items() if "retr" in name}
    assert own == {name: eval(value, known) for name, value in rows}


def test_migrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs of the page do the same."""
    monkeypatch.syspath_prepend(tmp_path)
    with LoopbackWorker() as service:
        write_modules("migrate-from-celery-get.md", tmp_path, service.url)
        assert service.security is not None
        with celery_worker(tmp_path, service.config, "-c", "1", app="before") as worker:
            before = ask(tmp_path, "before", worker)
        monkeypatch.setenv(SECRET, service.security["secret"])
        assert ask(tmp_path, "after") == before == "<p>3</p>\n<p>0</p><p>1</p>\n"


def ask(folder: Path, module: str, worker: CeleryWorker | None = None) -> str:
    """Return what the two functions of the module return, printed by a process of its own."""
    conf = (
        {}
        if worker is None
        else {
            key: worker.client.conf[key]
            for key in ("broker_url", "broker_transport_options", "result_backend")
        }
    )
    code = f"import {module}; print({module}.one(3)); print({module}.book(2))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search_path(), "WOVE_WS_TEST_CELERY": json.dumps(conf)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
