"""No handshake is taken twice: by the same worker service, by a sibling, by a restarted one."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sqlite3
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wove
from fault_helpers import WAIT, python, until
from raw_host import RawHost, signed
from redis_server import free_port, needs_redis, redis_server
from service_thread import ServiceThread, fetch
from websockets.exceptions import InvalidStatus

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker import nonces
from wove_ws_sync.worker.nonce_file import FileNonces
from wove_ws_sync.worker.nonce_redis import RedisNonces
from wove_ws_sync.worker.nonces import MAX_NONCE, MemoryNonces, NonceStore, NonceStoreError, make_nonce_store

SECRET = "a-secret-of-this-test-0123456789abcdef"
SECURITY = {"type": "signed", "secret": SECRET}
NOW = 1_000_000.0


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=needs_redis)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NonceStore]:
    """Each store, open."""
    with contextlib.ExitStack() as stack:
        text = {"memory": "memory", "file": f"file:{tmp_path}/nonces"}.get(request.param)
        if text is None:
            port, _ = stack.enter_context(redis_server(tmp_path))
            text = f"redis://127.0.0.1:{port}/0"
        made = make_nonce_store(text)
        stack.callback(made.close)
        made.open()
        yield made


class TestEveryStore:
    """What holds wherever nonces are kept."""

    def test_a_nonce_is_new_once(self, store: NonceStore) -> None:
        """The second use is a replay; another nonce, and the same one of another key, are not."""
        assert store.use("a", "nonce", NOW, NOW + 300)
        assert not store.use("a", "nonce", NOW + 1, NOW + 300)
        assert store.use("a", "other", NOW, NOW + 300)
        assert store.use("b", "nonce", NOW, NOW + 300)

    def test_key_and_nonce_are_not_run_together(self, store: NonceStore) -> None:
        """ "ab" + "c" is not "a" + "bc", whatever characters they are of."""
        assert store.use("ab", "c", NOW, NOW + 300)
        assert store.use("a", "bc", NOW, NOW + 300)
        assert store.use("a\0", "\ud800", NOW, NOW + 300)
        assert not store.use("a\0", "\ud800", NOW, NOW + 300)

    def test_one_of_a_hundred_threads_wins(self, store: NonceStore) -> None:
        """However close they are."""
        for number in range(3):
            barrier = threading.Barrier(100)

            def race(nonce: str = f"nonce-{number}", barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(WAIT)
                return store.use("key", nonce, NOW, NOW + 300)

            with ThreadPoolExecutor(100) as threads:
                futures = [threads.submit(race) for _ in range(100)]
            assert [future.result() for future in futures].count(True) == 1

    def test_nothing_of_it_is_shown(self, store: NonceStore) -> None:
        """A repr says how it is doing, not what it knows."""
        store.use("key", "nonce-canary", NOW, NOW + 300)
        assert "canary" not in repr(store)


class TestMemory:
    """The default store."""

    def test_it_is_bounded_for_each_key(self) -> None:
        """A key that has used up its room is refused for a while; another one goes on."""
        store = MemoryNonces(limit=100)
        for number in range(100):
            assert store.use("greedy", str(number), NOW + number, NOW + number + 300)
        with pytest.raises(NonceStoreError, match="Too many handshakes within the clock skew"):
            store.use("greedy", "one more", NOW + 299, NOW + 599)
        assert not store.use("greedy", "7", NOW + 299, NOW + 307)  # still known
        assert store.use("modest", "one", NOW + 299, NOW + 599)
        assert store.use("greedy", "one more", NOW + 302, NOW + 602)  # the first has expired

    def test_its_memory_is_bounded(self) -> None:
        """However long nonces are, and however many come over time."""
        store = MemoryNonces(limit=1000)
        tracemalloc.start()
        try:
            for number in range(20_000):
                now = NOW + number
                assert store.use("key", f"{number:01000}", now, now + 300)
                assert len(store) <= 301
            assert tracemalloc.get_traced_memory()[0] < 300_000
        finally:
            tracemalloc.stop()

    def test_a_check_forgets_little(self) -> None:
        """What expired during the night is not paid for by the first handshake of the morning."""
        store = MemoryNonces()
        for number in range(10_000):
            store.use("key", str(number), NOW, NOW + 300)
        store.use("key", "morning", NOW + 50_000, NOW + 50_300)
        assert len(store) > 9_900
        for number in range(500):
            store.use("key", f"later {number}", NOW + 50_000, NOW + 50_300)
        assert len(store) == 501

    def test_expired_ones_make_room_at_once(self) -> None:
        """Also where the first of them is a long way behind."""
        store = MemoryNonces(limit=10)
        for number in range(10):
            store.use("key", str(number), NOW, NOW + 100_000 + number)
        assert store.use("key", "new", NOW + 100_009.5, NOW + 100_300)

    def test_times_in_any_order(self) -> None:
        """Hosts whose clocks differ; each nonce is known until its own second is over."""
        store = MemoryNonces()
        for offset in (600, 1, 300, 599, 2):
            assert store.use("key", str(offset), NOW, NOW + offset)
        for offset in (1, 2, 300, 599, 600):
            assert not store.use("key", str(offset), NOW + offset, NOW + offset)
        assert store.use("key", "last", NOW + 700, NOW + 800)
        assert len(store) <= 6


@pytest.fixture(params=["memory", "file"])
def own_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NonceStore]:
    """Each store that goes by this machine's clock."""
    made = make_nonce_store("memory" if request.param == "memory" else f"file:{tmp_path}/nonces")
    made.open()
    yield made
    made.close()


