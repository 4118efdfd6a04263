"""F44: threads submit while connections break and workers die, by seeded schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
from schedules import CUTS, RESTARTS, play

POLICIES = ("cancel", "fail", "requeue", "detach")
RUNS = 200
# 50 of them: 10,000 runs for each policy.
SOAK = range(100, 150)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [1, 3])
def test_f14_f44_cuts_while_threads_submit(seed: int, policy: str, tmp_path: Path) -> None:
    """The worker lives: every run brings its own result, once, and ran exactly once."""
    play(seed, policy, RUNS, tmp_path, CUTS, 5).check(policy, RUNS, alive=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_f13_f44_restarts_while_threads_submit(policy: str, tmp_path: Path) -> None:
    """Workers die and come back: one end for each run, and no more executions than the policy allows."""
    play(2, policy, RUNS, tmp_path, (*CUTS, *RESTARTS, "kill"), 3).check(policy, RUNS, alive=False)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", POLICIES)
def test_f44_ten_thousand_runs_with_cuts(policy: str, tmp_path: Path) -> None:
    """50 schedules of cuts: as in the short one."""
    for seed in SOAK:
        folder = tmp_path / str(seed)
        folder.mkdir()
        play(seed, policy, RUNS, folder, CUTS, 6).check(policy, RUNS, alive=True)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", POLICIES)
def test_f44_ten_thousand_runs_with_restarts(policy: str, tmp_path: Path) -> None:
    """50 schedules of cuts, kills and drains: as in the short one."""
    for seed in SOAK:
        folder = tmp_path / str(seed)
        folder.mkdir()
        play(seed, policy, RUNS, folder, (*CUTS, *RESTARTS, *RESTARTS), 3).check(policy, RUNS, alive=False)
