"""The settings of the worker command: one table, one precedence, one kind of message."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from wove_ws_sync.cli._worker_settings import SETTINGS, SettingError, add_flags, settle


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text('workers = 2\nport = 22\ndrain-timeout = 2\nreload_dir = ["a", "b"]\n', "utf-8")
    return path


def test_the_first_source_counts(file: Path) -> None:
    """A flag before the environment, that before the file, that before the default."""
    environment = {
        "WOVE_WS_WORKER_PORT": "44",
        "WOVE_WS_WORKER_WORKERS": "4",
        "WOVE_WS_WORKER_INSECURE": "yes",
    }
    settings = settle(flags("--port", "66"), environment, str(file))
    assert (settings.port, settings.workers, settings.drain_timeout, settings.path) == (66, 4, 2.0, "/wove")
    assert settings.insecure is True and settings.reload_dir == ["a", "b"]
    assert settings.sources["port"] == "argument --port"
    assert settings.sources["workers"] == "environment variable WOVE_WS_WORKER_WORKERS"
    assert settings.sources["drain_timeout"] == f"file {file}"
    assert settings.sources["path"] == "default"


def test_a_switch_can_be_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text("insecure = true\n", "utf-8")
    assert settle({}, {}, str(path)).insecure is True
    assert settle({}, {"WOVE_WS_WORKER_INSECURE": "0"}, str(path)).insecure is False


def test_what_is_printed_says_the_same_when_it_is_read(file: Path, tmp_path: Path) -> None:
    given = flags("--engine", "processes", "--security", "env:SOME_NAME", "--path", '/a"b\\c', "--insecure")
    settings = settle(given, {"WOVE_WS_WORKER_LOG_FORMAT": "json"}, str(file))
    again = tmp_path / "again.toml"
    again.write_text(settings.as_toml(), "utf-8")
    assert settle({}, {}, str(again)).values == settings.values


WRONG = [
    ("port", "70000", "70000 is not from 0 to 65535"),
    ("port", "tcp://10.0.0.1:80", "is not a whole number"),
    ("workers", "0", "0 is not above 0"),
    ("drain_timeout", "nan", "is not a number of seconds from 0 on"),
    ("engine", "fibers", "choose threads, processes, dask:ADDRESS or module:factory"),
    ("log_level", "loud", "is none of debug, info, warning, error"),
    ("insecure", "maybe", "is neither true nor false"),
    ("security", "hunter2-hunter2", "it must be 'env:VARIABLE'"),
]


@pytest.mark.parametrize(("name", "text", "complaint"), WRONG)
def test_the_same_complaint_wherever_it_stands(name: str, text: str, complaint: str, tmp_path: Path) -> None:
    """The source, the setting and what it must be; never the text of a secret."""
    path = tmp_path / "worker.toml"
    path.write_text(f'{name} = "{text}"\n', "utf-8")
    variable = f"WOVE_WS_WORKER_{name.upper()}"
    for settled, source in (
        (lambda: settle({name: text}, {}, None), f"argument --{name.replace('_', '-')}"),
        (lambda: settle({}, {variable: text}, None), f"environment variable {variable}"),
        (lambda: settle({}, {}, str(path)), f"file {path}"),
    ):
        with pytest.raises(SettingError) as caught:
            settled()
        assert str(caught.value).startswith(f"{source}: {name}: ") and complaint in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_kept_byte = 5", "did you mean 'max_kept_bytes'?"),
        ("zzz = 5", "known are host, port"),
        ("port = ", "cannot be read"),
        ("port = true", "not a boolean"),
        ("port = [1, 2]", "not a list"),
        ("[port]\nx = 1", "not a dict"),
    ],
)
def test_a_file_that_cannot_be_used(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(content, "utf-8")
    with pytest.raises(SettingError, match=f"file .*worker.toml.*{complaint.replace('?', '[?]')}"):
        settle({}, {}, str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="No such file"):
        settle({}, {}, str(tmp_path / "nothing.toml"))


def test_strange_variables_are_told_and_do_no_harm() -> None:
    """Clusters make variables of the names of services; the one that holds the secret is none of them."""
    environment = {
        "WOVE_WS_WORKER_SERVICE_HOST": "10.0.0.1",
        "WOVE_WS_WORKER_SECRET": "hunter2",
        "WOVE_WS_WORKER_SECURITY": "env:WOVE_WS_WORKER_SECRET",
        "WOVE_WS_WORKER_CONFIG": "elsewhere",
    }
    settings = settle({}, environment, None)
    assert settings.unknown == ("WOVE_WS_WORKER_SERVICE_HOST",)
    assert "hunter2" not in settings.as_toml()


def test_every_setting_has_its_flag_and_says_its_default() -> None:
    for setting in SETTINGS:
        assert setting.flag == "--" + setting.name.replace("_", "-")
        if setting.default not in (None, False, []):
            assert "default" in setting.help, setting.name
