"""docs/howto/django and docs/howto/test-your-code: what they show works in the example project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("django")
import django_host  # first: it sets Django up
import django_settings
from django.core.checks import run_checks
from django.test import override_settings
from fault_helpers import WAIT

import wove_ws_sync.contrib.django
from wove_ws_sync.contrib.django import conf

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
PACKAGE = Path(wove_ws_sync.contrib.django.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def environ() -> Iterator[None]:
    with django_host.environ():
        yield


def _blocks(page: str) -> list[str]:
    text = (HOWTO / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _setting(page: str, name: str = "WOVE_WS") -> object:
    [block] = [block for block in _blocks(page) if f"\n{name} = " in f"\n{block}"]
    namespace: dict[str, object] = {}
    exec(block, namespace)
    return namespace[name]


def test_the_settings_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks, those for deployment included, have nothing to say about the setting of the page."""
    monkeypatch.setenv("WOVE_WORKER_SECRET", django_host.SECRET)
    with override_settings(WOVE_WS=_setting("django.md")):
        assert run_checks(tags=["wove_ws"], include_deployment_checks=True) == []
    with override_settings(WOVE_WS=_setting("test-your-code.md")):
        assert run_checks(tags=["wove_ws"]) == []
    assert "wove_ws_sync.contrib.django.tasks.WoveWsBackend" in str(_setting("django.md", "TASKS"))
    assert django_settings.MODULE in ("tasks", "backport")


def test_every_id_and_every_key_is_documented() -> None:
    """The table of the checks has the ids that there are; that of the keys has those of the app itself."""
    page = (HOWTO / "django.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py"))
    ids = set(re.findall(r"\"(?:wove_ws\.)?([EW]0\d\d)\"", source))
    told = set(re.findall(r"\b([EW]0\d\d)\b", page)) | {f"W01{number}" for number in range(6)}
    assert ids == told
    assert set(re.findall(r"^\| `([A-Z]+)` \|", page, re.MULTILINE)) == conf._OWN_KEYS


def test_the_example_projects_own_tests_pass(tmp_path: Path) -> None:
    """``manage.py test``, which runs the tests that the page shows: in process and on a real service."""
    done = subprocess.run(
        [sys.executable, "manage.py", "test"],
        cwd=django_host.PROJECT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "DJANGO_DATABASE": str(tmp_path / "db.sqlite3"),
            "DJANGO_TEST_DATABASE": str(tmp_path / "test.sqlite3"),
        },
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr
    [shown] = [block for block in _blocks("test-your-code.md") if "OrderTests" in block]
    example = (django_host.PROJECT / "jobs" / "tests.py").read_text(encoding="utf-8")
    for line in shown.partition("@immediate()")[2].splitlines():
        assert line in example
    [shown] = [block for block in _blocks("django.md") if "answers_503" in block]
    views = (django_host.PROJECT / "jobs" / "views.py").read_text(encoding="utf-8")
    for line in shown.splitlines():
        assert line in views


def test_the_fixtures_of_pytest(tmp_path: Path) -> None:
    """``pytest_plugins`` brings both fixtures, with and without pytest-django."""
    (tmp_path / "conftest.py").write_text(
        "import django\ndjango.setup()\npytest_plugins = ['wove_ws_sync.contrib.django.pytest_plugin']\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import os\n"
        "from wove_ws_sync.contrib.django import executor\n"
        "def test_in_process(wove_ws_immediate):\n"
        "    assert executor.submit(os.getpid).result() == os.getpid()\n"
        "def test_for_real(wove_ws_worker):\n"
        "    assert executor.submit(os.getpid).result(30) == wove_ws_worker.pid != os.getpid()\n"
        "    wove_ws_worker.kill()\n"
        "def test_again(wove_ws_worker):\n"
        "    assert executor.submit(os.getpid).result(30) == wove_ws_worker.pid\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "PYTHONPATH": str(django_host.PROJECT),
        },
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


def test_a_loopback_worker_as_the_page_shows_it() -> None:
    exec(_blocks("test-your-code.md")[0], {})