def test_a_clock_that_goes_back_allows_no_replay(own_store: NonceStore) -> None:
    """What has been forgotten and would be valid again is refused; new handshakes are accepted."""
    assert own_store.use("key", "old", NOW, NOW + 300)
    assert own_store.use("key", "filler", NOW + 400, NOW + 700)  # "old" is forgotten
    with pytest.raises(NonceStoreError, match="clock went back"):
        own_store.use("key", "old", NOW + 10, NOW + 300)
    assert own_store.use("key", "new", NOW + 10, NOW + 310)
    assert not own_store.use("key", "filler", NOW + 10, NOW + 700)


def test_a_clock_that_jumps_and_comes_back(own_store: NonceStore) -> None:
    """An hour ahead by mistake: afterwards nothing old is accepted, and what is new is."""
    assert own_store.use("key", "before", NOW, NOW + 300)
    assert own_store.use("key", "within", NOW + 3600, NOW + 3900)
    with pytest.raises(NonceStoreError):
        own_store.use("key", "before", NOW + 5, NOW + 300)
    assert own_store.use("key", "after", NOW + 5, NOW + 305)


RACER = """
    import pathlib, sys
    from wove_ws_sync.worker.nonce_file import FileNonces
    store = FileNonces(sys.argv[1])
    pathlib.Path(f"{sys.argv[2]}/{sys.argv[3]}").touch()
    while len(list(pathlib.Path(sys.argv[2]).iterdir())) < 4:
        pass
    store.open()
    print(sum(store.use("key", str(number), 1e6, 1e6 + 300) for number in range(50)))
"""


