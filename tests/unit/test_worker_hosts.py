"""The worker's pure rooms about hosts: who is known, what is kept for whom, and for how long."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wove_ws_sync.worker import hosts as hosts_module
from wove_ws_sync.worker import kept as kept_module
from wove_ws_sync.worker.commands import AttachTask, Resume, RunTask
from wove_ws_sync.worker.greeting import Greeting
from wove_ws_sync.worker.host import Host
from wove_ws_sync.worker.hosts import HostTable
from wove_ws_sync.worker.kept import Account, Kept, KeptEvents
from wove_ws_sync.worker.runs import BeatSchedule, Run, RunState, RunTable

FULL = ("resume", "ack", "drain")
POLICIES = ("fail", "cancel", "requeue", "detach")
DAY = 86400.0


def greeting(name: str = "a" * 32, *, window: float = 10.0, features: tuple[str, ...] = FULL) -> Greeting:
    return Greeting(True, features, 1_000_000, name if "resume" in features else "", window)


def attach(run_id: str, *, beat: float | None = None, policy: str = "detach") -> AttachTask:
    return AttachTask(run_id, "task", beat, "require_ack", policy)


def error_of(kept: Any) -> dict[str, Any]:
    assert isinstance(kept, Kept)
    error: dict[str, Any] = json.loads(kept.event)["error"]
    return error


class Service:
    """A host table with connections that are names, and a run for the asking."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.table = HostTable(self.counters, max_kept_bytes=64 * 1024 * 1024)

    def enter(self, connection: str, now: float = 0.0, key: str = "key", **said: Any) -> Host:
        host, before, stopped = self.table.enter(key, greeting(**said), connection, now)
        self.before, self.stopped = before, [run.run_id for run in stopped]
        return host

    def run(self, host: Host, run_id: str, policy: str = "cancel") -> Run:
        run = host.runs.accept(RunTask(run_id, "task", "pickle", None, None, "best_effort", policy), host)
        assert run is not None
        return run

    def end(self, run: Run, now: float = 0.0, event: bytes = b"the end") -> None:
        assert run.owner.runs.ended(run)
        run.owner.keep(run, event, now)

    def away(self, host: Host, now: float) -> list[str]:
        return [run.run_id for run in self.table.leave(host, now)]

    def due(self, now: float) -> list[str]:
        return sorted(run.run_id for run in self.table.due(now))


@pytest.fixture
def service() -> Service:
    return Service()


def lists(host: Host, *run_ids: str, more: bool = False, now: float = 0.0) -> dict[str, list[str]]:
    state = host.resume(Resume(run_ids, more), now).state
    return {key: value for key, value in state.items() if key != "type" and value}


