"""``wove-ws-sync bench`` as a user runs it: what it prints, never how fast anything is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from wove_ws_sync.cli import _bench_ground as cases
from wove_ws_sync.cli import bench


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wove_ws_sync", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.slow
def test_quick_report() -> None:
    """--quick --json is one object with every case, each with finite positive medians and judged ratios."""
    done = run("--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    assert {"wove", "websockets", "websocket-client"} <= report["versions"].keys()
    assert report["python"].split()[1].startswith("3.") and report["cpus"] >= 1
    assert [case["case"] for case in report["cases"]] == [
        "weave",
        "roundtrip",
        "pipelined",
        "large",
        "cores",
        "seal",
    ]
    for case in report["cases"]:
        for row in case["contestants"]:
            assert all(math.isfinite(row[key]) for key in ("low", "median", "high")), row
            assert row["median"] > 0 or " - " in row["name"], row  # a difference may drown in noise
            assert row["low"] <= row["median"] <= row["high"], row
        for row in case["ratios"]:
            assert row["value"] is None or math.isfinite(row["value"]), row
            assert (row["ok"] is None) == (row["value"] is None), row
            assert row["goal"].split()[0] in ("<=", ">="), row


def test_table_of_one_case() -> None:
    """--cases and --repeat choose; the table names contestants, the goal and whether it was met."""
    done = run("--cases", "roundtrip", "--repeat", "2", "--quick")
    assert (done.returncode, done.stderr) == (0, "")
    assert "round trip" in done.stdout and "2 rounds" in done.stdout and "large" not in done.stdout
    verdict = next(line for line in done.stdout.splitlines() if "goal <= 3" in line)
    assert "submit().result() / bare echo" in verdict and verdict.endswith(("ok", "missed"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--cases", "nope"), "invalid choice: 'nope'"), (("--repeat", "0"), "0 is not above 0")],
)
def test_wrong_usage(arguments: tuple[str, ...], reason: str) -> None:
    """An unknown case and a repeat of zero are exit code 2 and one line that says why."""
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert reason in done.stderr.splitlines()[-1]


def test_contestants_take_turns() -> None:
    """After one sample each that does not count, every round asks each contestant once, in order."""
    asked: list[str] = []

    def contestant(name: str, values: list[float]) -> cases.Contestant:
        def sample() -> float:
            asked.append(name)
            return values.pop(0)

        return cases.Contestant(name, sample)

    both = (contestant("a", [99.0, 1.0, 2.0, 3.0]), contestant("b", [99.0, 10.0, 20.0, 30.0]))
    samples = bench.measure(cases.Case("c", "", "s", both, ()), 3, limit=60.0)
    assert asked == ["a", "b"] * 4
    assert samples == {"a": [1.0, 2.0, 3.0], "b": [10.0, 20.0, 30.0]}


def test_no_round_begins_after_the_limit() -> None:
    """The first round is always taken, so that there is something to show."""
    only = cases.Contestant("a", lambda: 1.0)
    samples = bench.measure(cases.Case("c", "", "s", (only,), ()), 1000, limit=-1.0)
    assert samples == {"a": [1.0]}


def test_arithmetic_of_a_summary() -> None:
    """Medians, quartiles, the overhead over a third contestant and the ratio, by hand."""
    ratio = cases.Ratio("r", "ours", "wove", 0.5, at_most=True, over="local")
    case = cases.Case("c", "t", "ms", (), (ratio,))
    samples = {"local": [1.0, 1.0, 1.0], "wove": [3.0, 5.0, 7.0], "ours": [2.0, 3.0, 4.0]}
    report = bench.summary(case, samples)
    rows = {row["name"]: row for row in report["contestants"]}
    assert rows["wove"] == {"name": "wove", "median": 5.0, "low": 4.0, "high": 6.0}
    assert rows["ours - local"]["median"] == 2.0 and rows["wove - local"]["median"] == 4.0
    [row] = report["ratios"]
    assert (row["value"], row["low"], row["high"], row["ok"]) == (0.5, 1.5 / 5.0, 2.5 / 3.0, True)


def test_an_overhead_that_drowns_is_not_judged() -> None:
    """If Wove's own overhead is not above zero there is no ratio, and the verdict says so."""
    ratio = cases.Ratio("r", "ours", "wove", 0.5, at_most=True, over="local")
    samples = {"local": [2.0, 2.0], "wove": [1.0, 1.0], "ours": [1.0, 1.0]}
    report = bench.summary(cases.Case("c", "t", "ms", (), (ratio,)), samples)
    [row] = report["ratios"]
    assert row["value"] is None and row["ok"] is None


def test_echo_ends_with_its_parent() -> None:
    """The echo server says where it is and ends when its stdin does."""
    command = [sys.executable, "-m", "wove_ws_sync.cli._bench_echo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline().startswith("ws://127.0.0.1:")
        server.stdin.close()
        assert server.wait(30) == 0