class TestFile:
    """The store that processes of one machine share."""

    def test_processes_that_race(self, tmp_path: Path) -> None:
        """Four make the file at once and use the same fifty nonces: each is new to one of them."""
        (tmp_path / "ready").mkdir()

        def race(number: int) -> int:
            out, err, code = python(RACER, f"{tmp_path}/nonces", f"{tmp_path}/ready", str(number))
            assert code == 0, err
            return int(out)

        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(race, range(4))) == 50

    def test_two_stores_of_one_process(self, tmp_path: Path) -> None:
        """Opening and closing one takes nothing from the other: POSIX locks are those of the process."""
        first, second = FileNonces(tmp_path / "nonces"), FileNonces(tmp_path / "nonces")
        first.open()
        assert first._connection is not None
        first._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(NonceStoreError, match="locked"):
            second.open()
        code = """
            import sqlite3, sys
            try:
                sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None).execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as exc:
                print(exc)
        """
        assert python(code, str(tmp_path / "nonces"))[0] == "database is locked\n"
        first._connection.execute("COMMIT")
        second.open()
        assert first.use("key", "nonce", NOW, NOW + 300) and not second.use("key", "nonce", NOW, NOW + 300)
        first.close()
        second.close()

    def test_only_its_user_can_read_it(self, tmp_path: Path) -> None:
        """Mode 0600, the files beside it included, whatever the umask; and nothing can be read out of it."""
        before = os.umask(0)
        try:
            store = FileNonces(tmp_path / "nonces")
            store.open()
            assert store.use("key-canary", "nonce-canary", NOW, NOW + 300)
        finally:
            os.umask(before)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["nonces", "nonces-shm", "nonces-wal"]
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600
            assert b"canary" not in path.read_bytes()
        store.close()

    def test_it_forgets_as_it_goes(self, tmp_path: Path) -> None:
        """The file does not grow with the number of handshakes that there ever were."""
        store = FileNonces(tmp_path / "nonces")
        store.open()
        for number in range(2_000):
            assert store.use("key", str(number), NOW + number, NOW + number + 30)
        with contextlib.closing(sqlite3.connect(tmp_path / "nonces")) as look:
            assert look.execute("SELECT count(*) FROM nonces").fetchone()[0] <= 31
        store.close()

    def test_it_is_bounded(self, tmp_path: Path) -> None:
        """A full file refuses, keeps what it knows, and goes on when that has expired."""
        store = FileNonces(tmp_path / "nonces", max_bytes=64 * 1024)
        store.open()
        last = 0
        with pytest.raises(NonceStoreError, match="full"):
            for last in range(5_000):
                store.use("key", str(last), NOW, NOW + 300)
        assert 200 < last < 4_000
        assert not store.use("key", "0", NOW, NOW + 300)
        assert (tmp_path / "nonces").stat().st_size <= 64 * 1024
        assert store.use("key", "new", NOW + 301, NOW + 601)
        store.close()

    def test_it_survives_a_kill(self, tmp_path: Path) -> None:
        """A nonce that was accepted is known to who opens the file next."""
        code = """
            import os, signal, sys
            from wove_ws_sync.worker.nonce_file import FileNonces
            store = FileNonces(sys.argv[1])
            store.open()
            assert store.use("key", "nonce", 1e6, 1e6 + 300)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        *_, code_of_exit = python(code, str(tmp_path / "nonces"))
        assert code_of_exit == -signal.SIGKILL
        store = FileNonces(tmp_path / "nonces")
        store.open()
        assert not store.use("key", "nonce", NOW, NOW + 300)
        store.close()

    def test_a_sibling_that_hangs_makes_nobody_wait_for_long(self, tmp_path: Path) -> None:
        """Who cannot write within two seconds cannot tell."""
        store = FileNonces(tmp_path / "nonces")
        store.open()
        with contextlib.closing(sqlite3.connect(tmp_path / "nonces", isolation_level=None)) as sibling:
            sibling.execute("BEGIN IMMEDIATE")
            with pytest.raises(NonceStoreError, match="locked"):
                store.use("key", "nonce", NOW, NOW + 300)
        assert store.use("key", "nonce", NOW, NOW + 300)
        store.close()

    @pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
    def test_what_is_no_nonce_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """And left as it is."""
        path = tmp_path / "nonces"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(NonceStoreError, match=r"cannot be used|damaged|another program"):
            FileNonces(path).open()
        assert path.read_bytes() == content

    def test_the_database_of_another_program_is_refused(self, tmp_path: Path) -> None:
        """Its tables are not ours to add to."""
        path = tmp_path / "nonces"
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE theirs (one)")
        path.chmod(0o600)
        with pytest.raises(NonceStoreError, match="another program or version"):
            FileNonces(path).open()

    def test_a_file_that_is_damaged_is_refused(self, tmp_path: Path) -> None:
        """At the start, and not by the handshake that meets the damage."""
        path = tmp_path / "nonces"
        store = FileNonces(path)
        store.open()
        for number in range(500):
            store.use("key", str(number), NOW, NOW + 300)
        store.close()
        content = bytearray(path.read_bytes())
        content[4096:] = b"\x55" * (len(content) - 4096)
        path.write_bytes(content)
        with pytest.raises(NonceStoreError, match=r"damaged|cannot be used"):
            store.open()

    def test_a_file_that_others_may_use_is_refused(self, tmp_path: Path) -> None:
        """Who can write to it can have a handshake forgotten. A link and a directory are none either."""
        path = tmp_path / "nonces"
        path.touch()
        path.chmod(0o660)
        with pytest.raises(NonceStoreError, match="chmod it to 600"):
            FileNonces(path).open()
        (tmp_path / "link").symlink_to(path)
        for other in (tmp_path / "link", tmp_path):
            with pytest.raises(NonceStoreError, match="no regular file"):
                FileNonces(other).open()
        os.mkfifo(tmp_path / "fifo", 0o600)
        with pytest.raises(NonceStoreError, match="no regular file"):
            FileNonces(tmp_path / "fifo").open()

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
    def test_a_directory_that_others_may_write_to_is_refused(self, tmp_path: Path, mode: int) -> None:
        """Who can put a file beside it can have a handshake forgotten as well."""
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(NonceStoreError, match="must not be writable for others"):
            FileNonces(folder / "nonces").open()
        folder.chmod(0o700)
        with contextlib.closing(FileNonces(folder / "nonces")) as nonces:
            nonces.open()

    def test_a_directory_that_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        """With the reason of the system; as another user where the tests run as root."""
        code = """
            import os, sys
            from wove_ws_sync.worker.nonce_file import FileNonces
            from wove_ws_sync.worker.nonces import NonceStoreError
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                FileNonces(sys.argv[1]).open()
            except NonceStoreError as exc:
                print(exc)
        """
        tmp_path.chmod(0o555)
        out, err, _ = python(code, str(tmp_path / "nonces"))
        assert "cannot be used: Permission denied." in out, err

    def test_a_file_that_was_replaced_refuses(self, tmp_path: Path) -> None:
        """A new one knows nothing of what was accepted."""
        path = tmp_path / "nonces"
        store = FileNonces(path)
        store.open()
        path.rename(tmp_path / "away")
        with pytest.raises(NonceStoreError, match="No such file"):
            store.use("key", "nonce", NOW, NOW + 300)
        path.touch(0o600)
        with pytest.raises(NonceStoreError, match="was replaced; restart the service"):
            store.use("key", "nonce", NOW, NOW + 300)
        store.close()
        with pytest.raises(NonceStoreError, match="is not open"):
            store.use("key", "nonce", NOW, NOW + 300)


@needs_redis
class TestRedis:
    """The store on a server."""

    def test_a_nonce_is_let_go_by_the_server(self, tmp_path: Path) -> None:
        """Later than it expires, by what clocks may differ, and not much later; without its text."""
        with redis_server(tmp_path) as (port, _):
            store = RedisNonces(f"redis://127.0.0.1:{port}/0")
            store.use("key", "nonce-canary", NOW, NOW + 300)
            [name] = store._client.keys("*")
            assert b"canary" not in name
            assert 350_000 < store._client.pttl(name) <= 360_000
            store.close()

    def test_a_server_that_is_gone_is_told_and_found_again(self, tmp_path: Path) -> None:
        """It cannot tell, and can once the server is back."""
        with redis_server(tmp_path) as (port, _):
            store = RedisNonces(f"redis://127.0.0.1:{port}/0")
            assert store.use("key", "nonce", NOW, NOW + 300)
        with pytest.raises(NonceStoreError, match="gave no answer"):
            store.use("key", "nonce", NOW, NOW + 300)
        with redis_server(tmp_path, port=port):
            assert store.use("key", "other", NOW, NOW + 300)
        store.close()

    def test_a_server_that_hangs_is_not_waited_for(self, tmp_path: Path) -> None:
        """A stopped process keeps its port open."""
        with redis_server(tmp_path) as (port, process):
            store = RedisNonces(f"redis://127.0.0.1:{port}/0")
            assert store.use("key", "nonce", NOW, NOW + 300)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(NonceStoreError, match=r"gave no answer .TimeoutError"):
                store.use("key", "other", NOW, NOW + 300)
            process.send_signal(signal.SIGCONT)
            assert not store.use("key", "nonce", NOW, NOW + 300)
            store.close()

    def test_a_server_that_forgets_is_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What it throws out for lack of memory could be replayed."""
        with redis_server(tmp_path, "--maxmemory-policy", "allkeys-lru") as (port, _):
            store = RedisNonces(f"redis://127.0.0.1:{port}/0")
            store.open()
            store.close()
        assert "its maxmemory-policy is allkeys-lru" in caplog.text

    def test_the_password_is_used_and_never_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It comes by the environment; a wrong one is an error without it."""
        caplog.set_level(logging.DEBUG)
        with redis_server(tmp_path, "--requirepass", SECRET) as (port, _):
            monkeypatch.setenv("STORE_URL", f"redis://:{SECRET}@127.0.0.1:{port}/0")
            store = make_nonce_store("redis:env:STORE_URL")
            store.open()
            assert store.use("key", "nonce", NOW, NOW + 300)
            assert SECRET not in repr(store) + repr(vars(store))
            with pytest.raises(TypeError, match="not pickled"):
                pickle.dumps(store)
            store.close()
            monkeypatch.setenv("STORE_URL", f"redis://:{SECRET}x@127.0.0.1:{port}/0")
            wrong = make_nonce_store("redis:env:STORE_URL")
            with pytest.raises(NonceStoreError, match=r"gave no answer .AuthenticationError") as caught:
                wrong.open()
            assert SECRET not in str(caught.value) + repr(caught.value.__cause__)
            wrong.close()
        assert SECRET not in caplog.text


def test_a_redis_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, no variable, no package: each is told, without a secret."""
    store = RedisNonces(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(NonceStoreError, match=r"gave no answer .ConnectionError"):
        store.open()
    store.close()
    with pytest.raises(NonceStoreError, match="'STORE_URL' of the nonce store is not set"):
        make_nonce_store("redis:env:STORE_URL")
    monkeypatch.setenv("STORE_URL", f"mysql://{SECRET}")
    with pytest.raises(NonceStoreError, match="cannot be used") as caught:
        make_nonce_store("redis:env:STORE_URL")
    assert SECRET not in str(caught.value) and caught.value.__context__ is None
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(NonceStoreError, match=r'pip install "wove_ws_sync\[redis\]"'):
        make_nonce_store("redis://127.0.0.1:6379/0")


@pytest.mark.parametrize(
    "text", ["memory", "file:/x", "file:nonces", "redis://h:1/0", "redis://h/0", "rediss://[::1]:1/2"]
)
def test_what_a_store_may_be_called(text: str) -> None:
    """These are understood."""
    assert nonces.check_nonce_store(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file",
        "file:",
        "file:a\0b",
        "Memory",
        "redis",
        "redis:",
        "redis://",
        "redis:///0",
        "redis://h",
        "redis://h:x/0",
        "redis://h:99999/0",
        "redis://[/0",
        "redis:env:",
        f"redis://:{SECRET}@h:1/0",
        f"redis://h:1/0?password={SECRET}",
        f"redis://h:1/0#{SECRET}",
        f"redis://h:1/{SECRET}",
        SECRET,
    ],
)
def test_what_a_store_may_not_be_called(text: str) -> None:
    """The text is refused and not repeated: it may hold a password."""
    with pytest.raises(ValueError, match="redis:env:VARIABLE") as caught:
        nonces.check_nonce_store(text)
    assert SECRET not in str(caught.value)


