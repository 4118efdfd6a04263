"""What is in force for a worker service: flag, environment, file, default, and how its log is written."""

from __future__ import annotations

import argparse
import io
import json
import logging
import pickle
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from wove_ws_sync.cli import worker
from wove_ws_sync.cli._worker_config import PREFIX, ConfigError, Settled, settle
from wove_ws_sync.cli._worker_logs import JsonFormatter

SECRET = "correct-horse-battery-staple"


def parser() -> argparse.ArgumentParser:
    subparsers = argparse.ArgumentParser(prog="wove-ws-sync").add_subparsers()
    worker.register(subparsers)
    return subparsers.choices["worker"]


def settled(*flags: str, file: Path | None = None, text: str = "", **environ: str) -> Settled:
    """Return what is in force with *flags*, *text* in *file*, and *environ* without the prefix."""
    known = parser()
    if file is not None:
        file.write_text(text, encoding="utf-8")
        flags = (*flags, "--config", str(file))
    environment = {PREFIX + name: value for name, value in environ.items()}
    return settle(known, known.parse_args(flags), environment)


def value_of(name: str, *flags: str, **sources: Any) -> Any:
    return getattr(settled(*flags, **sources).options, name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker.toml"


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(file: Path) -> None:
    """Each source is heard only where those before it are silent."""
    text = "port = 1\npath = '/file'\nworkers = 3\n"
    found = settled("--port", "3", file=file, text=text, PORT="2", PATH="/environment")
    options, sources = found.options, found.sources
    assert (options.port, options.path, options.workers, options.host) == (3, "/environment", 3, "127.0.0.1")
    assert [sources[name] for name in ("port", "path", "workers", "host")] == [
        "flag --port",
        f"{PREFIX}PATH",
        str(file),
        "default",
    ]


def test_a_flag_with_the_value_of_the_default_is_a_flag() -> None:
    """It is what was said that counts, not what it differs from."""
    found = settled("--port", "8765", PORT="1")
    assert found.options.port == 8765 and found.sources["port"] == "flag --port"


def test_a_switch_can_be_turned_off_again(file: Path) -> None:
    """By the environment, and by a flag that begins with --no-."""
    assert value_of("insecure", file=file, text="insecure = true") is True
    assert value_of("insecure", file=file, text="insecure = true", INSECURE="off") is False
    assert value_of("insecure", "--no-insecure", file=file, text="insecure = true", INSECURE="1") is False
    assert value_of("insecure") is False


def test_a_list_is_replaced_and_not_added_to(file: Path) -> None:
    """--reload-dir, repeated or with the separator of paths; one call leaves nothing for the next."""
    text = "reload_dir = ['a', 'b']"
    assert value_of("reload_dir", file=file, text=text) == ["a", "b"]
    assert value_of("reload_dir", "--reload-dir", "c", "--reload-dir", "d", file=file, text=text) == [
        "c",
        "d",
    ]
    assert value_of("reload_dir", RELOAD_DIR="x:y" if sys.platform != "win32" else "x;y") == ["x", "y"]
    known = parser()
    for _ in range(2):
        assert settle(known, known.parse_args(["--reload-dir", "c"]), {}).options.reload_dir == ["c"]
    assert settle(known, known.parse_args([]), {}).options.reload_dir == []


def test_an_empty_variable_is_none(file: Path) -> None:
    """As with a variable that a container file passes on although nobody set it."""
    assert value_of("port", file=file, text="port = 1", PORT="") == 1


def test_the_file_can_be_named_by_the_environment(file: Path) -> None:
    """The flag wins here as well."""
    file.write_text("port = 1", encoding="utf-8")
    other = file.with_name("other.toml")
    other.write_text("port = 2", encoding="utf-8")
    assert value_of("port", CONFIG=str(file)) == 1
    assert value_of("port", "--config", str(other), CONFIG=str(file)) == 2


@pytest.mark.parametrize(
    ("option", "wrong", "reason"),
    [
        ("port", "70000", "70000 is not from 0 to 65535"),
        ("port", "tcp://10.0.0.1:8765", "'tcp://10.0.0.1:8765' is not a whole number"),
        ("workers", "0", "0 is not above 0"),
        ("drain_timeout", "-1", "-1 is not a number of seconds from 0 on"),
        ("drain_timeout", "nan", "nan is not a number of seconds from 0 on"),
        ("engine", "fibers", "choose threads, processes"),
        ("log_level", "loud", "invalid choice: 'loud'"),
        ("security", SECRET, "it must be 'env:VARIABLE'"),
    ],
)
def test_the_same_check_whatever_the_source(
    option: str, wrong: str, reason: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag, a variable and a file are refused in the same words, and the source is named."""
    with pytest.raises(SystemExit) as flagged:
        settled(f"--{option.replace('_', '-')}={wrong}")
    said = capsys.readouterr().err
    assert flagged.value.code == 2 and reason in said and SECRET not in said
    line = json.dumps(wrong)
    with pytest.raises(ConfigError) as from_environment:
        settled(**{option.upper(): wrong})
    with pytest.raises(ConfigError) as from_file:
        settled(file=file, text=f"{option} = {line}")
    assert str(from_environment.value).startswith(f"{PREFIX}{option.upper()}: ")
    assert str(from_file.value).startswith(f"{file}: {option}: ")
    words = {str(error.value).rpartition(f"{option}: ")[2] for error in (from_environment, from_file)}
    words = {text.removeprefix(f"{PREFIX}{option.upper()}: ") for text in words}
    assert len(words) == 1 and reason in (word := words.pop()) and word in said and SECRET not in word


@pytest.mark.parametrize(
    "text",
    [
        f"security = '{SECRET}'",
        f"security = {{type = 'bearer', token = '{SECRET}'}}",
        f"[security]\nsecret = '{SECRET}'",
        f"security = ['{SECRET}']",
        f"secret = '{SECRET}'",
        f"security = '{SECRET}",
        f"security = {SECRET}",
    ],
)
def test_a_literal_secret_is_never_shown(text: str, file: Path) -> None:
    """Whatever its form, and also when the file is no TOML."""
    with pytest.raises(ConfigError) as refused:
        settled(file=file, text=text)
    assert SECRET not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_kept_byte = 5", "no option 'max_kept_byte'; the nearest is 'max_kept_bytes'"),
        ("max-kept-bytes = 5", "the nearest is 'max_kept_bytes'"),
        ("xyzzy = 5", "the nearest is '"),
        ("config = 'other.toml'", "no option 'config'"),
        ("print_config = true", "no option 'print_config'"),
        ("port = true", "port: true or false cannot be used"),
        ("port = [1]", "port: a single value is needed"),
        ("port = 1.5", "port: '1.5' is not a whole number"),
        ("host = 5", "host: a text is needed"),
        ("insecure = 'yes'", "insecure: true or false is needed"),
        ("reload_dir = 'a'", "reload_dir: a list of texts is needed"),
        ("port = ", "the configuration is not TOML"),
    ],
)
def test_one_clear_error_for_a_file_that_cannot_be_used(text: str, reason: str, file: Path) -> None:
    """It begins with the file."""
    with pytest.raises(ConfigError) as refused:
        settled(file=file, text=text)
    message = str(refused.value)
    assert message.startswith(f"{file}: ") and reason in message and "\n" not in message


def test_a_file_that_cannot_be_read(file: Path) -> None:
    """Absent, or not UTF-8."""
    with pytest.raises(ConfigError, match="No such file"):
        settled("--config", str(file))
    file.write_bytes(b"path = '/\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        settled("--config", str(file))


def test_what_is_printed_can_be_fed_back(file: Path) -> None:
    """Every option keeps its value, and its line says where it came from."""
    flags = ("--path", '/a"b\\c\x7f\N{SNOWMAN}', "--reload-dir", "a b", "--no-insecure", "--security=env:X")
    first = settled(*flags, PORT="0", DRAIN_TIMEOUT="2.5", WORKERS="7")
    text = first.to_toml()
    assert f"port = 0  # {PREFIX}PORT\n" in text and "# tls_cert is not set\n" in text
    again = settled(file=file, text=text)
    assert {name: getattr(again.options, name) for name in again.sources} == {
        name: getattr(first.options, name) for name in first.sources
    }
    assert {again.sources[name] for name in tomllib.loads(text)} == {str(file)}
    kept = {action.dest for action in parser()._actions} - {"help", "config", "print_config"}
    assert set(first.sources) == kept


def test_the_flags_that_say_all_of_it_say_all_of_it(file: Path) -> None:
    """What --reload starts is in force as it was."""
    text = "insecure = true\nreload_dir = ['a', '-b']\npath = '/-'\n"
    first = settled(file=file, text=text, MAX_KEPT_BYTES="5")
    again = settled(*first.to_flags())
    assert {name: getattr(again.options, name) for name in again.sources} == {
        name: getattr(first.options, name) for name in first.sources
    }
    assert f"{PREFIX}MAX_KEPT_BYTES" in first.variables() and f"{PREFIX}CONFIG" in first.variables()


def test_variables_that_are_no_options_are_told() -> None:
    """But not the one that holds the secret, and no variable's value."""
    found = settled(SECURITY=f"env:{PREFIX}SECRET", SECRET=SECRET, MAX_KEPT_BYTE=SECRET)
    assert found.ignored == [
        f"The environment variable {PREFIX}MAX_KEPT_BYTE is no option and has no effect; "
        f"the nearest is {PREFIX}MAX_KEPT_BYTES."
    ]


def test_a_later_complaint_is_blamed_on_its_source(file: Path) -> None:
    """Only options that are named in it and are not on the command line."""
    found = settled("--path", "x", file=file, text="tls_cert = 'c'", MAX_MESSAGE_BYTES="1")
    assert found.blame("path must be good.") == "path must be good."
    complaint = "max_message_bytes must be more."
    assert found.blame(complaint) == f"{complaint} (max_message_bytes is from {PREFIX}MAX_MESSAGE_BYTES.)"
    assert found.blame("--tls-cert and --tls-key go together.").endswith(f" (tls_cert is from {file}.)")


def logged(**extra: Any) -> dict[str, Any]:
    """Return the fields of one record, written by a formatter that went to another process."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(pickle.loads(pickle.dumps(JsonFormatter())))
    record = logging.LogRecord("some.logger", logging.WARNING, __file__, 1, "a %s", ("line\nbreak",), None)
    record.__dict__.update(extra)
    handler.handle(record)
    text = stream.getvalue()
    assert text.count("\n") == 1
    return dict(json.loads(text))


class TestJson:
    """One object a line."""

    def test_the_fields(self) -> None:
        """ts is UTC, all else is text; nothing else of a record is shown."""
        found = logged(created=0.25, run_id="r", peer="127.0.0.1:5", action="connect", password=SECRET)
        assert found == {
            "ts": "1970-01-01T00:00:00.250Z",
            "level": "warning",
            "logger": "some.logger",
            "message": "a line\nbreak",
            "action": "connect",
            "run_id": "r",
            "peer": "127.0.0.1:5",
        }

    def test_a_traceback(self) -> None:
        """It is one field."""
        try:
            raise ValueError("lost")
        except ValueError:
            found = logged(exc_info=sys.exc_info())
        assert found["exc"].startswith("Traceback") and found["exc"].endswith("ValueError: lost")
        assert "exc" not in logged(exc_info=(None, None, None))

    def test_whatever_a_task_logs_is_one_line(self) -> None:
        """A text that does not fit its arguments, values that fail or are no text."""

        class Bad(str):
            def __str__(self) -> str:
                raise RuntimeError(SECRET)

        assert "could not be formatted: TypeError" in logged(args=(1, 2))["message"]
        found = logged(args=(Bad("x"),), run_id=Bad("r"), task_id=object(), peer=None)
        assert "could not be formatted: RuntimeError" in found["message"]
        assert found["run_id"] == "r" and "task_id" not in found and "peer" not in found
        assert logged(args=("\ud800",))["message"] == "a \ud800"


class TestExamples:
    """docs/howto/run-a-worker-in-production shows what works."""

    @staticmethod
    def blocks(language: str) -> list[str]:
        page = Path(__file__).parents[2] / "docs/howto/run-a-worker-in-production.md"
        return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)

    def test_the_file_and_the_unit_fit(self, file: Path) -> None:
        """Each option is one, and systemd waits for the drain."""
        [text] = self.blocks("toml")
        options = settled(file=file, text=text).options
        assert options.security == "env:WOVE_SECRET" and options.drain_timeout == 60
        unit = self.blocks("ini")[0]
        found = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M)
        assert found is not None and int(found[1]) == options.drain_timeout + 15

    def test_the_container_sets_options(self) -> None:
        """All of its variables are some."""
        [text] = self.blocks("dockerfile")
        environ = dict(re.findall(r"WOVE_WS_WORKER_(\w+)=(\S+)", text))
        found = settled(**environ)
        assert len(environ) == 6 and not found.ignored and found.options.log_format == "json"
