"""The TLS settings of a worker service: files that are renewed, or broken, while it runs."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import pytest
from tls_memory import client_context, handshake, write_pair, write_set

from wove_ws_sync._certificates import Authority
from wove_ws_sync.worker.tls import RenewingContext

AUTHORITY, ANOTHER = Authority.make(), Authority.make()
DAY = 86400.0


def serving(folder: Path, *, verify: bool = False, min_version: str = "1.2") -> RenewingContext:
    """Return the settings of a service with the files in *folder*."""
    client_ca = str(folder / "ca.pem") if verify else None
    return RenewingContext(
        str(folder / "server.pem"), str(folder / "server.key"), client_ca, min_version=min_version
    )


def with_certificate(folder: Path) -> ssl.SSLContext:
    """Return the settings of a host with the client's files in *folder*."""
    return client_context(folder / "ca.pem", (folder / "client.pem", folder / "client.key"))


def put(folder: Path, *names: str, source: Path) -> None:
    """Replace files by those of *source*, each in one step."""
    for name in names:
        copy = folder / f".{name}"
        copy.write_bytes((source / name).read_bytes())
        os.replace(copy, folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of files."""
    return write_set(tmp_path / "tls", AUTHORITY)


@pytest.fixture
def renewed(tmp_path: Path) -> Path:
    """Another set of files of the same authority."""
    return write_set(tmp_path / "renewed", AUTHORITY)


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A set of files of another authority."""
    return write_set(tmp_path / "another", ANOTHER)


def test_a_renewed_certificate_is_served(
    folder: Path, renewed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the next handshake on; a connection that is there goes on."""
    caplog.set_level(logging.INFO, "wove_ws_sync.worker")
    service, host = serving(folder), client_context(folder / "ca.pem")
    before = handshake(host, service)
    assert handshake(host, service).serial == before.serial
    assert caplog.records == []
    put(folder, "server.pem", "server.key", source=renewed)
    assert handshake(host, service).serial != before.serial
    assert "were read anew" in caplog.text
    before.client.write(b"still there")
    assert before.server.read() == b"still there"


def test_files_behind_a_link_are_renewed(
    folder: Path, renewed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Kubernetes does it: the link to the folder is replaced."""
    link, fresh = tmp_path / "now", tmp_path / "fresh"
    link.symlink_to(folder)
    service, host = serving(link), client_context(folder / "ca.pem")
    before = handshake(host, service).serial
    fresh.symlink_to(renewed)
    os.replace(fresh, link)
    assert handshake(host, service).serial != before


@pytest.mark.parametrize(
    "breaking", ["half renewed", "no certificate", "gone", "empty"], ids=lambda text: text.replace(" ", "-")
)
def test_files_that_cannot_be_used_change_nothing(
    breaking: str, folder: Path, renewed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The earlier ones go on being served, and the log says so once; the next change is tried again."""
    service, host = serving(folder), client_context(folder / "ca.pem")
    before = handshake(host, service).serial
    if breaking == "half renewed":
        put(folder, "server.pem", source=renewed)
    elif breaking == "gone":
        (folder / "server.key").unlink()
    else:
        (folder / "server.pem").write_text("nonsense" if breaking == "no certificate" else "")
    for _ in range(3):
        assert handshake(host, service).serial == before
    [error] = caplog.records
    assert error.levelno == logging.ERROR
    assert str(folder / "server.pem") in error.getMessage() and "are kept" in error.getMessage()
    put(folder, "server.pem", "server.key", source=renewed)
    assert handshake(host, service).serial != before


def test_a_renewed_client_authority_counts(folder: Path, another: Path) -> None:
    """Hosts of the new one get in, and those of the earlier one no more."""
    service = serving(folder, verify=True)
    ours, theirs = with_certificate(folder), with_certificate(another)
    theirs.load_verify_locations(folder / "ca.pem")  # it trusts the service; the question is the reverse
    handshake(ours, service)
    with pytest.raises(ssl.SSLError):
        handshake(theirs, service)
    put(folder, "ca.pem", source=another)
    handshake(theirs, service)
    with pytest.raises(ssl.SSLError):
        handshake(ours, service)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_gets_past_a_renewed_authority(
    version: ssl.TLSVersion, folder: Path, another: Path
) -> None:
    """A session that began with a certificate of the earlier authority is not taken up again."""
    service, host = serving(folder, verify=True), with_certificate(folder)
    host.maximum_version = version
    session = handshake(host, service).client.session
    assert session is not None
    assert handshake(host, service, session=session).client.session_reused  # else this test shows nothing
    put(folder, "ca.pem", source=another)
    with pytest.raises(ssl.SSLError):
        handshake(host, service, session=session)


def test_the_least_version(folder: Path) -> None:
    """A host that speaks TLS 1.2 at most is refused by a service with 1.3, also after a renewal."""
    host = client_context(folder / "ca.pem")
    host.maximum_version = ssl.TLSVersion.TLSv1_2
    handshake(host, serving(folder))
    service = serving(folder, min_version="1.3")
    for _ in range(2):
        with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol"):
            handshake(host, service)
        os.utime(folder / "server.pem")
    assert handshake(client_context(folder / "ca.pem"), service).client.version() == "TLSv1.3"


def test_the_end_of_the_certificate_is_announced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within 14 days, and after it; a renewed one is silent again."""
    write_pair(folder, "server", AUTHORITY.server(["localhost"], 30))
    service = serving(folder)
    assert service.ends_at is not None
    now = service.ends_at - 30 * DAY
    service.remind(now + 15.9 * DAY)
    assert caplog.records == []
    service.remind(now + 17 * DAY)
    service.remind(now + 31 * DAY)
    texts = [record.getMessage() for record in caplog.records]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert "ends in 13.0 days" in texts[0] and "has expired" in texts[1]
    caplog.clear()
    write_pair(folder, "server", AUTHORITY.server(["localhost"], 60))
    service.renew()
    service.remind(now + 31 * DAY)
    assert caplog.records == []


def test_files_that_cannot_be_used_from_the_start(folder: Path, another: Path, tmp_path: Path) -> None:
    """They are an error, and nobody is asked for a password."""
    put(folder, "server.key", source=another)
    with pytest.raises(ssl.SSLError, match=r"(?i)key.values.mismatch"):
        serving(folder)
    with pytest.raises(FileNotFoundError):
        serving(tmp_path / "missing")
