"""The extensions ``resume`` and ``ack`` as a host sees them: a raw client against a real worker process."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from raw_host import RawHost, occupy, plain_error, unpickled, wait_until
from websockets.exceptions import ConnectionClosed

from wove_ws_sync.testing import LoopbackWorker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERYTHING = "resume,ack,drain"


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=8, args=["--max-kept-bytes", str(64 * 1024 * 1024)]) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that lets tasks end; it exists when the test is over, or they would keep their slots."""
    path = tmp_path / "gate"
    yield path
    path.touch()


class Caller:
    """One host that connects as often as it likes."""

    def __init__(self, worker: LoopbackWorker, window: float = 60.0) -> None:
        self._worker = worker
        self._said = {"name": secrets.token_hex(16), "window": window, "extensions": EVERYTHING}

    def __call__(self, **said: Any) -> RawHost:
        return RawHost(self._worker, **{**self._said, **said})


@pytest.fixture
def caller(worker: LoopbackWorker) -> Caller:
    return Caller(worker)


def once(ledger: Path, gate: Path) -> Callable[[], str]:
    """Return a task that notes in *ledger* that it ran, and returns once *gate* exists."""
    paths = str(ledger), str(gate)

    def task() -> str:
        import pathlib
        import time

        with open(paths[0], "a") as file:
            file.write("x")
        while not pathlib.Path(paths[1]).exists():
            time.sleep(0.01)
        return "done"

    return task


def until_cancelled(path: Path) -> Callable[[], Any]:
    """Return a coroutine that writes *path*.running, and *path* when it is cancelled."""
    name = str(path)

    async def task() -> None:
        import asyncio
        import pathlib

        pathlib.Path(name + ".running").touch()
        try:
            await asyncio.Event().wait()
        finally:
            pathlib.Path(name).touch()

    return task


def with_policy(policy: str, **delivery: Any) -> dict[str, Any]:
    return {"delivery_orphan_policy": policy, **delivery}


def test_the_answer_names_the_extensions_in_use(worker: LoopbackWorker) -> None:
    """Those that the host offers and the service knows; ``resume`` needs ``ack`` and a name."""
    name = secrets.token_hex(16)
    for offer, said, expected in (
        (EVERYTHING, name, EVERYTHING),
        ("drain,bin,ack", name, "ack,drain"),
        ("resume,drain", name, "drain"),
        (EVERYTHING, None, "ack,drain"),
        (EVERYTHING, "nobody", "ack,drain"),
        ("seal", name, ""),
    ):
        with RawHost(worker, extensions=offer, name=said) as host:
            assert host.socket.response is not None
            sync = host.socket.response.headers["X-Wove-Sync"]
            assert sync == (f"1; f={expected}" if expected else "1")


def test_the_service_has_a_name_until_it_ends() -> None:
    """X-Wove-Worker is the same for each connection, and another one after a restart."""
    names = []
    with LoopbackWorker(workers=1) as worker:
        for restart in (False, False, True):
            if restart:
                worker.restart()
            with RawHost(worker, limit=100_000) as host:
                assert host.socket.response is not None
                names.append(host.socket.response.headers["X-Wove-Worker"])
    assert names[0] == names[1] != names[2]
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in names)