# A whole worker service


def shared(store: str, port: int = 0) -> LoopbackWorker:
    """Return a worker service that has its secret and its store in common with others."""
    args = ["--security", "env:SHARED", "--nonce-store", store, "--port", str(port)]
    return LoopbackWorker(security=False, workers=1, args=args, env={"SHARED": SECRET})


class Signer:
    """What ``signed`` wants to know."""

    security = SECURITY


def status_of(worker: Any, headers: dict[str, str]) -> int:
    """Return what a handshake with *headers* is answered with."""
    try:
        with RawHost(worker, headers=headers):
            return 101
    except InvalidStatus as exc:
        return exc.response.status_code


@pytest.mark.parametrize("kind", ["file", pytest.param("redis", marks=needs_redis)])
def test_f42_replay_to_the_same_a_sibling_and_a_restarted_worker(tmp_path: Path, kind: str) -> None:
    """A recorded handshake opens one connection, ever; new ones go on being accepted."""
    with contextlib.ExitStack() as stack:
        store = f"file:{tmp_path}/nonces"
        if kind == "redis":
            port, _ = stack.enter_context(redis_server(tmp_path))
            store = f"redis://127.0.0.1:{port}/0"
        recorded = [signed(Signer) for _ in range(5)]
        with shared(store) as first, shared(store) as sibling:
            for number, headers in enumerate(recorded):
                assert status_of((first, sibling)[number % 2], headers) == 101
            for headers in recorded:
                assert [status_of(worker, headers) for worker in (first, sibling)] == [401, 401]
        with shared(store) as restarted:
            assert [status_of(restarted, headers) for headers in recorded] == [401] * 5
            assert status_of(restarted, signed(Signer)) == 101


