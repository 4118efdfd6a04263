"""The fixtures of conftest.py do what they promise; each test here runs a pytest of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return a folder for a pytest run with the real conftest, which gives up waiting sooner."""
    text = CONFTEST.read_text(encoding="utf-8")
    hasty = text.replace("SETTLE_TIMEOUT = 10.0", "SETTLE_TIMEOUT = 0.2")
    assert hasty != text
    pytester.makeconftest(hasty)
    return pytester


def test_what_a_test_leaves_behind_fails_that_test_and_no_other(inner: pytest.Pytester) -> None:
    """A thread, a descriptor or a run that outlives its test is that test's fault, not the next one's."""
    inner.makepyfile(
        """
        import os, sys, threading, types

        class Link:
            def stats(self):
                return {"runs": 1}
            def __repr__(self):
                return "<busy link>"

        left = []
        sys.modules["wove_ws_sync.link"] = types.SimpleNamespace(Link=Link)

        def test_thread():
            threading.Thread(target=threading.Event().wait, name="wove-ws-reader-9", daemon=True).start()

        def test_innocent():
            pass

        def test_descriptor():
            left.append(os.pipe())

        def test_run():
            closed = threading.Event()
            sys.modules["wove_ws_sync.session"] = types.SimpleNamespace(close_links=closed.set)
            threading.Thread(target=closed.wait, name="wove-ws-reader-9", daemon=True).start()
            left.append(Link())

        def test_innocent_too():
            pass
        """
    )
    outcome = inner.runpytest_subprocess()
    outcome.assert_outcomes(passed=5, errors=3)
    outcome.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_thread*",
            "the test left behind: {'threads': ['wove-ws-reader-9']}",
            "*ERROR at teardown of test_descriptor*",
            "the test left behind: {'descriptors': *pipe:*pipe:*",
            "*ERROR at teardown of test_run*",
            "the test left behind: {'runs': ['<busy link>']}",
        ]
    )


def test_a_kept_link_is_closed_and_settings_are_taken_back(inner: pytest.Pytester) -> None:
    """Links are closed after a test, ``wove.config`` is back at its defaults, ``websocket`` is Wove's own."""
    inner.makepyfile(
        """
        import sys, threading, types
        import wove.environment, wove.runtime, wove_ws_sync

        own = type(wove.environment.coerce_executor("websocket"))
        defaults = wove.runtime.runtime.snapshot()

        def test_keeps_a_link():
            closed = threading.Event()
            sys.modules["wove_ws_sync.session"] = types.SimpleNamespace(close_links=closed.set)
            threading.Thread(target=closed.wait, name="wove-ws-reader-9", daemon=True).start()

        def test_configures():
            wove_ws_sync.config(
                default_environment="far",
                environments={"far": {"executor": "websocket"}},
                max_workers=3,
            )
            assert type(wove.environment.coerce_executor("websocket")) is not own

        def test_is_none_the_wiser():
            assert wove.runtime.runtime.snapshot() == defaults
            assert type(wove.environment.coerce_executor("websocket")) is own
        """
    )
    inner.runpytest_subprocess().assert_outcomes(passed=3)
