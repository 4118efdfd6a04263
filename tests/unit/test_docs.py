"""What the documentation says about the code is what the code does."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import wove_ws_sync
import wove_ws_sync.cli
from wove_ws_sync import _oauth2_config, errors, frames
from wove_ws_sync.options import DeliveryOptions, LinkOptions
from wove_ws_sync.worker import tokens

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = Path(wove_ws_sync.__file__).parent

# A module of the command line with an underscore is no command.
COMMANDS = [
    module.name
    for module in pkgutil.iter_modules(wove_ws_sync.cli.__path__)
    if not module.name.startswith("_")
]

# Fields that are made of the URL, so no keys of their own.
DERIVED = {"secure", "host", "port", "target"}


def _table(page: str) -> dict[str, list[str]]:
    """Return the rows of all tables of a page whose first cell is a name in code style."""
    rows = {}
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and (name := re.fullmatch(r"`([\w.]+)`", cells[0])):
            rows[name[1]] = cells
    return rows


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{None if field.name == 'security' else field.default!r}`"


OPTIONS = {field.name: field for field in dataclasses.fields(LinkOptions) if field.name not in DERIVED}
OPTION_ROWS = _table("reference/options.md")


def test_every_option_is_documented() -> None:
    """reference/options lists every key of ``executor_config``, none that is not one, and the defaults."""
    assert {key: row[1] for key, row in OPTION_ROWS.items()} == {
        key: _default(field) for key, field in OPTIONS.items()
    }


@pytest.mark.parametrize("key", OPTIONS)
def test_options_have_the_unit_and_the_check_that_is_documented(key: str) -> None:
    """A time or a size names its unit; "> 0" and "≥ 0" are what ``from_config`` accepts."""
    _, _, unit, _, check = OPTION_ROWS[key]
    assert (unit == "seconds") == bool(re.search(r"_(timeout|interval|delay|window)$", key))
    assert (unit == "bytes") == key.endswith("_bytes")
    if not check.startswith(("> 0", "≥ 0")):
        return
    url = "ws://127.0.0.1:1"
    with pytest.raises(ValueError):
        LinkOptions.from_config({"url": url, key: -1})
    if check.startswith("> 0"):
        with pytest.raises(ValueError):
            LinkOptions.from_config({"url": url, key: 0})
    else:
        assert getattr(LinkOptions.from_config({"url": url, key: 0}), key) == 0


def test_every_delivery_setting_is_documented() -> None:
    """topics/delivery-semantics has a row with the default of each ``delivery_*`` setting."""
    rows = {
        key: row[1]
        for key, row in _table("topics/delivery-semantics.md").items()
        if key.startswith("delivery_")
    }
    assert rows == {
        field.name: "none" if field.default is None else f'`"{field.default}"`'
        for field in dataclasses.fields(DeliveryOptions)
    }


def test_every_counter_is_documented() -> None:
    """reference/stats has every counter of a link, and none that nothing counts."""
    host = [path for path in PACKAGE.rglob("*.py") if "worker" not in path.relative_to(PACKAGE).parts]
    source = "".join(path.read_text(encoding="utf-8") for path in host)
    counted = set(re.findall(r"counts\[\"(\w+)\"\] \+=", source)) | set(
        re.findall(r"\.count\(\"(\w+)\"\)", source)
    )
    reasons = set(re.findall(r"dropped\[\"(\w+)\"\]", source)) | {"unknown_run", "stale", "shape", "run_id"}
    now = {"runs", "sessions", "generation", "buffered_bytes"}
    assert set(_table("reference/stats.md")) == counted | {f"dropped_{reason}" for reason in reasons} | now


def test_every_metric_is_documented() -> None:
    """howto/watch-a-worker has every metric with its type, and none that is not told."""
    source = (PACKAGE / "worker" / "metrics.py").read_text(encoding="utf-8")
    told = {
        f"{name}_total" for name in re.findall(r"\b(?:counter|CounterMetricFamily)\(\s*\"(\w+)\"", source)
    }
    told |= set(re.findall(r"\b(?:Gauge|_family)\(\s*\"(\w+)\"", source))
    told |= {f"{name}_info" for name in re.findall(r"InfoMetricFamily\(\s*\"(\w+)\"", source)}
    assert len(told) == 18
    assert {name for name in _table("howto/watch-a-worker.md") if name.startswith("wove_")} == told


def test_every_fault_of_the_failure_modes_has_its_test() -> None:
    """Each id that topics/failure-modes names is in the name of a test."""
    page = (DOCS / "topics/failure-modes.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tested = {
        number for name in re.findall(r"def test((?:_f\d+)+)_", source) for number in name.split("_f")[1:]
    }
    assert set(re.findall(r"\bF(\d+)\b", page)) <= tested


def test_every_error_is_documented() -> None:
    """reference/errors has each error with what else catches it."""
    rows = _table("reference/errors.md")
    for name in errors.__all__:
        kind = getattr(wove_ws_sync, name)
        for ancestor in re.findall(r"`([\w.]+)`", rows[name][1]):
            assert ancestor.rpartition(".")[2] in {base.__name__ for base in kind.__mro__[1:]}, name


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".contrib.celery",
        ".contrib.django",
        ".contrib.django.testing",
        ".contrib.joblib",
        ".otel",
        ".testing",
    ],
)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """What the changelog calls public is described by a directive, or by that of its module."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$", pages, flags=re.MULTILINE))
    where = importlib.import_module(f"wove_ws_sync{module}")
    constants = {"DEFAULT_ALIAS", "NAME", "__version__"}
    names = {f"{where.__name__}.{name}" for name in set(where.__all__) - constants}
    assert where.__name__ in described or names <= described


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_command_line_is_documented(command: str) -> None:
    """reference/cli has a section for each command, with its options and no others."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"wove_ws_sync.cli.{command}").register(subparsers)
    known = {option for action in subparsers.choices[command]._actions for option in action.option_strings}
    page = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `{command}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [line.split("|")[1] for line in section[1].splitlines() if line.startswith("| `-")]
    assert set(re.findall(r"`(-[\w-]+)`", " ".join(rows))) == known - {"-h", "--help"}


def test_every_frame_is_documented() -> None:
    """reference/wire-protocol has a section for each command and each event, and for nothing else."""
    page = (DOCS / "reference/wire-protocol.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `(\w+)`$", page, re.MULTILINE)) == frames.COMMANDS | frames.EVENTS


def test_every_thread_is_documented() -> None:
    """topics/architecture has a row for every thread that the package starts, by its name."""
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    started = set(re.findall(r"\"wove-ws-([a-z]+)-[{\d]", source))
    page = (DOCS / "topics/architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `wove-ws-(\w+)-n`", page, re.MULTILINE)) == started


def test_every_logger_is_documented() -> None:
    """reference/logging names every logger of the package."""
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"getLogger\(\"(wove_ws_sync\.\w+)\"\)", source))
    assert named <= set(_table("reference/logging.md"))


def test_the_version_stands_in_one_place() -> None:
    """The changelog's newest entry is the version of the package, and setup.cfg does not repeat it."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions[0] == wove_ws_sync.__version__
    assert wove_ws_sync.__version__ not in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_ci_runs_the_command_of_the_readme() -> None:
    """What CI does is what the README tells everybody to do."""
    command = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1]
    assert command.endswith("/tox")
    assert f"\n{command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_test_that_the_security_model_names_exists() -> None:
    """A reviewer can look up what shows each row; a row without a test is none."""
    page = (DOCS / "topics/security-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named <= set(re.findall(r"def (test_\w+)\(", tests))
    tables = page.partition("## What is on without a word")[2].partition("## What it does not do")[0]
    assert len(named) > 30
    for line in tables.splitlines():
        if line.startswith("| ") and not line.startswith(("| attack |", "| against |")):
            assert "`test_" in line.rpartition(" | ")[2] or "`test_" in line.split("|")[-2], line


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _table_below(page: str, heading: str) -> set[str]:
    """Return the first cells in code style of the first table below *heading*."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    return set(re.findall(r"^\| `(\w+)` \|", table[0], re.MULTILINE)) - {"security"}


def test_every_key_of_the_tokens_is_documented() -> None:
    """howto/use-tokens lists what a host and a worker service take, and nothing else."""
    page = "howto/use-tokens.md"
    assert _table_below(page, "## On the host: OAuth 2.0") == set(_oauth2_config._CHECKS)
    assert _table_below(page, "## On the worker: JSON Web Tokens") == tokens._KEYS - {"type"}


def test_the_tokens_on_the_page_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configurations of howto/use-tokens are valid, and the token that it makes is accepted."""
    page = "howto/use-tokens.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BILLING_CLIENT_SECRET", "not-guessed")
    host, trial = _blocks(page, "python")
    [worker] = _blocks(page, "toml")
    namespace: dict[str, Any] = {}
    exec(host, namespace)  # checks its configuration, and connects nowhere
    namespace["executor"].shutdown()
    settings = tomllib.loads(worker)
    tokens.TokenVerifier(settings)
    exec(trial, {})
    local = {**settings, "jwks": "jwks.json", "issuer": "me"}
    del local["required_scope"]
    authorization = f"Bearer {capsys.readouterr().out.strip()}"
    assert tokens.TokenVerifier(local).verify(lambda name: [authorization]) == "billing"
