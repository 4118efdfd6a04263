"""``wove-ws-sync bench``: this package against Wove's own executor, side by side.

Owns: the order of the samples, the statistics and the output. Never: judges by the exit
code; a goal that is missed is a measurement like any other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ._bench_cases import CASES
from ._bench_ground import Case, Ground, Ratio

__all__ = ["register"]

_ROUNDS, _QUICK_ROUNDS = 15, 3
# Seconds after which a case begins no further round.
_CASE_LIMIT, _QUICK_CASE_LIMIT = 60.0, 4.0
_PACKAGES = ("wove", "websockets", "websocket-client", "cloudpickle")

_Samples = dict[str, list[float]]


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="compare with Wove's own websocket executor",
        description="Measure this package, Wove's own websocket executor and a bare echo in turn, on one "
        "worker service of this machine. The exit code is 0 when a goal is missed, too.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few samples, within about twenty seconds")
    add("--json", action="store_true", help="print one object instead of tables")
    add(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=[name for name in CASES if name != "cores" or importlib.util.find_spec("pebble")],
        metavar="CASE",
        help=f"which of {', '.join(CASES)} (default: all; cores if pebble is installed)",
    )
    add(
        "--repeat",
        type=_positive,
        metavar="N",
        help=f"rounds of each case (default: {_ROUNDS}, or {_QUICK_ROUNDS} with --quick)",
    )
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _run(options: argparse.Namespace) -> int:
    rounds = options.repeat or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    limit = _QUICK_CASE_LIMIT if options.quick else _CASE_LIMIT
    report = {**_about(), "quick": options.quick, "rounds": rounds, "cases": []}
    show: Callable[[str], None] = (lambda _: None) if options.json else (lambda text: print(text, flush=True))
    show(_heading(report))
    try:
        with Ground() as ground:
            for name in dict.fromkeys(options.cases):
                case = CASES[name](ground, options.quick)
                report["cases"].append(summary(case, measure(case, rounds, limit)))
                show(_table(report["cases"][-1]))
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError:
        raise  # the command line says which extra brings it
    except Exception as exc:
        print(f"wove-ws-sync bench: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report, indent=2))
    return 0


# -- measuring ------------------------------------------------------------------------


def measure(case: Case, rounds: int, limit: float) -> _Samples:
    """Take one sample of each contestant in turn, *rounds* times, after one that does not count.

    No round begins *limit* seconds after the first one.
    """
    samples: _Samples = {contestant.name: [] for contestant in case.contestants}
    for contestant in case.contestants:
        contestant.sample()
    end = time.perf_counter() + limit
    for number in range(rounds):
        if number and time.perf_counter() > end:
            break
        for contestant in case.contestants:
            samples[contestant.name].append(contestant.sample())
    return samples


def summary(case: Case, samples: _Samples) -> dict[str, Any]:
    """Return the case as plain data: median and interquartile range of contestants and ratios."""
    contestants = [{"name": name, **_middle(values)} for name, values in samples.items()]
    for over in {ratio.over for ratio in case.ratios if ratio.over is not None}:
        for name in samples:
            if name != over:
                contestants.append({"name": f"{name} - {over}", **_middle(_less(samples, name, over))})
    return {
        "case": case.name,
        "title": case.title,
        "unit": case.unit,
        "rounds": min(len(values) for values in samples.values()),
        "contestants": contestants,
        "ratios": [_ratio(ratio, samples) for ratio in case.ratios],
    }


def _ratio(ratio: Ratio, samples: _Samples) -> dict[str, Any]:
    """Return the ratio of the medians, and the range that the quartiles of both sides leave it."""
    of, to = (_middle(_less(samples, name, ratio.over)) for name in (ratio.of, ratio.to))
    value = _divided(of["median"], to["median"])
    return {
        "name": ratio.name,
        "value": value,
        "low": _divided(of["low"], to["high"]),
        "high": _divided(of["high"], to["low"]),
        "goal": f"{'<=' if ratio.at_most else '>='} {ratio.goal:g}",
        "ok": ratio.met(value),
    }


def _divided(one: float, other: float) -> float | None:
    """Return the quotient; None if *other*, a cost, drowned in the noise."""
    return one / other if other > 0 else None


def _less(samples: _Samples, name: str, over: str | None) -> list[float]:
    """Return the samples of *name*, round by round without what *over* took in the same round."""
    if over is None:
        return samples[name]
    return [value - base for value, base in zip(samples[name], samples[over], strict=True)]


def _middle(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles around it."""
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


# -- showing --------------------------------------------------------------------------


def _about() -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpus": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _heading(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['python']}, {report['cpus']} CPUs, {versions}; median [quartiles]"


def _table(case: dict[str, Any]) -> str:
    lines = [f"\n{case['title']} ({case['unit']}, {case['rounds']} rounds)"]
    lines += [f"  {row['name']:<34}{_numbers(row['median'], row)}" for row in case["contestants"]]
    for row in case["ratios"]:
        verdict = {True: "ok", False: "missed", None: "unclear, too much noise"}[row["ok"]]
        lines.append(f"  {row['name']:<34}{_numbers(row['value'], row)}  goal {row['goal']}: {verdict}")
    return "\n".join(lines)


def _numbers(middle: float | None, row: dict[str, Any]) -> str:
    return f"{_short(middle):>9}  [{_short(row['low'])} – {_short(row['high'])}]"


def _short(number: float | None) -> str:
    if number is None:
        return "?"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