class TestResume:
    """What a host that comes back is told."""

    def test_each_run_is_in_the_list_that_it_belongs_to(self, service: Service) -> None:
        """Queued and running ones are alive, kept ends finished, what never arrived is unknown."""
        host = service.enter("one")
        service.run(host, "queued")
        host.runs.started(service.run(host, "running"))
        service.end(service.run(host, "ended"))
        service.away(host, 1.0)
        assert service.enter("two", 2.0) is host
        resumed = host.resume(Resume(("ended", "queued", "never", "running", "queued"), False), 2.0)
        assert resumed.state == {
            "type": "resume_state",
            "alive": ["queued", "running"],
            "finished": ["ended"],
            "unknown": ["never"],
            "lost": [],
        }
        assert [kept.event for kept in resumed.ended] == [b"the end"] and resumed.stopped == []

    def test_a_host_that_is_not_known_has_lost_everything(self, service: Service) -> None:
        """Of its runs nothing can be said, but for those that it has sent since."""
        host = service.enter("one")
        service.run(host, "new")
        assert lists(host, "old", "new") == {"lost": ["old"], "alive": ["new"]}

    def test_names_belong_to_a_key(self, service: Service) -> None:
        """The same name under another key is another host."""
        host = service.enter("one", key="key")
        service.run(host, "r")
        other = service.enter("two", key="other")
        assert other is not host and service.before is None
        assert lists(other, "r") == {"lost": ["r"]}

    def test_what_is_not_listed_ends_after_the_last_list(self, service: Service) -> None:
        """Runs are stopped without an event, kept ends dropped; not before ``more`` is false."""
        host = service.enter("one")
        kept, dropped = service.run(host, "kept"), service.run(host, "dropped")
        service.end(service.run(host, "old end"))
        service.away(host, 1.0)
        service.enter("two", 2.0)
        late = service.run(host, "late")
        assert host.resume(Resume(("kept",), True), 2.0).stopped == []
        assert host.resume(Resume((), False), 2.0).stopped == [dropped]
        assert [kept.state, late.state, dropped.state] == [RunState.QUEUED] * 2 + [RunState.ENDED]
        assert host.kept is not None and len(host.kept) == 0

    def test_what_is_under_detach_and_not_listed_is_let_go(self, service: Service) -> None:
        """Alive or ended, another host of the key may attach to it."""
        host = service.enter("one")
        alive, ended = service.run(host, "alive", "detach"), service.run(host, "ended", "detach")
        service.end(ended)
        service.away(host, 1.0)
        service.enter("two", 2.0)
        assert host.resume(Resume((), False), 2.0).stopped == []
        other = service.enter("three", name="b" * 32)
        assert other.attach(attach("alive"), 3.0) is alive
        assert isinstance(other.attach(attach("ended"), 3.0), Kept)

    def test_a_newer_connection_takes_over(self, service: Service) -> None:
        """The one before is returned to be closed; its end later changes nothing."""
        host = service.enter("one")
        run = service.run(host, "r")
        assert service.enter("two", 1.0) is host
        assert (service.before, host.connection, host.unconfirmed) == ("one", "two", {"r"})
        assert lists(host, "r") == {"alive": ["r"]} and host.unconfirmed == set()
        assert service.table.next_at() is None and run.state is RunState.QUEUED

    def test_after_a_dropped_end_nothing_is_called_unknown(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be the one that was dropped, and must not be taken for a run that never arrived."""
        service.table._max_kept_bytes = 100
        host = service.enter("one")
        for number in range(30):
            service.end(service.run(host, f"r{number}"), event=b"tiny event")
        service.away(host, 1.0)
        service.enter("two", 2.0)
        assert lists(host, "r0", "r29") == {"lost": ["r0"], "finished": ["r29"]}

    @pytest.mark.parametrize("where", ["dropped", "taken", "displaced"])
    def test_what_was_let_go_for_a_host_and_is_gone_is_lost(self, service: Service, where: str) -> None:
        """It ran, so it must not be called unknown, which would have it sent again."""
        host, other = service.enter("one", window=1.0), service.enter("two", name="b" * 32)
        run = service.run(host, "r", "detach")
        service.away(host, 0.0)
        assert service.due(1.0) == []
        if where == "taken":
            assert other.attach(attach("r"), 2.0) is run
        elif where == "displaced":
            service.run(other, "r")
            assert other.let_go("r", 2.0) == [run]
            assert other.attach(attach("r"), 2.0) is not None
        else:
            service.end(run, 2.0)
            for number in range(1000):
                service.end(service.run(other, f"r{number}"), 3.0)
                other.let_go(f"r{number}", 3.0)
        assert service.enter("three", 4.0) is host
        assert lists(host, "r") == {"lost": ["r"]}

    def test_a_host_that_has_been_told_starts_afresh(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the last ``resume`` a run that never arrived is unknown again; what was lost stays lost."""
        service.table._max_kept_bytes = 100
        host = service.enter("one", window=1.0)
        for number in range(30):
            service.end(service.run(host, f"r{number}"), event=b"tiny event")
        service.run(host, "d", "detach")
        service.away(host, 1.0)
        service.due(2.0)
        service.enter("two", 3.0)
        assert lists(host, "r0", more=True) == {"lost": ["r0"]}
        assert lists(host, "r1", "never") == {"lost": ["r1", "never"]}
        for connection in ("three", "four"):  # the answers may not have arrived
            service.enter(connection, 4.0)
            assert lists(host, "r0", "r1", "late") == {"lost": ["r0", "r1"], "unknown": ["late"]}

    def test_a_new_host_has_lost_nothing(self, service: Service) -> None:
        """What it lists never arrived, as it was never here, though a first connection broke."""
        host = service.enter("one")
        service.away(host, 1.0)
        service.enter("two", 2.0)
        assert lists(host, "r") == {"unknown": ["r"]}

    def test_a_forgotten_host_has_lost_everything_until_it_was_told(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its runs may have run here, also if the next connection breaks before it asks."""
        monkeypatch.setattr(hosts_module, "_MAX_AWAY", 0)
        service.away(service.enter("one"), 1.0)
        monkeypatch.setattr(hosts_module, "_MAX_AWAY", 1000)
        host = service.enter("two", 2.0)
        service.away(host, 3.0)
        assert service.enter("three", 4.0) is host
        assert lists(host, "r", more=True) == {"lost": ["r"]}
        service.enter("four", 5.0)
        assert lists(host, "r", "s") == {"lost": ["r", "s"]}
        assert lists(host, "t") == {"unknown": ["t"]}

    def test_a_detach_of_the_hosts_own_hides_nothing(self, service: Service) -> None:
        """The host knows that it let go of the run: others that never arrived are unknown."""
        host = service.enter("one")
        service.run(host, "mine")
        assert host.let_go("mine", 0.0) == []
        service.enter("two", 1.0)
        assert lists(host, "never") == {"unknown": ["never"]}

    def test_a_host_that_said_shutdown_is_forgotten(self, service: Service) -> None:
        """When its connection ends, or when a newer one comes before that."""
        for early in (False, True):
            host = service.enter("one")
            service.run(host, "r", "detach")
            host.leaving = True
            if not early:
                assert service.away(host, 1.0) == ["r"]
            again = service.enter("two", 2.0)
            assert again is not host
            assert (service.before, service.stopped) == (("one", ["r"]) if early else (None, []))
            assert lists(again, "r") == {"lost": ["r"]}
            again.leaving = True
            service.away(again, 3.0)

    def test_without_resume_nothing_outlives_the_connection(self, service: Service) -> None:
        """Whatever the policy of its runs is."""
        for features in ((), ("ack", "drain")):
            host = service.enter("one", features=features)
            for policy in POLICIES:
                service.run(host, policy, policy)
            assert len(service.away(host, 1.0)) == 4
            assert service.table.next_at() is None and service.table.live_runs() == []
            assert service.enter("two", features=features) is not host


class TestAway:
    """What an absence ends, by the table on the page of the wire protocol."""

    def test_the_window_ends_runs_by_their_policy(self, service: Service) -> None:
        """ "cancel" leaves HostAway, "detach" is let go, the others go on until the host is forgotten."""
        host = service.enter("one", window=5.0)
        runs = {
            policy: service.run(host, policy, policy) for policy in ("fail", "cancel", "requeue", "detach")
        }
        service.away(host, 100.0)
        assert service.table.next_at() == 105.0
        assert service.due(104.9) == []
        assert service.due(105.0) == ["cancel"]
        assert runs["detach"].owner is not host and runs["detach"].state is RunState.QUEUED
        assert host.kept is not None
        error = error_of(host.kept.get("cancel"))
        assert (error["kind"], error["retryable"]) == ("HostAway", True) and "5 s" in error["message"]
        assert service.table.next_at() == 1000.0
        assert service.due(1000.0) == ["fail", "requeue"]
        assert lists(service.enter("two", 1001.0), "fail") == {"lost": ["fail"]}

    def test_a_host_that_comes_back_in_time_loses_nothing(self, service: Service) -> None:
        """And the next absence is counted from its own beginning, with the new window."""
        host = service.enter("one", window=5.0)
        service.run(host, "r")
        service.away(host, 0.0)
        service.enter("two", 4.9, window=7.0)
        assert service.table.next_at() is None and service.due(DAY) == []
        service.away(host, 100.0)
        assert service.table.next_at() == 107.0

    def test_after_the_window_it_still_has_what_is_kept(self, service: Service) -> None:
        """HostAway is among the finished, what was let go is taken back."""
        host = service.enter("one", window=0.0)
        service.run(host, "cancelled")
        detached, ended = service.run(host, "detached", "detach"), service.run(host, "ended", "detach")
        service.end(ended)
        service.away(host, 0.0)
        assert service.due(0.0) == ["cancelled"]
        assert service.enter("two", 1.0) is host
        assert lists(host, "cancelled", "detached", "ended") == {
            "alive": ["detached"],
            "finished": ["cancelled", "ended"],
        }
        assert detached.owner is host

    def test_a_long_window_is_kept_beyond_the_15_minutes(self, service: Service) -> None:
        """The host is forgotten at the end of its window then; what is under detach is let go."""
        host = service.enter("one", window=3600.0)
        detached = service.run(host, "detached", "detach")
        service.run(host, "queued", "requeue")
        service.away(host, 0.0)
        assert service.due(3599.0) == []
        assert service.due(3600.0) == ["queued"]
        assert service.enter("two", 3601.0) is not host
        assert service.enter("three", name="b" * 32).attach(attach("detached"), 3602.0) is detached

    def crowd(self, service: Service, count: int, *, empty: bool, window: float = 10.0) -> None:
        """Have as many more hosts away, each with a run or each with nothing."""
        for number in range(count):
            host = service.enter("c", name=f"host{number} {empty} {window}", window=window)
            if not empty:
                service.run(host, f"r{number}", "fail")
            service.away(host, 1.0)

    def test_1000_hosts_may_be_away(self, service: Service) -> None:
        """The one that is away for longest is forgotten for the next one; it is counted."""
        first = service.enter("c", name="first")
        service.run(first, "r", "fail")
        detached = service.run(first, "d", "detach")
        service.away(first, 0.0)
        self.crowd(service, 999, empty=False)
        assert service.counters["forgotten_host"] == 0
        last = service.enter("c", name="one more")
        service.run(last, "s")
        assert service.away(last, 2.0) == ["r"]
        assert service.counters["forgotten_host"] == 1
        assert service.enter("c", 3.0, name="first") is not first
        assert service.enter("c", 3.0, name="host0").attach(attach("d"), 3.0) is detached

    def test_hosts_with_nothing_here_are_forgotten_first(self, service: Service) -> None:
        """However many of them come and go, they cost nobody else a run or an end."""
        running, ended = service.enter("c", name="running"), service.enter("c", name="ended")
        service.run(running, "r", "fail")
        service.end(service.run(ended, "e"))
        for host in (running, ended):
            service.away(host, 0.0)
        self.crowd(service, 1500, empty=True)
        assert service.counters["forgotten_host"] == 502
        assert service.enter("c", 2.0, name="running") is running and lists(running, "r") == {"alive": ["r"]}
        assert service.enter("c", 2.0, name="ended") is ended and lists(ended, "e") == {"finished": ["e"]}

    def test_then_those_whose_window_is_over(self, service: Service) -> None:
        """They were away for longer than they said they would be."""
        patient = service.enter("c", name="patient", window=600.0)
        service.run(patient, "r", "fail")
        service.away(patient, 0.0)
        self.crowd(service, 999, empty=False, window=5.0)
        service.due(10.0)
        self.crowd(service, 10, empty=False, window=600.0)
        assert service.counters["forgotten_host"] == 10
        assert service.enter("c", 11.0, name="patient") is patient

    def test_what_is_kept_for_all_that_are_away_is_bounded(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The host that is away for longest gives up first, the latest keeps its newest of any size."""
        monkeypatch.setattr(hosts_module, "_MAX_UNHEARD_BYTES", 100_000)
        hosts = [service.enter("c", name=name) for name in ("old", "new", "last")]
        for host in hosts:
            for run_id in "ab":
                service.end(service.run(host, run_id), event=b"x" * 30_000)
        for moment, host in enumerate(hosts):
            service.away(host, float(moment))
            assert service.table._unheard.bytes <= 100_000
        sizes = [
            [len(kept.event) for run_id in host.kept if (kept := host.kept.get(run_id))]
            for host in hosts
            if host.kept
        ]
        assert [[size > 1000 for size in each] for each in sizes] == [[False] * 2, [False, True], [True] * 2]
        huge = service.enter("c", name="huge")
        service.end(service.run(huge, "r"), event=b"x" * 300_000)
        service.away(huge, 9.0)
        assert [len(host.kept or ()) for host in hosts] == [0, 0, 0]
        kept = huge.kept and huge.kept.get("r")
        assert kept and len(kept.event) == 300_000
        assert service.enter("c", 9.0, name="new") is hosts[1]
        assert lists(hosts[1], "b", "never") == {"lost": ["b", "never"]}

    def test_shelves_share_that_bound(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        """After the hosts that are away, the oldest end on a shelf goes; what is fetched counts no more."""
        monkeypatch.setattr(hosts_module, "_MAX_UNHEARD_BYTES", 100_000)
        host = service.enter("c")
        for run_id in "abcd":
            service.end(service.run(host, run_id), event=b"x" * 30_000)
            host.let_go(run_id, 0.0)
            service.table.make_room()
        assert service.table._unheard.bytes == 3 * 30_512
        assert host.attach(attach("a"), 1.0) is None and host.attach(attach("b"), 1.0) is not None
        assert service.table._unheard.bytes == 2 * 30_512


class TestDetach:
    """Runs that are let go, and who may take them."""

    def test_another_host_of_the_key_takes_a_run_with_its_own_delivery(self, service: Service) -> None:
        """Once; the run goes on, and the new host owns it."""
        host, other = service.enter("one"), service.enter("two", name="b" * 32)
        run = service.run(host, "r")
        host.runs.started(run)
        assert host.let_go("r", 0.0) == []
        assert host.runs.get("r") is None and run.owner.connection is None
        assert other.attach(attach("r", beat=0.5), 1.0) is run
        assert (run.owner, run.state) == (other, RunState.RUNNING)
        assert (run.beat_interval, run.cancel_mode, run.orphan_policy) == (0.5, "require_ack", "detach")
        assert host.attach(attach("r"), 2.0) is None
        assert other.attach(attach("r", beat=0.5), 2.0) is run

    def test_another_key_has_no_such_run(self, service: Service) -> None:
        """Nor has a host without ``resume``; the end as well is for the same key only."""
        host, stranger = service.enter("one"), service.enter("two", key="other", name="b" * 32)
        service.run(host, "alive")
        service.end(service.run(host, "ended"))
        for run_id in ("alive", "ended"):
            assert host.let_go(run_id, 0.0) == []
            assert stranger.attach(attach(run_id), 1.0) is None
            assert host.find(run_id, 2.0) is not None

    def test_an_end_is_fetched_once(self, service: Service) -> None:
        """It is then kept for the host that fetched it, until that acknowledges it."""
        host, other = service.enter("one"), service.enter("two", name="b" * 32)
        run = service.run(host, "r")
        host.let_go("r", 0.0)
        service.end(run, 5.0)
        kept = other.attach(attach("r"), 6.0)
        assert isinstance(kept, Kept) and kept.event == b"the end" and kept.run.owner is other
        assert (kept.run.cancel_mode, kept.run.orphan_policy) == ("require_ack", "detach")
        assert host.attach(attach("r"), 7.0) is None
        assert other.kept is not None and other.kept.pop("r") is not None
        assert other.attach(attach("r"), 8.0) is None

    def test_a_run_of_a_host_that_holds_it_is_not_to_be_had(self, service: Service) -> None:
        """Neither alive nor ended."""
        host, other = service.enter("one"), service.enter("two", name="b" * 32)
        service.run(host, "alive")
        service.end(service.run(host, "ended"))
        assert other.attach(attach("alive"), 1.0) is other.attach(attach("ended"), 1.0) is None
        assert host.let_go("never", 1.0) is None

    def test_only_the_host_that_let_go_gets_it_back_by_resume(self, service: Service) -> None:
        """For another host, that lists the same id, it is unknown."""
        host, other = service.enter("one"), service.enter("two", name="b" * 32)
        service.run(host, "r")
        host.let_go("r", 0.0)
        service.away(other, 1.0)
        service.enter("two", 2.0, name="b" * 32)
        assert lists(other, "r") == {"unknown": ["r"]}
        service.away(host, 1.0)
        service.enter("one", 2.0)
        assert lists(host, "r") == {"alive": ["r"]}

    def test_an_end_is_kept_for_15_minutes(self, service: Service) -> None:
        """Counted from the end of the run; a run that is alive is kept as long as it runs."""
        host = service.enter("one")
        run = service.run(host, "r")
        host.let_go("r", 0.0)
        assert service.table.next_at() is None
        service.end(run, DAY)
        assert service.table.next_at() == DAY + 900
        service.due(DAY + 899)
        assert service.counters["expired_run"] == 0
        service.due(DAY + 900)
        assert service.counters["expired_run"] == 1 and service.table.next_at() is None
        assert host.attach(attach("r"), DAY + 901) is None

    def test_1000_ends_are_kept(self, service: Service) -> None:
        """The oldest makes room."""
        host = service.enter("one")
        for number in range(1001):
            service.end(service.run(host, f"r{number}"))
            host.let_go(f"r{number}", float(number))
        assert host.attach(attach("r0"), 2000.0) is None
        assert host.attach(attach("r1"), 2000.0) is not None

    def test_the_same_id_let_go_twice(self, service: Service) -> None:
        """Two hosts with one run_id: the later run has the place, the earlier one is to be stopped."""
        host, other = service.enter("one"), service.enter("two", name="b" * 32)
        first, second = service.run(host, "r"), service.run(other, "r")
        assert host.let_go("r", 0.0) == []
        assert other.let_go("r", 0.0) == [first]
        assert first.state is RunState.ENDED
        service.end(service.run(host, "r"))
        assert host.let_go("r", 0.0) == [second]
        assert isinstance(other.attach(attach("r"), 1.0), Kept)


ACTIONS = (
    *("run", "end", "let go", "attach") * 3,
    *("enter", "leave", "resume", "ack", "time") * 2,
    "goodbye",
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["enter", "leave", "run", "end", "let go", "attach", "resume", "ack", "goodbye", "time"]
        ),
        st.integers(0, 1),
        st.integers(0, 3),
        st.sampled_from(POLICIES),
    ),
    min_size=30,
    max_size=60,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_every_run_is_in_one_place_whatever_happens(steps: list[tuple[str, int, int, str]]) -> None:
    """Alive with one owner, or ended with at most one kept end; what is to be stopped has ended."""
    service, now, runs = Service(), 0.0, list[Run]()
    for action, who, which, policy in steps:
        name, run_id = "ab"[who] * 32, f"r{which}"
        host = service.table._named.get(("key", name))
        stopped: list[Run] = []
        if action == "time":
            now += (3.0, 15.0, 500.0, 1000.0)[which]
            stopped = service.table.due(now)
        elif action == "enter" or host is None or host.connection is None:
            stopped = service.table.enter("key", greeting(name), f"connection {now}", now)[2]
        elif action == "leave":
            stopped = service.table.leave(host, now)
        elif action == "run" and host.find(run_id, now) is None:
            runs.append(service.run(host, run_id, policy))
        elif action == "end":
            alive = [run for run in runs if run.state is not RunState.ENDED]
            if alive:
                service.end(alive[which % len(alive)], now)
        elif action == "let go":
            stopped = host.let_go(run_id, now) or []
        elif action == "attach":
            host.attach(attach(run_id, policy=policy), now)
        elif action == "resume":
            stopped = host.resume(Resume((run_id,), which == 3), now).stopped
        elif action == "ack" and host.kept is not None:
            host.kept.pop(run_id)
        elif action == "goodbye":
            host.leaving = True
        assert all(run.state is RunState.ENDED for run in stopped)
        alive = [run for run in runs if run.state is not RunState.ENDED]
        assert sorted(map(id, alive)) == sorted(map(id, service.table.live_runs()))
        for run in alive:
            assert run.owner.runs.get(run.run_id) is run
        for owner in service.table._owners():
            kept = owner.kept
            for run_id in kept or ():
                entry = kept and kept.get(run_id)
                assert entry and entry.run.owner is owner and entry.run.state is RunState.ENDED
                assert owner.runs.get(run_id) is None
        moment = service.table.next_at()
        assert moment is None or moment >= 0.0


class TestKeptEvents:
    """The bounds of what is kept."""

    @staticmethod
    def run(run_id: str) -> Run:
        run = RunTable().accept(RunTask(run_id, "task", "pickle", None, None, "best_effort"))
        assert run is not None
        return run

    @pytest.fixture(autouse=True)
    def counters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kept_module, "OVERHEAD", 0)
        self.lost: Counter[str] = Counter()

    def keeping(self, max_bytes: int, stub: bytes | None = None) -> KeptEvents:
        return KeptEvents(max_bytes, self.lost, stub=None if stub is None else lambda run: stub)

    def put(self, kept: KeptEvents, run_id: str, size: int) -> int:
        """Return how many events have lost their content for this one."""
        before = self.lost["dropped_result"]
        kept.put(self.run(run_id), b"x" * size, 0.0)
        return self.lost["dropped_result"] - before

    def test_the_newest_does_not_count(self) -> None:
        """One event larger than the bound is kept until the next one comes."""
        kept = self.keeping(100, b"stub")
        assert self.put(kept, "large", 5000) == 0
        large = kept.get("large")
        assert large is not None and len(large.event) == 5000
        assert self.put(kept, "next", 10) == 1
        assert [kept.get(run_id) and kept.get(run_id).event[:4] for run_id in kept] == [b"stub", b"xxxx"]  # type: ignore[union-attr]

    def test_the_oldest_are_replaced_first(self) -> None:
        """As many as it takes; what is replaced or acknowledged makes room."""
        kept = self.keeping(110, b"stub")
        assert [self.put(kept, name, 50) for name in "abc"] == [0, 0, 0]
        assert self.put(kept, "d", 50) == 1
        assert kept.pop("b") is not None
        assert self.put(kept, "e", 40) == 0
        sizes = {run_id: len(entry.event) for run_id in kept if (entry := kept.get(run_id))}
        assert sizes == {"a": 4, "c": 50, "d": 50, "e": 40}
        assert not kept.incomplete

    def test_stubs_are_bounded_as_well(self) -> None:
        """When only stubs are left, the oldest of them are dropped, and that is remembered."""
        kept = self.keeping(100, b"x" * 30)
        for number in range(20):
            self.put(kept, str(number), 1000)
        assert list(kept) == ["16", "17", "18", "19"] and kept.incomplete

    def test_tiny_events_are_dropped_and_not_made_larger(self) -> None:
        """A stub that needs more room than the event is no help."""
        kept = self.keeping(100, b"x" * 30)
        for number in range(20):
            self.put(kept, str(number), 10)
        assert len(kept) == 11 and kept.incomplete

    def test_an_event_that_is_put_again_counts_once(self) -> None:
        """It is the newest then."""
        kept = self.keeping(100)
        for _ in range(10):
            self.put(kept, "r", 60)
            self.put(kept, "s", 30)
        assert list(kept) == ["r", "s"] and not kept.incomplete

    def test_what_an_event_takes_besides_its_bytes_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So a flood of empty results is bounded as well."""
        monkeypatch.setattr(kept_module, "OVERHEAD", 512)
        kept, account = self.keeping(51_200), Account()
        kept.book(account)
        for number in range(500):
            self.put(kept, str(number), 0)
        assert len(kept) == 101 and account.bytes == 101 * 512
        kept.pop("499")
        assert account.bytes == 100 * 512
        kept.book(None)
        assert account.bytes == 0

    def test_many_can_be_forgotten_and_replaced_quickly(self) -> None:
        """100,000 events over the bound, acknowledged from the front: no search from the front each time."""
        kept = self.keeping(50_000 * 100)
        for number in range(100_000):
            self.put(kept, str(number), 100)
        assert len(kept) == 50_001
        for number in range(50_000, 100_000):
            kept.pop(str(number))
        assert len(kept) <= 1


class TestGreeting:
    """The headers of a host."""

    @staticmethod
    def read(**headers: str | list[str]) -> Greeting:
        values = {name.replace("_", "-"): [v] if isinstance(v, str) else v for name, v in headers.items()}
        return Greeting.read(lambda name: values.get(name.removeprefix("X-Wove-"), []))

    @pytest.mark.parametrize(
        ("sync", "host", "features"),
        [
            ("1", "a" * 32, ()),
            ("1; f=", "a" * 32, ()),
            ("1; f=resume,ack,drain", "a" * 32, ("resume", "ack", "drain")),
            ("1; f=drain,ack,resume", "A0" * 16, ("resume", "ack", "drain")),
            (" 1 ;f= bin , ack ,seal", "a" * 32, ("ack",)),
            ("1; q=resume; f=drain", "a" * 32, ("drain",)),
            ("1; f=resume,drain", "a" * 32, ("drain",)),
            *(
                ("1; f=resume,ack", odd, ("ack",))
                for odd in ("", "a" * 31, "a" * 33, "g" * 32, "\u0661" * 32)
            ),
        ],
    )
    def test_extensions_are_those_that_both_sides_know(
        self, sync: str, host: str, features: tuple[str, ...]
    ) -> None:
        """In our order; ``resume`` needs ``ack`` and a name."""
        found = self.read(Sync=sync, Host=host)
        assert found.ours and found.features == features
        assert found.host_id == (host.lower() if "resume" in features else "")
        answer = found.answer("w", 5, {"queued", "calls"})
        assert answer["X-Wove-Sync"] == "1" + ("; f=" + ",".join(features) if features else "")
        assert (answer["X-Wove-Worker"], answer["X-Wove-Max-Message"]) == ("w", "5")
        assert answer["X-Wove-Cancels"] == "calls, queued"

    @pytest.mark.parametrize("sync", [[], ["2; f=ack"], ["1", "1"], ["11"], [""], ["ack"]])
    def test_another_version_is_a_foreign_host(self, sync: list[str]) -> None:
        """It is answered nothing and uses nothing."""
        found = self.read(Sync=sync, Host="a" * 32, Max_Message="5000000")
        assert found == Greeting(False, (), 1024 * 1024 - 1, "", 0.0)
        assert found.answer("w", 5, {"queued", "calls"}) == {}

    @pytest.mark.parametrize(
        ("text", "window"),
        [("0", 0), ("2.5", 2.5), ("1e2", 100), ("-1", 0), ("9" * 30, 3600), ("3601", 3600)]
        + [(odd, 10) for odd in ("", "x", "nan", "inf", "-inf", "1e999", "1,5", "0x10", ["1", "2"], [])],
    )
    def test_an_odd_window_is_ten_seconds(self, text: Any, window: float) -> None:
        """Numbers are kept from 0 to an hour."""
        assert self.read(Sync="1", Resume_Window=text).window == window


def test_a_run_with_a_new_interval_beats_by_that_only() -> None:
    """Its earlier place in the schedule is given up, whichever of the two intervals is shorter."""
    for first, second in ((9.0, 1.0), (1.0, 9.0)):
        run = RunTable().accept(RunTask("r", "task", "pickle", None, first, "best_effort"))
        assert run is not None
        schedule = BeatSchedule()
        schedule.add(run, 0.0)
        run.beat_interval = second
        schedule.add(run, 0.0)
        beats = [moment for moment in range(1, 19) if list(schedule.due(float(moment)))]
        assert beats == [moment for moment in range(1, 19) if moment % second == 0]
        run.beat_interval = None
        schedule.add(run, 20.0)
        assert schedule.next_at() is None