def test_f42_racing_replays_to_two_siblings(tmp_path: Path) -> None:
    """However they are sent, one gets in."""
    with shared(f"file:{tmp_path}/nonces") as first, shared(f"file:{tmp_path}/nonces") as second:
        headers = signed(Signer)
        with ThreadPoolExecutor(16) as threads:
            statuses = list(
                threads.map(lambda number: status_of((first, second)[number % 2], headers), range(16))
            )
    assert sorted(statuses) == [101] + [401] * 15


def test_a_store_that_cannot_tell_is_503(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With Retry-After, told once, counted each time; the service accepts again when it can."""
    path = tmp_path / "nonces"
    with ServiceThread(security=SECURITY, nonce_store=f"file:{path}") as service:
        path.rename(tmp_path / "away")
        for _ in range(5):
            with pytest.raises(InvalidStatus) as caught:
                RawHost(service, headers=signed(service))
            assert caught.value.response.status_code == 503
            assert caught.value.response.headers["Retry-After"] == "1"
        (tmp_path / "away").rename(path)
        assert status_of(service, signed(service)) == 101
        assert service.service.counters["nonce_store"] == 5
    told = [record for record in caplog.records if "with 503" in record.getMessage()]
    assert len(told) == 1 and "No such file" in told[0].getMessage()


@needs_redis
def test_a_host_comes_through_the_outage_of_a_store(tmp_path: Path) -> None:
    """It dials again, as a 503 is not final, and its task is run once the store is back."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        first.enter_context(redis_server(tmp_path, port=port))
        with ServiceThread(security=SECURITY, nonce_store=f"redis://127.0.0.1:{port}/0") as service:
            first.close()
            # Without a deadline a run does not wait for a service that was never reached.
            with WebSocketExecutor(service.url, security=SECURITY, delivery_timeout=WAIT) as pool:
                future = pool.submit(divmod, 7, 3)
                until(lambda: service.service.counters["nonce_store"] >= 1)
                stack.enter_context(redis_server(tmp_path, port=port))
                assert future.result(WAIT) == (2, 1)


def test_a_slow_store_does_not_hold_the_service_up(tmp_path: Path) -> None:
    """While handshakes wait for the file, other requests are answered and other hosts served."""
    path = tmp_path / "nonces"
    with (
        ServiceThread(security=SECURITY, nonce_store=f"file:{path}") as service,
        RawHost(service, headers=signed(service)) as host,
        contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as sibling,
        ThreadPoolExecutor(1) as threads,
    ):
        sibling.execute("BEGIN IMMEDIATE")
        waiting = threads.submit(status_of, service, signed(service))
        until(lambda: service.service._doorkeeper._waiting == 1)
        assert fetch(service.port, "/healthz").status == 200
        host.run(lambda: 7)
        assert host.result() == 7
        assert service.service._doorkeeper._waiting == 1
        sibling.execute("COMMIT")
        assert waiting.result(WAIT) == 101


def test_a_long_nonce_is_refused() -> None:
    """No host of ours, nor of Wove's, sends one; it is not remembered either."""
    security = wove.NetworkExecutorSecurity.from_config(SECURITY)
    with ServiceThread(security=SECURITY) as service:
        for length, status in ((MAX_NONCE, 101), (MAX_NONCE + 1, 401)):
            headers = signed(service)
            headers["X-Wove-Nonce"] = "n" * length
            headers["X-Wove-Signature"] = security._signature(
                transport="websocket",
                target="/wove",
                body=b"",
                timestamp=headers["X-Wove-Timestamp"],
                nonce=headers["X-Wove-Nonce"],
            )
            assert status_of(service, headers) == status


def test_f42_a_secret_with_two_names_is_one() -> None:
    """Wove does not sign the key id: a handshake that is recorded under one is a replay under the other."""
    names = [{"key": "old", "secret": SECRET}, {"key": "new", "secret": SECRET}]
    with ServiceThread(security={"keys": names}) as service:
        recorded = {**signed(Signer), "X-Wove-Key": "old"}
        assert status_of(service, recorded) == 101
        assert status_of(service, {**recorded, "X-Wove-Key": "new"}) == 401
        assert status_of(service, {**signed(Signer), "X-Wove-Key": "new"}) == 101


def test_too_many_handshakes_are_503() -> None:
    """And not a refusal after which a host would give up."""
    with ServiceThread(security=SECURITY, nonce_store=MemoryNonces(limit=2)) as service:
        assert [status_of(service, signed(service)) for _ in range(3)] == [101, 101, 503]


# The command


@pytest.mark.parametrize("store", ["file:/nowhere/nonces", "redis:env:UNSET_URL", "redis://127.0.0.1:PORT/0"])
def test_a_store_that_cannot_be_used_ends_the_start(store: str) -> None:
    """With an exit code of its own, and a line that says what is wrong."""
    store = store.replace("PORT", str(free_port()))
    code = "from wove_ws_sync.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    arguments = ["worker", "--port", "0", "--security", "env:SHARED", "--nonce-store", store]
    out, err, status = python(code, *arguments, env={"SHARED": SECRET})
    assert (out, status) == ("", 14), err
    assert "wove-ws-sync worker: --nonce-store cannot be used: The " in err and "Traceback" not in err


def test_a_password_on_the_command_line_is_refused(tmp_path: Path) -> None:
    """Everybody on the machine can read it there; nor is it taken from the environment or the file."""
    url = f"redis://:{SECRET}@127.0.0.1:6379/0"
    code = "from wove_ws_sync.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    config = tmp_path / "worker.toml"
    config.write_text(f"nonce_store = '{url}'\n")
    for arguments, env in (
        (["--nonce-store", url], {}),
        ([], {"WOVE_WS_WORKER_NONCE_STORE": url}),
        (["--config", str(config)], {}),
    ):
        out, err, status = python(code, "worker", *arguments, env=env)
        assert (out, status) == ("", 2)
        assert "redis:env:VARIABLE" in err and SECRET not in err
    out, err, status = python(
        code, "worker", "--nonce-store", "redis:env:URL", "--print-config", env={"URL": url}
    )
    assert (
        status == 0
        and 'nonce_store = "redis:env:URL"  # flag --nonce-store' in out
        and SECRET not in out + err
    )
