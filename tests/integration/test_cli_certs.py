"""``wove-ws-sync certs``: what it writes, what it never writes over, what it says."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tls_memory import write_pair, write_set

from wove_ws_sync._certificates import Authority, Certificate
from wove_ws_sync.cli import main

FILES = {"ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key"}
KEYS = {"ca.key", "server.key", "client.key"}
AUTHORITY = Authority.make()


class Result:
    """How one call ended."""

    def __init__(self, code: int, output: str, errors: str) -> None:
        self.code, self.output, self.errors = code, output, errors


Certs = Callable[..., Result]


@pytest.fixture
def certs(capfd: pytest.CaptureFixture[str]) -> Certs:
    """Run the command in this process; no key is ever in what it prints."""

    def call(*arguments: str | Path) -> Result:
        capfd.readouterr()
        code = main(["certs", *map(str, arguments)])
        output, errors = capfd.readouterr()
        assert "PRIVATE" not in output + errors and "Traceback" not in errors
        return Result(code, output, errors)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in each file of *folder*."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read(folder: Path, name: str) -> Certificate:
    return Certificate((folder / name).read_bytes())


# -- making them -----------------------------------------------------------------------------


def test_a_set_is_made(certs: Certs, tmp_path: Path) -> None:
    """Six files in a new folder: keys for their owner only, names for loopback, 90 days."""
    folder = tmp_path / "new" / "tls"
    done = certs(folder)
    assert (done.code, done.errors) == (0, "")
    assert {path.name for path in folder.iterdir()} == FILES
    assert mode(folder) == 0o700
    assert {mode(folder / name) for name in KEYS} == {0o600}
    assert read(folder, "server.pem").names == ["localhost", "127.0.0.1", "::1"]
    assert read(folder, "client.pem").subject == "wove-ws-sync host"
    for name in ("server.pem", "client.pem"):
        assert f"{read(folder, name).ends:%Y-%m-%d %H:%M} UTC (in 90 days)" in done.output
    assert all(name in done.output for name in FILES)
    assert read(folder, "server.pem").pin in done.output


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_widest_umask_opens_no_key(tmp_path: Path) -> None:
    """A key is closed to others from the moment that its file is there, whatever the umask."""
    program = "import os, sys; os.umask(0); from wove_ws_sync.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "certs", str(tmp_path / "tls")]
    watched = ["strace", "-f", "-e", "trace=openat,open", "-o", str(tmp_path / "trace")]
    subprocess.run([*watched, *command], check=True, stdout=subprocess.DEVNULL)
    opened = [line for line in (tmp_path / "trace").read_text().splitlines() if "O_CREAT" in line]
    keys = [line for line in opened if ".key" in line]
    assert len(keys) == 3
    assert all("O_EXCL" in line and ", 0600)" in line for line in keys)
    assert {mode(tmp_path / "tls" / name) for name in FILES - KEYS} == {0o644}


def test_names_and_days(certs: Certs, tmp_path: Path) -> None:
    """Names in the form that is dialled, addresses with brackets or without."""
    names = ["Worker.Example", "bücher.example", "10.0.0.7", "[::1]", "worker.example."]
    arguments = [text for name in names for text in ("--name", name)]
    done = certs(tmp_path / "tls", *arguments, "--days", "7", "--client", "django on web-1")
    assert done.code == 0
    expected = ["worker.example", "xn--bcher-kva.example", "10.0.0.7", "::1", "worker.example"]
    assert read(tmp_path / "tls", "server.pem").names == expected
    assert read(tmp_path / "tls", "client.pem").subject == "django on web-1"
    assert done.output.count("(in 7 days)") == 2


def test_the_lines_to_use_them(certs: Certs, tmp_path: Path) -> None:
    """The command and the executor_config that are printed name the files, wherever they are."""
    folder = tmp_path / "with space"
    done = certs(folder, "--name", "::1")
    [command] = [line for line in done.output.splitlines() if "wove-ws-sync worker" in line]
    words = shlex.split(command)
    assert words[:2] == ["wove-ws-sync", "worker"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given == {
        "--tls-cert": str(folder / "server.pem"),
        "--tls-key": str(folder / "server.key"),
        "--tls-client-ca": str(folder / "ca.pem"),
        "--security": "env:WOVE_WORKER_SECRET",
    }
    config = json.loads(done.output[done.output.index("{") : done.output.rindex("}") + 1])
    assert config["url"] == "wss://[::1]:8765/wove"
    assert [Path(config[f"{key}_file"]).name for key in ("ca", "client_cert", "client_key")] == [
        "ca.pem",
        "client.pem",
        "client.key",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("DIR", "--days", "0"),
        ("DIR", "--days", "3651"),
        ("DIR", "--days", "1.5"),
        ("DIR", "--days", "٣"),
        ("DIR", "--name", ""),
        ("DIR", "--name", "a b"),
        ("DIR", "--name", "*.example"),
        ("DIR", "--name", "https://a.example"),
        ("DIR", "--client", ""),
        ("DIR", "--client", "x" * 65),
        ("DIR", "--client", "a\nb"),
        ("DIR", "--new-keys"),
        ("DIR", "--show", "--renew"),
        ("DIR", "--show", "--name", "a"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], certs: Certs, tmp_path: Path) -> None:
    """Exit code 2, and nothing is made."""
    done = certs(*(str(tmp_path / "tls") if each == "DIR" else each for each in arguments))
    assert (done.code, done.output) == (2, "")
    assert done.errors
    assert list(tmp_path.iterdir()) == []


# -- what is there stays -----------------------------------------------------------------------


def test_a_set_is_not_written_over(certs: Certs, tmp_path: Path) -> None:
    """The second call fails, says what is there, and changes nothing."""
    certs(tmp_path / "tls")
    before = contents(tmp_path / "tls")
    done = certs(tmp_path / "tls")
    assert (done.code, done.output) == (1, "")
    assert all(name in done.errors for name in FILES)
    assert contents(tmp_path / "tls") == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_file_is_enough_to_stop_it(name: str, certs: Certs, tmp_path: Path) -> None:
    """Whichever it is, also if it is a link to nowhere; there is never half a set."""
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    done = certs(tmp_path)
    assert (done.code, done.output) == (1, "")
    assert name in done.errors
    assert [path.name for path in tmp_path.iterdir()] == [name]


def limited(size: int) -> Callable[[], None]:
    """Return what lets a process write files of *size* bytes at most."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def call_limited(size: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command where files cannot grow beyond *size*, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "wove_ws_sync", "certs", *map(str, arguments)],
        preexec_fn=limited(size),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_nothing(there: bool, tmp_path: Path) -> None:
    """The file that cannot be written takes those before it with it, and the folder if it was made."""
    folder = tmp_path / "tls"
    if there:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    many = [text for number in range(30) for text in ("--name", f"worker-{number}.example")]
    done = call_limited(1000, folder, *many)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in done.stderr
    assert folder.exists() is there
    if there:
        assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be(certs: Certs, tmp_path: Path) -> None:
    """A file in its place is an error of one line."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "tls"):
        done = certs(folder)
        assert (done.code, done.output) == (1, "")
        assert len(done.errors.splitlines()) == 1 and "file" in done.errors


# -- showing them ------------------------------------------------------------------------------


def test_show(certs: Certs, tmp_path: Path) -> None:
    """It lists what is there and writes nothing; a key that others may read is pointed out."""
    folder = write_set(tmp_path / "tls", AUTHORITY, days={"client": 3.5})
    (folder / "server.key").chmod(0o640)
    for name in ("ca.key", "client.key"):
        (folder / name).chmod(0o600)
    before = contents(folder)
    done = certs(folder, "--show")
    assert (done.code, done.errors) == (0, "")
    lines = done.output.splitlines()
    assert re.fullmatch(r"server\.pem  localhost, 127\.0\.0\.1; ends \S+ \S+ UTC \(in 90 days\)", lines[2])
    assert lines[3].strip() == f"pin {read(folder, 'server.pem').pin}"
    assert [line for line in lines if "OPEN TO OTHERS" in line] == [
        "server.key  its key; OPEN TO OTHERS (mode 0640)"
    ]
    assert "wove-ws-sync worker" not in done.output
    assert contents(folder) == before


@pytest.mark.parametrize("expired", ["server", "client"])
def test_show_tells_of_what_has_expired(expired: str, certs: Certs, tmp_path: Path) -> None:
    """By its exit code as well."""
    folder = write_set(tmp_path / "tls", AUTHORITY, days={expired: -0.01})
    done = certs(folder, "--show")
    assert done.code == 1
    [line] = [line for line in done.output.splitlines() if "EXPIRED" in line]
    assert line.startswith(f"{expired}.pem")


def test_show_finds_nothing(certs: Certs, tmp_path: Path) -> None:
    """An empty folder, one that is not there and a file that is no certificate are exit code 1."""
    assert certs(tmp_path, "--show").code == certs(tmp_path / "missing", "--show").code == 1
    (tmp_path / "ca.pem").write_text("nonsense")
    done = certs(tmp_path, "--show")
    assert done.code == 1 and f"{tmp_path / 'ca.pem'} is not a certificate" in done.errors


# -- renewing them -----------------------------------------------------------------------------


def test_renew(certs: Certs, tmp_path: Path) -> None:
    """New certificates of the same authority for the same names and keys; so pins stay right."""
    certs(tmp_path, "--name", "worker.example", "--client", "me", "--days", "2")
    before = contents(tmp_path)
    (tmp_path / "server.pem").chmod(0o640)
    done = certs(tmp_path, "--renew")
    after = contents(tmp_path)
    assert done.code == 0 and done.output.count("(in 90 days)") == 2
    assert {name for name in after if after[name] != before.get(name)} == {"server.pem", "client.pem"}
    assert set(after) == FILES
    assert read(tmp_path, "server.pem").names == ["worker.example"]
    assert read(tmp_path, "client.pem").subject == "me"
    assert read(tmp_path, "server.pem").pin == Certificate(before["server.pem"]).pin
    assert mode(tmp_path / "server.pem") == 0o640


def test_renew_with_new_keys_and_names(certs: Certs, tmp_path: Path) -> None:
    """Then the pin is another one, and the keys are still for their owner only."""
    certs(tmp_path)
    before = contents(tmp_path)
    done = certs(tmp_path, "--renew", "--new-keys", "--name", "other.example", "--client", "you")
    after = contents(tmp_path)
    assert done.code == 0
    assert {name for name in after if after[name] == before[name]} == {"ca.pem", "ca.key"}
    assert read(tmp_path, "server.pem").names == ["other.example"]
    assert read(tmp_path, "client.pem").subject == "you"
    assert read(tmp_path, "server.pem").pin != Certificate(before["server.pem"]).pin
    assert {mode(tmp_path / name) for name in KEYS} == {0o600}
    for name in ("server", "client"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")  # they belong together


@pytest.mark.parametrize(
    ("breaking", "text"),
    [
        (lambda folder: (folder / "ca.key").unlink(), "ca.key"),
        (lambda folder: (folder / "client.pem").unlink(), "client.pem"),
        (
            lambda folder: (folder / "server.key").write_text("nonsense"),
            "server.key or client.key cannot be used",
        ),
        (lambda folder: write_pair(folder, "ca", Authority.make().server(["a"], 9)), "cannot be used"),
    ],
    ids=["no key of the CA", "no certificate", "no key", "no CA"],
)
def test_what_cannot_be_renewed(
    breaking: Callable[[Path], Any], text: str, certs: Certs, tmp_path: Path
) -> None:
    """Exit code 1, and nothing has changed."""
    certs(tmp_path)
    breaking(tmp_path)
    before = contents(tmp_path)
    done = certs(tmp_path, "--renew")
    assert (done.code, done.output) == (1, "")
    assert text in done.errors
    assert contents(tmp_path) == before


def test_a_full_disk_renews_nothing(certs: Certs, tmp_path: Path) -> None:
    """No file is replaced before all are written, and none is left beside them."""
    certs(tmp_path)
    before = contents(tmp_path)
    done = call_limited(400, tmp_path, "--renew")
    assert done.returncode == 1 and "File too large" in done.stderr
    assert contents(tmp_path) == before