class TestCut:
    """A connection that is lost while runs are on their way."""

    def test_a_run_outlives_its_connection(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """It is alive for the next connection, beats there, and its result comes once, executed once."""
        with caller() as host:
            host.run(once(tmp_path / "ledger", gate), delivery={"delivery_heartbeat_seconds": 0.1})
            host.wait(kind="heartbeat")
            host.cut()
        with caller() as host:
            assert host.resume("r") == {"alive": ["r"]}
            host.wait(kind="heartbeat")
            gate.touch()
            assert host.result() == "done"
            assert host.is_quiet()
            host.ack("r")
        assert (tmp_path / "ledger").read_text() == "x"

    @pytest.mark.parametrize("size", [1, 3_000_000])
    def test_an_end_that_is_not_acknowledged_comes_again(self, caller: Caller, size: int) -> None:
        """After the resume_state that calls it finished, however large it is."""
        with caller() as host:
            host.run(lambda size: b"x" * size, size=size)
            assert len(host.result()) == size
            host.cut()
        for _ in range(2):
            with caller() as host:
                assert host.resume("r", "never") == {"finished": ["r"], "unknown": ["never"]}
                assert len(host.result()) == size
                assert host.is_quiet()

    def test_a_run_that_ends_while_nobody_is_there(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """Its end waits for the host; what it logged does not."""

        def task(gate: str, ended: str) -> str:
            import logging
            import pathlib
            import time

            while not pathlib.Path(gate).exists():
                time.sleep(0.01)
            logging.getLogger().warning("nobody hears this")
            pathlib.Path(ended).touch()
            return "done"

        with caller() as host:
            host.run(task, gate=str(gate), ended=str(tmp_path / "ended"))
            host.wait(kind="task_started")
            host.cut()
            with pytest.raises(ConnectionClosed):
                host.event()
        gate.touch()
        wait_until((tmp_path / "ended").exists)
        with caller() as host:
            assert set(host.resume("r")) <= {"finished", "alive"}  # the end may still be on its way
            assert [event["type"] for event in host.wait()] == ["task_result"]

    def test_acknowledged_runs_are_forgotten(self, caller: Caller) -> None:
        """A later ``resume`` does not know them."""
        with caller() as host:
            for run_id in ("one", "two"):
                host.run(lambda: 1, run_id)
                assert host.result(run_id) == 1
            host.ack("one", "never")
            host.cut()
            # The cut may overtake the acknowledgement, so it is said again.
        with caller() as host:
            host.ack("one")
            assert host.resume("one", "two") == {"unknown": ["one"], "finished": ["two"]}

    def test_a_run_task_that_comes_again_does_not_run_again(
        self, caller: Caller, tmp_path: Path, gate: Path
    ) -> None:
        """While it is alive nothing happens; once it has ended its end is sent again."""
        task = once(tmp_path / "ledger", gate)
        with caller() as host:
            host.run(task)
            host.wait(kind="task_started")
            host.run(task)
            assert host.is_quiet()
            host.cut()
        with caller() as host:
            assert host.resume("r") == {"alive": ["r"]}
            assert host.event()["type"] == "task_started"  # it may have begun while nobody heard
            host.run(task)
            assert host.is_quiet()
            gate.touch()
            assert host.result() == "done"
            host.run(task)
            assert [event["type"] for event in host.wait()] == ["task_result"]
            assert host.is_quiet()
        assert (tmp_path / "ledger").read_text() == "x"

    def test_runs_that_are_not_listed_are_cancelled(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """Without an event, after the last list; what came over the new connection goes on."""
        with caller() as host:
            for run_id in ("listed", "unlisted"):
                host.run(until_cancelled(tmp_path / run_id), run_id)
                wait_until((tmp_path / f"{run_id}.running").exists)
            host.run(lambda: 1, "ended")
            host.result("ended")
            host.cut()
        with caller() as host:
            host.run(occupy(str(gate)), "new")
            host.wait("new", "task_started")
            assert host.resume("listed", more=True) == {"alive": ["listed"]}
            assert host.event()["type"] == "task_started"
            assert not (tmp_path / "unlisted").exists()
            assert host.resume(more=False) == {}
            wait_until((tmp_path / "unlisted").exists)
            assert not (tmp_path / "listed").exists()
            assert host.is_quiet()
            assert host.resume("unlisted", "ended") == {"unknown": ["unlisted", "ended"]}
            gate.touch()
            assert [event["type"] for event in host.wait("new")] == ["task_result"]
            host.cancel("listed")
            assert host.wait("listed")[-1]["type"] == "task_cancelled"
            host.ack("listed", "new")

    def test_a_newer_connection_takes_over(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """The older one, still open, is closed with 1001 and gets nothing of its run any more."""
        with caller() as old, caller() as new:
            with pytest.raises(ConnectionClosed) as caught:
                old.event()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
            new.run(occupy(str(gate)))
            new.wait(kind="task_started")
            with caller() as newest:
                assert newest.resume("r") == {"alive": ["r"]}
                gate.touch()
                assert newest.result() is None
                with pytest.raises(ConnectionClosed):
                    new.event()

    def test_an_older_connection_is_not_obeyed(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """Whatever it sends after a newer one was accepted; it is read, so as to see the close."""
        with caller() as old:
            # A host that does not answer the close, as one whose line is dead.
            old.socket.protocol.receive_data = lambda data: None  # type: ignore[method-assign]
            with caller() as new:
                assert new.is_quiet()
                old.run(once(tmp_path / "ledger", gate), "stale")
                old.send(type="shutdown")
                new.run(lambda: 1)
                assert new.result() == 1
                assert new.resume("stale") == {"unknown": ["stale"]}
            old.cut()
        assert not (tmp_path / "ledger").exists()

    def test_what_is_no_json_ends_the_connection_and_not_the_runs(self, caller: Caller, gate: Path) -> None:
        """1007, and the host may come back for its run."""
        with caller() as host:
            host.run(occupy(str(gate)))
            host.wait(kind="task_started")
            host.socket.send("{")
            with pytest.raises(ConnectionClosed) as caught:
                host.event()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1007
        with caller() as host:
            assert host.resume("r") == {"alive": ["r"]}
            gate.touch()
            assert host.result() is None

    def test_a_malformed_resume_is_ignored(self, caller: Caller, gate: Path) -> None:
        """It ends no run; the next one is answered."""
        with caller() as host:
            host.run(occupy(str(gate)))
            host.wait(kind="task_started")
            host.cut()
        with caller() as host:
            for odd in ({}, {"run_ids": "r"}, {"run_ids": [1]}, {"run_ids": [], "more": "no"}):
                host.send(type="resume", **odd)
            assert host.resume("r") == {"alive": ["r"]}
            gate.touch()
            assert host.result() is None

    def test_a_host_that_is_new_has_lost_its_runs(self, caller: Caller) -> None:
        """What it lists was for another instance of the service, or is forgotten."""
        with caller() as host:
            assert host.resume("a", "b") == {"lost": ["a", "b"]}

    def test_shutdown_is_a_goodbye(self, caller: Caller, tmp_path: Path) -> None:
        """Runs are cancelled and the host is forgotten, with what it had not acknowledged."""
        with caller() as host:
            host.run(lambda: 1, "ended")
            host.result("ended")
            host.run(until_cancelled(tmp_path / "cancelled"))
            wait_until((tmp_path / "cancelled.running").exists)
            host.send(type="shutdown")
            assert host.wait()[-1]["type"] == "task_cancelled"
        with caller() as host:
            assert host.resume("ended", "r") == {"lost": ["ended", "r"]}

    def has_ended(self, caller: Caller, run_id: str) -> bool:
        """Ask for one run and leave again before its end has come."""
        with caller() as host:
            found = host.resume(run_id, more=True)
            host.cut()
        return found == {"finished": [run_id]}

    def test_so_many_bytes_of_ends_are_kept(self, caller: Caller, tmp_path: Path, gate: Path) -> None:
        """--max-kept-bytes: the oldest are replaced by ResultDropped, the newest is whole."""

        def task(gate: str, done: str) -> bytes:
            import pathlib
            import time

            while not pathlib.Path(gate).exists():
                time.sleep(0.01)
            pathlib.Path(done).touch()
            return bytes(20 * 1024 * 1024)

        names = ["a", "b", "c", "d"]
        with caller() as host:
            for name in names:
                host.run(task, name, gate=f"{gate}.{name}", done=str(tmp_path / name))
                host.wait(name, "task_started")
            host.cut()
            with pytest.raises(ConnectionClosed):
                host.event()
        for name in names:
            Path(f"{gate}.{name}").touch()
            wait_until(lambda name=name: self.has_ended(caller, name))
        with caller() as host:
            assert host.resume(*names) == {"finished": names}
            error = plain_error(host.wait("a")[-1], "ResultDropped")
            assert error["retryable"] is False
            for name in names[1:]:
                assert len(host.result(name)) == 20 * 1024 * 1024
                host.ack(name)


class TestAway:
    """A host that stays away for longer than its window, here a fifth of a second."""

    @pytest.fixture
    def caller(self, worker: LoopbackWorker) -> Caller:
        return Caller(worker, window=0.2)

    @pytest.mark.parametrize("policy", ["fail", "cancel", "requeue", "detach"])
    def test_the_policy_of_a_run_decides(
        self, worker: LoopbackWorker, caller: Caller, policy: str, tmp_path: Path, gate: Path
    ) -> None:
        """ "cancel" ends it with HostAway, the others leave it alive, "detach" for others as well."""
        with caller() as host:
            host.run(once(tmp_path / "ledger", gate), delivery=with_policy(policy))
            host.run(until_cancelled(tmp_path / "over"), "clock", delivery=with_policy("cancel"))
            wait_until((tmp_path / "over.running").exists)
            host.wait(kind="task_started")
            host.cut()
        wait_until((tmp_path / "over").exists)
        if policy == "detach":
            with RawHost(worker, extensions=EVERYTHING, name=secrets.token_hex(16)) as other:
                other.send(type="attach_task", run_id="r", task_id="task", delivery={})
                assert other.wait(kind="task_started")
                other.send(type="detach_task", run_id="r")
                assert other.is_quiet()
        with caller(window=60) as host:
            found = host.resume("r", "clock")
            error = plain_error(host.wait("clock")[-1], "HostAway")
            assert error["retryable"] is True
            if policy == "cancel":
                assert found == {"finished": ["r", "clock"]}
            elif policy == "detach":  # the other host let go of it last, so it is that one's
                assert found == {"lost": ["r"], "finished": ["clock"]}
            else:
                assert found == {"alive": ["r"], "finished": ["clock"]}
                gate.touch()
                assert host.result() == "done"
        assert (tmp_path / "ledger").read_text() == "x"

    def test_a_host_takes_back_what_was_let_go_for_it(
        self, caller: Caller, tmp_path: Path, gate: Path
    ) -> None:
        """A run under "detach" is alive for it after the window, too."""
        with caller() as host:
            host.run(occupy(str(gate)), delivery=with_policy("detach"))
            host.run(until_cancelled(tmp_path / "over"), "clock")
            wait_until((tmp_path / "over.running").exists)
            host.wait(kind="task_started")
            host.cut()
        wait_until((tmp_path / "over").exists)
        with caller(window=60) as host:
            assert host.resume("r") == {"alive": ["r"]}
            gate.touch()
            assert host.result() is None

    def test_a_queued_run_under_cancel_never_runs(self, tmp_path: Path, gate: Path) -> None:
        """Its place in the queue is given up with the window."""
        with LoopbackWorker(workers=1) as small:
            caller = Caller(small, window=0.0)
            with caller() as host:
                host.run(occupy(str(gate)), "busy", delivery=with_policy("requeue"))
                host.wait("busy", "task_started")
                host.run(once(tmp_path / "ledger", gate), "queued")
                host.run(once(tmp_path / "ledger", gate), "patient", delivery=with_policy("fail"))
                host.send(type="cancel_task", run_id="nobody", task_id="t")
                host.run(lambda: 1, "last", delivery={"delivery_heartbeat_seconds": 0.03})
                host.wait("last", "heartbeat")  # so all of it has been read
                host.cut()
                with pytest.raises(ConnectionClosed):
                    while host.event()["type"] == "heartbeat":
                        pass
            with caller(window=60) as host:
                assert host.resume("busy", "queued", "patient", "last") in (
                    {"alive": ["busy", "patient"], "finished": ["queued", "last"]},
                    {"alive": ["busy", "queued", "patient", "last"]},  # it came before the cut was noticed
                )
                host.cancel("queued")
                host.cancel("last")
                gate.touch()
                assert host.result("patient") == "done"
            assert (tmp_path / "ledger").read_text() == "x"


class TestDetach:
    """``detach_task`` and ``attach_task``."""

    @pytest.fixture
    def other(self, worker: LoopbackWorker) -> Iterator[RawHost]:
        with RawHost(worker, extensions=EVERYTHING, name=secrets.token_hex(16)) as host:
            yield host

    def attach(self, host: RawHost, run_id: str = "r", **delivery: Any) -> dict[str, Any]:
        host.send(type="attach_task", run_id=run_id, task_id="task", delivery=delivery)
        return host.event()

    def test_another_host_takes_a_run_that_was_let_go(
        self, caller: Caller, other: RawHost, gate: Path
    ) -> None:
        """It hears that the task runs, beats as it asked for, and the end, which is kept until its ack."""
        with caller() as host:
            host.run(occupy(str(gate)), "mine", delivery={"delivery_heartbeat_seconds": 0.05})
            host.wait("mine", "heartbeat")
            host.send(type="detach_task", run_id="mine")
            assert host.is_quiet()
            assert self.attach(other, "mine", delivery_heartbeat_seconds=0.05)["type"] == "task_started"
            other.wait("mine", "heartbeat")
            gate.touch()
            assert other.result("mine") is None
            assert host.is_quiet()
            assert self.attach(other, "mine")["type"] == "task_result"
            plain_error(self.attach(host, "mine"), "UnknownRun")
            other.ack("mine")
            plain_error(self.attach(other, "mine"), "UnknownRun")

    def test_an_end_waits_for_whoever_asks(self, caller: Caller, other: RawHost, tmp_path: Path) -> None:
        """A run that ends while nobody has it, and one that had ended when it was let go."""
        with caller() as host:
            for run_id in ("ended", "acked"):
                host.run(lambda: "kept", run_id)
                host.result(run_id)
            host.ack("acked")
            for run_id in ("ended", "acked"):
                host.send(type="detach_task", run_id=run_id)
            assert host.is_quiet()
        event = self.attach(other, "ended")
        assert unpickled(event["result_pickle"]) == "kept"
        plain_error(self.attach(other, "acked"), "UnknownRun")

    def test_a_queued_run_answers_with_a_heartbeat(self, gate: Path) -> None:
        """As nothing was started yet."""
        with LoopbackWorker(workers=1) as small, Caller(small)() as host, Caller(small)() as other:
            host.run(occupy(str(gate)), "busy")
            host.wait("busy", "task_started")
            host.run(lambda: "late", "queued")
            host.send(type="detach_task", run_id="queued")
            host.send(type="attach_task", run_id="queued", task_id="task", delivery={})
            assert host.event() == {"type": "heartbeat", "run_id": "queued", "task_id": "task"}
            host.send(type="detach_task", run_id="queued")
            host.send(type="resume", run_ids=["sync"])
            host.notice("resume_state")
            assert self.attach(other, "queued")["type"] == "heartbeat"
            gate.touch()
            assert other.result("queued") == "late"

    def test_a_run_that_its_host_holds_is_unknown_to_others(
        self, caller: Caller, other: RawHost, gate: Path
    ) -> None:
        """Nobody takes a run from a host that has it."""
        with caller() as host:
            host.run(occupy(str(gate)))
            host.wait(kind="task_started")
            error = plain_error(self.attach(other), "UnknownRun")
            assert error["retryable"] is False
            gate.touch()
            assert host.result() is None

    def test_a_host_that_accepts_less_is_told_so(self, caller: Caller, worker: LoopbackWorker) -> None:
        """The result of a run that another host began may be too large for it."""
        with caller() as host:
            host.run(lambda: bytes(300_000))
            host.result()
            host.send(type="detach_task", run_id="r")
            assert host.is_quiet()
        name = secrets.token_hex(16)
        with RawHost(worker, extensions=EVERYTHING, name=name, limit=200_000) as small:
            error = plain_error(self.attach(small), "ResultTooLarge")
            assert "200000" in error["message"]

    def test_a_malformed_attach_is_an_error_of_its_run(self, other: RawHost) -> None:
        """As a malformed run_task is."""
        event = self.attach(other, delivery_heartbeat_seconds=-1)
        assert event["type"] == "task_error" and event["error"]["kind"] == "MalformedFrame"


class TestOthers:
    """Hosts that do not use the extensions see nothing of them."""

    @pytest.mark.parametrize("said", [{}, {"limit": 1_000_000}, {"extensions": "ack", "name": "a" * 32}])
    def test_runs_end_with_the_connection(
        self, worker: LoopbackWorker, said: dict[str, Any], tmp_path: Path
    ) -> None:
        """Whatever their policy is; a name alone changes nothing."""
        with RawHost(worker, **said) as host:
            host.run(until_cancelled(tmp_path / "cancelled"), delivery=with_policy("detach"))
            wait_until((tmp_path / "cancelled.running").exists)
            host.cut()
        wait_until((tmp_path / "cancelled").exists)

    @pytest.mark.parametrize("said", [{}, {"limit": 1_000_000}])
    def test_commands_of_the_extensions_are_unknown(
        self, worker: LoopbackWorker, said: dict[str, Any], gate: Path
    ) -> None:
        """They are ignored like any unknown type."""
        with RawHost(worker, **said) as host:
            host.run(occupy(str(gate)))
            host.wait(kind="task_started")
            for kind in ("resume", "event_ack", "detach_task", "attach_task"):
                host.send(type=kind, run_id="r", task_id="task", run_ids=[], delivery={})
                host.send(type=kind, run_id="malformed", delivery=[])
            assert host.is_quiet()
            gate.touch()
            assert host.result() is None
            host.run(lambda: "again")
            assert host.result() == "again"

    def test_ack_alone_keeps_ends_for_the_connection(self, worker: LoopbackWorker) -> None:
        """A run_task that comes again has its end again until that is acknowledged."""
        with RawHost(worker, extensions="ack") as host:
            assert host.features == ["ack"]
            for value in (1, 2):
                host.run(lambda value: value, value=value)
                assert host.result() == 1
            host.ack("r")
            host.run(lambda: 3)
            assert host.result() == 3
